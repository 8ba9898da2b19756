"""From the scan to thresholds and tokens: what is kept, and which of it has the best perturbed logit.

A row's *candidates* are the tokens of its best chunks that reach the bound by which the chunks were chosen: all tokens
of the row that reach it. Three ways lead from there, chosen in the kernel by what the row asks and what it holds:

- the *head*: if all that can be kept is among the candidates by logit, the threshold is found among these few;
- the *frontier*, for top-p and min-p when it is not: a token wins iff it has the best perturbed logit of those kept,
  so with the candidates by perturbed logit at hand nobody has to know the threshold, only whether each of very few
  tokens (each with a greater logit than all better ones) is kept. One more pass weighs what lies above each of them;
- *all* of the row, over and over, if neither is enough: nothing is assumed of the logits, only hoped.
"""

import triton
import triton.language as tl

from fast._triton.platform import INTERPRETING
from fast.numerics.philox import PURPOSE_DRAW, gumbel_at, quick_gumbel, words_of_tile
from fast.sampling._keys import (
    from_key,
    highest_key,
    kth_key,
    kth_of,
    lowest_key,
    mass_from,
    min_p_key,
    nucleus_key,
    sort_key,
)
from fast.sampling._scan import first_best, load_filters, load_part, load_tile

HEAD = 4 if INTERPRETING else 128  # chunks of the head where top-k does not say how many
NOISY_HEAD = 8 if INTERPRETING else 96  # chunks of the frontier: it holds the winner but for (1 - top_p) ** 96
MAX_CHUNKS = 40 if INTERPRETING else 1024  # of the head; with more, all of the row is read
MAX_CANDIDATES = 64 if INTERPRETING else 2048
MAX_PAIRS = 16 if INTERPRETING else 256  # candidates compared each with each, at once; more are bisected
NUM_PIVOTS = 8  # tokens on the frontier (of n in random order about log n are, so 5); `_weigh_kernel` spells them out
TILE_PAIRS = 16 if INTERPRETING else 32
TILE_GATHER = 8 if INTERPRETING else 64  # chunks gathered at once
TILE_CANDIDATES = 32 if INTERPRETING else 512
TILE_ALL = 256 if INTERPRETING else 4096  # tokens at once where all of a row is read
PLAN_WIDTH = 32  # int32 words a row: see `_choose_kernel`

DONE, WEIGH, SEARCH = (tl.constexpr(state) for state in range(3))

SIZES = {
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
    masses = tl.load(tile_mass_ptr + row * num_tiles + tile, mask=inside, other=0.0)
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
    x = tl.load(values_ptr + i, mask=inside, other=float("-inf"))
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
            other_mass = tl.load(values_ptr + MAX_PAIRS + j, mask=j < num_candidates, other=0.0)
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


# ---- filter_logits ----------------------------------------------------------------------------------------------


@triton.jit
def _threshold_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    temperature_ptr,  # [num_rows], as are the next three
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    tile_max_ptr,  # [num_rows, num_tiles]
    tile_mass_ptr,  # [num_rows, num_tiles]
    tile_best_ptr,  # [num_rows, num_tiles]
    chunk_max_ptr,  # [num_rows, num_tiles * COLS]
    listed_ptr,  # [num_rows, MAX_CHUNKS]
    candidates_ptr,  # [num_rows, MAX_CANDIDATES]
    values_ptr,  # [num_rows, MAX_CANDIDATES]
    threshold_ptr,  # [num_rows], the least key kept; the token of a greedy row
    stride_logits_row,
    stride_logits_vocab,
    vocab_size,
    num_tiles,
    TILES: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEAD: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    MAX_PAIRS: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILE_GATHER: tl.constexpr,
    TILE_CANDIDATES: tl.constexpr,
    TILE_ALL: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inverse_temperature, top_k, top_p, min_p, greedy = load_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab_size
    )
    top, first_tile = row_top(tile_max_ptr, row, num_tiles, TILES)
    if greedy:
        tl.store(threshold_ptr + row, tl.load(tile_best_ptr + row * num_tiles + first_tile))
    elif (top_k == 0) & (top_p >= 1) & (min_p <= 0):
        tl.store(threshold_ptr + row, lowest_key(SHIFT))
    else:
        row_total = 0.0
        if (top_k == 0) & (top_p < 1):
            row_total = row_mass(tile_max_ptr, tile_mass_ptr, row, num_tiles, top, inverse_temperature, TILES)
        logits_row_ptr = logits_ptr + row * stride_logits_row
        holds, key, _ = head_threshold(
            logits_row_ptr, stride_logits_vocab, vocab_size, chunk_max_ptr + row * num_tiles * COLS, num_tiles * COLS,
            listed_ptr + row * MAX_CHUNKS, candidates_ptr + row * MAX_CANDIDATES, values_ptr + row * MAX_CANDIDATES,
            top, inverse_temperature, top_k, top_p, min_p, row_total,
            SHIFT, CHUNKS, HEAD, MAX_CHUNKS, MAX_CANDIDATES, MAX_PAIRS, TILE_PAIRS, TILE_GATHER, TILE_CANDIDATES,
            CHUNK, COLS,
        )  # fmt: skip
        if holds == 0:
            key = full_threshold(
                logits_row_ptr, stride_logits_vocab, vocab_size, top, inverse_temperature, top_k, top_p, min_p,
                SHIFT, TILE_ALL,
            )  # fmt: skip
        tl.store(threshold_ptr + row, key)


