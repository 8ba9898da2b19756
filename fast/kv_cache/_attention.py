"""Attention over a cache of small codes: int8, fp8, int4. The schedule is `fast/_triton/paging.py`'s.

A decode over codes is bound by instructions before it is bound by memory, so as few as possible touch a code:

- Codes are loaded as 16-bit *words* and stay in words through shared memory into the registers that the tensor cores
  read. Only there a word becomes bfloat16s, by an instruction or two a code: byte b (and nibble h) of every word is a
  *plane*, with a query and a sum of its own: plane (h, b) of word w is number h * head_dim / 2 + 2 * w + b of a head
  (h only for codes of 4 bits). Nothing is ever interleaved but the one result at the end.
- Nothing is dequantized: a key's scale multiplies its score and a value's scale its weight; the zero of a group enters
  as zero times the sum of the query's numbers there, and zero times the sum of weights.
- Every code is exact in bfloat16, of range enough for any scale. A float32 is the sum of three bfloat16s and a float16
  of two, so wider queries and weights are multiplied in so many parts, and exactly.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast._triton import paging, softmax
from fast._triton.platform import INTERPRETED, INTERPRETING, num_processors
from fast._triton.rounding import dot, to_dtype, to_float32
from fast.attention._checks import require_attention, require_tables

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16s that add up to one number


class Tiles(NamedTuple):
    """How a launch cuts its work."""

    tile_q: int  # rows: queries times the heads of a group
    tile_kv: int
    num_warps: int
    num_stages: int
    programs_per_processor: int
    max_registers: int | None = None  # of a thread


def choose_tiles(num_tokens: int, num_seqs: int, group: int, head_dim: int, parts: int) -> Tiles:
    """By the mean number of rows of a sequence, known from shapes alone: few for decodes, many for chunks."""
    tile_q = max(16, triton.next_power_of_2(group))
    rows = -(-num_tokens // num_seqs) * group
    wide = head_dim > 128 or parts == 3
    if rows <= 32 and tile_q <= 16:
        return Tiles(tile_q, 32 if wide else 64, 4, 4, 2 if wide else 4)
    return Tiles(max(tile_q, 64), 32 if wide else 64, 4, 3, 2)


# ---- codes to numbers -------------------------------------------------------------------------------------------


@triton.constexpr_function
def unpack_asm(codes, byte, nibble):
    """PTX that makes two bfloat16s of one plane of two words. Each begins as the code in the fraction of some power of
    two (fp8: in the exponent too), which is then taken off (fp8: the exponents' bias is multiplied away)."""
    body = {
        # 128 + the lower 7 bits, less 128, or less 256 if the sign bit is set
        "int8": f"""
            mov.b32 c, 0x43434343;
            prmt.b32 x, $1, c, {0x4341 if byte else 0x4240};
            and.b32 y, x, 0xFF80FF80;
            and.b32 x, x, 0xFF7FFF7F;
            mov.b32 c, 0xBF80BF80;
            fma.rn.bf16x2 $0, y, c, x;""",
        # the sign to bit 15, the rest to bits 10 .. 4: that is 2^-120 of the number, subnormals too
        "fp8": f"""
            mov.b32 c, 0;
            prmt.b32 x, $1, c, {0x3414 if byte else 0x2404};
            shr.u32 y, x, 4;
            and.b32 y, y, 0x07F007F0;
            lop3.b32 x, x, 0x80008000, y, 0xEA;
            mov.b32 c, 0x7B807B80;
            mov.b32 y, 0x80008000;
            fma.rn.bf16x2 $0, x, c, y;""",
        # 128 + the nibble, less 128
        "int4": f"""
            shr.u32 x, $1, {8 * byte + 4 * nibble};
            mov.b32 c, 0x43004300;
            lop3.b32 x, x, 0x000F000F, c, 0xEA;
            mov.b32 c, 0x3F803F80;
            mov.b32 y, 0xC300C300;
            fma.rn.bf16x2 $0, x, c, y;""",
    }[codes]
    return "{ .reg .b32 x, y, c;" + body + "}"


@triton.jit
def plane(words, CODES: tl.constexpr, BYTE: tl.constexpr, NIBBLE: tl.constexpr):
    """The codes in one byte (and nibble) of every word, in bfloat16."""
    if INTERPRETED or words.dtype != tl.int16:
        byte = (words.to(tl.int32) >> (8 * BYTE)) & 0xFF
        if CODES == "int8":
            numbers = ((byte ^ 0x80) - 128).to(tl.float32)
        elif CODES == "fp8":
            numbers = to_float32(byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True))
        else:
            numbers = ((byte >> (4 * NIBBLE)) & 15).to(tl.float32)
        codes = numbers.to(tl.bfloat16)
    else:
        asm: tl.constexpr = unpack_asm(CODES, BYTE, NIBBLE)
        codes = tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    return codes


