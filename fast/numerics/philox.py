"""Philox 4x32-10 and the draws made from it, in Triton. What the technique is for: `reference/numerics/philox.py`.

The helpers below are what the sampling kernels draw with: any word of any row, computed where it is needed.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int, Int64, UInt32
from torch import Tensor as Array

from fast._checks import require, require_dtype, require_integers, require_range, require_same_device, require_shape
from fast._triton.platform import INTERPRETED, INTERPRETING, cdiv, require_runnable
from reference.numerics import philox as _reference

PURPOSE_DRAW = tl.constexpr(_reference.PURPOSE_DRAW)
PURPOSE_ACCEPT = tl.constexpr(_reference.PURPOSE_ACCEPT)
PURPOSE_RESAMPLE = tl.constexpr(_reference.PURPOSE_RESAMPLE)

MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
KEY_STEP_0, KEY_STEP_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)

# -log(1 - v) / v for 0 <= v < 1/4: a polynomial fitted to the relative error (4e-08)
LOG_SERIES_0, LOG_SERIES_1 = tl.constexpr(0.9999999625), tl.constexpr(0.5000105607)
LOG_SERIES_2, LOG_SERIES_3 = tl.constexpr(0.3328547747), tl.constexpr(0.2578205147)
LOG_SERIES_4, LOG_SERIES_5 = tl.constexpr(0.1438185175), tl.constexpr(0.3399521923)

UNIFORM, GUMBEL, NORMAL = (tl.constexpr(law) for law in range(3))

TILE_BLOCKS = 16 if INTERPRETING else 512  # counters a program encrypts: 2048 numbers


@triton.jit
def encrypt(c0, c1, c2, c3, k0, k1):
    """The ten rounds; uint32 words."""
    for _ in tl.static_range(10):
        high_0, low_0 = _halves_of_product(c0, MULTIPLIER_0)
        high_1, low_1 = _halves_of_product(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = tl.add(k0, KEY_STEP_0, sanitize_overflow=False)
        k1 = tl.add(k1, KEY_STEP_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _halves_of_product(x, multiplier):
    """The high and the low word. On a GPU one wide multiplication, of which `umulhi` would make two; interpreted, what
    takes the fewest steps (every one costs some 50 us, a hundred if it looks for an overflow)."""
    if INTERPRETED:
        high, low = tl.umulhi(x, multiplier), tl.mul(x, multiplier, sanitize_overflow=False)
    else:
        product = x.to(tl.uint64) * multiplier
        high, low = (product >> 32).to(tl.uint32), product.to(tl.uint32)
    return high, low


@triton.jit
def random_words(seed, position, sample_index, blocks, purpose):
    """The four words of each block of one row: what `random_uniform` makes its columns 4 block + 0..3 of."""
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = blocks.to(tl.uint32)
    zero = c3 ^ c3  # the interpreter wants the words in one shape
    return encrypt(zero + position.to(tl.uint32), zero + sample_index.to(tl.uint32), zero + purpose, c3, k0, k1)


@triton.jit
def to_uniform(words):
    """Strictly inside (0, 1), exactly: 23 bits and a half."""
    return ((words >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)


@triton.jit
def to_gumbel(u):
    return -tl.log(-tl.log(u))


@triton.jit
def side_by_side(x0, x1, x2, x3):
    """Columns 4 i + 0..3 from four tensors of columns i."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def quick_gumbel(words):
    """`to_gumbel` of `to_uniform` for many: within 1e-6 of it, in a third of the instructions.

    What counts is the relative error of -log u where u is near 1, which is where a maximum comes from: a polynomial of
    1 - u there, elsewhere the hardware's logarithm, good to 2**-22.
    """
    if INTERPRETED:
        noise = to_gumbel(to_uniform(words))
    else:
        u = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 2.0**-24)  # exact, as is v
        v = 1.0 - u
        series = v * LOG_SERIES_5 + LOG_SERIES_4
        series = series * v + LOG_SERIES_3
        series = series * v + LOG_SERIES_2
        series = series * v + LOG_SERIES_1
        series = series * v + LOG_SERIES_0
        rate = tl.where(v < 0.25, v * series, -0.6931471805599453 * _hardware_log2(u))
        noise = -0.6931471805599453 * _hardware_log2(rate)
    return noise


@triton.jit
def _hardware_log2(x):
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def words_of_tile(seed, position, sample_index, first_block, purpose, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The words of ROWS x COLS neighbouring columns, from column 4 ``first_block`` on."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS // 4)
    blocks = first_block + rows[:, None] * (COLS // 4) + cols[None, :]
    w0, w1, w2, w3 = random_words(seed, position, sample_index, blocks, purpose)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLS))


@triton.jit
def gumbel_at(seed, position, sample_index, tokens, purpose):
    """Noise for tokens anywhere: a block is encrypted for each, and one of its words used."""
    w0, w1, w2, w3 = random_words(seed, position, sample_index, tokens >> 2, purpose)
    word = tokens & 3
    return to_gumbel(to_uniform(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))))


