"""KIVI, in Triton. What the technique is for: `reference/kv_cache/kivi_cache.py`.

Writing takes two launches, because a group is sealed from what its window slots hold, and other programs of the first
launch may write those. Attention runs on the schedule of `fast/_triton/paging.py`: a program takes tiles of keys one
after the other, and reads of each what is old from the codes and what is young from the window.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float16, Int32, Int64, UInt8
from torch import Tensor as Array

from fast._checks import (
    checking_values,
    require,
    require_dtype,
    require_float,
    require_integers,
    require_same_device,
    require_shape,
    require_values,
)
from fast._triton import merging, paging, softmax
from fast._triton.platform import INTERPRETING, next_power_of_2, num_processors
from fast._triton.rounding import clamp, dot
from fast.attention._cached_tiles import LONGEST_WINDOW
from fast.attention._checks import require_attention, require_tables
from fast.kv_cache._codes import FLOAT16_MAX, affine_codes, affine_range
from fast.kv_cache._kivi_decode import decode_attention_kernel, quantized_before
from fast.kv_cache._kivi_products import COLUMNS
from fast.kv_cache._kivi_tile import PAGE, tile_words
from fast.kv_cache.slots import launch_write_kv, require_slots, require_tokens


class KiviArrays(NamedTuple):
    """The arrays of one layer's cache, and what follows from their shapes."""

    k_window: Array
    v_window: Array
    k_cache: Array
    v_cache: Array
    k_scale: Array
    k_zero: Array
    v_scale: Array
    v_zero: Array

    @property
    def bits(self) -> int:
        return 8 * self.k_cache.shape[-1] // self.k_window.shape[-1]

    @property
    def group_size(self) -> int:
        """Tokens of a group of keys."""
        return self.k_cache.shape[1] // self.k_scale.shape[1]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the windows, the codes, the keys' and the values' scales: three each, the last is 1."""
        pairs = self.k_window, self.k_cache, self.k_scale, self.v_scale
        return tuple(stride for array in pairs for stride in array.stride()[:3])


