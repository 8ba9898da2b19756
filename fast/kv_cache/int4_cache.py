"""int4_cache, in Triton. What the technique is for: `reference/kv_cache/int4_cache.py`."""

import triton
import triton.language as tl
from jaxtyping import Float, Float16, Int32, Int64, UInt8
from torch import Tensor as Array

from fast._checks import require_shape
from fast._triton.rounding import clamp
from fast.kv_cache._attention import attend_codes
from fast.kv_cache._codes import (
    FLOAT16_MAX,
    TILE_NUMBERS,
    affine_codes,
    affine_range,
    launch_write,
    locate_rows,
    require_affine,
    require_tokens,
)

LARGEST_CODE = tl.constexpr(15.0)


@triton.jit
def _write_kernel(
    k_ptr,  # [num_tokens, num_kv_heads, head_dim]
    v_ptr,
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, half_head_dim]
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups]
    v_scale_ptr,
    k_zero_ptr,
    v_zero_ptr,
    slot_mapping_ptr,  # [num_tokens]
    slot_mapping_stride,
    x_stride_token,
    x_stride_head,
    x_stride_dim,
    cache_stride_block,
    cache_stride_slot,
    cache_stride_head,
    cache_stride_byte,
    scale_stride_block,
    scale_stride_slot,
    scale_stride_head,
    scale_stride_group,
    zero_stride_block,
    zero_stride_slot,
    zero_stride_head,
    zero_stride_group,
    num_rows,
    num_slots,
    block_size,
    num_kv_heads,
    half_head_dim,
    num_groups,
    TILE_ROWS: tl.constexpr,
    TILE_BYTES: tl.constexpr,
):
    if tl.program_id(1) == 0:
        x_ptr, cache_ptr, scale_ptr, zero_ptr = k_ptr, k_cache_ptr, k_scale_ptr, k_zero_ptr
    else:
        x_ptr, cache_ptr, scale_ptr, zero_ptr = v_ptr, v_cache_ptr, v_scale_ptr, v_zero_ptr
    token, head, has_slot, block, offset = locate_rows(
        slot_mapping_ptr, slot_mapping_stride, num_rows, num_slots, block_size, num_kv_heads, TILE_ROWS
    )
    byte = tl.arange(0, TILE_BYTES)
    in_tile = has_slot[:, None] & (byte < half_head_dim)[None, :]

    x_ptrs = x_ptr + (token * x_stride_token + head * x_stride_head)[:, None] + byte * x_stride_dim
    low = clamp(tl.load(x_ptrs, mask=in_tile).to(tl.float32), FLOAT16_MAX)
    high = tl.load(x_ptrs + half_head_dim * x_stride_dim, mask=in_tile)
    high = clamp(high.to(tl.float32), FLOAT16_MAX)

    # A group may lie in the lower half of the head, in the upper one, or in both.
    group_size = 2 * half_head_dim // num_groups
    low_group, high_group = (byte // group_size)[None, :], ((byte + half_head_dim) // group_size)[None, :]
    low_codes, high_codes = tl.zeros(low.shape, tl.float32), tl.zeros(low.shape, tl.float32)
    scale_row = block * scale_stride_block + offset * scale_stride_slot + head * scale_stride_head
    zero_row = block * zero_stride_block + offset * zero_stride_slot + head * zero_stride_head
    for group in range(num_groups):
        in_low, in_high = in_tile & (low_group == group), in_tile & (high_group == group)
        smallest = tl.minimum(tl.where(in_low, low, FLOAT16_MAX), tl.where(in_high, high, FLOAT16_MAX))
        largest = tl.maximum(tl.where(in_low, low, -FLOAT16_MAX), tl.where(in_high, high, -FLOAT16_MAX))
        scale, zero = affine_range(tl.min(smallest, 1), tl.max(largest, 1), LARGEST_CODE)
        low_codes = tl.where(in_low, affine_codes(low, scale[:, None], zero[:, None]), low_codes)
        high_codes = tl.where(in_high, affine_codes(high, scale[:, None], zero[:, None]), high_codes)
        tl.store(scale_ptr + scale_row + group * scale_stride_group, scale, mask=has_slot)
        tl.store(zero_ptr + zero_row + group * zero_stride_group, zero, mask=has_slot)

    cache_row = block * cache_stride_block + offset * cache_stride_slot + head * cache_stride_head
    packed = low_codes.to(tl.int32) | (high_codes.to(tl.int32) << 4)
    tl.store(cache_ptr + cache_row[:, None] + byte * cache_stride_byte, packed.to(tl.uint8), mask=in_tile)


def write_kv_int4(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads half_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads half_head_dim"],
    k_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    k_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    """Same contract as `reference.kv_cache.int4_cache.write_kv_int4`.

    Grid: a program per few rows of (token, head) of the keys or of the values; it owns their slots in cache, scales and
    zeros.
    Moves: k and v once, codes, scales and zeros once.
    """
    op = "write_kv_int4"
    head_dim = require_affine(op, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    require_shape(op, "k", k, (None, k_cache.shape[2], head_dim))
    require_tokens(op, k, v, slot_mapping, k_cache)
    if k.numel() == 0 or k_cache.numel() == 0:
        return
    tile_bytes = triton.next_power_of_2(head_dim // 2)
    arrays = (k, k_cache, k_scale, k_zero), (v, v_cache, v_scale, v_zero)
    tiles = {"TILE_ROWS": max(1, TILE_NUMBERS // (2 * tile_bytes)), "TILE_BYTES": tile_bytes}
    launch_write(_write_kernel, *arrays, slot_mapping, head_dim // 2, k_scale.shape[3], **tiles)


def paged_attention_int4(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads half_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads half_head_dim"],
    k_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    k_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    seq_lens: Int32[Array, " num_seqs"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Same contract as `reference.kv_cache.int4_cache.paged_attention_int4`.

    Grid, moves, limits: `fast.kv_cache._attention.attend_codes`. Fastest in groups of half a head or a whole one.
    """
    op = "paged_attention_int4"
    require_affine(op, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    arrays = q, k_cache, v_cache, (k_scale, v_scale), (k_zero, v_zero), block_table, seq_lens, cu_seqlens_q
    return attend_codes(op, *arrays, codes="int4", **options)
