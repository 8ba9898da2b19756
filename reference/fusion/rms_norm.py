"""RMSNorm, alone, after a residual add, and into the linear layer that follows."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array


def rms_norm(
    x: Float[Array, "*rows hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "*rows hidden_size"] | None = None,
) -> Float[Array, "*rows hidden_size"]:
    raise NotImplementedError


def add_rms_norm(
    x: Float[Array, "num_tokens hidden_size"],
    residual: Float[Array, "num_tokens hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
    residual_out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> tuple[Float[Array, "num_tokens hidden_size"], Float[Array, "num_tokens hidden_size"]]:
    """(norm(x + residual), x + residual); ``residual_out`` may be ``residual``, ``out`` may be ``x``."""
    raise NotImplementedError


def rms_norm_linear(
    x: Float[Array, "num_tokens hidden_size"],
    norm_weight: Float[Array, " hidden_size"],
    weight: Float[Array, "out_features hidden_size"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    eps: float,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    raise NotImplementedError