# ---- writing ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_window_slots", "num_slots"])
def _seal_kernel(
    k_window_ptr,  # [num_window_blocks, block_size, num_kv_heads, head_dim]
    v_window_ptr,
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, packed_head_dim]
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, groups_per_block, num_kv_heads, head_dim]
    k_zero_ptr,
    v_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups]
    v_zero_ptr,
    window_slot_mapping_ptr,  # [num_tokens]
    slot_mapping_ptr,
    stride_window_block, stride_window_token, stride_window_head,
    stride_cache_block, stride_cache_token, stride_cache_head,
    stride_k_scale_block, stride_k_scale_group, stride_k_scale_head,
    stride_v_scale_block, stride_v_scale_token, stride_v_scale_head,
    stride_window_slots, stride_slots,
    num_window_slots,
    num_slots,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_PACKED: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    TILE_C: tl.constexpr,
):  # fmt: skip
    """Quantize the group that a token ends, for one KV head."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    window_slot = tl.load(window_slot_mapping_ptr + token * stride_window_slots).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token * stride_slots).to(tl.int64)
    offset = slot % BLOCK_SIZE
    is_there = (slot >= 0) & (slot < num_slots) & (window_slot >= 0) & (window_slot < num_window_slots)
    if is_there & (offset % GROUP_SIZE == GROUP_SIZE - 1) & (window_slot % BLOCK_SIZE == offset):
        PACKED: tl.constexpr = HEAD_DIM * BITS // 8
        LARGEST_CODE: tl.constexpr = 2**BITS - 1
        member = tl.arange(0, TILE_TOKENS)
        in_group = member < GROUP_SIZE
        offsets = offset + 1 - GROUP_SIZE + member
        block = slot // BLOCK_SIZE
        window_rows = window_slot // BLOCK_SIZE * stride_window_block + offsets * stride_window_token
        window_rows += head * stride_window_head
        cache_rows = block * stride_cache_block + offsets * stride_cache_token + head * stride_cache_head
        byte = tl.arange(0, TILE_PACKED)
        in_bytes = in_group[:, None] & (byte < PACKED)[None, :]

        # Keys: a scale for each channel, over the tokens.
        key_scales = block * stride_k_scale_block + offset // GROUP_SIZE * stride_k_scale_group
        key_scales += head * stride_k_scale_head
        packed = tl.zeros([TILE_TOKENS, TILE_PACKED], tl.int32)
        for part in tl.static_range(8 // BITS):
            dim = part * PACKED + byte
            k = tl.load(k_window_ptr + window_rows[:, None] + dim[None, :], mask=in_bytes, other=0.0)
            k = clamp(k.to(tl.float32), FLOAT16_MAX)
            smallest = tl.min(tl.where(in_bytes, k, float("inf")), 0)
            largest = tl.max(tl.where(in_bytes, k, float("-inf")), 0)
            in_head = byte < PACKED
            smallest, largest = tl.where(in_head, smallest, 0.0), tl.where(in_head, largest, 0.0)
            scale, zero = affine_range(smallest, largest, LARGEST_CODE)
            codes = affine_codes(k, tl.broadcast_to(scale[None, :], k.shape), tl.broadcast_to(zero[None, :], k.shape))
            packed |= codes.to(tl.int32) << (part * BITS)
            tl.store(k_scale_ptr + key_scales + dim, scale, mask=in_head)
            tl.store(k_zero_ptr + key_scales + dim, zero, mask=in_head)
        tl.store(k_cache_ptr + cache_rows[:, None] + byte[None, :], packed.to(tl.uint8), mask=in_bytes)

        # Values: a scale for each group of a token's channels.
        CHANNELS: tl.constexpr = HEAD_DIM // NUM_GROUPS
        group, channel = tl.arange(0, TILE_GROUPS), tl.arange(0, TILE_C)
        dim = group[:, None] * CHANNELS + channel[None, :]
        in_head = (group < NUM_GROUPS)[:, None] & (channel < CHANNELS)[None, :]
        in_tile = in_group[:, None, None] & in_head[None, :, :]
        v = tl.load(v_window_ptr + window_rows[:, None, None] + dim[None, :, :], mask=in_tile, other=0.0)
        v = clamp(v.to(tl.float32), FLOAT16_MAX)
        smallest = tl.min(tl.where(in_tile, v, float("inf")), 2)
        largest = tl.max(tl.where(in_tile, v, float("-inf")), 2)
        has_scale = in_group[:, None] & (group < NUM_GROUPS)[None, :]
        smallest, largest = tl.where(has_scale, smallest, 0.0), tl.where(has_scale, largest, 0.0)
        scale, zero = affine_range(smallest, largest, LARGEST_CODE)
        value_scales = block * stride_v_scale_block + offsets * stride_v_scale_token + head * stride_v_scale_head
        tl.store(v_scale_ptr + value_scales[:, None] + group[None, :], scale, mask=has_scale)
        tl.store(v_zero_ptr + value_scales[:, None] + group[None, :], zero, mask=has_scale)

        tl.debug_barrier()  # each number asks for the scale of its group, which other threads have stored
        packed = tl.zeros([TILE_TOKENS, TILE_PACKED], tl.int32)
        for part in tl.static_range(8 // BITS):
            dim = part * PACKED + byte
            v = tl.load(v_window_ptr + window_rows[:, None] + dim[None, :], mask=in_bytes, other=0.0)
            of_group = value_scales[:, None] + (dim // CHANNELS)[None, :]
            scale = tl.load(v_scale_ptr + of_group, mask=in_bytes, other=0.0)
            zero = tl.load(v_zero_ptr + of_group, mask=in_bytes, other=0.0)
            codes = affine_codes(clamp(v.to(tl.float32), FLOAT16_MAX), scale, zero)
            packed |= codes.to(tl.int32) << (part * BITS)
        tl.store(v_cache_ptr + cache_rows[:, None] + byte[None, :], packed.to(tl.uint8), mask=in_bytes)


def write_kv_kivi(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    v_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    k_scale: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    k_zero: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    window_slot_mapping: Int64[Array, " num_tokens"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    """Same contract as `reference.kv_cache.kivi_cache.write_kv_kivi`.

    Grid: one program per token, which owns its window slot; then one per token and KV head, which owns the group that
    the token ends, if it ends one.
    Moves: every key and value once in and once out; of sealed groups the window once in (values twice), codes and
    scales out.
    Limits: arrays for keys and for values have the same strides, the last of them 1.
    """
    op = "write_kv_kivi"
    cache = KiviArrays(k_window, v_window, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    require_tokens(op, k, v, window_slot_mapping, "window_slot_mapping")
    _require_arrays(op, cache)
    require_shape(op, "k", k, (None, *k_window.shape[2:]))
    require_integers(op, "slot_mapping", slot_mapping, (len(k),))
    require_same_device(op, k=k, k_cache=k_cache, slot_mapping=slot_mapping)
    num_slots, num_window_slots = (len(x) * x.shape[1] for x in (k_cache, k_window))
    _require_slots(op, k, v, cache, window_slot_mapping, slot_mapping)
    if k.numel() == 0 or num_window_slots == 0:
        return
    launch_write_kv(k, v, k_window, v_window, window_slot_mapping)
    if num_slots == 0:
        return
    _, block_size, num_kv_heads, head_dim = k_window.shape
    num_groups = v_scale.shape[3]
    _seal_kernel[(len(k), num_kv_heads)](
        *cache, window_slot_mapping, slot_mapping, *cache.strides, window_slot_mapping.stride(0),
        slot_mapping.stride(0), num_window_slots, num_slots,
        BITS=cache.bits, BLOCK_SIZE=block_size, GROUP_SIZE=cache.group_size, HEAD_DIM=head_dim, NUM_GROUPS=num_groups,
        TILE_TOKENS=next_power_of_2(cache.group_size), TILE_PACKED=next_power_of_2(k_cache.shape[3]),
        TILE_GROUPS=next_power_of_2(num_groups), TILE_C=next_power_of_2(head_dim // num_groups),
    )  # fmt: skip


# ---- attention --------------------------------------------------------------------------------------------------


@triton.jit
def attend_old_tiles(
    q, acc, top, total, boundaries, query_positions, start, stop, first, end, row_ptr, stride_table_block,
    k_cache_ptr, v_cache_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, scale, logit_cap, sliding_window,
    stride_cache_block, stride_cache_token, stride_k_scale_block, stride_k_scale_group,
    stride_v_scale_block, stride_v_scale_token, num_blocks, max_blocks_per_seq,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_GROUPS: tl.constexpr, TILE_KV: tl.constexpr,
    TILE_D: tl.constexpr,
):  # fmt: skip
    """Let the tiles of keys from ``start`` to ``stop`` pass that are ``first`` to ``end``, from their codes."""
    PACKED: tl.constexpr = HEAD_DIM * BITS // 8
    dim = tl.arange(0, TILE_D)
    column = tl.arange(0, TILE_KV)
    shift = (dim // PACKED * BITS)[None, :]
    for tile in range(start, stop):
        keys = tile * TILE_KV + column
        ids = paging.load_block_ids(row_ptr, stride_table_block, keys, end, num_blocks, max_blocks_per_seq, BLOCK_SIZE)
        if WINDOWED:
            ids = tl.where(keys >= first, ids, -1)  # the window is past it: its block may be another sequence's by now
        block, offset = ids.to(tl.int64), (keys % BLOCK_SIZE).to(tl.int64)
        owned = (ids >= 0)[:, None] & (dim < HEAD_DIM)[None, :]

        bytes_of = (block * stride_cache_block + offset * stride_cache_token)[:, None] + (dim % PACKED)[None, :]
        k_codes = tl.load(k_cache_ptr + bytes_of, mask=owned, other=0).to(tl.int32) >> shift & (2**BITS - 1)
        of_group = block * stride_k_scale_block + offset // GROUP_SIZE * stride_k_scale_group
        of_keys = of_group[:, None] + dim[None, :]
        k_steps = tl.load(k_scale_ptr + of_keys, mask=owned, other=0.0).to(tl.float32)
        k_zeros = tl.load(k_zero_ptr + of_keys, mask=owned, other=0.0).to(tl.float32)
        k = k_zeros + k_steps * k_codes.to(tl.float32)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], TILE_KV], tl.float32))
        scale_log2 = scale * softmax.LOG2E
        if CAPPED:
            scores, scale_log2 = softmax.cap_scores(scores, scale, logit_cap), softmax.LOG2E
        seen = (keys[None, :] < boundaries[:, None]) & (ids >= 0)[None, :]
        if WINDOWED:
            seen = seen & (keys[None, :] > query_positions[:, None] - sliding_window)
        scores = tl.where(seen, scores, float("-inf"))
        top, total, rescale, weights = softmax.update(scores, top, total, scale_log2)

        v_codes = tl.load(v_cache_ptr + bytes_of, mask=owned, other=0).to(tl.int32) >> shift & (2**BITS - 1)
        of_token = block * stride_v_scale_block + offset * stride_v_scale_token
        of_values = of_token[:, None] + (dim // (HEAD_DIM // NUM_GROUPS))[None, :]
        v_steps = tl.load(v_scale_ptr + of_values, mask=owned, other=0.0).to(tl.float32)
        v_zeros = tl.load(v_zero_ptr + of_values, mask=owned, other=0.0).to(tl.float32)
        v = v_zeros + v_steps * v_codes.to(tl.float32)
        acc = dot(weights, v, acc * rescale[:, None])
    return acc, top, total


@triton.jit
def attend_young_tiles(
    q, acc, top, total, boundaries, query_positions, start, stop, first, end, row_ptr, stride_table_block,
    k_window_ptr, v_window_ptr, scale, logit_cap, sliding_window, stride_window_block, stride_window_token,
    num_blocks, max_blocks_per_seq,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, TILE_KV: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Let the tiles of keys from ``start`` to ``stop`` pass that are ``first`` to ``end``, from the window."""
    dim = tl.arange(0, TILE_D)
    column = tl.arange(0, TILE_KV)
    for tile in range(start, stop):
        keys = tile * TILE_KV + column
        ids = paging.load_block_ids(row_ptr, stride_table_block, keys, end, num_blocks, max_blocks_per_seq, BLOCK_SIZE)
        ids = tl.where(keys >= first, ids, -1)
        block, offset = ids.to(tl.int64), (keys % BLOCK_SIZE).to(tl.int64)
        owned = (ids >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
        cells = (block * stride_window_block + offset * stride_window_token)[:, None] + dim[None, :]
        k = tl.load(k_window_ptr + cells, mask=owned, other=0.0)
        v = tl.load(v_window_ptr + cells, mask=owned, other=0.0)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], TILE_KV], tl.float32))
        scale_log2 = scale * softmax.LOG2E
        if CAPPED:
            scores, scale_log2 = softmax.cap_scores(scores, scale, logit_cap), softmax.LOG2E
        seen = (keys[None, :] >= boundaries[:, None]) & (keys[None, :] <= query_positions[:, None])
        seen = seen & (ids >= 0)[None, :]
        if WINDOWED:
            seen = seen & (keys[None, :] > query_positions[:, None] - sliding_window)
        scores = tl.where(seen, scores, float("-inf"))
        top, total, rescale, weights = softmax.update(scores, top, total, scale_log2)
        acc = dot(weights.to(v.dtype), v, acc * rescale[:, None])
    return acc, top, total


