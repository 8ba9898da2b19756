"""A backend's arrays, as torch tensors. What the five ops are for: `reference/numerics/arrays.py`.

Plain torch: copies over the bus and views are calls that nothing beats.
"""

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor as Array

from fast._checks import dtype_name, require, require_integers, require_out, require_range
from fast._triton.platform import default_device
from reference.numerics.arrays import dtype_named

PINNED = 1 << 16  # bytes: an array of so many comes through pinned memory


def from_host(array: np.ndarray, *, dtype: str | None = None, device: str | None = None) -> Shaped[Array, "*shape"]:
    """Same contract as `reference.numerics.arrays.from_host`.

    The default device is the current GPU (the CPU when interpreting). The copy to a GPU has ended when this returns.
    """
    array = np.asarray(array)
    if dtype is not None:
        array = array.astype(dtype_named(dtype, "from_host"), copy=False)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch has neither
    return _from_numpy(array).to(_device("from_host", device))


def to_host(x: Shaped[Array, "*shape"]) -> np.ndarray:
    """Same contract as `reference.numerics.arrays.to_host`. Waits for the device.

    What is large comes through pinned memory, several times as fast, and lies there as long as the result is held.
    """
    x = x.detach()
    if x.is_cuda and x.nbytes >= PINNED:
        x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    x = x.cpu()
    target = dtype_named(dtype_name(x.dtype), "to_host")
    if _only_in_ml_dtypes(target):
        return x.view(getattr(torch, f"int{8 * target.itemsize}")).numpy().view(target)
    return x.numpy()


def empty(shape: tuple[int, ...], *, dtype: str, device: str | None = None) -> Shaped[Array, "*shape"]:
    """Same contract as `reference.numerics.arrays.empty`."""
    return torch.empty(shape, dtype=_dtype("empty", dtype), device=_device("empty", device))


def take_rows(
    x: Shaped[Array, "num_rows *rest"],
    rows: Int[Array, " num_taken"],
    *,
    out: Shaped[Array, "num_taken *rest"] | None = None,
) -> Shaped[Array, "num_taken *rest"]:
    """Same contract as `reference.numerics.arrays.take_rows`.

    An ``index_select``, after the rows are clamped to those that exist: a wrong one is an error when values are checked
    (``TWOFOLD_CHECK=1``), and never an access outside ``x``.
    """
    require(x.ndim >= 1, "take_rows", "x", "at least one axis", tuple(x.shape))
    require_integers("take_rows", "rows", rows, (None,))
    require(len(x) or not len(rows), "take_rows", "rows", "no rows, since x has none", len(rows))
    require_range("take_rows", "rows", rows, 0, len(x))
    require_out("take_rows", out, (len(rows), *x.shape[1:]), x.dtype)
    if not len(rows):
        return x.new_empty((0, *x.shape[1:])) if out is None else out
    bits = getattr(torch, f"int{8 * x.itemsize}")  # torch takes rows of every size, but not of every dtype
    inside = rows.clamp(0, len(x) - 1)
    if out is not None and out.is_contiguous():
        torch.index_select(x.view(bits), 0, inside, out=out.view(bits))
        return out
    taken = x.view(bits).index_select(0, inside).view(x.dtype)
    return taken if out is None else out.copy_(taken)


def bitcast(x: UInt8[Array, "num_rows num_bytes"], dtype: str) -> Shaped[Array, "num_rows num_values"]:
    """Same contract as `reference.numerics.arrays.bitcast`: a view."""
    require(x.ndim == 2, "bitcast", "x", "shape [*, *]", list(x.shape))
    require(x.dtype == torch.uint8, "bitcast", "x", "uint8", dtype_name(x.dtype))
    target = _dtype("bitcast", dtype)
    require(x.shape[1] % target.itemsize == 0, "bitcast", "x", f"rows of whole {dtype} values", f"{x.shape[1]} bytes")
    if x.numel() == 0:
        return torch.empty((len(x), x.shape[1] // target.itemsize), dtype=target, device=x.device)
    if len(x) == 1:  # the distance to a second row means nothing, but torch would look at it
        x = x.as_strided(x.shape, (x.shape[1], x.stride(1)))
    require(x.stride(1) == 1, "bitcast", "x", "the bytes of a row side by side", f"strides {x.stride()}")
    aligned = x.storage_offset() % target.itemsize == 0 and x.stride(0) % target.itemsize == 0
    require(
        aligned, "bitcast", "x", f"rows that begin at multiples of {target.itemsize} bytes", f"strides {x.stride()}"
    )
    return x.view(target)


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor."""
    if _only_in_ml_dtypes(array.dtype):  # the same bits under a name that torch knows
        bits = torch.from_numpy(array.view(np.dtype(f"i{array.dtype.itemsize}")))
        return bits.view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)


def _only_in_ml_dtypes(dtype: np.dtype) -> bool:
    return dtype.isbuiltin == 2  # registered with NumPy from outside


def _dtype(op: str, name: str) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    require(isinstance(dtype, torch.dtype), op, "dtype", "the name of a dtype, such as 'bfloat16'", repr(name))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _device(op: str, name: str | None) -> torch.device:
    try:
        return torch.device(name or default_device())
    except RuntimeError:
        raise ValueError(f"{op}: device: expected a device of torch, got {name!r}") from None
