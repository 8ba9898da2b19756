"""Batch-invariant paged attention, in Triton: a query's result has the same bits in any batch, for any chunking.

What a result's bits depend on is the order in which a row's keys are added up. Here that order is fixed by their
positions alone. Keys are cut into parts of ``SPLIT`` tokens, counted from the sequence's first; a part passes in tiles
of one size, from an empty state, on the same tensor core instruction whether the tile holds a decode's few rows or a
prompt's many; and the parts are merged one by one, the oldest first. A key that a row does not see changes no bit of
it: its weight is exactly 0 and the rescaling exactly 1. Who computes which part is then free, and is the schedule of
`fast/_triton/paging.py` with a part for a unit.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor as Array

from fast._triton import paging, softmax
from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import num_processors
from fast.attention._cached_tiles import (
    LONGEST_WINDOW,
    PER_BATCH,
    attend_cached_tiles,
    load_queries,
    require_paged,
    tile_ids,
)

SPLIT = 1024  # tokens in a part: a long sequence alone still gives every processor a few
MOST_SCRATCH = 2**28  # bytes of parts; where there could be more, there are sequences enough not to cut any


def invariant_tiles(group: int, head_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages): of the model alone, never of the batch, because they are part of the order."""
    rows = 16 if itemsize == 4 else 64
    keys = 32 if itemsize == 4 or head_dim > 128 else 64
    return max(rows, triton.next_power_of_2(group)), keys, 4, 2 if itemsize == 4 else 3