@triton.jit
def _attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_window_ptr,  # [num_window_blocks, block_size, num_kv_heads, head_dim]
    v_window_ptr,
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, packed_head_dim]
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, groups_per_block, num_kv_heads, head_dim]
    k_zero_ptr,
    v_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups]
    v_zero_ptr,
    window_block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    block_table_ptr,
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr, stats_ptr, counters_ptr,  # the scratch of merging.py
    window,
    scale,
    logit_cap,
    sliding_window,
    stride_q_token, stride_q_head, stride_q_dim,
    stride_window_block, stride_window_token, stride_window_head,
    stride_cache_block, stride_cache_token, stride_cache_head,
    stride_k_scale_block, stride_k_scale_group, stride_k_scale_head,
    stride_v_scale_block, stride_v_scale_token, stride_v_scale_head,
    stride_window_table_seq, stride_window_table_block,
    stride_table_seq, stride_table_block,
    stride_out_token, stride_out_head, stride_out_dim,
    num_tokens,
    num_seqs,
    num_kv_heads,
    num_window_blocks,
    num_blocks,
    max_blocks_per_seq,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TILE_D: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = TILE_Q // GROUP
    program = tl.program_id(0)
    capacity = max_blocks_per_seq * BLOCK_SIZE
    line, num_workers, begin, end, seq, seq_begin = paging.find_share(
        program, tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads,
        sliding_window, QUERIES, TILE_KV, WINDOWED,
    )  # fmt: skip
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
        per_head, width = paging.units_per_head(num_queries, seq_len, sliding_window, QUERIES, TILE_KV, WINDOWED)
        if unit >= seq_begin + per_head * num_kv_heads:
            seq_begin += per_head * num_kv_heads
            seq += 1
        else:
            kv_head, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, sliding_window, QUERIES, TILE_KV, WINDOWED
            )
            if unit < seg_end:
                query, token, head, there = paging.rows_of_tile(tile, kv_head, first_row, num_queries, GROUP, TILE_Q)
                q_rows = q_ptr + token * stride_q_token + head * stride_q_head
                in_tile = there[:, None] & (dim < HEAD_DIM)[None, :]
                q = tl.load(q_rows[:, None] + dim[None, :] * stride_q_dim, mask=in_tile, other=0.0).to(tl.float32)
                context = seq_len - num_queries
                positions = query + context
                boundaries = quantized_before(positions, window, GROUP_SIZE)
                oldest = paging.oldest_key(context + tile * QUERIES, sliding_window, WINDOWED)
                first_young = tl.maximum(quantized_before(context + tile * QUERIES, window, GROUP_SIZE), oldest)
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                end_old = quantized_before(last_key - 1, window, GROUP_SIZE)

                start = first_tile + unit - seg_begin
                stop = first_tile + tl.minimum(end, seg_end) - seg_begin
                table_row = block_table_ptr + seq.to(tl.int64) * stride_table_seq
                window_table_row = window_block_table_ptr + seq.to(tl.int64) * stride_window_table_seq
                head64 = kv_head.to(tl.int64)
                top, total = softmax.empty(TILE_Q)
                acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
                acc, top, total = attend_old_tiles(
                    q, acc, top, total, boundaries, positions, start,
                    tl.minimum(stop, (end_old + TILE_KV - 1) // TILE_KV), oldest, end_old,
                    table_row, stride_table_block,
                    k_cache_ptr + head64 * stride_cache_head, v_cache_ptr + head64 * stride_cache_head,
                    k_scale_ptr + head64 * stride_k_scale_head, k_zero_ptr + head64 * stride_k_scale_head,
                    v_scale_ptr + head64 * stride_v_scale_head, v_zero_ptr + head64 * stride_v_scale_head,
                    scale, logit_cap, sliding_window, stride_cache_block, stride_cache_token,
                    stride_k_scale_block, stride_k_scale_group, stride_v_scale_block, stride_v_scale_token,
                    num_blocks, max_blocks_per_seq,
                    WINDOWED, CAPPED, BITS, BLOCK_SIZE, GROUP_SIZE, HEAD_DIM, NUM_GROUPS, TILE_KV, TILE_D,
                )  # fmt: skip
                acc, top, total = attend_young_tiles(
                    q, acc, top, total, boundaries, positions, tl.maximum(start, first_young // TILE_KV), stop,
                    first_young, last_key, window_table_row, stride_window_table_block,
                    k_window_ptr + head64 * stride_window_head, v_window_ptr + head64 * stride_window_head,
                    scale, logit_cap, sliding_window, stride_window_block, stride_window_token,
                    num_window_blocks, max_blocks_per_seq,
                    WINDOWED, CAPPED, True, BLOCK_SIZE, HEAD_DIM, TILE_KV, TILE_D,
                )  # fmt: skip
                merging.finish_segment(
                    acc, top, total, seg_begin, seg_end, begin, end, line, num_workers, program, parts_ptr,
                    stats_ptr, counters_ptr, out_ptr, sinks_ptr, token, head, there, dim,
                    stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, TILE_Q, TILE_D,
                )  # fmt: skip
            unit = tl.minimum(following, end)


class Tiles(NamedTuple):
    """How a launch cuts its work."""

    tile_q: int  # rows: queries times the heads of a group
    tile_kv: int
    num_warps: int
    programs_per_processor: int


def choose_tiles(num_tokens: int, num_seqs: int, group: int, head_dim: int) -> Tiles:
    """By the mean number of rows of a sequence, known from shapes alone: few for decodes, many for chunks."""
    rows = max(-(-num_tokens // num_seqs) * group, next_power_of_2(group), 16)
    return Tiles(max(16 if rows <= 16 else 32, next_power_of_2(group)), 16 if head_dim > 128 else 32, 4, 2)


# Of the kernel for decodes: three warps on each scheduler, and as many registers as that leaves a thread; none spill.
WARPS_PER_PROCESSOR = 12
MAX_REGISTERS = 168
STATIC_MEMORY = 48 * 1024 - 256  # bytes of shared memory that a kernel may declare, less what Triton adds


class DecodeTiles(NamedTuple):
    """How a launch of the kernel for decodes cuts its work."""

    queries: int  # of a sequence that a program takes together
    columns: int  # for them and the heads of a group
    heads: int  # KV heads, a warp each
    stages: int  # tiles of keys in a warp's memory, one of them being read


def choose_decode(
    num_tokens: int, num_seqs: int, group: int, dtype: torch.dtype, q_stride_dim: int, cache: KiviArrays
) -> DecodeTiles | None:
    """How the kernel for decodes takes a batch; None if it does not.

    It takes two-byte floats, a head of pieces of 32 channels, each of one group of values, and keys 16 at a time, all
    of one group of keys; and batches in which the mean sequence has no more rows than a product has columns.
    """
    head_dim = cache.k_window.shape[3]
    num_groups = cache.v_scale.shape[3]
    whole = cache.k_cache.shape[3] % 32 == 0 and head_dim <= 128 and cache.group_size % PAGE.value == 0
    grouped = num_groups % 2 == 0 and head_dim % (32 * num_groups) == 0
    if not (whole and grouped and dtype in (torch.bfloat16, torch.float16) and dtype == cache.k_window.dtype):
        return None
    if num_tokens * group > COLUMNS.value * num_seqs or q_stride_dim != 1:
        return None
    most_queries = max(-(-num_tokens // num_seqs), 1)
    columns = COLUMNS.value if most_queries * group > COLUMNS.value // 2 else COLUMNS.value // 2
    num_kv_heads = cache.k_cache.shape[2]
    heads = 4 if num_kv_heads % 4 == 0 else 2 if num_kv_heads % 2 == 0 else 1
    tile = 4 * heads * tile_words(cache.bits, head_dim // 32, cache.group_size)
    return DecodeTiles(1 if most_queries == 1 else columns // group, columns, heads, min(3, STATIC_MEMORY // tile))


def loads_whole_words(q: Array, cache: KiviArrays) -> bool:
    """Whether everything lies where the kernel for decodes loads it: many bytes at once, blocks not too far apart."""
    token_scales = 2 * cache.v_scale.shape[3]
    aligned = (q, 16), (cache.k_window, 16), (cache.v_window, 16), (cache.k_cache, 16), (cache.v_cache, 16)
    aligned += (cache.k_scale, 16), (cache.k_zero, 16), (cache.v_scale, token_scales), (cache.v_zero, token_scales)
    return all(
        x.data_ptr() % size == 0 and all(stride * x.element_size() % size == 0 for stride in x.stride()[:-1])
        for x, size in aligned
    ) and all(0 <= stride < 2**31 for x in cache for stride in x.stride())


def _decode(
    q: Array,
    cache: KiviArrays,
    window_block_table: Array,
    block_table: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    tiles: DecodeTiles,
    *,
    window: int,
    scale: float,
    sliding_window: int | None,
    sinks: Array | None,
    logit_cap: float | None,
    out: Array,
) -> None:
    """Launch the kernel for decodes."""
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, _ = cache.k_cache.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    group = num_heads // num_kv_heads
    num_bundles = num_kv_heads // tiles.heads
    at_a_time = num_processors(q) * (WARPS_PER_PROCESSOR // tiles.heads)
    num_programs = num_bundles * (2 if INTERPRETING else max(at_a_time // num_bundles, 1))
    scratch = merging.make_scratch(q, num_programs, tiles.heads * COLUMNS.value, head_dim)
    words = [triton.reinterpret(x, tl.int32) for x in (q, *cache)]
    strided = q, cache.k_window, cache.k_cache, cache.k_scale, cache.v_scale
    strides = [stride * x.element_size() // 4 for x in strided for stride in x.stride()[:-1]]
    decode_attention_kernel[(num_programs,)](
        *words, window_block_table, block_table, seq_lens, cu_seqlens_q,
        sinks, out, *scratch, min(window, LONGEST_WINDOW), scale, logit_cap or 0.0,
        min(sliding_window or 0, LONGEST_WINDOW), *strides, *window_block_table.stride(), *block_table.stride(),
        *out.stride(), num_tokens, num_seqs, num_bundles, len(cache.k_window), num_blocks,
        max_blocks_per_seq,
        WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None,
        DTYPE=tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float16, BITS=cache.bits, GROUP=group,
        PIECES=head_dim // 32, BLOCK_SIZE=block_size, GROUP_SIZE=cache.group_size, NUM_GROUPS=cache.v_scale.shape[3],
        QUERIES=tiles.queries, COLS=tiles.columns, ROWS=next_power_of_2(tiles.queries * group), HEADS=tiles.heads,
        STAGES=tiles.stages, num_warps=tiles.heads, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def paged_attention_kivi(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    v_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    k_scale: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    k_zero: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    window_block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    seq_lens: Int32[Array, " num_seqs"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    *,
    window: int,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Same contract as `reference.kv_cache.kivi_cache.paged_attention_kivi`.

    Grid: as `paged_attention`'s, a persistent one over equal shares of all tiles of keys.
    Moves: for each tile of queries the codes and scales of its old keys once, and its young ones in full.
    Limits: arrays for keys and for values have the same strides, the last of them 1. Decodes that `choose_decode` names
    have a kernel of their own; of the rest everything is multiplied in float32, without tensor cores: that saves
    memory, not time.
    """
    op = "paged_attention_kivi"
    cache = KiviArrays(k_window, v_window, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    _require_arrays(op, cache)
    require(window >= 0, op, "window", "at least 0", window)
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    scale = require_attention(op, q, k_window, v_window, names=("k_window", "v_window"), **options)
    tables = block_table, seq_lens, cu_seqlens_q
    require_tables(op, len(q), *k_cache.shape[:2], *tables, sliding_window)
    require_integers(op, "window_block_table", window_block_table, tuple(block_table.shape))
    require_same_device(op, q=q, k_cache=k_cache, block_table=block_table, window_block_table=window_block_table)
    if checking_values():
        _require_window_blocks(op, cache, window_block_table, seq_lens, cu_seqlens_q, window, sliding_window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if len(q) == 0:
        return out
    q, scale = softmax.positive_scale(q, scale)
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    group = num_heads // num_kv_heads
    decode = choose_decode(num_tokens, num_seqs, group, q.dtype, q.stride(2), cache)
    options = {"sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap}
    may_decode = bool(num_blocks and len(k_window) and max_blocks_per_seq)  # it reads some block for every sequence
    if decode is not None and may_decode and loads_whole_words(q, cache):
        _decode(q, cache, window_block_table, *tables, decode, window=window, scale=scale, out=out, **options)
        return out
    tiles = choose_tiles(num_tokens, num_seqs, group, head_dim)
    tile_d = max(16, next_power_of_2(head_dim))
    num_programs = 3 if INTERPRETING else num_processors(q) * tiles.programs_per_processor
    scratch = merging.make_scratch(q, num_programs, tiles.tile_q, tile_d)
    _attention_kernel[(num_programs,)](
        q, *cache, window_block_table, block_table, seq_lens, cu_seqlens_q, sinks, out, *scratch,
        min(window, LONGEST_WINDOW), scale, logit_cap or 0.0, min(sliding_window or 0, LONGEST_WINDOW),
        *q.stride(), *cache.strides, *window_block_table.stride(), *block_table.stride(), *out.stride(),
        num_tokens, num_seqs, num_kv_heads, len(k_window), num_blocks, max_blocks_per_seq,
        WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None, BITS=cache.bits, GROUP=group,
        HEAD_DIM=head_dim, BLOCK_SIZE=block_size, GROUP_SIZE=cache.group_size, NUM_GROUPS=v_scale.shape[3],
        TILE_Q=tiles.tile_q, TILE_KV=tiles.tile_kv, TILE_D=tile_d, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out


# ---- the door ---------------------------------------------------------------------------------------------------


def _require_arrays(op: str, cache: KiviArrays) -> None:
    """The arrays agree with each other."""
    require_shape(op, "k_window", cache.k_window, (None, None, None, None))
    _, block_size, num_kv_heads, head_dim = cache.k_window.shape
    require_shape(op, "k_cache", cache.k_cache, (None, block_size, num_kv_heads, None))
    num_blocks, _, _, packed_head_dim = cache.k_cache.shape
    fits = head_dim in (2 * packed_head_dim, 4 * packed_head_dim)
    require(fits, op, "k_cache", f"half or a quarter of head_dim {head_dim} in bytes", packed_head_dim)
    require_shape(op, "k_scale", cache.k_scale, (num_blocks, None, num_kv_heads, head_dim))
    require_shape(op, "v_scale", cache.v_scale, (num_blocks, block_size, num_kv_heads, None))
    require_float(op, "k_window", cache.k_window)
    for first, second in (
        ("k_window", "v_window"),
        ("k_cache", "v_cache"),
        ("k_scale", "k_zero"),
        ("v_scale", "v_zero"),
    ):
        a, b = getattr(cache, first), getattr(cache, second)
        require_shape(op, second, b, a.shape)
        require(a.dtype == b.dtype, op, second, f"the dtype of {first}, {a.dtype}", b.dtype)
        alike = a.stride() == b.stride() and (a.stride(3) == 1 or a.shape[3] == 1)
        require(alike or a.numel() == 0, op, second, f"the strides of {first}, {a.stride()}, the last 1", b.stride())
    for argument, dtype in (("k_cache", torch.uint8), ("k_scale", torch.float16), ("v_scale", torch.float16)):
        require_dtype(op, argument, getattr(cache, argument), dtype)
    for argument, whole, parts in (
        ("k_scale", block_size, cache.k_scale.shape[1]),
        ("v_scale", head_dim, cache.v_scale.shape[3]),
    ):
        divides = parts > 0 and whole % parts == 0
        require(divides, op, argument, f"a number of groups that divides {whole}", parts)
    require_same_device(op, **cache._asdict())


def _require_slots(op: str, k: Array, v: Array, cache: KiviArrays, window_slots: Array, slots: Array) -> None:
    """When checking: slots that exist and agree with each other, and finite tokens in them."""
    if not checking_values():
        return
    num_slots, num_window_slots = (len(x) * x.shape[1] for x in (cache.k_cache, cache.k_window))
    require_slots(op, "window_slot_mapping", window_slots, num_window_slots)
    require_slots(op, "slot_mapping", slots, num_slots)
    block_size = max(cache.k_cache.shape[1], 1)
    alike = ((slots < 0) == (window_slots < 0)) & ((slots < 0) | (slots % block_size == window_slots % block_size))
    expected = "-1 and offsets within blocks as in window_slot_mapping"
    require_values(alike.all(), op, "slot_mapping", expected, slots.tolist())
    for argument, x in (("k", k), ("v", v)):
        is_finite = torch.isfinite(x[slots >= 0]).all()
        require_values(is_finite, op, argument, "finite values where there is a slot", "inf or NaN")


def _require_window_blocks(
    op: str,
    cache: KiviArrays,
    table: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    window: int,
    sliding_window: int | None,
) -> None:
    """When checking: every token that a query reads in full has a block of the window's pool."""
    num_blocks, block_size = cache.k_window.shape[:2]
    for row, length, queries in zip(table.tolist(), seq_lens.tolist(), cu_seqlens_q.diff().tolist()):
        if length and queries:
            first_query = length - queries
            first = max(first_query + 1 - window, 0) // cache.group_size * cache.group_size
            oldest = 0 if sliding_window is None else max(0, first_query + 1 - sliding_window)
            read = row[max(first, oldest) // block_size : -(-length // block_size)]
            wanted = f"a block in [0, {num_blocks}) for every token that a query reads in full"
            inside = all(0 <= block < num_blocks for block in read)
            require(inside, op, "window_block_table", wanted, row)
