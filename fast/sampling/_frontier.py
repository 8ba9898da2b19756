"""The frontier of a row: the few tokens of which one is drawn, whatever the threshold is.

Where top-p or min-p keeps more than the head holds, nobody has to know the threshold. A token wins iff it has the best
perturbed logit of those kept. Of the tokens by falling perturbed logit only those can be it that have a greater logit
than all before them: these are the frontier, and the first of them that is kept wins. min-p is known of each at once;
for top-p one more pass over the row weighs what lies above each of them.
"""

import triton
import triton.language as tl

from fast._triton.platform import INTERPRETING
from fast.numerics.philox import PURPOSE_DRAW, gumbel_at
from fast.sampling._keys import from_key, highest_key, kth_of, lowest_key, min_p_key
from fast.sampling._scan import load_part
from fast.sampling._threshold import chunk_tokens, list_chunks, row_top

NOISY_HEAD = 8 if INTERPRETING else 96  # chunks of the frontier: it holds the winner but for (1 - top_p) ** 96
NUM_PIVOTS = 8  # tokens on the frontier (of n in random order about log n are, so 5); `weigh_kernel` spells them out
PLAN_WIDTH = 32  # int32 words a row: see `_choose_kernel` in `_draw`

DONE, WEIGH, SEARCH = (tl.constexpr(state) for state in range(3))  # what is left to do for a row


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
        x = tl.load(logits_row_ptr + token.to(tl.int64) * stride_vocab, mask=inside).to(tl.float32)
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
    x = tl.load(values_ptr + i, mask=inside)
    token = tl.load(tokens_ptr + i, mask=inside)
    noisy = tl.load(noisy_ptr + i, mask=inside)

    num_above = tl.zeros([MAX_PAIRS], tl.int32)  # better in both; a later one of two equal pairs is not on it either
    for start in range(0, num_candidates, TILE_PAIRS):
        j = start + tl.arange(0, TILE_PAIRS)
        other_x = tl.load(values_ptr + j, mask=j < num_candidates)[None, :]
        other_token = tl.load(tokens_ptr + j, mask=j < num_candidates)[None, :]
        other = tl.load(noisy_ptr + j, mask=j < num_candidates, other=float("-inf"))[None, :]
        first = (other > noisy[:, None]) | ((other == noisy[:, None]) & (other_token < token[:, None]))
        num_above += tl.sum((first & (other_x >= x[:, None])).to(tl.int32), axis=1)
    on_frontier = inside & (x >= least) & (num_above == 0)
    tl.store(on_frontier_ptr + i, on_frontier.to(tl.int32))
    tl.debug_barrier()

    rank = tl.zeros([MAX_PAIRS], tl.int32)  # those before it have a smaller logit
    for start in range(0, num_candidates, TILE_PAIRS):
        j = start + tl.arange(0, TILE_PAIRS)
        other_x = tl.load(values_ptr + j, mask=j < num_candidates)[None, :]
        other = tl.load(on_frontier_ptr + j, mask=j < num_candidates, other=0)[None, :]
        rank += tl.sum(((other > 0) & (other_x < x[:, None])).to(tl.int32), axis=1)
    writes = on_frontier & (rank < NUM_PIVOTS)
    tl.store(plan_row_ptr + 1 + rank, token, mask=writes)
    tl.store(pivots_row_ptr + rank, x, mask=writes)
    is_top = tl.max((on_frontier & (rank == 0) & (x == top)).to(tl.int32), axis=0) > 0
    return tl.sum(on_frontier.to(tl.int32), axis=0), is_top


@triton.jit
def plan_frontier(
    logits_row_ptr, stride_vocab, vocab_size, tile_max_ptr, chunk_noisy_ptr, row, num_tiles, num_chunks,
    listed_row_ptr, candidates_row_ptr, values_row_ptr, plan_ptr, pivots_ptr,
    top, inverse_temperature, min_p, seed, position, sample_index,
    SHIFT: tl.constexpr, CHUNKS: tl.constexpr, NOISY_HEAD: tl.constexpr, NUM_PIVOTS: tl.constexpr,
    PLAN_WIDTH: tl.constexpr, MAX_CHUNKS: tl.constexpr, MAX_PAIRS: tl.constexpr, TILE_PAIRS: tl.constexpr,
    TILE_GATHER: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write down a row's frontier. Whether it may lack the winner, and whether its first is the best token itself."""
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
        logits_row_ptr, stride_vocab, vocab_size, listed_row_ptr, tl.minimum(num_listed, MAX_CHUNKS),
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
    return (num_listed > MAX_CHUNKS) | (num_candidates > MAX_PAIRS) | (num_pivots == 0), is_top


@triton.jit
def weigh_kernel(
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
