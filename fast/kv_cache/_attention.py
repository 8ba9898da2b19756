"""Attention over a cache of small codes: int8, fp8, int4. The schedule is `fast/_triton/paging.py`'s.

A decode over codes is bound by instructions before it is bound by memory, so as few as possible touch a code:

- Codes are loaded as 16-bit *words* and stay in words through shared memory into the registers that the tensor cores
  read. Only there a word becomes float16s, by about an instruction a code: byte b (and nibble h) of every word is a
  *plane*, with a query and a sum of its own: plane (h, b) of word w is number h * head_dim / 2 + 2 * w + b of a head
  (h only for codes of 4 bits). Nothing is ever interleaved but the one result at the end.
- Bits at the bottom of a float16's fraction are a subnormal number, which the tensor cores multiply exactly: a code
  needs no conversion, only its neighbours masked. The factor, 2^-24 or so, is taken back with the scales.
- Nothing is dequantized: a key's scale multiplies its score and a value's scale its weight; the zero of a group enters
  as zero times the sum of the query's numbers there, and zero times the sum of weights.
- Tiles are turned, keys times queries, so that a decode's few queries are the short side of a tile (8), and a warp
  has a KV head to itself and waits for no other.

What is multiplied with codes is float16, whatever the dtypes: queries divided by a power of two near their row's
largest number, and weights times scales divided by one near the largest of those so far. (Float16 has 11 bits down to
2^-28 of the largest, and below it steps of 2^-39 of it.) For float32 it is the sum of two float16s.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast._triton import paging, softmax
from fast._triton.platform import INTERPRETED, INTERPRETING, num_processors
from fast._triton.rounding import dot
from fast.attention._checks import require_attention, require_tables

PARTS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2}  # float16s that add up to one number
LONGEST_WINDOW = 1 << 30  # positions are int32
HEADROOM = tl.constexpr(14)  # weights times scales are less than 2^15


class Tiles(NamedTuple):
    """How a launch cuts its work."""

    heads: int  # KV heads that a program takes together
    queries: int  # of a sequence that it takes together
    tile_q: int  # rows of each KV head: at least the queries times the heads of a group
    tile_kv: int
    num_warps: int
    num_stages: int
    programs_per_processor: int
    max_registers: int | None = None  # of a thread


def choose_tiles(num_tokens: int, num_seqs: int, group: int, num_kv_heads: int, head_dim: int, parts: int) -> Tiles:
    """By the mean number of rows of a sequence, known from shapes alone: few for decodes, many for chunks.

    A decode takes up to four KV heads together, a warp each: a warp that has a head to itself never waits for another
    one's maximum or weights, and the scales of neighbouring heads share sectors.
    """
    rows = triton.next_power_of_2(-(-num_tokens // max(num_seqs, 1)) * group)
    tile_q = max(min(max(rows, 8), 16), triton.next_power_of_2(group))
    heads = 4 if num_kv_heads % 4 == 0 else 2 if num_kv_heads % 2 == 0 else 1
    queries = 1 if num_tokens <= num_seqs else tile_q // group
    tile_kv = 16 if head_dim > 128 or parts == 2 else 32
    return Tiles(heads, queries, tile_q, tile_kv, heads, 5, 8 // heads)


# ---- codes to numbers -------------------------------------------------------------------------------------------


@triton.constexpr_function
def unpack_asm(codes, byte, nibble):
    """PTX that makes two float16s of one plane of two words: the codes times ``2 ** -exponent_of(codes, nibble)``."""
    lower = "shr.u32 x, $1, 8;" if byte else "mov.b32 x, $1;"
    body = {
        # offset by 128, without its sign: a subnormal number, from which the offset is taken again
        "int8": f"{lower} mov.b32 y, 0x00800080; lop3.b32 x, x, 0x00FF00FF, y, 0x6A;"
        "mov.b32 y, 0x80808080; add.f16x2 $0, x, y;",
        # the sign to bit 15, exponent and fraction to bits 13 .. 7: as a float16, with another bias
        "fp8": "shr.u32 y, $1, 1; and.b32 y, y, 0x3F803F80; lop3.b32 $0, $1, 0x80008000, y, 0xEA;"
        if byte
        else "shl.b32 y, $1, 7; and.b32 y, y, 0x3F803F80; shl.b32 x, $1, 8; lop3.b32 $0, x, 0x80008000, y, 0xEA;",
        "int4": f"{lower} and.b32 $0, x, {0xF000F0 if nibble else 0xF000F};",
    }[codes]
    return "{ .reg .b32 x, y; " + body + " }"


@triton.constexpr_function
def exponent_of(codes, nibble):
    """A plane holds codes times 2 to the minus this."""
    return {"int8": 24, "fp8": 8, "int4": 20 if nibble else 24}[codes]


@triton.jit
def plane(words, CODES: tl.constexpr, BYTE: tl.constexpr, NIBBLE: tl.constexpr):
    """The codes in one byte (and nibble) of every word, in float16, times a power of two."""
    if INTERPRETED or words.dtype != tl.int16:
        byte = (words.to(tl.int32) >> (8 * BYTE)) & 0xFF
        if CODES == "fp8":  # by its bits too, for which NaN is a number: what nobody owns must stay one
            bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
            codes = bits.to(tl.uint16).to(tl.float16, bitcast=True)
        else:
            numbers = (byte ^ 0x80) - 128 if CODES == "int8" else (byte >> (4 * NIBBLE)) & 15
            codes = (numbers.to(tl.float32) * 2.0 ** -exponent_of(CODES, NIBBLE)).to(tl.float16)
    else:
        asm: tl.constexpr = unpack_asm(CODES, BYTE, NIBBLE)
        codes = tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    return codes


@triton.jit
def in_parts(x, PARTS: tl.constexpr):
    """Float32 numbers as a sum of float16s, the largest first."""
    parts = ()
    for _ in tl.static_range(PARTS):
        part = x.to(tl.float16)
        x = x - part.to(tl.float32)
        parts = parts + (part,)
    return parts


@triton.jit
def dot_parts(codes, parts, acc, PARTS: tl.constexpr):
    """``acc + codes @ (the sum of the parts)``; float32 sums a tile apart, for tensor cores add up by cutting off."""
    tile = tl.zeros(acc.shape, tl.float32) if PARTS == 2 else acc
    for i in tl.static_range(PARTS):
        tile = dot(codes, parts[PARTS - 1 - i], tile)
    return acc + tile if PARTS == 2 else tile


@triton.jit
def power_of_two(x, LOWEST: tl.constexpr):
    """The largest power of two that is not above ``x`` (float32, >= 0), at least 2^LOWEST; and its bits."""
    bits = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, (127 + LOWEST) << 23)
    return bits.to(tl.float32, bitcast=True), bits


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


@triton.constexpr_function
def pages_of(tile_kv, block_size):
    """The blocks that a tile of keys covers; 0 if that depends on the tile."""
    return tile_kv // block_size if tile_kv % block_size == 0 else int(block_size % tile_kv == 0)


@triton.jit
def load_planes(
    q_rows, stride_q_dim, there, HEAD_DIM: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr,
    HEADS: tl.constexpr, TILE_Q: tl.constexpr, TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """The queries, cut as the words are, in columns, each query divided by a power of two so that float16 holds it; and
    that power. (They are below 2^11, and 16 times as large where a plane's codes are 16 times smaller than the others.)
    """
    HALF: tl.constexpr = HEAD_DIM // NIBBLES
    number = tl.arange(0, BYTES * TILE_WORDS)[None, None, :]
    halves, largest = (), tl.zeros([HEADS, TILE_Q], tl.float32)
    for h in tl.static_range(NIBBLES):
        mask = there[:, :, None] & (number < HALF)
        q = tl.load(q_rows[:, :, None] + (h * HALF + number) * stride_q_dim, mask=mask, other=0.0).to(tl.float32)
        halves, largest = halves + (q,), tl.maximum(largest, tl.max(tl.abs(q), 2))
    unit, bits = power_of_two(largest, -110)
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True) * 1024.0
    planes = ()
    for h in tl.static_range(NIBBLES):
        q = halves[h] * (inverse * (16.0 if h < NIBBLES - 1 else 1.0))[:, :, None]
        if BYTES == 2:
            low, high = tl.split(q.reshape(HEADS, TILE_Q, TILE_WORDS, 2))
            planes = planes + (tl.permute(low, (0, 2, 1)), tl.permute(high, (0, 2, 1)))
        else:
            planes = planes + (tl.permute(q, (0, 2, 1)),)
    return planes, unit * (1 / 1024.0)


@triton.jit
def load_scales(ptrs, mask, NUM_GROUPS: tl.constexpr, stride_group, PAIRED: tl.constexpr):
    """The scales, or zeros, of each group in float32. PAIRED: two float16s are loaded as one 32-bit number, because
    what is narrower cannot be loaded ahead."""
    scales = ()
    if PAIRED:
        for pair in tl.static_range(NUM_GROUPS // 2):
            both = tl.load(ptrs + pair, mask=mask, other=0)
            for half in tl.static_range(2):
                bits = ((both >> (16 * half)) & 0xFFFF).to(tl.uint16)
                scales = scales + (bits.to(tl.float16, bitcast=True).to(tl.float32),)
    else:
        for g in tl.static_range(NUM_GROUPS):
            scales = scales + (tl.load(ptrs + g * stride_group, mask=mask, other=0.0).to(tl.float32),)
    return scales


@triton.jit
def attend_coded_tiles(
    planes, q_unit, query_positions, start, stop, end, row_ptr, stride_table_block,
    k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, scale, logit_cap, window,
    stride_cache_block, stride_cache_token, stride_cache_head,
    stride_scale_block, stride_scale_token, stride_scale_head, stride_scale_group,
    num_blocks,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, CODES: tl.constexpr, PARTS: tl.constexpr, NUM_GROUPS: tl.constexpr,
    PAIRED: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """Let tiles ``start`` to ``stop`` of a sequence's keys, those before the token ``end``, pass HEADS KV heads'
    queries.

    A plane meets the groups of scales that it has numbers of: for halves of a head in groups of its size, one each.
    """
    PLANES: tl.constexpr = NIBBLES * BYTES
    HALF: tl.constexpr = HEAD_DIM // NIBBLES
    GROUP_SIZE: tl.constexpr = HEAD_DIM // NUM_GROUPS
    PAGES: tl.constexpr = pages_of(TILE_KV, BLOCK_SIZE)
    ZERO: tl.constexpr = k_zero_ptr is not None
    word, column = tl.arange(0, TILE_WORDS), tl.arange(0, TILE_KV)
    in_head = (word < HALF // BYTES)[None, None, :]
    head = tl.arange(0, HEADS).to(tl.int64)
    head_words = head[:, None, None] * stride_cache_head + word[None, None, :]
    head_scales = head[:, None] * stride_scale_head
    top = tl.full([HEADS, TILE_Q], float("-inf"), tl.float32)
    totals = tl.zeros([HEADS, TILE_KV, TILE_Q], tl.float32)  # added up over the keys at the end
    largest = tl.zeros([HEADS, TILE_Q], tl.float32)  # weight times scale so far
    v_unit, _ = power_of_two(largest, -100)
    K_UNIT: tl.constexpr = 2.0 ** exponent_of(CODES, NIBBLES - 1)
    if CAPPED:
        scale_log2 = tl.full(q_unit.shape, softmax.LOG2E, tl.float32)
    else:
        scale_log2 = q_unit * (scale * softmax.LOG2E * K_UNIT)

    queries, sums, accs, zeros = (), (), (), ()
    for g in tl.static_range(NUM_GROUPS):
        group_sum = tl.zeros([HEADS, TILE_Q], tl.float32)
        for i in tl.static_range(PLANES):
            if in_group(i // BYTES, g, HALF, GROUP_SIZE, False):
                q = planes[i]
                if not in_group(i // BYTES, g, HALF, GROUP_SIZE, True):
                    number = numbers_of(i // BYTES, i % BYTES, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                    q = tl.where((number // GROUP_SIZE == g)[None, :, None], q, 0.0)
                queries = queries + (in_parts(q, PARTS),)
                if ZERO:  # of the queries as they are multiplied, in units of K_UNIT
                    group_sum += tl.sum(q, 1) * (16.0 ** (i // BYTES - (NIBBLES - 1)) / K_UNIT)
            else:
                queries = queries + (0,)
        sums, zeros = sums + (group_sum,), zeros + (tl.zeros([HEADS, 16, TILE_Q], tl.float32),)
    for _ in tl.static_range(PLANES):
        accs = accs + (tl.zeros([HEADS, TILE_WORDS, TILE_Q], tl.float32),)

    for tile in range(start, stop):
        keys = tile * TILE_KV + column
        # Codes are numbers whatever they are, and weigh nothing where the mask is. So every key may read some block,
        # and loads that need no mask are fewer instructions; only scales can be NaN, and are masked.
        if PAGES > 0:  # scalars, of which there are few
            valid, block_words = tl.zeros([TILE_KV], tl.int32), tl.zeros([TILE_KV], tl.int64)
            block_scales = block_words
            for page in tl.static_range(PAGES):
                index = (tile * TILE_KV + page * BLOCK_SIZE) // BLOCK_SIZE
                block_id = tl.load(row_ptr + index * stride_table_block, mask=index * BLOCK_SIZE < end, other=-1)
                known = (block_id >= 0) & (block_id < num_blocks)
                block = tl.where(known, block_id, 0).to(tl.int64)
                here = (column >= page * BLOCK_SIZE) & (column < (page + 1) * BLOCK_SIZE)
                block_words = tl.where(here, block * stride_cache_block, block_words)
                block_scales = tl.where(here, block * stride_scale_block, block_scales)
                valid = tl.where(here, known.to(tl.int32), valid)
            owned = (keys < end) & (valid > 0)
            offset = column % BLOCK_SIZE
            if BLOCK_SIZE > TILE_KV:
                offset = offset + tile * TILE_KV % BLOCK_SIZE
        else:
            ids = tl.load(row_ptr + keys // BLOCK_SIZE * stride_table_block, mask=keys < end, other=0).to(tl.int32)
            owned = (keys < end) & (ids.to(tl.uint32) < num_blocks)
            block = tl.where(owned, ids, 0).to(tl.int64)
            block_words, block_scales = block * stride_cache_block, block * stride_scale_block
            offset = keys % BLOCK_SIZE
        words = block_words[None, :, None] + (offset.to(tl.int64)[None, :, None] * stride_cache_token + head_words)
        turned = tl.permute(words, (0, 2, 1))
        if TILE_WORDS > HALF // BYTES:
            k_words = tl.load(k_ptr + words, mask=in_head, other=0)
            v_words = tl.load(v_ptr + turned, mask=tl.permute(in_head, (0, 2, 1)), other=0)
        else:
            k_words, v_words = tl.load(k_ptr + words), tl.load(v_ptr + turned)
        scale_row = (block_scales + offset.to(tl.int64) * stride_scale_token)[None, :] + head_scales

        k_scales = load_scales(k_scale_ptr + scale_row, owned[None, :], NUM_GROUPS, stride_scale_group, PAIRED)
        scores = tl.zeros([HEADS, TILE_KV, TILE_Q], tl.float32)
        for g in tl.static_range(NUM_GROUPS):
            part = tl.zeros([HEADS, TILE_KV, TILE_Q], tl.float32)
            for i in tl.static_range(PLANES):
                if in_group(i // BYTES, g, HALF, GROUP_SIZE, False):
                    codes = plane(k_words, CODES, i % BYTES, i // BYTES)
                    part = dot_parts(codes, queries[g * PLANES + i], part, PARTS)
            scores += part * k_scales[g][:, :, None]
        if ZERO:
            k_zeros = load_scales(k_zero_ptr + scale_row, owned[None, :], NUM_GROUPS, stride_scale_group, PAIRED)
            for g in tl.static_range(NUM_GROUPS):
                scores += sums[g][:, None, :] * k_zeros[g][:, :, None]

        if CAPPED:
            scores = softmax.cap_scores(scores * (q_unit * K_UNIT)[:, None, :], scale, logit_cap)
        if QUERIES == 1:  # all columns see the same keys
            seen = keys <= query_positions
            if WINDOWED:
                seen = seen & (keys > query_positions - window)
            scores += tl.where(seen, 0.0, float("-inf"))[None, :, None]
        else:
            seen = keys[:, None] <= query_positions[None, :]
            if WINDOWED:
                seen = seen & (keys[:, None] > query_positions[None, :] - window)
            scores = tl.where(seen[None, :, :], scores, float("-inf"))

        # softmax.update, turned, and the weights added up later
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2[:, None, :] - shift[:, None, :])
        rescale = tl.exp2(top - shift)
        top, totals = new_top, totals * rescale[:, None, :] + weights

        v_scales = load_scales(v_scale_ptr + scale_row, owned[None, :], NUM_GROUPS, stride_scale_group, PAIRED)
        if ZERO:
            v_zeros = load_scales(v_zero_ptr + scale_row, owned[None, :], NUM_GROUPS, stride_scale_group, PAIRED)
            unscaled, new_zeros = in_parts(weights, PARTS), ()
            for g in tl.static_range(NUM_GROUPS):  # by a dot, in every row of a tile, because only its loads run ahead
                rows = tl.broadcast_to(v_zeros[g].to(tl.float16)[:, None, :], [HEADS, 16, TILE_KV])
                new_zeros = new_zeros + (dot_parts(rows, unscaled, zeros[g] * rescale[:, None, :], PARTS),)
            zeros = new_zeros
        scaled, parts, new_accs = (), (), ()
        largest = largest * rescale
        for g in tl.static_range(NUM_GROUPS):
            scaled = scaled + (weights * v_scales[g][:, :, None],)
            largest = tl.maximum(largest, tl.max(scaled[g], 1))
        new_unit, bits = power_of_two(largest, -100)
        inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        rescale = rescale * (v_unit * inverse)
        v_unit = new_unit
        for g in tl.static_range(NUM_GROUPS):
            parts = parts + (in_parts(scaled[g] * (inverse * 2.0**HEADROOM)[:, None, :], PARTS),)
        for i in tl.static_range(PLANES):
            acc = accs[i] * rescale[:, None, :]
            for g in tl.static_range(NUM_GROUPS):
                if in_group(i // BYTES, g, HALF, GROUP_SIZE, True):
                    acc = dot_parts(plane(v_words, CODES, i % BYTES, i // BYTES), parts[g], acc, PARTS)
                elif in_group(i // BYTES, g, HALF, GROUP_SIZE, False):
                    more = dot_parts(plane(v_words, CODES, i % BYTES, i // BYTES), parts[g], acc, PARTS)
                    number = numbers_of(i // BYTES, i % BYTES, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                    acc = tl.where((number // GROUP_SIZE == g)[None, :, None], more, acc)
            new_accs = new_accs + (acc,)
        accs = new_accs

    whole = ()
    for i in tl.static_range(PLANES):
        # as v_unit may be as small as 2^-100 or as large as 2^121, the powers of two do not meet before the sums
        acc = accs[i] * 2.0 ** (exponent_of(CODES, i // BYTES) - HEADROOM) * v_unit[:, None, :]
        if ZERO:
            for g in tl.static_range(NUM_GROUPS):
                number = numbers_of(i // BYTES, i % BYTES, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                acc += tl.where((number // GROUP_SIZE == g)[None, :, None], tl.max(zeros[g], 1)[:, None, :], 0.0)
        whole = whole + (acc,)
    return whole, top, tl.sum(totals, 1)


@triton.jit
def joined(accs, ROWS: tl.constexpr, TILE_D: tl.constexpr):
    """The planes' sums, turned back, in one tile: column c is word c // planes of plane c % planes, and the rows are
    those of all heads, the first of each first, because `paging` merges as many rows as are there."""
    turned = ()
    for i in tl.static_range(len(accs)):
        turned = turned + (tl.permute(accs[i], (2, 0, 1)),)
    if len(accs) == 1:
        acc = turned[0]
    elif len(accs) == 2:
        acc = tl.join(turned[0], turned[1])
    else:
        acc = tl.join(tl.join(turned[0], turned[2]), tl.join(turned[1], turned[3]))
    return acc.reshape(ROWS, TILE_D)


@triton.jit
def rows_of(tile, kv_head, row, first_row, num_queries, GROUP: tl.constexpr, QUERIES: tl.constexpr):
    """(query, row of q, head, whether there is such a row) of rows of several KV heads' tiles; both broadcast."""
    query = tile * QUERIES + row // GROUP + 0 * kv_head
    there = (row < QUERIES * GROUP) & (query < num_queries)
    return query, (first_row + query).to(tl.int64), kv_head * GROUP + row % GROUP, there


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
    num_bundles,  # of HEADS KV heads
    num_blocks,
    max_blocks_per_seq,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PAIRED: tl.constexpr,
    BYTES: tl.constexpr,
    NIBBLES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):
    PLANES: tl.constexpr = BYTES * NIBBLES
    ROWS: tl.constexpr = HEADS * TILE_Q
    program = tl.program_id(0)
    capacity = max_blocks_per_seq * BLOCK_SIZE
    line = paging.total_units(
        seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_bundles, window,
        QUERIES, TILE_KV, WINDOWED,
    )  # fmt: skip
    begin, end, num_workers = paging.share_of(program, tl.num_programs(0), line)
    seq, seq_begin = paging.find_sequence(
        begin, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_bundles, window,
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
        if unit >= seq_begin + per_head * num_bundles:
            seq_begin += per_head * num_bundles
            seq += 1
        else:
            bundle, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED
            )
            if unit < seg_end:
                h, m = tl.arange(0, HEADS)[:, None], tl.arange(0, TILE_Q)[None, :]
                _, token, head, there = rows_of(tile, bundle * HEADS + h, m, first_row, num_queries, GROUP, QUERIES)
                q_rows = q_ptr + token * stride_q_token + head * stride_q_head
                planes, q_unit = load_planes(
                    q_rows, stride_q_dim, there, HEAD_DIM, BYTES, NIBBLES, HEADS, TILE_Q, TILE_WORDS
                )  # fmt: skip
                context = seq_len - num_queries
                positions = context + tile * QUERIES
                if QUERIES > 1:
                    positions = positions + tl.arange(0, TILE_Q) // GROUP
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                first_head = (bundle * HEADS).to(tl.int64)
                in_cache, in_scales = first_head * stride_cache_head, first_head * stride_scale_head
                accs, top, total = attend_coded_tiles(
                    planes, q_unit, positions, first_tile + unit - seg_begin,
                    first_tile + tl.minimum(end, seg_end) - seg_begin, last_key,
                    block_table_ptr + seq.to(tl.int64) * stride_table_seq, stride_table_block,
                    k_cache_ptr + in_cache, v_cache_ptr + in_cache,
                    k_scale_ptr + in_scales, None if k_zero_ptr is None else k_zero_ptr + in_scales,
                    v_scale_ptr + in_scales, None if v_zero_ptr is None else v_zero_ptr + in_scales,
                    scale, logit_cap, window, stride_cache_block, stride_cache_token, stride_cache_head,
                    stride_scale_block, stride_scale_token, stride_scale_head, stride_scale_group,
                    num_blocks,
                    WINDOWED, CAPPED, CODES, PARTS, NUM_GROUPS, PAIRED, BYTES, NIBBLES, BLOCK_SIZE, HEAD_DIM,
                    HEADS, QUERIES, TILE_Q, TILE_KV, TILE_WORDS,
                )  # fmt: skip
                row = tl.arange(0, ROWS)
                _, token, head, there = rows_of(
                    tile, bundle * HEADS + row % HEADS, row // HEADS, first_row, num_queries, GROUP, QUERIES
                )
                paging.finish_segment(
                    joined(accs, ROWS, PLANES * TILE_WORDS),
                    tl.permute(top, (1, 0)).reshape(ROWS), tl.permute(total, (1, 0)).reshape(ROWS),
                    seg_begin, seg_end, begin, end, line, num_workers, program, parts_ptr,
                    stats_ptr, counters_ptr, out_ptr, sinks_ptr, token, head, there, dim,
                    stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, ROWS, PLANES * TILE_WORDS,
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
    if len(q) == 0 or num_blocks == 0:
        return out.zero_()
    q, scale = softmax.positive_scale(q, scale)
    k_cache, v_cache = _alike(k_cache, v_cache, dense=True)
    k_scale, v_scale, *zeros_alike = _alike(*scales, *(zeros or ()))
    k_zero, v_zero = zeros_alike or (None, None)
    places = head_bytes, k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.stride()[:3]
    bytes_of_word = 2 if all(place % 2 == 0 for place in places) else 1
    word = tl.int16 if bytes_of_word == 2 else tl.int8

    num_tokens, num_heads, _ = q.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    num_groups, group = 1 if k_scale.ndim == 3 else k_scale.shape[3], num_heads // num_kv_heads
    tiles = choose_tiles(num_tokens, num_seqs, group, num_kv_heads, head_dim, PARTS[q.dtype])
    tile_words = max(16, triton.next_power_of_2(head_bytes // bytes_of_word))
    num_programs = 3 if INTERPRETING else num_processors(q) * tiles.programs_per_processor
    rows = tiles.heads * tiles.tile_q
    scratch = paging.make_scratch(q, num_programs, rows, tile_words * bytes_of_word * nibbles)

    cache_strides = [stride // bytes_of_word for stride in k_cache.stride()[:3]]
    arrays, scale_strides = (k_scale, k_zero, v_scale, v_zero), (*k_scale.stride(), 0)[:4]
    paired = k_zero is not None and num_groups % 2 == 0 and scale_strides[3] == 1
    if paired and not any(
        place % 4 for place in (*(x.data_ptr() for x in arrays), *(2 * x for x in scale_strides[:3]))
    ):
        scale_strides = tuple(stride // 2 for stride in scale_strides)
        arrays = tuple(triton.reinterpret(x, tl.int32) for x in arrays)
    else:
        paired = False
    coded_attention_kernel[(num_programs,)](
        q, triton.reinterpret(k_cache, word), triton.reinterpret(v_cache, word), *arrays,
        block_table, seq_lens.contiguous(), cu_seqlens_q.contiguous(),
        None if sinks is None else sinks.contiguous(), out,
        *scratch, scale, logit_cap or 0.0, min(sliding_window or 0, LONGEST_WINDOW),
        *q.stride(), *cache_strides, *scale_strides, *block_table.stride(), *out.stride(),
        num_tokens, num_seqs, num_kv_heads // tiles.heads, num_blocks, max_blocks_per_seq,
        WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None, CODES=codes, PARTS=PARTS[q.dtype],
        NUM_GROUPS=num_groups, PAIRED=paired, BYTES=bytes_of_word, NIBBLES=nibbles, GROUP=group, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, HEADS=tiles.heads, QUERIES=tiles.queries, TILE_Q=tiles.tile_q, TILE_KV=tiles.tile_kv,
        TILE_WORDS=tile_words, num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.max_registers,
    )  # fmt: skip
    return out


def _alike(*arrays: Tensor, dense: bool = False) -> tuple[Tensor, ...]:
    """Arrays of one shape with the same strides (dense: the last of them 1): themselves, or contiguous copies."""
    same = all(array.stride() == arrays[0].stride() for array in arrays[1:])
    if same and (not dense or arrays[0].stride(-1) == 1):
        return arrays
    return tuple(array.contiguous() for array in arrays)
