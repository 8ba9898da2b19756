"""sparse_linear, in Triton. What the technique is for: `reference/linear/sparse_linear.py`."""

from jaxtyping import Float, UInt8
from torch import Tensor as Array


def sparse_linear(
    x: Float[Array, "num_tokens in_features"],
    values: Float[Array, "out_features half_features"],
    indices: UInt8[Array, "out_features index_bytes"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.sparse_linear.sparse_linear`."""
    raise NotImplementedError("sparse_linear")
