"""From logits to tokens: penalties, temperature and filters, a reproducible draw, log-probabilities.

The order is vLLM's: logit bias, repetition, frequency and presence penalties (`penalize`); then temperature, min-p,
top-k, top-p (`filter_logits`); then the draw (`sample`).

Every filter here is a *threshold on the logit*: a token stays iff its logit is at least some number that the row
determines. So tokens with equal logits share their fate, no filter needs the vocabulary sorted, and a kernel can find
the number by bisection. And nothing crosses rows, so a row gives the same bits alone as in any batch.
"""

import math

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_float, require_out, require_shape
from reference.numerics.philox import PURPOSE_DRAW, gumbel_at
from reference.sampling._rows import (
    best_tokens,
    check_draw,
    check_each,
    check_ids,
    check_per_row,
    largest,
    log_softmax,
)


def penalize(
    logits: Float[Array, "num_rows vocab_size"],
    history: Int32[Array, "num_rows max_history"],
    prompt_lens: Int32[Array, " num_rows"],
    repetition_penalty: Float32[Array, " num_rows"],
    presence_penalty: Float32[Array, " num_rows"],
    frequency_penalty: Float32[Array, " num_rows"],
    bias_ids: Int32[Array, "num_rows max_biases"],
    bias_values: Float32[Array, "num_rows max_biases"],
    *,
    out: Float[Array, "num_rows vocab_size"] | None = None,
) -> Float[Array, "num_rows vocab_size"]:
    r"""Logits with the caller's biases added and the tokens already seen made less (or more) likely.

    .. math::
        b_i &= logits_i + bias_i \\
        r_i &= b_i / repetition \; (b_i > 0) \quad or \quad b_i \cdot repetition \; (b_i \le 0)
            \qquad for \; i \; in \; prompt \; or \; output \\
        out_i &= r_i - frequency \cdot count_i - presence \cdot [count_i > 0]
            \qquad count_i = occurrences \; of \; i \; in \; the \; output

    Args:
        logits: Raw, of the model; -inf excludes a token and stays -inf.
        history: Prompt, then output tokens; -1 pads.
        prompt_lens: How many columns of ``history`` are prompt.
        repetition_penalty: Greater than 0; 1 changes nothing.
        presence_penalty: Any finite number; 0 changes nothing.
        frequency_penalty: Any finite number; 0 changes nothing.
        bias_ids: Tokens with a bias, each at most once in a row; -1 pads.
        bias_values: Their biases; -inf bans a token. Where the id is -1, anything.
        out: Where to write the result; may be ``logits``.

    Numerics:
        Computed and returned in float32 (float64 for float64 logits).

    Raises:
        ValueError: If a shape is wrong, an id or length is out of range, or a penalty or bias is not a number as above.

    Source:
        Keskar et al., "CTRL" (2019), section 4.1, for repetition (dividing by the penalty; its form for negative logits
        and all of the rest as in vLLM and the OpenAI API).

    Example:
        >>> logits, one = np.array([[2.0, -2.0, 1.0]], np.float32), np.ones(1, np.float32)
        >>> none, bias = np.full((1, 1), -1, np.int32), np.zeros((1, 1), np.float32)
        >>> history = np.array([[0, 1, 1, -1]], np.int32)     # the prompt is token 0, the output token 1, twice
        >>> penalize(logits, history, np.array([1], np.int32), 2 * one, 0 * one, one, none, bias)
        array([[ 1., -6.,  1.]], dtype=float32)
    """
    _check_penalties(logits, history, prompt_lens, repetition_penalty, presence_penalty, frequency_penalty)
    _check_biases(logits, bias_ids, bias_values)
    require_out("penalize", out, logits.shape, compute_dtype(logits.dtype))
    result = np.empty(logits.shape, compute_dtype(logits.dtype)) if out is None else out
    result[...] = logits
    for row, scores in enumerate(result):
        biased = bias_ids[row] >= 0
        scores[bias_ids[row, biased]] += bias_values[row, biased]
        if repetition_penalty[row] != 1:
            seen = _tokens(history[row])
            score, penalty = scores[seen], repetition_penalty[row]
            scores[seen] = np.where(score > 0, score / penalty, score * penalty)
        if presence_penalty[row] != 0 or frequency_penalty[row] != 0:
            tokens, counts = np.unique(_tokens(history[row, prompt_lens[row] :]), return_counts=True)
            scores[tokens] -= frequency_penalty[row] * counts.astype(scores.dtype) + presence_penalty[row]
    return result


