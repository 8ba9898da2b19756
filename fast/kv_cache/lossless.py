"""Lossless coding of bf16 and fp16 blocks, in Triton. The format: `reference/kv_cache/lossless.py`.

A block is many tiles wide, and what a tile writes depends on all of them: the width and the base on how often each
exponent occurs in the block, the place of its exceptions on how many the tiles before it have. So coding takes three
kernels: tiles count exponents; a program for each block chooses, and adds up the escapes before each tile; tiles
write. Decoding takes two: tiles count escapes, then read. All of it is integers, so the bytes are the reference's.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int16, Int32, Int64, UInt8, UInt16
from torch import Tensor as Array

from fast._checks import (
    checking_values,
    require,
    require_dtype,
    require_integers,
    require_same_device,
    require_shape,
    require_values,
)
from fast._triton.platform import cdiv, next_power_of_2, require_runnable
from reference.kv_cache.lossless import HEADER_BYTES, WORD_FORMATS, WordFormat

MAX_TILE = 4096  # values that one program codes: 16 a thread; its 256 counters are a sixteenth of what it reads
NUM_WARPS = 4
TILE_TILES = 16  # tiles whose counters are added up at once
EARLIER_TILES = 256  # tiles whose escapes are: a number of each

HEADER = tl.constexpr(HEADER_BYTES)
FEW = tl.constexpr(32)  # counters that nearly every tile makes do with


@triton.jit
def _row_of(block, block_ids_ptr):
    """Where a block's words are: with ids, blocks are coded where they lie in a pool, and decoded to where they go."""
    row = block
    if block_ids_ptr is not None:
        row = tl.load(block_ids_ptr + block).to(tl.int64)
    return row


# ---- coding -----------------------------------------------------------------------------------------------------


