"""KIVI's attention for decodes, in float16 and bfloat16: a warp a KV head, lane by lane. The schedule is `paging.py`'s.

A decode over codes of 2 bits is bound by instructions and by waiting, long before it is bound by memory. What costs
most is not arithmetic but moving numbers between the layouts that products want. So here nothing is ever moved: `lanes`
says what a lane holds of a product's operands, and a lane takes the channels, and the tokens, whose codes lie side by
side.

- A product takes a page of 16 keys of one group. Keys times queries: the keys are rows, and 8 queries are columns.
- Codes stay where they are in their words. An AND leaves two of them, at the bottom of the fractions of two float16s:
  the subnormal numbers code * 2^(bits * part - 24), which tensor cores multiply exactly.
- Nothing is dequantized. A channel's scale multiplies the query, a token's scale its weight, and zeros are one more
  product: queries with zeros, weights with zeros.
- Those multiples are float16s, and what one loses to rounding is kept as another: with keys of large channels a score
  would be off by more than the result's rounding. Up to four queries have theirs in the other four columns, for free;
  more need each product twice.
- A query is made smaller than 1 by a power of two, so that it is a float16 whatever scale it is multiplied with.
- Weights are the transpose of scores; that is one instruction, ``movmatrix``.

A *piece* is 32 channels side by side: channel 32 j + 8 c + i of the keys is lane c's, channel 32 j + 4 g + i of the
values is lane g's. Pieces in the same bytes (2 bits: all four) are the bytes' *parts*, of other bits.

A program is a few warps, with neighbouring KV heads: none waits for another, but what lies side by side in memory is
read at about the same time.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton import merging, paging, softmax
from fast._triton.lanes import (
    bytes_0213,
    from_lane,
    from_other,
    halves_of,
    largest_of,
    load_words,
    multiply,
    multiply_add,
    packed,
    pair,
    product,
    product_at,
    sum_of,
    transposed,
)

PAGE = tl.constexpr(16)  # keys of a product
COLUMNS = tl.constexpr(8)  # queries of a product
FEW_PARTS = tl.constexpr(4)  # of a cut sequence, loaded at a time
SIGNS = tl.constexpr(-2147450880)  # of both float16s in a word
LOWEST = tl.constexpr(-3.0e38)  # a top before any key: finite, as its difference to a score must be a number


# ---- a page of keys ---------------------------------------------------------------------------------------------


@triton.jit
def load_queries(q_rows, there, PIECES: tl.constexpr, AGAIN: tl.constexpr = False):
    """The words of a lane's channels, of its column's query; zeros where there is none."""
    c = tl.arange(0, there.shape[0]) % 4
    words = ()
    for j in tl.static_range(PIECES):
        four = load_words(q_rows + (16 * j + 4 * c), 4, AGAIN)
        for i in tl.static_range(4):
            words = words + (tl.where(there, four[i], 0),)
    return words


@triton.jit
def below_one(words, dtype: tl.constexpr):
    """(the numbers as float16s below 1, the power of two that each column was divided by)."""
    largest = tl.zeros(words[0].shape, tl.float32)
    for i in tl.static_range(len(words)):
        low, high = halves_of(words[i], dtype)
        largest = tl.maximum(largest, tl.maximum(tl.abs(low), tl.abs(high)))
    largest = tl.maximum(largest, from_other(largest, 1))
    largest = tl.maximum(largest, from_other(largest, 2))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 250)
    unit = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    inverse = ((253 - exponent) << 23).to(tl.float32, bitcast=True)
    small = ()
    for i in tl.static_range(len(words)):
        low, high = halves_of(words[i], dtype)
        small = small + (packed(low * inverse, high * inverse, tl.float16),)
    return small, unit


@triton.jit
def codes_of(word, BITS: tl.constexpr, PART: tl.constexpr):
    """The codes in the lower bytes of both halves, times 2^(BITS * PART - 24), as float16s."""
    return word & (((1 << BITS) - 1) * 65537 << (BITS * PART))


@triton.jit
def times_scale(x, scale, COLS: tl.constexpr):
    """Products in float16, and what they lost to rounding: in the other four columns, or as words of their own."""
    if COLS == COLUMNS:
        y = multiply(x, scale)
        both = (y, multiply_add(x, scale, y ^ SIGNS))
    else:
        negative = tl.where(tl.arange(0, x.shape[0]) % 32 // 4 < COLS, 0, x ^ SIGNS)
        both = (multiply_add(x, scale, multiply(negative, scale)),)
    return both


@triton.jit
def some(words, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of them from the FIRST on."""
    return words[FIRST : FIRST + COUNT]


