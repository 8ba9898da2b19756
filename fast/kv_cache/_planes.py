"""Codes as tensor cores multiply them: planes of words, and float32 numbers as few float16s.

- Codes are loaded as 16-bit *words* and stay in words through shared memory into the registers that the tensor cores
  read. Only there a word becomes float16s, by about an instruction a code: byte b (and nibble h) of every word is a
  *plane*, with a query and a sum of its own: plane (h, b) of word w is number h * head_dim / 2 + 2 * w + b of a head
  (h only for codes of 4 bits). Nothing is ever interleaved but the one result at the end.
- Bits at the bottom of a float16's fraction are a subnormal number, which the tensor cores multiply exactly: a code
  needs no conversion, only its neighbours masked. The factor, 2^-24 or so, is taken back with the scales.

What is multiplied with codes is float16, whatever the dtypes: queries divided by a power of two near their row's
largest number, and weights times scales divided by one near the largest of those so far. (Float16 has 11 bits down to
2^-28 of the largest, and below it steps of 2^-39 of it.) For float32 it is the sum of two float16s.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton.platform import INTERPRETED
from fast._triton.rounding import dot

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


# ---- numbers to float16s ----------------------------------------------------------------------------------------


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
def joined(accs, ROWS: tl.constexpr, TILE_D: tl.constexpr):
    """The planes' sums, turned back, in one tile: column c is word c // planes of plane c % planes, and the rows are
    those of all heads, the first of each first, because `merging` takes as many rows as are there."""
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
def joined_numbers(HEAD_DIM: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, TILE_WORDS: tl.constexpr):
    """Which number of the head each column of the joined tile is; ``HEAD_DIM`` for one that is none."""
    PLANES: tl.constexpr = BYTES * NIBBLES
    HALF: tl.constexpr = HEAD_DIM // NIBBLES
    column = tl.arange(0, PLANES * TILE_WORDS)
    plane_of, number = column % PLANES, column // PLANES * BYTES + column % BYTES
    return tl.where(number < HALF, plane_of // BYTES * HALF + number, HEAD_DIM)