def filter_logits(
    logits: Float[Array, "num_rows vocab_size"],
    temperature: Float32[Array, " num_rows"],
    top_k: Int32[Array, " num_rows"],
    top_p: Float32[Array, " num_rows"],
    min_p: Float32[Array, " num_rows"],
    *,
    out: Float[Array, "num_rows vocab_size"] | None = None,
) -> Float[Array, "num_rows vocab_size"]:
    r"""Logits divided by the temperature, with -inf for the tokens that the filters exclude.

    .. math::
        out_i = (logits_i - \max logits) / temperature \quad if \; i \; passes \; all \; filters, \; else \; -\infty

    Each filter sees what the ones before it left. With :math:`P = softmax(out)` over that, token i passes

    - min-p iff :math:`P_i \ge min\_p \cdot \max P`, that is :math:`out_i \ge \log min\_p`;
    - top-k iff fewer than ``top_k`` tokens have a greater logit;
    - top-p iff the tokens that have a greater logit have a total :math:`P` less than ``top_p``.

    So top-p keeps the fewest best tokens whose mass reaches ``top_p``, and tokens that tie with the last one kept stay,
    in top-k too. The best token always passes.

    Args:
        logits: -inf excludes a token from the start; every row needs one that is finite, and none may be NaN or +inf.
        temperature: At least 0. At 0 the first best token is left, at 0, and the filters have nothing to do.
        top_k: 0, or vocab_size and more, excludes nothing.
        top_p: In (0, 1]; 1 excludes nothing.
        min_p: In [0, 1]; 0 excludes nothing.
        out: Where to write the result; may be ``logits``.

    Returns:
        A row's best token is at 0: the maximum is taken out before the division, which leaves the softmax as it is and
        keeps a tiny temperature from overflowing.

    Numerics:
        Computed and returned in float32 (float64 for float64 logits); top-k compares the logits as they came, so its
        ties are exact; the mass of top-p is summed in float64.

    Raises:
        ValueError: If a shape is wrong, a parameter is out of range, or a row has nothing to choose from; it is named.

    Source:
        Fan et al., "Hierarchical Neural Story Generation" (2018), for top-k; Holtzman et al., "The Curious Case of
        Neural Text Degeneration" (2020), section 3.1, for top-p; Nguyen et al., "Turning Up the Heat: Min-p Sampling"
        (2024). The order is vLLM's.

    Example:
        >>> logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
        >>> one, three = np.ones(1, np.float32), np.array([3], np.int32)
        >>> np.exp(filter_logits(logits, one, three, 0.7 * one, 0 * one)).round(2)     # .5/.95 is too little
        array([[1. , 0.6, 0. , 0. ]])
    """
    best = _check_filters("filter_logits", logits, temperature, top_k, top_p, min_p)
    require_out("filter_logits", out, logits.shape, compute_dtype(logits.dtype))
    result = np.empty(logits.shape, compute_dtype(logits.dtype)) if out is None else out
    for row, token in enumerate(best):
        if temperature[row] == 0:
            result[row] = -np.inf
            result[row, token] = 0
            continue
        scores = logits[row].astype(result.dtype)  # a copy: out may be logits
        threshold = _threshold(scores, scores[token], temperature[row], top_k[row], top_p[row], min_p[row])
        result[row] = np.where(scores >= threshold, _scale(scores, scores[token], temperature[row]), -np.inf)
    return result


