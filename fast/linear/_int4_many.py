"""Weights of 4 bits times many tokens, or times any number in one order: a program owns a tile of the result.

The weight is the left operand of the products, so that one token and many take the same instruction. Two kernels: one
scales the sums of a group, which rounds no weight but wants a second sum in registers, so tiles are smaller; the other
scales the weights themselves.
"""

import triton
import triton.language as tl
from torch import Tensor as Array
from triton.tools.tensor_descriptor import TensorDescriptor

from fast._triton.platform import INTERPRETED, cdiv, next_power_of_2
from fast._triton.rounding import dot, dot_in_order, to_dtype
from fast.linear._eight_bit import Tiles
from fast.linear._int4_codes import add_minimum, nibbles, store_tile, strides_of

LARGEST = Tiles(256, 128, 8, 3)  # as much as registers and shared memory hold


def choose_sums(num_tokens: int, out_features: int) -> Tiles:
    """Rows are 64 for each four warps, so that all use the same instruction: a sum does not depend on the choice."""
    if num_tokens > 64 and out_features > 64:
        return Tiles(128, 128, 8, 3)
    return Tiles(max(16, next_power_of_2(min(num_tokens, 64))), 64, 4, 4)


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
def _sums_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features / 2] uint8
    scale_ptr,  # [out_features, num_groups]
    min_ptr,  # [out_features, num_groups] or None
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_weight_o,
    stride_scale_o,
    stride_min_o,
    stride_residual_t,
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
    """The sums of a group are scaled; a group's scales are loaded while the one before it is multiplied."""
    num_token_tiles = tl.cdiv(num_tokens, TILE_T)
    o = (tl.program_id(0) // num_token_tiles) * TILE_O + tl.arange(0, TILE_O)
    token = (tl.program_id(0) % num_token_tiles) * TILE_T + tl.arange(0, TILE_T)
    row = tl.minimum(o, out_features - 1).to(tl.int64)
    x_row = tl.minimum(token, num_tokens - 1).to(tl.int64)
    j = tl.arange(0, HALF)[None, :]
    w_ptrs = weight_ptr + row[:, None] * stride_weight_o + j
    x_ptrs = x_ptr + x_row[:, None] * stride_x_t + j
    scale_ptrs = scale_ptr + row * stride_scale_o
    acc = tl.zeros([TILE_O, TILE_T], tl.float32)
    scale = tl.load(scale_ptrs).to(tl.float32)
    for g in tl.range(0, num_groups, num_stages=STAGES):
        packed = tl.load(w_ptrs)
        low = tl.load(x_ptrs)
        high = tl.load(x_ptrs + HALF)
        next_scale = tl.load(scale_ptrs + tl.minimum(g + 1, num_groups - 1)).to(tl.float32)
        w_low = nibbles(packed, False, min_ptr, x_ptr.dtype.element_ty)
        w_high = nibbles(packed, True, min_ptr, x_ptr.dtype.element_ty)
        sums = dot_in_order(w_low, tl.trans(low), tl.zeros([TILE_O, TILE_T], tl.float32))
        sums = dot_in_order(w_high, tl.trans(high), sums)
        acc += scale[:, None] * sums
        acc = add_minimum(acc, low, high, min_ptr, stride_min_o, row, g)
        scale = next_scale
        w_ptrs += HALF
        x_ptrs += 2 * HALF
    strides = stride_residual_t, stride_out_t, stride_out_o
    store_tile(acc, bias_ptr, residual_ptr, out_ptr, strides, o, token, num_tokens, out_features)


@triton.jit
def _many_tokens_kernel(
    x_desc,  # [num_tokens, in_features]
    weight_desc,  # [out_features, in_features / 2] uint8
    scale_ptr,  # [out_features, num_groups]
    min_ptr,  # [out_features, num_groups] or None
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_scale_o,
    stride_min_o,
    stride_residual_t,
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
    """The weights are scaled: they go from codes to the tensor cores without leaving the registers."""
    num_token_tiles = tl.cdiv(num_tokens, TILE_T)
    first_o = (tl.program_id(0) // num_token_tiles) * TILE_O
    first_t = (tl.program_id(0) % num_token_tiles) * TILE_T
    o, token = first_o + tl.arange(0, TILE_O), first_t + tl.arange(0, TILE_T)
    row = tl.minimum(o, out_features - 1).to(tl.int64)
    acc = tl.zeros([TILE_O, TILE_T], tl.float32)
    for g in tl.range(0, num_groups, num_stages=STAGES):
        packed = weight_desc.load([first_o, g * HALF])
        low = x_desc.load([first_t, g * (2 * HALF)])
        high = x_desc.load([first_t, g * (2 * HALF) + HALF])
        scale = tl.load(scale_ptr + row * stride_scale_o + g).to(tl.float32)
        acc = dot(scaled(nibbles(packed, False, min_ptr, low.dtype), scale), tl.trans(low), acc)
        acc = dot(scaled(nibbles(packed, True, min_ptr, low.dtype), scale), tl.trans(high), acc)
        acc = add_minimum(acc, low, high, min_ptr, stride_min_o, row, g)
    strides = stride_residual_t, stride_out_t, stride_out_o
    store_tile(acc, bias_ptr, residual_ptr, out_ptr, strides, o, token, num_tokens, out_features)


def sums(
    x: Array,
    weight: Array,
    scale: Array,
    least: Array | None,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    group_size: int,
) -> Array:
    """Any number of tokens, in an order that is the same for all of them."""
    num_tokens, out_features = out.shape
    tiles = choose_sums(num_tokens, out_features)
    _sums_kernel[(cdiv(out_features, tiles.rows) * cdiv(num_tokens, tiles.tokens),)](
        x, weight, scale, least, bias, residual, out, *strides_of(x, weight, scale, least, residual, out),
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
    residual: Array | None,
    out: Array,
    group_size: int,
) -> Array:
    num_tokens, out_features = out.shape
    tiles = LARGEST
    _many_tokens_kernel[(cdiv(out_features, tiles.rows) * cdiv(num_tokens, tiles.tokens),)](
        TensorDescriptor.from_tensor(x, [tiles.tokens, group_size // 2]),
        TensorDescriptor.from_tensor(weight, [tiles.rows, group_size // 2]),
        scale, least, bias, residual, out, *strides_of(x, weight, scale, least, residual, out)[2:],
        num_tokens, out_features, scale.shape[1],
        TILE_T=tiles.tokens, TILE_O=tiles.rows, HALF=group_size // 2, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out
