"""Weights of 8 bits times activations: for few tokens, for many, and for groups of any size.

int8 and e4m3 codes are exact in bfloat16 and float16, so the tensor cores multiply them by 16-bit activations as they
are; where the activations were rounded to int8 too, they multiply bytes. A scale of a row waits until the sum is whole.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.overlap import let_successor_come, overlapped, wait_for_predecessor
from fast._triton.platform import INTERPRETED, cdiv, next_power_of_2
from fast._triton.rounding import dot_in_order, store, to_dtype

FEW_TOKENS = 64  # up to here programs own few rows of the weight, and warps share out the columns
PARTS = 4  # that many; with TILE_I it fixes the order in which a sum is added up, whatever the number of tokens
TILE_I = 64
GROUPS = (32, 64, 128)  # sizes of groups for which a step takes whole groups


class Tiles(NamedTuple):
    """How the work is cut up: tokens and rows of the weight that one program owns."""

    tokens: int
    rows: int
    warps: int
    stages: int


def choose_few(num_tokens: int, out_features: int) -> Tiles:
    """Enough programs for every processor, each with enough of the weight on its way from memory."""
    tokens = max(8, next_power_of_2(min(num_tokens, FEW_TOKENS)))
    return Tiles(tokens, 16 if out_features <= 2048 or tokens > 16 else 32, PARTS, 4 if tokens <= 16 else 3)


def choose_many(num_tokens: int, out_features: int, dtype: torch.dtype) -> Tiles:
    """Large tiles read less for each product; small ones waste less where there are few tokens.

    Rows are 64 for each four warps, so that all use the same instruction: a sum does not depend on the choice.
    """
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2)
    if num_tokens > 64 and out_features > 64:
        return Tiles(128, 128, 8, 3)
    return Tiles(max(16, next_power_of_2(min(num_tokens, 64))), 64, 4, 4)


# ---- helpers --------------------------------------------------------------------------------------------------------


@triton.jit
def to_operand(codes, like: tl.constexpr):
    """Codes as numbers that the tensor cores multiply: those of ``like``, bfloat16 for float8, bytes for int8."""
    if INTERPRETED or like == tl.float32:
        y = codes.to(tl.float32)
    elif codes.dtype == tl.float8e4nv and like != tl.float16:
        y = codes.to(tl.float16).to(tl.float32).to(tl.bfloat16)  # directly, it is one slow instruction a code
    else:
        y = codes.to(like)
    return y


@triton.jit
def dot_of(codes, x, acc):
    """``acc + codes @ x``; whole numbers in int32, anything else in float32."""
    if x.dtype == tl.int8:
        acc = tl.dot(codes, x, acc, out_dtype=tl.int32)
    else:
        acc = dot_in_order(to_operand(codes, x.dtype), to_operand(x, x.dtype), acc)
    return acc


@triton.jit
def finish(y, weight_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, strides, o, token, mask):
    """Both scales, the bias, the residual, and one rounding of a tile, features times tokens.

    ``strides``: from token to token of the residual and of the result, and from feature to feature of the result.
    Product and sum are one `fma` in words: otherwise the compiler of each kernel decides whether they are.
    """
    stride_residual_t, stride_out_t, stride_out_o = strides
    o, token = o[:, None], token.to(tl.int64)[None, :]
    y = y.to(tl.float32)
    bias = tl.zeros_like(y)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + o, mask=mask).to(tl.float32)
    if weight_scale_ptr is not None:
        factor = tl.load(weight_scale_ptr + o, mask=mask).to(tl.float32)
        if x_scale_ptr is not None:
            factor = tl.load(x_scale_ptr + token, mask=mask) * factor
        y = tl.fma(y, factor + tl.zeros_like(y), bias)
    else:
        y += bias
    if residual_ptr is not None:
        y += tl.load(residual_ptr + token * stride_residual_t + o, mask=mask).to(tl.float32)
    store(out_ptr + token * stride_out_t + o * stride_out_o, y, mask)


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _few_tokens_kernel(
    x_ptr,  # [num_tokens, in_features]
    x_scale_ptr,  # [num_tokens] or None
    weight_ptr,  # [out_features, in_features] codes
    weight_scale_ptr,  # [out_features] or [out_features, num_groups]
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_weight_o,
    stride_weight_scale_o,
    stride_residual_t,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    in_features,
    IN_GROUPS: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each warp has columns of its own, and a sum of its own for every row; they are added up at the end."""
    wait_for_predecessor(OVERLAP, EARLY=False)
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    token = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    in_batch = token < num_tokens
    row = tl.minimum(o, out_features - 1).to(tl.int64)  # rows past the end are read again, and not stored
    part = tl.arange(0, PARTS)
    column = part[:, None, None] * TILE_I + tl.arange(0, TILE_I)[None, None, :]
    SUM: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros([PARTS, TILE_O, TILE_T], SUM)
    for start in tl.range(0, in_features, PARTS * TILE_I, num_stages=STAGES):
        i = start + column
        in_row = i < in_features
        codes = tl.load(weight_ptr + row[None, :, None] * stride_weight_o + i, mask=in_row, other=0.0)
        x_mask = in_batch[None, :, None] & in_row
        x = tl.load(x_ptr + token.to(tl.int64)[None, :, None] * stride_x_t + i, mask=x_mask, other=0.0)
        x = tl.permute(x, (0, 2, 1))
        if IN_GROUPS:
            group = start // TILE_I + part[:, None]
            scale = tl.load(
                weight_scale_ptr + row[None, :] * stride_weight_scale_o + group,
                mask=group * TILE_I < in_features,
                other=0.0,
            )
            acc += scale.to(tl.float32)[:, :, None] * dot_of(codes, x, tl.zeros([PARTS, TILE_O, TILE_T], SUM))
        else:
            acc = dot_of(codes, x, acc)
    let_successor_come(OVERLAP)
    mask = in_batch[None, :] & (o < out_features)[:, None]
    scale_ptr = None if IN_GROUPS else weight_scale_ptr
    y = tl.sum(acc, axis=0)
    strides = stride_residual_t, stride_out_t, stride_out_o
    finish(y, scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, strides, o, token, mask)


