"""Chunks of prompts over a paged cache on a Hopper GPU, in Gluon: `flash_attention_hopper.py`, its keys in blocks.

The copy engine (TMA) sees the cache as rows of slots. A producer reads the ids of a tile's blocks from the block
table and asks for one block after the other; each lands in its rows of the tile, and the consumers see no difference.
Keys and values have a producer warp each, because small blocks are many copies.
A block id of -1, or one that the cache does not have, is a place outside the array, for which the engine gives zeros.

What it does not do: windows, caps, float32, head sizes other than 64 and 128, blocks that do not divide a tile or whose
tokens do not lie one behind another; and one sequence's decode is one program's. `paged_attention.py` does all that.
"""

import torch
from torch import Tensor as Array
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fast._triton.platform import num_processors
from fast.attention._hopper import (
    LOG2E,
    NUM_STAGES,
    TILE_KV,
    TILE_Q,
    add_sink,
    attend,
    barriers,
    empty_state,
    item_of,
    store_rows,
)

PER_BATCH = [
    "stride_table_seq", "num_seqs", "num_tokens", "num_heads", "group", "num_slots", "num_halvings", "num_blocks",
    "max_blocks_per_seq", "k_rows_per_block", "v_rows_per_block", "fewest_queries",
]  # fmt: skip


