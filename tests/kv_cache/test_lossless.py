"""Lossless coding of blocks."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import fast
import reference
from fast.kv_cache import lossless
from fast.kv_cache.lossless import MAX_TILE, TILE_TILES, choose_tile
from twofold.conformance import plain_torch
from twofold.conformance.properties import kv_cache as properties
from twofold.conformance.strategies.kv_cache import FLOATS, every_word, words

formats = pytest.mark.parametrize("format", ["bfloat16", "float16"])


@settings(max_examples=200)
@given(case=words())
def test_every_word_comes_back(backend, case):
    properties.lossless_is_lossless(backend, *case)


@pytest.mark.parametrize("coder", [plain_torch, fast], ids=["plain_torch", "fast"])
@settings(max_examples=25)
@given(case=words())
def test_the_bytes_are_the_same(coder, case):
    properties.lossless_codes_are_the_oracles(coder, reference, *case)


@formats
def test_a_block_of_many_tiles_has_the_same_bytes(format):
    """Escapes are counted across tiles: a block that is a few tiles and a bit, with exceptions in each."""
    num_values = 2 * MAX_TILE + 77
    assert choose_tile(num_values) == MAX_TILE < num_values
    values = np.random.default_rng(1).normal(size=(2, num_values)) ** 3
    words = values.astype(FLOATS[format]).view(np.uint16)
    properties.lossless_codes_are_the_oracles(fast, reference, words, format)
    properties.lossless_is_lossless(fast, words, format)


def test_escapes_are_added_up_over_any_number_of_tiles(monkeypatch):
    """More of them than are taken at once, by coder and decoder; small tiles, so that the block is not large."""
    monkeypatch.setattr(lossless, "MAX_TILE", 16)
    monkeypatch.setattr(lossless, "EARLIER_TILES", TILE_TILES)
    values = np.random.default_rng(2).normal(size=(1, 16 * (2 * TILE_TILES + 3) - 5)) ** 3
    words = values.astype(FLOATS["bfloat16"]).view(np.uint16)
    properties.lossless_codes_are_the_oracles(fast, reference, words, "bfloat16")
    properties.lossless_is_lossless(fast, words, "bfloat16")


@pytest.mark.parametrize("coder", [plain_torch, fast], ids=["plain_torch", "fast"])
@formats
def test_the_last_exponent_is_one_like_the_others(coder, format):
    """Infinities and NaN alone, and beside the largest numbers: the base may be the last, or the last but one."""
    numbers = np.array([[np.inf] * 40, [-np.inf, np.nan] * 20, [np.inf, ml_dtypes.finfo(FLOATS[format]).max] * 20])
    properties.lossless_codes_are_the_oracles(coder, reference, numbers.astype(FLOATS[format]).view(np.uint16), format)


@pytest.mark.parametrize("largest", [1, 28, 30, 31, 255])
@pytest.mark.parametrize("below", [28, 29, 30, 31])
def test_exponents_far_below_the_largest_are_counted(largest, below):
    """Where a tile's counters end, and one beyond; with and without zeros. Each exponent has a number of its own."""
    found = [1, max(largest - below, 0), max(largest - 1, 0), largest]
    exponents = np.repeat([found, [0, *found[1:]]], [7, 11, 5, 40], axis=1)
    properties.lossless_codes_are_the_oracles(fast, reference, (exponents << 7).astype(np.uint16), "bfloat16")


@formats
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_every_pattern_comes_back(backend, format, order):
    """All 65536 words: in blocks that share an exponent, and in blocks where no width helps."""
    properties.lossless_is_lossless(backend, every_word(order), format)


@formats
@pytest.mark.parametrize("seed", range(3))
def test_sizes_are_what_the_module_says(format, seed):
    """The smallest size over every width and base, counted anew for each."""
    values = np.random.default_rng(seed).normal(size=(2, 333)) ** (1 + 2 * seed)
    blocks = values.astype(FLOATS[format]).view(np.uint16)
    codes, sizes = reference.encode_lossless(blocks, format=format)
    exponent_bits = {"bfloat16": 8, "float16": 5}[format]
    exponents = blocks.astype(int) >> 15 - exponent_bits & 2**exponent_bits - 1
    for block, (row, size) in enumerate(zip(codes, sizes)):
        best = 4 + 2 * 333
        for width in range(1, exponent_bits):
            for base in range(2**exponent_bits):
                offset = exponents[block] - base
                escapes = np.sum((offset < 0) | (offset >= 2**width - 1))
                best = min(best, 4 + 333 + (8 - exponent_bits + width) * 42 + escapes)
        assert size == best, f"block {block}: {best} bytes would do, got {size}"
        assert not row[size:].any(), f"block {block}: bytes behind its size are not 0"


