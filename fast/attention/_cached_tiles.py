"""What the kernels of paged attention share: a tile of queries, and the passing of cached keys and values over it."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor as Array

from fast._checks import require_same_device, require_shape
from fast._triton import paging, softmax
from fast._triton.rounding import dot, to_dtype
from fast.attention._checks import require_attention, require_tables

LONGEST_WINDOW = 2**30  # a longer one hides nothing either, and positions plus it stay below 2^31

# Scalars that differ from batch to batch, in kernels that must not be compiled anew for it.
PER_BATCH = [
    "window", "stride_table_seq", "num_tokens", "num_seqs", "num_heads", "num_kv_heads", "num_blocks",
    "max_blocks_per_seq", "split_size",
]  # fmt: skip


@triton.jit
def load_queries(
    q_ptr, token, head, there, stride_q_token, stride_q_head, stride_q_dim,
    WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """The rows of a tile that are there, and zeros."""
    dim = tl.arange(0, TILE_D)
    rows = q_ptr + token * stride_q_token + head * stride_q_head
    in_tile = there[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(rows[:, None] + dim[None, :] * stride_q_dim, mask=in_tile, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    return q


@triton.jit
def tile_ids(span, tile, table, BLOCK_SIZE: tl.constexpr, TILE_KV: tl.constexpr):
    """The block of each key of a tile, -1 for none; load them as soon as they are known: all else waits for them.

    ``span``: the token that tiles are counted from, and the first and last + 1 that may be read. What lies before, the
    window is past, and its block may be another sequence's by now.
    """
    origin, first, end = span
    row_ptr, stride_table_block, num_blocks, max_blocks_per_seq = table
    keys = origin + tile * TILE_KV + tl.arange(0, TILE_KV)
    ids = paging.load_block_ids(row_ptr, stride_table_block, keys, end, num_blocks, max_blocks_per_seq, BLOCK_SIZE)
    return tl.where(keys >= first, ids, -1)


@triton.jit
def attend_cached_tiles(
    q, ids, acc, top, total, query_positions, span, start, stop, table, cache, kv_head, options,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_KV: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Let tiles ``start`` to ``stop`` of keys pass, those of ``tile_ids``.

    A tile gathers from as many blocks as it covers. Their ids are loaded one tile ahead (``ids``: those of the first),
    so that the loads of keys never wait for them. MASKED: some query may not see some key; a key in no block of the
    cache is seen by none.

    Args:
        table: (the sequence's row of the block table, its stride, blocks in the cache, blocks in the row).
        cache: (keys, their strides of block, token, head and dim, values, their strides).
        options: (scale, logit_cap, window).
    """
    k_ptr, stride_k_block, stride_k_token, stride_k_head, stride_k_dim = cache[:5]
    v_ptr, stride_v_block, stride_v_token, stride_v_head, stride_v_dim = cache[5:]
    scale, logit_cap, window = options
    k_head_ptr = k_ptr + kv_head.to(tl.int64) * stride_k_head
    v_head_ptr = v_ptr + kv_head.to(tl.int64) * stride_v_head
    dim = tl.arange(0, TILE_D)
    column = tl.arange(0, TILE_KV)
    for tile in range(start, stop):
        keys = span[0] + tile * TILE_KV + column
        owned = (ids >= 0)[:, None]
        if TILE_D > HEAD_DIM:
            owned = owned & (dim < HEAD_DIM)[None, :]
        block, offset = ids.to(tl.int64), (keys % BLOCK_SIZE).to(tl.int64)
        k_rows = k_head_ptr + block * stride_k_block + offset * stride_k_token
        v_rows = v_head_ptr + block * stride_v_block + offset * stride_v_token
        k = tl.load(k_rows[:, None] + dim[None, :] * stride_k_dim, mask=owned, other=0.0)
        v = tl.load(v_rows[:, None] + dim[None, :] * stride_v_dim, mask=owned, other=0.0)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], TILE_KV], tl.float32))
        scale_log2 = scale * softmax.LOG2E
        if CAPPED:
            scores, scale_log2 = softmax.cap_scores(scores, scale, logit_cap), softmax.LOG2E
        if MASKED:
            seen = (keys[None, :] <= query_positions[:, None]) & (ids >= 0)[None, :]
            if WINDOWED:
                seen = seen & (keys[None, :] > query_positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        top, total, rescale, weights = softmax.update(scores, top, total, scale_log2)
        acc = dot(to_dtype(weights, v.dtype), v, acc * rescale[:, None])
        ids = tile_ids(span, tile + 1, table, BLOCK_SIZE, TILE_KV)
    return acc, top, total


def require_paged(
    op: str,
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    **options: Any,
) -> float:
    """What attention over a cache of plain floats asks of its arguments; returns the scale of the softmax."""
    require_shape(op, "k_cache", k_cache, (None, None, None, None))  # type: ignore[reportArgumentType]
    scale = require_attention(op, q, k_cache, v_cache, names=("k_cache", "v_cache"), **options)
    require_same_device(op, q=q, block_table=block_table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    num_blocks, block_size = k_cache.shape[:2]
    window = options.get("sliding_window")
    require_tables(op, len(q), num_blocks, block_size, block_table, seq_lens, cu_seqlens_q, window)
    return scale
