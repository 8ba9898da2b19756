"""Lossless coding of bf16 and fp16 blocks: exponents in a fixed few bits, with exceptions; exactly invertible.

Sign and fraction of a cached number are noise, but its exponent is not: most values of a block lie within a few
powers of two of each other, so most of bfloat16's 8 exponent bits say the same thing again and again. Blocks that
wait outside the pool (swapped out, or a prefix kept for later) can be coded smaller and come back bit for bit.

DFloat11 and ZipNN give each exponent a Huffman code, which gets close to its entropy (2.5 bits for normally
distributed values) but makes the place of a value depend on all before it. Here a code has the same ``width`` for
all values of a block, so every field's place is known and a GPU thread decodes its values alone; it costs about
two thirds of a bit more. (Normally distributed bfloat16 comes to 0.70 of its size, SmolLM2's cache to 0.71; float16,
whose exponent is shorter, to 0.89.) A code counts up from the block's ``base``; its last value is an *escape*, and the
exponents of escaped values follow in order. Which of them belongs to a value is the number of escapes before it: a
prefix count, which a warp gets from one ballot. (Pairs of index and exponent need no count, but at three bytes an
exception instead of one the best width would be a bit larger.)

A coded block is, one after the other::

    header      4 bytes: width (0: stored as it is, and words follow), base, 0, 0
    low bytes   num_values bytes: the low 8 bits of sign and fraction, the sign above the fraction
    planes      one bit of every value in ceil(num_values / 8) bytes, value i in bit i % 8 of byte i // 8:
                first the rest of sign and fraction (float16: 3 planes), then the code (width planes), low bits first
    exceptions  one byte for each escape: its exponent
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt16
from numpy import ndarray as Array

from reference._checks import require, require_shape

HEADER_BYTES = 4
STORED = 0  # the width of a block that nothing makes smaller


class WordFormat(NamedTuple):
    """A 16-bit float, from the top: sign, exponent, fraction."""

    exponent_bits: int
    fraction_bits: int

    @property
    def high_bits(self) -> int:
        """Bits of sign and fraction that do not fit into the low byte."""
        return self.fraction_bits + 1 - 8

    @property
    def widths(self) -> range:
        """From 1 bit to one less than the exponent has."""
        return range(1, self.exponent_bits)


WORD_FORMATS = {"bfloat16": WordFormat(8, 7), "float16": WordFormat(5, 10)}


def encode_lossless(
    words: UInt16[Array, "num_blocks num_values"], *, format: str
) -> tuple[UInt8[Array, "num_blocks capacity"], Int64[Array, " num_blocks"]]:
    r"""Code each block by itself, with the width and base that make it smallest.

    .. math::
        code_i = \begin{cases} exponent_i - base & base \le exponent_i < base + 2^{width} - 1 \\
            2^{width} - 1 & \text{otherwise: an escape} \end{cases}

    .. math::
        size = 4 + num\_values + (high\_bits + width) \lceil num\_values / 8 \rceil + escapes

    Args:
        words: The blocks' numbers as bit patterns; all 65536 are fine.
        format: "bfloat16" or "float16": where the exponent lies in a word.

    Returns:
        The coded blocks, each in the first ``size`` bytes of its row and 0 behind them, and the sizes in bytes. A row
        has room for a stored block, capacity = 4 + 2 * num_values, and no size is larger. Of equally small codings
        the one with the smallest width is taken, then the smallest base: the bytes are the same on every backend.

    Raises:
        ValueError: If the format is unknown, or ``words`` is not a uint16 array of that shape.

    Source:
        ZipNN (Hershcovitch et al., 2024) and DFloat11 (Zhang et al., 2025): the skew of the exponents, and sign and
        fraction kept apart from them. The fixed width and its escapes are ours.

    Example:
        >>> words = np.array([[0x3F80, 0xBF81, 0x3F00, 0x7FC0] * 16], np.uint16)    # 1, -1.0078, 0.5, NaN
        >>> codes, sizes = encode_lossless(words, format="bfloat16")
        >>> codes.shape[1], sizes.tolist()                   # 2 bits: 4 + 64 + 2 * 8 bytes, and 16 exceptions
        (132, [100])
        >>> codes[0, :2].tolist(), codes[0, 84:86].tolist()  # width and base; NaN has exponent 255
        ([2, 125], [255, 255])
        >>> bool((decode_lossless(codes, sizes, num_values=64, format="bfloat16") == words).all())
        True
    """
    op = "encode_lossless"
    layout = _word_format(op, format)
    require_shape(op, "words", words, (None, None))
    require(words.dtype == np.uint16, op, "words", "uint16", words.dtype)
    num_blocks, num_values = words.shape
    exponents, low, high = _split(words, layout)
    widths, bases, sizes = _choose(exponents, layout)

    codes = np.zeros((num_blocks, HEADER_BYTES + 2 * num_values), np.uint8)
    codes[:, 0], codes[:, 1] = widths, bases
    stored = widths == STORED
    codes[stored, HEADER_BYTES:] = words[stored].astype("<u2").view(np.uint8)
    for width in set(widths.tolist()) - {STORED}:
        blocks = np.flatnonzero(widths == width)
        offset = exponents[blocks].astype(np.int16) - bases[blocks, None]
        escape = (1 << width) - 1
        code = np.where((offset >= 0) & (offset < escape), offset, escape).astype(np.uint8)
        planes = _to_planes(code << layout.high_bits | high[blocks], layout.high_bits + width)
        fixed = np.concatenate([low[blocks], planes], axis=1)
        codes[blocks, HEADER_BYTES : HEADER_BYTES + fixed.shape[1]] = fixed
        row, value, rank = _escapes(code == escape)
        codes[blocks[row], HEADER_BYTES + fixed.shape[1] + rank] = exponents[blocks[row], value]
    return codes, sizes


def decode_lossless(
    codes: UInt8[Array, "num_blocks capacity"], sizes: Int64[Array, " num_blocks"], *, num_values: int, format: str
) -> UInt16[Array, "num_blocks num_values"]:
    r"""The words that ``encode_lossless`` was given.

    .. math::
        exponent_i = \begin{cases} base + code_i & code_i < 2^{width} - 1 \\
            exceptions[\,|\{j < i : code_j = 2^{width} - 1\}|\,] & \text{otherwise} \end{cases}

    Args:
        codes: Coded blocks; what lies behind ``size`` bytes of a row is not read.
        sizes: Of each block, in bytes.
        num_values: Words of a block.
        format: As it was given to ``encode_lossless``.

    Raises:
        ValueError: If a shape or dtype is wrong, or a header and size cannot be those of a coded block.

    Example:
        >>> stored = np.array([[0, 0, 0, 0, 0x00, 0x3C, 0x00, 0xC0]], np.uint8)     # two float16 words after the header
        >>> decode_lossless(stored, np.array([8]), num_values=2, format="float16").view(np.float16).tolist()
        [[1.0, -2.0]]
    """
    op = "decode_lossless"
    layout = _word_format(op, format)
    require_shape(op, "codes", codes, (None, HEADER_BYTES + 2 * num_values))
    require(codes.dtype == np.uint8, op, "codes", "uint8", codes.dtype)
    require_shape(op, "sizes", sizes, (len(codes),))
    widths, bases = codes[:, 0], codes[:, 1]
    require(np.isin(widths, (STORED, *layout.widths)).all(), op, "codes", "headers with a known width", widths.tolist())

    words = np.empty((len(codes), num_values), np.uint16)
    stored = widths == STORED
    require((sizes[stored] == codes.shape[1]).all(), op, "sizes", "the size of a stored block", sizes.tolist())
    words[stored] = np.ascontiguousarray(codes[stored, HEADER_BYTES:]).view("<u2")
    for width in set(widths.tolist()) - {STORED}:
        blocks = np.flatnonzero(widths == width)
        end = _fixed_bytes(num_values, width, layout)
        require(end <= codes.shape[1], op, "codes", "room for every field", codes.shape[1])
        low, planes = np.split(codes[blocks, HEADER_BYTES:end], [num_values], axis=1)
        fields = _from_planes(planes, layout.high_bits + width, num_values)
        high, code = fields & ((1 << layout.high_bits) - 1), fields >> layout.high_bits

        exponents = bases[blocks, None].astype(np.uint16) + code
        row, value, rank = _escapes(code == (1 << width) - 1)
        consistent = np.array_equal(end + np.bincount(row, minlength=len(blocks)), sizes[blocks])
        require(consistent, op, "sizes", "as many exceptions as escapes", sizes.tolist())
        exponents[row, value] = codes[blocks[row], end + rank]
        possible = exponents.max(initial=0) < 2**layout.exponent_bits
        require(possible, op, "codes", f"exponents of {layout.exponent_bits} bits", exponents.max(initial=0))
        words[blocks] = _join(exponents, low, high, layout)
    return words


def _word_format(op: str, name: str) -> WordFormat:
    require(name in WORD_FORMATS, op, "format", f"one of {', '.join(WORD_FORMATS)}", repr(name))
    return WORD_FORMATS[name]


def _split(words: Array, layout: WordFormat) -> tuple[Array, Array, Array]:
    """Exponents, and the low byte and the rest of sign and fraction."""
    exponents = words >> layout.fraction_bits & (1 << layout.exponent_bits) - 1
    noise = (words >> 15 << layout.fraction_bits) | words & (1 << layout.fraction_bits) - 1
    return exponents, (noise & 255).astype(np.uint8), (noise >> 8).astype(np.uint8)


def _join(exponents: Array, low: Array, high: Array, layout: WordFormat) -> Array:
    """The inverse of ``_split``."""
    noise = high.astype(np.uint16) << 8 | low
    sign, fraction = noise >> layout.fraction_bits, noise & (1 << layout.fraction_bits) - 1
    return sign << 15 | exponents << layout.fraction_bits | fraction


def _fixed_bytes(num_values: int, width: int, layout: WordFormat) -> int:
    """Everything before the exceptions."""
    return HEADER_BYTES + num_values + (layout.high_bits + width) * -(-num_values // 8)


def _choose(exponents: Array, layout: WordFormat) -> tuple[Array, Array, Array]:
    """Width, base and size of each block: those of the smallest coding."""
    num_blocks, num_values = exponents.shape
    num_exponents = 2**layout.exponent_bits
    bins = np.arange(num_blocks)[:, None] * num_exponents + exponents
    counts = np.bincount(bins.ravel(), minlength=num_blocks * num_exponents).reshape(num_blocks, num_exponents)
    below = np.pad(counts.cumsum(axis=1), ((0, 0), (1, 0)))  # how many values have an exponent below each

    widths, bases = np.full(num_blocks, STORED), np.zeros(num_blocks, np.int64)
    sizes = np.full(num_blocks, HEADER_BYTES + 2 * num_values, np.int64)
    for width in layout.widths:
        span = 2**width - 1
        covered = below[:, span:] - below[:, :-span]  # by a code that counts up from each base
        size = _fixed_bytes(num_values, width, layout) + num_values - covered.max(axis=1)
        better = size < sizes
        widths[better], bases[better], sizes[better] = width, covered.argmax(axis=1)[better], size[better]
    return widths, bases, sizes


def _to_planes(fields: Array, bits: int) -> Array:
    """Bit b of every field of a block side by side, for b = 0, 1, ..."""
    planes = fields[:, None, :] >> np.arange(bits, dtype=np.uint8)[:, None] & 1
    packed = np.packbits(planes, axis=-1, bitorder="little")
    return packed.reshape(len(fields), bits * packed.shape[-1])


def _from_planes(packed: Array, bits: int, num_values: int) -> Array:
    """The inverse of ``_to_planes``."""
    planes = packed.reshape(len(packed), bits, packed.shape[1] // bits)
    planes = np.unpackbits(planes, axis=-1, count=num_values, bitorder="little")
    return np.bitwise_or.reduce(planes << np.arange(bits, dtype=np.uint8)[:, None], axis=1)


def _escapes(is_escape: Array) -> tuple[Array, Array, Array]:
    """Block and value of each escape, and how many escapes its block has before it."""
    row, value = np.nonzero(is_escape)
    first = np.cumsum(is_escape.sum(axis=1)) - is_escape.sum(axis=1)
    return row, value, np.arange(len(row)) - first[row]
