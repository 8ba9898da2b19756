"""SwiGLU, alone and into the linear layer (and residual) that follow."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


def swiglu(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    *,
    out: Float[Array, "num_tokens intermediate_size"] | None = None,
) -> Float[Array, "num_tokens intermediate_size"]:
    """silu(gate) * up, the gate being the first half of each row."""
    raise NotImplementedError


def swiglu_linear_add(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    weight: Float[Array, "out_features intermediate_size"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """``out`` may be ``residual``."""
    raise NotImplementedError
