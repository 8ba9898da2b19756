"""Speculative verification: exact rejection sampling, so that drafting changes the speed and never the distribution.

A cheap drafter proposes the next few tokens; the model scores all of them in one pass, for about the price of one.
Then each draft is accepted with a probability that makes up exactly for the drafter's preferences, and the first one
that is rejected is replaced by a draw from what the drafter was short of. What comes out is distributed as if the
model had drawn every token itself.
"""

from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int32, Int64
from numpy import ndarray as Array

from reference._checks import compute_dtype, require_float, require_shape
from reference.numerics.philox import PURPOSE_ACCEPT, PURPOSE_DRAW, PURPOSE_RESAMPLE, gumbel_at, random_uniform
from reference.sampling._rows import check_boundaries, check_draw, check_each, check_ids, check_per_row


def verify(
    target_probs: Float[Array, "num_rows vocab_size"],
    draft_probs: Float[Array, "num_drafts vocab_size"] | None,
    draft_tokens: Int64[Array, " num_drafts"],
    cu_drafts: Int32[Array, " num_seqs_plus_1"],
    seeds: Int64[Array, " num_seqs"],
    positions: Int32[Array, " num_seqs"],
    sample_indices: Int32[Array, " num_seqs"],
) -> tuple[Int32[Array, " num_seqs"], Int64[Array, " num_seqs"]]:
    r"""How many of each sequence's drafts are accepted, and the token that follows the last accepted one.

    .. math::
        accept \; x \quad &iff \quad u < target(x) / draft(x) \\
        after \; a \; rejection \quad &token \sim \max(target - draft, 0) / \textstyle\sum \max(target - draft, 0) \\
        after \; the \; last \; draft \quad &token \sim target

    Why it is exact: token x comes out by acceptance with probability :math:`\min(draft(x), target(x))`, and by
    rejection with what is missing to :math:`target(x)`, since the mass rejected is the mass of the residual.

    Args:
        target_probs: The model's distributions, filtered as `sample` would. A sequence with d drafts owns d + 1 rows,
            in order (so num_rows = num_drafts + num_seqs); its row i is the distribution after i drafts. One-hot rows
            are greedy decoding: they accept exactly the drafts that are greedy.
        draft_probs: The distributions that the drafts were drawn from. None where drafts are certain, as prompt
            look-up's are: probability 1 for the token drafted.
        draft_tokens: What was drafted. One that its own distribution excludes counts as unexpected, and is accepted
            iff the target allows it.
        cu_drafts: Where each sequence's drafts begin, and the end of the last; a sequence may have none.
        seeds: Of each sequence's request.
        positions: Of the first token drafted (with no draft: of the token to be drawn).
        sample_indices: Which of the request's samples the sequence is.

    Returns:
        The number accepted, 0 to d, and one more token, so a step yields between 1 and d + 1.

    Numerics:
        float32 (float64 for float64 rows). u is `random_uniform`'s with ``PURPOSE_ACCEPT`` at the token's own position;
        the token after is drawn by Gumbel-max, with ``PURPOSE_RESAMPLE`` after a rejection and otherwise
        ``PURPOSE_DRAW``, which makes it the draw of `sample` at that position. No draw decides twice: after a
        rejection, the next step asks again for positions at which this one decided nothing.

    Raises:
        ValueError: If a shape is wrong, offsets or ids are out of range, or a row is not a distribution: a value is
            negative or not finite, or the sum is further than 0.01 from 1.

    Source:
        Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), algorithm 1, where our
        target is p and our draft is q; Chen et al., "Accelerating Large Language Model Decoding with Speculative
        Sampling" (2023), theorem 1.

    Example:
        >>> target = np.eye(5)[[3, 1, 4]]                    # greedy: after the text 3, after 3 1, after 3 1 4
        >>> where = np.array([0], np.int32)
        >>> verify(target, None, np.array([3, 2]), np.array([0, 2], np.int32), np.array([7]), where, where)
        (array([1], dtype=int32), array([1]))
    """
    _check(target_probs, draft_probs, draft_tokens, cu_drafts, seeds, positions, sample_indices)
    drafts = np.arange(len(draft_tokens))
    seq_of_draft = np.repeat(np.arange(len(seeds)), np.diff(cu_drafts))
    offsets = drafts - cu_drafts[seq_of_draft]
    compute = compute_dtype(target_probs.dtype)
    target = target_probs[drafts + seq_of_draft, draft_tokens].astype(compute)  # a row more for each sequence before
    draft = np.ones_like(target) if draft_probs is None else draft_probs[drafts, draft_tokens].astype(compute)
    accept = (seeds[seq_of_draft], positions[seq_of_draft] + offsets, sample_indices[seq_of_draft])
    u = random_uniform(*accept, purpose=PURPOSE_ACCEPT, num_draws=1)[:, 0]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # x / 0 is inf: accept; 0 / 0 is NaN: do not
        accepted = u < target / draft

    num_accepted, tokens = np.empty(len(seeds), np.int32), np.empty(len(seeds), np.int64)
    for seq, (start, end) in enumerate(pairwise(cu_drafts)):
        rejected = np.flatnonzero(~accepted[start:end])
        count = int(rejected[0]) if len(rejected) else end - start
        weights = target_probs[start + seq + count].astype(compute)
        purpose = PURPOSE_DRAW
        if len(rejected):
            at = start + count
            weights = _residual(weights, None if draft_probs is None else draft_probs[at], int(draft_tokens[at]))
            purpose = PURPOSE_RESAMPLE
        num_accepted[seq] = count
        tokens[seq] = _draw(weights, seeds[seq], positions[seq] + count, sample_indices[seq], purpose)
    return num_accepted, tokens