@gluon.jit
def num_turns(batch):
    """How many items a program has at most."""
    _cu_seqlens, _seq_lens, _seqs, _tokens, num_heads, num_slots, _halvings, _capacity, _fewest = batch
    return (num_slots * num_heads + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def find_item(item, batch, TILE_Q: gl.constexpr, TILE_KV: gl.constexpr):
    """What a program has to do next: head, tile of queries, their sequence, and which tiles of keys.

    Nothing for a sequence of up to ``fewest_queries``: the kernel of decodes has it.
    Sequence s has the slots from ``cu_seqlens_q[s] // TILE_Q + s``, and is found by bisection.
    """
    (
        cu_seqlens_q_ptr, seq_lens_ptr, num_seqs, num_tokens, num_heads, num_slots, num_halvings, capacity,
        fewest_queries,
    ) = batch  # fmt: skip
    head = item % num_heads
    slot = num_slots - 1 - item // num_heads  # below 0: no item is left
    seq = 0
    end = num_seqs
    for _ in range(num_halvings):
        middle = (seq + end) // 2
        below = gl.load(cu_seqlens_q_ptr + middle) // TILE_Q + middle <= slot
        seq = gl.where(below, middle, seq)
        end = gl.where(below, end, middle)
    begin_q = gl.load(cu_seqlens_q_ptr + seq)
    tile = slot - (begin_q // TILE_Q + seq)
    first_query = gl.minimum(gl.maximum(begin_q, 0), num_tokens)
    num_queries = gl.minimum(gl.maximum(gl.load(cu_seqlens_q_ptr + seq + 1), first_query), num_tokens) - first_query
    seq_len = gl.minimum(gl.maximum(gl.load(seq_lens_ptr + seq), 0), capacity)

    rows_left = gl.where((slot >= 0) & (num_queries > fewest_queries), num_queries - tile * TILE_Q, 0)
    position = tile * TILE_Q + seq_len - num_queries  # of the first query
    num_keys = gl.maximum(position + gl.minimum(rows_left, TILE_Q), 0)
    num_tiles = gl.where(rows_left > 0, (num_keys + TILE_KV - 1) // TILE_KV, 0)
    seen_tiles = gl.maximum(position + 1, 0) // TILE_KV
    return head, seq, first_query + tile * TILE_Q, rows_left, position, seq_len, num_tiles, seen_tiles


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
def produce(
    desc, smem, full, empty, queries, batch, block_table_ptr, stride_table_seq, num_blocks, rows_per_block,
    max_blocks_per_seq, group, BLOCK_SIZE: gl.constexpr, TILE_Q: gl.constexpr,
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
        head, seq, token, _rows, _position, _keys, num_tiles, _seen = find_item(item_of(turn), batch, TILE_Q, TILE_KV)
        row_ptr = block_table_ptr + seq.to(gl.int64) * stride_table_seq
        if num_tiles > 0:
            next_ids = load_ids(row_ptr, num_tiles - 1, max_blocks_per_seq, BLOCKS)
            if queries is not None:
                q_desc, q_smem, q_full, q_empty = queries
                for which in gl.static_range(2):
                    mbarrier.wait(q_empty.index(which), (items & 1) ^ 1)
                    mbarrier.expect(q_full.index(which), q_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        q_desc, [token + which * (TILE_Q // 2), head * HEAD_DIM], q_full.index(which),
                        q_smem.index(which),
                    )  # fmt: skip
            items += 1
            for step in range(num_tiles):
                ids = next_ids
                next_ids = load_ids(row_ptr, num_tiles - 2 - step, max_blocks_per_seq, BLOCKS)
                stage = passed % STAGES
                mbarrier.wait(empty.index(stage), (passed // STAGES & 1) ^ 1)
                copy_tile(
                    desc, ids, num_blocks, rows_per_block, head // group * HEAD_DIM, full.index(stage),
                    smem.index(stage), BLOCK_SIZE,
                )  # fmt: skip
                passed += 1


@gluon.jit
def consume(
    q_tile, q_full, q_empty, tiles, turn, results, batch, WHICH: gl.constexpr, SINKS: gl.constexpr,
    TILE_Q: gl.constexpr, TILE_KV: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 of an item's queries, through all its tiles of keys."""
    ROWS: gl.constexpr = TILE_Q // 2
    out_ptr, sinks_ptr, scale_log2, stride_out_token, stride_out_head = results
    scores_of = gl.zeros([ROWS, TILE_KV], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16]))

    passed = 0
    items = 0
    turns = 0
    for round in range(num_turns(batch)):
        head, _seq, token, rows_left, position, num_keys, num_tiles, seen_tiles = find_item(
            item_of(round), batch, TILE_Q, TILE_KV
        )
        token += WHICH * ROWS
        rows_left -= WHICH * ROWS
        position += WHICH * ROWS

        top, total, acc = empty_state(ROWS, TILE_KV, HEAD_DIM)
        if num_tiles > 0:
            mbarrier.wait(q_full, items & 1)
            items += 1
            acc, top, total, passed, turns = attend(
                scores_of, acc, top, total, passed, turns, position, num_keys, num_tiles, seen_tiles, scale_log2,
                q_tile, q_empty, WHICH, tiles, turn, True, WHICH, True,
            )  # fmt: skip

        if rows_left > 0:
            if SINKS:
                acc, top, total = add_sink(acc, top, total, sinks_ptr, head)
            total = gl.where(total > 0, total, 1.0)
            store_rows(acc, total, out_ptr, token, head, rows_left, stride_out_token, stride_out_head, q_tile.dtype)


@gluon.jit(do_not_specialize=PER_BATCH)
def paged_attention_hopper_kernel(
    q_desc,  # [num_tokens, num_heads * head_dim]
    k_desc,  # [slots, num_kv_heads * head_dim]
    v_desc,
    out_ptr,  # [num_tokens, num_heads, head_dim]
    sinks_ptr,  # [num_heads]
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    scale_log2,
    stride_table_seq,
    stride_out_token,
    stride_out_head,
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
    SINKS: gl.constexpr,
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
        cu_seqlens_q_ptr, seq_lens_ptr, num_seqs, num_tokens, num_heads, num_slots, num_halvings,
        max_blocks_per_seq * BLOCK_SIZE, fewest_queries,
    )  # fmt: skip
    results = (out_ptr, sinks_ptr, scale_log2, stride_out_token, stride_out_head)
    tiles = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (consume, (
                q_smem.index(0), q_full.index(0), q_empty, tiles, turn, results, batch, 0, SINKS,
                TILE_Q, TILE_KV, HEAD_DIM,
            )),
            (consume, (
                q_smem.index(1), q_full.index(1), q_empty, tiles, turn, results, batch, 1, SINKS,
                TILE_Q, TILE_KV, HEAD_DIM,
            )),
            (produce, (
                k_desc, k_smem, k_full, k_empty, (q_desc, q_smem, q_full, q_empty), batch, block_table_ptr,
                stride_table_seq, num_blocks, k_rows_per_block, max_blocks_per_seq, group, BLOCK_SIZE, TILE_Q,
            )),
            (produce, (
                v_desc, v_smem, v_full, v_empty, None, batch, block_table_ptr,
                stride_table_seq, num_blocks, v_rows_per_block, max_blocks_per_seq, group, BLOCK_SIZE, TILE_Q,
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
    q_desc = TensorDescriptor(q, [num_tokens, num_heads * head_dim], [q.stride(0), 1], [TILE_Q // 2, head_dim], layout)
    rows_per_block = [cache.stride(0) // cache.stride(1) for cache in (k_cache, v_cache)]
    k_desc, v_desc = (
        TensorDescriptor(
            cache, [(num_blocks - 1) * rows + block_size, num_kv_heads * head_dim], [cache.stride(1), 1],
            [block_size, head_dim], layout,
        )
        for cache, rows in zip((k_cache, v_cache), rows_per_block)
    )  # fmt: skip
    num_slots = num_tokens // TILE_Q + num_seqs
    # A program each for so few items: one that has none, behind a sequence's last tile, makes room at once.
    num_items = num_slots * num_heads
    num_programs = num_items if num_items <= 16 * num_processors(q) else num_processors(q)
    paged_attention_hopper_kernel[(num_programs,)](
        q_desc, k_desc, v_desc, out, sinks, block_table, seq_lens, cu_seqlens_q, scale * LOG2E.value,
        block_table.stride(0), out.stride(0), out.stride(1),
        num_seqs, num_tokens, num_heads, num_heads // num_kv_heads, num_slots, (num_seqs - 1).bit_length(),
        num_blocks, max_blocks_per_seq, *rows_per_block, fewest_queries,
        SINKS=sinks is not None, BLOCK_SIZE=block_size, TILE_Q=TILE_Q, TILE_KV=TILE_KV, HEAD_DIM=head_dim,
        STAGES=NUM_STAGES, LAYOUT=layout, num_warps=4,
    )  # fmt: skip
