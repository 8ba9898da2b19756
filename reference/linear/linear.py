"""The dense linear layer."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


def linear(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    raise NotImplementedError
