"""Linear layers whose weights, or weights and activations, are stored in 8 or 4 bits."""

import numpy as np
from jaxtyping import Float, Float32, Int8, Shaped, UInt8
from numpy import ndarray as Array


def quantize_rows(
    x: Float[Array, "num_rows num_columns"], *, format: str
) -> tuple[Shaped[Array, "num_rows num_columns"], Float32[Array, " num_rows"]]:
    """Codes ("int8" or "float8_e4m3fn") and one scale a row: how activations are quantized per token."""
    raise NotImplementedError


def linear_int8(
    x: Float[Array, "num_tokens in_features"],
    weight: Int8[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """W8A16: int8 weights, float activations."""
    raise NotImplementedError


def linear_int8_int8(
    x: Float[Array, "num_tokens in_features"],
    weight: Int8[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """W8A8: activations quantized per token on the way in, exact int32 sums, scaled once at the end."""
    raise NotImplementedError


def linear_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """fp8 (e4m3fn) weights, float activations."""
    raise NotImplementedError


def linear_fp8_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """fp8 weights and activations (per token)."""
    raise NotImplementedError


def linear_int4(
    x: Float[Array, "num_tokens in_features"],
    weight: UInt8[Array, "out_features packed_features"],
    weight_scale: Float[Array, "out_features num_groups"],
    weight_min: Float[Array, "out_features num_groups"] | None = None,
    bias: Float[Array, " out_features"] | None = None,
    *,
    group_size: int,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """W4A16 in groups of ``group_size`` input features (the last may be shorter, but even). Codes 0..15:
    value = scale * code + min, or, with ``weight_min`` None (symmetric), scale * (code - 8).
    Within a group of g features byte j holds feature j in its low nibble and feature j + g / 2 in its high one:
    with groups of 32 this is the byte order of GGUF's Q4_0 and Q4_1."""
    raise NotImplementedError


def pack_weight(weight: Shaped[Array, "out_features stored"], *, format: str) -> Shaped[Array, "..."]:
    """Into the layout the backend's kernels for ``format`` ("int8", "int4", "fp8", ...) like best; here the identity."""
    raise NotImplementedError


def unpack_weight(
    packed: Shaped[Array, "..."], *, format: str, out_features: int
) -> Shaped[Array, "out_features stored"]:
    """The inverse of ``pack_weight``, exactly."""
    raise NotImplementedError
