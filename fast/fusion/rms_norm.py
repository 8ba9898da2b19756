"""rms_norm, in Triton. What the technique is for: `reference/fusion/rms_norm.py`."""

from jaxtyping import Float
from torch import Tensor as Array


def rms_norm(
    x: Float[Array, "*rows hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "*rows hidden_size"] | None = None,
) -> Float[Array, "*rows hidden_size"]:
    """Same contract as `reference.fusion.rms_norm.rms_norm`."""
    raise NotImplementedError("rms_norm")


def add_rms_norm(
    x: Float[Array, "num_tokens hidden_size"],
    residual: Float[Array, "num_tokens hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
    residual_out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> tuple[Float[Array, "num_tokens hidden_size"], Float[Array, "num_tokens hidden_size"]]:
    """Same contract as `reference.fusion.rms_norm.add_rms_norm`."""
    raise NotImplementedError("add_rms_norm")


def rms_norm_linear(
    x: Float[Array, "num_tokens hidden_size"],
    norm_weight: Float[Array, " hidden_size"],
    weight: Float[Array, "out_features hidden_size"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    eps: float,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.fusion.rms_norm.rms_norm_linear`."""
    raise NotImplementedError("rms_norm_linear")
