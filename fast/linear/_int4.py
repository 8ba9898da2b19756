"""Weights of 4 bits times activations: for few tokens, for many, always in one order, and for groups of any size.

The layout is the documented one. Within a group the low nibbles are its first half and the high ones its second, so 16
bytes of a row become 16 features and 16 more without any moving about: two dot products, each with its half of ``x``.
A nibble becomes a float by being put into the mantissa of one (0x4300 is 128 in bfloat16, with 1 as its last place).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor as Array
from triton.tools.tensor_descriptor import TensorDescriptor

from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import INTERPRETED, cdiv, next_power_of_2
from fast._triton.rounding import dot, store, to_dtype
from fast.linear._eight_bit import dot_in_order

FEW_TOKENS = 32  # up to here a weight is read once, by programs that own few rows of it
SUMS_TOKENS = 128  # up to here, in tiles that are not too large for so few tokens
DENSE_TOKENS = 1024  # from here on, to write the weight out as floats for cuBLAS costs less than cuBLAS is faster
GROUPS = (32, 64, 128)  # sizes of groups of which a step takes several, whole


class Tiles(NamedTuple):
    """How the work is cut up: tokens and rows of the weight that one program owns."""

    tokens: int
    rows: int
    parts: int  # for few tokens: groups that one step takes, one for each warp
    warps: int
    stages: int


def choose(num_tokens: int, whole: bool, fits: bool, has_bias: bool = False, invariant: bool = False) -> str:
    """Which kernel: for "few" tokens, for "many", "sums" of groups, "dense" for cuBLAS, or for "any" groups.

    Args:
        num_tokens: Of them.
        whole: 16-bit activations, and nothing but whole groups of one of the sizes ``GROUPS``.
        fits: The copy engine can read rows of both arrays: they begin at multiples of 16 bytes.
        has_bias: There is one; cuBLAS would round before it is added.
        invariant: A token's sums are to be the same in any batch.

    Example:
        >>> [choose(n, True, True) for n in (1, 50, 512, 4096)], choose(1, False, True)
        (['few', 'sums', 'many', 'dense'], 'any')
    """
    if not whole:
        return "any"
    if num_tokens <= FEW_TOKENS and not invariant:
        return "few"
    if num_tokens >= DENSE_TOKENS and not has_bias and not invariant:
        return "dense"
    return "many" if num_tokens > SUMS_TOKENS and fits and not invariant else "sums"


def choose_few(num_tokens: int, out_features: int) -> Tiles:
    """Enough programs for every processor, each with enough on its way from memory."""
    tokens = next_power_of_2(min(num_tokens, FEW_TOKENS))
    return Tiles(tokens, 16 if out_features <= 4096 else 32, 4, 4, 4 if tokens <= 16 else 3)


def choose_sums(num_tokens: int, out_features: int) -> Tiles:
    """Rows are 64 for each four warps, so that all use the same instruction: a sum does not depend on the choice."""
    if num_tokens > 64 and out_features > 64:
        return Tiles(128, 128, 1, 8, 3)
    return Tiles(max(16, next_power_of_2(min(num_tokens, 64))), 64, 1, 4, 4)


MANY = Tiles(256, 128, 1, 8, 3)  # as much as registers and shared memory hold

# ---- helpers --------------------------------------------------------------------------------------------------------

_HEAD = "{ .reg .b32 s, a, b, m, o, z;"
_BFLOAT16 = """
prmt.b32 a, s, 0, 0x4140; prmt.b32 b, s, 0, 0x4342; mov.b32 o, 0x3f803f80; mov.b32 z, %s;
lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, a, o, z; fma.rn.bf16x2 $1, b, o, z; }"""
_FLOAT16 = """
prmt.b32 a, s, 0, 0x4140; prmt.b32 b, s, 0, 0x4342; mov.b32 z, %s;
lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea; lop3.b32 b, b, 0x000f000f, 0x64006400, 0xea;
sub.f16x2 $0, a, z; sub.f16x2 $1, b, z; }"""
# four bytes become four numbers: the nibble less 8, or the nibble
_ASM = {
    (half, dtype, zero): tl.constexpr(_HEAD + shift + body % less)
    for half, shift in (("low", "mov.b32 s, $2;"), ("high", "shr.u32 s, $2, 4;"))
    for dtype, body, zeros in (
        ("bf16", _BFLOAT16, ("0xc300c300", "0xc308c308")),
        ("fp16", _FLOAT16, ("0x64006400", "0x64086408")),
    )
    for zero, less in zip((0, 8), zeros)
}
_BF16_LOW_0, _BF16_LOW_8 = _ASM["low", "bf16", 0], _ASM["low", "bf16", 8]
_BF16_HIGH_0, _BF16_HIGH_8 = _ASM["high", "bf16", 0], _ASM["high", "bf16", 8]
_FP16_LOW_0, _FP16_LOW_8 = _ASM["low", "fp16", 0], _ASM["low", "fp16", 8]
_FP16_HIGH_0, _FP16_HIGH_8 = _ASM["high", "fp16", 0], _ASM["high", "fp16", 8]


@triton.jit
def nibbles(packed, HIGH: tl.constexpr, ZERO: tl.constexpr, dtype: tl.constexpr):
    """The low or the high halves of bytes, less ``ZERO`` (0 or 8), as floats: exact in any dtype."""
    if INTERPRETED or dtype == tl.float32:
        codes = ((packed >> 4) if HIGH else (packed & 15)).to(tl.int32) - ZERO
        y = codes.to(tl.float32).to(dtype)
    elif dtype == tl.bfloat16:
        low: tl.constexpr = _BF16_LOW_8 if ZERO else _BF16_LOW_0
        high: tl.constexpr = _BF16_HIGH_8 if ZERO else _BF16_HIGH_0
        y = tl.inline_asm_elementwise(
            high if HIGH else low, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        low: tl.constexpr = _FP16_LOW_8 if ZERO else _FP16_LOW_0
        high: tl.constexpr = _FP16_HIGH_8 if ZERO else _FP16_HIGH_0
        y = tl.inline_asm_elementwise(
            high if HIGH else low, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
        )
    return y


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _few_tokens_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features / 2] uint8
    scale_ptr,  # [out_features, num_groups]
    min_ptr,  # [out_features, num_groups] or None
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_weight_o,
    stride_scale_o,
    stride_min_o,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    num_groups,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each warp has groups of its own, and a sum of its own for every row; they are added up at the end."""
    wait_for_predecessor(OVERLAP)
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    token = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    in_batch = token < num_tokens
    row = tl.minimum(o, out_features - 1).to(tl.int64)  # rows past the end are read again, and not stored
    part = tl.arange(0, PARTS)
    j = tl.arange(0, HALF)[None, None, :]
    w_ptrs = weight_ptr + row[None, :, None] * stride_weight_o + j
    x_ptrs = x_ptr + token.to(tl.int64)[None, :, None] * stride_x_t + j
    acc = tl.zeros([PARTS, TILE_O, TILE_T], tl.float32)
    for first in tl.range(0, num_groups, PARTS, num_stages=STAGES):
        group = first + part
        in_row = group < num_groups
        g = group[:, None, None]
        packed = tl.load(w_ptrs + g * HALF, mask=in_row[:, None, None], other=0)
        mask = in_batch[None, :, None] & in_row[:, None, None]
        low = tl.load(x_ptrs + g * (2 * HALF), mask=mask, other=0.0)
        high = tl.load(x_ptrs + g * (2 * HALF) + HALF, mask=mask, other=0.0)
        scale = tl.load(scale_ptr + row[None, :] * stride_scale_o + group[:, None], mask=in_row[:, None], other=0.0).to(
            tl.float32
        )
        sums = tl.zeros([PARTS, TILE_O, TILE_T], tl.float32)
        zero: tl.constexpr = 8 if min_ptr is None else 0
        sums = dot(nibbles(packed, False, zero, x_ptr.dtype.element_ty), tl.permute(low, (0, 2, 1)), sums)
        sums = dot(nibbles(packed, True, zero, x_ptr.dtype.element_ty), tl.permute(high, (0, 2, 1)), sums)
        acc += scale[:, :, None] * sums
        if min_ptr is not None:
            least = tl.load(min_ptr + row[None, :] * stride_min_o + group[:, None], mask=in_row[:, None], other=0.0).to(
                tl.float32
            )
            total = tl.sum(low.to(tl.float32) + high.to(tl.float32), axis=2)
            acc += least[:, :, None] * total[:, None, :]
    y = tl.sum(acc, axis=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    pointers = out_ptr + token.to(tl.int64)[None, :] * stride_out_t + o[:, None] * stride_out_o
    store(pointers, y, in_batch[None, :] & (o < out_features)[:, None])


@triton.jit
def _sums_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features / 2] uint8
    scale_ptr,  # [out_features, num_groups]
    min_ptr,  # [out_features, num_groups] or None
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_weight_o,
    stride_scale_o,
    stride_min_o,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    num_groups,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The weight is the left operand, so that one token and many take the same instruction; groups' sums are scaled."""
    num_token_tiles = tl.cdiv(num_tokens, TILE_T)
    o = (tl.program_id(0) // num_token_tiles) * TILE_O + tl.arange(0, TILE_O)
    token = (tl.program_id(0) % num_token_tiles) * TILE_T + tl.arange(0, TILE_T)
    in_batch = token < num_tokens
    row = tl.minimum(o, out_features - 1).to(tl.int64)
    x_row = tl.minimum(token, num_tokens - 1).to(tl.int64)
    j = tl.arange(0, HALF)[None, :]
    w_ptrs = weight_ptr + row[:, None] * stride_weight_o + j
    x_ptrs = x_ptr + x_row[:, None] * stride_x_t + j
    scale_ptrs = scale_ptr + row * stride_scale_o
    acc = tl.zeros([TILE_O, TILE_T], tl.float32)
    zero: tl.constexpr = 8 if min_ptr is None else 0
    scale = tl.load(scale_ptrs).to(tl.float32)
    for g in tl.range(0, num_groups, num_stages=STAGES):
        packed = tl.load(w_ptrs)
        low = tl.load(x_ptrs)
        high = tl.load(x_ptrs + HALF)
        next_scale = tl.load(scale_ptrs + tl.minimum(g + 1, num_groups - 1)).to(tl.float32)
        w_low = nibbles(packed, False, zero, x_ptr.dtype.element_ty)
        w_high = nibbles(packed, True, zero, x_ptr.dtype.element_ty)
        sums = dot_in_order(w_low, tl.trans(low), tl.zeros([TILE_O, TILE_T], tl.float32))
        sums = dot_in_order(w_high, tl.trans(high), sums)
        acc += scale[:, None] * sums
        if min_ptr is not None:
            least = tl.load(min_ptr + row * stride_min_o + g).to(tl.float32)
            total = tl.sum(low.to(tl.float32) + high.to(tl.float32), axis=1)
            acc += least[:, None] * total[None, :]
        scale = next_scale
        w_ptrs += HALF
        x_ptrs += 2 * HALF
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    pointers = out_ptr + token.to(tl.int64)[None, :] * stride_out_t + o[:, None] * stride_out_o
    store(pointers, acc, in_batch[None, :] & (o < out_features)[:, None])


@triton.jit
def scaled(codes, scale):
    """Codes times the scale of their row, rounded once to their dtype, in two multiplications of that dtype.

    A float32 scale is a sum of two 16-bit ones to within 2**-17; the product with the second only corrects the first.
    """
    if INTERPRETED or codes.dtype == tl.float32:
        y = to_dtype(codes.to(tl.float32) * scale[:, None], codes.dtype)
    else:
        high = scale.to(codes.dtype)
        low = (scale - high.to(tl.float32)).to(codes.dtype)
        y = tl.fma(codes, tl.broadcast_to(high[:, None], codes.shape), codes * low[:, None])
    return y


@triton.jit
def _many_tokens_kernel(
    x_desc,  # [num_tokens, in_features]
    weight_desc,  # [out_features, in_features / 2] uint8
    scale_ptr,  # [out_features, num_groups]
    min_ptr,  # [out_features, num_groups] or None
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_scale_o,
    stride_min_o,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    num_groups,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The weight is the left operand, so that it goes from codes to the tensor cores without leaving the registers."""
    num_token_tiles = tl.cdiv(num_tokens, TILE_T)
    first_o = (tl.program_id(0) // num_token_tiles) * TILE_O
    first_t = (tl.program_id(0) % num_token_tiles) * TILE_T
    o, token = first_o + tl.arange(0, TILE_O), first_t + tl.arange(0, TILE_T)
    row = tl.minimum(o, out_features - 1).to(tl.int64)
    acc = tl.zeros([TILE_O, TILE_T], tl.float32)
    zero: tl.constexpr = 8 if min_ptr is None else 0
    for g in tl.range(0, num_groups, num_stages=STAGES):
        packed = weight_desc.load([first_o, g * HALF])
        low = x_desc.load([first_t, g * (2 * HALF)])
        high = x_desc.load([first_t, g * (2 * HALF) + HALF])
        scale = tl.load(scale_ptr + row * stride_scale_o + g).to(tl.float32)
        acc = dot(scaled(nibbles(packed, False, zero, low.dtype), scale), tl.trans(low), acc)
        acc = dot(scaled(nibbles(packed, True, zero, low.dtype), scale), tl.trans(high), acc)
        if min_ptr is not None:
            least = tl.load(min_ptr + row * stride_min_o + g).to(tl.float32)
            total = tl.sum(low.to(tl.float32) + high.to(tl.float32), axis=1)
            acc += least[:, None] * total[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    pointers = out_ptr + token.to(tl.int64)[None, :] * stride_out_t + o[:, None] * stride_out_o
    store(pointers, acc, (token < num_tokens)[None, :] & (o < out_features)[:, None])


@triton.jit
def _any_groups_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features / 2] uint8
    scale_ptr,  # [out_features, num_groups]
    min_ptr,  # [out_features, num_groups] or None
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_weight_o,
    stride_scale_o,
    stride_min_o,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    in_features,
    group_size,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_B: tl.constexpr,
):
    """Every byte looks up its group's scale and which two features it holds; weights are rounded to the dtype of x."""
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    token = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    in_batch = token < num_tokens
    row = tl.minimum(o, out_features - 1).to(tl.int64)[:, None]
    x_row = token.to(tl.int64)[:, None] * stride_x_t
    half_size, num_bytes = group_size // 2, in_features // 2
    acc = tl.zeros([TILE_O, TILE_T], tl.float32)
    for start in range(0, num_bytes, TILE_B):
        byte = start + tl.arange(0, TILE_B)[None, :]
        group = byte // half_size
        low = byte + group * half_size  # the feature in the low nibble
        high = low + tl.minimum(group_size, in_features - group * group_size) // 2  # the last group may have fewer
        in_bytes = byte < num_bytes
        in_row = in_bytes & (row >= 0)
        packed = tl.load(weight_ptr + row * stride_weight_o + byte, mask=in_row, other=0)
        scale = tl.load(scale_ptr + row * stride_scale_o + group, mask=in_row, other=0.0).to(tl.float32)
        zero: tl.constexpr = 8 if min_ptr is None else 0
        w_low = nibbles(packed, False, zero, tl.float32) * scale
        w_high = nibbles(packed, True, zero, tl.float32) * scale
        if min_ptr is not None:
            least = tl.load(min_ptr + row * stride_min_o + group, mask=in_row, other=0.0).to(tl.float32)
            w_low += least
            w_high += least
        x_mask = in_batch[:, None] & in_bytes
        x_low = tl.load(x_ptr + x_row + low, mask=x_mask, other=0.0)
        x_high = tl.load(x_ptr + x_row + high, mask=x_mask, other=0.0)
        acc = dot_in_order(to_dtype(w_low, x_low.dtype), tl.trans(x_low), acc)
        acc = dot_in_order(to_dtype(w_high, x_high.dtype), tl.trans(x_high), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row).to(tl.float32)
    pointers = out_ptr + token.to(tl.int64)[None, :] * stride_out_t + o[:, None] * stride_out_o
    store(pointers, acc, in_batch[None, :] & (o < out_features)[:, None])


@triton.jit
def _dequantize_kernel(
    weight_ptr,  # [out_features, in_features / 2] uint8
    scale_ptr,  # [out_features, num_groups]
    min_ptr,  # [out_features, num_groups] or None
    dense_ptr,  # [out_features, in_features]
    stride_weight_o,
    stride_scale_o,
    stride_min_o,
    out_features,
    num_groups,
    TILE_O: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
):
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)[:, None]
    group = tl.program_id(1) * PARTS + tl.arange(0, PARTS)[None, :]
    mask = (o < out_features) & (group < num_groups)
    row = o.to(tl.int64)
    scale = tl.load(scale_ptr + row * stride_scale_o + group, mask=mask, other=0.0).to(tl.float32)[:, :, None]
    j = tl.arange(0, HALF)[None, None, :]
    row, group, mask = row[:, :, None], group[:, :, None], mask[:, :, None]
    packed = tl.load(weight_ptr + row * stride_weight_o + group * HALF + j, mask=mask, other=0)
    zero: tl.constexpr = 8 if min_ptr is None else 0
    low = nibbles(packed, False, zero, dense_ptr.dtype.element_ty).to(tl.float32) * scale
    high = nibbles(packed, True, zero, dense_ptr.dtype.element_ty).to(tl.float32) * scale
    if min_ptr is not None:
        least = tl.load(min_ptr + row * stride_min_o + group, mask=mask, other=0.0).to(tl.float32)
        low += least
        high += least
    pointers = dense_ptr + row * (num_groups * 2 * HALF) + group * (2 * HALF) + j
    store(pointers, low, mask)
    store(pointers + HALF, high, mask)


# ---- launching ------------------------------------------------------------------------------------------------------


def few_tokens(
    x: Array,
    weight: Array,
    scale: Array,
    least: Array | None,
    bias: Array | None,
    out: Array,
    group_size: int,
    tiles: Tiles | None = None,
) -> Array:
    num_tokens, out_features = out.shape
    tiles = tiles or choose_few(num_tokens, out_features)
    _few_tokens_kernel[(cdiv(out_features, tiles.rows), cdiv(num_tokens, tiles.tokens))](
        x, weight, scale, least, bias, out, *_strides(x, weight, scale, least, out),
        num_tokens, out_features, scale.shape[1],
        TILE_T=tiles.tokens, TILE_O=tiles.rows, PARTS=tiles.parts, HALF=group_size // 2, STAGES=tiles.stages,
        num_warps=tiles.warps, **overlapped(x),
    )  # fmt: skip
    return out


def sums(
    x: Array,
    weight: Array,
    scale: Array,
    least: Array | None,
    bias: Array | None,
    out: Array,
    group_size: int,
    tiles: Tiles | None = None,
) -> Array:
    """Any number of tokens, in an order that is the same for all of them."""
    num_tokens, out_features = out.shape
    tiles = tiles or choose_sums(num_tokens, out_features)
    _sums_kernel[(cdiv(out_features, tiles.rows) * cdiv(num_tokens, tiles.tokens),)](
        x, weight, scale, least, bias, out, *_strides(x, weight, scale, least, out),
        num_tokens, out_features, scale.shape[1],
        TILE_T=tiles.tokens, TILE_O=tiles.rows, HALF=group_size // 2, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out


def many_tokens(
    x: Array,
    weight: Array,
    scale: Array,
    least: Array | None,
    bias: Array | None,
    out: Array,
    group_size: int,
    tiles: Tiles | None = None,
) -> Array:
    num_tokens, out_features = out.shape
    tiles = tiles or MANY
    _many_tokens_kernel[(cdiv(out_features, tiles.rows) * cdiv(num_tokens, tiles.tokens),)](
        TensorDescriptor.from_tensor(x, [tiles.tokens, group_size // 2]),
        TensorDescriptor.from_tensor(weight, [tiles.rows, group_size // 2]),
        scale, least, bias, out, *_strides(x, weight, scale, least, out)[2:], num_tokens, out_features, scale.shape[1],
        TILE_T=tiles.tokens, TILE_O=tiles.rows, HALF=group_size // 2, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out


def any_groups(
    x: Array, weight: Array, scale: Array, least: Array | None, bias: Array | None, out: Array, group_size: int
) -> Array:
    num_tokens, out_features = out.shape
    tile_t, tile_o, tile_b = 16, 32, 64
    _any_groups_kernel[(cdiv(out_features, tile_o), cdiv(num_tokens, tile_t))](
        x, weight, scale, least, bias, out, *_strides(x, weight, scale, least, out),
        num_tokens, out_features, x.shape[1], group_size, TILE_T=tile_t, TILE_O=tile_o, TILE_B=tile_b, num_warps=4,
        enable_fp_fusion=False,  # scale * code + min rounds twice, as whoever dequantizes elsewhere does
    )  # fmt: skip
    return out


def dense(x: Array, weight: Array, scale: Array, least: Array | None, bias: None, out: Array, group_size: int) -> Array:
    """The weight as floats, in memory of its own, and cuBLAS."""
    return torch.mm(x, dequantize(weight, scale, least, group_size, x.dtype).T, out=out)


def dequantize(weight: Array, scale: Array, least: Array | None, group_size: int, dtype: torch.dtype) -> Array:
    out_features, num_groups = scale.shape
    floats = torch.empty(out_features, num_groups * group_size, dtype=dtype, device=weight.device)
    tile_o, parts = 4, max(1, 1024 // group_size)
    _dequantize_kernel[(cdiv(out_features, tile_o), cdiv(num_groups, parts))](
        weight, scale, least, floats, weight.stride(0), scale.stride(0), 0 if least is None else least.stride(0),
        out_features, num_groups, TILE_O=tile_o, HALF=group_size // 2, PARTS=parts, num_warps=4,
    )  # fmt: skip
    return floats


def _strides(x: Array, weight: Array, scale: Array, least: Array | None, out: Array) -> tuple[int, ...]:
    """In the order of the kernels' parameters."""
    least_stride = 0 if least is None else least.stride(0)
    return x.stride(0), weight.stride(0), scale.stride(0), least_stride, out.stride(0), out.stride(1)


KERNELS = {
    "few": few_tokens,
    "many": many_tokens,
    "sums": sums,
    "any": any_groups,
    "dense": dense,
}