@triton.jit(do_not_specialize=PER_BATCH)
def invariant_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr,  # [num_parts, num_tokens, num_heads, head_dim], sums of values; or None, and no segment is cut
    stats_ptr,  # [num_parts, num_tokens, num_heads, 2], top and total
    counters_ptr,  # [num_programs]
    scale,
    logit_cap,
    window,
    stride_q_token,
    stride_q_head,
    stride_q_dim,
    stride_k_block,
    stride_k_token,
    stride_k_head,
    stride_k_dim,
    stride_v_block,
    stride_v_token,
    stride_v_head,
    stride_v_dim,
    stride_table_seq,
    stride_table_block,
    stride_out_token,
    stride_out_head,
    stride_out_dim,
    num_tokens,
    num_seqs,
    num_kv_heads,
    num_blocks,
    max_blocks_per_seq,
    CUT: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TILE_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_predecessor(OVERLAP)
    QUERIES: tl.constexpr = TILE_Q // GROUP
    capacity = max_blocks_per_seq * BLOCK_SIZE
    line, num_workers, begin, end, seq, seq_begin = paging.find_share(
        tl.program_id(0), tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity,
        num_kv_heads, window, QUERIES, SPLIT, WINDOWED, 1,
    )  # fmt: skip
    dim = tl.arange(0, TILE_D)
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, window, QUERIES, SPLIT, WINDOWED)
        if unit >= seq_begin + per_head * num_kv_heads:
            seq_begin += per_head * num_kv_heads
            seq += 1
        else:
            kv_head, tile, first_part, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, window, QUERIES, SPLIT, WINDOWED
            )
            first, stop = first_part + unit - seg_begin, first_part + tl.minimum(end, seg_end) - seg_begin
            if not CUT:  # a segment is all its first program's
                first, stop = first_part, first_part + tl.where(seg_begin >= begin, seg_end - seg_begin, 0)
            alone = (seg_begin >= begin) & (seg_end <= end)
            if first < stop:
                query, token, head, there = paging.rows_of_tile(tile, kv_head, first_row, num_queries, GROUP, TILE_Q)
                context = seq_len - num_queries
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                oldest = 0
                if WINDOWED:
                    oldest = tl.maximum(context + tile * QUERIES + 1 - window, 0)
                row = token * (num_kv_heads * GROUP) + head
                num_rows = num_tokens.to(tl.int64) * (num_kv_heads * GROUP)
                stored = there[:, None] & (dim < HEAD_DIM)[None, :]

                row_ptr = block_table_ptr + seq.to(tl.int64) * stride_table_seq
                table = (row_ptr, stride_table_block, num_blocks, max_blocks_per_seq)
                q = load_queries(
                    q_ptr, token, head, there, stride_q_token, stride_q_head, stride_q_dim, WIDE, HEAD_DIM, TILE_D
                )
                top, total = softmax.empty(TILE_Q)
                acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
                for part in range(first, stop):
                    origin, part_end = part * SPLIT, tl.minimum(last_key, (part + 1) * SPLIT)
                    start = tl.maximum(oldest - origin, 0) // TILE_KV
                    end_tile = (tl.maximum(part_end - origin, 0) + TILE_KV - 1) // TILE_KV
                    ids = tile_ids(origin, start, part_end, table, BLOCK_SIZE, TILE_KV)
                    part_top, part_total = softmax.empty(TILE_Q)
                    part_acc, part_top, part_total = attend_cached_tiles(
                        q, ids, tl.zeros([TILE_Q, TILE_D], tl.float32), part_top, part_total, query + context,
                        origin, start, end_tile, part_end, table,
                        (k_cache_ptr, stride_k_block, stride_k_token, stride_k_head, stride_k_dim,
                         v_cache_ptr, stride_v_block, stride_v_token, stride_v_head, stride_v_dim),
                        kv_head, (scale, logit_cap, window),
                        True, WINDOWED, CAPPED, WIDE, BLOCK_SIZE, HEAD_DIM, TILE_KV, TILE_D,
                    )  # fmt: skip
                    if CUT and not alone:
                        place = part * num_rows + row
                        tl.store(parts_ptr + place[:, None] * HEAD_DIM + dim[None, :], part_acc, mask=stored)
                        tl.store(stats_ptr + place * 2, part_top, mask=there)
                        tl.store(stats_ptr + place * 2 + 1, part_total, mask=there)
                    else:
                        acc, top, total = paging.merge(acc, top, total, part_acc, part_top, part_total)

                last = True
                if CUT and not alone:
                    last = paging.is_last(seg_begin, seg_end, line, num_workers, counters_ptr)
                    if last:
                        for part in range(first_part, first_part + seg_end - seg_begin):
                            place = part * num_rows + row
                            part_acc = tl.load(
                                parts_ptr + place[:, None] * HEAD_DIM + dim[None, :], mask=stored, other=0.0,
                                cache_modifier=".cg",
                            )  # fmt: skip
                            part_top = tl.load(
                                stats_ptr + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg"
                            )
                            part_total = tl.load(stats_ptr + place * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
                            acc, top, total = paging.merge(acc, top, total, part_acc, part_top, part_total)
                if last:
                    paging.store_rows(
                        acc, top, total, out_ptr, sinks_ptr, token, head, there, dim,
                        stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM,
                    )  # fmt: skip
            unit = tl.minimum(following, end)


def paged_attention_invariant(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
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
    """Same contract as `reference.attention.paged_attention.paged_attention`; of each query the same bits always.

    Grid: as ``paged_attention``, with parts of ``SPLIT`` tokens shared out, not tiles.
    Moves: as ``paged_attention``; of a tile of rows that several programs share, every part out and back.
    Limits: a block size or strides of another kind may compile to other bits; a batch of another kind does not.
    """
    op = "paged_attention"
    tables = block_table, seq_lens, cu_seqlens_q
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    scale = require_paged(op, q, k_cache, v_cache, *tables, **options)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if len(q) == 0:
        return out
    q, scale = softmax.positive_scale(q, scale)
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    wide = not q.dtype == k_cache.dtype == v_cache.dtype
    group = num_heads // num_kv_heads
    tile_q, tile_kv, num_warps, num_stages = invariant_tiles(group, head_dim, 4 if wide else q.element_size())
    num_programs = num_processors(q) * 2
    num_parts = max(1, triton.cdiv(max_blocks_per_seq * block_size, SPLIT))
    cut = num_parts > 1 and num_parts * q.numel() * 4 <= MOST_SCRATCH
    parts = torch.empty(num_parts * q.numel() if cut else 0, dtype=torch.float32, device=q.device)
    stats = torch.empty(num_parts * num_tokens * num_heads * 2 if cut else 0, dtype=torch.float32, device=q.device)
    invariant_attention_kernel[(num_programs,)](
        q, k_cache, v_cache, *tables, sinks, out, parts, stats, paging.zero_counters(q, num_programs),
        scale, logit_cap or 0.0, min(sliding_window or 0, LONGEST_WINDOW),
        *q.stride(), *k_cache.stride(), *v_cache.stride(), *block_table.stride(), *out.stride(),
        num_tokens, num_seqs, num_kv_heads, num_blocks, max_blocks_per_seq,
        CUT=cut, WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None, WIDE=wide, GROUP=group,
        HEAD_DIM=head_dim, BLOCK_SIZE=block_size, SPLIT=SPLIT, TILE_Q=tile_q, TILE_KV=tile_kv,
        TILE_D=max(16, triton.next_power_of_2(head_dim)), num_warps=num_warps, num_stages=num_stages,
        **overlapped(q),
    )  # fmt: skip
    return out
