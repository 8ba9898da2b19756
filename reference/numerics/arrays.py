"""A backend's arrays: from and to the host, empty, take rows, bytes seen as numbers. All a structure needs to know.

The structures (block tables, the scheduler, the decoder) are written once and run on any backend. They hold a backend's
arrays without knowing what they are; these five ops are how such an array comes to be, is looked at, and is cut up. In
this backend an array is a `numpy.ndarray` and the device is the host, so there is little left to do: for a GPU the
same names hide copies over the bus.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Int, Shaped, UInt8
from numpy import ndarray as Array

from reference._checks import require, require_out, require_shape


def dtype_named(name: str, op: str = "dtype_named") -> np.dtype:
    """The NumPy dtype called ``name``; bfloat16 and the float8 formats, which NumPy lacks, come from ml_dtypes."""
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        dtype = np.dtype(object)
    require(not dtype.hasobject, op, "dtype", "the name of a dtype, such as 'bfloat16'", repr(name))
    return dtype


def from_host(array: np.ndarray, *, dtype: str | None = None, device: str | None = None) -> Shaped[Array, "*shape"]:
    """The backend's array with the values of a host array.

    Args:
        array: Any shape, any strides, any dtype of NumPy or ml_dtypes.
        dtype: The dtype wanted, by name ("float32", "bfloat16", "float8_e4m3fn", "int8", ...), converted as NumPy
            converts: to the nearest, ties to even, no saturation. None keeps the array's own.
        device: Where to put it; None is the backend's default. This backend knows "cpu" only.

    Returns:
        An array that shares the memory of ``array`` where it can (here: unless the dtype changes), so neither may be
        written while the other is in use.

    Raises:
        ValueError: If the device or the dtype is unknown.

    Example:
        >>> from_host(np.array([1.0, 1e-3]), dtype="bfloat16")
        array([1, 0.000999451], dtype=bfloat16)
    """
    _require_host("from_host", device)
    array = np.asarray(array)
    return array if dtype is None else array.astype(dtype_named(dtype, "from_host"), copy=False)


def to_host(x: Shaped[Array, "*shape"]) -> np.ndarray:
    """The values of a backend's array as a host array of the same dtype (ml_dtypes' where NumPy has none).

    The inverse of ``from_host``, bit for bit. May share memory with ``x``, as it does here.

    Example:
        >>> to_host(from_host(np.array([3, 4], np.int8)))
        array([3, 4], dtype=int8)
    """
    return x


def empty(shape: tuple[int, ...], *, dtype: str, device: str | None = None) -> Shaped[Array, "*shape"]:
    """An array of ``shape`` that holds whatever was there before: to be written before it is read.

    Raises:
        ValueError: If the device or the dtype is unknown.

    Example:
        >>> empty((2, 0, 3), dtype="float8_e5m2").shape
        (2, 0, 3)
    """
    _require_host("empty", device)
    return np.empty(shape, dtype_named(dtype, "empty"))


def take_rows(
    x: Shaped[Array, "num_rows *rest"],
    rows: Int[Array, " num_taken"],
    *,
    out: Shaped[Array, "num_taken *rest"] | None = None,
) -> Shaped[Array, "num_taken *rest"]:
    """A copy of some rows of ``x``, in the order asked for, laid out one after another: ``out[i] = x[rows[i]]``.

    The runner uses it to pick, out of all tokens of a step, those whose logits are wanted.

    Args:
        x: What to take from, any dtype.
        rows: Indices along the first axis, 0 <= row < num_rows, in any order and as often as wanted. There is no
            sentinel: -1 is an error, not the last row.
        out: Where to write the result; may not overlap ``x``.

    Raises:
        ValueError: If a row is out of range, or a shape or dtype is wrong.

    Example:
        >>> take_rows(np.array([[1, 2], [3, 4], [5, 6]]), np.array([2, 0]))
        array([[5, 6],
               [1, 2]])
    """
    require(x.ndim >= 1, "take_rows", "x", "at least one axis", f"shape {x.shape}")
    require_shape("take_rows", "rows", rows, (None,))
    require(rows.dtype.kind in "iu", "take_rows", "rows", "an integer dtype", rows.dtype)
    inside = rows.size == 0 or (rows.min() >= 0 and rows.max() < len(x))
    require(inside, "take_rows", "rows", f"0 <= row < {len(x)}", rows)
    require_out("take_rows", out, (len(rows), *x.shape[1:]), x.dtype)
    return np.take(x, rows, axis=0, out=out, mode="clip")  # checked above; "clip" writes to out without a buffer


def bitcast(x: UInt8[Array, "num_rows num_bytes"], dtype: str) -> Shaped[Array, "num_rows num_values"]:
    """The bytes of each row seen as numbers: a view, never a copy, so writing through it writes ``x``.

    The KV cache is one pool of bytes, a row a block; what a format keeps in a block (keys, values, scales, zeros) are
    columns of that pool, each seen in its own dtype: ``bitcast(pool[:, a:b], "float16")``.

    Args:
        x: Bytes. Rows may be strided; the bytes of a row lie together.
        dtype: By name. Its size must divide the number of bytes in a row, and every row must begin at a multiple of
            it in memory (devices read numbers only there).

    Raises:
        ValueError: If ``x`` is not such an array of bytes, or the dtype is unknown.

    Example:
        >>> pool = np.zeros((2, 6), np.uint8)
        >>> bitcast(pool[:, 2:6], "float16")[1] = 1.0       # 0x3C00
        >>> pool[1]
        array([ 0,  0,  0, 60,  0, 60], dtype=uint8)
    """
    require_shape("bitcast", "x", x, (None, None))
    require(x.dtype == np.uint8, "bitcast", "x", "uint8", x.dtype)
    target = dtype_named(dtype, "bitcast")
    num_rows, num_bytes = x.shape
    require(num_bytes % target.itemsize == 0, "bitcast", "x", f"rows of whole {dtype} values", f"{num_bytes} bytes")
    if x.size == 0:
        return np.empty((num_rows, num_bytes // target.itemsize), target)
    require(x.strides[1] == 1, "bitcast", "x", "the bytes of a row side by side", f"strides {x.strides}")
    starts = (x.ctypes.data, x.strides[0] if num_rows > 1 else 0)
    aligned = all(start % target.itemsize == 0 for start in starts)
    require(aligned, "bitcast", "x", f"rows that begin at multiples of {target.itemsize} bytes", f"strides {x.strides}")
    return x.view(target)


def _require_host(op: str, device: str | None) -> None:
    require(device in (None, "cpu"), op, "device", "None or 'cpu'", repr(device))