@triton.jit
def _philox_kernel(
    counter_ptr,  # [num_draws, 4]
    key_ptr,  # [num_draws, 2]
    words_ptr,  # [num_draws, 4]
    stride_counter_draw,
    stride_counter_word,
    stride_key_draw,
    stride_key_word,
    num_draws,
    TILE: tl.constexpr,
):
    draw = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = draw < num_draws
    counter, key = counter_ptr + draw * stride_counter_draw, key_ptr + draw * stride_key_draw
    c0 = tl.load(counter, mask=inside)
    c1 = tl.load(counter + stride_counter_word, mask=inside)
    c2 = tl.load(counter + 2 * stride_counter_word, mask=inside)
    c3 = tl.load(counter + 3 * stride_counter_word, mask=inside)
    k0 = tl.load(key, mask=inside)
    k1 = tl.load(key + stride_key_word, mask=inside)
    w0, w1, w2, w3 = encrypt(c0, c1, c2, c3, k0, k1)
    tl.store(words_ptr + 4 * draw, w0, mask=inside)
    tl.store(words_ptr + 4 * draw + 1, w1, mask=inside)
    tl.store(words_ptr + 4 * draw + 2, w2, mask=inside)
    tl.store(words_ptr + 4 * draw + 3, w3, mask=inside)


@triton.jit
def _random_kernel(
    seeds_ptr,  # [num_rows]
    positions_ptr,  # [num_rows]
    sample_indices_ptr,  # [num_rows]
    out_ptr,  # [num_rows, num_draws]
    stride_seeds,
    stride_positions,
    stride_sample_indices,
    num_draws,
    PURPOSE: tl.constexpr,
    LAW: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    seed = tl.load(seeds_ptr + row * stride_seeds)
    position = tl.load(positions_ptr + row * stride_positions)
    sample_index = tl.load(sample_indices_ptr + row * stride_sample_indices)

    blocks = tl.program_id(1) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    w0, w1, w2, w3 = random_words(seed, position, sample_index, blocks, PURPOSE)
    x0, x1, x2, x3 = to_uniform(w0), to_uniform(w1), to_uniform(w2), to_uniform(w3)
    if LAW == GUMBEL:
        x0, x1, x2, x3 = to_gumbel(x0), to_gumbel(x1), to_gumbel(x2), to_gumbel(x3)
    elif LAW == NORMAL:
        x0, x1 = _box_muller(x0, x1)
        x2, x3 = _box_muller(x2, x3)
    column = tl.program_id(1) * (4 * TILE_BLOCKS) + tl.arange(0, 4 * TILE_BLOCKS)
    tl.store(out_ptr + row * num_draws + column, side_by_side(x0, x1, x2, x3), mask=column < num_draws)


@triton.jit
def _box_muller(u0, u1):
    radius, angle = tl.sqrt(-2 * tl.log(u0)), 6.283185307179586 * u1
    return radius * tl.cos(angle), radius * tl.sin(angle)


def philox_4x32(
    counter: UInt32[Array, "num_draws 4"], key: UInt32[Array, "num_draws 2"]
) -> UInt32[Array, "num_draws 4"]:
    """Same contract as `reference.numerics.philox.philox_4x32`.

    Grid: one program per ``TILE_BLOCKS`` counters. Moves: 24 bytes in and 16 out for each.
    """
    require_shape("philox_4x32", "counter", counter, (None, 4))  # type: ignore[reportArgumentType]
    require_shape("philox_4x32", "key", key, (len(counter), 2))  # type: ignore[reportArgumentType]
    require_dtype("philox_4x32", "counter", counter, torch.uint32)
    require_dtype("philox_4x32", "key", key, torch.uint32)
    require_same_device("philox_4x32", counter=counter, key=key)
    require_runnable("philox_4x32", "counter", counter)
    words = torch.empty(counter.shape, dtype=torch.uint32, device=counter.device)
    if len(counter):
        grid = (cdiv(len(counter), TILE_BLOCKS),)
        _philox_kernel[grid](counter, key, words, *counter.stride(), *key.stride(), len(counter), TILE=TILE_BLOCKS)
    return words


def random_uniform(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    """Same contract as `reference.numerics.philox.random_uniform`.

    Grid: for each row, one program per ``TILE_BLOCKS`` blocks of four columns. Moves: the result.
    """
    return _random("random_uniform", UNIFORM, seeds, positions, sample_indices, purpose, num_draws)


def random_gumbel(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    """Same contract as `reference.numerics.philox.random_gumbel`. Grid and bytes as `random_uniform`."""
    return _random("random_gumbel", GUMBEL, seeds, positions, sample_indices, purpose, num_draws)


def random_normal(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    """Same contract as `reference.numerics.philox.random_normal`. Grid and bytes as `random_uniform`."""
    return _random("random_normal", NORMAL, seeds, positions, sample_indices, purpose, num_draws)


def _random(
    op: str, law: tl.constexpr, seeds: Array, positions: Array, sample_indices: Array, purpose: int, num_draws: int
) -> Array:
    require_shape(op, "seeds", seeds, (None,))  # type: ignore[reportArgumentType]
    require_dtype(op, "seeds", seeds, torch.int64)
    for name, values in (("positions", positions), ("sample_indices", sample_indices)):
        require_integers(op, name, values, (len(seeds),))
        require_range(op, name, values, 0, 2**32)
    require(purpose in range(4), op, "purpose", "0 (draw), 1 (draft), 2 (accept) or 3 (resample)", purpose)
    require(num_draws >= 0, op, "num_draws", "at least 0", num_draws)
    require_same_device(op, seeds=seeds, positions=positions, sample_indices=sample_indices)
    require_runnable(op, "seeds", seeds)
    out = torch.empty(len(seeds), num_draws, device=seeds.device)
    if out.numel():
        grid = (len(seeds), cdiv(num_draws, 4 * TILE_BLOCKS))
        strides = (seeds.stride(0), positions.stride(0), sample_indices.stride(0))
        _random_kernel[grid](
            seeds, positions, sample_indices, out, *strides, num_draws,
            PURPOSE=purpose, LAW=law, TILE_BLOCKS=TILE_BLOCKS,
        )  # fmt: skip
    return out
