"""Decodes over a cache of small codes in float16 and bfloat16: a warp a KV head, lane by lane (`fast/_triton/lanes.py`).

A decode over codes is bound by memory only if few instructions touch a code. So nothing is ever moved from lane to lane
but the weights, and nothing is dequantized:

- A product takes a page of 16 keys: they are rows, and 8 queries are columns; then the values' channels are rows. Words
  of codes are loaded by the lane that needs them of an operand. Which step of a product is which channel is free, so a
  lane takes channels that lie side by side, and what the first and second step of a pair are, their word decides.
- Codes become float16s in the register: e4m3 by the GPU's conversion; integers as the bottom bits of a fraction, a
  subnormal number, which tensor cores multiply exactly (int8: plus 128, which is taken off again).
- A key's scale multiplies its score and a value's scale its weight. The zero of a group enters as zero times the
  sum of the query's numbers there, and zero times the sum of weights.
- Queries are divided by a power of two near their largest number. Weights are relative to the largest weight times
  scale, not to the largest weight, so that the products fit float16: a score and its value's scale's logarithm have a
  common top.

A *chunk* is what one load of all lanes covers of a head; the lane c of four (keys), or g of eight (values), takes
VECTOR words of it. Chunks never straddle two groups of scales.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton import merging, paging, softmax
from fast._triton.lanes import (
    float8s,
    from_lane,
    from_other,
    halves_of,
    interleaved,
    largest_of,
    load_words,
    multiply_add,
    packed,
    pair,
    product,
    product_at,
    sum_of,
    transposed,
)
from fast._triton.overlap import wait_for_predecessor
from fast._triton.platform import INTERPRETED
from fast._triton.rounding import store
from fast.attention._cached_tiles import PER_BATCH
from fast.kv_cache._kivi_decode import block_of, load_ids, place_of, query_of, rescaled, some, times_stride

PAGE = tl.constexpr(16)  # keys of a product
COLUMNS = tl.constexpr(8)  # queries of a product
FEW_PARTS = tl.constexpr(2)  # of a cut segment, loaded at a time
LOWEST = tl.constexpr(-3.0e38)  # a top before any key: finite, as its difference to a score must be a number
HEADROOM = tl.constexpr(8.0)  # the largest weight times scale is 2^8 when the top is raised,
SLACK = tl.constexpr(15.0)  # and below 2^15 always
SMALLEST_LOG2 = tl.constexpr(-64.0)  # of a value's scale: smaller ones, and 0, count as that in the top


# ---- codes ------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def exponent_of(codes, nibble):
    """A float16 made of a code is the code times 2 to the minus this."""
    return {"int8": 24, "fp8": 0, "int4": 20 if nibble else 24}[codes]


@triton.jit
def two_codes(word, CODES: tl.constexpr, NIBBLE: tl.constexpr, SECOND: tl.constexpr):
    """Two codes of a word: of bytes 0 and 2, or (SECOND) 1 and 3; float8s of bytes 0 and 1, or 2 and 3."""
    if CODES == "fp8":
        codes = float8s(word, SECOND)
    else:
        if CODES == "int8":
            word = word ^ -0x7F7F7F80
        if SECOND:
            word = word >> 8
        if CODES == "int8":  # code + 128, less 128, both times 2^-24
            one, offset = tl.full(word.shape, 0x3C003C00, tl.int32), tl.full(word.shape, -0x7F7F7F80, tl.int32)
            codes = multiply_add(word & 0x00FF00FF, one, offset)
        else:
            codes = word & (0x000F000F << (4 * NIBBLE))
    return codes


@triton.jit
def two_tokens(a, b, CODES: tl.constexpr, HALF: tl.constexpr):
    """A half of two words, so that ``two_codes`` finds a channel of both tokens, and then the next channel."""
    if CODES == "fp8":
        word = interleaved(a, b, HALF)
    else:
        word = pair(a, b, HALF)
    return word


@triton.jit
def scales_of(words):
    """Scales as they were loaded, in float32."""
    scales = ()
    for i in tl.static_range(len(words)):
        if words[i].dtype == tl.int32:
            scales = scales + halves_of(words[i], tl.float16)
        else:
            scales = scales + (words[i].to(tl.float32),)
    return scales


@triton.jit
def log2_of(x):
    """Of a scale; NaN where it is negative, which counts as the smallest."""
    if INTERPRETED:
        y = tl.log2(tl.maximum(x, 1e-38))
    else:
        asm: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        y = tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.maximum(y, SMALLEST_LOG2)


# ---- queries ----------------------------------------------------------------------------------------------------


@triton.jit
def load_queries(q_rows, there, BYTES: tl.constexpr, NIBBLES: tl.constexpr, VECTOR: tl.constexpr):
    """The words of a lane's channels, of its column's query; zeros where there is none."""
    COUNT: tl.constexpr = min(4, 2 * VECTOR)
    c = tl.arange(0, there.shape[0]) % 4
    words = ()
    for chunk in tl.static_range(NIBBLES * BYTES // (16 * VECTOR)):
        for i in tl.static_range(2 * VECTOR // COUNT):
            loaded = load_words(q_rows + (8 * VECTOR * chunk + 2 * VECTOR * c + COUNT * i), COUNT)
            for j in tl.static_range(COUNT):
                words = words + (tl.where(there, loaded[j], 0),)
    return words


@triton.jit
def operands_of_queries(
    words, DTYPE: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, VECTOR: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
):  # fmt: skip
    """Of a lane's column: (its query as the right operands of products, the sums of each group, the power of two that
    both are to be multiplied by). The numbers are below 2^11, and 16 times as large where codes are 16 times smaller.
    """
    CHUNKS: tl.constexpr = BYTES // (16 * VECTOR)
    numbers, largest = (), tl.zeros(words[0].shape, tl.float32)
    for i in tl.static_range(len(words)):
        low, high = halves_of(words[i], DTYPE)
        largest = tl.maximum(largest, tl.maximum(tl.abs(low), tl.abs(high)))
        numbers = numbers + (low, high)
    largest = tl.maximum(largest, from_other(largest, 1))
    largest = tl.maximum(largest, from_other(largest, 2))
    bits = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 17 << 23)
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True) * 1024.0
    operands, sums = (), ()
    for group in tl.static_range(NUM_GROUPS):
        group_sum = tl.zeros(words[0].shape, tl.float32)
        for chunk in tl.static_range(NIBBLES * CHUNKS):
            if chunk * NUM_GROUPS // (NIBBLES * CHUNKS) == group:
                for i in tl.static_range(4 * VECTOR):
                    group_sum += numbers[4 * VECTOR * chunk + i] * inverse
        group_sum = group_sum + from_other(group_sum, 1)
        sums = sums + (group_sum + from_other(group_sum, 2),)
    for chunk in tl.static_range(NIBBLES * CHUNKS):
        unit = inverse * (16.0 if chunk // CHUNKS < NIBBLES - 1 else 1.0)
        for i in tl.static_range(VECTOR):
            x0, x1, x2, x3 = some(numbers, 4 * (VECTOR * chunk + i), 4)
            if CODES == "fp8":
                operands = operands + (packed(x0 * unit, x1 * unit, tl.float16),)
                operands = operands + (packed(x2 * unit, x3 * unit, tl.float16),)
            else:
                operands = operands + (packed(x0 * unit, x2 * unit, tl.float16),)
                operands = operands + (packed(x1 * unit, x3 * unit, tl.float16),)
    return operands, sums, bits.to(tl.float32, bitcast=True) * (1 / 1024.0)


# ---- a page of keys ---------------------------------------------------------------------------------------------


@triton.jit
def load_scales(scales_at, stride_scale_token: tl.constexpr, SCALE_WORDS: tl.constexpr):
    """Of the two rows of scores that a lane has."""
    return load_words(scales_at, SCALE_WORDS) + load_words(scales_at + 8 * stride_scale_token, SCALE_WORDS)


@triton.jit
def find_pages(
    ids, tile, first, last, stride_block, stride_scale_block, num_blocks, stride_token: tl.constexpr,
    stride_scale_token: tl.constexpr, PAGES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Where each page of a tile begins in the codes, and in the scales."""
    places = ()
    for i in tl.static_range(PAGES):
        block, offset = block_of(ids[i], num_blocks), place_of(tile, i, first, last, PAGES) * PAGE % BLOCK_SIZE
        in_codes = times_stride(block, stride_block) + offset * stride_token
        places = places + (in_codes, times_stride(block, stride_scale_block) + offset * stride_scale_token)
    return places


