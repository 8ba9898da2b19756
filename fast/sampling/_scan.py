"""The one pass over all logits that every draw begins with: what each tile of a row, and each chunk of a tile, holds.

A tile is CHUNK x COLS neighbouring tokens, a *chunk* one column of it: CHUNK tokens that one thread has in its
registers, so that a chunk's maximum costs no exchange. The k-th largest chunk maximum is a lower bound of the k-th
largest logit, since k chunks reach it; so whoever looks for the k best reads about k chunks again, and no more.

With noise it is the same: the best perturbed logits are in the chunks with the best perturbed maxima.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.platform import INTERPRETING, cdiv, next_power_of_2
from fast.numerics.philox import PURPOSE_DRAW, quick_gumbel, words_of_tile

# 4 warps with a vector of four floats a thread make a row of 512; 16 of them are 64 registers a thread.
CHUNK, COLS = (4, 64) if INTERPRETING else (16, 512)
PART = 2 if INTERPRETING else 4  # rows of a tile whose noise is made at once


class Scan(NamedTuple):
    """What the pass leaves behind for each row."""

    tile_max: Array  # [num_rows, num_tiles], the best logit
    tile_mass: Array  # [num_rows, num_tiles], relative to it; only where top-p is on
    tile_best: (
        Array  # [num_rows, num_tiles], greedy: the best token; no filter: the chunk with the best perturbed logit
    )
    chunk_max: Array  # [num_rows, num_chunks], the best logits; only where a filter is on
    chunk_noisy: Array  # [num_rows, num_chunks], the best perturbed logits relative to the tile's; likewise

    @property
    def num_tiles(self) -> int:
        return self.tile_max.shape[1]

    @property
    def padded_tiles(self) -> int:
        return next_power_of_2(self.num_tiles)

    @property
    def padded_chunks(self) -> int:
        return next_power_of_2(self.chunk_max.shape[1])


@triton.jit
def load_filters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab_size):
    """A row's parameters: 1 / temperature, top-k (0: off), top-p, min-p, and whether the row is greedy."""
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    greedy = temperature <= 0
    inverse = tl.minimum(tl.div_rn(1.0, tl.where(greedy, 1.0, temperature)), 3e38)
    top_k = tl.where((top_k > 0) & (top_k < vocab_size), top_k, 0)
    return inverse, top_k, top_p, min_p, greedy


@triton.jit
def load_tile(logits_row_ptr, stride_vocab, tile, vocab_size, CHUNK: tl.constexpr, COLS: tl.constexpr):
    """A tile's logits as float32, -inf beyond the vocabulary, and their tokens."""
    rows, cols = tl.arange(0, CHUNK), tl.arange(0, COLS)
    token = tile * (CHUNK * COLS) + rows[:, None] * COLS + cols[None, :]
    return load_part(logits_row_ptr, stride_vocab, tile * (CHUNK * COLS), vocab_size, CHUNK, COLS), token


