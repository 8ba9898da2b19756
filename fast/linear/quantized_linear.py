"""Linear layers with codes for weights, in Triton. What the technique is for: `reference/linear/quantized_linear.py`.

Codes are kept in the documented layout: 16 bytes of a row are 16 neighbouring features already (of one half of a group,
for 4 bits). The kernels: `_int4.py` (which names others), `_eight_bit.py`, `_w8a8.py`.
"""

import torch
from jaxtyping import Float, Float32, Int8, Shaped, UInt8
from torch import Tensor as Array

from fast._checks import (
    require,
    require_added,
    require_dtype,
    require_float,
    require_out,
    require_same_device,
    require_shape,
)
from fast.linear import _eight_bit, _int4, _w8a8
from fast.linear._skinny import rows_of, whole_rows
from reference.linear.quantized_linear import LAYOUTS

FP8 = torch.float8_e4m3fn
HALVES = (torch.bfloat16, torch.float16)


def quantize_rows(
    x: Float[Array, "num_rows num_columns"], *, format: str
) -> tuple[Shaped[Array, "num_rows num_columns"], Float32[Array, " num_rows"]]:
    """Same contract as `reference.linear.quantized_linear.quantize_rows`.

    Grid: one program a row. Moves: the row once from memory (again from cache), its codes once.
    """
    require(format in ("int8", "float8_e4m3fn"), "quantize_rows", "format", "int8 or float8_e4m3fn", repr(format))
    require_shape("quantize_rows", "x", x, (None, None))
    require_float("quantize_rows", "x", x)
    return _w8a8.quantize(whole_rows(x), getattr(torch, format))


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
    """Same contract as `reference.linear.quantized_linear.linear_int8`.

    Grid: for few tokens, one program per few rows of the weight; for many, one per tile of the result.
    Moves: the weight once for each tile of tokens, as codes; they become floats in registers.
    Limits: groups of other sizes than 32, 64 and 128, and groups with float32 activations, take a slower kernel that
    looks up a scale for each weight; it rounds ``scale * code`` to the dtype of ``x``.
    """
    return _int8(x, weight, weight_scale, bias, residual, group_size, out)