@triton.jit
def times_stride(block, stride):
    """Where a block begins, in one multiplication (neither is negative)."""
    stride = stride + 0 * block  # a tensor, even if it is 1
    return (block.to(tl.uint32).to(tl.uint64) * stride.to(tl.uint32).to(tl.uint64)).to(tl.int64)


@triton.jit
def place_of(tile, page, lowest, last, PAGES: tl.constexpr):
    """The page (of 16 tokens of the sequence) that a tile reads as one of its pages."""
    return tl.minimum(tl.maximum(tile * PAGES + page, lowest), last)


@triton.jit
def load_ids(row_ptr, stride_table_block, tile, lowest, last, PAGES: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The blocks of a tile's pages, as the table has them."""
    ids = ()
    for i in tl.static_range(PAGES):
        page = place_of(tile, i, lowest, last, PAGES)
        ids = ids + (tl.load(row_ptr + page * PAGE // BLOCK_SIZE * stride_table_block),)
    return ids


@triton.jit
def block_of(block_id, num_blocks):
    """A block that exists, whatever the table says."""
    return tl.minimum(tl.maximum(block_id, 0), num_blocks - 1)


@triton.jit
def load_keys(
    ids, tile, lowest, last, k_rows, scales_at, zeros_at, stride_block, stride_scale_block, num_blocks,
    stride_token: tl.constexpr, stride_group: tl.constexpr, PAGES: tl.constexpr, BITS: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """Of each page the scales of a lane's channels, two rows of codes, and the zeros."""
    words = ()
    for i in tl.static_range(PAGES):
        block, offset = block_of(ids[i], num_blocks), place_of(tile, i, lowest, last, PAGES) * PAGE % BLOCK_SIZE
        rows = k_rows + (times_stride(block, stride_block) + offset * stride_token)
        of_group = times_stride(block, stride_scale_block) + offset // GROUP_SIZE * stride_group
        for j in tl.static_range(PIECES):
            words = words + load_words(scales_at + of_group + 16 * j, 4)
        for chunk in tl.static_range(PIECES * BITS // 8):
            words = words + load_words(rows + 8 * chunk, 2) + load_words(rows + (8 * stride_token + 8 * chunk), 2)
        for j in tl.static_range(PIECES):
            words = words + load_words(zeros_at + of_group + 16 * j, 4)
    return words


@triton.jit
def load_values(
    ids, tile, lowest, last, v_rows, scales_at, zeros_at, stride_block, stride_scale_block, num_blocks,
    stride_token: tl.constexpr, stride_scale_token: tl.constexpr, PAGES: tl.constexpr, BITS: tl.constexpr,
    PIECES: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Of each page four tokens' codes, their scales, and the zeros of a group of channels."""
    words = ()
    for i in tl.static_range(PAGES):
        block, offset = block_of(ids[i], num_blocks), place_of(tile, i, lowest, last, PAGES) * PAGE % BLOCK_SIZE
        rows = v_rows + (times_stride(block, stride_block) + offset * stride_token)
        of_tokens = times_stride(block, stride_scale_block) + offset * stride_scale_token
        for chunk in tl.static_range(PIECES * BITS // 8):
            for k in tl.static_range(4):
                words = words + (tl.load(rows + (8 * chunk + (k % 2 + k // 2 * 8) * stride_token)),)
        for k in tl.static_range(4):
            scales = scales_at + of_tokens + (k % 2 + k // 2 * 8) * stride_scale_token
            words = words + load_words(scales, NUM_GROUPS // 2)
        for k in tl.static_range(4):
            zeros = tl.load(zeros_at + 2 * of_tokens + (k % 2 + k // 2 * 8) * (2 * stride_scale_token))
            words = words + (zeros.to(tl.int32),)
    return words


@triton.jit
def scores_of(q, words, BITS: tl.constexpr, PIECES: tl.constexpr, COLS: tl.constexpr):
    """The scores of a page, in 2^-24: rows g and g + 8, columns 2 c and 2 c + 1."""
    PARTS: tl.constexpr = 8 // BITS
    CHUNKS: tl.constexpr = PIECES // PARTS
    none = tl.zeros(q[0].shape, tl.float32)
    scaled, za, zb = (), (none, none, none, none), (none, none, none, none)
    for i in tl.static_range(4 * PIECES):
        scaled = scaled + (times_scale(q[i], words[i], COLS),)
    for j in tl.static_range(PIECES):
        # As four words lie in registers: rows g hold the zeros of the first and third, rows g + 8 of the others.
        z0, z1, z2, z3 = some(words, 4 * PIECES + 4 * CHUNKS + 4 * j, 4)
        za = product(z0, z1, z2, z3, q[4 * j], q[4 * j + 2], za[0], za[1], za[2], za[3])
        zb = product(z0, z1, z2, z3, q[4 * j + 1], q[4 * j + 3], zb[0], zb[1], zb[2], zb[3])
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + ((none, none, none, none),)
    for chunk in tl.static_range(CHUNKS):
        rows = some(words, 4 * PIECES + 4 * chunk, 4)
        for x in tl.static_range(2):
            a0, a1 = bytes_0213(rows[x]), bytes_0213(rows[x + 2])
            a2, a3 = a0 >> 8, a1 >> 8
            new_parts = ()
            for part in tl.static_range(PARTS):
                t = parts[part]
                b0, b1 = scaled[4 * (part * CHUNKS + chunk) + 2 * x], scaled[4 * (part * CHUNKS + chunk) + 2 * x + 1]
                for i in tl.static_range(len(b0)):
                    t = product(
                        codes_of(a0, BITS, part), codes_of(a1, BITS, part), codes_of(a2, BITS, part),
                        codes_of(a3, BITS, part), b0[i], b1[i], t[0], t[1], t[2], t[3],
                    )  # fmt: skip
                new_parts = new_parts + (t,)
            parts = new_parts
    zero0, zero1 = (za[0] + zb[2]) * 2.0**-24, (za[1] + zb[3]) * 2.0**-24
    t0, t1, t2, t3 = parts[PARTS - 1]
    for down in tl.static_range(1, PARTS):
        t = parts[PARTS - 1 - down]
        t0, t1 = t0 * 2.0**-BITS + t[0], t1 * 2.0**-BITS + t[1]
        t2, t3 = t2 * 2.0**-BITS + t[2], t3 * 2.0**-BITS + t[3]
    if COLS < COLUMNS:
        t0, t1 = t0 + from_other(t0, 2), t1 + from_other(t1, 2)
        t2, t3 = t2 + from_other(t2, 2), t3 + from_other(t3, 2)
    return t0 + zero0, t1 + zero1, t2 + zero0, t3 + zero1


@triton.jit
def update(scores, top, total, scale_log2):
    """`softmax.update` for one column: scores of several rows, as a tuple; the total is that of this lane's rows."""
    largest = scores[0]
    for i in tl.static_range(1, len(scores)):
        largest = tl.maximum(largest, scores[i])
    new_top = tl.maximum(top, largest_of(largest) * scale_log2)
    rescale = tl.exp2(top - new_top)
    total = total * rescale
    weights = ()
    for i in tl.static_range(len(scores)):
        weight = tl.exp2(scores[i] * scale_log2 - new_top)
        total += weight
        weights = weights + (weight,)
    return weights, new_top, total, rescale


@triton.jit
def rescaled(accs, rescale0, rescale1):
    """Results of products, their columns multiplied."""
    new = ()
    for i in tl.static_range(len(accs) // 2):
        new = new + (accs[2 * i] * rescale0, accs[2 * i + 1] * rescale1)
    return new


@triton.jit
def add_values(
    accs, b0, b1, words, BITS: tl.constexpr, PIECES: tl.constexpr, NUM_GROUPS: tl.constexpr, COLS: tl.constexpr
):
    """Weights times a page's codes and scales, piece by piece, and last weights times zeros, a row a group."""
    PARTS: tl.constexpr = 8 // BITS
    CHUNKS: tl.constexpr = PIECES // PARTS
    PAIRS: tl.constexpr = NUM_GROUPS // 2
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        w0, w1, w2, w3 = some(words, 4 * chunk, 4)
        x0, x1, y0, y1 = pair(w0, w1, 0), pair(w2, w3, 0), pair(w0, w1, 1), pair(w2, w3, 1)
        chunks = chunks + (((x0, x0 >> 8, x1, x1 >> 8), (y0, y0 >> 8, y1, y1 >> 8)),)
    of_tokens = some(words, 4 * CHUNKS, 4 * PAIRS)
    scaled = ()
    for group in tl.static_range(NUM_GROUPS):
        steps0 = pair(of_tokens[group // 2], of_tokens[PAIRS + group // 2], group % 2)
        steps1 = pair(of_tokens[2 * PAIRS + group // 2], of_tokens[3 * PAIRS + group // 2], group % 2)
        scaled = scaled + ((times_scale(b0, steps0, COLS), times_scale(b1, steps1, COLS)),)
    new = ()
    for j in tl.static_range(PIECES):
        weights = scaled[j * NUM_GROUPS // PIECES]
        for u in tl.static_range(2):
            a = chunks[j % CHUNKS][u]
            t = some(accs, 8 * j + 4 * u, 4)
            for i in tl.static_range(len(weights[0])):
                t = product(
                    codes_of(a[0], BITS, j // CHUNKS), codes_of(a[1], BITS, j // CHUNKS),
                    codes_of(a[2], BITS, j // CHUNKS), codes_of(a[3], BITS, j // CHUNKS), weights[0][i], weights[1][i],
                    t[0], t[1], t[2], t[3],
                )  # fmt: skip
            new = new + t
    z0, z1, z2, z3 = some(words, 4 * CHUNKS + 4 * PAIRS, 4)
    z0, z1 = pair(z0, z1, 0), pair(z2, z3, 0)
    return new + product_at(accs, 8 * PIECES, z0, z0, z1, z1, b0, b1)


@triton.jit
def attend_old_pages(
    q, unit0, unit1, boundary0, boundary1, position0, position1, start, stop, lowest, last,
    row_ptr, stride_table_block, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr,
    scale, logit_cap, sliding_window, stride_cache_block, stride_k_scale_block, stride_v_scale_block, num_blocks,
    stride_cache_token: tl.constexpr, stride_k_scale_group: tl.constexpr, stride_v_scale_token: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr, NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr, QUERIES: tl.constexpr, COLS: tl.constexpr,
    PAGES: tl.constexpr,
):  # fmt: skip
    """Let tiles ``start`` to ``stop`` of PAGES pages pass; what is read of them are the pages ``lowest`` to ``last``.

    Pages that are not, at the end of a tile or before a sliding window, are another page with weights 0: whatever is
    read was written. Returns the sums of values, all in one unit, and (top, total) of both columns.
    """
    PARTS: tl.constexpr = 8 // BITS
    lane = tl.arange(0, unit0.shape[0]) % 32
    g, c = lane // 4, lane % 4
    k_rows, v_rows = k_ptr + (g * stride_cache_token + 2 * c), v_ptr + (2 * c * stride_cache_token + g)
    k_scales, k_zeros = k_scale_ptr + 4 * c, k_zero_ptr + 4 * c
    v_scales = v_scale_ptr + 2 * c * stride_v_scale_token
    v_zeros = v_zero_ptr + (4 * c * stride_v_scale_token + g % NUM_GROUPS)
    top0, total0 = tl.full(unit0.shape, LOWEST, tl.float32), tl.zeros(unit0.shape, tl.float32)
    top1, total1 = top0, total0
    accs = ()
    for _ in tl.static_range(8 * PIECES + 4):
        accs = accs + (tl.zeros(unit0.shape, tl.float32),)
    if CAPPED:
        scale0 = tl.full(unit0.shape, softmax.LOG2E, tl.float32)
        scale1 = scale0
    else:
        scale0, scale1 = unit0 * (2.0**24 * scale * softmax.LOG2E), unit1 * (2.0**24 * scale * softmax.LOG2E)

    # Each is loaded as soon as what it replaces has been used, half a tile and more before it is used itself.
    ids = load_ids(row_ptr, stride_table_block, start, lowest, last, PAGES, BLOCK_SIZE)
    keys = load_keys(
        ids, start, lowest, last, k_rows, k_scales, k_zeros, stride_cache_block, stride_k_scale_block, num_blocks,
        stride_cache_token, stride_k_scale_group, PAGES, BITS, PIECES, BLOCK_SIZE, GROUP_SIZE,
    )  # fmt: skip
    values = load_values(
        ids, start, lowest, last, v_rows, v_scales, v_zeros, stride_cache_block, stride_v_scale_block, num_blocks,
        stride_cache_token, stride_v_scale_token, PAGES, BITS, PIECES, NUM_GROUPS, BLOCK_SIZE,
    )  # fmt: skip
    ids = load_ids(row_ptr, stride_table_block, start + 1, lowest, last, PAGES, BLOCK_SIZE)
    KEYS: tl.constexpr = PIECES * BITS // 2 + 8 * PIECES  # words of a page
    VALUES: tl.constexpr = PIECES * BITS // 2 + 2 * NUM_GROUPS + 4
    for tile in tl.range(start, stop, num_stages=1):
        scores0, scores1 = (), ()
        next_ids = load_ids(row_ptr, stride_table_block, tile + 2, lowest, last, PAGES, BLOCK_SIZE)
        for i in tl.static_range(PAGES):
            s0, s1, s2, s3 = scores_of(q, some(keys, KEYS * i, KEYS), BITS, PIECES, COLS)
            if CAPPED:
                s0 = softmax.cap_scores(s0 * (unit0 * 2.0**24), scale, logit_cap)
                s1 = softmax.cap_scores(s1 * (unit1 * 2.0**24), scale, logit_cap)
                s2 = softmax.cap_scores(s2 * (unit0 * 2.0**24), scale, logit_cap)
                s3 = softmax.cap_scores(s3 * (unit1 * 2.0**24), scale, logit_cap)
            if QUERIES > 1 or WINDOWED:
                upper = (tile * PAGES + i) * PAGE + g
                lower = upper + 8
                see0, see1, see2, see3 = upper < boundary0, upper < boundary1, lower < boundary0, lower < boundary1
                if WINDOWED:
                    first0, first1 = position0 - sliding_window, position1 - sliding_window
                    see0, see1 = see0 & (upper > first0), see1 & (upper > first1)
                    see2, see3 = see2 & (lower > first0), see3 & (lower > first1)
                s0, s1 = tl.where(see0, s0, float("-inf")), tl.where(see1, s1, float("-inf"))
                s2, s3 = tl.where(see2, s2, float("-inf")), tl.where(see3, s3, float("-inf"))
            elif PAGES > 1:
                hidden = tl.where(tile * PAGES + i <= last, 0.0, float("-inf"))
                s0, s1, s2, s3 = s0 + hidden, s1 + hidden, s2 + hidden, s3 + hidden
            scores0, scores1 = scores0 + (s0, s2), scores1 + (s1, s3)
        if tile + 1 < stop:
            keys = load_keys(
                ids, tile + 1, lowest, last, k_rows, k_scales, k_zeros, stride_cache_block, stride_k_scale_block,
                num_blocks, stride_cache_token, stride_k_scale_group, PAGES, BITS, PIECES, BLOCK_SIZE, GROUP_SIZE,
            )  # fmt: skip

        weights0, top0, total0, rescale0 = update(scores0, top0, total0, scale0)
        weights1, top1, total1, rescale1 = update(scores1, top1, total1, scale1)
        accs = rescaled(accs, rescale0, rescale1)
        for i in tl.static_range(PAGES):
            b0 = transposed(packed(weights0[2 * i], weights1[2 * i], tl.float16))
            b1 = transposed(packed(weights0[2 * i + 1], weights1[2 * i + 1], tl.float16))
            accs = add_values(accs, b0, b1, some(values, VALUES * i, VALUES), BITS, PIECES, NUM_GROUPS, COLS)
        if tile + 1 < stop:
            values = load_values(
                ids, tile + 1, lowest, last, v_rows, v_scales, v_zeros, stride_cache_block, stride_v_scale_block,
                num_blocks, stride_cache_token, stride_v_scale_token, PAGES, BITS, PIECES, NUM_GROUPS, BLOCK_SIZE,
            )  # fmt: skip
        ids = next_ids

    whole = ()
    for j in tl.static_range(PIECES):
        of_group = j * NUM_GROUPS // PIECES * 4 + c  # the lane that has the zeros' sums
        zero0, zero1 = from_lane(accs[8 * PIECES], of_group), from_lane(accs[8 * PIECES + 1], of_group)
        for i in tl.static_range(4):
            acc0, acc1 = accs[8 * j + 2 * i], accs[8 * j + 2 * i + 1]
            if COLS < COLUMNS:
                acc0, acc1 = acc0 + from_other(acc0, 2), acc1 + from_other(acc1, 2)
            unit = 2.0 ** (24 - BITS * (j // (PIECES // PARTS)))
            whole = whole + (acc0 * unit + zero0, acc1 * unit + zero1)
    return whole, top0, top1, total0, total1


@triton.jit
def attend_young_pages(
    q, accs, top0, top1, total0, total1, boundary0, boundary1, position0, position1, start, stop, lowest, end,
    row_ptr, stride_table_block, k_ptr, v_ptr, scale, logit_cap, sliding_window,
    stride_window_block, stride_window_token, num_blocks,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PIECES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Let pages ``start`` to ``stop`` pass from the window; what is read of them are the keys ``lowest`` to ``end``."""
    lane = tl.arange(0, top0.shape[0]) % 32
    g, c = lane // 4, lane % 4
    scale_log2 = scale * softmax.LOG2E
    if CAPPED:
        scale_log2 = softmax.LOG2E
    none = tl.zeros(top0.shape, tl.float32)
    for page in tl.range(start, stop, num_stages=1):
        s0, s1, s2, s3 = none, none, none, none
        k_rows = ()
        for half in tl.static_range(2):
            key = tl.minimum(tl.maximum(page * PAGE + 8 * half + g, lowest), end - 1)
            block = tl.load(row_ptr + key // BLOCK_SIZE * stride_table_block)
            block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)
            cells = block * stride_window_block + key % BLOCK_SIZE * stride_window_token
            k_rows = k_rows + (k_ptr + cells + 4 * c,)
        for j in tl.static_range(PIECES):
            upper, lower = load_words(k_rows[0] + 16 * j, 4), load_words(k_rows[1] + 16 * j, 4)
            for x in tl.static_range(2):
                s0, s1, s2, s3 = product(
                    upper[2 * x], lower[2 * x], upper[2 * x + 1], lower[2 * x + 1],
                    q[4 * j + 2 * x], q[4 * j + 2 * x + 1], s0, s1, s2, s3, DTYPE,
                )  # fmt: skip
        if CAPPED:
            s0, s1 = softmax.cap_scores(s0, scale, logit_cap), softmax.cap_scores(s1, scale, logit_cap)
            s2, s3 = softmax.cap_scores(s2, scale, logit_cap), softmax.cap_scores(s3, scale, logit_cap)
        upper = page * PAGE + g
        lower = upper + 8
        see0, see1 = (upper >= boundary0) & (upper <= position0), (upper >= boundary1) & (upper <= position1)
        see2, see3 = (lower >= boundary0) & (lower <= position0), (lower >= boundary1) & (lower <= position1)
        if WINDOWED:
            first0, first1 = position0 - sliding_window, position1 - sliding_window
            see0, see1 = see0 & (upper > first0), see1 & (upper > first1)
            see2, see3 = see2 & (lower > first0), see3 & (lower > first1)
        s0, s1 = tl.where(see0, s0, float("-inf")), tl.where(see1, s1, float("-inf"))
        s2, s3 = tl.where(see2, s2, float("-inf")), tl.where(see3, s3, float("-inf"))
        weights0, top0, total0, rescale0 = update((s0, s2), top0, total0, scale_log2)
        weights1, top1, total1, rescale1 = update((s1, s3), top1, total1, scale_log2)
        accs = rescaled(accs, rescale0, rescale1)
        b0 = transposed(packed(weights0[0], weights1[0], DTYPE))
        b1 = transposed(packed(weights0[1], weights1[1], DTYPE))
        v_rows = ()
        for i in tl.static_range(4):
            key = tl.minimum(tl.maximum(page * PAGE + 2 * c + (i % 2 + i // 2 * 8), lowest), end - 1)
            block = tl.load(row_ptr + key // BLOCK_SIZE * stride_table_block)
            block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)
            cells = block * stride_window_block + key % BLOCK_SIZE * stride_window_token
            v_rows = v_rows + (v_ptr + cells + 2 * g,)
        new = ()
        for j in tl.static_range(PIECES):
            w0, w1 = load_words(v_rows[0] + 16 * j, 2), load_words(v_rows[1] + 16 * j, 2)
            w2, w3 = load_words(v_rows[2] + 16 * j, 2), load_words(v_rows[3] + 16 * j, 2)
            for u in tl.static_range(2):
                new = new + product_at(
                    accs, 8 * j + 4 * u, pair(w0[u], w1[u], 0), pair(w0[u], w1[u], 1),
                    pair(w2[u], w3[u], 0), pair(w2[u], w3[u], 1), b0, b1, DTYPE,
                )  # fmt: skip
        accs = new
    return accs, top0, top1, total0, total1


# ---- the kernel -------------------------------------------------------------------------------------------------


@triton.jit
def quantized_before(position, window, GROUP_SIZE: tl.constexpr):
    """The position before which a query reads keys and values quantized: the end of the last group old enough."""
    return tl.maximum(position + 1 - window, 0) // GROUP_SIZE * GROUP_SIZE


@triton.jit
def query_of(column, tile, QUERIES: tl.constexpr, GROUP: tl.constexpr, COLS: tl.constexpr):
    """(the query of a column, its head within the group, whether there is one in such a column)."""
    row = column % COLS
    return tile * QUERIES + row // GROUP, row % GROUP, row < QUERIES * GROUP


@triton.jit
def store_part(
    accs, top0, top1, total0, total1, place, parts_ptr, stats_ptr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Leave a part at its place in the scratch: the first ROWS columns of each warp, as rows."""
    lane = tl.arange(0, 32 * HEADS) % 32
    g, c = lane // 4, lane % 4
    of_part = parts_ptr + place.to(tl.int64) * (HEADS * COLUMNS * PIECES * 32)
    of_stats = stats_ptr + place.to(tl.int64) * (2 * HEADS * COLUMNS)
    warp = tl.arange(0, 32 * HEADS) // 32
    for e in tl.static_range(2):
        column = 2 * c + e
        row = warp * COLUMNS + column
        at = row * (PIECES * 32) + 4 * g
        for j in tl.static_range(PIECES):
            for i in tl.static_range(4):
                tl.store(of_part + at + (32 * j + i), accs[8 * j + 2 * i + e], mask=column < ROWS)
        first = (column < ROWS) & (g == 0)
        tl.store(of_stats + row, top0 if e == 0 else top1, mask=first)
        tl.store(of_stats + HEADS * COLUMNS + row, total0 if e == 0 else total1, mask=first)


@triton.jit
def merge_parts(
    first, last, parts_ptr, stats_ptr, row, out_ptr, sinks_ptr, token, head, there,
    stride_out_token, stride_out_head, stride_out_dim, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """`merging.merge_parts`, for rows anywhere, without shared memory: a few parts at a time, in registers."""
    dim = tl.arange(0, HEAD_DIM)
    top, total = softmax.empty(row.shape[0])
    acc = tl.zeros([row.shape[0], HEAD_DIM], tl.float32)
    for step in tl.range(first, last + 1, FEW_PARTS, num_stages=1):
        parts = ()
        for i in tl.static_range(FEW_PARTS):
            part = step + i
            loaded = row * 0 + part <= last
            place = (part * 2 + tl.where(part == first, 1, 0)).to(tl.int64)
            stats = stats_ptr + place * (2 * HEADS * COLUMNS) + row
            part_top = tl.load(stats, mask=loaded, other=float("-inf"), cache_modifier=".cg")
            part_total = tl.load(stats + HEADS * COLUMNS, mask=loaded, other=0.0, cache_modifier=".cg")
            at = parts_ptr + place * (HEADS * COLUMNS * HEAD_DIM) + row[:, None] * HEAD_DIM + dim[None, :]
            values = tl.load(at, mask=loaded[:, None], other=0.0, cache_modifier=".cg")
            parts = parts + ((values, part_top, part_total),)
        for i in tl.static_range(FEW_PARTS):
            acc, top, total = merging.merge(acc, top, total, parts[i][0], parts[i][1], parts[i][2])
    merging.store_rows(
        acc, top, total, out_ptr, sinks_ptr, token, head, there, dim, stride_out_token, stride_out_head,
        stride_out_dim, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def decode_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim / 2], words of two numbers
    k_window_ptr,  # [num_window_blocks, block_size, num_kv_heads, head_dim / 2], likewise
    v_window_ptr,
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, packed_head_dim / 4], words of four bytes
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, groups_per_block, num_kv_heads, head_dim / 2], words of two numbers
    k_zero_ptr,
    v_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups / 2], likewise
    v_zero_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups], int16
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
    stride_q_token, stride_q_head,  # in words, as all but the result's
    stride_window_block, stride_window_token, stride_window_head,
    stride_cache_block, stride_cache_token: tl.constexpr, stride_cache_head,
    stride_k_scale_block, stride_k_scale_group: tl.constexpr, stride_k_scale_head,
    stride_v_scale_block, stride_v_scale_token: tl.constexpr, stride_v_scale_head,
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
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGES: tl.constexpr,
):  # fmt: skip
    TILE_KV: tl.constexpr = PAGES * PAGE
    lane, warp = tl.arange(0, 32 * HEADS) % 32, tl.arange(0, 32 * HEADS) // 32
    c = lane % 4
    program = tl.program_id(0)
    line, num_workers, begin, end, seq, seq_begin = paging.find_share(
        program, tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens,
        max_blocks_per_seq * BLOCK_SIZE, num_bundles, sliding_window, QUERIES, TILE_KV, WINDOWED,
    )  # fmt: skip
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, max_blocks_per_seq * BLOCK_SIZE
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
                kv_head = bundle * HEADS + warp
                query, head, there = query_of(lane // 4, tile, QUERIES, GROUP, COLS)
                there = there & (query < num_queries)
                in_q = (first_row + query).to(tl.int64) * stride_q_token + (kv_head * GROUP + head) * stride_q_head
                q_rows = q_ptr + tl.where(there, in_q, 0)
                small, column_unit = below_one(load_queries(q_rows, there, PIECES), DTYPE)
                unit0, unit1 = from_lane(column_unit, 8 * c), from_lane(column_unit, 8 * c + 4)

                context = seq_len - num_queries
                query0, _, _ = query_of(2 * c, tile, QUERIES, GROUP, COLS)
                query1, _, _ = query_of(2 * c + 1, tile, QUERIES, GROUP, COLS)
                position0, position1 = context + query0, context + query1
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                first_young = quantized_before(context + tile * QUERIES, window, GROUP_SIZE)
                end_old = quantized_before(last_key - 1, window, GROUP_SIZE)
                boundary0 = tl.minimum(quantized_before(position0, window, GROUP_SIZE), end_old)
                boundary1 = tl.minimum(quantized_before(position1, window, GROUP_SIZE), end_old)
                lowest = context * 0
                if WINDOWED:
                    lowest = tl.maximum(context + tile * QUERIES + 1 - sliding_window, 0)

                start = first_tile + unit - seg_begin
                stop = first_tile + tl.minimum(end, seg_end) - seg_begin
                stop_old = tl.minimum(stop, (end_old + TILE_KV - 1) // TILE_KV)
                stop_old = tl.where(lowest < end_old, stop_old, 0)
                head64 = kv_head.to(tl.int64)
                in_k_scales, in_v_scales = head64 * stride_k_scale_head, head64 * stride_v_scale_head
                accs, top0, top1, total0, total1 = attend_old_pages(
                    small, unit0, unit1, boundary0, boundary1, position0, position1,
                    start, stop_old, lowest // PAGE, tl.maximum(end_old // PAGE - 1, 0),
                    block_table_ptr + seq.to(tl.int64) * stride_table_seq, stride_table_block,
                    k_cache_ptr + head64 * stride_cache_head, v_cache_ptr + head64 * stride_cache_head,
                    k_scale_ptr + in_k_scales, k_zero_ptr + in_k_scales,
                    v_scale_ptr + in_v_scales, v_zero_ptr + 2 * in_v_scales, scale, logit_cap, sliding_window,
                    stride_cache_block, stride_k_scale_block, stride_v_scale_block, num_blocks,
                    stride_cache_token, stride_k_scale_group, stride_v_scale_token,
                    WINDOWED, CAPPED, BITS, PIECES, NUM_GROUPS, BLOCK_SIZE, GROUP_SIZE, QUERIES, COLS, PAGES,
                )  # fmt: skip
                accs, top0, top1, total0, total1 = attend_young_pages(
                    load_queries(q_rows, there, PIECES, AGAIN=True), accs, top0, top1, total0, total1,
                    boundary0, boundary1, position0, position1,
                    tl.maximum(start * PAGES, tl.maximum(first_young, lowest) // PAGE),
                    tl.minimum(stop * PAGES, (last_key + PAGE - 1) // PAGE), tl.maximum(first_young, lowest), last_key,
                    window_block_table_ptr + seq.to(tl.int64) * stride_window_table_seq, stride_window_table_block,
                    k_window_ptr + head64 * stride_window_head, v_window_ptr + head64 * stride_window_head,
                    scale, logit_cap, sliding_window, stride_window_block, stride_window_token, num_window_blocks,
                    WINDOWED, CAPPED, PIECES, BLOCK_SIZE, DTYPE,
                )  # fmt: skip

                tl.debug_barrier()  # the part of a segment before this one may still be read
                store_part(
                    accs, top0, top1, sum_of(total0), sum_of(total1), program * 2 + (seg_begin >= begin).to(tl.int32),
                    parts_ptr, stats_ptr, ROWS, HEADS, PIECES,
                )  # fmt: skip
                first, last = program, program
                complete = (seg_begin >= begin) & (seg_end <= end)
                if complete:
                    tl.debug_barrier()  # other lanes read what a lane has stored
                else:
                    first = paging.worker_of(seg_begin, num_workers, line)
                    last = paging.worker_of(seg_end - 1, num_workers, line)
                    complete = merging.is_last(seg_begin, seg_end, line, num_workers, counters_ptr)
                if complete:
                    row = tl.arange(0, ROWS * HEADS)
                    of_row, head_of_row, is_row = query_of(row // HEADS, tile, QUERIES, GROUP, COLS)
                    merge_parts(
                        first, last, parts_ptr, stats_ptr, row % HEADS * COLUMNS + row // HEADS, out_ptr, sinks_ptr,
                        (first_row + of_row).to(tl.int64), (bundle * HEADS + row % HEADS) * GROUP + head_of_row,
                        is_row & (of_row < num_queries), stride_out_token, stride_out_head, stride_out_dim,
                        HEADS, PIECES * 32,
                    )  # fmt: skip
            unit = tl.minimum(following, end)
