"""Decodes over a paged cache on a Hopper GPU, in Gluon: the schedule of `paging.py`, its loads always under way.

A producer warp goes through its program's share and has the copy engine (TMA) fill a ring of tiles of keys and values,
block by block, on from one segment or sequence to the next: it waits for nothing but a free place. Four warps take
what arrives, each 16 keys of a tile for the scores, then a quarter of the columns for the sums of values. How parts of
a segment are put together is told in `merging.py`.

Lengths and block tables are read before the kernels before this one have ended, keys, values and queries after: to
find a share of the work takes two trips to memory, which then cost nothing. (See `overlap.py`.) The next kernel is not
asked for early: its programs would crowd where a share ends first.

What it does not do: windows, caps, float32, head sizes other than 64 and 128, more than `MOST_ROWS` rows a tile, and
blocks whose size or layout the copy engine cannot take (`paged_attention_hopper.hopper_fits`). `paged_attention.py`
does all that.
"""

from typing import NamedTuple

import torch
from torch import Tensor as Array
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fast._triton import merging, paging
from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import num_processors
from fast.attention.paged_attention_hopper import describe_cache

MOST_ROWS = 32  # of queries and heads in a tile: more, and the registers do not hold them
TILE_KV = 64
CONSUMERS = 4  # warps
PRODUCER_REGISTERS = gl.constexpr(56)  # of a thread; the consumers get what is left
FEWEST_UNITS = 4  # that a program takes where there is work for all: shorter shares cost more to merge than they save
LOG2E = gl.constexpr(1.4426950408889634)
PER_BATCH = [
    "stride_table_seq", "num_tokens", "num_seqs", "num_kv_heads", "num_blocks", "max_blocks_per_seq",
    "k_rows_per_block", "v_rows_per_block",
]  # fmt: skip


class Ring(NamedTuple):
    """What a program has of its processor."""

    num_stages: int  # tiles of keys, and as many of values, in shared memory
    programs_per_processor: int
    max_registers: int | None  # of a thread on average


def choose_ring(tile_q: int) -> Ring:
    """Two programs a processor, so that one loads while the other ends a segment; one where rows take the registers."""
    return Ring(6, 1, None) if tile_q > 16 else Ring(3, 2, 128)


@gluon.jit
def find_share(batch, QUERIES: gl.constexpr, TILE_KV: gl.constexpr, FEWEST: gl.constexpr, FEW: gl.constexpr):
    """``paging.find_share``."""
    WARPS: gl.constexpr = gl.num_warps()
    look = gl.arange(0, paging.SEARCH, gl.BlockedLayout([1], [32], [WARPS], [0]))
    return paging.find_share(
        gl.program_id(0), gl.num_programs(0), *batch, 0, QUERIES, TILE_KV, False, FEWEST, FEW, look, True
    )


