"""A linear layer and the residual it is added to."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


def linear_add(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """``out`` may be ``residual``."""
    raise NotImplementedError
