"""The linear ops in plain torch: dequantize, then `F.linear`; integers summed in float64; adapters by the token."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int8, Int32, Shaped, UInt8
from torch import Tensor as Array

from reference._checks import require
from reference.linear.lora import num_layers
from reference.linear.quantized_linear import LAYOUTS


def linear(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    _check("linear", x, weight.shape, bias, out)
    require(weight.is_floating_point(), "linear", "weight", "a floating dtype", weight.dtype)
    return _linear(x, _wide(x), weight, bias, out)


def quantize_rows(
    x: Float[Array, "num_rows num_columns"], *, format: str
) -> tuple[Shaped[Array, "num_rows num_columns"], Float32[Array, " num_rows"]]:
    require(format in ("int8", "float8_e4m3fn"), "quantize_rows", "format", "int8 or float8_e4m3fn", repr(format))
    _require_shape("quantize_rows", "x", x, (None, None))
    require(x.is_floating_point(), "quantize_rows", "x", "a floating dtype", x.dtype)
    most = 127 if format == "int8" else 448
    largest = F.pad(_wide(x).abs(), (0, 1)).amax(dim=1)  # padded with a zero: a row may be empty
    scale = torch.where(largest.isfinite(), largest / most, torch.nan).float()
    codes = torch.where((scale > 0)[:, None], _wide(x) / scale[:, None], 0).clamp(-most, most)
    return (codes.round().to(torch.int8) if format == "int8" else codes.to(torch.float8_e4m3fn)), scale


def linear_int8(
    x: Float[Array, "num_tokens in_features"],
    weight: Int8[Array, "out_features in_features"],
    weight_scale: Float[Array, "out_features *num_groups"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    group_size: int | None = None,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    _check("linear_int8", x, weight.shape, bias, out, residual)
    _require_dtype("linear_int8", weight, torch.int8)
    if group_size is None:
        _require_shape("linear_int8", "weight_scale", weight_scale, (len(weight),))
        scale = weight_scale[:, None]
    else:
        scale = _spread("linear_int8", "weight_scale", weight_scale, weight.shape, group_size)
    wide = _wide(x)
    return _linear(x, wide, weight.to(wide.dtype) * scale.to(wide.dtype), bias, out, residual)


def linear_int8_int8(
    x: Float[Array, "num_tokens in_features"],
    weight: Int8[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    _check("linear_int8_int8", x, weight.shape, bias, out, residual)
    _require_dtype("linear_int8_int8", weight, torch.int8)
    _require_shape("linear_int8_int8", "weight_scale", weight_scale, (len(weight),))
    codes, scale = quantize_rows(x, format="int8")
    sums = codes.double() @ weight.double().T  # exact: far below 2**53
    return _scaled(x, sums, scale, weight_scale, bias, out, residual)


def linear_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    _check("linear_fp8", x, weight.shape, bias, out, residual)
    _require_dtype("linear_fp8", weight, torch.float8_e4m3fn)
    _require_shape("linear_fp8", "weight_scale", weight_scale, (len(weight),))
    wide = _wide(x)
    return _linear(x, wide, weight.to(wide.dtype) * weight_scale[:, None].to(wide.dtype), bias, out, residual)


def linear_fp8_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    _check("linear_fp8_fp8", x, weight.shape, bias, out, residual)
    _require_dtype("linear_fp8_fp8", weight, torch.float8_e4m3fn)
    _require_shape("linear_fp8_fp8", "weight_scale", weight_scale, (len(weight),))
    codes, scale = quantize_rows(x, format="float8_e4m3fn")
    compute = _wide(x).dtype
    return _scaled(x, F.linear(codes.to(compute), weight.to(compute)), scale, weight_scale, bias, out, residual)


def linear_int4(
    x: Float[Array, "num_tokens in_features"],
    weight: UInt8[Array, "out_features packed_features"],
    weight_scale: Float[Array, "out_features num_groups"],
    weight_min: Float[Array, "out_features num_groups"] | None = None,
    bias: Float[Array, " out_features"] | None = None,
    *,
    group_size: int,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    _require_shape("linear_int4", "weight", weight, (None, None))
    shape = torch.Size((len(weight), 2 * weight.shape[1]))
    _check("linear_int4", x, shape, bias, out, residual)
    _require_dtype("linear_int4", weight, torch.uint8)
    even = group_size > 0 and group_size % 2 == 0
    require(even, "linear_int4", "group_size", "a positive even number", group_size)
    wide = _wide(x)
    scale = _spread("linear_int4", "weight_scale", weight_scale, shape, group_size).to(wide.dtype)

    groups = [torch.cat([part & 15, part >> 4], dim=1) for part in weight.split(group_size // 2, dim=1)]
    codes = torch.cat(groups, dim=1).to(wide.dtype) if groups else weight.to(wide.dtype)
    if weight_min is None:
        return _linear(x, wide, (codes - 8) * scale, bias, out, residual)
    minimum = _spread("linear_int4", "weight_min", weight_min, shape, group_size).to(wide.dtype)
    return _linear(x, wide, codes * scale + minimum, bias, out, residual)


def pack_weight(weight: Shaped[Array, "out_features stored"], *, format: str) -> Shaped[Array, "..."]:
    require(format in LAYOUTS, "pack_weight", "format", f"one of {', '.join(LAYOUTS)}", repr(format))
    return weight


def unpack_weight(
    packed: Shaped[Array, "..."], *, format: str, out_features: int
) -> Shaped[Array, "out_features stored"]:
    require(format in LAYOUTS, "unpack_weight", "format", f"one of {', '.join(LAYOUTS)}", repr(format))
    _require_shape("unpack_weight", "packed", packed, (out_features, None))
    return packed


def sparse_linear(
    x: Float[Array, "num_tokens in_features"],
    values: Float[Array, "out_features half_features"],
    indices: UInt8[Array, "out_features index_bytes"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    _require_shape("sparse_linear", "values", values, (None, None))
    require(values.is_floating_point(), "sparse_linear", "values", "a floating dtype", values.dtype)
    out_features, half_features = values.shape
    _check("sparse_linear", x, torch.Size((out_features, 2 * half_features)), bias, out, residual)
    require(half_features % 2 == 0, "sparse_linear", "values", "two for each group of four", half_features)
    _require_shape("sparse_linear", "indices", indices, (out_features, -(-half_features // 4)))

    shifts = torch.tensor([0, 2, 4, 6], device=indices.device)
    places = (indices[..., None].long() >> shifts & 3).flatten(1)[:, :half_features].unflatten(1, (-1, 2))
    ascend = (places[..., 0] < places[..., 1]).all()
    require(ascend, "sparse_linear", "indices", "two ascending places in each nibble", "others")
    dense = values.new_zeros(out_features, half_features // 2, 4).scatter(-1, places, values.unflatten(1, (-1, 2)))
    return _linear(x, _wide(x), dense.flatten(1), bias, out, residual)


def lora(
    base: Float[Array, "num_tokens out_features"],
    x: Float[Array, "num_tokens in_features"],
    lora_a: Float[Array, "num_adapters all_ranks in_features"],
    lora_b: Float[Array, "num_adapters out_features max_rank"],
    scaling: Float32[Array, " num_adapters"],
    adapter_ids: Int32[Array, " num_tokens"],
    *,
    widths: Sequence[int] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    _require_shape("lora", "base", base, (None, None))
    _require_shape("lora", "x", x, (len(base), None))
    _require_shape("lora", "lora_a", lora_a, (None, None, x.shape[1]))
    layers = num_layers(widths, base.shape[1], lora_a.shape[1])
    _require_shape("lora", "lora_b", lora_b, (len(lora_a), base.shape[1], lora_a.shape[1] // layers))
    _require_shape("lora", "scaling", scaling, (len(lora_a),))
    _require_shape("lora", "adapter_ids", adapter_ids, (len(base),))
    floats = {"base": base, "x": x, "lora_a": lora_a, "lora_b": lora_b, "scaling": scaling}
    for name, array in floats.items():
        require(array.is_floating_point(), "lora", name, "a floating dtype", array.dtype)
    known = ((adapter_ids >= -1) & (adapter_ids < len(lora_a))).all()
    require(known, "lora", "adapter_ids", f"-1 or 0 to {len(lora_a) - 1}", adapter_ids)

    adapted = torch.nonzero(adapter_ids >= 0)[:, 0]
    ids, compute = adapter_ids[adapted].long(), _wide(base).dtype
    shrunk = torch.einsum("tri,ti->tr", lora_a[ids].to(compute), x[adapted].to(compute)).unflatten(1, (layers, -1))
    of_layer = torch.arange(layers).repeat_interleave(torch.tensor(widths or [base.shape[1]])).to(base.device)
    grown = torch.einsum("tor,tor->to", lora_b[ids].to(compute), shrunk[:, of_layer]) * scaling[ids, None].to(compute)
    result = _wide(base).index_add(0, adapted, grown)
    return _deliver("lora", result, base.dtype, out)


def _linear(
    x: Array, wide: Array, weight: Array, bias: Array | None, out: Array | None, residual: Array | None = None
) -> Array:
    bias = None if bias is None else bias.to(wide.dtype)
    result = F.linear(wide, weight.to(wide.dtype), bias)
    return _deliver("linear", result if residual is None else result + residual.to(wide.dtype), x.dtype, out)


def _scaled(
    x: Array,
    sums: Array,
    scale: Array,
    weight_scale: Array,
    bias: Array | None,
    out: Array | None,
    residual: Array | None,
) -> Array:
    result = sums.double() * scale[:, None].double() * weight_scale.double()
    for added in (bias, residual):
        result = result if added is None else result + added.double()
    return _deliver("linear", result, x.dtype, out)


def _spread(op: str, name: str, per_group: Array, shape: torch.Size, group_size: int) -> Array:
    """One number a group, repeated for every feature of the group."""
    require(group_size > 0, op, "group_size", "a positive number", group_size)
    _require_shape(op, name, per_group, (shape[0], -(-shape[1] // group_size)))
    return per_group.repeat_interleave(group_size, dim=1)[:, : shape[1]]


def _wide(x: Array) -> Array:
    return x if x.dtype == torch.float64 else x.float()


def _deliver(op: str, result: Array, dtype: torch.dtype, out: Array | None) -> Array:
    if out is None:
        return result.to(dtype)
    fits = out.shape == result.shape and out.dtype == dtype
    require(fits, op, "out", f"{dtype} {tuple(result.shape)}", f"{out.dtype} {tuple(out.shape)}")
    return out.copy_(result)


def _check(
    op: str,
    x: Array,
    weight_shape: torch.Size,
    bias: Array | None,
    out: Array | None,
    residual: Array | None = None,
) -> None:
    _require_shape(op, "x", x, (None, None))
    require(x.is_floating_point(), op, "x", "a floating dtype", x.dtype)
    fits = len(weight_shape) == 2 and weight_shape[1] == x.shape[1]
    require(fits, op, "weight", f"shape [*, {x.shape[1]}]", tuple(weight_shape))
    if bias is not None:
        _require_shape(op, "bias", bias, (weight_shape[0],))
        require(bias.is_floating_point(), op, "bias", "a floating dtype", bias.dtype)
    if residual is not None:
        _require_shape(op, "residual", residual, (len(x), weight_shape[0]))
        require(residual.is_floating_point(), op, "residual", "a floating dtype", residual.dtype)
    if out is not None:
        _require_shape(op, "out", out, (len(x), weight_shape[0]))
        _require_dtype(op, out, x.dtype, "out")


def _require_shape(op: str, argument: str, array: Array, shape: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape))
    require(fits, op, argument, f"shape {shape}", tuple(array.shape))


def _require_dtype(op: str, array: Array, dtype: torch.dtype, argument: str = "weight") -> None:
    require(array.dtype == dtype, op, argument, f"{dtype}", array.dtype)
