"""A linear layer and the residual it is added to."""

import numpy as np  # noqa: F401  (for the example)
from jaxtyping import Float
from numpy import ndarray as Array

from reference._checks import require_out, require_shape
from reference.linear.linear import add_residual, linear


def linear_add(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""A linear layer whose result is added to the residual stream.

    .. math::
        out = residual + x \, weight^T + bias

    Args:
        x: What goes into the layer.
        weight: Its matrix, one row for each feature that comes out.
        residual: What is added.
        bias: Of the layer, or None.
        out: Where to write the sum; may be ``residual``, which then grows in place.

    Returns:
        The sum, in the dtype of ``x``. The layer's result is rounded to that dtype before it is added, so that this is
        ``linear`` and an addition, bit for bit. (A fused kernel adds in its accumulator.)

    Raises:
        ValueError: If shapes disagree.

    Source:
        Composed from its parts.

    Example:
        >>> linear_add(np.array([[1.0, 2.0]]), np.array([[10.0, 1.0]]), np.array([[0.5]]))
        array([[12.5]])
    """
    projected = linear(x, weight, bias)
    require_shape("linear_add", "residual", residual, projected.shape)
    require_out("linear_add", out, projected.shape, x.dtype)
    return add_residual(projected, residual, out)
