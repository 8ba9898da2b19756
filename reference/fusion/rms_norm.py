"""RMSNorm, alone, after a residual add, and into the linear layer that follows.

A norm is a few operations per number, so its time is the trip to memory. The fused forms save one: the sum is normed
while it is still at hand, and the normed row goes into the matmul without being stored.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from reference._checks import compute_dtype, deliver, require, require_float, require_out, require_shape
from reference.linear.linear import linear


def rms_norm(
    x: Float[Array, "*rows hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "*rows hidden_size"] | None = None,
) -> Float[Array, "*rows hidden_size"]:
    r"""Divide each row by its root mean square, then scale each feature.

    .. math::
        out_i = \frac{x_i}{\sqrt{\frac{1}{n} \sum_j x_j^2 + eps}} \, weight_i

    Args:
        x: Rows of ``hidden_size`` features; heads of a query are rows too.
        weight: The learned scale of each feature.
        eps: Added to the mean square, above 0: a row of zeros stays zeros.
        out: Where to write the result; may be ``x``.

    Returns:
        The normed rows, in the dtype of ``x``. Rounded once, at the end (Hugging Face rounds before the scale too).

    Raises:
        ValueError: If the last axis of ``x`` and ``weight`` disagree, or ``eps`` is not above 0.

    Source:
        Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019, equation 4: g is ``weight``.

    Example:
        >>> rms_norm(np.array([[3.0, 4.0]]), np.array([1.0, 10.0]), eps=1e-9).round(3)   # the rms is sqrt(12.5)
        array([[ 0.849, 11.314]])
    """
    require_shape("rms_norm", "weight", weight, (None,))
    if x.shape[-1:] != weight.shape:
        require(False, "rms_norm", "x", f"rows of {len(weight)}", f"shape {list(x.shape)}")
    require_float("rms_norm", "x", x)
    require(eps > 0, "rms_norm", "eps", "a number above 0", eps)
    require_out("rms_norm", out, x.shape, x.dtype)
    compute = compute_dtype(x.dtype)

    values = x.astype(compute, copy=False)
    rms = np.sqrt(np.vecdot(values, values) / len(weight) + float(eps))
    normed = np.divide(values, rms[..., None], out=out if x.dtype == compute else None)
    normed *= weight.astype(compute, copy=False)
    return normed if normed is out else deliver(normed, x.dtype, out)


def add_rms_norm(
    x: Float[Array, "num_tokens hidden_size"],
    residual: Float[Array, "num_tokens hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
    residual_out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> tuple[Float[Array, "num_tokens hidden_size"], Float[Array, "num_tokens hidden_size"]]:
    r"""Add the residual, and norm the sum.

    .. math::
        residual\_out = x + residual \qquad out = \mathrm{rms\_norm}(residual\_out)

    Args:
        x: What a layer made of the residual stream.
        residual: The stream itself.
        weight: The norm's learned scale.
        eps: Added to the mean square, above 0.
        out: Where to write the normed sum; may be ``x``.
        residual_out: Where to write the sum; may be ``residual``.

    Returns:
        The normed sum and the sum, in the dtype of ``x``. The sum is rounded to that dtype before it is normed,
        since later layers read it so.

    Raises:
        ValueError: If shapes disagree, or ``eps`` is not above 0.

    Source:
        The "residual + RMSNorm" pair of every inference engine; vLLM names it fused_add_rms_norm.

    Example:
        >>> normed, total = add_rms_norm(np.array([[1.0, 1.0]]), np.array([[2.0, 2.0]]), np.ones(2), eps=1e-9)
        >>> normed.round(3), total
        (array([[1., 1.]]), array([[3., 3.]]))
    """
    require_shape("add_rms_norm", "residual", residual, x.shape)
    require_shape("add_rms_norm", "x", x, (None, None))
    require_float("add_rms_norm", "x", x)
    require_out("add_rms_norm", residual_out, x.shape, x.dtype)
    compute = compute_dtype(x.dtype)
    total = x.astype(compute, copy=False) + residual.astype(compute, copy=False)
    total = deliver(total, x.dtype, residual_out)
    return rms_norm(total, weight, eps=eps, out=out), total


def rms_norm_linear(
    x: Float[Array, "num_tokens hidden_size"],
    norm_weight: Float[Array, " hidden_size"],
    weight: Float[Array, "out_features hidden_size"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    eps: float,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""Norm each row, then the linear layer.

    .. math::
        out = \mathrm{rms\_norm}(x) \, weight^T + bias

    Args:
        x: The residual stream.
        norm_weight: The norm's learned scale.
        weight: The linear layer's; often several layers stacked (q, k and v; gate and up), so that x is read once.
        bias: Of the linear layer, or None.
        eps: Added to the mean square, above 0.
        out: Where to write the result; may not overlap ``x``.

    Returns:
        What ``linear(rms_norm(x))`` returns, bit for bit. (A fused kernel need not round between the two, and since the
        inverse root mean square is one number a row, may scale after the matmul instead.)

    Raises:
        ValueError: If shapes disagree, or ``eps`` is not above 0.

    Source:
        Composed from its parts.

    Example:
        >>> rms_norm_linear(np.array([[3.0, 4.0]]), np.ones(2), np.array([[1.0, 1.0]]), eps=1e-9).round(3)
        array([[1.98]])
    """
    return linear(rms_norm(x, norm_weight, eps=eps), weight, bias, out=out)
