"""The products of KIVI's decodes, with a page of 16 keys of one group: `_kivi_decode.py` says how they go together.

- Codes stay where they are in their words. An AND leaves two of them, at the bottom of the fractions of two float16s:
  the subnormal numbers code * 2^(bits * part - 24), which tensor cores multiply exactly.
- Nothing is dequantized. A channel's scale multiplies the query, a token's scale its weight, and zeros are one more
  product: queries with zeros, weights with zeros.
- Those multiples are float16s, and what one loses to rounding is kept as another: with keys of large channels a score
  would be off by more than the result's rounding. Up to four queries have theirs in the other four columns, for free;
  more need each product twice.
- A query is made smaller than 1 by a power of two, so that it is a float16 whatever scale it is multiplied with.

A *piece* is 32 channels side by side: channel 32 j + 8 c + i of the keys is lane c's, channel 32 j + 4 g + i of the
values is lane g's. Pieces in the same bytes (2 bits: all four) are the bytes' *parts*, of other bits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton.lanes import (
    bytes_0213,
    from_other,
    halves_of,
    multiply,
    multiply_add,
    packed,
    pair,
    product,
    read_transposed,
    read_words,
    some,
)
from fast.kv_cache._kivi_tile import TILE, TOKEN

COLUMNS = tl.constexpr(8)  # queries of a product
MINUS_ONES = tl.constexpr(-1140802560)  # two float16s
SIGNS = tl.constexpr(-2147450880)  # of both float16s in a word


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
        none_or_minus_one = tl.where(tl.arange(0, x.shape[0]) % 32 // 4 < COLS, 0, MINUS_ONES)
        both = (multiply_add(x, scale, multiply(multiply(x, scale), none_or_minus_one)),)
    return both


@triton.jit
def scaled_by(q, scales, COLS: tl.constexpr):
    """Queries times a group's scales."""
    scaled = ()
    for i in tl.static_range(len(q)):
        scaled = scaled + (times_scale(q[i], scales[i], COLS),)
    return scaled


@triton.jit
def zero_scores(q, zeros):
    """Queries times a group's zeros, in 2^-24: columns 2 c and 2 c + 1."""
    none = tl.zeros(q[0].shape, tl.float32)
    upper, lower = (none, none, none, none), (none, none, none, none)
    for j in tl.static_range(len(q) // 4):
        # As four words lie in registers: rows g hold the zeros of the first and third, rows g + 8 of the others.
        z0, z1, z2, z3 = some(zeros, 4 * j, 4)
        upper = product(z0, z1, z2, z3, q[4 * j], q[4 * j + 2], upper[0], upper[1], upper[2], upper[3])
        lower = product(z0, z1, z2, z3, q[4 * j + 1], q[4 * j + 3], lower[0], lower[1], lower[2], lower[3])
    return (upper[0] + lower[2]) * 2.0**-24, (upper[1] + lower[3]) * 2.0**-24


@triton.jit
def code_scores(memory, at, OFFSET: tl.constexpr, scaled, BITS: tl.constexpr, PIECES: tl.constexpr, COLS: tl.constexpr):
    """Scaled queries times a page's codes, in 2^-24: rows g and g + 8, columns 2 c and 2 c + 1."""
    PARTS: tl.constexpr = 8 // BITS
    CHUNKS: tl.constexpr = PIECES // PARTS
    ROW: tl.constexpr = PIECES * BITS
    none = tl.zeros(at.shape, tl.float32)
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + ((none, none, none, none),)
    for chunk in tl.static_range(CHUNKS):
        upper = read_words(memory, at, OFFSET + 8 * chunk, 2)
        lower = read_words(memory, at, OFFSET + 8 * ROW + 8 * chunk, 2)
        for x in tl.static_range(2):
            a0, a1 = bytes_0213(upper[x]), bytes_0213(lower[x])
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
    t0, t1, t2, t3 = parts[PARTS - 1]
    for down in tl.static_range(1, PARTS):
        t = parts[PARTS - 1 - down]
        t0, t1 = t0 * 2.0**-BITS + t[0], t1 * 2.0**-BITS + t[1]
        t2, t3 = t2 * 2.0**-BITS + t[2], t3 * 2.0**-BITS + t[3]
    if COLS < COLUMNS:
        t0, t1 = t0 + from_other(t0, 2), t1 + from_other(t1, 2)
        t2, t3 = t2 + from_other(t2, 2), t3 + from_other(t3, 2)
    return t0, t1, t2, t3


@triton.jit
def add_values(
    accs, b0, b1, memory, at, at_tokens, at_rows, FIRST: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr,
    NUM_GROUPS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Weights times a page's codes and scales, piece by piece, and last weights times zeros, a row a group."""
    PARTS: tl.constexpr = 8 // BITS
    CHUNKS: tl.constexpr = PIECES // PARTS
    PAIRS: tl.constexpr = NUM_GROUPS // 2
    ROW: tl.constexpr = PIECES * BITS
    TOKENS: tl.constexpr = 2 * TILE * ROW + FIRST * TOKEN
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        words = ()
        for k in tl.static_range(4):
            words = words + read_words(memory, at, (TILE + FIRST + k % 2 * 4 + k // 2 * 8) * ROW + 8 * chunk, 1)
        x0, x1, y0, y1 = (
            pair(words[0], words[1], 0), pair(words[2], words[3], 0),
            pair(words[0], words[1], 1), pair(words[2], words[3], 1),
        )  # fmt: skip
        chunks = chunks + (((x0, x0 >> 8, x1, x1 >> 8), (y0, y0 >> 8, y1, y1 >> 8)),)
    of_tokens = ()
    for k in tl.static_range(4):
        of_tokens = of_tokens + read_words(memory, at_tokens, TOKENS + (k % 2 + k // 2 * 8) * TOKEN, PAIRS)
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
    # Of a token's numbers the zeros are the last four: rows 4 to 7.
    z0, z1 = read_transposed(memory, at_rows, TOKENS)
    none = tl.zeros(at.shape, tl.float32)
    zeros = product(z0, 0 * z0, z1, 0 * z1, b0, b1, accs[8 * PIECES], accs[8 * PIECES + 1], none, none)
    return new + some(zeros, 0, 2)
