"""swiglu, in Triton. What the technique is for: `reference/fusion/swiglu.py`."""

from jaxtyping import Float
from torch import Tensor as Array


def swiglu(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    *,
    out: Float[Array, "num_tokens intermediate_size"] | None = None,
) -> Float[Array, "num_tokens intermediate_size"]:
    """Same contract as `reference.fusion.swiglu.swiglu`."""
    raise NotImplementedError("swiglu")


def swiglu_linear_add(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    weight: Float[Array, "out_features intermediate_size"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.fusion.swiglu.swiglu_linear_add`."""
    raise NotImplementedError("swiglu_linear_add")
