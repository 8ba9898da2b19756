"""Batch-invariant paged attention, in Triton: a query's result has the same bits in any batch, for any chunking.

What a result's bits depend on is the order in which a row's keys are added up. Here that order is fixed by their
positions alone. Keys are cut into parts of ``SPLIT`` tokens, counted from the sequence's first; a part passes in tiles
of one size, from an empty state, on the same tensor core instruction whether the tile holds a decode's few rows or a
prompt's many; and the parts are merged one by one, the oldest first. A key that a row does not see changes no bit of
it: its weight is exactly 0 and the rescaling exactly 1. Who computes which part is then free, and is the schedule of
`fast/_triton/paging.py` with a part for a unit.

One kernel serves every format of a cache: a loader of `fast/attention/_formats.py` gives it keys and values. For KIVI,
a part's old keys pass first, from their codes, and then its young ones, from the window. A key may be old for one row
of a tile and young for another, so it may pass twice; each row sees it once, and the other time it is a key unseen.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor as Array

from fast._triton import merging, paging, softmax
from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import num_processors
from fast._triton.rounding import dot, to_dtype
from fast.attention._cached_tiles import LONGEST_WINDOW, PER_BATCH, require_paged
from fast.attention._formats import KEYS, VALUES, load_floats, strided
from fast.kv_cache.kivi_cache import quantized_before

SPLIT = 1024  # tokens in a part: a long sequence alone still gives every processor a few
MOST_SCRATCH = 2**28  # bytes of parts; where there could be more, there are sequences enough not to cut any


class Format(NamedTuple):
    """What the kernel is told of a cache's arrays."""

    load: Any  # the loader
    bits: int = 0  # of a code, where several are in a byte
    num_groups: int = 1  # of a head's numbers, each with a scale
    group_size: int = 1  # tokens of a group of KIVI's keys


class Window(NamedTuple):
    """KIVI's young tokens."""

    keys: Array  # [num_window_blocks, block_size, num_kv_heads, head_dim]
    values: Array
    block_table: Array
    length: int  # tokens