@triton.jit
def load_part(logits_row_ptr, stride_vocab, first_token, vocab_size, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ROWS x COLS neighbouring logits from a token on, likewise."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    token = first_token + rows[:, None] * COLS + cols[None, :]
    # The compiler is to see vectors of four in 16-bit logits too: noise comes in fours, and where two layouts meet, all
    # goes through shared memory, which costs more than loads half as wide.
    in_fours = (token // 4) * 4 + token % 4
    pointers = logits_row_ptr + in_fours.to(tl.int64) * stride_vocab
    return tl.load(pointers, mask=token < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def first_best(x, token):
    """The maximum and its lowest token."""
    best = tl.max(tl.max(x, axis=0), axis=0)
    first = tl.where(x == best, token, 2147483647)
    return best, tl.min(tl.min(first, axis=0), axis=0)


@triton.jit
def _scan_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    temperature_ptr,  # [num_rows], as are the next six
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    sample_indices_ptr,
    tile_max_ptr,  # [num_rows, num_tiles]
    tile_mass_ptr,  # [num_rows, num_tiles]
    tile_best_ptr,  # [num_rows, num_tiles]
    chunk_max_ptr,  # [num_rows, num_tiles * COLS]
    chunk_noisy_ptr,  # [num_rows, num_tiles * COLS]
    stride_logits_row,
    stride_logits_vocab,
    vocab_size,
    num_tiles,
    NOISY: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // num_tiles
    tile = (tl.program_id(0) % num_tiles).to(tl.int32)
    inverse_temperature, top_k, top_p, min_p, greedy = load_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab_size
    )
    logits_row_ptr = logits_ptr + row * stride_logits_row
    x, token = load_tile(logits_row_ptr, stride_logits_vocab, tile, vocab_size, CHUNK, COLS)
    here = row * num_tiles + tile
    chunk = here * COLS + tl.arange(0, COLS)

    chunk_max = tl.max(x, axis=0)
    top = tl.max(chunk_max, axis=0)
    tl.store(tile_max_ptr + here, top)
    if greedy:
        first = tl.where(x == top, token, 2147483647)
        tl.store(tile_best_ptr + here, tl.min(tl.min(first, axis=0), axis=0))
    else:
        filtered = (top_k > 0) | (top_p < 1) | (min_p > 0)
        if filtered:
            tl.store(chunk_max_ptr + chunk, chunk_max)
        if (top_k == 0) & (NOISY | (top_p < 1)):
            if NOISY:
                seed = tl.load(seeds_ptr + row)
                position = tl.load(positions_ptr + row)
                sample_index = tl.load(sample_indices_ptr + row)
            origin = tl.where(top == float("-inf"), 0.0, top)
            mass = tl.zeros([PART, COLS], tl.float32)
            chunk_noisy = tl.full([COLS], float("-inf"), tl.float32)
            # A few rows of the tile at a time, from the L1 cache: all of it with its noise takes too many registers.
            for part in range(CHUNK // PART):
                first_token = tile * (CHUNK * COLS) + part * (PART * COLS)
                part_x = load_part(logits_row_ptr, stride_logits_vocab, first_token, vocab_size, PART, COLS)
                scaled = (part_x - origin) * inverse_temperature
                if top_p < 1:
                    mass += tl.exp(scaled)
                if NOISY:
                    words = words_of_tile(seed, position, sample_index, first_token // 4, PURPOSE_DRAW, PART, COLS)
                    chunk_noisy = tl.maximum(chunk_noisy, tl.max(scaled + quick_gumbel(words), axis=0))
            if top_p < 1:
                tl.store(tile_mass_ptr + here, tl.sum(tl.sum(mass, axis=0), axis=0))
            if NOISY:
                if filtered:
                    tl.store(chunk_noisy_ptr + chunk, chunk_noisy)
                else:
                    tl.store(tile_best_ptr + here, tl.argmax(chunk_noisy, axis=0))


def scan(logits: Array, filters: tuple[Array, ...], draws: tuple[Array, ...] | None) -> Scan:
    """One program a tile. Every logit moves once, and an eighth as many bytes (a sixteenth without noise) go back.

    Tiles do not depend on the batch, so nor does anything summed over them.
    """
    num_rows, vocab_size = logits.shape
    num_tiles = cdiv(vocab_size, CHUNK * COLS)
    per_tile, per_chunk = (num_rows, num_tiles), (num_rows, num_tiles * COLS)
    floats = {"dtype": torch.float32, "device": logits.device}
    chunk_max = torch.empty(per_chunk, **floats)
    found = Scan(
        torch.empty(per_tile, **floats),
        torch.empty(per_tile, **floats),
        torch.empty(per_tile, dtype=torch.int32, device=logits.device),
        chunk_max,
        chunk_max if draws is None else torch.empty(per_chunk, **floats),
    )
    if num_rows:
        _scan_kernel[(num_rows * num_tiles,)](
            logits, *filters, *(draws or (logits, logits, logits)), *found, *logits.stride(), vocab_size, num_tiles,
            NOISY=draws is not None, PART=PART, CHUNK=CHUNK, COLS=COLS, num_warps=4,
        )  # fmt: skip
    return found