@triton.jit
def load_keys(
    places, k_rows, scales_at, zeros_at, stride_token: tl.constexpr, stride_scale_token: tl.constexpr,
    BYTES: tl.constexpr, VECTOR: tl.constexpr, SCALE_WORDS: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    """Of each page two rows of codes, word by word of both, and their scales and zeros."""
    words = ()
    for i in tl.static_range(len(places) // 2):
        rows = k_rows + places[2 * i]
        for chunk in tl.static_range(BYTES // (16 * VECTOR)):
            upper = load_words(rows + 4 * VECTOR * chunk, VECTOR, HINT=HINT)
            lower = load_words(rows + (8 * stride_token + 4 * VECTOR * chunk), VECTOR, HINT=HINT)
            for j in tl.static_range(VECTOR):
                words = words + (upper[j], lower[j])
        words = words + load_scales(scales_at + places[2 * i + 1], stride_scale_token, SCALE_WORDS)
        if zeros_at is not None:
            words = words + load_scales(zeros_at + places[2 * i + 1], stride_scale_token, SCALE_WORDS)
    return words


@triton.jit
def load_values(
    places, v_rows, scales_at, zeros_at, stride_token: tl.constexpr, stride_scale_token: tl.constexpr,
    BYTES: tl.constexpr, VECTOR: tl.constexpr, SCALE_WORDS: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    """Of each page four tokens' codes, word by word of all four; scales and zeros of the two rows of scores."""
    words = ()
    for i in tl.static_range(len(places) // 2):
        rows = v_rows + places[2 * i]
        for chunk in tl.static_range(BYTES // (32 * VECTOR)):
            w0 = load_words(rows + 8 * VECTOR * chunk, VECTOR, HINT=HINT)
            w1 = load_words(rows + (stride_token + 8 * VECTOR * chunk), VECTOR, HINT=HINT)
            w2 = load_words(rows + (8 * stride_token + 8 * VECTOR * chunk), VECTOR, HINT=HINT)
            w3 = load_words(rows + (9 * stride_token + 8 * VECTOR * chunk), VECTOR, HINT=HINT)
            for j in tl.static_range(VECTOR):
                words = words + (w0[j], w1[j], w2[j], w3[j])
        words = words + load_scales(scales_at + places[2 * i + 1], stride_scale_token, SCALE_WORDS)
        if zeros_at is not None:
            words = words + load_scales(zeros_at + places[2 * i + 1], stride_scale_token, SCALE_WORDS)
    return words


@triton.jit
def scores_of(
    q, sums0, sums1, words, scales, CODES: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr,
    VECTOR: tl.constexpr, NUM_GROUPS: tl.constexpr,
):  # fmt: skip
    """The scores of a page, in units of the last nibble's codes: rows g and g + 8, columns 2 c and 2 c + 1."""
    CHUNKS: tl.constexpr = BYTES // (16 * VECTOR)
    CODE: tl.constexpr = 2.0 ** -exponent_of(CODES, NIBBLES - 1)
    none = tl.zeros(q[0].shape, tl.float32)
    s0, s1, s2, s3 = none, none, none, none
    for group in tl.static_range(NUM_GROUPS):
        t = (none, none, none, none)
        for chunk in tl.static_range(NIBBLES * CHUNKS):
            if chunk * NUM_GROUPS // (NIBBLES * CHUNKS) == group:
                for i in tl.static_range(VECTOR):
                    upper, lower = some(words, 2 * (chunk % CHUNKS * VECTOR + i), 2)
                    t = product(
                        two_codes(upper, CODES, chunk // CHUNKS, 0), two_codes(lower, CODES, chunk // CHUNKS, 0),
                        two_codes(upper, CODES, chunk // CHUNKS, 1), two_codes(lower, CODES, chunk // CHUNKS, 1),
                        q[2 * (chunk * VECTOR + i)], q[2 * (chunk * VECTOR + i) + 1], t[0], t[1], t[2], t[3],
                    )  # fmt: skip
        upper, lower = scales[group], scales[NUM_GROUPS + group]
        s0, s1, s2, s3 = s0 + t[0] * upper, s1 + t[1] * upper, s2 + t[2] * lower, s3 + t[3] * lower
        if len(scales) > 2 * NUM_GROUPS:
            upper, lower = scales[2 * NUM_GROUPS + group], scales[3 * NUM_GROUPS + group]
            sum0, sum1 = sums0[group] * CODE, sums1[group] * CODE
            s0, s1, s2, s3 = s0 + sum0 * upper, s1 + sum1 * upper, s2 + sum0 * lower, s3 + sum1 * lower
    return s0, s1, s2, s3


@triton.jit
def hide(scores, tile, position, sliding_window, WINDOWED: tl.constexpr):
    """-inf for every score of a key that the query of a column does not see."""
    hidden = ()
    for i in tl.static_range(len(scores)):
        key = (tile * len(scores) + i) * 8 + tl.arange(0, position.shape[0]) % 32 // 4
        seen = key <= position
        if WINDOWED:
            seen = seen & (key > position - sliding_window)
        hidden = hidden + (tl.where(seen, scores[i], float("-inf")),)
    return hidden


@triton.jit
def zero_scales(scales, tile, lowest, end, PAGES: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """0 for the scales and zeros of values that are none."""
    new = ()
    COUNT: tl.constexpr = len(scales) // PAGES
    for i in tl.static_range(len(scales)):
        row = (tile * PAGES + i // COUNT) * PAGE + i // NUM_GROUPS % 2 * 8
        key = row + tl.arange(0, scales[i].shape[0]) % 32 // 4
        new = new + (tl.where((key >= lowest) & (key < end), scales[i], 0.0),)
    return new


@triton.jit
def zero_codes(values, tile, lowest, end, PAGES: tl.constexpr, WORDS: tl.constexpr):
    """0 for the codes of values that are none."""
    new = ()
    ALL: tl.constexpr = len(values) // PAGES
    for i in tl.static_range(len(values)):
        if i % ALL < WORDS:
            row = (tile * PAGES + i // ALL) * PAGE + i % ALL % 2 + i % ALL % 4 // 2 * 8
            key = row + tl.arange(0, values[i].shape[0]) % 4 * 2
            new = new + (tl.where((key >= lowest) & (key < end), values[i], 0),)
        else:
            new = new + (values[i],)
    return new


@triton.jit
def logs_of(scales, PAGES: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """The logarithm, to base 2, of the largest of each row's scales of values."""
    COUNT: tl.constexpr = len(scales) // PAGES
    logs = ()
    for i in tl.static_range(2 * PAGES):
        of_row = some(scales, i // 2 * COUNT + i % 2 * NUM_GROUPS, NUM_GROUPS)
        largest = of_row[0]
        for group in tl.static_range(1, NUM_GROUPS):
            largest = tl.maximum(largest, of_row[group])
        logs = logs + (log2_of(largest),)
    return logs


@triton.constexpr_function
def _raise_asm(count):
    """Of $0 and $1, the tops of a lane's two columns, and the rest up to $count: sums in their units, by turns."""
    lines = [
        ".reg .pred p, q; .reg .f32 m0, m1, t, r0, r1;",
        f"add.f32 t, $0, {SLACK.value}; setp.gt.f32 p, ${count}, t; add.f32 t, $1, {SLACK.value}; setp.gt.or.f32 p, ${count + 1}, t, p;",
        "vote.sync.any.pred p, p, -1; @!p bra DONE;",
        f"mov.f32 m0, ${count}; mov.f32 m1, ${count + 1};",
    ]
    for column in range(2):
        for distance in (4, 8, 16):
            lines.append(f"shfl.sync.bfly.b32 t, m{column}, {distance}, 31, -1; max.f32 m{column}, m{column}, t;")
        lines.append(f"sub.f32 m{column}, m{column}, {HEADROOM.value}; max.f32 m{column}, m{column}, ${column};")
        lines.append(f"sub.f32 t, ${column}, m{column}; ex2.approx.ftz.f32 r{column}, t; mov.f32 ${column}, m{column};")
    lines += [f"mul.f32 ${i}, ${i}, r{i % 2};" for i in range(2, count)]
    return "{ " + " ".join(lines) + " DONE: }"


@triton.constexpr_function
def _raise_constraints(count):
    return ",".join(["=f"] * count + ["f", "f"] + [str(i) for i in range(count)])


@triton.jit
def raise_tops(largest0, largest1, state):
    """``state``: the tops of a lane's two columns, and sums in units of 2 to the power of them. If some weight of the
    warp would be above 2^SLACK, tops become such that the largest of each column is at most 2^HEADROOM.

    A branch of one warp, which Triton has none of: nearly always there is nothing to do.
    """
    if INTERPRETED:
        over = ((largest0 > state[0] + SLACK) | (largest1 > state[1] + SLACK)).to(tl.int32)
        over = tl.max(over.reshape(over.shape[0] // 32, 32), 1)
        over = tl.broadcast_to(over[:, None], [over.shape[0], 32]).reshape(largest0.shape) > 0
        top0 = tl.where(over, tl.maximum(state[0], largest_of(largest0) - HEADROOM), state[0])
        top1 = tl.where(over, tl.maximum(state[1], largest_of(largest1) - HEADROOM), state[1])
        new = (top0, top1) + rescaled(some(state, 2, len(state) - 2), tl.exp2(state[0] - top0), tl.exp2(state[1] - top1))
    else:
        asm: tl.constexpr = _raise_asm(len(state))
        constraints: tl.constexpr = _raise_constraints(len(state))
        kinds: tl.constexpr = _floats(len(state))
        new = tl.inline_asm_elementwise(asm, constraints, (largest0, largest1) + state, kinds, is_pure=True, pack=1)
    return new


@triton.constexpr_function
def _floats(count):
    return (tl.float32,) * count


@triton.jit
def largest_logit(scores, logs, scale_log2):
    """Of a lane's rows of a column: the largest weight times scale, to base 2."""
    largest = scores[0] * scale_log2 + logs[0]
    for i in tl.static_range(1, len(scores)):
        largest = tl.maximum(largest, scores[i] * scale_log2 + logs[i])
    return largest


@triton.jit
def weights_of(scores, top, total, scale_log2):
    """The weights of a column's rows that a lane has; and the total with them."""
    weights = ()
    for i in tl.static_range(len(scores)):
        weight = tl.exp2(scores[i] * scale_log2 - top)
        total += weight
        weights = weights + (weight,)
    return weights, total


@triton.jit
def operands_of(w0, w1, w2, w3, SPLIT: tl.constexpr):
    """Weights of a page as float16s, turned into right operands. SPLIT: columns 4 to 7 hold the same queries as 0 to 3,
    and get what the weights of those lost to rounding."""
    upper, lower = packed(w0, w1, tl.float16), packed(w2, w3, tl.float16)
    if SPLIT:
        whole = tl.arange(0, w0.shape[0]) % 4 < 2
        u0, u1 = halves_of(upper, tl.float16)
        l0, l1 = halves_of(lower, tl.float16)
        upper = tl.where(whole, upper, packed(w0 - u0, w1 - u1, tl.float16))
        lower = tl.where(whole, lower, packed(w2 - l0, w3 - l1, tl.float16))
    return transposed(upper), transposed(lower)


@triton.jit
def add_values(
    accs, w0, w1, w2, w3, words, scales, CODES: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr,
    NUM_GROUPS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Weights times a page's codes and scales, and last weights times zeros: two columns' sums for each group."""
    WORDS: tl.constexpr = BYTES // 32
    pairs, operands, new = (), (), ()
    for i in tl.static_range(WORDS):
        a, b, c, d = some(words, 4 * i, 4)
        for half in tl.static_range(2):
            pairs = pairs + (two_tokens(a, b, CODES, half), two_tokens(c, d, CODES, half))
    for group in tl.static_range(NUM_GROUPS):
        upper, lower = scales[group], scales[NUM_GROUPS + group]
        operands = operands + operands_of(w0 * upper, w1 * upper, w2 * lower, w3 * lower, SPLIT)
    for i in tl.static_range(NIBBLES * WORDS):
        b0, b1 = some(operands, i * NUM_GROUPS // (NIBBLES * WORDS) * 2, 2)
        for half in tl.static_range(2):
            x, y = some(pairs, 4 * (i % WORDS) + 2 * half, 2)
            new = new + product_at(
                accs, 8 * i + 4 * half, two_codes(x, CODES, i // WORDS, 0), two_codes(x, CODES, i // WORDS, 1),
                two_codes(y, CODES, i // WORDS, 0), two_codes(y, CODES, i // WORDS, 1), b0, b1,
            )  # fmt: skip
    if len(scales) > 2 * NUM_GROUPS:
        for group in tl.static_range(NUM_GROUPS):
            upper, lower = scales[2 * NUM_GROUPS + group], scales[3 * NUM_GROUPS + group]
            sum0, sum1 = some(accs, 8 * NIBBLES * WORDS + 2 * group, 2)
            new = new + (sum0 + w0 * upper + w2 * lower, sum1 + w1 * upper + w3 * lower)
    return new


@triton.jit
def attend_pages(
    q_words, position0, position1, start, stop, lowest, whole_from, whole_to, end,
    row_ptr, stride_table_block, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr,
    scale, logit_cap, sliding_window, stride_cache_block, stride_scale_block, num_blocks,
    stride_cache_token: tl.constexpr, stride_scale_token: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    CODES: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, K_VECTOR: tl.constexpr, V_VECTOR: tl.constexpr,
    NUM_GROUPS: tl.constexpr, SCALE_WORDS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr,
    PAGES: tl.constexpr, DTYPE: tl.constexpr, HINT: tl.constexpr, BARRIER: tl.constexpr,
):  # fmt: skip
    """Let tiles ``start`` to ``stop`` of PAGES pages pass; what is read of them are the pages of keys ``lowest`` to
    ``end``, and every query sees the keys from ``whole_from`` to ``whole_to``.

    Pages that are not, at the end of a tile or before a sliding window, are another page with weights 0. Within a page
    there may be keys that are none: their scales may be NaN, and so may codes of float8. Returns the sums of values,
    in one unit, and (top, total) of both columns.
    """
    WORDS: tl.constexpr = BYTES // 8  # of codes, of a page
    ALL: tl.constexpr = WORDS + (2 if k_zero_ptr is None else 4) * SCALE_WORDS
    FACTORS: tl.constexpr = (2 if k_zero_ptr is None else 4) * NUM_GROUPS  # scales and zeros of a page
    UNIT: tl.constexpr = 2.0 ** exponent_of(CODES, NIBBLES - 1)
    TILE_KV: tl.constexpr = PAGES * PAGE
    lane = tl.arange(0, position0.shape[0]) % 32
    g, c = lane // 4, lane % 4
    k_rows = k_ptr + (g * stride_cache_token + K_VECTOR * c)
    v_rows = v_ptr + (2 * c * stride_cache_token + V_VECTOR * g)
    k_scales, v_scales = k_scale_ptr + g * stride_scale_token, v_scale_ptr + g * stride_scale_token
    k_zeros = None if k_zero_ptr is None else k_zero_ptr + g * stride_scale_token
    v_zeros = None if v_zero_ptr is None else v_zero_ptr + g * stride_scale_token
    first, last = lowest // PAGE, tl.maximum(end - 1, 0) // PAGE
    top0, total0 = tl.full(position0.shape, LOWEST, tl.float32), tl.zeros(position0.shape, tl.float32)
    top1, total1 = top0, total0
    accs = ()
    for _ in tl.static_range(BYTES * NIBBLES // 4 + (0 if k_zero_ptr is None else 2 * NUM_GROUPS)):
        accs = accs + (tl.zeros(position0.shape, tl.float32),)

    # Each is loaded as soon as what it replaces has been used, half a tile and more before it is used itself.
    ids = load_ids(row_ptr, stride_table_block, start, first, last, PAGES, BLOCK_SIZE)
    next_ids = load_ids(row_ptr, stride_table_block, start + 1, first, last, PAGES, BLOCK_SIZE)
    places = find_pages(
        ids, start, first, last, stride_cache_block, stride_scale_block, num_blocks, stride_cache_token,
        stride_scale_token, PAGES, BLOCK_SIZE,
    )  # fmt: skip
    keys = load_keys(
        places, k_rows, k_scales, k_zeros, stride_cache_token, stride_scale_token, BYTES, K_VECTOR, SCALE_WORDS, HINT
    )
    values = load_values(
        places, v_rows, v_scales, v_zeros, stride_cache_token, stride_scale_token, BYTES, V_VECTOR, SCALE_WORDS, HINT
    )
    q, sums, column_unit = operands_of_queries(q_words, DTYPE, CODES, BYTES, NIBBLES, K_VECTOR, NUM_GROUPS)
    unit0, unit1 = from_lane(column_unit, 8 * c), from_lane(column_unit, 8 * c + 4)
    sums0, sums1 = (), ()
    for group in tl.static_range(NUM_GROUPS):
        sums0, sums1 = sums0 + (from_lane(sums[group], 8 * c),), sums1 + (from_lane(sums[group], 8 * c + 4),)
    if CAPPED:
        scale0 = tl.full(unit0.shape, softmax.LOG2E, tl.float32)
        scale1 = scale0
    else:
        scale0, scale1 = unit0 * (UNIT * scale * softmax.LOG2E), unit1 * (UNIT * scale * softmax.LOG2E)
    for tile in tl.range(start, stop, num_stages=1):
        scores0, scores1, of_values = (), (), ()
        if BARRIER:
            tl.debug_barrier()
        places = find_pages(
            next_ids, tile + 1, first, last, stride_cache_block, stride_scale_block, num_blocks, stride_cache_token,
            stride_scale_token, PAGES, BLOCK_SIZE,
        )  # fmt: skip
        next_ids = load_ids(row_ptr, stride_table_block, tile + 2, first, last, PAGES, BLOCK_SIZE)
        for i in tl.static_range(PAGES):
            s0, s1, s2, s3 = scores_of(
                q, sums0, sums1, some(keys, ALL * i, WORDS), scales_of(some(keys, ALL * i + WORDS, ALL - WORDS)),
                CODES, BYTES, NIBBLES, K_VECTOR, NUM_GROUPS,
            )  # fmt: skip
            if CAPPED:
                s0 = softmax.cap_scores(s0 * (unit0 * UNIT), scale, logit_cap)
                s1 = softmax.cap_scores(s1 * (unit1 * UNIT), scale, logit_cap)
                s2 = softmax.cap_scores(s2 * (unit0 * UNIT), scale, logit_cap)
                s3 = softmax.cap_scores(s3 * (unit1 * UNIT), scale, logit_cap)
            scores0, scores1 = scores0 + (s0, s2), scores1 + (s1, s3)
            of_values = of_values + scales_of(some(values, ALL * i + WORDS, ALL - WORDS))
        if (tile * TILE_KV < whole_from) | ((tile + 1) * TILE_KV > whole_to):
            scores0 = hide(scores0, tile, position0, sliding_window, WINDOWED)
            scores1 = hide(scores1, tile, position1, sliding_window, WINDOWED)
            of_values = zero_scales(of_values, tile, lowest, end, PAGES, NUM_GROUPS)
            if CODES == "fp8":
                values = zero_codes(values, tile, lowest, end, PAGES, WORDS)
        if tile + 1 < stop:
            keys = load_keys(
                places, k_rows, k_scales, k_zeros, stride_cache_token, stride_scale_token, BYTES, K_VECTOR, SCALE_WORDS, HINT
            )

        logs = logs_of(of_values, PAGES, NUM_GROUPS)
        state = raise_tops(
            largest_logit(scores0, logs, scale0), largest_logit(scores1, logs, scale1),
            (top0, top1, total0, total1) + accs,
        )  # fmt: skip
        top0, top1, total0, total1 = some(state, 0, 4)
        accs = some(state, 4, len(accs))
        weights0, total0 = weights_of(scores0, top0, total0, scale0)
        weights1, total1 = weights_of(scores1, top1, total1, scale1)
        for i in tl.static_range(PAGES):
            accs = add_values(
                accs, weights0[2 * i], weights1[2 * i], weights0[2 * i + 1], weights1[2 * i + 1],
                some(values, ALL * i, WORDS), some(of_values, FACTORS * i, FACTORS), CODES, BYTES, NIBBLES, NUM_GROUPS,
                SPLIT,
            )  # fmt: skip
        if tile + 1 < stop:
            values = load_values(
                places, v_rows, v_scales, v_zeros, stride_cache_token, stride_scale_token, BYTES, V_VECTOR, SCALE_WORDS, HINT
            )

    PER_NIBBLE: tl.constexpr = BYTES // 4
    sums = ()
    for i in tl.static_range(NIBBLES * PER_NIBBLE):
        acc = accs[i]
        if SPLIT:
            acc = acc + from_other(acc, 2)
        acc = acc * 2.0 ** exponent_of(CODES, i // PER_NIBBLE)
        if k_zero_ptr is not None:
            acc += sum_of(accs[NIBBLES * PER_NIBBLE + 2 * (i * NUM_GROUPS // (NIBBLES * PER_NIBBLE)) + i % 2])
        sums = sums + (acc,)
    return sums, top0, top1, sum_of(total0), sum_of(total1)


# ---- the kernel -------------------------------------------------------------------------------------------------


@triton.jit
def store_part(sums, top0, top1, total0, total1, place, parts_ptr, stats_ptr):
    """Leave a part at its place in the scratch, a register of all lanes after another."""
    THREADS: tl.constexpr = top0.shape[0]
    thread = tl.arange(0, THREADS)
    of_part = parts_ptr + place.to(tl.int64) * (len(sums) * THREADS) + thread
    for i in tl.static_range(len(sums)):
        tl.store(of_part + i * THREADS, sums[i])
    of_stats = stats_ptr + place.to(tl.int64) * (THREADS // 2) + (thread // 32 * 4 + thread % 4)
    first = thread % 32 < 4  # whose columns other lanes have too
    for i in tl.static_range(4):
        tl.store(of_stats + i * (THREADS // 8), (top0, top1, total0, total1)[i], mask=first)


@triton.jit
def merge_parts(first, last, parts_ptr, stats_ptr, sums, top0, top1, total0, total1):
    """Merge what the programs from ``first`` to ``last`` left of a segment, in order; the arguments say what shape it
    has."""
    THREADS: tl.constexpr = top0.shape[0]
    COUNT: tl.constexpr = len(sums)
    thread = tl.arange(0, THREADS)
    top0, total0 = tl.full(top0.shape, LOWEST, tl.float32), tl.zeros(top0.shape, tl.float32)
    top1, total1 = top0, total0
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros(top0.shape, tl.float32),)
    for step in tl.range(first, last + 1, FEW_PARTS, num_stages=1):
        parts = ()
        for i in tl.static_range(FEW_PARTS):
            there = thread * 0 + (step + i) <= last
            place = ((step + i) * 2 + tl.where(step + i == first, 1, 0)).to(tl.int64)
            of_stats = stats_ptr + place * (THREADS // 2) + (thread // 32 * 4 + thread % 4)
            for k in tl.static_range(4):
                empty = LOWEST if k < 2 else 0.0
                parts = parts + (tl.load(of_stats + k * (THREADS // 8), mask=there, other=empty, cache_modifier=".cg"),)
            of_part = parts_ptr + place * (COUNT * THREADS) + thread
            for k in tl.static_range(COUNT):
                parts = parts + (tl.load(of_part + k * THREADS, mask=there, other=0.0, cache_modifier=".cg"),)
        for i in tl.static_range(FEW_PARTS):
            stats = some(parts, (4 + COUNT) * i, 4)
            new_top0, new_top1 = tl.maximum(top0, stats[0]), tl.maximum(top1, stats[1])
            old0, old1 = tl.exp2(top0 - new_top0), tl.exp2(top1 - new_top1)
            new0, new1 = tl.exp2(stats[0] - new_top0), tl.exp2(stats[1] - new_top1)
            top0, top1, total0, total1 = new_top0, new_top1, total0 * old0 + stats[2] * new0, total1 * old1 + stats[3] * new1
            added = rescaled(some(parts, (4 + COUNT) * i + 4, COUNT), new0, new1)
            sums, merged = rescaled(sums, old0, old1), ()
            for k in tl.static_range(COUNT):
                merged = merged + (sums[k] + added[k],)
            sums = merged
    return sums, top0, top1, total0, total1


@triton.jit
def store_column(
    sums, COLUMN: tl.constexpr, top, total, out_row, there, sink, stride_out_dim, VECTOR: tl.constexpr
):
    """Divide one of a lane's two columns by its total, a sink counted in, and store it."""
    if sink is not None:
        new_top = tl.maximum(top, sink.to(tl.float32) * softmax.LOG2E)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.exp2(sink.to(tl.float32) * softmax.LOG2E - new_top)
    else:
        rescale = 1.0
    factor = rescale / tl.where(total > 0, total, 1.0)  # a query without keys: 0 / 1
    g = tl.arange(0, top.shape[0]) % 32 // 4
    for i in tl.static_range(len(sums) // 2):  # a lane's channels, four of a word
        channel = 4 * VECTOR * g + (32 * VECTOR * (i // 4 // VECTOR) + 4 * (i // 4 % VECTOR) + i % 4)
        store(out_row + channel * stride_out_dim, sums[2 * i + COLUMN] * factor, there)


@triton.jit(do_not_specialize=PER_BATCH)
def coded_decode_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim / 2], words of two numbers
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, words], of four bytes
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups], or words of two numbers
    k_zero_ptr,  # likewise, or None
    v_scale_ptr,
    v_zero_ptr,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr, stats_ptr, counters_ptr,  # the scratch of merging.py
    scale,
    logit_cap,
    sliding_window,
    stride_q_token, stride_q_head,  # in words
    stride_cache_block, stride_cache_token: tl.constexpr, stride_cache_head,  # of both caches, in words
    stride_scale_block, stride_scale_token: tl.constexpr, stride_scale_head,  # of all scales and zeros
    stride_table_seq, stride_table_block,
    stride_out_token, stride_out_head, stride_out_dim,
    num_tokens,
    num_seqs,
    num_bundles,  # of HEADS KV heads
    num_blocks,
    max_blocks_per_seq,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    DTYPE: tl.constexpr,
    CODES: tl.constexpr,
    BYTES: tl.constexpr,
    NIBBLES: tl.constexpr,
    K_VECTOR: tl.constexpr,
    V_VECTOR: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGES: tl.constexpr,
    HINT: tl.constexpr,
    BARRIER: tl.constexpr,
    ABREAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(OVERLAP)
    TILE_KV: tl.constexpr = PAGES * PAGE
    lane, warp = tl.arange(0, 32 * HEADS) % 32, tl.arange(0, 32 * HEADS) // 32
    c = lane % 4
    program, num_programs, lines = tl.program_id(0), tl.num_programs(0), num_bundles
    first_bundle = 0
    if ABREAST:
        lines = 1
        first_bundle = program % num_bundles
        num_programs = num_programs // num_bundles
        program = program // num_bundles
        parts_ptr += first_bundle.to(tl.int64) * num_programs * (2 * HEADS * COLUMNS * BYTES * NIBBLES)
        stats_ptr += first_bundle * num_programs * (2 * 2 * HEADS * COLUMNS)
        counters_ptr += first_bundle * num_programs
    capacity = max_blocks_per_seq * BLOCK_SIZE
    line, num_workers, begin, end, seq, seq_begin = paging.find_share(
        program, num_programs, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, lines,
        sliding_window, QUERIES, TILE_KV, WINDOWED,
    )  # fmt: skip
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, sliding_window, QUERIES, TILE_KV, WINDOWED)
        if unit >= seq_begin + per_head * lines:
            seq_begin += per_head * lines
            seq += 1
        else:
            bundle, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, sliding_window, QUERIES, TILE_KV, WINDOWED
            )
            if unit < seg_end:
                kv_head = (bundle + first_bundle) * HEADS + warp
                query, head, there = query_of(lane // 4, tile, QUERIES, GROUP, COLS)
                there = there & (query < num_queries)
                in_q = (first_row + query).to(tl.int64) * stride_q_token + (kv_head * GROUP + head) * stride_q_head
                q_words = load_queries(q_ptr + tl.where(there, in_q, 0), there, BYTES, NIBBLES, K_VECTOR)
                context = seq_len - num_queries
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                query0, _, _ = query_of(2 * c, tile, QUERIES, GROUP, COLS)
                query1, _, _ = query_of(2 * c + 1, tile, QUERIES, GROUP, COLS)
                lowest, whole_from = context * 0, context * 0
                if WINDOWED:
                    lowest = tl.maximum(context + tile * QUERIES + 1 - sliding_window, 0)
                    whole_from = tl.maximum(last_key - sliding_window, 0)
                head64 = kv_head.to(tl.int64)
                in_cache, in_scales = head64 * stride_cache_head, head64 * stride_scale_head
                sums, top0, top1, total0, total1 = attend_pages(
                    q_words, context + query0, context + query1, first_tile + unit - seg_begin,
                    first_tile + tl.minimum(end, seg_end) - seg_begin,
                    lowest, whole_from, context + tile * QUERIES + 1, last_key,
                    block_table_ptr + seq.to(tl.int64) * stride_table_seq, stride_table_block,
                    k_cache_ptr + in_cache, v_cache_ptr + in_cache,
                    k_scale_ptr + in_scales, None if k_zero_ptr is None else k_zero_ptr + in_scales,
                    v_scale_ptr + in_scales, None if v_zero_ptr is None else v_zero_ptr + in_scales,
                    scale, logit_cap, sliding_window, stride_cache_block, stride_scale_block, num_blocks,
                    stride_cache_token, stride_scale_token,
                    WINDOWED, CAPPED, CODES, BYTES, NIBBLES, K_VECTOR, V_VECTOR, NUM_GROUPS, SCALE_WORDS, BLOCK_SIZE,
                    COLS < COLUMNS, PAGES, DTYPE, HINT, BARRIER,
                )  # fmt: skip

                complete = (seg_begin >= begin) & (seg_end <= end)
                if (seg_begin < begin) | (seg_end > end):
                    store_part(
                        sums, top0, top1, total0, total1, program * 2 + (seg_begin >= begin).to(tl.int32), parts_ptr,
                        stats_ptr,
                    )  # fmt: skip
                    complete = merging.is_last(seg_begin, seg_end, line, num_workers, counters_ptr)
                    if complete:
                        sums, top0, top1, total0, total1 = merge_parts(
                            paging.worker_of(seg_begin, num_workers, line),
                            paging.worker_of(seg_end - 1, num_workers, line),
                            parts_ptr, stats_ptr, sums, top0, top1, total0, total1,
                        )  # fmt: skip
                if complete:
                    for e in tl.static_range(2):
                        query, head, there = query_of(2 * c + e, tile, QUERIES, GROUP, COLS)
                        there = there & (2 * c + e < COLS) & (query < num_queries)
                        head = kv_head * GROUP + head
                        sink = None if sinks_ptr is None else tl.load(sinks_ptr + head, mask=there, other=0.0)
                        in_out = (first_row + query).to(tl.int64) * stride_out_token + head * stride_out_head
                        store_column(
                            sums, e, top0 if e == 0 else top1, total0 if e == 0 else total1, out_ptr + in_out, there,
                            sink, stride_out_dim, V_VECTOR,
                        )  # fmt: skip
            unit = tl.minimum(following, end)