@triton.jit
def in_parts(x, PARTS: tl.constexpr):
    """Float32 numbers as a sum of bfloat16s, the largest first. (The interpreter multiplies float32s as they are.)"""
    if INTERPRETED and PARTS > 1:
        return (x,)
    parts = ()
    for _ in tl.static_range(PARTS):
        part = to_dtype(x, tl.bfloat16)
        x = x - part.to(tl.float32)
        parts = parts + (part,)
    return parts


@triton.jit
def dot_parts(parts, codes, acc, PARTS: tl.constexpr):
    """``acc`` + the sum of the parts @ ``codes``; float32 sums a tile apart, for tensor cores add up by cutting off."""
    tile = tl.zeros(acc.shape, tl.float32) if PARTS == 3 else acc
    for i in tl.static_range(len(parts)):
        tile = dot(parts[len(parts) - 1 - i], codes, tile)
    return acc + tile if PARTS == 3 else tile


# ---- a tile of queries against tiles of keys --------------------------------------------------------------------


@triton.jit
def numbers_of(
    h: tl.constexpr, b: tl.constexpr, HEAD_DIM: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """Which number of the head each word's code in plane (h, b) is; ``HEAD_DIM`` for a word that is none."""
    number = BYTES * tl.arange(0, TILE_WORDS) + b
    return tl.where(number < HEAD_DIM // NIBBLES, h * (HEAD_DIM // NIBBLES) + number, HEAD_DIM)


@triton.constexpr_function
def in_group(h, group, half, group_size, whole):
    """Whether a plane of half h of the head has numbers of a group, or (``whole``) no others."""
    first, stop = h * half, (h + 1) * half
    if whole:
        return first >= group * group_size and stop <= (group + 1) * group_size
    return first < (group + 1) * group_size and stop > group * group_size


@triton.jit
def load_planes(
    q_rows, stride_q_dim, there, HEAD_DIM: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """The queries, cut as the words are: a tile for each plane, in float32."""
    planes = ()
    for h in tl.static_range(NIBBLES):
        for b in tl.static_range(BYTES):
            number = numbers_of(h, b, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
            mask = there[:, None] & (number < HEAD_DIM)[None, :]
            q = tl.load(q_rows[:, None] + number[None, :] * stride_q_dim, mask=mask, other=0.0)
            planes = planes + (q.to(tl.float32),)
    return planes


@triton.jit
def attend_coded_tiles(
    planes, query_positions, start, stop, end, row_ptr, stride_table_block,
    k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, scale, logit_cap, window,
    stride_cache_block, stride_cache_token, stride_scale_block, stride_scale_token, stride_scale_group,
    num_blocks, max_blocks_per_seq,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, CODES: tl.constexpr, PARTS: tl.constexpr, NUM_GROUPS: tl.constexpr,
    BYTES: tl.constexpr, NIBBLES: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """Let tiles ``start`` to ``stop`` of a sequence's keys, those before the token ``end``, pass one KV head's queries.

    A plane meets the groups of scales that it has numbers of: for halves of a head in groups of its size, one each.
    """
    HALF: tl.constexpr = HEAD_DIM // NIBBLES
    GROUP_SIZE: tl.constexpr = HEAD_DIM // NUM_GROUPS
    PLANES: tl.constexpr = NIBBLES * BYTES
    WORDS: tl.constexpr = HALF // BYTES
    ZERO: tl.constexpr = k_zero_ptr is not None
    word, column = tl.arange(0, TILE_WORDS), tl.arange(0, TILE_KV)
    top, total = softmax.empty(TILE_Q)

    queries, sums, accs, zeros = (), (), (), ()
    for g in tl.static_range(NUM_GROUPS):
        group_sum = tl.zeros([TILE_Q], tl.float32)
        for i in tl.static_range(PLANES):
            if in_group(i // BYTES, g, HALF, GROUP_SIZE, False):
                q = planes[i]
                if not in_group(i // BYTES, g, HALF, GROUP_SIZE, True):
                    number = numbers_of(i // BYTES, i % BYTES, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                    q = tl.where((number // GROUP_SIZE == g)[None, :], q, 0.0)
                queries = queries + (in_parts(q, PARTS),)
                if ZERO:
                    group_sum += tl.sum(q, 1)
            else:
                queries = queries + (0,)
        sums, zeros = sums + (group_sum,), zeros + (tl.zeros([TILE_Q], tl.float32),)
    for _ in tl.static_range(PLANES):
        accs = accs + (tl.zeros([TILE_Q, TILE_WORDS], tl.float32),)

    ids = paging.load_block_ids(
        row_ptr, stride_table_block, start * TILE_KV + column, end, num_blocks, max_blocks_per_seq, BLOCK_SIZE
    )
    for tile in range(start, stop):
        keys = tile * TILE_KV + column
        owned = ids >= 0
        block, offset = ids.to(tl.int64), (keys % BLOCK_SIZE).to(tl.int64)
        cache_row = block * stride_cache_block + offset * stride_cache_token
        scale_row = block * stride_scale_block + offset * stride_scale_token
        k_mask, v_mask = owned[None, :], owned[:, None]
        if TILE_WORDS > WORDS:
            k_mask, v_mask = k_mask & (word < WORDS)[:, None], v_mask & (word < WORDS)[None, :]
        k_words = tl.load(k_ptr + cache_row[None, :] + word[:, None], mask=k_mask, other=0)
        v_words = tl.load(v_ptr + cache_row[:, None] + word[None, :], mask=v_mask, other=0)

        scores = tl.zeros([TILE_Q, TILE_KV], tl.float32)
        for g in tl.static_range(NUM_GROUPS):
            part = tl.zeros([TILE_Q, TILE_KV], tl.float32)
            for i in tl.static_range(PLANES):
                if in_group(i // BYTES, g, HALF, GROUP_SIZE, False):
                    codes = plane(k_words, CODES, i % BYTES, i // BYTES)
                    part = dot_parts(queries[g * PLANES + i], codes, part, PARTS)
            k_scale = tl.load(k_scale_ptr + scale_row + g * stride_scale_group, mask=owned, other=0.0)
            scores += part * k_scale.to(tl.float32)[None, :]
            if ZERO:
                k_zero = tl.load(k_zero_ptr + scale_row + g * stride_scale_group, mask=owned, other=0.0)
                scores += sums[g][:, None] * k_zero.to(tl.float32)[None, :]

        scale_log2 = scale * softmax.LOG2E
        if CAPPED:
            scores, scale_log2 = softmax.cap_scores(scores, scale, logit_cap), softmax.LOG2E
        seen = (keys[None, :] <= query_positions[:, None]) & owned[None, :]
        if WINDOWED:
            seen = seen & (keys[None, :] > query_positions[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        top, total, rescale, weights = softmax.update(scores, top, total, scale_log2)

        parts, new_zeros, new_accs = (), (), ()
        for g in tl.static_range(NUM_GROUPS):
            v_scale = tl.load(v_scale_ptr + scale_row + g * stride_scale_group, mask=owned, other=0.0)
            parts = parts + (in_parts(weights * v_scale.to(tl.float32)[None, :], PARTS),)
            if ZERO:
                v_zero = tl.load(v_zero_ptr + scale_row + g * stride_scale_group, mask=owned, other=0.0)
                zero = zeros[g] * rescale + tl.sum(weights * v_zero.to(tl.float32)[None, :], 1)
                new_zeros = new_zeros + (zero,)
        for i in tl.static_range(PLANES):
            acc = accs[i] * rescale[:, None]
            for g in tl.static_range(NUM_GROUPS):
                if in_group(i // BYTES, g, HALF, GROUP_SIZE, True):
                    acc = dot_parts(parts[g], plane(v_words, CODES, i % BYTES, i // BYTES), acc, PARTS)
                elif in_group(i // BYTES, g, HALF, GROUP_SIZE, False):
                    more = dot_parts(parts[g], plane(v_words, CODES, i % BYTES, i // BYTES), acc, PARTS)
                    number = numbers_of(i // BYTES, i % BYTES, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                    acc = tl.where((number // GROUP_SIZE == g)[None, :], more, acc)
            new_accs = new_accs + (acc,)
        accs = new_accs
        if ZERO:
            zeros = new_zeros
        ids = paging.load_block_ids(
            row_ptr, stride_table_block, keys + TILE_KV, end, num_blocks, max_blocks_per_seq, BLOCK_SIZE
        )

    if ZERO:
        with_zeros = ()
        for i in tl.static_range(PLANES):
            acc = accs[i]
            for g in tl.static_range(NUM_GROUPS):
                number = numbers_of(i // BYTES, i % BYTES, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                acc += tl.where((number // GROUP_SIZE == g)[None, :], zeros[g][:, None], 0.0)
            with_zeros = with_zeros + (acc,)
        accs = with_zeros
    return accs, top, total


@triton.jit
def joined(accs, TILE_Q: tl.constexpr, TILE_D: tl.constexpr):
    """One tile of the planes' sums: its column c is word c // planes of plane c % planes."""
    if len(accs) == 1:
        acc = accs[0]
    elif len(accs) == 2:
        acc = tl.join(accs[0], accs[1])
    else:
        acc = tl.join(tl.join(accs[0], accs[2]), tl.join(accs[1], accs[3]))
    return acc.reshape(TILE_Q, TILE_D)


@triton.jit
def coded_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, words]
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups]
    k_zero_ptr,  # likewise, or None
    v_scale_ptr,
    v_zero_ptr,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr,  # the scratch of paging.py
    stats_ptr,
    counters_ptr,
    scale,
    logit_cap,
    window,
    stride_q_token,
    stride_q_head,
    stride_q_dim,
    stride_cache_block,  # of both caches, in words
    stride_cache_token,
    stride_cache_head,
    stride_scale_block,  # of all scales and zeros
    stride_scale_token,
    stride_scale_head,
    stride_scale_group,
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
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BYTES: tl.constexpr,
    NIBBLES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):
    QUERIES: tl.constexpr = TILE_Q // GROUP
    PLANES: tl.constexpr = BYTES * NIBBLES
    program = tl.program_id(0)
    capacity = max_blocks_per_seq * BLOCK_SIZE
    line = paging.total_units(
        seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
        QUERIES, TILE_KV, WINDOWED,
    )  # fmt: skip
    begin, end, num_workers = paging.share_of(program, tl.num_programs(0), line)
    seq, seq_begin = paging.find_sequence(
        begin, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
        QUERIES, TILE_KV, WINDOWED,
    )  # fmt: skip
    column = tl.arange(0, PLANES * TILE_WORDS)
    plane_of, number = column % PLANES, column // PLANES * BYTES + column % BYTES
    half: tl.constexpr = HEAD_DIM // NIBBLES
    dim = tl.where(number < half, plane_of // BYTES * half + number, HEAD_DIM)
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED)
        if unit >= seq_begin + per_head * num_kv_heads:
            seq_begin += per_head * num_kv_heads
            seq += 1
        else:
            kv_head, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED
            )
            if unit < seg_end:
                query, token, head, there = paging.rows_of_tile(tile, kv_head, first_row, num_queries, GROUP, TILE_Q)
                q_rows = q_ptr + token * stride_q_token + head * stride_q_head
                planes = load_planes(q_rows, stride_q_dim, there, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                context = seq_len - num_queries
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                in_cache, in_scales = kv_head.to(tl.int64) * stride_cache_head, kv_head.to(tl.int64) * stride_scale_head
                accs, top, total = attend_coded_tiles(
                    planes, query + context, first_tile + unit - seg_begin,
                    first_tile + tl.minimum(end, seg_end) - seg_begin, last_key,
                    block_table_ptr + seq.to(tl.int64) * stride_table_seq, stride_table_block,
                    k_cache_ptr + in_cache, v_cache_ptr + in_cache,
                    k_scale_ptr + in_scales, None if k_zero_ptr is None else k_zero_ptr + in_scales,
                    v_scale_ptr + in_scales, None if v_zero_ptr is None else v_zero_ptr + in_scales,
                    scale, logit_cap, window, stride_cache_block, stride_cache_token,
                    stride_scale_block, stride_scale_token, stride_scale_group, num_blocks, max_blocks_per_seq,
                    WINDOWED, CAPPED, CODES, PARTS, NUM_GROUPS, BYTES, NIBBLES, BLOCK_SIZE, HEAD_DIM,
                    TILE_Q, TILE_KV, TILE_WORDS,
                )  # fmt: skip
                acc = joined(accs, TILE_Q, PLANES * TILE_WORDS)
                paging.finish_segment(
                    acc, top, total, seg_begin, seg_end, begin, end, line, num_workers, program, parts_ptr,
                    stats_ptr, counters_ptr, out_ptr, sinks_ptr, token, head, there, dim,
                    stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, TILE_Q, PLANES * TILE_WORDS,
                )  # fmt: skip
            unit = tl.minimum(following, end)


# ---- launching --------------------------------------------------------------------------------------------------


def attend_codes(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scales: tuple[Tensor, Tensor],
    zeros: tuple[Tensor, Tensor] | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    codes: str,
    sliding_window: int | None,
    sinks: Tensor | None,
    logit_cap: float | None,
    out: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention over a cache of codes, arrays of which have been checked against each other.

    Grid: as `paged_attention`, with more programs a processor: what waits is hidden by what computes.
    Moves: each sequence's codes, scales and zeros once for each of its tiles of rows; queries and result once.
    Limits: arrays of keys and values should have the same strides, and codes lie end to end; others are copied, all of
    the cache. Words of 16 bits need heads of an even number of bytes; others are loaded a byte at a time, slowly.
    """
    nibbles = 2 if codes == "int4" else 1
    num_blocks, block_size, num_kv_heads, head_bytes = k_cache.shape
    head_dim = head_bytes * nibbles
    stand_in = q.new_empty(()).expand(num_blocks, block_size, num_kv_heads, head_dim)  # for the checks
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    scale = require_attention(op, q, stand_in, stand_in, names=("k_cache", "v_cache"), **options)
    require_tables(op, len(q), num_blocks, block_size, block_table, seq_lens, cu_seqlens_q, sliding_window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if len(q) == 0:
        return out
    q, scale = softmax.positive_scale(q, scale)
    k_cache, v_cache = _alike(k_cache, v_cache, dense=True)
    k_scale, v_scale, k_zero, v_zero = (*_alike(*scales, *(zeros or ())), None, None)[:4]
    bytes_of_word = 2 if all(x % 2 == 0 for x in (head_bytes, k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.stride()[:3])) else 1
    word = tl.int16 if bytes_of_word == 2 else tl.int8

    num_tokens, num_heads, _ = q.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    group = num_heads // num_kv_heads
    tiles = choose_tiles(num_tokens, num_seqs, group, head_dim, PARTS[q.dtype])
    tile_words = max(16, triton.next_power_of_2(head_bytes // bytes_of_word))
    num_programs = 3 if INTERPRETING else num_processors(q) * tiles.programs_per_processor
    scratch = paging.make_scratch(q, num_programs, tiles.tile_q, tile_words * bytes_of_word * nibbles)
    cache_strides = [stride // bytes_of_word for stride in k_cache.stride()[:3]]
    scale_strides = (*k_scale.stride(), 0)[:4]
    coded_attention_kernel[(num_programs,)](
        q, triton.reinterpret(k_cache, word), triton.reinterpret(v_cache, word), k_scale, k_zero, v_scale, v_zero,
        block_table, seq_lens, cu_seqlens_q, sinks, out, *scratch,
        scale, logit_cap or 0.0, sliding_window or 0,
        *q.stride(), *cache_strides, *scale_strides, *block_table.stride(), *out.stride(),
        num_tokens, num_seqs, num_kv_heads, num_blocks, max_blocks_per_seq,
        WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None, CODES=codes, PARTS=PARTS[q.dtype],
        NUM_GROUPS=1 if k_scale.ndim == 3 else k_scale.shape[3], BYTES=bytes_of_word, NIBBLES=nibbles, GROUP=group,
        HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE_Q=tiles.tile_q, TILE_KV=tiles.tile_kv, TILE_WORDS=tile_words,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.max_registers,
    )  # fmt: skip
    return out


def _alike(*arrays: Tensor, dense: bool = False) -> tuple[Tensor, ...]:
    """Arrays of one shape with the same strides (dense: the last of them 1): themselves, or contiguous copies."""
    same = all(array.stride() == arrays[0].stride() for array in arrays[1:])
    return arrays if same and (not dense or arrays[0].stride(-1) == 1) else tuple(array.contiguous() for array in arrays)