@triton.jit
def _apply_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    temperature_ptr,  # [num_rows]
    tile_max_ptr,  # [num_rows, num_tiles]
    threshold_ptr,  # [num_rows]
    out_ptr,  # [num_rows, vocab_size]
    stride_logits_row,
    stride_logits_vocab,
    stride_out_row,
    stride_out_vocab,
    vocab_size,
    num_tiles,
    TILES: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // num_tiles
    tile = (tl.program_id(0) % num_tiles).to(tl.int32)
    temperature = tl.load(temperature_ptr + row)
    threshold = tl.load(threshold_ptr + row)
    top, _ = row_top(tile_max_ptr, row, num_tiles, TILES)
    x, token = load_tile(logits_ptr + row * stride_logits_row, stride_logits_vocab, tile, vocab_size, CHUNK, COLS)
    if temperature <= 0:
        filtered = tl.where(token == threshold, 0.0, float("-inf"))
    else:
        inverse = tl.minimum(tl.div_rn(1.0, temperature), 3e38)
        filtered = tl.where(sort_key(x, SHIFT) >= threshold, (x - top) * inverse, float("-inf"))
    pointers = out_ptr + row * stride_out_row + token.to(tl.int64) * stride_out_vocab
    tl.store(pointers, filtered, mask=token < vocab_size)


# ---- sample -----------------------------------------------------------------------------------------------------


