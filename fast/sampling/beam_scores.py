"""Beam search, one step, in Triton. What the technique is for: `reference/sampling/beam_scores.py`."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor as Array

from fast._checks import checking_values, require, require_same_device
from fast._triton.platform import next_power_of_2
from fast.sampling._keys import from_key
from fast.sampling._tops import load_tops, row_log_sum, tile_tops
from fast.sampling._values import require_boundaries, require_each, require_logits, require_per_row

MAX_CANDIDATES = 256  # they are taken out one by one
TILE_BEAMS = 16  # beams of a group that are merged at once


@triton.jit
def _row_totals_kernel(
    scores_ptr,  # [num_rows]
    tile_max_ptr,  # [num_rows, num_tiles]
    tile_mass_ptr,  # [num_rows, num_tiles]
    tile_top_keys_ptr,  # [num_rows, num_tiles, num_candidates]
    tile_top_ids_ptr,  # [num_rows, num_tiles, num_candidates]
    totals_ptr,  # [num_rows, num_candidates]
    tokens_ptr,  # [num_rows, num_candidates]
    num_tiles,
    num_candidates,
    TILES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top, log_sum = row_log_sum(tile_max_ptr, tile_mass_ptr, row, num_tiles, TILES)
    key, token = load_tops(tile_top_keys_ptr, tile_top_ids_ptr, row, num_tiles, num_candidates, ENTRIES)
    exists = key > -2147483648
    log_prob = (from_key(tl.where(exists, key, 0), 0) - top) - log_sum
    total = tl.where(exists, tl.load(scores_ptr + row) + log_prob, float("-inf"))
    for j in range(num_candidates):
        best = tl.max(total, axis=0)
        chosen = tl.min(tl.where(total == best, token, 2147483647), axis=0)
        tl.store(totals_ptr + row * num_candidates + j, best)
        tl.store(tokens_ptr + row * num_candidates + j, chosen)
        total = tl.where(token == chosen, float("-inf"), total)


@triton.jit
def _merge_beams_kernel(
    totals_ptr,  # [num_rows, num_candidates]
    tokens_ptr,  # [num_rows, num_candidates]
    cu_beams_ptr,  # [num_groups + 1]
    best_ptr,  # [num_groups, num_candidates]
    rows_ptr,  # [num_groups, num_candidates]
    best_tokens_ptr,  # [num_groups, num_candidates]
    vocab_size,
    num_rows,
    num_candidates,
    TILE_BEAMS: tl.constexpr,
    TILE_CANDIDATES: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(cu_beams_ptr + group), 0)
    end = tl.minimum(tl.load(cu_beams_ptr + group + 1), num_rows)
    beam, place = tl.arange(0, TILE_BEAMS), tl.arange(0, TILE_CANDIDATES)
    best = tl.full([TILE_CANDIDATES], float("-inf"), tl.float32)
    pair = tl.full([TILE_CANDIDATES], 9223372036854775807, tl.int64)  # row * vocab_size + token: in order of preference
    for first in range(start, end, TILE_BEAMS):
        inside = (first + beam < end)[:, None] & (place < num_candidates)[None, :]
        entry = (first + beam).to(tl.int64)[:, None] * num_candidates + place[None, :]
        new = tl.load(totals_ptr + entry, mask=inside, other=float("-inf"))
        token = tl.load(tokens_ptr + entry, mask=inside)
        new_pair = (first + beam - start).to(tl.int64)[:, None] * vocab_size + token
        new_pair = tl.where(new > float("-inf"), new_pair, 9223372036854775807)
        old, old_pair = best, pair
        for j in range(num_candidates):
            top = tl.maximum(tl.max(tl.max(new, axis=1), axis=0), tl.max(old, axis=0))
            among_new = tl.where(new == top, new_pair, 9223372036854775807)
            among_old = tl.where(old == top, old_pair, 9223372036854775807)
            chosen = tl.minimum(tl.min(tl.min(among_new, axis=1), axis=0), tl.min(among_old, axis=0))
            best, pair = tl.where(place == j, top, best), tl.where(place == j, chosen, pair)
            new = tl.where(new_pair == chosen, float("-inf"), new)
            old = tl.where(old_pair == chosen, float("-inf"), old)
    exists, inside = best > float("-inf"), place < num_candidates
    where = group * num_candidates + place
    tl.store(best_ptr + where, best, mask=inside)
    tl.store(rows_ptr + where, tl.where(exists, pair // vocab_size, -1).to(tl.int32), mask=inside)
    tl.store(best_tokens_ptr + where, tl.where(exists, pair % vocab_size, -1), mask=inside)


def beam_scores(
    logits: Float[Array, "num_rows vocab_size"],
    scores: Float32[Array, " num_rows"],
    cu_beams: Int32[Array, " num_groups_plus_1"],
    *,
    num_candidates: int,
) -> tuple[
    Float[Array, "num_groups num_candidates"], Int32[Array, "num_groups num_candidates"],
    Int64[Array, "num_groups num_candidates"],
]:  # fmt: skip
    """Same contract as `reference.sampling.beam_scores.beam_scores`.

    Grid: one program a tile of a row, for its best; one a row, for its best totals; one a group, which merges them.
    Moves: the logits once. Limits: ``num_candidates`` to ``MAX_CANDIDATES``.
    """
    op = "beam_scores"
    require_logits(op, logits)
    num_rows, vocab_size = logits.shape
    require_per_row(op, num_rows, torch.float32, scores=scores)
    require_boundaries(op, "cu_beams", cu_beams, num_rows)
    require(num_candidates >= 1, op, "num_candidates", "at least 1", num_candidates)
    require_same_device(op, logits=logits, scores=scores, cu_beams=cu_beams)
    if num_candidates > MAX_CANDIDATES:
        raise NotImplementedError(f"beam_scores: at most {MAX_CANDIDATES} candidates, got {num_candidates}")
    if checking_values():
        require_each(op, "scores", scores < torch.inf, "finite or -inf", scores)

    tile_max, tile_mass, _, keys, ids = tile_tops(logits, None, num_candidates)
    num_tiles, num_groups, device = tile_max.shape[1], len(cu_beams) - 1, logits.device
    totals = torch.empty(num_rows, num_candidates, device=device)
    tokens = torch.empty(num_rows, num_candidates, dtype=torch.int32, device=device)
    shape = (num_groups, num_candidates)
    best, rows = torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device)
    best_tokens = torch.empty(shape, dtype=torch.int64, device=device)
    if num_rows:
        _row_totals_kernel[(num_rows,)](
            scores.contiguous(), tile_max, tile_mass, keys, ids, totals, tokens, num_tiles, num_candidates,
            TILES=next_power_of_2(num_tiles), ENTRIES=next_power_of_2(num_tiles * num_candidates),
        )  # fmt: skip
    if num_groups:
        _merge_beams_kernel[(num_groups,)](
            totals, tokens, cu_beams.contiguous(), best, rows, best_tokens, vocab_size, num_rows, num_candidates,
            TILE_BEAMS=TILE_BEAMS, TILE_CANDIDATES=next_power_of_2(num_candidates),
        )  # fmt: skip
    return best, rows, best_tokens
