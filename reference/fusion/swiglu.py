"""SwiGLU, alone and into the linear layer (and residual) that follow.

The feed-forward of a Llama layer has two inner projections, a gate and a value. They come out of one matmul side by
side; SwiGLU folds the two halves into one, and the result goes straight into the projection back.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_float, require_out, require_shape
from reference._cores import on_every_core, row_tiles
from reference.fusion.linear_add import linear_add


def swiglu(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    *,
    out: Float[Array, "num_tokens intermediate_size"] | None = None,
) -> Float[Array, "num_tokens intermediate_size"]:
    r"""Gate the second half of each row by the SiLU of the first.

    .. math::
        out = \mathrm{silu}(gate) \cdot up \qquad \mathrm{silu}(z) = \frac{z}{1 + e^{-z}}

    Args:
        gate_up: Rows of gate, then up, of equal length.
        out: Where to write the result; may not overlap ``gate_up``.

    Returns:
        The gated rows, in the dtype of ``gate_up``.

    Raises:
        ValueError: If rows are of odd length or ``out`` has the wrong shape.

    Source:
        Shazeer, *GLU Variants Improve Transformer*, 2020, equation 6, without bias: xW is gate, xV is up.

    Example:
        >>> swiglu(np.array([[0.0, 2.0, 5.0, 5.0]])).round(3)      # gates 0 and 2; ups 5 and 5
        array([[0.   , 8.808]])
    """
    require_shape("swiglu", "gate_up", gate_up, (None, None))
    require_float("swiglu", "gate_up", gate_up)
    num_tokens, width = gate_up.shape
    require(width % 2 == 0, "swiglu", "gate_up", "rows of even length", width)
    half = width // 2
    require_out("swiglu", out, (num_tokens, half), gate_up.dtype)
    compute = compute_dtype(gate_up.dtype)
    out = np.empty((num_tokens, half), gate_up.dtype) if out is None else out

    def gate_rows(rows: slice) -> None:
        gate, up = gate_up[rows, :half].astype(compute, copy=False), gate_up[rows, half:].astype(compute, copy=False)
        gated = np.negative(gate)
        with np.errstate(over="ignore"):  # e^-z is infinite only where silu(z) = z / inf is 0 in truth as well
            np.exp(gated, out=gated)
        gated += 1.0
        np.divide(gate, gated, out=gated)
        np.multiply(gated, up, out=out[rows], casting="unsafe")  # rounded, where out is narrower

    on_every_core(gate_rows, row_tiles(num_tokens, half))
    return out


def swiglu_linear_add(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    weight: Float[Array, "out_features intermediate_size"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""SwiGLU, the projection back, and the residual: the second half of a feed-forward layer.

    .. math::
        out = residual + \mathrm{swiglu}(gate\_up) \, weight^T + bias

    Args:
        gate_up: Rows of gate, then up, of equal length.
        weight: Of the projection back to the residual stream.
        residual: The stream before the layer.
        bias: Of the projection, or None.
        out: Where to write the sum; may be ``residual``.

    Returns:
        What ``linear_add(swiglu(gate_up))`` returns, bit for bit, in the dtype of ``gate_up``.

    Raises:
        ValueError: If shapes disagree.

    Source:
        Composed from its parts.

    Example:
        >>> swiglu_linear_add(np.array([[2.0, 5.0]]), np.array([[1.0]]), np.array([[1.0]])).round(3)
        array([[9.808]])
    """
    return linear_add(swiglu(gate_up), weight, residual, bias, out=out)