def invariant_tiles(group: int, head_dim: int, itemsize: int, coded: bool = False) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages): of the model alone, never of the batch, because they are part of the order.

    Fewer keys are in a tile of codes, because they pass through registers, as float32, on their way to a product.
    """
    rows = max(16 if itemsize == 4 else 64, triton.next_power_of_2(group))
    if itemsize == 4:
        return rows, 16 if coded else 32, 8 if coded else 4, 2
    return rows, 32 if head_dim > 128 or coded else 64, 4, 3


@triton.jit
def attend_span(
    q, acc, top, total, begin, end, first, last, origin, table, cache, kv_head, scale, logit_cap, dim,
    BOUNDED: tl.constexpr, CAPPED: tl.constexpr, LOAD: tl.constexpr, BITS: tl.constexpr, NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """Let the keys from ``begin`` to ``end`` pass a tile of queries, in tiles counted from the token ``origin``.

    Ids of blocks are loaded one tile ahead, so that the loads of keys never wait for them.

    Args:
        first, last: The keys that each query sees; the first only if BOUNDED.
        table: (the sequence's row of the block table, its stride, blocks in the cache, blocks in the row).
        cache: What LOAD loads from.
    """
    column = tl.arange(0, TILE_KV)
    start = tl.maximum(begin - origin, 0) // TILE_KV
    stop = (tl.maximum(end - origin, 0) + TILE_KV - 1) // TILE_KV
    ids = blocks_of(origin + start * TILE_KV + column, begin, end, table, BLOCK_SIZE)
    for tile in range(start, stop):
        keys = origin + tile * TILE_KV + column
        owned = ids >= 0
        block, offset = ids.to(tl.int64), (keys % BLOCK_SIZE).to(tl.int64)
        k, k_scale = LOAD(
            cache, KEYS, kv_head, block, offset, owned, dim, q.dtype, HEAD_DIM, BITS, NUM_GROUPS, GROUP_SIZE
        )
        scores = tl.zeros([q.shape[0], TILE_KV], tl.float32)
        for i in tl.static_range(len(k)):  # the smallest part first
            scores = dot(q, tl.trans(k[len(k) - 1 - i]), scores)
        if len(k_scale) > 0:
            scores = scores * k_scale[0][None, :]
        scale_log2 = scale * softmax.LOG2E
        if CAPPED:
            scores, scale_log2 = softmax.cap_scores(scores, scale, logit_cap), softmax.LOG2E
        seen = (keys[None, :] <= last[:, None]) & owned[None, :]
        if BOUNDED:
            seen = seen & (keys[None, :] >= first[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        top, total, rescale, weights = softmax.update(scores, top, total, scale_log2)

        v, v_scale = LOAD(
            cache, VALUES, kv_head, block, offset, owned, dim, q.dtype, HEAD_DIM, BITS, NUM_GROUPS, GROUP_SIZE
        )
        if len(v_scale) > 0:
            weights = weights * v_scale[0][None, :]
        acc = acc * rescale[:, None]
        weight = to_dtype(weights, v[0].dtype)
        if q.dtype == tl.float16 and v[0].dtype == tl.bfloat16:  # fewer bits than the result has
            acc = dot(to_dtype(weights - weight.to(tl.float32), tl.bfloat16), v[0], acc)
        for i in tl.static_range(len(v)):
            acc = dot(weight, v[len(v) - 1 - i], acc)
        ids = blocks_of(keys + TILE_KV, begin, end, table, BLOCK_SIZE)
    return acc, top, total


@triton.jit
def blocks_of(keys, begin, end, table, BLOCK_SIZE: tl.constexpr):
    """The block of each key from ``begin`` to ``end``; -1 for others, and for keys in no block of the cache."""
    row_ptr, stride_table_block, num_blocks, max_blocks_per_seq = table
    ids = paging.load_block_ids(row_ptr, stride_table_block, keys, end, num_blocks, max_blocks_per_seq, BLOCK_SIZE)
    return tl.where(keys >= begin, ids, -1)


@triton.jit
def merge_with_state(
    acc, top, total, has_older, is_last, state_ptr, state_stats_ptr, out_ptr, sinks_ptr, token, head, there, dim,
    stride_out_token, stride_out_head, stride_out_dim,
    HEAD_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Merge a part with the older ones of its segment, and keep the result, or store the rows after the last.

    What is merged so far lies in memory (in the L2 cache, that is), because registers do not hold it beside a part.
    """
    program = tl.program_id(0)
    row, place = tl.arange(0, TILE_Q), program.to(tl.int64) * 2
    offset = place * (TILE_Q * TILE_D) + row[:, None] * TILE_D + tl.arange(0, TILE_D)[None, :]
    stats_ptr = state_stats_ptr + place * (2 * TILE_Q) + row
    kept = there & (row < tl.where(has_older, TILE_Q, 0))
    older_acc = tl.load(state_ptr + offset, mask=kept[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    older_top = tl.load(stats_ptr, mask=kept, other=float("-inf"))
    older_total = tl.load(stats_ptr + TILE_Q, mask=kept, other=0.0)
    tl.debug_barrier()  # what these threads load, others may store
    acc, top, total = merging.merge(older_acc, older_top, older_total, acc, top, total)
    if is_last:
        merging.store_rows(
            acc, top, total, out_ptr, sinks_ptr, token, head, there, dim,
            stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM,
        )  # fmt: skip
    else:
        merging.store_part(
            acc, top, total, row, dim, program * 2, state_ptr, state_stats_ptr, there, dim, HEAD_DIM, TILE_Q, TILE_D
        )
    tl.debug_barrier()  # and the other way round


@triton.jit(do_not_specialize=[*PER_BATCH, "stride_window_table_seq", "num_window_blocks", "window_length"])
def invariant_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    cache,  # the format's arrays and their strides
    window_cache,  # KIVI: keys and values of the window, likewise; or None
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    window_table_ptr,  # likewise, or None
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr,  # [num_parts, num_tokens, num_heads, head_dim], sums of values; or None, and no segment is cut
    stats_ptr,  # [num_parts, num_tokens, num_heads, 2], top and total
    counters_ptr,  # [num_programs]
    state_ptr,  # the scratch of merging.py: parts merged so far, of a segment that is its program's alone
    state_stats_ptr,
    scale,
    logit_cap,
    window,
    window_length,  # KIVI's; `window` slides
    stride_q_token,
    stride_q_head,
    stride_q_dim,
    stride_table_seq,
    stride_table_block,
    stride_window_table_seq,
    stride_window_table_block,
    stride_out_token,
    stride_out_head,
    stride_out_dim,
    num_tokens,
    num_seqs,
    num_kv_heads,
    num_blocks,
    num_window_blocks,
    max_blocks_per_seq,
    CUT: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    LOAD: tl.constexpr,
    BITS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
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
    merging.store_rows_without_keys(
        tl.program_id(0), tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity,
        num_kv_heads * GROUP, dim, out_ptr, stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, QUERIES,
    )  # fmt: skip
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
                row = token * (num_kv_heads * GROUP) + head
                num_rows = num_tokens.to(tl.int64) * (num_kv_heads * GROUP)
                stored = there[:, None] & (dim < HEAD_DIM)[None, :]
                q_rows = q_ptr + token * stride_q_token + head * stride_q_head
                q = tl.load(q_rows[:, None] + dim[None, :] * stride_q_dim, mask=stored, other=0.0)
                if WIDE:
                    q = q.to(tl.float32)

                last_key = context + query  # that a row sees
                first_key = tl.zeros([TILE_Q], tl.int32)
                key_end = context + tl.minimum((tile + 1) * QUERIES, num_queries)  # of all rows
                oldest = paging.oldest_key(context + tile * QUERIES, window, WINDOWED)
                if WINDOWED:
                    first_key = last_key + 1 - window
                table_row = block_table_ptr + seq.to(tl.int64) * stride_table_seq
                table = (table_row, stride_table_block, num_blocks, max_blocks_per_seq)

                for part in range(first, stop):
                    origin, part_end = part * SPLIT, tl.minimum(key_end, (part + 1) * SPLIT)
                    part_top, part_total = softmax.empty(TILE_Q)
                    part_acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
                    if window_cache is None:
                        part_acc, part_top, part_total = attend_span(
                            q, part_acc, part_top, part_total, oldest, part_end, first_key, last_key, origin,
                            table, cache, kv_head, scale, logit_cap, dim,
                            WINDOWED, CAPPED, LOAD, BITS, NUM_GROUPS, GROUP_SIZE, BLOCK_SIZE, HEAD_DIM, TILE_KV,
                        )  # fmt: skip
                    else:
                        young = quantized_before(last_key, window_length, GROUP_SIZE)  # the first key, for each row
                        youngest = quantized_before(key_end - 1, window_length, GROUP_SIZE)  # of these: of the last row
                        eldest = quantized_before(context + tile * QUERIES, window_length, GROUP_SIZE)
                        part_acc, part_top, part_total = attend_span(
                            q, part_acc, part_top, part_total, oldest, tl.minimum(part_end, youngest),
                            first_key, young - 1, origin, table, cache, kv_head, scale, logit_cap, dim,
                            WINDOWED, CAPPED, LOAD, BITS, NUM_GROUPS, GROUP_SIZE, BLOCK_SIZE, HEAD_DIM, TILE_KV,
                        )  # fmt: skip
                        window_row = window_table_ptr + seq.to(tl.int64) * stride_window_table_seq
                        part_acc, part_top, part_total = attend_span(
                            q, part_acc, part_top, part_total, tl.maximum(oldest, eldest), part_end,
                            tl.maximum(first_key, young), last_key, origin,
                            (window_row, stride_window_table_block, num_window_blocks, max_blocks_per_seq),
                            window_cache, kv_head, scale, logit_cap, dim,
                            True, CAPPED, load_floats, BITS, NUM_GROUPS, GROUP_SIZE, BLOCK_SIZE, HEAD_DIM, TILE_KV,
                        )  # fmt: skip
                    if CUT and not alone:
                        place = part * num_rows + row
                        tl.store(parts_ptr + place[:, None] * HEAD_DIM + dim[None, :], part_acc, mask=stored)
                        tl.store(stats_ptr + place * 2, part_top, mask=there)
                        tl.store(stats_ptr + place * 2 + 1, part_total, mask=there)
                    else:
                        merge_with_state(
                            part_acc, part_top, part_total, part > first, part + 1 == stop, state_ptr, state_stats_ptr,
                            out_ptr, sinks_ptr, token, head, there, dim,
                            stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, TILE_Q, TILE_D,
                        )  # fmt: skip

                is_last = False
                if CUT and not alone:
                    is_last = merging.is_last(seg_begin, seg_end, line, num_workers, counters_ptr)
                if is_last:
                    top, total = softmax.empty(TILE_Q)
                    acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
                    for part in range(first_part, first_part + seg_end - seg_begin):
                        place = part * num_rows + row
                        part_acc = tl.load(
                            parts_ptr + place[:, None] * HEAD_DIM + dim[None, :], mask=stored, other=0.0,
                            cache_modifier=".cg",
                        )  # fmt: skip
                        part_top = tl.load(stats_ptr + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
                        part_total = tl.load(stats_ptr + place * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
                        acc, top, total = merging.merge(acc, top, total, part_acc, part_top, part_total)
                    merging.store_rows(
                        acc, top, total, out_ptr, sinks_ptr, token, head, there, dim,
                        stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM,
                    )  # fmt: skip
            unit = tl.minimum(following, end)


def attend_invariantly(
    q: Array,
    arrays: tuple[Array, ...],
    format: Format,
    block_table: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    sinks: Array | None = None,
    logit_cap: float | None = None,
    out: Array | None = None,
    young: Window | None = None,
) -> Array:
    """Launch the kernel, all arguments checked. Keys are the first of ``arrays``."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if len(q) == 0:
        return out
    q, scale = softmax.positive_scale(q, scale)
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads = arrays[0].shape[:3]
    num_seqs, max_blocks_per_seq = block_table.shape
    floats = arrays[:2] if format.load is load_floats else () if young is None else young[:2]
    wide = q.dtype == torch.float32 or any(array.dtype != q.dtype for array in floats)
    coded = format.load is not load_floats
    group = num_heads // num_kv_heads
    tile_q, tile_kv, num_warps, num_stages = invariant_tiles(group, head_dim, 4 if wide else 2, coded)
    num_programs = num_processors(q) * 2
    num_parts = max(1, triton.cdiv(max_blocks_per_seq * block_size, SPLIT))
    cut = num_parts > 1 and num_parts * q.numel() * 4 <= MOST_SCRATCH
    parts = torch.empty(num_parts * q.numel() if cut else 0, dtype=torch.float32, device=q.device)
    stats = torch.empty(num_parts * num_tokens * num_heads * 2 if cut else 0, dtype=torch.float32, device=q.device)
    tile_d = max(16, triton.next_power_of_2(head_dim))
    scratch = merging.make_scratch(q, num_programs, tile_q, tile_d)
    window_table = None if young is None else young.block_table
    invariant_attention_kernel[(num_programs,)](
        q, tuple(strided(array) for array in arrays),
        None if young is None else (strided(young.keys), strided(young.values)),
        block_table, window_table, seq_lens, cu_seqlens_q, sinks, out, parts, stats,
        scratch.counters, scratch.parts, scratch.stats,
        scale, logit_cap or 0.0, min(sliding_window or 0, LONGEST_WINDOW),
        0 if young is None else min(young.length, LONGEST_WINDOW),
        *q.stride(), *block_table.stride(), *(block_table if window_table is None else window_table).stride(),
        *out.stride(), num_tokens, num_seqs, num_kv_heads, num_blocks, 0 if young is None else len(young.keys),
        max_blocks_per_seq,
        CUT=cut, WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None, WIDE=wide, LOAD=format.load,
        BITS=format.bits, NUM_GROUPS=format.num_groups, GROUP_SIZE=format.group_size, GROUP=group, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, SPLIT=SPLIT, TILE_Q=tile_q, TILE_KV=tile_kv,
        TILE_D=tile_d, num_warps=num_warps, num_stages=num_stages, **overlapped(q),
    )  # fmt: skip
    return out


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
    Moves: as ``paged_attention``; of a tile of rows with several parts, every part out to the L2 cache and back.
    Limits: a block size or strides of another kind may compile to other bits; a batch of another kind does not.
    """
    tables = block_table, seq_lens, cu_seqlens_q
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    options["scale"] = require_paged("paged_attention", q, k_cache, v_cache, *tables, **options)
    return attend_invariantly(q, (k_cache, v_cache), Format(load_floats), *tables, **options)