@pytest.mark.parametrize(("format", "low", "high"), [("bfloat16", 0.69, 0.71), ("float16", 0.88, 0.90)])
def test_what_it_saves_on_normal_values(format, low, high):
    """The figure that the documentation may quote: 16 tokens of 3 heads of 64, keys and values."""
    blocks = np.random.default_rng(0).normal(size=(32, 6144)).astype(FLOATS[format]).view(np.uint16)
    _, sizes = reference.encode_lossless(blocks, format=format)
    ratio = sizes.sum() / blocks.nbytes
    assert low < ratio < high, f"{format}: coded to {ratio:.4f} of its size"


# ---- the door ---------------------------------------------------------------------------------------------------

WORDS = np.full((2, 32), 0x3F80, np.uint16)
CODES, SIZES = reference.encode_lossless(WORDS, format="bfloat16")
CALLS = {
    "encode_lossless": {"words": WORDS, "format": "bfloat16"},
    "decode_lossless": {"codes": CODES, "sizes": SIZES, "num_values": 32, "format": "bfloat16"},
}


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        ("encode_lossless", {"words": WORDS[0]}),
        ("encode_lossless", {"words": WORDS.astype(np.int16)}),
        ("encode_lossless", {"format": "float32"}),
        ("decode_lossless", {"codes": CODES[:, :-1]}),
        ("decode_lossless", {"codes": CODES.astype(np.int8)}),
        ("decode_lossless", {"sizes": SIZES[:1]}),
        ("decode_lossless", {"num_values": 31}),
        ("decode_lossless", {"format": "float8"}),
    ],
)
def test_the_door_names_what_is_wrong(backend, op, changed):
    properties.refuses(backend, op, CALLS[op], **changed)


def broken(**bytes_at: int) -> np.ndarray:
    codes = CODES.copy()
    for place, value in bytes_at.items():
        codes[0, int(place[1:])] = value
    return codes


@pytest.mark.parametrize(
    ("codes", "sizes"),
    [
        (broken(_0=8), SIZES),  # no such width
        (broken(_0=2), SIZES),  # another width than the size is for
        (broken(_0=0), SIZES),  # stored, and too short
        (broken(_36=0xFF), SIZES),  # escapes without exceptions
        (CODES, SIZES + 1),  # an exception without an escape
        (broken(_0=7, _1=255, _36=1), np.array([4 + 32 + 28, SIZES[1]])),  # an exponent of 256
    ],
)
@pytest.mark.parametrize("checking", [reference, fast], ids=["reference", "fast"])
def test_what_no_encoder_made_is_refused(checking, codes, sizes):
    """A damaged header or size is an error, not other words."""
    codes, sizes = checking.from_host(codes.copy()), checking.from_host(sizes.copy())
    with pytest.raises(ValueError, match=r"^decode_lossless: (codes|sizes): "):
        checking.decode_lossless(codes, sizes, num_values=32, format="bfloat16")


@pytest.mark.parametrize("width", [7, 9, 20])
def test_what_no_encoder_made_is_not_read_beyond_its_row(width, monkeypatch):
    """Where values are not looked at: planes and exceptions that do not fit are not there, whatever lies behind."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    capacity = CODES.shape[1]
    decoded = []
    for behind in (0, 0xFF):
        rows = np.full((2, capacity + 60), 0xFF, np.uint8)
        rows[:, 0], rows[:, capacity:] = width, behind
        codes = fast.from_host(rows)[:, :capacity]
        words = fast.decode_lossless(codes, fast.from_host(SIZES.copy()), num_values=32, format="bfloat16")
        decoded.append(fast.to_host(words).tolist())
    assert decoded[0] == decoded[1]