@triton.jit
def best_candidate(
    tokens_ptr, values_ptr, num_candidates, bound, top, inverse_temperature, seed, position, sample_index,
    SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The candidate with the best perturbed logit of those that reach ``bound``."""
    best = tl.full([TILE], float("-inf"), tl.float32)
    winner = tl.full([TILE], 2147483647, tl.int32)
    for start in range(0, num_candidates, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(values_ptr + i, mask=i < num_candidates, other=float("-inf"))
        token = tl.load(tokens_ptr + i, mask=i < num_candidates, other=0)
        noise = gumbel_at(seed, position, sample_index, token, PURPOSE_DRAW)
        noisy = tl.where(sort_key(x, SHIFT) >= bound, (x - top) * inverse_temperature + noise, float("-inf"))
        wins = (noisy > best) | ((noisy == best) & (token < winner))
        best, winner = tl.where(wins, noisy, best), tl.where(wins, token, winner)
    return tl.min(tl.where(best == tl.max(best, axis=0), winner, 2147483647), axis=0)


@triton.jit
def best_of_all(
    logits_row_ptr, stride_vocab, vocab_size, bound, top, inverse_temperature, seed, position, sample_index,
    SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The same over all of the row."""
    best = tl.full([1, TILE], float("-inf"), tl.float32)
    winner = tl.full([1, TILE], 2147483647, tl.int32)
    for tile in range(0, tl.cdiv(vocab_size, TILE)):
        x, token = load_tile(logits_row_ptr, stride_vocab, tile, vocab_size, 1, TILE)
        words = words_of_tile(seed, position, sample_index, tile * (TILE // 4), PURPOSE_DRAW, 1, TILE)
        noisy = (x - top) * inverse_temperature + quick_gumbel(words)
        wins = (sort_key(x, SHIFT) >= bound) & (noisy > best)
        best, winner = tl.where(wins, noisy, best), tl.where(wins, token, winner)
    _, token = first_best(best, winner)
    return token


@triton.jit
def best_of_tiles(
    logits_row_ptr, stride_vocab, vocab_size, tile_best_ptr, row, num_tiles, top, inverse_temperature,
    seed, position, sample_index, TILES: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The best perturbed logit of the tiles' best chunks, relative to one maximum now."""
    tile, place = tl.arange(0, TILES), tl.arange(0, CHUNK)
    col = tl.load(tile_best_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=0)
    token = (tile * (CHUNK * COLS) + col)[:, None] + place[None, :] * COLS
    inside = (tile < num_tiles)[:, None] & (token < vocab_size)
    x = tl.load(logits_row_ptr + token.to(tl.int64) * stride_vocab, mask=inside, other=float("-inf")).to(tl.float32)
    noisy = (x - top) * inverse_temperature + gumbel_at(seed, position, sample_index, token, PURPOSE_DRAW)
    _, token = first_best(noisy, token)
    return token


@triton.jit
def gather_noisiest(
    logits_row_ptr, stride_vocab, vocab_size, listed_ptr, num_listed, bound, top, inverse_temperature,
    seed, position, sample_index, tokens_ptr, values_ptr, noisy_ptr,
    MAX: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of the listed chunks, the tokens whose perturbed logit is at least ``bound``, with both logits; how many."""
    total = 0
    for start in range(0, num_listed, TILE):
        token = chunk_tokens(listed_ptr, start, num_listed, TILE, CHUNK, COLS)
        inside = (token >= 0) & (token < vocab_size)
        x = tl.load(logits_row_ptr + token.to(tl.int64) * stride_vocab, mask=inside, other=float("-inf")).to(tl.float32)
        noisy = (x - top) * inverse_temperature + gumbel_at(seed, position, sample_index, token, PURPOSE_DRAW)
        reaches = (inside & (noisy >= bound)).to(tl.int32)
        place = total + tl.cumsum(reaches, axis=0) - 1
        writes = (reaches > 0) & (place < MAX)
        tl.store(tokens_ptr + place, token, mask=writes)
        tl.store(values_ptr + place, x, mask=writes)
        tl.store(noisy_ptr + place, noisy, mask=writes)
        total += tl.sum(reaches)
    return total


@triton.jit
def find_frontier(
    tokens_ptr, values_ptr, noisy_ptr, on_frontier_ptr, num_candidates, least, top, plan_row_ptr, pivots_row_ptr,
    NUM_PIVOTS: tl.constexpr, MAX_PAIRS: tl.constexpr, TILE_PAIRS: tl.constexpr,
):  # fmt: skip
    """Candidates by falling perturbed logit, each with a greater logit than those before: their tokens to the plan,
    their logits to the pivots. How many there are, and whether the first is the best token itself."""
    place = tl.arange(0, NUM_PIVOTS)
    tl.store(plan_row_ptr + 1 + place, tl.full([NUM_PIVOTS], 2147483647, tl.int32))
    tl.store(pivots_row_ptr + place, tl.full([NUM_PIVOTS], float("inf"), tl.float32))
    i = tl.arange(0, MAX_PAIRS)
    inside = i < num_candidates
    x = tl.load(values_ptr + i, mask=inside, other=float("-inf"))
    token = tl.load(tokens_ptr + i, mask=inside, other=0)
    noisy = tl.load(noisy_ptr + i, mask=inside, other=float("-inf"))

    num_above = tl.zeros([MAX_PAIRS], tl.int32)  # better in both; a later one of two equal pairs is not on it either
    for start in range(0, num_candidates, TILE_PAIRS):
        j = start + tl.arange(0, TILE_PAIRS)
        other_x = tl.load(values_ptr + j, mask=j < num_candidates, other=float("-inf"))[None, :]
        other_token = tl.load(tokens_ptr + j, mask=j < num_candidates, other=0)[None, :]
        other = tl.load(noisy_ptr + j, mask=j < num_candidates, other=float("-inf"))[None, :]
        first = (other > noisy[:, None]) | ((other == noisy[:, None]) & (other_token < token[:, None]))
        num_above += tl.sum((first & (other_x >= x[:, None]) & (other_x >= least)).to(tl.int32), axis=1)
    on_frontier = inside & (x >= least) & (num_above == 0)
    tl.store(on_frontier_ptr + i, on_frontier.to(tl.int32))
    tl.debug_barrier()

    rank = tl.zeros([MAX_PAIRS], tl.int32)  # those before it have a smaller logit
    for start in range(0, num_candidates, TILE_PAIRS):
        j = start + tl.arange(0, TILE_PAIRS)
        other_x = tl.load(values_ptr + j, mask=j < num_candidates, other=float("-inf"))[None, :]
        other = tl.load(on_frontier_ptr + j, mask=j < num_candidates, other=0)[None, :]
        rank += tl.sum(((other > 0) & (other_x < x[:, None])).to(tl.int32), axis=1)
    writes = on_frontier & (rank < NUM_PIVOTS)
    tl.store(plan_row_ptr + 1 + rank, token, mask=writes)
    tl.store(pivots_row_ptr + rank, x, mask=writes)
    is_top = tl.max((on_frontier & (rank == 0) & (x == top)).to(tl.int32), axis=0) > 0
    return tl.sum(on_frontier.to(tl.int32), axis=0), is_top


@triton.jit
def _choose_kernel(
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
    listed_ptr,  # [num_rows, MAX_CHUNKS]
    candidates_ptr,  # [num_rows, MAX_CANDIDATES]
    values_ptr,  # [num_rows, MAX_CANDIDATES]
    plan_ptr,  # [num_rows, PLAN_WIDTH]: what is left to do, then the tokens of the frontier
    pivots_ptr,  # [num_rows, 2 * NUM_PIVOTS]: their logits, then the least that passes min-p
    tokens_ptr,  # [num_rows]
    stride_logits_row,
    stride_logits_vocab,
    vocab_size,
    num_tiles,
    TILES: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEAD: tl.constexpr,
    NOISY_HEAD: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    PLAN_WIDTH: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    MAX_PAIRS: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILE_GATHER: tl.constexpr,
    TILE_CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inverse_temperature, top_k, top_p, min_p, greedy = load_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab_size
    )
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    sample_index = tl.load(sample_indices_ptr + row)
    top, first_tile = row_top(tile_max_ptr, row, num_tiles, TILES)
    logits_row_ptr = logits_ptr + row * stride_logits_row
    state = 0  # DONE
    if greedy:
        tl.store(tokens_ptr + row, tl.load(tile_best_ptr + row * num_tiles + first_tile).to(tl.int64))
    elif (top_k == 0) & (top_p >= 1) & (min_p <= 0):
        token = best_of_tiles(
            logits_row_ptr, stride_logits_vocab, vocab_size, tile_best_ptr, row, num_tiles, top, inverse_temperature,
            seed, position, sample_index, TILES, CHUNK, COLS,
        )  # fmt: skip
        tl.store(tokens_ptr + row, token.to(tl.int64))
    else:
        num_chunks = num_tiles * COLS
        listed_row_ptr = listed_ptr + row * MAX_CHUNKS
        candidates_row_ptr, values_row_ptr = candidates_ptr + row * MAX_CANDIDATES, values_ptr + row * MAX_CANDIDATES
        row_total = 0.0
        if (top_k == 0) & (top_p < 1):
            row_total = row_mass(tile_max_ptr, tile_mass_ptr, row, num_tiles, top, inverse_temperature, TILES)
        holds, key, num_candidates = head_threshold(
            logits_row_ptr, stride_logits_vocab, vocab_size, chunk_max_ptr + row * num_chunks, num_chunks,
            listed_row_ptr, candidates_row_ptr, values_row_ptr,
            top, inverse_temperature, top_k, top_p, min_p, row_total,
            SHIFT, CHUNKS, HEAD, MAX_CHUNKS, MAX_CANDIDATES, MAX_PAIRS, TILE_PAIRS, TILE_GATHER, TILE_CANDIDATES,
            CHUNK, COLS,
        )  # fmt: skip
        if holds:
            token = best_candidate(
                candidates_row_ptr, values_row_ptr, num_candidates, key, top, inverse_temperature,
                seed, position, sample_index, SHIFT, TILE_CANDIDATES,
            )  # fmt: skip
            tl.store(tokens_ptr + row, token.to(tl.int64))
        elif top_k > 0:
            state = 2  # SEARCH
        else:
            chunk = tl.arange(0, CHUNKS)
            exists = chunk < num_chunks
            tile_top = tl.load(tile_max_ptr + row * num_tiles + chunk // COLS, mask=exists, other=float("-inf"))
            shift = tl.where(tile_top > float("-inf"), (tile_top - top) * inverse_temperature, 0.0)
            noisy = tl.load(chunk_noisy_ptr + row * num_chunks + chunk, mask=exists, other=float("-inf")) + shift
            bound = from_key(kth_of(noisy, NOISY_HEAD, NOISY_HEAD // 2, lowest_key(0), highest_key(), 0), 0)
            num_listed = list_chunks(noisy, bound, listed_row_ptr, MAX_CHUNKS, CHUNKS)
            tl.debug_barrier()
            noisy_row_ptr, flags_row_ptr = values_row_ptr + MAX_PAIRS, candidates_row_ptr + MAX_PAIRS
            num_candidates = gather_noisiest(
                logits_row_ptr, stride_logits_vocab, vocab_size, listed_row_ptr, tl.minimum(num_listed, MAX_CHUNKS),
                bound + 1e-3,  # what is below by no more than rounding may be missing: better without it
                top, inverse_temperature, seed, position, sample_index,
                candidates_row_ptr, values_row_ptr, noisy_row_ptr, MAX_PAIRS, TILE_GATHER, CHUNK, COLS,
            )  # fmt: skip
            tl.debug_barrier()
            least = from_key(min_p_key(min_p, top, inverse_temperature, SHIFT), SHIFT)
            tl.store(pivots_ptr + row * (2 * NUM_PIVOTS) + NUM_PIVOTS, least)
            num_pivots, is_top = find_frontier(
                candidates_row_ptr, values_row_ptr, noisy_row_ptr, flags_row_ptr,
                tl.minimum(num_candidates, MAX_PAIRS), least, top,
                plan_ptr + row * PLAN_WIDTH, pivots_ptr + row * (2 * NUM_PIVOTS), NUM_PIVOTS, MAX_PAIRS, TILE_PAIRS,
            )  # fmt: skip
            tl.debug_barrier()
            incomplete = (num_listed > MAX_CHUNKS) | (num_candidates > MAX_PAIRS) | (num_pivots == 0)
            if incomplete:
                state = 2  # SEARCH
            elif is_top | (top_p >= 1):
                tl.store(tokens_ptr + row, tl.load(plan_ptr + row * PLAN_WIDTH + 1).to(tl.int64))
            else:
                state = 1  # WEIGH
    tl.store(plan_ptr + row * PLAN_WIDTH, state)


@triton.jit
def _weigh_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    temperature_ptr,  # [num_rows]
    tile_max_ptr,  # [num_rows, num_tiles]
    plan_ptr,  # [num_rows, PLAN_WIDTH]
    pivots_ptr,  # [num_rows, 2 * NUM_PIVOTS]
    above_ptr,  # [num_rows, num_tiles, 2 * NUM_PIVOTS]: the mass above each pivot, then what passes min-p
    stride_logits_row,
    stride_logits_vocab,
    vocab_size,
    num_tiles,
    TILES: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    PLAN_WIDTH: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // num_tiles
    tile = (tl.program_id(0) % num_tiles).to(tl.int32)
    if tl.load(plan_ptr + row * PLAN_WIDTH) == WEIGH:
        inverse = tl.minimum(tl.div_rn(1.0, tl.load(temperature_ptr + row)), 3e38)
        top, _ = row_top(tile_max_ptr, row, num_tiles, TILES)
        pivots_ptr += row * (2 * NUM_PIVOTS)
        above_ptr += (row * num_tiles + tile) * (2 * NUM_PIVOTS)
        p0, p1, p2, p3 = _four(pivots_ptr)
        p4, p5, p6, p7 = _four(pivots_ptr + 4)
        least = tl.load(pivots_ptr + NUM_PIVOTS)
        zero = tl.zeros([COLS], tl.float32)
        a0, a1, a2, a3, a4, a5, a6, a7, base = zero, zero, zero, zero, zero, zero, zero, zero, zero
        for part in range(CHUNK // PART):
            first_token = tile * (CHUNK * COLS) + part * (PART * COLS)
            x = load_part(
                logits_ptr + row * stride_logits_row, stride_logits_vocab, first_token, vocab_size, PART, COLS
            )
            mass = tl.exp((x - top) * inverse)
            a0 += tl.sum(tl.where(x > p0, mass, 0.0), axis=0)
            a1 += tl.sum(tl.where(x > p1, mass, 0.0), axis=0)
            a2 += tl.sum(tl.where(x > p2, mass, 0.0), axis=0)
            a3 += tl.sum(tl.where(x > p3, mass, 0.0), axis=0)
            a4 += tl.sum(tl.where(x > p4, mass, 0.0), axis=0)
            a5 += tl.sum(tl.where(x > p5, mass, 0.0), axis=0)
            a6 += tl.sum(tl.where(x > p6, mass, 0.0), axis=0)
            a7 += tl.sum(tl.where(x > p7, mass, 0.0), axis=0)
            base += tl.sum(tl.where(x >= least, mass, 0.0), axis=0)
        _store_four(above_ptr, tl.sum(a0, axis=0), tl.sum(a1, axis=0), tl.sum(a2, axis=0), tl.sum(a3, axis=0))
        _store_four(above_ptr + 4, tl.sum(a4, axis=0), tl.sum(a5, axis=0), tl.sum(a6, axis=0), tl.sum(a7, axis=0))
        tl.store(above_ptr + NUM_PIVOTS, tl.sum(base, axis=0))


@triton.jit
def _four(ptr):
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def _store_four(ptr, x0, x1, x2, x3):
    tl.store(ptr, x0)
    tl.store(ptr + 1, x1)
    tl.store(ptr + 2, x2)
    tl.store(ptr + 3, x3)


@triton.jit
def _finish_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    temperature_ptr,  # [num_rows], as are the next six
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    sample_indices_ptr,
    tile_max_ptr,  # [num_rows, num_tiles]
    plan_ptr,  # [num_rows, PLAN_WIDTH]
    above_ptr,  # [num_rows, num_tiles, 2 * NUM_PIVOTS]
    tokens_ptr,  # [num_rows]
    stride_logits_row,
    stride_logits_vocab,
    vocab_size,
    num_tiles,
    TILES: tl.constexpr,
    SHIFT: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    PLAN_WIDTH: tl.constexpr,
    TILE_ALL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(plan_ptr + row * PLAN_WIDTH)
    if state != DONE:
        inverse_temperature, top_k, top_p, min_p, _greedy = load_filters(
            temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab_size
        )
        search = state == SEARCH
        if state == WEIGH:
            tile, j = tl.arange(0, TILES), tl.arange(0, 2 * NUM_PIVOTS)
            inside = (tile < num_tiles)[:, None] & (j <= NUM_PIVOTS)[None, :]
            where = (row * num_tiles + tile)[:, None] * (2 * NUM_PIVOTS) + j[None, :]
            above = tl.sum(tl.load(above_ptr + where, mask=inside, other=0.0), axis=0)
            base = tl.sum(tl.where(j == NUM_PIVOTS, above, 0.0), axis=0)
            pivot_token = tl.load(plan_ptr + row * PLAN_WIDTH + 1 + j, mask=j < NUM_PIVOTS, other=2147483647)
            kept = (above < top_p * base) & (pivot_token < 2147483647)
            first = tl.min(tl.where(kept, j, NUM_PIVOTS), axis=0)
            if first < NUM_PIVOTS:
                tl.store(tokens_ptr + row, tl.load(plan_ptr + row * PLAN_WIDTH + 1 + first).to(tl.int64))
            else:
                search = True
        if search:
            seed = tl.load(seeds_ptr + row)
            position = tl.load(positions_ptr + row)
            sample_index = tl.load(sample_indices_ptr + row)
            top, _tile = row_top(tile_max_ptr, row, num_tiles, TILES)
            logits_row_ptr = logits_ptr + row * stride_logits_row
            key = full_threshold(
                logits_row_ptr, stride_logits_vocab, vocab_size, top, inverse_temperature, top_k, top_p, min_p,
                SHIFT, TILE_ALL,
            )  # fmt: skip
            token = best_of_all(
                logits_row_ptr, stride_logits_vocab, vocab_size, key, top, inverse_temperature,
                seed, position, sample_index, SHIFT, TILE_ALL,
            )  # fmt: skip
            tl.store(tokens_ptr + row, token.to(tl.int64))