def sample(
    logits: Float[Array, "num_rows vocab_size"],
    temperature: Float32[Array, " num_rows"],
    top_k: Int32[Array, " num_rows"],
    top_p: Float32[Array, " num_rows"],
    min_p: Float32[Array, " num_rows"],
    seeds: Int64[Array, " num_rows"],
    positions: Int32[Array, " num_rows"],
    sample_indices: Int32[Array, " num_rows"],
) -> Int64[Array, " num_rows"]:
    r"""A token for each row, drawn from the softmax of its filtered logits, reproducibly.

    .. math::
        token = \arg\max_i \; filter\_logits(logits)_i + gumbel_i

    with ``random_gumbel``'s noise for (seed, position, sample index) and ``PURPOSE_DRAW``, column i for token i. The
    noise names the draw, not the moment: the same request draws the same tokens in any batch.

    Args:
        logits, temperature, top_k, top_p, min_p: As in ``filter_logits``. At temperature 0 the token is the argmax.
        seeds: Of each row's request.
        positions: Of the token to be drawn, in its sequence.
        sample_indices: Which of the request's samples the row belongs to.

    Returns:
        Token ids; never one whose logit is -inf; the lowest among equals.

    Numerics:
        float32 (float64 for float64 logits, with the same float32 noise). Greedy rows cost one argmax; noise is
        computed only for the tokens that pass the filters.

    Raises:
        ValueError: As ``filter_logits`` and ``random_gumbel``.

    Source:
        Maddison et al., "A* Sampling" (2014), section 2, for the Gumbel-max trick.

    Example:
        >>> logits, seeds, zero = np.zeros((4, 100)), np.array([5, 6, 5, 5]), np.zeros(4, np.int32)
        >>> temperature, one = np.array([1, 1, 1, 0], np.float32), np.ones(4, np.float32)
        >>> tokens = sample(logits, temperature, zero, one, 0 * one, seeds, zero, zero)
        >>> bool(tokens[0] == tokens[2]), bool(tokens[0] == tokens[1]), int(tokens[3])   # by seed; greedy: the first
        (True, False, 0)
    """
    tokens = _check_filters("sample", logits, temperature, top_k, top_p, min_p)
    check_draw("sample", len(logits), seeds, positions, sample_indices)
    for row in np.flatnonzero(temperature > 0):
        scores = logits[row].astype(compute_dtype(logits.dtype), copy=False)
        top = scores[tokens[row]]
        threshold = _threshold(scores, top, temperature[row], top_k[row], top_p[row], min_p[row])
        passed = np.flatnonzero(scores >= threshold)
        noise = gumbel_at(passed, seeds[row], positions[row], sample_indices[row], purpose=PURPOSE_DRAW)
        tokens[row] = passed[np.argmax(_scale(scores[passed], top, temperature[row]) + noise)]
    return tokens


def log_probs(
    logits: Float[Array, "num_rows vocab_size"], token_ids: Int64[Array, " num_rows"], *, num_top: int
) -> tuple[
    Float[Array, " num_rows"], Int32[Array, " num_rows"], Int64[Array, "num_rows num_top"],
    Float[Array, "num_rows num_top"],
]:  # fmt: skip
    r"""The log-probability and rank of a token of each row, and the row's best tokens with theirs.

    .. math::
        \log P_i = logits_i - \log \sum_j e^{logits_j}
        \qquad rank_i = 1 + \left| \{ j : logits_j > logits_i \} \right|

    Args:
        logits: Of whatever distribution is reported; the engine passes the model's own. -inf is log-probability -inf.
        token_ids: The token asked about, 0 <= id < vocab_size.
        num_top: How many best tokens to list, 0 <= num_top <= vocab_size.

    Returns:
        The token's log-probability; its rank, 1 being best and equals sharing the better one; the ids of the best
        tokens, best first and the lowest id first among equals; their log-probabilities. Log-probabilities are float32
        (float64 for float64 logits).

    Raises:
        ValueError: If a shape is wrong, an id or ``num_top`` is out of range, or a row has no finite logit, or NaN or
            +inf; it is named.

    Example:
        >>> logits = np.log(np.array([[0.2, 0.5, 0.3]]))
        >>> logprob, rank, ids, logprobs = log_probs(logits, np.array([2]), num_top=2)
        >>> np.exp(logprob).round(3), rank, ids, np.exp(logprobs).round(3)
        (array([0.3]), array([2], dtype=int32), array([[1, 2]]), array([[0.5, 0.3]]))
    """
    best_tokens("log_probs", logits)
    num_rows, vocab_size = logits.shape
    check_per_row("log_probs", num_rows, np.int64, token_ids=token_ids)
    check_ids("log_probs", "token_ids", token_ids, vocab_size, dtype=np.int64, lowest=0)
    require(0 <= num_top <= vocab_size, "log_probs", "num_top", f"0 to {vocab_size}", num_top)

    compute = compute_dtype(logits.dtype)
    chosen, ranks = np.empty(num_rows, compute), np.empty(num_rows, np.int32)
    top_ids, top_values = np.empty((num_rows, num_top), np.int64), np.empty((num_rows, num_top), compute)
    for row, token in enumerate(token_ids):
        scores = logits[row].astype(compute, copy=False)
        logs = log_softmax(scores)
        chosen[row] = logs[token]
        ranks[row] = 1 + np.count_nonzero(scores > scores[token])
        top_ids[row] = largest(scores, num_top)
        top_values[row] = logs[top_ids[row]]
    return chosen, ranks, top_ids, top_values


