"""Speculative verification, in Triton. What the technique is for: `reference/sampling/verify.py`."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Int64
from torch import Tensor as Array

from fast._checks import require_same_device, require_shape
from fast._triton.platform import cdiv, next_power_of_2
from fast.numerics.philox import (
    PURPOSE_ACCEPT,
    PURPOSE_DRAW,
    PURPOSE_RESAMPLE,
    quick_gumbel,
    random_words,
    to_uniform,
    words_of_tile,
)
from fast.sampling._scan import CHUNK, COLS, PART, first_best, load_part
from fast.sampling._values import (
    require_boundaries,
    require_distributions,
    require_draw,
    require_ids,
    require_per_row,
    rows_together,
)

TILE_DRAFTS = 16  # looked at at once


@triton.jit
def count_accepted(
    target_ptr, draft_ptr, draft_tokens_ptr, stride_target_row, stride_target_vocab, stride_draft_row,
    stride_draft_vocab, vocab_size, seq, start, num_drafts, seed, position, sample_index,
    CERTAIN: tl.constexpr, TILE_DRAFTS: tl.constexpr,
):  # fmt: skip
    """How many drafts of a sequence are accepted before the first that is not."""
    count = num_drafts
    for first in range(0, num_drafts, TILE_DRAFTS):
        i = first + tl.arange(0, TILE_DRAFTS)
        inside = i < num_drafts
        token = tl.load(draft_tokens_ptr + start + i, mask=inside)
        valid = inside & (token >= 0) & (token < vocab_size)
        row = (start + seq + i).to(tl.int64)
        pointers = target_ptr + row * stride_target_row + token * stride_target_vocab
        target = tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
        draft = tl.full([TILE_DRAFTS], 1.0, tl.float32)
        if not CERTAIN:
            pointers = draft_ptr + (start + i).to(tl.int64) * stride_draft_row + token * stride_draft_vocab
            draft = tl.load(pointers, mask=valid, other=1.0).to(tl.float32)
        word, _, _, _ = random_words(seed, position + i, sample_index, i - i, PURPOSE_ACCEPT)
        rejected = to_uniform(word) * draft >= target  # 0 of 0 is not accepted, something of 0 is
        count = tl.minimum(count, tl.min(tl.where(rejected, i, num_drafts), axis=0))
    return count


@triton.jit
def _verify_kernel(
    target_ptr,  # [num_drafts + num_seqs, vocab_size]
    draft_ptr,  # [num_drafts, vocab_size]
    draft_tokens_ptr,  # [num_drafts]
    cu_drafts_ptr,  # [num_seqs + 1]
    seeds_ptr,  # [num_seqs], as are the next three
    positions_ptr,
    sample_indices_ptr,
    accepted_ptr,
    best_ptr,  # [num_seqs, num_tiles, 2]: perturbed, of the target and of what it has more of than the draft
    best_tokens_ptr,  # [num_seqs, num_tiles, 2]
    stride_target_row,
    stride_target_vocab,
    stride_draft_row,
    stride_draft_vocab,
    total_drafts,
    vocab_size,
    num_tiles,
    CERTAIN: tl.constexpr,
    TILE_DRAFTS: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    here = tl.program_id(0).to(tl.int64)
    seq = (tl.program_id(0) // num_tiles).to(tl.int32)
    tile = (tl.program_id(0) % num_tiles).to(tl.int32)
    start = tl.minimum(tl.maximum(tl.load(cu_drafts_ptr + seq), 0), total_drafts)
    num_drafts = tl.minimum(tl.maximum(tl.load(cu_drafts_ptr + seq + 1), start), total_drafts) - start
    seed = tl.load(seeds_ptr + seq)
    position = tl.load(positions_ptr + seq)
    sample_index = tl.load(sample_indices_ptr + seq)
    count = count_accepted(
        target_ptr, draft_ptr, draft_tokens_ptr, stride_target_row, stride_target_vocab, stride_draft_row,
        stride_draft_vocab, vocab_size, seq, start, num_drafts, seed, position, sample_index, CERTAIN, TILE_DRAFTS,
    )  # fmt: skip
    if tile == 0:
        tl.store(accepted_ptr + seq, count)

    rejected = count < num_drafts
    purpose = tl.where(rejected, PURPOSE_RESAMPLE, PURPOSE_DRAW)
    drafted = tl.full([], -1, tl.int64)
    if rejected:
        drafted = tl.load(draft_tokens_ptr + start + count)
    target_row_ptr = target_ptr + (start + seq + count).to(tl.int64) * stride_target_row
    draft_row_ptr = draft_ptr + (start + count).to(tl.int64) * stride_draft_row
    rows, cols = tl.arange(0, PART), tl.arange(0, COLS)
    best = tl.full([PART, COLS], float("-inf"), tl.float32)
    best_missing = tl.full([PART, COLS], float("-inf"), tl.float32)
    winner = tl.full([PART, COLS], 2147483647, tl.int32)
    winner_missing = tl.full([PART, COLS], 2147483647, tl.int32)
    for part in range(CHUNK // PART):  # no more at once than the registers hold
        first_token = tile * (CHUNK * COLS) + part * (PART * COLS)
        token = first_token + rows[:, None] * COLS + cols[None, :]
        target = load_part(target_row_ptr, stride_target_vocab, first_token, vocab_size, PART, COLS)
        words = words_of_tile(seed, position + count, sample_index, first_token // 4, purpose, PART, COLS)
        noise = quick_gumbel(words)
        noisy = _log_or_nothing(target) + noise  # beyond the vocabulary the target is -inf
        wins = noisy > best
        best, winner = tl.where(wins, noisy, best), tl.where(wins, token, winner)
        if rejected:
            if CERTAIN:
                missing = tl.where(token == drafted, 0.0, target)
            else:
                draft = load_part(draft_row_ptr, stride_draft_vocab, first_token, vocab_size, PART, COLS)
                missing = tl.where(target > 0, target - draft, 0.0)
            noisy = _log_or_nothing(missing) + noise
            wins = noisy > best_missing
            best_missing = tl.where(wins, noisy, best_missing)
            winner_missing = tl.where(wins, token, winner_missing)
    noisy, chosen = first_best(best, winner)
    tl.store(best_ptr + here * 2, noisy)
    tl.store(best_tokens_ptr + here * 2, chosen)
    noisy, chosen = first_best(best_missing, winner_missing)
    tl.store(best_ptr + here * 2 + 1, noisy)
    tl.store(best_tokens_ptr + here * 2 + 1, chosen)


@triton.jit
def _log_or_nothing(weights):
    """Logarithms, -inf of what is not positive."""
    return tl.where(weights > 0, tl.log(tl.where(weights > 0, weights, 1.0)), float("-inf"))


@triton.jit
def _draw_kernel(
    best_ptr,  # [num_seqs, num_tiles, 2]
    best_tokens_ptr,  # [num_seqs, num_tiles, 2]
    tokens_ptr,  # [num_seqs]
    num_tiles,
    TILES: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    entry = (seq * num_tiles + tile) * 2
    residual = tl.load(best_ptr + entry + 1, mask=tile < num_tiles, other=float("-inf"))
    # Equal but for rounding: nothing is missing, and the target will do.
    entry += (tl.max(residual, axis=0) > float("-inf")).to(tl.int64)
    noisy = tl.load(best_ptr + entry, mask=tile < num_tiles, other=float("-inf"))
    token = tl.load(best_tokens_ptr + entry, mask=noisy > float("-inf"), other=2147483647)
    chosen = tl.min(tl.where(noisy == tl.max(noisy, axis=0), token, 2147483647), axis=0)
    tl.store(tokens_ptr + seq, chosen.to(tl.int64))


def verify(
    target_probs: Float[Array, "num_rows vocab_size"],
    draft_probs: Float[Array, "num_drafts vocab_size"] | None,
    draft_tokens: Int64[Array, " num_drafts"],
    cu_drafts: Int32[Array, " num_seqs_plus_1"],
    seeds: Int64[Array, " num_seqs"],
    positions: Int32[Array, " num_seqs"],
    sample_indices: Int32[Array, " num_seqs"],
) -> tuple[Int32[Array, " num_seqs"], Int64[Array, " num_seqs"]]:
    """Same contract as `reference.sampling.verify.verify`.

    Grid: one program a tile of the row that each sequence draws from: every one finds that row itself, by looking at
    the sequence's drafts; then one a sequence for the best of its tiles.
    Moves: two numbers for each draft, and one row of the target and one of the draft for each sequence.
    Numerics: noise is within 1e-6 of ``random_gumbel``'s.
    """
    op, num_drafts, num_seqs = "verify", len(draft_tokens), len(cu_drafts) - 1
    require_boundaries(op, "cu_drafts", cu_drafts, num_drafts)
    require_shape(op, "target_probs", target_probs, (num_drafts + num_seqs, None))  # type: ignore[reportArgumentType]
    vocab_size = target_probs.shape[1]
    require_distributions(op, "target_probs", target_probs)
    if draft_probs is not None:
        require_shape(op, "draft_probs", draft_probs, (num_drafts, vocab_size))
        require_distributions(op, "draft_probs", draft_probs)
    require_per_row(op, num_drafts, torch.int64, draft_tokens=draft_tokens)
    require_ids(op, "draft_tokens", draft_tokens, vocab_size, torch.int64, lowest=0)
    require_draw(op, num_seqs, seeds, positions, sample_indices)
    require_same_device(
        op, target_probs=target_probs, draft_probs=draft_probs, draft_tokens=draft_tokens, cu_drafts=cu_drafts,
        seeds=seeds,
    )  # fmt: skip

    accepted = torch.empty(num_seqs, dtype=torch.int32, device=target_probs.device)
    tokens = torch.empty(num_seqs, dtype=torch.int64, device=target_probs.device)
    if num_seqs == 0:
        return accepted, tokens
    num_tiles = cdiv(vocab_size, CHUNK * COLS)
    best = torch.empty(num_seqs, num_tiles, 2, device=target_probs.device)
    best_tokens = torch.empty(num_seqs, num_tiles, 2, dtype=torch.int32, device=target_probs.device)
    draft = target_probs if draft_probs is None else draft_probs
    per_seq = rows_together(draft_tokens, cu_drafts, seeds, positions, sample_indices)
    _verify_kernel[(num_seqs * num_tiles,)](
        target_probs, draft, *per_seq, accepted, best, best_tokens, *target_probs.stride(), *draft.stride(),
        num_drafts, vocab_size, num_tiles, CERTAIN=draft_probs is None, TILE_DRAFTS=TILE_DRAFTS,
        PART=PART, CHUNK=CHUNK, COLS=COLS, num_warps=4,
    )  # fmt: skip
    _draw_kernel[(num_seqs,)](best, best_tokens, tokens, num_tiles, TILES=next_power_of_2(num_tiles), num_warps=1)
    return accepted, tokens
