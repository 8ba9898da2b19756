"""The dense linear layer: nearly all the weights of a model, and nearly all its time.

With one token it is bound by memory: every weight is read once, for one multiplication. With a few tokens it still is,
and the tokens after the first ride along; with hundreds it is bound by arithmetic. BLAS has a routine for each end of
that range, and `matmul_transposed` picks.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from reference._checks import compute_dtype, deliver, require, require_float, require_out, require_shape

FEW_TOKENS = 32  # up to here the result, which is then copied, is smaller than what BLAS would copy of the weight
TILE_WEIGHTS = 1 << 17  # of a narrow weight widened at a time: 512 KiB of float32, which stay in a core's cache


def linear(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""Multiply every token by the weight, and add the bias.

    .. math::
        out = x \, weight^T + bias

    Args:
        x: The tokens' activations.
        weight: One row for each output feature, as checkpoints store it; may be narrower than ``x``.
        bias: One number for each output feature, or None.
        out: Where to write the result; may not overlap ``x`` or ``weight``.

    Returns:
        The result, in the dtype of ``x``. Products and sums are float32, or float64 for float64 ``x``; a 16-bit weight
        is widened a few rows at a time, so that a whole copy of it never exists.

    Raises:
        ValueError: If shapes disagree, or an argument is not floating.

    Source:
        ``torch.nn.functional.linear``: same layout, same name.

    Example:
        >>> linear(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([0.0, 0.0, 10.0]))
        array([[ 1.,  2., 13.]])
    """
    check_linear("linear", x, weight.shape, bias, out)
    require_float("linear", "weight", weight)
    compute = compute_dtype(x.dtype)
    if weight.dtype == compute:
        result = matmul_transposed(x.astype(compute, copy=False), weight, out if x.dtype == compute else None)
    else:
        widen_rows = lambda tile, rows: np.copyto(tile, weight[rows])  # noqa: E731
        result = matmul_by_tiles(x.astype(compute, copy=False), len(weight), widen_rows)
    return add_bias(result, bias, None, x.dtype, out)


def matmul_transposed(x: Array, weight: Array, out: Array | None = None) -> Array:
    """``x @ weight.T``, by the BLAS call that is fastest for so many tokens.

    One token: a matrix-vector product, which streams the weight. Many: a matrix product, in which BLAS first copies
    its second operand into panels; copying all of the weight for a few tokens would cost more than the product, so
    the few tokens are made the second operand: ``(weight @ x.T).T``. (OpenBLAS, two cores, 8 tokens, 576 to 3072
    features: 0.95 ms instead of 1.4 ms; 49152: 16 ms instead of 26 ms. With 32 tokens there is little left of it.)
    """
    if not 1 < len(x) <= FEW_TOKENS:
        return np.matmul(x, weight.T, out=out)
    out = np.empty((len(x), len(weight)), x.dtype) if out is None else out
    out[...] = (weight @ x.T).T
    return out


def matmul_by_tiles(x: Array, out_features: int, fill: Callable[[Array, slice], None]) -> Array:
    """``x @ weight.T`` for a weight that becomes floats a few rows at a time: ``fill(tile, rows)`` writes them."""
    result = np.empty((len(x), out_features), x.dtype)
    for tile, rows in tiles(out_features, x.shape[1:], x.dtype):
        fill(tile, rows)
        result[:, rows] = matmul_transposed(x, tile)
    return result


def tiles(out_features: int, row_shape: tuple[int, ...], dtype: np.dtype) -> Iterator[tuple[Array, slice]]:
    """A tile to write to, and the output rows that it stands for, until all rows had their turn.

    It is the same memory every time, and holds what the last turn left: fresh memory would cost more than what is done
    with it, as the operating system hands it out page by page.

    Example:
        >>> [(tile.shape, rows.stop) for tile, rows in tiles(300, (2**10,), np.dtype(np.float32))]
        [((128, 1024), 128), ((128, 1024), 256), ((44, 1024), 300)]
    """
    step = max(1, TILE_WEIGHTS // max(1, math.prod(row_shape)))
    memory = np.empty((min(step, out_features), *row_shape), dtype)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        yield memory[: stop - start], slice(start, stop)


def check_linear(
    op: str,
    x: Array,
    weight_shape: tuple[int, ...],
    bias: Array | None,
    out: Array | None,
    residual: Array | None = None,
) -> None:
    """The door of every linear layer: ``weight_shape`` is [out_features, in_features] whatever is stored."""
    require_shape(op, "x", x, (None, None))
    require_float(op, "x", x)
    if len(weight_shape) != 2 or weight_shape[1] != x.shape[1]:
        require(False, op, "weight", f"shape [*, {x.shape[1]}]", list(weight_shape))
    if bias is not None:
        require_shape(op, "bias", bias, (weight_shape[0],))
        require_float(op, "bias", bias)
    if residual is not None:
        require_shape(op, "residual", residual, (len(x), weight_shape[0]))
        require_float(op, "residual", residual)
    require_out(op, out, (len(x), weight_shape[0]), x.dtype)


def add_bias(result: Array, bias: Array | None, residual: Array | None, dtype: np.dtype, out: Array | None) -> Array:
    """``result + bias`` in ``dtype``; ``result`` is the op's own and may be written (it may be ``out`` already).

    If there is a residual, it is added to what was rounded.
    """
    if bias is not None:
        result += bias.astype(result.dtype, copy=False)
    if residual is not None:
        return add_residual(result.astype(dtype, copy=False), residual, out)
    return result if result is out else deliver(result, dtype, out)


def add_residual(projected: Array, residual: Array, out: Array | None) -> Array:
    """The sum in the dtype of ``projected``, which is the op's own; ``out`` may be ``residual``."""
    dtype, compute = projected.dtype, compute_dtype(projected.dtype)
    if dtype == residual.dtype == compute:
        return np.add(projected, residual, out=projected if out is None else out)
    return deliver(residual.astype(compute) + projected.astype(compute), dtype, out)