def linear_int8_int8(
    x: Float[Array, "num_tokens in_features"],
    weight: Int8[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.quantized_linear.linear_int8_int8`.

    Grid: as `linear_int8`, after one program a row that rounds it. Moves: also the codes of ``x``, out and in.
    The sums are whole numbers: the same in any batch, whichever kernel adds them.
    """
    out = _door("linear_int8_int8", x, weight, weight.shape, torch.int8, weight_scale, bias, residual, out)
    require_shape("linear_int8_int8", "weight_scale", weight_scale, (len(weight),))
    codes, scale = _w8a8.quantize(whole_rows(x), torch.int8)
    return _by_row(codes, scale, weight, weight_scale, bias, residual, out)


def linear_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.quantized_linear.linear_fp8`; the kernels of `linear_int8`."""
    return _fp8(x, weight, weight_scale, bias, residual, out)


def linear_fp8_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.quantized_linear.linear_fp8_fp8`.

    Grid: as `linear_int8`, after one program a row that rounds it; codes are multiplied as bfloat16, which holds them.
    From ``SCALED_MM_TOKENS`` tokens on, a bfloat16 result without bias, of sizes that are multiples of 16, is a call of
    ``torch._scaled_mm`` with ``use_fast_accum=False``: nothing as accurate beat it. Hopper's tensor cores keep about 14
    bits of a sum of float8 products, and so used they do it 128 products at a time: sums of 8192 positive products come
    out 6e-4 too small. (With fast accumulation they come out an eighth too small; alternating signs hide it.)
    """
    return _fp8_fp8(x, weight, weight_scale, bias, residual, out)


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
    """Same contract as `reference.linear.quantized_linear.linear_int4`.

    Grid: for few tokens, one program per few rows of the weight, its warps sharing out the groups; for more, one per
    tile of the result. From ``_int4.DENSE_TOKENS`` tokens on, without a bias, the weight is written out as floats, and
    ``torch.mm`` multiplies: cuBLAS is faster than a kernel that dequantizes by more than that costs.
    Moves: the weight once for each tile of tokens, as codes; written out, two and a half bytes more for each weight.
    Limits: these want 16-bit activations and nothing but whole groups of 32, 64 or 128. Others take a slower kernel,
    which looks up each weight's group. It and the kernels for many tokens round ``scale * code`` to the dtype of ``x``
    (a float16 weight below 6e-5 has fewer bits); the one for few, and `linear_int4_invariant`, scale sums instead.
    """
    return _int4_in_groups(x, weight, weight_scale, weight_min, bias, residual, group_size, out)


# ---- the same, batch-invariant: of a token's sum, the order depends on in_features alone ----------------------------


def linear_int8_invariant(
    x: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None = None,
    *,
    group_size: int | None = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """`linear_int8` with tiles of the result, whole sums in each, however few the tokens."""
    return _int8(x, weight, weight_scale, bias, residual, group_size, out, invariant=True)


linear_int8_int8_invariant = linear_int8_int8


def linear_fp8_invariant(
    x: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """`linear_fp8`, likewise."""
    return _fp8(x, weight, weight_scale, bias, residual, out, invariant=True)


def linear_fp8_fp8_invariant(
    x: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """`linear_fp8_fp8`, likewise."""
    return _fp8_fp8(x, weight, weight_scale, bias, residual, out, invariant=True)


def linear_int4_invariant(
    x: Array,
    weight: Array,
    weight_scale: Array,
    weight_min: Array | None = None,
    bias: Array | None = None,
    *,
    group_size: int,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """`linear_int4`, likewise; the sums of a group are scaled, never the weights."""
    return _int4_in_groups(x, weight, weight_scale, weight_min, bias, residual, group_size, out, invariant=True)


# ---- layouts --------------------------------------------------------------------------------------------------------


def pack_weight(weight: Shaped[Array, "out_features stored"], *, format: str) -> Shaped[Array, "..."]:
    """Same contract as `reference.linear.quantized_linear.pack_weight`: the documented layout, row after row."""
    require(format in LAYOUTS, "pack_weight", "format", f"one of {', '.join(LAYOUTS)}", repr(format))
    return weight.contiguous()


def unpack_weight(
    packed: Shaped[Array, "..."], *, format: str, out_features: int
) -> Shaped[Array, "out_features stored"]:
    """Same contract as `reference.linear.quantized_linear.unpack_weight`."""
    require(format in LAYOUTS, "unpack_weight", "format", f"one of {', '.join(LAYOUTS)}", repr(format))
    require_shape("unpack_weight", "packed", packed, (out_features, None))
    return packed


# ---- which kernel ---------------------------------------------------------------------------------------------------


def _int8(
    x: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    group_size: int | None,
    out: Array | None,
    invariant: bool = False,
) -> Array:
    out = _door("linear_int8", x, weight, weight.shape, torch.int8, weight_scale, bias, residual, out)
    if group_size is None:
        require_shape("linear_int8", "weight_scale", weight_scale, (len(weight),))
        return _by_row(whole_rows(x), None, weight, weight_scale, bias, residual, out, invariant)
    require(group_size > 0, "linear_int8", "group_size", "a positive number, or None", group_size)
    require_shape("linear_int8", "weight_scale", weight_scale, (len(weight), -(-x.shape[1] // group_size)))
    if not out.numel():
        return out
    if x.dtype in HALVES and group_size in _eight_bit.GROUPS:
        arrays = whole_rows(x), None, whole_rows(weight), whole_rows(weight_scale), bias, rows_of(residual), out
        return _eight_bit.few_tokens(*arrays, group_size=group_size)  # the same order for any number of tokens
    arrays = whole_rows(x), whole_rows(weight), whole_rows(weight_scale), bias, rows_of(residual), out
    return _eight_bit.any_groups(*arrays, group_size)


def _fp8(
    x: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array | None,
    invariant: bool = False,
) -> Array:
    out = _door("linear_fp8", x, weight, weight.shape, FP8, weight_scale, bias, residual, out)
    require_shape("linear_fp8", "weight_scale", weight_scale, (len(weight),))
    return _by_row(whole_rows(x), None, weight, weight_scale, bias, residual, out, invariant)


def _fp8_fp8(
    x: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array | None,
    invariant: bool = False,
) -> Array:
    out = _door("linear_fp8_fp8", x, weight, weight.shape, FP8, weight_scale, bias, residual, out)
    require_shape("linear_fp8_fp8", "weight_scale", weight_scale, (len(weight),))
    codes, scale = _w8a8.quantize(whole_rows(x), FP8)
    return _by_row(codes, scale, weight, weight_scale, bias, residual, out, invariant)


def _by_row(
    x: Array,
    x_scale: Array | None,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    invariant: bool = False,
) -> Array:
    """A scale for each output row: ``x`` are activations, or codes and their scales."""
    if not out.numel():
        return out
    weight = whole_rows(weight)
    kind = choose_eight_bit(len(x), x.dtype, _w8a8.fits(x, weight), invariant)
    if kind == "scaled_mm" and not _w8a8.scaled_mm_takes(weight, bias, out):
        kind = "many"
    return _EIGHT_BIT[kind](x, x_scale, weight, weight_scale.contiguous(), bias, rows_of(residual), out)


def choose_eight_bit(num_tokens: int, x_dtype: torch.dtype, fits: bool, invariant: bool = False) -> str:
    """Which kernel: "few" tokens, "many", "bytes", many of int8 codes, or "scaled_mm", many of float8 ones.

    Args:
        num_tokens: Of them.
        x_dtype: Of the activations, or of their codes.
        fits: The copy engine can read rows of both arrays: they begin at multiples of 16 bytes.
        invariant: A token's sums are to be the same in any batch.

    Example:
        >>> choose_eight_bit(8, torch.bfloat16, True), choose_eight_bit(4096, torch.int8, True)
        ('few', 'bytes')
    """
    if x_dtype == torch.int8 and num_tokens > _eight_bit.FEW_TOKENS and fits:
        return "bytes"  # sums of whole numbers: invariant whoever adds them
    if x_dtype == FP8 and num_tokens >= _w8a8.SCALED_MM_TOKENS and fits and not invariant:
        return "scaled_mm"
    return "few" if num_tokens <= _eight_bit.FEW_TOKENS and not invariant else "many"


_EIGHT_BIT = {
    "few": lambda *arrays: _eight_bit.few_tokens(*arrays),
    "many": lambda *arrays: _eight_bit.many_tokens(*arrays),
    "bytes": lambda *arrays: _w8a8.many_tokens(*arrays),
    "scaled_mm": lambda *arrays: _w8a8.scaled_mm(*arrays),
}


def _int4_in_groups(
    x: Array,
    weight: Array,
    weight_scale: Array,
    weight_min: Array | None,
    bias: Array | None,
    residual: Array | None,
    group_size: int,
    out: Array | None,
    invariant: bool = False,
) -> Array:
    require_shape("linear_int4", "weight", weight, (None, None))
    shape = (len(weight), 2 * weight.shape[1])
    out = _door("linear_int4", x, weight, shape, torch.uint8, weight_scale, bias, residual, out)
    even = group_size > 0 and group_size % 2 == 0
    require(even, "linear_int4", "group_size", "a positive even number", group_size)
    require_shape("linear_int4", "weight_scale", weight_scale, (len(weight), -(-x.shape[1] // group_size)))
    if weight_min is not None:
        require_shape("linear_int4", "weight_min", weight_min, tuple(weight_scale.shape))
        require_same_device("linear_int4", x=x, weight_min=weight_min)
        weight_min = whole_rows(weight_min)
    if not out.numel():
        return out
    arrays = whole_rows(x), whole_rows(weight), whole_rows(weight_scale), weight_min
    whole = x.dtype in HALVES and group_size in _int4.GROUPS and x.shape[1] % group_size == 0
    kind = _int4.choose(len(x), whole, _w8a8.fits(arrays[0], arrays[1]), bias is not None, invariant)
    return _int4.KERNELS[kind](*arrays, bias, rows_of(residual), out, group_size)


def _door(
    op: str,
    x: Array,
    weight: Array,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array | None,
) -> Array:
    """What all the layers ask of their arguments; ``out``, or memory for it."""
    require_shape(op, "x", x, (None, None))
    require_float(op, "x", x)
    fits = len(shape) == 2 and shape[1] == x.shape[1]
    require(fits, op, "weight", f"shape [*, {x.shape[1]}]", list(shape))
    require_dtype(op, "weight", weight, dtype)
    require_float(op, "weight_scale", weight_scale)
    require_added(op, "bias", bias, (shape[0],))
    if bias is not None:
        require(bias.stride(0) == 1 or len(bias) <= 1, op, "bias", "contiguous numbers", bias.stride())
    require_added(op, "residual", residual, (len(x), shape[0]))
    require_out(op, out, (len(x), shape[0]), x.dtype)
    require_same_device(op, x=x, weight=weight, weight_scale=weight_scale, bias=bias, residual=residual, out=out)
    return torch.empty(len(x), shape[0], dtype=x.dtype, device=x.device) if out is None else out