def _tokens(history: Int32[Array, " max_history"]) -> Int32[Array, " num_tokens"]:
    return history[history >= 0]


# ---- one row's filters ------------------------------------------------------------------------------------------


def _scale(scores: Array, top: float, temperature: float) -> Array:
    with np.errstate(over="ignore"):  # at a tiny temperature the rest is at -inf, which is the limit
        return (scores - top) / temperature


def _threshold(scores: Array, top: float, temperature: float, top_k: int, top_p: float, min_p: float) -> float:
    """The least logit that passes the filters, for one row whose best logit is ``top``."""
    threshold = -math.inf
    if min_p > 0:
        threshold = float(scores[_scale(scores, top, temperature) >= math.log(min_p)].min())
    if 0 < top_k < len(scores):
        threshold = max(threshold, float(np.partition(scores, -top_k)[-top_k]))  # the k-th largest
    if top_p < 1:
        threshold = _nucleus(scores[scores >= threshold], top, temperature, top_p)
    return threshold


def _nucleus(scores: Array, top: float, temperature: float, top_p: float) -> float:
    """The largest threshold at which the scores that reach it have at least ``top_p`` of the mass."""
    mass = np.exp(_scale(scores, top, temperature))
    # The best token alone weighs 1, so tokens below (1 - top_p) / n weigh, all n together, less than 1 - top_p of the
    # whole. They cannot be needed, and only the few hundred others have to be put in order.
    head = np.flatnonzero(mass >= (1 - top_p) / len(mass))
    order = head[np.argsort(scores[head])[::-1]]
    reached = np.cumsum(mass[order], dtype=np.float64)
    last = np.searchsorted(reached, top_p * mass.sum(dtype=np.float64))
    return float(scores[order[min(last, len(order) - 1)]])


# ---- at the door ------------------------------------------------------------------------------------------------


def _check_filters(op: str, logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    best = best_tokens(op, logits)
    check_per_row(op, len(logits), np.float32, temperature=temperature, top_p=top_p, min_p=min_p)
    check_per_row(op, len(logits), np.int32, top_k=top_k)
    check_each(op, "temperature", (temperature >= 0) & (temperature < np.inf), "finite and at least 0", temperature)
    check_each(op, "top_k", top_k >= 0, "at least 0", top_k)
    check_each(op, "top_p", (top_p > 0) & (top_p <= 1), "more than 0 and at most 1", top_p)
    check_each(op, "min_p", (min_p >= 0) & (min_p <= 1), "from 0 to 1", min_p)
    return best


def _check_penalties(
    logits: Array, history: Array, prompt_lens: Array, repetition: Array, presence: Array, frequency: Array
) -> None:
    require_shape("penalize", "logits", logits, (None, None))
    require_float("penalize", "logits", logits)
    num_rows, vocab_size = logits.shape
    penalties = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    check_per_row("penalize", num_rows, np.float32, **penalties)
    check_per_row("penalize", num_rows, np.int32, prompt_lens=prompt_lens)
    require_shape("penalize", "history", history, (num_rows, None))
    check_ids("penalize", "history", history, vocab_size, dtype=np.int32)
    inside = (prompt_lens >= 0) & (prompt_lens <= history.shape[1])
    check_each("penalize", "prompt_lens", inside, f"0 to {history.shape[1]}", prompt_lens)
    check_each("penalize", "repetition_penalty", repetition > 0, "more than 0", repetition)
    for name, values in penalties.items():
        check_each("penalize", name, np.isfinite(values), "a finite number", values)


def _check_biases(logits: Array, bias_ids: Array, bias_values: Array) -> None:
    num_rows, vocab_size = logits.shape
    require_shape("penalize", "bias_ids", bias_ids, (num_rows, None))
    require_shape("penalize", "bias_values", bias_values, bias_ids.shape)
    require(bias_values.dtype == np.float32, "penalize", "bias_values", "float32", bias_values.dtype)
    check_ids("penalize", "bias_ids", bias_ids, vocab_size, dtype=np.int32)
    valid = (bias_ids < 0) | (bias_values < np.inf)  # NaN is not less
    check_each("penalize", "bias_values", valid, "finite or -inf", bias_values)
    ids = np.sort(bias_ids, axis=1)
    repeated = (np.diff(ids, axis=1) == 0) & (ids[:, 1:] >= 0)
    check_each("penalize", "bias_ids", ~repeated, "each token once in a row", bias_ids)
