"""A page of 16 coded keys and values as the lanes of a warp hold and multiply them (`fast/_triton/lanes.py`).

- Keys are the rows of a product and 8 queries its columns; then channels of the values are rows. Every lane loads just
  the words of codes that it needs of an operand. Which step of a product is which channel is free, so a lane takes
  channels that lie side by side, and which two of a word are a pair of steps, the cheapest unpacking decides.
- Codes become float16s where they are: e4m3 by the GPU's own conversion; integers as the bottom bits of a fraction, a
  subnormal number, which tensor cores multiply exactly (int8: plus 128, which is taken off again).
- A key's scale multiplies its score, a value's scale its weight. The zero of a group enters as zero times the sum of
  the query's numbers there, and zero times the sum of weights.

A *chunk* is what the lanes take of a head in one load: VECTOR words each of the four lanes that share a key, or of the
eight that share a value. No chunk straddles two groups of scales. BYTES is the size of a coded head.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton.lanes import (
    float8s,
    from_other,
    halves_of,
    interleaved,
    load_words,
    multiply_add,
    packed,
    pair,
    product,
    product_at,
    some,
    transposed,
)

PAGE = tl.constexpr(16)  # keys of a product
COLUMNS = tl.constexpr(8)  # queries of a product

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
        if SECOND:
            word = word >> 8
        if CODES == "int8":  # code + 128, less 128, both times 2^-24
            one, offset = tl.full(word.shape, 0x3C003C00, tl.int32), tl.full(word.shape, -0x7F7F7F80, tl.int32)
            codes = multiply_add((word & 0x00FF00FF) ^ 0x00800080, one, offset)
        else:
            codes = word & (0x000F000F << (4 * NIBBLE))
    return codes


@triton.jit
def two_tokens(a, b, CODES: tl.constexpr, HALF: tl.constexpr):
    """A half of each of two words, so that ``two_codes`` finds one channel of both tokens, then the next channel."""
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


# ---- queries ----------------------------------------------------------------------------------------------------


@triton.jit
def load_queries(
    q_rows, there, DTYPE: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr,
    VECTOR: tl.constexpr, NUM_GROUPS: tl.constexpr,
):  # fmt: skip
    """Of a lane's column: (its query as the right operands of products, the sums of each group, the power of two that
    both are to be multiplied by). The numbers are below 2^11, and 16 times as large where codes are 16 times smaller.
    """
    CHUNKS: tl.constexpr = BYTES // (16 * VECTOR)  # of a nibble
    COUNT: tl.constexpr = min(4, 2 * VECTOR)
    c = tl.arange(0, there.shape[0]) % 4
    numbers, largest = (), tl.zeros(there.shape, tl.float32)
    for chunk in tl.static_range(NIBBLES * CHUNKS):
        for i in tl.static_range(2 * VECTOR // COUNT):
            words = load_words(q_rows + (8 * VECTOR * chunk + 2 * VECTOR * c + COUNT * i), COUNT)
            for j in tl.static_range(COUNT):
                low, high = halves_of(tl.where(there, words[j], 0), DTYPE)
                largest = tl.maximum(largest, tl.maximum(tl.abs(low), tl.abs(high)))
                numbers = numbers + (low, high)
    largest = tl.maximum(largest, from_other(largest, 1))
    largest = tl.maximum(largest, from_other(largest, 2))
    bits = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 17 << 23)
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True) * 1024.0
    operands, sums = (), ()
    for group in tl.static_range(NUM_GROUPS):
        group_sum = tl.zeros(there.shape, tl.float32)
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
                first, second = packed(x0 * unit, x1 * unit, tl.float16), packed(x2 * unit, x3 * unit, tl.float16)
            else:
                first, second = packed(x0 * unit, x2 * unit, tl.float16), packed(x1 * unit, x3 * unit, tl.float16)
            operands = operands + (first, second)
    return operands, sums, bits.to(tl.float32, bitcast=True) * (1 / 1024.0)


# ---- keys -------------------------------------------------------------------------------------------------------


@triton.jit
def load_scales(scales_at, stride_token: tl.constexpr, SCALE_WORDS: tl.constexpr):
    """Of the two rows of scores that a lane has."""
    return load_words(scales_at, SCALE_WORDS) + load_words(scales_at + 8 * stride_token, SCALE_WORDS)


@triton.jit
def load_keys(
    rows, scales_at, zeros_at, stride_token: tl.constexpr, stride_scale_token: tl.constexpr, BYTES: tl.constexpr,
    VECTOR: tl.constexpr, SCALE_WORDS: tl.constexpr,
):  # fmt: skip
    """Two rows of codes, word by word of both, and their scales and zeros."""
    words = ()
    for chunk in tl.static_range(BYTES // (16 * VECTOR)):
        upper = load_words(rows + 4 * VECTOR * chunk, VECTOR)
        lower = load_words(rows + (8 * stride_token + 4 * VECTOR * chunk), VECTOR)
        for j in tl.static_range(VECTOR):
            words = words + (upper[j], lower[j])
    words = words + load_scales(scales_at, stride_scale_token, SCALE_WORDS)
    if zeros_at is not None:
        words = words + load_scales(zeros_at, stride_scale_token, SCALE_WORDS)
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


# ---- values -----------------------------------------------------------------------------------------------------


@triton.jit
def load_values(
    rows, scales_at, zeros_at, stride_token: tl.constexpr, stride_scale_token: tl.constexpr, BYTES: tl.constexpr,
    VECTOR: tl.constexpr, SCALE_WORDS: tl.constexpr,
):  # fmt: skip
    """Four tokens' codes, word by word of all four; scales and zeros of the two rows of scores."""
    words = ()
    for chunk in tl.static_range(BYTES // (32 * VECTOR)):
        w0 = load_words(rows + 8 * VECTOR * chunk, VECTOR)
        w1 = load_words(rows + (stride_token + 8 * VECTOR * chunk), VECTOR)
        w2 = load_words(rows + (8 * stride_token + 8 * VECTOR * chunk), VECTOR)
        w3 = load_words(rows + (9 * stride_token + 8 * VECTOR * chunk), VECTOR)
        for j in tl.static_range(VECTOR):
            words = words + (w0[j], w1[j], w2[j], w3[j])
    words = words + load_scales(scales_at, stride_scale_token, SCALE_WORDS)
    if zeros_at is not None:
        words = words + load_scales(zeros_at, stride_scale_token, SCALE_WORDS)
    return words


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
    """Weights times codes and scales, and last weights times zeros: the sums of a lane's two columns for each group."""
    WORDS: tl.constexpr = BYTES // 32  # of a token
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
def channel_of(i, VECTOR: tl.constexpr, THREADS: tl.constexpr):
    """The channel of a lane's i-th sums: they are two columns of two channels for each product, four of a word."""
    g = tl.arange(0, THREADS) % 32 // 4
    return 4 * VECTOR * g + (32 * VECTOR * (i // 4 // VECTOR) + 4 * (i // 4 % VECTOR) + i % 4)