@triton.jit
def _many_tokens_kernel(
    x_ptr,  # [num_tokens, in_features]
    x_scale_ptr,  # [num_tokens] or None
    weight_ptr,  # [out_features, in_features] codes
    weight_scale_ptr,  # [out_features]
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_weight_o,
    stride_residual_t,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    in_features,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The weight is the left operand, so that it goes from codes to the tensor cores without leaving the registers."""
    num_token_tiles = tl.cdiv(num_tokens, TILE_T)
    o = (tl.program_id(0) // num_token_tiles) * TILE_O + tl.arange(0, TILE_O)
    token = (tl.program_id(0) % num_token_tiles) * TILE_T + tl.arange(0, TILE_T)
    row = tl.minimum(o, out_features - 1).to(tl.int64)
    x_row = tl.minimum(token, num_tokens - 1).to(tl.int64)
    SUM: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros([TILE_O, TILE_T], SUM)
    for start in tl.range(0, in_features, TILE_I, num_stages=STAGES):
        i = start + tl.arange(0, TILE_I)[None, :]
        in_row = i < in_features
        codes = tl.load(weight_ptr + row[:, None] * stride_weight_o + i, mask=in_row, other=0.0)
        x = tl.load(x_ptr + x_row[:, None] * stride_x_t + i, mask=in_row, other=0.0)
        acc = dot_of(codes, tl.trans(x), acc)
    mask = (token < num_tokens)[None, :] & (o < out_features)[:, None]
    strides = stride_residual_t, stride_out_t, stride_out_o
    finish(acc, weight_scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, strides, o, token, mask)


@triton.jit
def _any_groups_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features] int8
    weight_scale_ptr,  # [out_features, num_groups]
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_weight_o,
    stride_weight_scale_o,
    stride_residual_t,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    in_features,
    group_size,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
):
    """Every weight looks its scale up, and is rounded to the dtype of ``x``."""
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    token = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    in_batch = token < num_tokens
    row = tl.minimum(o, out_features - 1).to(tl.int64)[:, None]
    x_row = token.to(tl.int64)[:, None] * stride_x_t
    acc = tl.zeros([TILE_O, TILE_T], tl.float32)
    for start in range(0, in_features, TILE_I):
        i = start + tl.arange(0, TILE_I)[None, :]
        in_row = i < in_features
        codes = tl.load(weight_ptr + row * stride_weight_o + i, mask=in_row, other=0.0).to(tl.float32)
        scale = tl.load(weight_scale_ptr + row * stride_weight_scale_o + i // group_size, mask=in_row, other=0.0)
        x = tl.load(x_ptr + x_row + i, mask=in_batch[:, None] & in_row, other=0.0)
        acc = dot_in_order(to_dtype(codes * scale.to(tl.float32), x.dtype), tl.trans(x), acc)
    mask = in_batch[None, :] & (o < out_features)[:, None]
    strides = stride_residual_t, stride_out_t, stride_out_o
    finish(acc, None, None, bias_ptr, residual_ptr, out_ptr, strides, o, token, mask)


def stride_of_rows(array: Array | None) -> int:
    """0 for an array that is not there."""
    return 0 if array is None else array.stride(0)


# ---- launching ------------------------------------------------------------------------------------------------------


def few_tokens(
    x: Array,
    x_scale: Array | None,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    *,
    group_size: int | None = None,
) -> Array:
    """Any number of tokens, in tiles of ``FEW_TOKENS``; the order of a sum depends on ``in_features`` alone."""
    (num_tokens, out_features), in_features = out.shape, x.shape[1]
    tiles = choose_few(num_tokens, out_features)
    if x.dtype == torch.float32:
        tiles = tiles._replace(tokens=min(tiles.tokens, 16), rows=16, stages=2)
    tile_i = group_size or TILE_I
    _few_tokens_kernel[(cdiv(out_features, tiles.rows), cdiv(num_tokens, tiles.tokens))](
        x, x_scale, weight, weight_scale, bias, residual, out,
        x.stride(0), weight.stride(0), weight_scale.stride(0), stride_of_rows(residual), out.stride(0), out.stride(1),
        num_tokens, out_features, in_features, IN_GROUPS=group_size is not None,
        TILE_T=tiles.tokens, TILE_O=tiles.rows, TILE_I=tile_i, PARTS=PARTS, STAGES=tiles.stages, num_warps=tiles.warps,
        **overlapped(x),
    )  # fmt: skip
    return out


def many_tokens(
    x: Array,
    x_scale: Array | None,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    *,
    tile_i: int = 64,
) -> Array:
    """Any number of tokens; whole sums in each program, in the same order whatever the tile."""
    (num_tokens, out_features), in_features = out.shape, x.shape[1]
    tiles = choose_many(num_tokens, out_features, x.dtype)
    tile_i = 32 if x.dtype == torch.float32 else tile_i
    _many_tokens_kernel[(cdiv(out_features, tiles.rows) * cdiv(num_tokens, tiles.tokens),)](
        x, x_scale, weight, weight_scale, bias, residual, out,
        x.stride(0), weight.stride(0), stride_of_rows(residual), out.stride(0), out.stride(1),
        num_tokens, out_features, in_features,
        TILE_T=tiles.tokens, TILE_O=tiles.rows, TILE_I=tile_i, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out


def any_groups(
    x: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    group_size: int,
) -> Array:
    (num_tokens, out_features), in_features = out.shape, x.shape[1]
    tile_t, tile_o, tile_i = 16, 32, 64
    _any_groups_kernel[(cdiv(out_features, tile_o), cdiv(num_tokens, tile_t))](
        x, weight, weight_scale, bias, residual, out,
        x.stride(0), weight.stride(0), weight_scale.stride(0), stride_of_rows(residual), out.stride(0), out.stride(1),
        num_tokens, out_features, in_features, group_size, TILE_T=tile_t, TILE_O=tile_o, TILE_I=tile_i, num_warps=4,
    )  # fmt: skip
    return out
