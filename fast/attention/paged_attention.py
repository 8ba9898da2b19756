"""paged_attention, in Triton. What the technique is for: `reference/attention/paged_attention.py`.

One kernel serves decodes, chunks of prompts and any mix of them. A tile of its rows is one KV head's group of query
heads times as many queries as fit; the tile's size is chosen by shape, so that decodes run on 16 rows and chunks on
128. How the work is shared out, and how a sequence that several programs took is put together, all in one launch:
`fast/_triton/paging.py` and `merging.py`. On a Hopper GPU, where the layout and the options allow it, chunks have a
kernel of their own, `paged_attention_hopper.py`, and so have decodes, by themselves or among chunks,
`paged_decode_hopper.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor as Array

from fast._checks import require
from fast._triton import merging, paging, softmax
from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import is_hopper, num_processors
from fast.attention._cached_tiles import (
    LONGEST_WINDOW,
    PER_BATCH,
    attend_cached_tiles,
    load_queries,
    require_paged,
    tile_ids,
)
from fast.attention.invariant_attention import paged_attention_invariant as paged_attention_invariant
from fast.attention.paged_attention_hopper import attend_chunks_on_hopper, hopper_fits
from fast.attention.paged_decode_hopper import MOST_ROWS, attend_decodes_on_hopper

FEWEST_UNITS = 4  # that a program takes where there is work for all: shorter shares cost more to merge than they save


class Tiles(NamedTuple):
    """How a launch cuts its work."""

    tile_q: int  # rows: queries times the heads of a group
    tile_kv: int
    num_warps: int
    num_stages: int
    programs_per_processor: int


def choose_tiles(num_tokens: int, num_seqs: int, group: int, head_dim: int, itemsize: int) -> Tiles:
    """Tiles by the mean number of rows of a sequence, known from shapes alone: few for decodes, many for chunks."""
    rows = max(-(-num_tokens // num_seqs) * group, triton.next_power_of_2(group), 16)
    wide = head_dim > 128
    if itemsize == 4:  # no tensor cores: what counts is that nothing spills
        return Tiles(max(16 if rows <= 16 else 32, triton.next_power_of_2(group)), 16 if wide else 32, 4, 2, 2)
    if rows <= 64:
        return Tiles(triton.next_power_of_2(rows), 32 if wide else 64, 4, 3, 2)
    return Tiles(max(128, triton.next_power_of_2(group)), 32 if wide else 64, 8, 3, 1)


def decodes_on_hopper(tile_q: int, q: Array, k_cache: Array, v_cache: Array, block_table: Array) -> bool:
    """Whether tiles of so many rows are for the kernel whose loads never stop; it knows neither windows nor caps."""
    return tile_q <= MOST_ROWS and is_hopper(q) and hopper_fits(q, k_cache, v_cache, block_table)


@triton.jit(do_not_specialize=PER_BATCH)
def paged_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr,  # the scratch of merging.py
    stats_ptr,
    counters_ptr,
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
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TILE_D: tl.constexpr,
    FEWEST: tl.constexpr,
    FEW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    QUERIES: tl.constexpr = TILE_Q // GROUP
    program = tl.program_id(0)
    wait_for_predecessor(OVERLAP)
    capacity = max_blocks_per_seq * BLOCK_SIZE
    line, num_workers, begin, end, seq, seq_begin = paging.find_share(
        program, tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads,
        window, QUERIES, TILE_KV, WINDOWED, FEWEST, FEW,
    )  # fmt: skip
    cache = (
        k_cache_ptr, stride_k_block, stride_k_token, stride_k_head, stride_k_dim,
        v_cache_ptr, stride_v_block, stride_v_token, stride_v_head, stride_v_dim,
    )  # fmt: skip
    options = (scale, logit_cap, window)
    dim = tl.arange(0, TILE_D)
    merging.store_rows_without_keys(
        program, tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity,
        num_kv_heads * GROUP, dim, out_ptr, stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, QUERIES,
    )  # fmt: skip
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED, FEW)
        if unit >= seq_begin + per_head * num_kv_heads:
            seq_begin += per_head * num_kv_heads
            seq += 1
        else:
            kv_head, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED
            )
            if unit < seg_end:
                query, token, head, there = paging.rows_of_tile(tile, kv_head, first_row, num_queries, GROUP, TILE_Q)
                context = seq_len - num_queries
                positions = query + context
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                span = (0, paging.oldest_key(context + tile * QUERIES, window, WINDOWED), last_key)
                start = first_tile + unit - seg_begin
                stop = first_tile + tl.minimum(end, seg_end) - seg_begin
                row_ptr = block_table_ptr + seq.to(tl.int64) * stride_table_seq
                table = (row_ptr, stride_table_block, num_blocks, max_blocks_per_seq)
                ids = tile_ids(span, start, table, BLOCK_SIZE, TILE_KV)
                q = load_queries(
                    q_ptr, token, head, there, stride_q_token, stride_q_head, stride_q_dim, WIDE, HEAD_DIM, TILE_D
                )
                top, total = softmax.empty(TILE_Q)
                acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
                if TILE_Q >= 64:  # arithmetic counts: tiles that every query sees pass without a mask
                    whole = tl.minimum(tl.maximum((context + tile * QUERIES + 1) // TILE_KV, start), stop)
                    if WINDOWED:
                        seen_by_all = paging.oldest_key(last_key - 1, window, WINDOWED)
                        cut = tl.minimum(tl.maximum((seen_by_all + TILE_KV - 1) // TILE_KV, start), whole)
                        acc, top, total = attend_cached_tiles(
                            q, ids, acc, top, total, positions, span, start, cut, table, cache, kv_head, options,
                            True, WINDOWED, CAPPED, WIDE, BLOCK_SIZE, HEAD_DIM, TILE_KV, TILE_D,
                        )  # fmt: skip
                        start = cut
                        ids = tile_ids(span, start, table, BLOCK_SIZE, TILE_KV)
                    acc, top, total = attend_cached_tiles(
                        q, ids, acc, top, total, positions, span, start, whole, table, cache, kv_head, options,
                        False, WINDOWED, CAPPED, WIDE, BLOCK_SIZE, HEAD_DIM, TILE_KV, TILE_D,
                    )  # fmt: skip
                    start = whole
                    ids = tile_ids(span, start, table, BLOCK_SIZE, TILE_KV)
                acc, top, total = attend_cached_tiles(
                    q, ids, acc, top, total, positions, span, start, stop, table, cache, kv_head, options,
                    True, WINDOWED, CAPPED, WIDE, BLOCK_SIZE, HEAD_DIM, TILE_KV, TILE_D,
                )  # fmt: skip
                merging.finish_segment(
                    acc, top, total, seg_begin, seg_end, begin, end, line, num_workers, program, parts_ptr,
                    stats_ptr, counters_ptr, out_ptr, sinks_ptr, token, head, there, dim,
                    stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, TILE_Q, TILE_D,
                )  # fmt: skip
            unit = tl.minimum(following, end)


def paged_attention(
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
    """Same contract as `reference.attention.paged_attention.paged_attention`.

    Grid: ``programs_per_processor`` programs for each processor, whatever the batch. A program owns an equal share of
    all (tile of rows, KV head, tile of keys) of the batch, found from the lengths on the device, and the last of the
    programs that share a tile of rows merges its parts and owns it in ``out``. On a Hopper GPU chunks have a
    launch of their own, before the decodes among them: a program for 128 queries of a head, or for a part of their keys
    where such tiles are few.
    Moves: each sequence's keys and values once for each of its tiles of rows (a decode has one); queries and result
    once; at most two parts a program, in float32, out to the L2 cache and back.
    Limits: float32, float16 or bfloat16, and where q and the caches differ, or for float32, products without tensor
    cores. Launches with the same stream (or graphs captured on it) must not overlap.
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
    itemsize = 4 if wide else q.element_size()
    tiles = choose_tiles(num_tokens, num_seqs, group, head_dim, itemsize)
    plain = sliding_window is None and logit_cap is None and out.stride(2) == 1
    chunks_apart = tiles.tile_q >= 64 and plain and is_hopper(q) and hopper_fits(q, k_cache, v_cache, block_table)
    if chunks_apart and num_seqs == 1:  # no decode is left for this kernel
        attend_chunks_on_hopper(q, k_cache, v_cache, *tables, scale, sinks, out)
        return out
    if chunks_apart:  # and the decodes among them here
        tiles = choose_tiles(num_seqs, num_seqs, group, head_dim, itemsize)
        attend_chunks_on_hopper(q, k_cache, v_cache, *tables, scale, sinks, out, tiles.tile_q // group)
    if plain and decodes_on_hopper(tiles.tile_q, q, k_cache, v_cache, block_table):
        attend_decodes_on_hopper(q, k_cache, v_cache, *tables, scale, sinks, out, tiles.tile_q, chunks_apart)
        return out
    tile_d = max(16, triton.next_power_of_2(head_dim))
    num_programs = num_processors(q) * tiles.programs_per_processor
    scratch = merging.make_scratch(q, num_programs, tiles.tile_q, tile_d)
    paged_attention_kernel[(num_programs,)](
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, sinks, out, *scratch,
        scale, logit_cap or 0.0, min(sliding_window or 0, LONGEST_WINDOW),
        *q.stride(), *k_cache.stride(), *v_cache.stride(), *block_table.stride(), *out.stride(),
        num_tokens, num_seqs, num_kv_heads, num_blocks, max_blocks_per_seq,
        WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None, WIDE=wide, GROUP=group,
        HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE_Q=tiles.tile_q, TILE_KV=tiles.tile_kv, TILE_D=tile_d,
        FEWEST=FEWEST_UNITS, FEW=chunks_apart, num_warps=tiles.num_warps, num_stages=tiles.num_stages, **overlapped(q),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=PER_BATCH)
def split_paged_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    out_parts_ptr,  # [num_parts, num_tokens, num_heads, head_dim]
    lse_parts_ptr,  # [num_parts, num_tokens, num_heads]
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
    num_tokens,
    num_seqs,
    num_heads,
    num_blocks,
    max_blocks_per_seq,
    split_size,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TILE_D: tl.constexpr,
):
    QUERIES: tl.constexpr = TILE_Q // GROUP
    kv_head, part = tl.program_id(0), tl.program_id(2).to(tl.int64)
    seq, tile = paging.find_tile(tl.program_id(1), cu_seqlens_q_ptr, num_seqs, QUERIES)
    capacity = max_blocks_per_seq * BLOCK_SIZE
    first_row, num_queries, seq_len = paging.sequence(
        seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity
    )
    if tile * QUERIES >= num_queries:
        return
    query, token, head, there = paging.rows_of_tile(tile, kv_head, first_row, num_queries, GROUP, TILE_Q)
    context = seq_len - num_queries
    origin = (part * split_size).to(tl.int32)
    end = tl.minimum(context + tl.minimum((tile + 1) * QUERIES, num_queries), origin + split_size)
    oldest = paging.oldest_key(context + tile * QUERIES, window, WINDOWED)
    span = (origin, oldest, end)
    start = tl.maximum(oldest - origin, 0) // TILE_KV
    stop = (tl.maximum(end - origin, 0) + TILE_KV - 1) // TILE_KV
    row_ptr = block_table_ptr + seq.to(tl.int64) * stride_table_seq
    table = (row_ptr, stride_table_block, num_blocks, max_blocks_per_seq)
    ids = tile_ids(span, start, table, BLOCK_SIZE, TILE_KV)
    q = load_queries(q_ptr, token, head, there, stride_q_token, stride_q_head, stride_q_dim, WIDE, HEAD_DIM, TILE_D)
    top, total = softmax.empty(TILE_Q)
    acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
    acc, top, total = attend_cached_tiles(
        q, ids, acc, top, total, query + context, span, start, stop, table,
        (k_cache_ptr, stride_k_block, stride_k_token, stride_k_head, stride_k_dim,
         v_cache_ptr, stride_v_block, stride_v_token, stride_v_head, stride_v_dim),
        kv_head, (scale, logit_cap, window),
        True, WINDOWED, CAPPED, WIDE, BLOCK_SIZE, HEAD_DIM, TILE_KV, TILE_D,
    )  # fmt: skip
    factor, lse = softmax.finish(top, total)
    row = (part * num_tokens + token) * num_heads + head
    dim = tl.arange(0, TILE_D)
    in_tile = there[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(out_parts_ptr + row[:, None] * HEAD_DIM + dim[None, :], acc * factor[:, None], mask=in_tile)
    tl.store(lse_parts_ptr + row, lse, mask=there)


def split_paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    seq_lens: Int32[Array, " num_seqs"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    *,
    split_size: int,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
) -> tuple[Float[Array, "num_parts num_tokens num_heads head_dim"], Float[Array, "num_parts num_tokens num_heads"]]:
    """Same contract as `reference.attention.paged_attention.split_paged_attention`.

    Grid: a program for each KV head, tile of rows and part; it owns these rows of the part.
    Moves: each sequence's keys and values once for each of its tiles of rows, queries once a part, and all parts,
    which is more than the keys unless ``split_size`` is far above the number of heads that share a KV head.
    Limits: as ``paged_attention``, which keeps its parts in the L2 cache and merges them itself.
    """
    op = "split_paged_attention"
    options = {"scale": scale, "sliding_window": sliding_window, "logit_cap": logit_cap}
    scale = require_paged(op, q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options)
    require(split_size >= 1, op, "split_size", "at least 1", split_size)
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    num_parts = max(1, triton.cdiv(max_blocks_per_seq * block_size, split_size))
    out_parts = torch.empty((num_parts, *q.shape), dtype=torch.float32, device=q.device)
    lse_parts = torch.empty((num_parts, num_tokens, num_heads), dtype=torch.float32, device=q.device)
    if num_tokens == 0:
        return out_parts, lse_parts
    q, scale = softmax.positive_scale(q, scale)
    wide = not q.dtype == k_cache.dtype == v_cache.dtype
    group = num_heads // num_kv_heads
    tiles = choose_tiles(num_tokens, num_seqs, group, head_dim, 4 if wide else q.element_size())
    num_tiles = num_tokens // (tiles.tile_q // group) + num_seqs
    split_paged_attention_kernel[(num_kv_heads, num_tiles, num_parts)](
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, out_parts, lse_parts,
        scale, logit_cap or 0.0, min(sliding_window or 0, LONGEST_WINDOW),
        *q.stride(), *k_cache.stride(), *v_cache.stride(), *block_table.stride(),
        num_tokens, num_seqs, num_heads, num_blocks, max_blocks_per_seq, split_size,
        WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None, WIDE=wide, GROUP=group,
        HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE_Q=tiles.tile_q, TILE_KV=tiles.tile_kv,
        TILE_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out_parts, lse_parts
