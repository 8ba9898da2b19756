"""Chunks of prompts over a paged cache on a Hopper GPU, in Gluon: `flash_attention_hopper.py`, its keys in blocks.

The copy engine (TMA) sees the cache as rows of slots. A producer reads the ids of a tile's blocks from the block
table and asks for one block after the other; each lands in its rows of the tile, and the consumers see no difference.
Keys and values have a producer warp each, because small blocks are many copies.
A block id of -1, or one that the cache does not have, is a place outside the array, for which the engine gives zeros.

A program has a tile of rows: 128 queries of a head, or fewer of several heads that share their keys. Where tiles are
fewer than processors, as with a short chunk over a long context, the keys of a tile pass in parts, each in a program of
its own; who is the last to be done puts the parts together.

What it does not do: windows, caps, float32, head sizes other than 64 and 128, blocks that do not divide a tile or whose
tokens do not lie one behind another; and one sequence's decode is one program's. `paged_attention.py` does all that.
"""

import torch
from torch import Tensor as Array
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fast._triton.merging import zero_counters
from fast._triton.platform import cdiv, num_processors
from fast.attention._hopper import (
    LOG2E,
    NUM_STAGES,
    TILE_KV,
    TILE_Q,
    add_sink,
    ask_for_scores,
    ask_for_values,
    attend,
    await_scores,
    await_values,
    barriers,
    store_rows,
)

LEAST_TILES = gl.constexpr(4)  # of keys in a part: a shorter one costs more to merge than it saves
PER_BATCH = [
    "stride_table_seq", "num_items", "num_seqs", "num_tokens", "num_heads", "group", "num_slots", "num_halvings",
    "num_blocks", "max_blocks_per_seq", "k_rows_per_block", "v_rows_per_block", "fewest_queries", "most_parts",
]  # fmt: skip


@gluon.jit
def item_of(turn):
    """The item a program takes in its ``turn``: to and fro, because items get shorter and the first is the longest."""
    place = gl.where(turn % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))
    return turn * gl.num_programs(0) + place