def _residual(target: Array, draft: Array | None, token: int) -> Array:
    """What the target wants more of than the draft gives."""
    missing = target.copy()
    if draft is None:
        missing[token] = 0
    else:
        missing = np.maximum(target - draft.astype(target.dtype), 0)
    return missing if missing.any() else target  # equal but for rounding: nothing is missing, and the target will do


def _draw(weights: Array, seed: int, position: int, sample_index: int, purpose: int) -> int:
    """A token in proportion to its weight: the Gumbel-max trick needs no sum."""
    possible = np.flatnonzero(weights)
    noise = gumbel_at(possible, seed, position, sample_index, purpose=purpose)
    return int(possible[np.argmax(np.log(weights[possible]) + noise)])


def _check(
    target_probs: Array,
    draft_probs: Array | None,
    draft_tokens: Array,
    cu_drafts: Array,
    seeds: Array,
    positions: Array,
    sample_indices: Array,
) -> None:
    num_seqs, num_drafts = len(cu_drafts) - 1, len(draft_tokens)
    check_boundaries("verify", "cu_drafts", cu_drafts, end=num_drafts)
    require_shape("verify", "target_probs", target_probs, (num_drafts + num_seqs, None))
    vocab_size = target_probs.shape[1]
    _check_distributions("target_probs", target_probs)
    if draft_probs is not None:
        require_shape("verify", "draft_probs", draft_probs, (num_drafts, vocab_size))
        _check_distributions("draft_probs", draft_probs)
    check_per_row("verify", num_drafts, np.int64, draft_tokens=draft_tokens)
    check_ids("verify", "draft_tokens", draft_tokens, vocab_size, dtype=np.int64, lowest=0)
    check_draw("verify", num_seqs, seeds, positions, sample_indices)


def _check_distributions(argument: str, probs: Array) -> None:
    require_float("verify", argument, probs)
    with np.errstate(over="ignore"):
        sums = probs.astype(compute_dtype(probs.dtype), copy=False).sum(axis=1)
    valid = (probs >= 0).all(axis=1) & (np.abs(sums - 1) <= 0.01)
    check_each("verify", argument, valid, "values of at least 0 that sum to 1", probs)
