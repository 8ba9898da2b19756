"""linear, in Triton. What the technique is for: `reference/linear/linear.py`."""

from jaxtyping import Float
from torch import Tensor as Array


def linear(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.linear.linear`."""
    raise NotImplementedError("linear")
