"""The least logit that top-k, top-p and min-p keep of a row, as a key of `_keys`, from what the scan of the row left.

A row's *candidates* are the tokens of its best chunks that reach the bound by which the chunks were chosen: all tokens
of the row that reach it. They are its *head*: if all that can be kept is among them, the threshold is found among these
few (`head_threshold`). If not, all of the row is read, over and over (`full_threshold`): nothing is assumed of the
logits, only hoped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.platform import INTERPRETING
from fast.sampling._keys import from_key, kth_key, kth_of, lowest_key, mass_from, min_p_key, nucleus_key, sort_key

HEAD = 4 if INTERPRETING else 128  # chunks of the head where top-k does not say how many
MAX_CHUNKS = 40 if INTERPRETING else 1024  # of the head; with more, all of the row is read
MAX_CANDIDATES = 64 if INTERPRETING else 2048
MAX_PAIRS = 16 if INTERPRETING else 256  # candidates compared each with each, at once; more are bisected
TILE_PAIRS = 16 if INTERPRETING else 32
TILE_GATHER = 8 if INTERPRETING else 64  # chunks gathered at once
TILE_CANDIDATES = 32 if INTERPRETING else 512
TILE_ALL = 256 if INTERPRETING else 4096  # tokens at once where all of a row is read

SIZES = {
    "HEAD": HEAD,
    "MAX_CHUNKS": MAX_CHUNKS,
    "MAX_CANDIDATES": MAX_CANDIDATES,
    "MAX_PAIRS": MAX_PAIRS,
    "TILE_PAIRS": TILE_PAIRS,
    "TILE_GATHER": TILE_GATHER,
    "TILE_CANDIDATES": TILE_CANDIDATES,
}


def choose_warps(num_chunks: int) -> int:
    """Of the programs that hold a row's chunks in registers: 32 numbers a thread, or as few as can be."""
    return min(max(num_chunks // 1024, 4), 16)


def make_scratch(logits: Array) -> tuple[Array, Array, Array]:
    """Chunks listed, and the candidates' tokens and logits."""
    num_rows, ints = len(logits), {"dtype": torch.int32, "device": logits.device}
    return (
        torch.empty((num_rows, MAX_CHUNKS), **ints),
        torch.empty((num_rows, MAX_CANDIDATES), **ints),
        torch.empty((num_rows, MAX_CANDIDATES), device=logits.device),
    )


# ---- what the scan says of a row --------------------------------------------------------------------------------


@triton.jit
def row_top(tile_max_ptr, row, num_tiles, TILES: tl.constexpr):
    """The best logit of the row, and the first tile that has it."""
    tile = tl.arange(0, TILES)
    tops = tl.load(tile_max_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    top = tl.max(tops, axis=0)
    return top, tl.min(tl.where(tops == top, tile, TILES - 1), axis=0)


@triton.jit
def row_mass(tile_max_ptr, tile_mass_ptr, row, num_tiles, top, inverse_temperature, TILES: tl.constexpr):
    """The mass of all of the row, where ``top`` weighs 1."""
    tile = tl.arange(0, TILES)
    inside = tile < num_tiles
    tops = tl.load(tile_max_ptr + row * num_tiles + tile, mask=inside, other=float("-inf"))
    masses = tl.load(tile_mass_ptr + row * num_tiles + tile, mask=inside)
    return tl.sum(tl.where(tops > float("-inf"), masses * tl.exp((tops - top) * inverse_temperature), 0.0), axis=0)


@triton.jit
def list_chunks(x, bound, listed_ptr, MAX: tl.constexpr, CHUNKS: tl.constexpr):
    """Write down, in order, which chunks' values reach ``bound``; how many there are (only MAX are listed)."""
    reaches = (x >= bound).to(tl.int32)
    place = tl.cumsum(reaches, axis=0) - 1
    tl.store(listed_ptr + place, tl.arange(0, CHUNKS), mask=(reaches > 0) & (place < MAX))
    return tl.sum(reaches)


@triton.jit
def chunk_tokens(listed_ptr, start, num_listed, TILE: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr):
    """The tokens of some listed chunks, one after another; -1 after the last chunk."""
    i = start * CHUNK + tl.arange(0, TILE * CHUNK)
    chunk = tl.load(listed_ptr + i // CHUNK, mask=i // CHUNK < num_listed, other=-1)
    return tl.where(chunk >= 0, (chunk // COLS) * (CHUNK * COLS) + (i % CHUNK) * COLS + chunk % COLS, -1)


# ---- thresholds -------------------------------------------------------------------------------------------------


@triton.jit
def gather_best(
    logits_row_ptr, stride_vocab, vocab_size, listed_ptr, num_listed, bound, tokens_ptr, values_ptr,
    SHIFT: tl.constexpr, MAX: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of the listed chunks, the tokens whose logit reaches ``bound``, with it; how many (only MAX are written)."""
    total = 0
    for start in range(0, num_listed, TILE):
        token = chunk_tokens(listed_ptr, start, num_listed, TILE, CHUNK, COLS)
        inside = (token >= 0) & (token < vocab_size)
        x = tl.load(logits_row_ptr + token.to(tl.int64) * stride_vocab, mask=inside, other=float("-inf")).to(tl.float32)
        reaches = (sort_key(x, SHIFT) >= bound).to(tl.int32)
        place = total + tl.cumsum(reaches, axis=0) - 1
        writes = (reaches > 0) & (place < MAX)
        tl.store(tokens_ptr + place, token, mask=writes)
        tl.store(values_ptr + place, x, mask=writes)
        total += tl.sum(reaches)
    return total


@triton.jit
def pairs_threshold(
    values_ptr, num_candidates, top_k, top_p, least, target, top, inverse_temperature,
    SHIFT: tl.constexpr, MAX_PAIRS: tl.constexpr, TILE_PAIRS: tl.constexpr,
):  # fmt: skip
    """The least key kept of a few candidates, by the filters' own words: how many, and how much mass, is better.

    ``target`` is the mass to be reached, relative to ``top``, or 0: then it is ``top_p`` of what is left to top-p.
    Scratch for their masses lies after MAX_PAIRS values.
    """
    i = tl.arange(0, MAX_PAIRS)
    inside = i < num_candidates
    x = tl.load(values_ptr + i, mask=inside)
    num_better = tl.zeros([MAX_PAIRS], tl.int32)
    for start in range(0, num_candidates, TILE_PAIRS):
        j = start + tl.arange(0, TILE_PAIRS)
        other = tl.load(values_ptr + j, mask=j < num_candidates, other=float("-inf"))
        num_better += tl.sum((other[None, :] > x[:, None]).to(tl.int32), axis=1)
    key = sort_key(x, SHIFT)
    kept = inside & (key >= least) & ((top_k == 0) | (num_better < top_k))
    if top_p < 1:
        mass = tl.where(kept, tl.exp((x - top) * inverse_temperature), 0.0)
        tl.store(values_ptr + MAX_PAIRS + i, mass)
        tl.debug_barrier()
        target = tl.where(target > 0, target, top_p * tl.sum(mass, axis=0))
        better = tl.zeros([MAX_PAIRS], tl.float32)
        for start in range(0, num_candidates, TILE_PAIRS):
            j = start + tl.arange(0, TILE_PAIRS)
            other = tl.load(values_ptr + j, mask=j < num_candidates, other=float("-inf"))
            other_mass = tl.load(values_ptr + MAX_PAIRS + j, mask=j < num_candidates)
            better += tl.sum(tl.where(other[None, :] > x[:, None], other_mass[None, :], 0.0), axis=1)
        kept = kept & ((better < target) | (x == top))
    return tl.min(tl.where(kept, key, 2147483647), axis=0)


@triton.jit
def head_threshold(
    logits_row_ptr, stride_vocab, vocab_size, chunk_max_ptr, num_chunks, listed_ptr, tokens_ptr, values_ptr,
    top, inverse_temperature, top_k, top_p, min_p, row_total,
    SHIFT: tl.constexpr, CHUNKS: tl.constexpr, HEAD: tl.constexpr, MAX_CHUNKS: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr, MAX_PAIRS: tl.constexpr, TILE_PAIRS: tl.constexpr, TILE_GATHER: tl.constexpr,
    TILE_CANDIDATES: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Whether the head holds all that is kept; if so the least key that is; and how many candidates there are."""
    lowest, high = lowest_key(SHIFT), sort_key(top, SHIFT) + 1
    chunk = tl.arange(0, CHUNKS)
    chunk_max = tl.load(chunk_max_ptr + chunk, mask=chunk < num_chunks, other=float("-inf"))
    wanted = tl.where(top_k > 0, top_k, HEAD)
    bound = kth_of(chunk_max, wanted, wanted // 2 + 8, lowest, high, SHIFT)
    bound_value = from_key(bound, SHIFT)
    least = min_p_key(min_p, top, inverse_temperature, SHIFT)
    holds = (top_k > 0) | (least >= bound) | (bound == lowest)
    low, num_candidates = tl.maximum(least, bound), tl.full([], 0, tl.int32)

    # Most of the head's mass is in its chunks' maxima: if twice that is not enough, do not look closer.
    promising = holds | (top_p >= 1)
    if holds == 0:
        weights = tl.where(chunk_max >= bound_value, tl.exp((chunk_max - top) * inverse_temperature), 0.0)
        promising = promising | ((least == lowest) & (2 * tl.sum(weights, axis=0) >= top_p * row_total))
    if promising:
        num_listed = list_chunks(chunk_max, bound_value, listed_ptr, MAX_CHUNKS, CHUNKS)
        tl.debug_barrier()
        num_candidates = gather_best(
            logits_row_ptr, stride_vocab, vocab_size, listed_ptr, tl.minimum(num_listed, MAX_CHUNKS), bound,
            tokens_ptr, values_ptr, SHIFT, MAX_CANDIDATES, TILE_GATHER, CHUNK, COLS,
        )  # fmt: skip
        tl.debug_barrier()
        complete = (num_listed <= MAX_CHUNKS) & (num_candidates <= MAX_CANDIDATES)
        num_candidates = tl.minimum(num_candidates, MAX_CANDIDATES)
        target = 0.0
        if complete & (holds == 0) & (top_p < 1):
            mass = mass_from(values_ptr, 1, num_candidates, bound, top, inverse_temperature, SHIFT, TILE_CANDIDATES)
            target = top_p * row_total
            holds = (least == lowest) & (mass >= target)
        holds = holds & complete
        if holds:
            if num_candidates <= MAX_PAIRS:
                low = pairs_threshold(
                    values_ptr, num_candidates, top_k, top_p, low, target, top, inverse_temperature,
                    SHIFT, MAX_PAIRS, TILE_PAIRS,
                )  # fmt: skip
            else:
                if top_k > 0:
                    kth = kth_key(values_ptr, 1, num_candidates, top_k, 0, bound, high, SHIFT, TILE_CANDIDATES)
                    low = tl.maximum(low, kth)
                if top_p < 1:
                    mass = mass_from(
                        values_ptr, 1, num_candidates, low, top, inverse_temperature, SHIFT, TILE_CANDIDATES
                    )
                    target = tl.where(target > 0, target, top_p * mass)
                    low = nucleus_key(
                        values_ptr, 1, num_candidates, target, low, high, top, inverse_temperature,
                        SHIFT, TILE_CANDIDATES,
                    )  # fmt: skip
    return holds, low, num_candidates


@triton.jit
def full_threshold(
    logits_row_ptr, stride_vocab, vocab_size, top, inverse_temperature, top_k, top_p, min_p,
    SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The least key that is kept, from all of the row."""
    low, high = min_p_key(min_p, top, inverse_temperature, SHIFT), sort_key(top, SHIFT) + 1
    if top_k > 0:
        low = tl.maximum(low, kth_key(logits_row_ptr, stride_vocab, vocab_size, top_k, 0, low, high, SHIFT, TILE))
    if top_p < 1:
        mass = mass_from(logits_row_ptr, stride_vocab, vocab_size, low, top, inverse_temperature, SHIFT, TILE)
        low = nucleus_key(
            logits_row_ptr, stride_vocab, vocab_size, top_p * mass, low, high, top, inverse_temperature, SHIFT, TILE
        )
    return low
