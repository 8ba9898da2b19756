"""Beam search, one step: the best continuations of each group of beams.

Beam search keeps, for one prompt, several unfinished answers (*beams*) and their log-probabilities. A step extends
every beam by every token and keeps the best of all these. This op finds them; which ones have ended, and which beams
live on in which blocks, is the business of the structure that holds the beams.
"""

from itertools import pairwise

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64
from numpy import ndarray as Array

from reference._checks import compute_dtype, require
from reference.sampling._rows import best_tokens, check_boundaries, check_each, check_per_row, largest, log_softmax


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
    r"""The best ``num_candidates`` pairs (beam, next token) of each group, by the log-probability of the whole.

    .. math::
        candidate_{b,i} = scores_b + \log softmax(logits_b)_i

    Args:
        logits: A row for each beam, the beams of a group together; -inf excludes a token.
        scores: The log-probability of each beam so far; -inf for a beam that is not there yet (at first all beams are
            equal, and only one may be extended).
        cu_beams: Where each group's rows begin, and the end of the last; a group may be empty.
        num_candidates: How many to return; twice the number of beams is enough to go on if half of them end here.

    Returns:
        For each group the candidates' scores, their rows *within the group* and their tokens; best first, among equals
        the lower row, then the lower token. A group with fewer candidates above -inf is filled up with -inf, -1, -1.
        Scores are float32 (float64 for float64 logits).

    Raises:
        ValueError: If a shape is wrong, the offsets do not fit, a score is NaN or +inf, or a row of logits has no
            finite one, or NaN or +inf; it is named.

    Source:
        Graves, "Sequence Transduction with Recurrent Neural Networks" (2012), section 2.6; the step as in
        `transformers`, without its length penalty, which is the structure's.

    Example:
        >>> logits = np.log(np.array([[0.9, 0.1], [0.5, 0.5]]))
        >>> beams, cu_beams = np.log(np.array([0.4, 0.6], np.float32)), np.array([0, 2], np.int32)
        >>> scores, rows, tokens = beam_scores(logits, beams, cu_beams, num_candidates=3)
        >>> np.exp(scores).round(2), rows, tokens              # .4 x .9 before .6 x .5, twice
        (array([[0.36, 0.3 , 0.3 ]]), array([[0, 1, 1]], dtype=int32), array([[0, 0, 1]]))
    """
    best_tokens("beam_scores", logits)
    num_rows, vocab_size = logits.shape
    check_per_row("beam_scores", num_rows, np.float32, scores=scores)
    check_each("beam_scores", "scores", scores < np.inf, "finite or -inf", scores)
    check_boundaries("beam_scores", "cu_beams", cu_beams, end=num_rows)
    require(num_candidates >= 1, "beam_scores", "num_candidates", "at least 1", num_candidates)

    compute = compute_dtype(logits.dtype)
    shape = (len(cu_beams) - 1, num_candidates)
    best, rows, tokens = np.full(shape, -np.inf, compute), np.full(shape, -1, np.int32), np.full(shape, -1, np.int64)
    for group, (start, end) in enumerate(pairwise(cu_beams)):
        if start == end:
            continue
        beams = logits[start:end].astype(compute, copy=False)
        candidates = np.concatenate([score + log_softmax(beam) for score, beam in zip(scores[start:end], beams)])
        chosen = largest(candidates, min(num_candidates, len(candidates)))
        chosen = chosen[np.isfinite(candidates[chosen])]
        best[group, : len(chosen)] = candidates[chosen]
        rows[group, : len(chosen)] = chosen // vocab_size
        tokens[group, : len(chosen)] = chosen % vocab_size
    return best, rows, tokens