@triton.jit
def _count_kernel(
    words_ptr,  # [num_rows, num_values]
    block_ids_ptr,  # [num_blocks]: rows of words; or None: block i is row i
    counts_ptr,  # [num_blocks, num_tiles, NUM_EXPONENTS]
    stride_words_block, stride_words_value,
    num_values,
    num_tiles,
    FRACTION_BITS: tl.constexpr,
    NUM_EXPONENTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """How often each exponent occurs in a tile."""
    block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    value = tile * TILE + tl.arange(0, TILE)
    inside = value < num_values
    row_of_words = words_ptr + _row_of(block, block_ids_ptr) * stride_words_block
    words = tl.load(row_of_words + value * stride_words_value, mask=inside, other=0)
    exponents = ((words.to(tl.int32) & 0xFFFF) >> FRACTION_BITS) & (NUM_EXPONENTS - 1)
    exponent = tl.arange(0, NUM_EXPONENTS)
    if NUM_EXPONENTS <= FEW:
        counts = tl.histogram(exponents, NUM_EXPONENTS)
    else:  # a histogram costs by the counter: those of 0, of the exponents next to the largest, and of any others
        lowest = tl.maximum(tl.max(exponents, 0) - (FEW - 3), 1)
        counter = tl.where(exponents == 0, 0, tl.where(exponents >= lowest, exponents - lowest + 1, FEW - 1))
        few = tl.histogram(counter, FEW)
        if tl.sum(tl.where(tl.arange(0, FEW) == FEW - 1, few, 0), 0) > 0:
            counts = tl.histogram(exponents, NUM_EXPONENTS)
        else:
            is_near = (exponent >= lowest) & (exponent < lowest + FEW - 2)
            counts = tl.gather(few, tl.where(is_near, exponent - lowest + 1, tl.where(exponent == 0, 0, FEW - 1)), 0)
    outside = TILE - tl.minimum(num_values - tile * TILE, TILE)  # they were read as 0
    counts -= tl.where(exponent == 0, outside, 0)
    tl.store(counts_ptr + (block * num_tiles + tile) * NUM_EXPONENTS + exponent, counts.to(tl.int16))


@triton.jit
def _choose_kernel(
    counts_ptr,  # [num_blocks, num_tiles, NUM_EXPONENTS]
    choices_ptr,  # [num_blocks, 2]: width and base
    sizes_ptr,  # [num_blocks]
    escapes_before_ptr,  # [num_blocks, num_tiles]
    num_values,
    num_tiles,
    EXPONENT_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE_TILES: tl.constexpr,
):
    """The width and base that make a block smallest, its size, and how many escapes come before each tile."""
    NUM_EXPONENTS: tl.constexpr = 2**EXPONENT_BITS
    block = tl.program_id(0).to(tl.int64)
    exponent = tl.arange(0, NUM_EXPONENTS)
    rows = tl.arange(0, TILE_TILES)
    counts_of_block = counts_ptr + block * num_tiles * NUM_EXPONENTS
    of_rows = tl.zeros([TILE_TILES, NUM_EXPONENTS], tl.int32)  # added up at the end, once
    for first in range(0, num_tiles, TILE_TILES):
        some = counts_of_block + (first + rows)[:, None] * NUM_EXPONENTS + exponent[None, :]
        of_rows += tl.load(some, mask=(first + rows < num_tiles)[:, None], other=0).to(tl.int32)
    counts = tl.sum(of_rows, 0)
    up_to = tl.cumsum(counts, 0)
    below = up_to - counts

    width, base, size = 0, 0, HEADER + 2 * num_values
    for w in tl.static_range(1, EXPONENT_BITS):
        span = 2**w - 1
        covered = tl.gather(up_to, tl.minimum(exponent + span - 1, NUM_EXPONENTS - 1), 0) - below
        covered = tl.where(exponent <= NUM_EXPONENTS - span, covered, -1)
        best = tl.max(covered, 0)
        coded = HEADER + num_values + (HIGH_BITS + w) * ((num_values + 7) // 8) + num_values - best
        better = coded < size
        width = tl.where(better, w, width)
        base = tl.where(better, tl.argmax(covered, 0, tie_break_left=True), base)
        size = tl.where(better, coded, size)
    tl.store(choices_ptr + block * 2, width)
    tl.store(choices_ptr + block * 2 + 1, base)
    tl.store(sizes_ptr + block, size.to(tl.int64))

    escapes = (exponent < base) | (exponent >= base + (1 << width) - 1)
    before = 0
    for first in range(0, num_tiles, TILE_TILES):
        in_block = first + rows < num_tiles
        some = counts_of_block + (first + rows)[:, None] * NUM_EXPONENTS + exponent[None, :]
        of_some = tl.load(some, mask=in_block[:, None], other=0).to(tl.int32)
        of_tiles = tl.sum(tl.where(escapes[None, :], of_some, 0), 1)
        of_earlier = before + tl.cumsum(of_tiles, 0) - of_tiles
        tl.store(escapes_before_ptr + block * num_tiles + first + rows, of_earlier, mask=in_block)
        before += tl.sum(of_tiles, 0)


@triton.jit
def _encode_kernel(
    words_ptr,  # [num_rows, num_values]
    block_ids_ptr,  # [num_blocks]: rows of words; or None: block i is row i
    choices_ptr,  # [num_blocks, 2]
    escapes_before_ptr,  # [num_blocks, num_tiles]
    codes_ptr,  # [num_blocks, row_bytes], a byte beside the other; what is behind a block's size stays as it is
    stride_words_block, stride_words_value,
    stride_codes_block,
    num_values,
    num_tiles,
    EXPONENT_BITS: tl.constexpr,
    FRACTION_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The header (tile 0), and a tile's low bytes, planes and exceptions, each to its place in the row."""
    block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width, base = tl.load(choices_ptr + block * 2), tl.load(choices_ptr + block * 2 + 1)
    row = codes_ptr + block * stride_codes_block
    if tile == 0:
        byte = tl.arange(0, HEADER)
        tl.store(row + byte, tl.where(byte == 0, width, tl.where(byte == 1, base, 0)).to(tl.uint8))
    body = row + HEADER

    of_plane = tile * (TILE // 8) + tl.arange(0, TILE // 8)  # bytes of a plane, eight values each
    bit = tl.arange(0, 8)
    value = of_plane[:, None] * 8 + bit[None, :]
    inside = value < num_values
    row_of_words = words_ptr + _row_of(block, block_ids_ptr) * stride_words_block
    words = tl.load(row_of_words + value * stride_words_value, mask=inside, other=0)
    words = words.to(tl.int32) & 0xFFFF
    if width == 0:
        tl.store(body + 2 * value, (words & 0xFF).to(tl.uint8), mask=inside)
        tl.store(body + 2 * value + 1, (words >> 8).to(tl.uint8), mask=inside)
    else:
        exponents = (words >> FRACTION_BITS) & ((1 << EXPONENT_BITS) - 1)
        noise = ((words >> 15) << FRACTION_BITS) | (words & ((1 << FRACTION_BITS) - 1))
        tl.store(body + value, (noise & 0xFF).to(tl.uint8), mask=inside)

        escape = (1 << width) - 1
        offset = exponents - base
        code = tl.where((offset >= 0) & (offset < escape), offset, escape)
        fields = tl.where(inside, (code << HIGH_BITS) | (noise >> 8), 0)
        plane_bytes = (num_values + 7) // 8
        planes = body + num_values
        for plane in range(HIGH_BITS + width):
            packed = tl.sum(((fields >> plane) & 1) << bit[None, :], 1)
            tl.store(planes + plane * plane_bytes + of_plane, packed.to(tl.uint8), mask=of_plane < plane_bytes)

        is_escape = inside & (code == escape)
        count = tl.reshape(is_escape.to(tl.int32), [TILE])
        rank = tl.reshape(tl.cumsum(count, 0) - count, [TILE // 8, 8])
        rank += tl.load(escapes_before_ptr + block * num_tiles + tile)
        exceptions = planes + (HIGH_BITS + width) * plane_bytes
        tl.store(exceptions + rank, exponents.to(tl.uint8), mask=is_escape)


def encode_lossless(
    words: UInt16[Array, "num_blocks num_values"], *, format: str
) -> tuple[UInt8[Array, "num_blocks capacity"], Int64[Array, " num_blocks"]]:
    """Same contract as `reference.kv_cache.lossless.encode_lossless`.

    Grid: one program per tile of a block, to count and to write; one per block between, to choose.
    Moves: the words twice in, 2 bytes a value of zeros out and then the codes, and 1 / 16 of the words in counters.
    Limits: blocks of less than 2^30 values.
    """
    op = "encode_lossless"
    layout = _word_format(op, format)
    require_shape(op, "words", words, (None, None))
    require_dtype(op, "words", words, torch.uint16)
    require_runnable(op, "words", words)
    num_blocks, num_values = words.shape
    new = {"device": words.device}
    codes = torch.zeros(num_blocks, HEADER_BYTES + 2 * num_values, dtype=torch.uint8, **new)
    if num_blocks == 0 or num_values == 0:
        return codes, torch.full((num_blocks,), HEADER_BYTES, dtype=torch.int64, **new)
    bits = words.view(torch.int16)
    chosen = choose_codes(bits, None, layout)
    launch_encode(bits, None, chosen, codes, layout)
    return codes, chosen.sizes


class Chosen(NamedTuple):
    """How blocks are to be coded, each by itself.

    Attributes:
        choices: The width and the base.
        sizes: Of the codes, in bytes.
        escapes_before: How many escapes come before each tile.
    """

    choices: Int32[Array, "num_blocks 2"]
    sizes: Int64[Array, " num_blocks"]
    escapes_before: Int32[Array, "num_blocks num_tiles"]

    def of(self, blocks: slice) -> "Chosen":
        """Of some of them."""
        return Chosen(*(array[blocks] for array in self))


def choose_codes(
    words: Int16[Array, "num_rows num_values"], block_ids: Int64[Array, " num_blocks"] | None, layout: WordFormat
) -> Chosen:
    """The first half of ``encode_lossless``, for words that were checked and are not empty.

    Args:
        block_ids: The rows that are the blocks, contiguous; None: all.
    """
    num_blocks, num_values = len(words if block_ids is None else block_ids), words.shape[1]
    tile = choose_tile(num_values)
    num_tiles, num_exponents = cdiv(num_values, tile), 2**layout.exponent_bits
    new = {"dtype": torch.int32, "device": words.device}
    counts = torch.empty(num_blocks, num_tiles, num_exponents, dtype=torch.int16, device=words.device)
    chosen = Chosen(
        torch.empty(num_blocks, 2, **new),
        torch.empty(num_blocks, dtype=torch.int64, device=words.device),
        torch.empty(num_blocks, num_tiles, **new),
    )
    _count_kernel[(num_blocks, num_tiles)](
        words, block_ids, counts, *words.stride(), num_values, num_tiles,
        FRACTION_BITS=layout.fraction_bits, NUM_EXPONENTS=num_exponents, TILE=tile, num_warps=NUM_WARPS,
    )  # fmt: skip
    _choose_kernel[(num_blocks,)](
        counts, *chosen, num_values, num_tiles,
        EXPONENT_BITS=layout.exponent_bits, HIGH_BITS=layout.high_bits, TILE_TILES=TILE_TILES, num_warps=NUM_WARPS,
    )  # fmt: skip
    return chosen


def launch_encode(
    words: Int16[Array, "num_rows num_values"],
    block_ids: Int64[Array, " num_blocks"] | None,
    chosen: Chosen,
    codes: UInt8[Array, "num_blocks row_bytes"],
    layout: WordFormat,
) -> None:
    """The second half of ``encode_lossless``: writes the codes as chosen, and nothing behind them.

    Args:
        codes: Contiguous rows, as long as the longest code or longer.
    """
    num_values, num_tiles = words.shape[1], chosen.escapes_before.shape[1]
    _encode_kernel[(len(codes), num_tiles)](
        words, block_ids, chosen.choices, chosen.escapes_before, codes, *words.stride(), codes.stride(0),
        num_values, num_tiles,
        EXPONENT_BITS=layout.exponent_bits, HIGH_BITS=layout.high_bits, FRACTION_BITS=layout.fraction_bits,
        TILE=choose_tile(num_values), num_warps=NUM_WARPS,
    )  # fmt: skip


# ---- decoding ---------------------------------------------------------------------------------------------------


@triton.jit
def _read_planes(
    row,
    stride_codes_byte,
    row_bytes,
    num_values,
    width,
    of_plane,
    HIGH_BITS: tl.constexpr,
    MOST_PLANES: tl.constexpr,
):
    """Of each eight values the bytes of all planes, the first lowest; and a byte with the bits of escapes set.

    All planes that there may be are asked for at once: those that are not there cost nothing, and nobody waits in turn.
    """
    plane_bytes = (num_values + 7) // 8
    readable_bytes = tl.minimum((HIGH_BITS + width) * plane_bytes, row_bytes - HEADER - num_values)
    planes = tl.zeros_like(of_plane).to(tl.int64)
    escapes = tl.zeros_like(of_plane) + tl.where(width > 0, 255, 0)
    for plane in tl.static_range(MOST_PLANES):
        place = plane * plane_bytes + of_plane
        readable = (of_plane < plane_bytes) & (place < readable_bytes)
        packed = tl.load(row + (HEADER + num_values + place) * stride_codes_byte, mask=readable, other=0)
        planes |= packed.to(tl.int64) << (8 * plane)
        if plane >= HIGH_BITS:
            escapes &= tl.where(plane < HIGH_BITS + width, packed.to(tl.int32), 255)
    return planes, escapes


@triton.jit
def _transpose_bits(x):
    """Bit i of byte k becomes bit k of byte i; byte 7 must be 0. Bits change places by ones, twos and fours."""
    moved = (x ^ (x >> 7)) & 0x00AA00AA00AA00AA
    x = x ^ moved ^ (moved << 7)
    moved = (x ^ (x >> 14)) & 0x0000CCCC0000CCCC
    x = x ^ moved ^ (moved << 14)
    moved = (x ^ (x >> 28)) & 0x00000000F0F0F0F0
    return x ^ moved ^ (moved << 28)


@triton.jit
def _count_ones(byte):
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0xF


@triton.jit
def _count_escapes_kernel(
    codes_ptr,  # [num_blocks, row_bytes]
    escapes_ptr,  # [num_blocks, num_tiles]
    stride_codes_block, stride_codes_byte,
    row_bytes,
    num_values,
    num_tiles,
    HIGH_BITS: tl.constexpr,
    MOST_PLANES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """How many values of a tile have all bits of their code set."""
    block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = codes_ptr + block * stride_codes_block
    width = tl.load(row).to(tl.int32)
    of_plane = tile * (TILE // 8) + tl.arange(0, TILE // 8)
    sizes = (stride_codes_byte, row_bytes, num_values)
    _, escapes = _read_planes(row, *sizes, width, of_plane, HIGH_BITS, MOST_PLANES)
    tl.store(escapes_ptr + block * num_tiles + tile, tl.sum(_count_ones(escapes), 0))


@triton.jit
def _decode_kernel(
    codes_ptr,  # [num_blocks, row_bytes]
    escapes_ptr,  # [num_blocks, num_tiles]
    words_ptr,  # [num_rows, num_values]
    block_ids_ptr,  # [num_blocks]: rows of words; or None: block i is row i
    largest_ptr,  # [num_blocks, num_tiles]: exponents, to see whether the codes can be right; or None: nobody looks
    stride_codes_block, stride_codes_byte,
    stride_words_block, stride_words_value,
    row_bytes,
    num_values,
    num_tiles,
    FRACTION_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    MOST_PLANES: tl.constexpr,
    TILE: tl.constexpr,
    TILE_TILES: tl.constexpr,
    IN_FOURS: tl.constexpr,  # the low bytes can be read as words of four
):  # fmt: skip
    """A thread has eight values side by side, and so whole bytes of every plane: what it reads it need not pass on."""
    block, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = codes_ptr + block * stride_codes_block
    width, base = tl.load(row).to(tl.int32), tl.load(row + stride_codes_byte).to(tl.int32)
    body = row + HEADER * stride_codes_byte
    body_bytes = row_bytes - HEADER
    of_plane = tile * (TILE // 8) + tl.arange(0, TILE // 8)
    bit = tl.arange(0, 8)
    value = of_plane[:, None] * 8 + bit[None, :]
    inside = value < num_values
    words_of_block = words_ptr + _row_of(block, block_ids_ptr) * stride_words_block + value * stride_words_value
    if width == 0:
        low = tl.load(body + 2 * value * stride_codes_byte, mask=inside, other=0).to(tl.int32)
        high = tl.load(body + (2 * value + 1) * stride_codes_byte, mask=inside, other=0).to(tl.int32)
        tl.store(words_of_block, (low | (high << 8)).to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
        if largest_ptr is not None:
            tl.store(largest_ptr + block * num_tiles + tile, 0)
    else:
        if IN_FOURS:
            fours = body.to(tl.pointer_type(tl.uint32)) + of_plane * 2
            whole = of_plane * 8 < num_values
            first, second = tl.load(fours, mask=whole, other=0), tl.load(fours + 1, mask=whole, other=0)
            eight = first.to(tl.int64) | (second.to(tl.int64) << 32)
            noise = (eight[:, None] >> (bit * 8)[None, :]).to(tl.int32) & 0xFF
        else:
            noise = tl.load(body + value * stride_codes_byte, mask=inside, other=0).to(tl.int32)
        sizes = (stride_codes_byte, row_bytes, num_values)
        planes, escapes = _read_planes(row, *sizes, width, of_plane, HIGH_BITS, MOST_PLANES)
        before = 0
        for start in range(0, tile, TILE_TILES):
            earlier = start + tl.arange(0, TILE_TILES)
            of_tiles = tl.load(escapes_ptr + block * num_tiles + earlier, mask=earlier < tile, other=0)
            before += tl.sum(of_tiles, 0)
        fields = (_transpose_bits(planes)[:, None] >> (bit * 8)[None, :]).to(tl.int32) & 0xFF
        noise |= (fields & ((1 << HIGH_BITS) - 1)) << 8
        code = fields >> HIGH_BITS

        is_escape = (escapes[:, None] >> bit[None, :]) & 1
        count = _count_ones(escapes)
        rank = before + (tl.cumsum(count, 0) - count)[:, None] + tl.cumsum(is_escape, 1) - is_escape
        place = num_values + (HIGH_BITS + width) * ((num_values + 7) // 8) + rank
        readable = inside & (is_escape == 1) & (place < body_bytes)
        exceptions = tl.load(body + place * stride_codes_byte, mask=readable, other=0)
        exponents = tl.where(is_escape == 1, exceptions.to(tl.int32), base + code)
        sign, fraction = noise >> FRACTION_BITS, noise & ((1 << FRACTION_BITS) - 1)
        words = (sign << 15) | (exponents << FRACTION_BITS) | fraction
        tl.store(words_of_block, words.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
        if largest_ptr is not None:
            tl.store(largest_ptr + block * num_tiles + tile, tl.max(tl.max(tl.where(inside, exponents, 0), 1), 0))


def decode_lossless(
    codes: UInt8[Array, "num_blocks capacity"], sizes: Int64[Array, " num_blocks"], *, num_values: int, format: str
) -> UInt16[Array, "num_blocks num_values"]:
    """Same contract as `reference.kv_cache.lossless.decode_lossless`.

    Grid: one program per tile of a block, to count its escapes and then to read it.
    Moves: the codes once in, their code planes twice, and the words out.
    Limits: blocks of less than 2^30 values. Sizes are looked at only when values are checked; codes that no encoder
    made give some words, and are never read beyond their row.
    """
    op = "decode_lossless"
    layout = _word_format(op, format)
    require_shape(op, "codes", codes, (None, HEADER_BYTES + 2 * num_values))
    require_dtype(op, "codes", codes, torch.uint8)
    require_integers(op, "sizes", sizes, (len(codes),))
    require_same_device(op, codes=codes, sizes=sizes)
    require_runnable(op, "codes", codes)
    words = torch.empty(len(codes), num_values, dtype=torch.uint16, device=codes.device)
    if words.numel() == 0:
        return words
    if checking_values():
        known = torch.isin(codes[:, 0], torch.arange(layout.exponent_bits, device=codes.device))
        require_values(known.all(), op, "codes", "headers with a known width", codes[:, 0].tolist())
    escapes, largest = launch_decode(codes, words.view(torch.int16), None, layout)
    if largest is not None:
        _require_coded(op, codes, sizes, num_values, layout, escapes, largest)
    return words


def launch_decode(
    codes: UInt8[Array, "num_blocks row_bytes"],
    words: Int16[Array, "num_rows num_values"],
    block_ids: Int64[Array, " num_blocks"] | None,
    layout: WordFormat,
) -> tuple[Int32[Array, "num_blocks num_tiles"], Int32[Array, "num_blocks num_tiles"] | None]:
    """The kernels of ``decode_lossless``, for arguments that were checked and are not empty.

    Args:
        codes: In rows that may end behind the longest.
        words: Written.
        block_ids: The rows that are the blocks, contiguous and none twice; None: all.

    Returns:
        Of each tile, how many escapes it has, and if values are checked its largest exponent.
    """
    num_values = words.shape[1]
    tile = choose_tile(num_values)
    num_tiles = cdiv(num_values, tile)
    grid = (len(codes), num_tiles)
    escapes = torch.empty(grid, dtype=torch.int32, device=codes.device)
    largest = torch.empty_like(escapes) if checking_values() else None
    in_fours = num_values % 8 == 0 and codes.stride(1) == 1 and (codes.data_ptr() | codes.stride(0)) % 4 == 0
    sizes = (codes.shape[1], num_values, num_tiles)
    most_planes = layout.high_bits + layout.exponent_bits - 1
    tiles = {"HIGH_BITS": layout.high_bits, "MOST_PLANES": most_planes, "TILE": tile, "num_warps": NUM_WARPS}
    _count_escapes_kernel[grid](codes, escapes, *codes.stride(), *sizes, **tiles)
    _decode_kernel[grid](
        codes, escapes, words, block_ids, largest, *codes.stride(), *words.stride(), *sizes,
        FRACTION_BITS=layout.fraction_bits, TILE_TILES=EARLIER_TILES, IN_FOURS=in_fours, **tiles,
    )  # fmt: skip
    return escapes, largest


def _require_coded(
    op: str, codes: Array, sizes: Array, num_values: int, layout: WordFormat, escapes: Array, largest: Array
) -> None:
    """Headers and sizes are those of coded blocks, and exponents have as many bits as the format's."""
    widths = codes[:, 0].long()
    fixed = HEADER_BYTES + num_values + (layout.high_bits + widths) * cdiv(num_values, 8)
    expected = torch.where(widths == 0, codes.shape[1], fixed + escapes.sum(1))
    require_values((sizes == expected).all(), op, "sizes", f"{expected.tolist()}", sizes.tolist())
    possible = int(largest.max()) < 2**layout.exponent_bits
    require(possible, op, "codes", f"exponents of {layout.exponent_bits} bits", int(largest.max()))


def choose_tile(num_values: int) -> int:
    """Values of a block that one program codes: a power of two, at least two bytes of a plane."""
    return min(max(next_power_of_2(num_values), 16), MAX_TILE)


def _word_format(op: str, name: str) -> WordFormat:
    require(name in WORD_FORMATS, op, "format", f"one of {', '.join(WORD_FORMATS)}", repr(name))
    return WORD_FORMATS[name]
