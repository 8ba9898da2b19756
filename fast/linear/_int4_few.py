"""Weights of 4 bits times few tokens: a weight is read once, by programs that own few rows of it."""

import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.overlap import let_successor_come, overlapped, wait_for_predecessor
from fast._triton.platform import cdiv, next_power_of_2
from fast._triton.rounding import dot
from fast.linear._eight_bit import Tiles
from fast.linear._int4_codes import nibbles, store_tile, strides_of

FEW_TOKENS = 32  # the most that the kernel is for
PARTS = 4  # groups that one step takes, one for each warp


def choose_few(num_tokens: int, out_features: int) -> Tiles:
    """Enough programs for every processor, each with enough on its way from memory.

    Example:
        >>> [choose_few(n, 8192).rows for n in (1, 8, 16, 32)], choose_few(1, 4096).rows
        ([32, 32, 64, 32], 16)
    """
    tokens = next_power_of_2(min(num_tokens, FEW_TOKENS))
    if tokens == 16 and out_features >= 8192:
        return Tiles(tokens, 64, PARTS, 4)  # every program reads all of the tokens: fewer programs
    return Tiles(tokens, 16 if out_features <= 4096 else 32, PARTS, 4 if tokens == 1 else 3)


@triton.jit
def _few_tokens_kernel(
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
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each warp has groups of its own, and a sum of its own for every row; they are added up at the end."""
    wait_for_predecessor(OVERLAP, EARLY=False)
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
        scale_ptrs = scale_ptr + row[None, :] * stride_scale_o + group[:, None]
        scale = tl.load(scale_ptrs, mask=in_row[:, None], other=0.0).to(tl.float32)
        sums = tl.zeros([PARTS, TILE_O, TILE_T], tl.float32)
        sums = dot(nibbles(packed, False, min_ptr, x_ptr.dtype.element_ty), tl.permute(low, (0, 2, 1)), sums)
        sums = dot(nibbles(packed, True, min_ptr, x_ptr.dtype.element_ty), tl.permute(high, (0, 2, 1)), sums)
        acc += scale[:, :, None] * sums
        if min_ptr is not None:
            min_ptrs = min_ptr + row[None, :] * stride_min_o + group[:, None]
            least = tl.load(min_ptrs, mask=in_row[:, None], other=0.0).to(tl.float32)
            total = tl.sum(low.to(tl.float32) + high.to(tl.float32), axis=2)
            acc += least[:, :, None] * total[:, None, :]
    let_successor_come(OVERLAP)
    acc = tl.sum(acc, axis=0)
    strides = stride_residual_t, stride_out_t, stride_out_o
    store_tile(acc, bias_ptr, residual_ptr, out_ptr, strides, o, token, num_tokens, out_features)


def few_tokens(
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
    tiles = choose_few(num_tokens, out_features)
    _few_tokens_kernel[(cdiv(out_features, tiles.rows), cdiv(num_tokens, tiles.tokens))](
        x, weight, scale, least, bias, residual, out, *strides_of(x, weight, scale, least, residual, out),
        num_tokens, out_features, scale.shape[1],
        TILE_T=tiles.tokens, TILE_O=tiles.rows, PARTS=PARTS, HALF=group_size // 2, STAGES=tiles.stages,
        num_warps=tiles.warps, **overlapped(x),
    )  # fmt: skip
    return out
