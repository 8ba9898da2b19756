"""linear_add, in Triton. What the technique is for: `reference/fusion/linear_add.py`."""

from jaxtyping import Float
from torch import Tensor as Array


def linear_add(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.fusion.linear_add.linear_add`."""
    raise NotImplementedError("linear_add")