@gluon.jit
def num_turns(batch):
    """How many items a program has at most."""
    return (batch[0] + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def find_item(item, batch, HEADS: gl.constexpr, QUERIES: gl.constexpr, TILE_KV: gl.constexpr):
    """What a program has to do next: its first head and query, their sequence, and which tiles of keys.

    The last value is the number of parts in which the keys of these queries pass, here and in other programs.
    Nothing for a sequence of up to ``fewest_queries``: the kernel of decodes has it.
    Sequence s has the slots from ``cu_seqlens_q[s] // QUERIES + s``, and is found by bisection.
    """
    (
        _num_items, cu_seqlens_q_ptr, seq_lens_ptr, num_seqs, num_tokens, num_heads, num_slots, num_halvings, capacity,
        fewest_queries, most_parts,
    ) = batch  # fmt: skip
    part = item % most_parts
    head = item // most_parts % (num_heads // HEADS) * HEADS
    slot = num_slots - 1 - item // most_parts // (num_heads // HEADS)
    seq = 0
    end = num_seqs
    for _ in range(num_halvings):
        middle = (seq + end) // 2
        below = gl.load(cu_seqlens_q_ptr + middle) // QUERIES + middle <= slot
        seq = gl.where(below, middle, seq)
        end = gl.where(below, end, middle)
    begin_q = gl.load(cu_seqlens_q_ptr + seq)
    tile = slot - (begin_q // QUERIES + seq)
    first_query = gl.minimum(gl.maximum(begin_q, 0), num_tokens)
    num_queries = gl.minimum(gl.maximum(gl.load(cu_seqlens_q_ptr + seq + 1), first_query), num_tokens) - first_query
    seq_len = gl.minimum(gl.maximum(gl.load(seq_lens_ptr + seq), 0), capacity)

    sound = (slot >= 0) & (tile >= 0)  # an item is left, and the offsets are what they should be
    queries_left = gl.where(sound & (num_queries > fewest_queries), num_queries - tile * QUERIES, 0)
    position = tile * QUERIES + seq_len - num_queries  # of the first query
    num_keys = gl.maximum(position + gl.minimum(queries_left, QUERIES), 0)
    num_tiles = gl.maximum((num_keys + TILE_KV - 1) // TILE_KV, 1)  # one, all hidden, where there are no keys
    num_parts = gl.minimum(gl.maximum(num_tiles // LEAST_TILES, 1), most_parts)
    queries_left = gl.where(part < num_parts, queries_left, 0)
    first_tile = num_tiles * part // num_parts
    end_tile = gl.where(queries_left > 0, num_tiles * (part + 1) // num_parts, first_tile)
    seen_tiles = gl.maximum(position + 1, 0) // TILE_KV
    token = first_query + tile * QUERIES
    return head, seq, token, queries_left, position, seq_len, first_tile, end_tile, seen_tiles, num_parts


@gluon.jit
def load_ids(row_ptr, tile, max_blocks_per_seq, BLOCKS: gl.constexpr):
    """The ids of a tile's blocks, one a lane, perhaps still on their way; -1 where the table ends, or before tile 0."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    index = tile * BLOCKS + lane
    return gl.load(row_ptr + index, mask=(tile >= 0) & (lane < BLOCKS) & (index < max_blocks_per_seq), other=-1)


@gluon.jit
def copy_tile(desc, ids, num_blocks, rows_per_block, column, full, tile, BLOCK_SIZE: gl.constexpr):
    """Ask for the blocks of a tile of keys or values, each to its own rows of the tile."""
    lane = gl.arange(0, 32, ids.type.layout)
    first_rows = gl.where((ids >= 0) & (ids < num_blocks), ids * rows_per_block, -rows_per_block)
    mbarrier.expect(full, tile.shape[0] * tile.shape[1] * 2)
    for index in gl.static_range(tile.shape[0] // BLOCK_SIZE):
        first_row = gl.sum(gl.where(lane == index, first_rows, 0), 0)
        tma.async_copy_global_to_shared(desc, [first_row, column], full, tile.slice(index * BLOCK_SIZE, BLOCK_SIZE))


@gluon.jit
def ask_for_queries(queries, token, head, items, HEADS: gl.constexpr):
    """Ask for a tile of queries, one head below the other, once the consumers have no more use for the last one."""
    q_desc, q_smem, q_full, q_empty = queries
    ROWS: gl.constexpr = q_smem.shape[1]  # of a consumer
    HEAD_DIM: gl.constexpr = q_smem.shape[2]
    QUERIES: gl.constexpr = 2 * ROWS // HEADS
    COPIED: gl.constexpr = q_desc.block_type.shape[0]
    for which in gl.static_range(2):
        mbarrier.wait(q_empty.index(which), (items & 1) ^ 1)
        mbarrier.expect(q_full.index(which), ROWS * HEAD_DIM * 2)
        for first in gl.static_range(0, ROWS, COPIED):
            row = which * ROWS + first
            tma.async_copy_global_to_shared(
                q_desc, [token + row % QUERIES, (head + row // QUERIES) * HEAD_DIM], q_full.index(which),
                q_smem.index(which).slice(first, COPIED),
            )  # fmt: skip


@gluon.jit
def produce(
    desc, smem, full, empty, queries, batch, block_table_ptr, stride_table_seq, num_blocks, rows_per_block,
    max_blocks_per_seq, group, HEADS: gl.constexpr, QUERIES: gl.constexpr, BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """A producer, of keys or values, and of the queries if it is given any.

    For each item, the queries once and the tiles from the last to the first. It knows a tile's blocks before there is
    a place for the tile: looking them up one by one, each behind the copy of the one before, takes longer than the
    products of a tile do.
    """
    STAGES: gl.constexpr = smem.shape[0]
    TILE_KV: gl.constexpr = smem.shape[1]
    HEAD_DIM: gl.constexpr = smem.shape[2]
    BLOCKS: gl.constexpr = TILE_KV // BLOCK_SIZE
    passed = 0  # tiles, of all items
    items = 0
    for turn in range(num_turns(batch)):
        head, seq, token, _queries, _position, _keys, first_tile, end_tile, _seen, _parts = find_item(
            item_of(turn), batch, HEADS, QUERIES, TILE_KV
        )
        row_ptr = block_table_ptr + seq.to(gl.int64) * stride_table_seq
        if end_tile > first_tile:
            next_ids = load_ids(row_ptr, end_tile - 1, max_blocks_per_seq, BLOCKS)
            if queries is not None:
                ask_for_queries(queries, token, head, items, HEADS)
            items += 1
            for step in range(end_tile - first_tile):
                ids = next_ids
                next_ids = load_ids(row_ptr, end_tile - 2 - step, max_blocks_per_seq, BLOCKS)
                stage = passed % STAGES
                mbarrier.wait(empty.index(stage), (passed // STAGES & 1) ^ 1)
                copy_tile(
                    desc, ids, num_blocks, rows_per_block, head // group * HEAD_DIM, full.index(stage),
                    smem.index(stage), BLOCK_SIZE,
                )  # fmt: skip
                passed += 1


@gluon.jit
def offsets_like(acc):
    """Where in a part each of the sums of values lies."""
    LAYOUT: gl.constexpr = acc.type.layout
    row = gl.arange(0, acc.shape[0], gl.SliceLayout(1, LAYOUT))[:, None]
    return row * acc.shape[1] + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def leave_part(acc, top, total, place, scratch):
    """Store a part at its place in the scratch."""
    parts_ptr, stats_ptr, _counters_ptr = scratch
    ROWS: gl.constexpr = acc.shape[0]
    gl.store(parts_ptr + place * (ROWS * acc.shape[1]) + offsets_like(acc), acc)
    row = gl.arange(0, ROWS, top.type.layout)
    gl.store(stats_ptr + place * 2 * ROWS + row, top)
    gl.store(stats_ptr + (place * 2 + 1) * ROWS + row, total)


@gluon.jit
def is_last(counter_ptr, num_parts):
    """Count a part in that has been left; whether the others were all there already. As ``is_last`` of merging.py."""
    gl.thread_barrier()  # the stores of all threads come before the count
    arrived = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == num_parts - 1:
        gl.store(counter_ptr, 0)
    return arrived == num_parts - 1


@gluon.jit
def merge_parts(acc, top, total, first, num_parts, scratch):
    """Put the parts from place ``first`` on together, in order, in place of the state of one of them."""
    parts_ptr, stats_ptr, _counters_ptr = scratch
    ROWS: gl.constexpr = acc.shape[0]
    row = gl.arange(0, ROWS, top.type.layout)
    offsets = offsets_like(acc)
    top, total, acc = gl.full_like(top, float("-inf")), gl.zeros_like(total), gl.zeros_like(acc)
    for part in range(num_parts):
        place = first + 2 * part
        part_acc = gl.load(parts_ptr + place * (ROWS * acc.shape[1]) + offsets, cache_modifier=".cg")
        part_top = gl.load(stats_ptr + place * 2 * ROWS + row, cache_modifier=".cg")
        part_total = gl.load(stats_ptr + (place * 2 + 1) * ROWS + row, cache_modifier=".cg")
        new_top = gl.maximum(top, part_top)
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
        old, new = gl.exp2(top - shift), gl.exp2(part_top - shift)
        total = total * old + part_total * new
        acc = acc * gl.convert_layout(old, gl.SliceLayout(1, acc.type.layout))[:, None]
        acc += part_acc * gl.convert_layout(new, gl.SliceLayout(1, acc.type.layout))[:, None]
        top = new_top
    return acc, top, total


@gluon.jit
def consume(
    q_tile, q_full, q_empty, tiles, turn, results, scratch, batch, WHICH: gl.constexpr, SINKS: gl.constexpr,
    HEADS: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 of an item's rows, through all its tiles of keys."""
    ROWS: gl.constexpr = q_tile.shape[0]
    TILE_KV: gl.constexpr = tiles[0].shape[1]
    OWN: gl.constexpr = min(QUERIES, ROWS)  # queries, of each head it has
    out_ptr, sinks_ptr, scale_log2, stride_out_token, stride_out_head = results
    scores_of = gl.zeros([ROWS, TILE_KV], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16]))

    passed = 0
    items = 0
    turns = 0
    for round in range(num_turns(batch)):
        item = item_of(round)
        head, _seq, token, queries_left, position, num_keys, first_tile, end_tile, seen_tiles, num_parts = find_item(
            item, batch, HEADS, QUERIES, TILE_KV
        )
        head += WHICH * ROWS // QUERIES
        token += WHICH * ROWS % QUERIES
        queries_left -= WHICH * ROWS % QUERIES
        position += WHICH * ROWS % QUERIES

        if end_tile > first_tile:
            mbarrier.wait(q_full, items & 1)
            items += 1
            scores = ask_for_scores(scores_of, q_tile, tiles, passed, True)
            scores = await_scores(scores, tiles, passed, True)
            acc, weights, top, total, passed, turns = attend(
                scores_of, scores, passed, turns, position, num_keys, first_tile, end_tile, seen_tiles, scale_log2,
                q_tile, tiles, turn, True, WHICH, True, OWN,
            )  # fmt: skip
            mbarrier.arrive(q_empty.index(WHICH), count=1)
            acc = await_values(ask_for_values(acc, weights, tiles, passed), tiles, passed, 0)

            whole = queries_left > 0
            if scratch[0] is not None:  # noqa: SIM102 (known when compiled, unlike the next)
                if whole & (num_parts > 1):
                    first = (item - item % batch[-1]) * 2 + WHICH
                    leave_part(acc, top, total, item * 2 + WHICH, scratch)
                    whole = is_last(scratch[2] + first, num_parts)
                    if whole:
                        acc, top, total = merge_parts(acc, top, total, first, num_parts, scratch)
            if whole:
                if SINKS:
                    row_head = head + gl.arange(0, ROWS, top.type.layout) // OWN
                    acc, top, total = add_sink(acc, top, total, sinks_ptr, row_head)
                total = gl.where(total > 0, total, 1.0)
                store_rows(
                    acc, total, out_ptr, token, head, queries_left, stride_out_token, stride_out_head, OWN,
                    q_tile.dtype,
                )  # fmt: skip


@gluon.jit(do_not_specialize=PER_BATCH)
def paged_attention_hopper_kernel(
    q_desc,  # [num_tokens, num_heads * head_dim]
    k_desc,  # [slots, num_kv_heads * head_dim]
    v_desc,
    out_ptr,  # [num_tokens, num_heads, head_dim]
    sinks_ptr,  # [num_heads]
    parts_ptr,  # [num_items * 2, 64, head_dim], sums of values; None: no item has parts
    stats_ptr,  # [num_items * 2, 2, 64], the top and the total of each row
    counters_ptr,  # [num_items * 2], 0 between launches
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    scale_log2,
    stride_table_seq,
    stride_out_token,
    stride_out_head,
    num_items,
    num_seqs,
    num_tokens,
    num_heads,
    group,
    num_slots,
    num_halvings,
    num_blocks,
    max_blocks_per_seq,
    k_rows_per_block,
    v_rows_per_block,
    fewest_queries,
    most_parts,
    SINKS: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE_Q: gl.constexpr,
    TILE_KV: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, TILE_Q // 2, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, TILE_KV, HEAD_DIM], LAYOUT)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, TILE_KV, HEAD_DIM], LAYOUT)
    q_full, q_empty = barriers(2, 1), barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    turn = barriers(2, 1)
    fence_async_shared()
    batch = (
        num_items, cu_seqlens_q_ptr, seq_lens_ptr, num_seqs, num_tokens, num_heads, num_slots, num_halvings,
        max_blocks_per_seq * BLOCK_SIZE, fewest_queries, most_parts,
    )  # fmt: skip
    results = (out_ptr, sinks_ptr, scale_log2, stride_out_token, stride_out_head)
    scratch = (parts_ptr, stats_ptr, counters_ptr)
    tiles = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    QUERIES: gl.constexpr = TILE_Q // HEADS
    gl.warp_specialize(
        [
            (consume, (
                q_smem.index(0), q_full.index(0), q_empty, tiles, turn, results, scratch, batch, 0, SINKS,
                HEADS, QUERIES,
            )),
            (consume, (
                q_smem.index(1), q_full.index(1), q_empty, tiles, turn, results, scratch, batch, 1, SINKS,
                HEADS, QUERIES,
            )),
            (produce, (
                k_desc, k_smem, k_full, k_empty, (q_desc, q_smem, q_full, q_empty), batch, block_table_ptr,
                stride_table_seq, num_blocks, k_rows_per_block, max_blocks_per_seq, group, HEADS, QUERIES, BLOCK_SIZE,
            )),
            (produce, (
                v_desc, v_smem, v_full, v_empty, None, batch, block_table_ptr,
                stride_table_seq, num_blocks, v_rows_per_block, max_blocks_per_seq, group, HEADS, QUERIES, BLOCK_SIZE,
            )),
        ],
        [4, 1, 1],  # warps of the second consumer and of the producers
        [232, 40, 40],  # registers of a thread of theirs; the first consumer gets what is left, 232
    )  # fmt: skip


def hopper_fits(q: Array, k_cache: Array, v_cache: Array, block_table: Array) -> bool:
    """Whether the copy engine can fetch these caches block by block, and the tensor cores take what it brings."""
    num_blocks, block_size, num_kv_heads, head_dim = k_cache.shape
    if head_dim not in (64, 128) or block_size % 8 or TILE_KV % block_size or not num_blocks:
        return False
    if block_table.stride(1) != 1 or q.stride(2) != 1 or q.stride(1) != head_dim or q.stride(0) % 8:
        return False
    for cache in (k_cache, v_cache):
        block, token, head, dim = cache.stride()
        dense = dim == 1 and head == head_dim and token == num_kv_heads * head_dim and block % token == 0
        if not dense or cache.data_ptr() % 16 or block // token * num_blocks >= 2**31:
            return False
    return q.dtype == k_cache.dtype == v_cache.dtype != torch.float32 and q.data_ptr() % 16 == 0


def describe_cache(cache: Array, layout: gl.NVMMASharedLayout, tile_kv: int) -> tuple[TensorDescriptor, int]:
    """A cache that fits, as the copy engine brings blocks of it: a row a slot; and how many rows blocks lie apart.

    One copy brings a block, or a tile of keys where that is less: what it brings must have room there.
    """
    num_blocks, block_size, num_kv_heads, head_dim = cache.shape
    rows_per_block = cache.stride(0) // cache.stride(1)
    shape = [(num_blocks - 1) * rows_per_block + block_size, num_kv_heads * head_dim]
    return TensorDescriptor(
        cache, shape, [cache.stride(1), 1], [min(block_size, tile_kv), head_dim], layout
    ), rows_per_block


def heads_of_a_tile(group: int, queries_per_seq: float) -> int:
    """How many heads of a group share a tile of rows: one, unless its queries would fill no more than half of it."""
    return 1 if queries_per_seq > TILE_Q // 2 else min(group & -group, 16)


def parts_of_an_item(num_items: int, processors: int) -> int:
    """In how many parts the keys of an item pass at most, each in a program of its own, where items are few."""
    return max(1, processors // num_items)


def attend_chunks_on_hopper(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    scale: float,
    sinks: Array | None,
    out: Array,
    fewest_queries: int = 0,
) -> None:
    """Fill ``out`` for sequences of more than ``fewest_queries``; what ``hopper_fits`` asks is so."""
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([TILE_KV, head_dim], dtype)
    heads = heads_of_a_tile(num_heads // num_kv_heads, num_tokens / num_seqs)
    q_block = [min(TILE_Q // 2, TILE_Q // heads), head_dim]
    q_desc = TensorDescriptor(q, [num_tokens, num_heads * head_dim], [q.stride(0), 1], q_block, layout)
    (k_desc, k_rows_per_block), (v_desc, v_rows_per_block) = (
        describe_cache(x, layout, TILE_KV) for x in (k_cache, v_cache)
    )
    queries = TILE_Q // heads
    num_slots = cdiv(num_tokens, queries) if num_seqs == 1 else num_tokens // queries + num_seqs
    most_parts = parts_of_an_item(max(num_seqs, cdiv(num_tokens, queries)) * (num_heads // heads), num_processors(q))
    num_items = num_slots * (num_heads // heads) * most_parts
    num_programs = min(num_items, num_processors(q))  # a producer is at its next item while the last one is computed
    scratch = None, None, None
    if most_parts > 1:
        parts = torch.empty((num_items * 2, TILE_Q // 2, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((num_items * 2, 2, TILE_Q // 2), dtype=torch.float32, device=q.device)
        scratch = parts, stats, zero_counters(q, num_items * 2)
    paged_attention_hopper_kernel[(num_programs,)](
        q_desc, k_desc, v_desc, out, sinks, *scratch, block_table, seq_lens, cu_seqlens_q, scale * LOG2E.value,
        block_table.stride(0), out.stride(0), out.stride(1),
        num_items, num_seqs, num_tokens, num_heads, num_heads // num_kv_heads, num_slots, (num_seqs - 1).bit_length(),
        num_blocks, max_blocks_per_seq, k_rows_per_block, v_rows_per_block, fewest_queries, most_parts,
        SINKS=sinks is not None, HEADS=heads, BLOCK_SIZE=block_size, TILE_Q=TILE_Q, TILE_KV=TILE_KV, HEAD_DIM=head_dim,
        STAGES=NUM_STAGES, LAYOUT=layout, num_warps=4,
    )  # fmt: skip
