"""The kernels of `sample`, after the scan: of the tokens that are kept, the one with the best perturbed logit.

Three ways lead there, chosen in the kernel by what the row asks and what it holds:

- the *head*: all that can be kept is among the candidates by logit (`_threshold`), so it is drawn from these few;
- the *frontier*, for top-p and min-p when it is not (`_frontier`): with the candidates by perturbed logit at hand one
  more pass says which of very few tokens won;
- *all* of the row, over and over, if neither is enough.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast.numerics.philox import PURPOSE_DRAW, gumbel_at, quick_gumbel, words_of_tile
from fast.sampling._frontier import (
    DONE,
    NOISY_HEAD,
    NUM_PIVOTS,
    PLAN_WIDTH,
    SEARCH,
    WEIGH,
    plan_frontier,
    weigh_kernel,
)
from fast.sampling._keys import IDLE_BITS, sort_key
from fast.sampling._scan import CHUNK, COLS, PART, first_best, load_filters, load_tile, scan
from fast.sampling._threshold import (
    SIZES,
    TILE_ALL,
    choose_warps,
    full_threshold,
    head_threshold,
    make_scratch,
    row_mass,
    row_top,
)


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
        token = tl.load(tokens_ptr + i, mask=i < num_candidates)
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
    col = tl.load(tile_best_ptr + row * num_tiles + tile, mask=tile < num_tiles)
    token = (tile * (CHUNK * COLS) + col)[:, None] + place[None, :] * COLS
    inside = (tile < num_tiles)[:, None] & (token < vocab_size)
    x = tl.load(logits_row_ptr + token.to(tl.int64) * stride_vocab, mask=inside, other=float("-inf")).to(tl.float32)
    noisy = (x - top) * inverse_temperature + gumbel_at(seed, position, sample_index, token, PURPOSE_DRAW)
    _, token = first_best(noisy, token)
    return token


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
            incomplete, is_top = plan_frontier(
                logits_row_ptr, stride_logits_vocab, vocab_size, tile_max_ptr, chunk_noisy_ptr, row, num_tiles,
                num_chunks, listed_row_ptr, candidates_row_ptr, values_row_ptr, plan_ptr, pivots_ptr,
                top, inverse_temperature, min_p, seed, position, sample_index, SHIFT, CHUNKS, NOISY_HEAD, NUM_PIVOTS,
                PLAN_WIDTH, MAX_CHUNKS, MAX_PAIRS, TILE_PAIRS, TILE_GATHER, CHUNK, COLS,
            )  # fmt: skip
            if incomplete:
                state = 2  # SEARCH
            elif is_top | (top_p >= 1):
                tl.store(tokens_ptr + row, tl.load(plan_ptr + row * PLAN_WIDTH + 1).to(tl.int64))
            else:
                state = 1  # WEIGH
    tl.store(plan_ptr + row * PLAN_WIDTH, state)


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
            pivot_token = tl.load(plan_ptr + row * PLAN_WIDTH + 1 + j)
            kept = (above < top_p * base) & (pivot_token < 2147483647)
            first = tl.min(tl.where(kept, j, NUM_PIVOTS), axis=0)  # so it does not matter what follows the pivots
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


def draw(logits: Array, filters: tuple[Array, ...], draws: tuple[Array, ...]) -> Array:
    """``filters``: temperature, top-k, top-p and min-p of each row; ``draws``: seed, position and sample index."""
    num_rows, vocab_size = logits.shape
    found = scan(logits, filters, draws)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    plan = torch.empty(num_rows, PLAN_WIDTH, dtype=torch.int32, device=logits.device)
    pivot_logits = torch.empty(num_rows, 2 * NUM_PIVOTS, device=logits.device)
    above = torch.empty(num_rows, found.num_tiles, 2 * NUM_PIVOTS, device=logits.device)
    sizes = (*logits.stride(), vocab_size, found.num_tiles)
    common = {"TILES": found.padded_tiles, "NUM_PIVOTS": NUM_PIVOTS, "PLAN_WIDTH": PLAN_WIDTH}
    shift, tile = {"SHIFT": IDLE_BITS[logits.dtype]}, {"CHUNK": CHUNK, "COLS": COLS}
    _choose_kernel[(num_rows,)](
        logits, *filters, *draws, *found, *make_scratch(logits), plan, pivot_logits, tokens, *sizes,
        **common, **shift, **tile, **SIZES, CHUNKS=found.padded_chunks, NOISY_HEAD=NOISY_HEAD,
        num_warps=choose_warps(found.padded_chunks),
    )  # fmt: skip
    weigh_kernel[(num_rows * found.num_tiles,)](
        logits, filters[0], found.tile_max, plan, pivot_logits, above, *sizes,
        **common, **tile, PART=PART, num_warps=4,
    )  # fmt: skip
    _finish_kernel[(num_rows,)](
        logits, *filters, *draws, found.tile_max, plan, above, tokens, *sizes,
        **common, **shift, TILE_ALL=TILE_ALL, num_warps=8,
    )  # fmt: skip
    return tokens
