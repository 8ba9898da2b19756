"""quantized_linear, in Triton. What the technique is for: `reference/linear/quantized_linear.py`."""

from jaxtyping import Float, Float32, Int8, Shaped, UInt8
from torch import Tensor as Array


def quantize_rows(
    x: Float[Array, "num_rows num_columns"], *, format: str
) -> tuple[Shaped[Array, "num_rows num_columns"], Float32[Array, " num_rows"]]:
    """Same contract as `reference.linear.quantized_linear.quantize_rows`."""
    raise NotImplementedError("quantize_rows")


def linear_int8(
    x: Float[Array, "num_tokens in_features"],
    weight: Int8[Array, "out_features in_features"],
    weight_scale: Float[Array, "out_features *num_groups"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    group_size: int | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.quantized_linear.linear_int8`."""
    raise NotImplementedError("linear_int8")


def linear_int8_int8(
    x: Float[Array, "num_tokens in_features"],
    weight: Int8[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.quantized_linear.linear_int8_int8`."""
    raise NotImplementedError("linear_int8_int8")


def linear_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.quantized_linear.linear_fp8`."""
    raise NotImplementedError("linear_fp8")


def linear_fp8_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.quantized_linear.linear_fp8_fp8`."""
    raise NotImplementedError("linear_fp8_fp8")


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
    """Same contract as `reference.linear.quantized_linear.linear_int4`."""
    raise NotImplementedError("linear_int4")


def pack_weight(weight: Shaped[Array, "out_features stored"], *, format: str) -> Shaped[Array, "..."]:
    """Same contract as `reference.linear.quantized_linear.pack_weight`."""
    raise NotImplementedError("pack_weight")


def unpack_weight(
    packed: Shaped[Array, "..."], *, format: str, out_features: int
) -> Shaped[Array, "out_features stored"]:
    """Same contract as `reference.linear.quantized_linear.unpack_weight`."""
    raise NotImplementedError("unpack_weight")
