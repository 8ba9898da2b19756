"""KIVI's attention on words of codes, for float16 and bfloat16: what a decode runs. The schedule is `paging.py`'s.

A decode over codes of 2 bits is bound by instructions, about 5 for each number of K and V at the speed wanted, so:

- Codes are loaded as 16-bit *words* (2 bytes side by side) and stay words as far as the tensor cores' registers. There
  one AND makes two float16s: the bits of a code, left where they are at the bottom of the fraction, are the subnormal
  number code * 2^(bits * p - 24), which the tensor cores multiply exactly. (The upper byte is shifted down first.)
- Numbers are never put back in order. A head is *pieces* of 32 numbers, those in the same bits of 16 words; number
  32 j + 2 w + e of a head is in piece j, word w, byte e, and has a query and a sum of its own: plane (j, e).
- Nothing is dequantized. A channel's scale multiplies the query (in float16, once for each group of keys), a token's
  scale its weight, and the zeros are one more product each: q * zero, and weight * zero.
- A query is made smaller than 1 by a power of two, so that q * scale, with any scale, is a float16.
- One warp has a KV head to itself and never waits for another; four heads side by side fill the sectors of memory.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton import paging, softmax
from fast._triton.platform import INTERPRETED
from fast._triton.rounding import dot, to_dtype

WORDS = tl.constexpr(16)  # that hold the numbers of a piece, two each
PIECE = tl.constexpr(32)


@triton.constexpr_function
def and_asm(byte, mask):
    """PTX: the bits under ``mask`` of one byte of two words."""
    both = mask << 16 | mask
    return f"{{ .reg .b32 x; shr.u32 x, $1, 8; and.b32 $0, x, {both}; }}" if byte else f"and.b32 $0, $1, {both};"


@triton.jit
def codes_of(words, BITS: tl.constexpr, PART: tl.constexpr, BYTE: tl.constexpr):
    """The codes in one byte of every word, in its part PART (from the lowest bits), times 2^(BITS * PART - 24)."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << (BITS * PART)
    if INTERPRETED:
        codes = ((words.to(tl.int32) >> (8 * BYTE)) & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        asm: tl.constexpr = and_asm(BYTE, MASK)
        codes = tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    return codes


@triton.jit
def multiply(a, b):
    """float16 products, two by an instruction."""
    if INTERPRETED:
        y = (a.to(tl.float32) * b.to(tl.float32)).to(tl.float16)
    else:
        y = tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.float16, is_pure=True, pack=2)
    return y


@triton.jit
def half_of(words, e: tl.constexpr, dtype: tl.constexpr):
    """One of the two 16-bit numbers in words of 32 bits."""
    return (words >> (16 * e)).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def load_planes(q_rows, stride_q_dim, there, PIECES: tl.constexpr):
    """The queries of each plane, [..., WORDS]."""
    number = tl.arange(0, PIECE)[None, None, :]
    planes = ()
    for j in tl.static_range(PIECES):
        q = tl.load(q_rows[:, :, None] + (j * PIECE + number) * stride_q_dim, mask=there[:, :, None], other=0.0)
        low, high = tl.split(q.reshape(q.shape[0], q.shape[1], WORDS, 2))
        planes = planes + (low, high)
    return planes


@triton.jit
def below_one(planes):
    """(planes of float16 numbers below 1, what they were divided by): a power of two for each row."""
    largest = tl.zeros([planes[0].shape[0], planes[0].shape[1]], tl.float32)
    for i in tl.static_range(len(planes)):
        largest = tl.maximum(largest, tl.max(tl.abs(planes[i].to(tl.float32)), 2))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 250)
    unit = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    inverse = ((253 - exponent) << 23).to(tl.float32, bitcast=True)
    small = ()
    for i in tl.static_range(len(planes)):
        small = small + ((planes[i].to(tl.float32) * inverse[:, :, None]).to(tl.float16),)
    return small, unit