@gluon.jit
def load_ids(row_ptr, tile, max_blocks_per_seq, BLOCK_SIZE: gl.constexpr, TILE_KV: gl.constexpr):
    """The ids of a tile's blocks, one a lane, perhaps still on their way; -1 where the table ends."""
    BOX: gl.constexpr = min(BLOCK_SIZE, TILE_KV)
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    index = (tile * TILE_KV + lane * BOX) // BLOCK_SIZE
    there = (lane < TILE_KV // BOX) & (index < max_blocks_per_seq)
    return gl.load(row_ptr + index, mask=there, other=-1, cache_modifier=".cg")


@gluon.jit
def copy_blocks(
    desc, ids, tile, num_blocks, rows_per_block, column, full, place, BLOCK_SIZE: gl.constexpr, TILE_KV: gl.constexpr
):
    """Ask for the blocks of a tile, each to its own rows of it; for one that there is not the engine gives zeros."""
    BOX: gl.constexpr = min(BLOCK_SIZE, TILE_KV)
    lane = gl.arange(0, 32, ids.type.layout)
    rows = ids * rows_per_block + (tile * TILE_KV) % BLOCK_SIZE
    rows = gl.where((ids >= 0) & (ids < num_blocks), rows, -BOX)
    for index in gl.static_range(TILE_KV // BOX):
        row = gl.sum(gl.where(lane == index, rows, 0), 0)
        tma.async_copy_global_to_shared(desc, [row, column], full, place.slice(index * BOX, BOX))


@gluon.jit
def produce(
    k_desc, v_desc, k_smem, v_smem, full, empty, batch, block_table_ptr, stride_table_seq, num_blocks,
    max_blocks_per_seq, k_rows_per_block, v_rows_per_block, out, GROUP: gl.constexpr, QUERIES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, FEWEST: gl.constexpr, FEW: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The producer: the tiles of its program's share, one after the other; and then zeros for rows without keys."""
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE_KV: gl.constexpr = k_smem.shape[1]
    HEAD_DIM: gl.constexpr = k_smem.shape[2]
    seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads = batch
    _, _, begin, end, seq, seq_begin = find_share(batch, QUERIES, TILE_KV, FEWEST, FEW)
    passed = 0
    unit = begin
    while unit < end:
        _, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, True
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, 0, QUERIES, TILE_KV, False, FEW)
        if unit >= seq_begin + per_head * num_kv_heads:
            seq_begin += per_head * num_kv_heads
            seq += 1
        else:
            kv_head, _, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, 0, QUERIES, TILE_KV, False
            )
            row_ptr = block_table_ptr + seq.to(gl.int64) * stride_table_seq
            start = first_tile + unit - seg_begin
            stop = first_tile + gl.minimum(end, seg_end) - seg_begin
            next_ids = load_ids(row_ptr, start, max_blocks_per_seq, BLOCK_SIZE, TILE_KV)
            wait_for_predecessor(OVERLAP, EARLY=False)
            for tile in range(start, stop):
                ids = next_ids
                next_ids = load_ids(row_ptr, tile + 1, max_blocks_per_seq, BLOCK_SIZE, TILE_KV)
                stage = passed % STAGES
                mbarrier.wait(empty.index(stage), (passed // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), TILE_KV * HEAD_DIM * 4)
                copy_blocks(
                    k_desc, ids, tile, num_blocks, k_rows_per_block, kv_head * HEAD_DIM, full.index(stage),
                    k_smem.index(stage), BLOCK_SIZE, TILE_KV,
                )  # fmt: skip
                copy_blocks(
                    v_desc, ids, tile, num_blocks, v_rows_per_block, kv_head * HEAD_DIM, full.index(stage),
                    v_smem.index(stage), BLOCK_SIZE, TILE_KV,
                )  # fmt: skip
                passed += 1
            unit = gl.minimum(following, end)
    out_ptr, stride_out_token, stride_out_head, stride_out_dim = out
    dim = gl.arange(0, HEAD_DIM, gl.BlockedLayout([HEAD_DIM // 32], [32], [1], [0]))
    wait_for_predecessor(OVERLAP, EARLY=False)
    merging.store_rows_without_keys(
        gl.program_id(0), gl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity,
        num_kv_heads * GROUP, dim, out_ptr, stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, QUERIES,
    )  # fmt: skip


@gluon.jit
def load_queries(
    q_ptr, first_row, tile, num_queries, kv_head, stride_q_token, stride_q_head,
    GROUP: gl.constexpr, TILE_Q: gl.constexpr, HEAD_DIM: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """The rows of a tile of queries, zeros for those that are not there, as the left operand of a product."""
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, TILE_Q, gl.SliceLayout(1, LAYOUT))
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    _, token, head, there = paging.place_of(row, tile, kv_head, first_row, num_queries, GROUP, TILE_Q)
    rows = q_ptr + token * stride_q_token + head * stride_q_head
    q = gl.load(rows[:, None] + dim[None, :], mask=there[:, None], other=0.0)
    return gl.convert_layout(q, gl.DotOperandLayout(0, MMA, 2))


@gluon.jit
def attend(
    q, k_smem, v_smem, full, empty, passed, positions, start, stop, last_key, scale_log2,
    TILE_Q: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Let the tiles from ``start`` to ``stop`` pass over the queries."""
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE_KV: gl.constexpr = k_smem.shape[1]
    HEAD_DIM: gl.constexpr = k_smem.shape[2]
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    column = gl.arange(0, TILE_KV, gl.SliceLayout(0, MMA))
    value_row = gl.arange(0, TILE_KV, gl.SliceLayout(1, RIGHT))
    top = gl.full([TILE_Q], float("-inf"), gl.float32, gl.SliceLayout(1, MMA))
    sums = gl.zeros([TILE_Q, TILE_KV], gl.float32, MMA)  # of weights, each column by itself until the end
    acc = gl.zeros([TILE_Q, HEAD_DIM], gl.float32, MMA)
    for tile in range(start, stop):
        stage = passed % STAGES
        mbarrier.wait(full.index(stage), passed // STAGES & 1)
        k = k_smem.index(stage).permute((1, 0)).load(RIGHT)
        scores = mma_v2(q, k, gl.zeros([TILE_Q, TILE_KV], gl.float32, MMA))
        v = v_smem.index(stage).load(RIGHT)
        gl.thread_barrier()  # of the consumers: all have read
        mbarrier.arrive(empty.index(stage), count=1)
        passed += 1
        key = tile * TILE_KV + column
        scores = gl.where(key[None, :] <= positions[:, None], scores, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
        weights = gl.exp2(scores * scale_log2 - shift[:, None])
        rescale = gl.exp2(top - shift)
        sums = sums * rescale[:, None] + weights
        top = new_top
        if (tile + 1) * TILE_KV > last_key:  # what lies behind is another's: 0 times its NaN would be NaN
            v = gl.where((tile * TILE_KV + value_row < last_key)[:, None], v, gl.zeros_like(v))
        acc = mma_v2(gl.convert_layout(weights.to(v.dtype), LEFT), v, acc * rescale[:, None])
    return acc, top, gl.sum(sums, 1), passed


@gluon.jit
def load_parts(
    step, steps, first, last, num_rows, parts_ptr, stats_ptr,
    TILE_Q: gl.constexpr, TILE_D: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """A few rows of some parts: (sums of values, tops, totals), these last a number a lane, in one load each."""
    ENTRY: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    LANES: gl.constexpr = gl.BlockedLayout([1, 1], [32 // ROWS, ROWS], [gl.num_warps(), 1], [1, 0])
    place, row, loaded = places_of_parts(step, steps, first, last, num_rows, TILE_Q, ROWS, PARTS, LANES)
    stats = stats_ptr + place * 2 + row
    top = gl.load(stats, mask=loaded, other=float("-inf"), cache_modifier=".cg")
    total = gl.load(stats + TILE_Q, mask=loaded, other=0.0, cache_modifier=".cg")
    place, row, loaded = places_of_parts(step, steps, first, last, num_rows, TILE_Q, ROWS, PARTS, ENTRY)
    dim = gl.arange(0, TILE_D, gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    values = gl.load(
        parts_ptr + ((place + row) * TILE_D)[:, :, None] + dim[None, :][None, :, :],
        mask=loaded[:, :, None], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    return values, top, total


@gluon.jit
def places_of_parts(
    step, steps, first, last, num_rows,
    TILE_Q: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Of the rows and parts of a step: (places in the scratch, in rows; the rows; whether there are such)."""
    row = step // steps * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    part = first + step % steps * PARTS + gl.arange(0, PARTS, gl.SliceLayout(1, LAYOUT))
    loaded = (part <= last)[:, None] & (row < num_rows)[None, :]
    return (part * 2 + (part == first).to(gl.int32)).to(gl.int64)[:, None] * TILE_Q, row[None, :], loaded


@gluon.jit
def merge_parts(
    first, last, parts_ptr, stats_ptr, out, sinks_ptr, tile, kv_head, first_row, num_queries,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, TILE_Q: gl.constexpr,
):  # fmt: skip
    """``merging.merge_parts``: a warp a row, some parts a step in its registers, the next step's loads under way."""
    out_ptr, stride_out_token, stride_out_head, stride_out_dim = out
    ROWS: gl.constexpr = gl.num_warps()
    PARTS: gl.constexpr = 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, HEAD_DIM // 32], [1, 1, 32], [1, ROWS, 1], [2, 1, 0])
    RESULT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    ROW: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))  # lies as the one below, under another name
    ROW_OF_RESULT: gl.constexpr = gl.SliceLayout(1, RESULT)
    num_rows = gl.minimum(num_queries - tile * (TILE_Q // GROUP), TILE_Q // GROUP) * GROUP
    steps = (last - first + PARTS) // PARTS  # for the same rows
    top = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    total = gl.zeros([ROWS], gl.float32, ROW)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, RESULT)
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, RESULT))
    next_values, next_top, next_total = load_parts(
        0, steps, first, last, num_rows, parts_ptr, stats_ptr, TILE_Q, HEAD_DIM, ROWS, PARTS, LAYOUT
    )
    for step in range((num_rows + ROWS - 1) // ROWS * steps):
        values = next_values
        part_top = gl.convert_layout(next_top, gl.SliceLayout(2, LAYOUT))
        part_total = gl.convert_layout(next_total, gl.SliceLayout(2, LAYOUT))
        next_values, next_top, next_total = load_parts(
            step + 1, steps, first, last, num_rows, parts_ptr, stats_ptr, TILE_Q, HEAD_DIM, ROWS, PARTS, LAYOUT
        )
        begins = step % steps == 0  # other rows begin
        top = gl.where(begins, float("-inf"), top)
        total = gl.where(begins, 0.0, total)
        acc = gl.where(begins, 0.0, acc)
        new_top = gl.maximum(top, gl.max(part_top, 0))
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
        old = gl.exp2(top - shift)
        weights = gl.exp2(part_top - shift[None, :])
        total = total * old + gl.sum(weights * part_total, 0)
        acc = acc * gl.convert_layout(old, ROW_OF_RESULT)[:, None] + gl.sum(weights[:, :, None] * values, 0)
        top = new_top
        if step % steps == steps - 1:
            row = step // steps * ROWS + gl.arange(0, ROWS, ROW_OF_RESULT)
            _, token, head, there = paging.place_of(row, tile, kv_head, first_row, num_queries, GROUP, TILE_Q)
            merging.store_rows(
                acc, gl.convert_layout(top, ROW_OF_RESULT), gl.convert_layout(total, ROW_OF_RESULT), out_ptr, sinks_ptr,
                token, head, there, dim, stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM,
            )  # fmt: skip


@gluon.jit
def consume(
    q_ptr, out, sinks_ptr, scratch, k_smem, v_smem, full, empty, batch, scale_log2, stride_q_token, stride_q_head,
    GROUP: gl.constexpr, TILE_Q: gl.constexpr, FEWEST: gl.constexpr, FEW: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The consumers: every segment of the share from its first tile to its last, written or left for the merge."""
    TILE_KV: gl.constexpr = k_smem.shape[1]
    HEAD_DIM: gl.constexpr = k_smem.shape[2]
    QUERIES: gl.constexpr = TILE_Q // GROUP
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    out_ptr, stride_out_token, stride_out_head, stride_out_dim = out
    parts_ptr, stats_ptr, counters_ptr = scratch
    seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads = batch
    program = gl.program_id(0)
    line, num_workers, begin, end, seq, seq_begin = find_share(batch, QUERIES, TILE_KV, FEWEST, FEW)
    row = gl.arange(0, TILE_Q, gl.SliceLayout(1, MMA))
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, MMA))
    wait_for_predecessor(OVERLAP, EARLY=False)
    passed = 0
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, 0, QUERIES, TILE_KV, False, FEW)
        if unit >= seq_begin + per_head * num_kv_heads:
            seq_begin += per_head * num_kv_heads
            seq += 1
        else:
            kv_head, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, 0, QUERIES, TILE_KV, False
            )
            if unit < seg_end:
                q = load_queries(
                    q_ptr, first_row, tile, num_queries, kv_head, stride_q_token, stride_q_head, GROUP, TILE_Q,
                    HEAD_DIM, MMA,
                )  # fmt: skip
                query, token, head, there = paging.place_of(row, tile, kv_head, first_row, num_queries, GROUP, TILE_Q)
                context = seq_len - num_queries
                last_key = context + gl.minimum((tile + 1) * QUERIES, num_queries)
                acc, top, total, passed = attend(
                    q, k_smem, v_smem, full, empty, passed, context + query, first_tile + unit - seg_begin,
                    first_tile + gl.minimum(end, seg_end) - seg_begin, last_key, scale_log2, TILE_Q, MMA,
                )  # fmt: skip
                if (seg_begin >= begin) & (seg_end <= end):
                    merging.store_rows(
                        acc, top, total, out_ptr, sinks_ptr, token, head, there, dim, stride_out_token,
                        stride_out_head, stride_out_dim, HEAD_DIM,
                    )  # fmt: skip
                else:
                    merging.store_part(
                        acc, top, total, row, dim, merging.place_of_part(program, seg_begin, begin), parts_ptr,
                        stats_ptr, there, dim, HEAD_DIM, TILE_Q, HEAD_DIM,
                    )  # fmt: skip
                    if merging.is_last(seg_begin, seg_end, line, num_workers, counters_ptr):
                        merge_parts(
                            paging.worker_of(seg_begin, num_workers, line),
                            paging.worker_of(seg_end - 1, num_workers, line), parts_ptr, stats_ptr, out,
                            sinks_ptr, tile, kv_head, first_row, num_queries, GROUP, HEAD_DIM, TILE_Q,
                        )  # fmt: skip
            unit = gl.minimum(following, end)


@gluon.jit(do_not_specialize=PER_BATCH)
def paged_decode_hopper_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_desc,  # [slots, num_kv_heads * head_dim]
    v_desc,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr,  # the scratch of merging.py
    stats_ptr,
    counters_ptr,
    scale_log2,
    stride_q_token,
    stride_q_head,
    stride_table_seq,
    stride_out_token,
    stride_out_head,
    stride_out_dim,
    num_tokens,
    num_seqs,
    num_kv_heads,
    num_blocks,
    max_blocks_per_seq,
    k_rows_per_block,
    v_rows_per_block,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE_Q: gl.constexpr,
    TILE_KV: gl.constexpr,
    STAGES: gl.constexpr,
    LAYOUT: gl.constexpr,
    FEWEST: gl.constexpr,
    FEW: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE_KV, HEAD_DIM], LAYOUT)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE_KV, HEAD_DIM], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    batch = (seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, max_blocks_per_seq * BLOCK_SIZE, num_kv_heads)
    out = (out_ptr, stride_out_token, stride_out_head, stride_out_dim)
    gl.warp_specialize(
        [
            (consume, (
                q_ptr, out, sinks_ptr, (parts_ptr, stats_ptr, counters_ptr), k_smem, v_smem, full, empty, batch,
                scale_log2, stride_q_token, stride_q_head, GROUP, TILE_Q, FEWEST, FEW, OVERLAP,
            )),
            (produce, (
                k_desc, v_desc, k_smem, v_smem, full, empty, batch, block_table_ptr, stride_table_seq, num_blocks,
                max_blocks_per_seq, k_rows_per_block, v_rows_per_block, out, GROUP, TILE_Q // GROUP, BLOCK_SIZE, FEWEST,
                FEW, OVERLAP,
            )),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def attend_decodes_on_hopper(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    scale: float,
    sinks: Array | None,
    out: Array,
    tile_q: int,
    few: bool = False,
) -> None:
    """Fill ``out``, in tiles of ``tile_q`` rows; what ``hopper_fits`` asks is so.

    ``few``: sequences with more queries than a tile holds are left to another kernel.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([TILE_KV, head_dim], dtype)
    (k_desc, k_rows_per_block), (v_desc, v_rows_per_block) = (
        describe_cache(x, layout, TILE_KV) for x in (k_cache, v_cache)
    )
    ring = choose_ring(tile_q)
    num_programs = ring.programs_per_processor * num_processors(q)
    scratch = merging.make_scratch(q, num_programs, tile_q, head_dim)
    paged_decode_hopper_kernel[(num_programs,)](
        q, k_desc, v_desc, block_table, seq_lens, cu_seqlens_q, sinks, out, *scratch, scale * LOG2E.value,
        q.stride(0), q.stride(1), block_table.stride(0), *out.stride(),
        num_tokens, num_seqs, num_kv_heads, num_blocks, max_blocks_per_seq, k_rows_per_block, v_rows_per_block,
        GROUP=num_heads // num_kv_heads, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, TILE_Q=tile_q, TILE_KV=TILE_KV,
        STAGES=ring.num_stages, LAYOUT=layout, FEWEST=FEWEST_UNITS, FEW=few,
        num_warps=CONSUMERS, maxnreg=ring.max_registers, **overlapped(q),
    )  # fmt: skip
