"""What int8 and fp8 caches write alike: codes, and one scale for each token and head."""

import torch
import triton
import triton.language as tl

from fast._checks import require_shape
from fast._triton.rounding import to_dtype
from fast.kv_cache._codes import (
    TILE_NUMBERS,
    launch_write,
    locate_rows,
    require_symmetric,
    require_tokens,
    rint,
    symmetric_ratios,
)


@triton.jit
def _write_kernel(
    k_ptr,  # [num_tokens, num_kv_heads, head_dim]
    v_ptr,
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, block_size, num_kv_heads]
    v_scale_ptr,
    slot_mapping_ptr,  # [num_tokens]
    slot_mapping_stride,
    x_stride_token,
    x_stride_head,
    x_stride_dim,
    cache_stride_block,
    cache_stride_slot,
    cache_stride_head,
    cache_stride_dim,
    scale_stride_block,
    scale_stride_slot,
    scale_stride_head,
    num_rows,
    num_slots,
    block_size,
    num_kv_heads,
    head_dim,
    LARGEST_CODE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_D: tl.constexpr,
):
    if tl.program_id(1) == 0:
        x_ptr, cache_ptr, scale_ptr = k_ptr, k_cache_ptr, k_scale_ptr
    else:
        x_ptr, cache_ptr, scale_ptr = v_ptr, v_cache_ptr, v_scale_ptr
    token, head, has_slot, block, offset = locate_rows(
        slot_mapping_ptr, slot_mapping_stride, num_rows, num_slots, block_size, num_kv_heads, TILE_ROWS
    )
    dim = tl.arange(0, TILE_D)
    in_tile = has_slot[:, None] & (dim < head_dim)[None, :]

    x_row = token * x_stride_token + head * x_stride_head
    x = tl.load(x_ptr + x_row[:, None] + dim * x_stride_dim, mask=in_tile, other=0.0).to(tl.float32)
    ratios, scale = symmetric_ratios(x, LARGEST_CODE)
    if cache_ptr.dtype.element_ty == tl.int8:
        codes = rint(ratios).to(tl.int8)
    else:
        codes = to_dtype(ratios, cache_ptr.dtype.element_ty)
    cache_row = block * cache_stride_block + offset * cache_stride_slot + head * cache_stride_head
    tl.store(cache_ptr + cache_row[:, None] + dim * cache_stride_dim, codes, mask=in_tile)
    scale_row = block * scale_stride_block + offset * scale_stride_slot + head * scale_stride_head
    tl.store(scale_ptr + scale_row, scale, mask=has_slot)


def write_symmetric(
    op: str,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    codes: torch.dtype,
    largest_code: float,
) -> None:
    """Quantize new tokens and put codes and scales into their slots.

    Grid: a program per few rows of (token, head) of the keys or of the values; it owns their slots in cache and scales.
    Moves: k and v once, codes and scales once.
    """
    require_symmetric(op, k_cache, v_cache, k_scale, v_scale, codes=codes)
    require_shape(op, "k", k, (None, *k_cache.shape[2:]))
    require_tokens(op, k, v, slot_mapping, k_cache)
    if k.numel() == 0 or k_cache.numel() == 0:
        return
    head_dim = k.shape[2]
    tile_d = triton.next_power_of_2(head_dim)
    arrays = (k, k_cache, k_scale), (v, v_cache, v_scale)
    tiles = {"TILE_ROWS": max(1, TILE_NUMBERS // tile_d), "TILE_D": tile_d}
    launch_write(_write_kernel, *arrays, slot_mapping, head_dim, LARGEST_CODE=largest_code, **tiles)