@triton.jit
def attend_old_tiles(
    planes, unit, boundaries, query_positions, start, stop, row_ptr, stride_table_block,
    k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, scale, logit_cap, sliding_window,
    stride_cache_block, stride_cache_token, stride_cache_head,
    stride_k_scale_block, stride_k_scale_group, stride_k_scale_head,
    stride_v_scale_block, stride_v_scale_token, stride_v_scale_head, num_blocks, max_blocks_per_seq,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr, NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """Let tiles ``start`` to ``stop`` of keys pass, all of them old to the last query. A tile is of one group."""
    PARTS: tl.constexpr = 8 // BITS
    CHUNKS: tl.constexpr = PIECES // PARTS  # pieces that lie side by side in the bytes
    PIECES_PER_GROUP: tl.constexpr = PIECES // NUM_GROUPS
    word, column = tl.arange(0, WORDS), tl.arange(0, TILE_KV)
    head = tl.arange(0, HEADS).to(tl.int64)
    k_words_at = (
        head[:, None, None] * stride_cache_head + word[None, :, None] + (column[None, None, :] * stride_cache_token)
    )
    v_words_at = (
        head[:, None, None] * stride_cache_head + word[None, None, :] + (column[None, :, None] * stride_cache_token)
    )
    k_scales_at = head[:, None] * stride_k_scale_head + word[None, :]
    v_scales_at = head[:, None] * stride_v_scale_head + column[None, :] * stride_v_scale_token
    pair = tl.arange(0, NUM_GROUPS // 2)
    v_zeros_at = v_scales_at[:, :, None] + pair[None, None, :]

    top = tl.full([HEADS, TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([HEADS, TILE_Q], tl.float32)
    zeros = tl.zeros([HEADS, TILE_Q, NUM_GROUPS], tl.float32)
    accs = ()
    for _ in tl.static_range(2 * PIECES):
        accs = accs + (tl.zeros([HEADS, TILE_Q, WORDS], tl.float32),)

    for tile in range(start, stop):
        first = tile * TILE_KV
        index = first // BLOCK_SIZE
        block = tl.load(row_ptr + index * stride_table_block).to(tl.int64)  # lengths are kept within the table
        owned = (block >= 0) & (block < num_blocks)
        block = tl.where(owned, block, 0)
        offset = first % BLOCK_SIZE
        cells = block * stride_cache_block + offset * stride_cache_token
        key_scales = block * stride_k_scale_block + offset // GROUP_SIZE * stride_k_scale_group
        value_scales = block * stride_v_scale_block + offset * stride_v_scale_token

        # Codes are numbers whatever they are; scales of what nobody owns may be NaN.
        in_words = tl.where(owned, word < WORDS, False)[None, :]
        in_tokens = tl.where(owned, column < TILE_KV, False)[None, :]
        scores = tl.zeros([HEADS, TILE_Q, TILE_KV], tl.float32)
        of_parts = ()
        for part in tl.static_range(PARTS):
            of_part = tl.zeros([HEADS, TILE_Q, TILE_KV], tl.float32)
            for c in tl.static_range(CHUNKS):
                words = tl.load(k_ptr + cells + c * WORDS + k_words_at)
                of_piece = key_scales + (part * CHUNKS + c) * WORDS + k_scales_at
                scales = tl.load(k_scale_ptr + of_piece, mask=in_words, other=0)
                k_zeros = tl.load(k_zero_ptr + of_piece, mask=in_words, other=0)
                for e in tl.static_range(2):
                    q = planes[2 * (part * CHUNKS + c) + e]
                    scaled = half_of(scales, e, tl.float16)
                    scaled = multiply(q, tl.broadcast_to(scaled[:, None, :], q.shape))
                    of_part = dot(scaled, codes_of(words, BITS, part, e), of_part)
                    zero = half_of(k_zeros, e, tl.float16)
                    scores = dot(q, tl.broadcast_to(zero[:, :, None], [HEADS, WORDS, TILE_KV]), scores)
            of_parts = of_parts + (of_part,)
        for part in tl.static_range(PARTS):
            scores += of_parts[part] * 2.0 ** (24 - BITS * part)

        if CAPPED:
            scores = softmax.cap_scores(scores * unit[:, :, None], scale, logit_cap)
            scale_log2 = tl.full(unit.shape, softmax.LOG2E, tl.float32)
        else:
            scale_log2 = unit * (scale * softmax.LOG2E)
        if QUERIES == 1 and not WINDOWED:
            scores = tl.where(owned, scores, float("-inf"))
        else:
            keys = first + column
            seen = (keys[None, :] < boundaries[:, None]) & in_tokens
            if WINDOWED:
                seen = seen & (keys[None, :] > query_positions[:, None] - sliding_window)
            scores = tl.where(seen[None, :, :], scores, float("-inf"))

        # softmax.update, for each of several heads
        new_top = tl.maximum(top, tl.max(scores, 2) * scale_log2)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2[:, :, None] - shift[:, :, None])
        rescale = tl.exp2(top - shift)
        top, total = new_top, total * rescale + tl.sum(weights, 2)

        v_zeros = tl.load(v_zero_ptr + value_scales + v_zeros_at, mask=in_tokens[:, :, None], other=0)
        v_zeros = tl.join(half_of(v_zeros, 0, tl.float16), half_of(v_zeros, 1, tl.float16))
        v_zeros = v_zeros.reshape(HEADS, TILE_KV, NUM_GROUPS)
        zeros = dot(weights.to(tl.float16), v_zeros, zeros * rescale[:, :, None])
        scaled_weights = ()
        for two in tl.static_range(NUM_GROUPS // 2):
            scales = tl.load(v_scale_ptr + value_scales + two + v_scales_at, mask=in_tokens, other=0)
            for e in tl.static_range(2):
                steps = half_of(scales, e, tl.float16).to(tl.float32)
                scaled_weights = scaled_weights + ((weights * steps[:, None, :]).to(tl.float16),)
        new_accs = ()
        for j in tl.static_range(PIECES):
            words = tl.load(v_ptr + cells + (j % CHUNKS) * WORDS + v_words_at)
            for e in tl.static_range(2):
                codes = codes_of(words, BITS, j // CHUNKS, e)
                acc = dot(scaled_weights[j // PIECES_PER_GROUP], codes, accs[2 * j + e] * rescale[:, :, None])
                new_accs = new_accs + (acc,)
        accs = new_accs

    group = tl.arange(0, NUM_GROUPS)[None, None, :]
    whole = ()
    for j in tl.static_range(PIECES):
        zero = tl.sum(tl.where(group == j // PIECES_PER_GROUP, zeros, 0.0), 2)
        for e in tl.static_range(2):
            whole = whole + (accs[2 * j + e] * 2.0 ** (24 - BITS * (j // CHUNKS)) + zero[:, :, None],)
    return whole, top, total


@triton.jit
def attend_young_tiles(
    planes, accs, top, total, boundaries, query_positions, start, stop, first, end, row_ptr, stride_table_block,
    k_ptr, v_ptr, scale, logit_cap, sliding_window,
    stride_window_block, stride_window_token, stride_window_head, num_blocks, max_blocks_per_seq,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PIECES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """Let the keys ``first`` to ``end`` in tiles ``start`` to ``stop`` pass, from the window: words of two numbers."""
    word, column = tl.arange(0, WORDS), tl.arange(0, TILE_KV)
    head = tl.arange(0, HEADS).to(tl.int64)
    dtype = planes[0].dtype
    for tile in range(start, stop):
        keys = tile * TILE_KV + column
        ids = paging.load_block_ids(row_ptr, stride_table_block, keys, end, num_blocks, max_blocks_per_seq, BLOCK_SIZE)
        owned = (ids >= 0) & (keys >= first)
        rows = ids.to(tl.int64) * stride_window_block + (keys % BLOCK_SIZE).to(tl.int64) * stride_window_token
        k_words_at = head[:, None, None] * stride_window_head + word[None, :, None] + rows[None, None, :]
        v_words_at = head[:, None, None] * stride_window_head + word[None, None, :] + rows[None, :, None]
        scores = tl.zeros([HEADS, TILE_Q, TILE_KV], tl.float32)
        for j in tl.static_range(PIECES):
            words = tl.load(k_ptr + j * WORDS + k_words_at, mask=owned[None, None, :], other=0)
            for e in tl.static_range(2):
                scores = dot(planes[2 * j + e], half_of(words, e, dtype), scores)
        scale_log2 = scale * softmax.LOG2E
        if CAPPED:
            scores, scale_log2 = softmax.cap_scores(scores, scale, logit_cap), softmax.LOG2E
        seen = (keys[None, :] >= boundaries[:, None]) & (keys[None, :] <= query_positions[:, None]) & owned[None, :]
        if WINDOWED:
            seen = seen & (keys[None, :] > query_positions[:, None] - sliding_window)
        scores = tl.where(seen[None, :, :], scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 2) * scale_log2)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2 - shift[:, :, None])
        rescale = tl.exp2(top - shift)
        top, total = new_top, total * rescale + tl.sum(weights, 2)
        weights = to_dtype(weights, dtype)
        new_accs = ()
        for j in tl.static_range(PIECES):
            words = tl.load(v_ptr + j * WORDS + v_words_at, mask=owned[None, :, None], other=0)
            for e in tl.static_range(2):
                acc = dot(weights, half_of(words, e, dtype), accs[2 * j + e] * rescale[:, :, None])
                new_accs = new_accs + (acc,)
        accs = new_accs
    return accs, top, total


@triton.jit
def joined(accs, PIECES: tl.constexpr, ROWS: tl.constexpr):
    """One tile of the planes' sums, [ROWS, 32 * PIECES]: ``number_of_column`` says what is where."""
    pieces = ()
    for j in tl.static_range(PIECES):
        pieces = pieces + (tl.join(accs[2 * j], accs[2 * j + 1]),)
    if PIECES == 4:
        acc = tl.join(tl.join(pieces[0], pieces[2]), tl.join(pieces[1], pieces[3]))
    elif PIECES == 2:
        acc = tl.join(pieces[0], pieces[1])
    else:
        acc = pieces[0]
    return acc.reshape(ROWS, PIECES * PIECE)


@triton.jit
def number_of_column(PIECES: tl.constexpr):
    """Which number of the head each column of ``joined`` is: word, byte, and the piece last."""
    column = tl.arange(0, PIECES * PIECE)
    return column % PIECES * PIECE + column // PIECES


@triton.jit
def rows_of(tile, kv_head, row, first_row, num_queries, GROUP: tl.constexpr, QUERIES: tl.constexpr):
    """`paging.rows_of_tile`, for rows of several KV heads: ``kv_head`` and ``row`` (of the head's tile) broadcast."""
    query = tile * QUERIES + row // GROUP + 0 * kv_head
    there = (row < QUERIES * GROUP) & (query < num_queries)
    return query, (first_row + query).to(tl.int64), kv_head * GROUP + row % GROUP, there


@triton.jit
def quantized_before(position, window, GROUP_SIZE: tl.constexpr):
    """The position before which a query reads keys and values quantized: the end of the last group old enough."""
    return tl.maximum(position + 1 - window, 0) // GROUP_SIZE * GROUP_SIZE


@triton.jit
def words_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_window_ptr,  # [num_window_blocks, block_size, num_kv_heads, head_dim / 2], words of 32 bits
    v_window_ptr,
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, packed_head_dim / 2], words of 16 bits
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, groups_per_block, num_kv_heads, head_dim / 2], words of 32 bits
    k_zero_ptr,
    v_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups / 2], words of 32 bits
    v_zero_ptr,
    window_block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    block_table_ptr,
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr, stats_ptr, counters_ptr,  # the scratch of paging.py
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
    num_bundles,  # of HEADS KV heads
    num_window_blocks,
    num_blocks,
    max_blocks_per_seq,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = HEADS * TILE_Q
    HEAD_DIM: tl.constexpr = PIECES * PIECE
    program = tl.program_id(0)
    capacity = max_blocks_per_seq * BLOCK_SIZE
    line = paging.total_units(
        seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_bundles, sliding_window,
        QUERIES, TILE_KV, WINDOWED,
    )  # fmt: skip
    begin, end, num_workers = paging.share_of(program, tl.num_programs(0), line)
    seq, seq_begin = paging.find_sequence(
        begin, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_bundles, sliding_window,
        QUERIES, TILE_KV, WINDOWED,
    )  # fmt: skip
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, sliding_window, QUERIES, TILE_KV, WINDOWED)
        if unit >= seq_begin + per_head * num_bundles:
            seq_begin += per_head * num_bundles
            seq += 1
        else:
            bundle, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, sliding_window, QUERIES, TILE_KV, WINDOWED
            )
            if unit < seg_end:
                h, m = tl.arange(0, HEADS)[:, None], tl.arange(0, TILE_Q)[None, :]
                query, token, head, there = rows_of(tile, bundle * HEADS + h, m, first_row, num_queries, GROUP, QUERIES)
                q_rows = q_ptr + token * stride_q_token + head * stride_q_head
                planes = load_planes(q_rows, stride_q_dim, there, PIECES)
                small, row_unit = below_one(planes)
                context = seq_len - num_queries
                positions = context + tile * QUERIES + tl.arange(0, TILE_Q) // GROUP
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                boundaries = quantized_before(positions, window, GROUP_SIZE)
                first_young = quantized_before(context + tile * QUERIES, window, GROUP_SIZE)
                end_old = quantized_before(last_key - 1, window, GROUP_SIZE)

                start = first_tile + unit - seg_begin
                stop = first_tile + tl.minimum(end, seg_end) - seg_begin
                first_head = (bundle * HEADS).to(tl.int64)
                in_cache, in_window = first_head * stride_cache_head, first_head * stride_window_head
                in_k_scales, in_v_scales = first_head * stride_k_scale_head, first_head * stride_v_scale_head
                accs, top, total = attend_old_tiles(
                    small, row_unit, boundaries, positions, start, tl.minimum(stop, end_old // TILE_KV),
                    block_table_ptr + seq.to(tl.int64) * stride_table_seq, stride_table_block,
                    k_cache_ptr + in_cache, v_cache_ptr + in_cache, k_scale_ptr + in_k_scales,
                    k_zero_ptr + in_k_scales, v_scale_ptr + in_v_scales, v_zero_ptr + in_v_scales,
                    scale, logit_cap, sliding_window, stride_cache_block, stride_cache_token, stride_cache_head,
                    stride_k_scale_block, stride_k_scale_group, stride_k_scale_head,
                    stride_v_scale_block, stride_v_scale_token, stride_v_scale_head, num_blocks, max_blocks_per_seq,
                    WINDOWED, CAPPED, BITS, PIECES, NUM_GROUPS, BLOCK_SIZE, GROUP_SIZE, HEADS, QUERIES,
                    TILE_Q, TILE_KV,
                )  # fmt: skip
                accs, top, total = attend_young_tiles(
                    planes, accs, top, total, boundaries, positions, tl.maximum(start, first_young // TILE_KV), stop,
                    first_young, last_key, window_block_table_ptr + seq.to(tl.int64) * stride_window_table_seq,
                    stride_window_table_block, k_window_ptr + in_window, v_window_ptr + in_window,
                    scale, logit_cap, sliding_window, stride_window_block, stride_window_token, stride_window_head,
                    num_window_blocks, max_blocks_per_seq,
                    WINDOWED, CAPPED, PIECES, BLOCK_SIZE, HEADS, TILE_Q, TILE_KV,
                )  # fmt: skip
                row = tl.arange(0, ROWS)
                _, token, head, there = rows_of(
                    tile, bundle * HEADS + row // TILE_Q, row % TILE_Q, first_row, num_queries, GROUP, QUERIES
                )
                paging.finish_segment(
                    joined(accs, PIECES, ROWS), top.reshape(ROWS), total.reshape(ROWS),
                    seg_begin, seg_end, begin, end, line, num_workers, program, parts_ptr, stats_ptr, counters_ptr,
                    out_ptr, sinks_ptr, token, head, there, number_of_column(PIECES),
                    stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, ROWS, HEAD_DIM,
                )  # fmt: skip
            unit = tl.minimum(following, end)
