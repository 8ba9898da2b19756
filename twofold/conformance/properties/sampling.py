"""What any backend's sampling ops must satisfy. A property takes the backend, and raises AssertionError."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from reference.numerics.philox import PURPOSE_ACCEPT, PURPOSE_DRAW, PURPOSE_RESAMPLE
from twofold.conformance.backends import assume_supported, is_interpreted
from twofold.conformance.properties.numerics import Backend, call, same_bits
from twofold.conformance.strategies.sampling import Beams, Drafted, Filtering, Penalties, PerRow, Sampling
from twofold.conformance.tolerance import assert_within, compute_unit, norm_bound

NOISE_RANGE = 20.0  # Gumbel numbers from 23 bits lie between -2.82 and 16.64


def unit(array: np.ndarray) -> float:
    """The unit roundoff of what an op computes in, given ``array``."""
    return compute_unit(array.dtype)


def computed(array: np.ndarray) -> np.dtype:
    return np.dtype(np.float64 if array.dtype == np.float64 else np.float32)


def dense(case: Any) -> Any:
    """With the numbers of a row side by side. Where they lie apart, a GPU may add them up in another order, and a row
    alone is not laid out as in such a batch: no op promises equal bits for both."""
    arrays = {name: value for name, value in vars(case).items() if isinstance(value, np.ndarray)}
    return replace(case, **{name: np.ascontiguousarray(array) for name, array in arrays.items()})


def rows_do_not_depend_on_company(backend: Backend, op: str, case: PerRow, **options: Any) -> None:
    """A row gives the same bits alone, in the batch, and in the batch in reverse order."""
    assume_supported(backend, case.args()[0].dtype)
    case = dense(case)

    def results(some: PerRow) -> tuple[np.ndarray, ...]:
        result = call(backend, op, *some.args(), **options)
        return result if isinstance(result, tuple) else (result,)

    full = results(case)
    backwards = results(case.rows(slice(None, None, -1)))
    assert all(same_bits(a[::-1].copy(), b.copy()) for a, b in zip(full, backwards)), f"{op}: reversed rows differ"
    for row in range(len(full[0])):
        alone = results(case.rows(slice(row, row + 1)))
        for part, (a, b) in enumerate(zip(full, alone)):
            assert same_bits(a[row : row + 1].copy(), b.copy()), f"{op}: row {row} alone differs in result {part}"


def writes_to_out(backend: Backend, op: str, case: PerRow) -> None:
    """What is written to ``out`` (another array, or the logits themselves) is what is returned without it."""
    assume_supported(backend, case.args()[0].dtype)
    expected = call(backend, op, *case.args())
    assert same_bits(call(backend, op, *case.args(), out=np.full_like(expected, np.nan)), expected), f"{op}: out"
    if expected.dtype == case.args()[0].dtype:
        logits, *others = (backend.from_host(array.copy()) for array in case.args())
        written = getattr(backend, op)(logits, *others, out=logits)
        assert same_bits(backend.to_host(written), expected), f"{op}: out is logits"


# ---- penalize ---------------------------------------------------------------------------------------------------


def penalties_are_the_equations(backend: Backend, case: Penalties) -> None:
    """Each logit is what the three equations make of it, token by token, in float64."""
    assume_supported(backend, case.logits.dtype)
    got = call(backend, "penalize", *case.args())
    assert got.dtype == computed(case.logits), f"penalize: dtype {got.dtype}"
    expected, magnitude = case.logits.astype(np.float64), np.abs(case.logits.astype(np.float64))
    for row, scores in enumerate(expected):
        for token, bias in zip(case.bias_ids[row], case.bias_values[row].astype(np.float64)):
            if token >= 0:
                scores[token] += bias
                magnitude[row, token] += abs(bias)
        history, penalty = case.history[row].tolist(), float(case.repetition_penalty[row])
        for token in set(history) - {-1}:
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            count = history[case.prompt_lens[row] :].count(token)
            frequency, presence = float(case.frequency_penalty[row]), float(case.presence_penalty[row])
            scores[token] -= frequency * count + presence * (count > 0)
            magnitude[row, token] = magnitude[row, token] * max(penalty, 1) + abs(frequency) * count + abs(presence)
    magnitude = np.where(np.isfinite(magnitude), magnitude, 0)
    bound = norm_bound(expected, 1, got.dtype, magnitude=magnitude)
    bound = np.where(np.isfinite(bound), bound, 0)
    assert_within(got, expected, bound, "penalize", ("row", "token"))


# ---- filter_logits ----------------------------------------------------------------------------------------------


def filters_keep_what_they_say(backend: Backend, case: Filtering) -> None:
    """What is kept is the logit, relative to the best, over the temperature; and a token is kept iff min-p, top-k and
    top-p each say so, in that order, up to rounding where a threshold is met; never up to rounding for top-k."""
    assume_supported(backend, case.logits.dtype)
    got = call(backend, "filter_logits", *case.args())
    assert got.dtype == computed(case.logits), f"filter_logits: dtype {got.dtype}"
    assert got.shape == case.logits.shape, f"filter_logits: shape {got.shape}"
    for row in range(len(got)):
        scores, temperature = case.logits[row].astype(np.float64), float(case.temperature[row])
        kept = got[row] > -np.inf
        if temperature == 0:
            assert kept.nonzero()[0].tolist() == [scores.argmax()], f"filter_logits: row {row} is greedy, kept {kept}"
            assert got[row].max() == 0, f"filter_logits: row {row}: {got[row].max()} at the best token"
            continue
        with np.errstate(over="ignore"):
            scaled = ((scores - scores.max()) / temperature).astype(got.dtype).astype(np.float64)
        assert_within(got[row][kept], scaled[kept], 4 * unit(got) * np.abs(scaled[kept]), f"row {row}", ("kept",))
        must, may = fates(case, row, scaled, unit(got))
        assert kept[must].all(), f"filter_logits: row {row} lacks tokens {np.flatnonzero(must & ~kept)}"
        assert may[kept].all(), f"filter_logits: row {row} has tokens {np.flatnonzero(kept & ~may)}"
        for value in np.unique(scores[kept]):
            assert kept[scores == value].all(), f"filter_logits: row {row}: equals of logit {value} parted"


def fates(case: Filtering, row: int, scaled: np.ndarray, u: float) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens must be kept and which may be: they differ where rounding may decide.

    A share of mass is wrong by what its terms are, 6 u (1 + log n) for an average token, and by what any order of
    summation may lose, n u.
    """
    scores, top_k, top_p, min_p = case.logits[row].astype(np.float64), *(x[row] for x in case.args()[2:])
    exists = scaled > -np.inf
    num_better = np.searchsorted(np.sort(-scores), -scores)  # of strictly greater logit
    by_k = exists & (num_better < top_k) if top_k > 0 else exists
    least = math.log(min_p) if min_p > 0 else -math.inf
    doubt = 8 * u * abs(least) if min_p > 0 else 0.0
    surely, perhaps = by_k & (scaled >= least + doubt), by_k & (scaled >= least - doubt)
    if top_p == 1:
        return surely, perhaps
    mass = np.where(perhaps, np.exp(scaled), 0)
    better = np.array([mass[scores > score].sum() for score in scores])
    slack = u * (6 * (1 + math.log(len(scores))) + len(scores))
    must = surely & (better / mass[surely].sum() < float(top_p) - slack)
    may = perhaps & (better / mass.sum() < float(top_p) + slack)
    return must | (surely & (scores == scores.max())), may  # the best stays, however small top_p


# ---- sample -----------------------------------------------------------------------------------------------------


def sample_is_the_noisy_maximum(backend: Backend, case: Sampling) -> None:
    """The token is the argmax of the filtered logits plus the Gumbel noise of (seed, position, sample index), or within
    rounding of it; greedy rows give the first best logit exactly; no token is one that is masked."""
    assume_supported(backend, case.logits.dtype)
    case = several_draws(case, 3)
    tokens = call(backend, "sample", *case.args())
    assert tokens.dtype == np.int64, f"sample: dtype {tokens.dtype}"
    assert tokens.shape == (len(case.logits),), f"sample: shape {tokens.shape}"
    filtered = call(backend, "filter_logits", *case.filtering().args()).astype(np.float64)
    named = (case.seeds, case.positions, case.sample_indices)
    noise = call(backend, "random_gumbel", *named, purpose=PURPOSE_DRAW, num_draws=case.logits.shape[1])
    for row, token in enumerate(tokens):
        if case.temperature[row] == 0:
            best = case.logits[row].astype(np.float64).argmax()
            assert token == best, f"sample: greedy row {row} gave {token}, not {best}"
            continue
        noisy = filtered[row] + noise[row]
        assert filtered[row, token] > -np.inf, f"sample: row {row} gave token {token}, which is excluded"
        margin = noisy.max() - noisy[token]
        assert margin <= 4 * unit(case.logits) * NOISE_RANGE + 2.0**-22, f"sample: row {row}, token {token}: {margin}"


def several_draws(case: Sampling, count: int) -> Sampling:
    """Every row so many times, as samples of one position: what is excluded must not be drawn by any of them."""
    num_rows, samples = len(case.logits), np.arange(count, dtype=case.sample_indices.dtype)
    return replace(case.rows(np.repeat(np.arange(num_rows), count)), sample_indices=np.tile(samples, num_rows))


def top_k_1_is_greedy(backend: Backend, case: Sampling) -> None:
    """At any temperature, one candidate is the best one (of several equal ones, one of them)."""
    assume_supported(backend, case.logits.dtype)
    tokens = call(backend, "sample", *replace(case, top_k=np.ones_like(case.top_k)).args())
    for row, token in enumerate(tokens):
        logits = case.logits[row].astype(np.float64)
        assert logits[token] == logits.max(), f"sample: row {row} with top-k 1 gave {token} of {logits}"


def cold_is_greedy(backend: Backend, case: Sampling) -> None:
    """Once the temperature makes the second best further away than the noise reaches, the best is drawn."""
    assume_supported(backend, case.logits.dtype)
    gaps = []
    for row in case.logits.astype(np.float64):
        others = row[row < row.max()]
        gaps.append(max(row.max() - others.max(initial=-np.inf), 1e-30) if len(others) else 1.0)
    cold = (np.minimum(gaps, 1e30) / NOISE_RANGE * 0.99).astype(np.float32)
    tokens = call(backend, "sample", *replace(case, temperature=cold).args())
    for row, token in enumerate(tokens):
        logits = case.logits[row].astype(np.float64)
        assert logits[token] == logits.max(), f"sample: row {row} at temperature {cold[row]} gave {token}"


def many(backend: Backend) -> int:
    """How often to draw where frequencies are looked at; a program of an interpreted kernel takes milliseconds."""
    return 120 if is_interpreted(backend) else 2000


def chi_square(counts: np.ndarray, probs: np.ndarray) -> tuple[float, float]:
    """Pearson's statistic of observed counts, rare tokens taken together, and what it stays below but for one time in
    three million (five standard deviations, after Wilson and Hilferty)."""
    assert counts[probs == 0].sum() == 0, f"drawn in spite of probability 0: {np.flatnonzero(counts * (probs == 0))}"
    expected = probs / probs.sum() * counts.sum()
    rare = expected < 8
    pooled = [(counts[rare].sum(), expected[rare].sum())] if expected[rare].sum() >= 8 else []
    cells = [*zip(counts[~rare], expected[~rare]), *pooled]
    freedom = max(len(cells) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in cells), limit


def frequencies_follow(counts: np.ndarray, probs: np.ndarray, what: str) -> None:
    statistic, limit = chi_square(counts, probs)
    assert statistic < limit, f"{what}: chi-square {statistic:.1f} > {limit:.1f}: {counts} for {counts.sum() * probs}"


def draws_follow_the_softmax(backend: Backend, row: Filtering, varied: str, num_draws: int | None = None) -> None:
    """Over many seeds, positions or sample indices, tokens come as often as the softmax of the filtered row says."""
    num_draws = num_draws or many(backend)
    case = row.rows(np.zeros(num_draws, int))
    zeros, counter = np.zeros(num_draws, int), np.arange(num_draws)
    named = [counter if name == varied else zeros + 11 for name in ("seeds", "positions", "sample_indices")]
    types = (np.int64, np.int32, np.int32)
    tokens = call(backend, "sample", *case.args(), *(x.astype(t) for x, t in zip(named, types)))
    filtered = call(backend, "filter_logits", *row.args())[0].astype(np.float64)
    counts = np.bincount(tokens, minlength=len(filtered))
    frequencies_follow(counts, np.exp(filtered) / np.exp(filtered).sum(), f"sample over {varied}")


# ---- log_probs --------------------------------------------------------------------------------------------------


def log_probs_are_the_logarithms(backend: Backend, logits: np.ndarray, token_ids: np.ndarray, num_top: int) -> None:
    """Log-probabilities are the log-softmax in float64; the rank counts greater logits; the best tokens are in order,
    equal ones by id."""
    assume_supported(backend, logits.dtype)
    logprob, rank, top_ids, top_logprobs = call(backend, "log_probs", logits, token_ids, num_top=num_top)
    assert (rank.dtype, top_ids.dtype) == (np.int32, np.int64), f"log_probs: dtypes {rank.dtype}, {top_ids.dtype}"
    assert logprob.dtype == top_logprobs.dtype == computed(logits), f"log_probs: dtype {logprob.dtype}"
    scores = logits.astype(np.float64)
    expected = log_softmax64(scores)
    bound = log_softmax_bound(scores, expected, unit(logits))
    rows = np.arange(len(scores))
    assert_within(logprob, expected[rows, token_ids], bound[rows, token_ids], "log_probs: of the token", ("row",))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :num_top]
    assert top_ids.tolist() == order.tolist(), f"log_probs: the best are {order}, not {top_ids}"
    per_row = (rows[:, None], top_ids)
    assert_within(top_logprobs, expected[per_row], bound[per_row], "log_probs: of the best", ("row", "place"))
    better = (scores > scores[rows, token_ids][:, None]).sum(axis=1)
    assert rank.tolist() == (better + 1).tolist(), f"log_probs: ranks {better + 1}, not {rank}"


def log_softmax64(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_softmax_bound(scores: np.ndarray, logs: np.ndarray, u: float) -> np.ndarray:
    """Rounding of what is subtracted (the logit, the maximum: at most the row's largest size) and of the sum of n."""
    size = np.abs(np.where(np.isfinite(scores), scores, 0)).max(axis=-1, keepdims=True, initial=0)
    size = size + np.where(np.isfinite(logs), np.abs(logs), 0)
    return u * (4 * size + max(8.0, math.sqrt(scores.shape[-1])))


# ---- beam_scores ------------------------------------------------------------------------------------------------


def beams_are_the_best(backend: Backend, case: Beams) -> None:
    """Each group's candidates are real, distinct, in order, and no other is better by more than rounding; where there
    are too few, the rest is -inf, -1, -1."""
    assume_supported(backend, case.logits.dtype)
    arrays = (case.logits, case.scores, case.cu_beams)
    best, rows, tokens = call(backend, "beam_scores", *arrays, num_candidates=case.num_candidates)
    shape = (len(case.cu_beams) - 1, case.num_candidates)
    assert best.shape == rows.shape == tokens.shape == shape, f"beam_scores: shapes {best.shape}, not {shape}"
    assert (best.dtype, rows.dtype, tokens.dtype) == (computed(case.logits), np.int32, np.int64), "beam_scores: dtypes"
    scores = case.logits.astype(np.float64)
    logs = log_softmax64(scores)
    totals = case.scores.astype(np.float64)[:, None] + logs
    with np.errstate(invalid="ignore"):
        size = np.where(np.isfinite(totals), np.abs(totals), 0)
    bounds = log_softmax_bound(scores, logs, unit(case.logits)) + 2 * unit(case.logits) * size
    for group, (start, end) in enumerate(pairwise(case.cu_beams.tolist())):
        total, bound = totals[start:end], bounds[start:end]
        count = min(int(np.isfinite(total).sum()), case.num_candidates)
        what = f"beam_scores: group {group}"
        ids = np.stack([rows[group], tokens[group]])
        assert (ids[:, count:] == -1).all(), f"{what}: no -1 at the end"
        assert np.isneginf(best[group, count:]).all(), f"{what}: no -inf at the end"
        assert (ids[:, :count] >= 0).all(), f"{what}: fewer than {count} candidates"
        chosen = tuple(ids[:, :count])
        assert len(set(zip(*(x.tolist() for x in chosen)))) == count, f"{what}: a candidate twice"
        assert_within(best[group, :count], total[chosen], bound[chosen], what, ("place",))
        keys = list(zip(-best[group, :count], *chosen))
        assert keys == sorted(keys), f"{what}: out of order"
        left = np.ones_like(total, bool)
        left[chosen] = False
        if count == case.num_candidates and left.any():
            worst = total[chosen].min()
            assert (total - bound)[left].max() <= worst + bound.max(), f"{what}: a better one was left out"


def groups_do_not_depend_on_company(backend: Backend, case: Beams) -> None:
    """A group of beams gives the same bits alone."""
    assume_supported(backend, case.logits.dtype)
    case = dense(case)
    arrays = (case.logits, case.scores, case.cu_beams)
    full = call(backend, "beam_scores", *arrays, num_candidates=case.num_candidates)
    for group, (start, end) in enumerate(pairwise(case.cu_beams.tolist())):
        own = (case.logits[start:end], case.scores[start:end], np.array([0, end - start], np.int32))
        alone = call(backend, "beam_scores", *own, num_candidates=case.num_candidates)
        same = all(same_bits(a[group : group + 1].copy(), b.copy()) for a, b in zip(full, alone))
        assert same, f"beam_scores: group {group} alone differs"


# ---- verify -----------------------------------------------------------------------------------------------------


def verify_is_rejection_sampling(backend: Backend, case: Drafted) -> None:
    """Each draft is accepted iff its uniform number is below target / draft; the token after is the Gumbel-max draw
    from the residual or from the last row, each with the numbers of its own position and purpose; up to rounding."""
    assume_supported(backend, case.target_probs.dtype)
    accepted, tokens = call(backend, "verify", *case.args())
    assert (accepted.dtype, tokens.dtype) == (np.int32, np.int64), f"verify: {accepted.dtype}, {tokens.dtype}"
    assert accepted.shape == tokens.shape == case.seeds.shape, f"verify: shapes {accepted.shape}, {tokens.shape}"
    u = unit(case.target_probs)
    for seq in range(len(case.seeds)):
        one = case.seq(seq)
        target, drafts = one.target_probs.astype(np.float64), one.draft_tokens
        vocab_size = target.shape[1]
        if one.draft_probs is None:
            draft = np.eye(vocab_size)[drafts]
        else:
            draft = one.draft_probs.astype(np.float64)

        def numbers(op: str, offset: int, purpose: int, count: int, one: Drafted = one) -> np.ndarray:
            named = (one.seeds, one.positions + np.int32(offset), one.sample_indices)
            return call(backend, op, *named, purpose=purpose, num_draws=count)[0].astype(np.float64)

        for i, token in enumerate(drafts[: accepted[seq] + 1]):
            uniform = numbers("random_uniform", i, PURPOSE_ACCEPT, 1)[0]
            slack = 4 * u * target[i, token]
            excess = target[i, token] - uniform * draft[i, token]
            if i < accepted[seq]:
                assert excess >= -slack, f"verify: sequence {seq} accepts draft {i}"
                assert target[i, token] > 0, f"verify: sequence {seq} accepts draft {i}, which the target excludes"
            else:
                assert excess <= slack, f"verify: sequence {seq} rejects draft {i}"
        at = int(accepted[seq])
        weights, purpose = target[at], PURPOSE_DRAW
        doubt = np.zeros(vocab_size)
        if at < len(drafts):
            residual = np.maximum(target[at] - draft[at], 0)
            doubt = u * np.maximum(target[at], draft[at])
            weights, purpose = (residual if (residual > doubt).any() else target[at]), PURPOSE_RESAMPLE
        noise = numbers("random_gumbel", at, purpose, vocab_size)
        with np.errstate(divide="ignore"):
            noisy, least = np.log(weights) + noise, np.log(np.maximum(weights - doubt, 0)) + noise
            most = np.log(weights + doubt) + noise
        token = tokens[seq]
        assert most[token] > -np.inf, f"verify: sequence {seq} gave token {token}, which is excluded"
        margin = least.max() - most[token]
        assert margin <= 64 * u + 2.0**-20, f"verify: sequence {seq} gave {token}, not {noisy.argmax()}: {margin}"


def greedy_targets_accept_the_greedy_prefix(backend: Backend, case: Drafted) -> None:
    """With one-hot target rows the result is greedy decoding: the drafts that are greedy, up to the first that is not,
    and then the greedy token."""
    assume_supported(backend, case.target_probs.dtype)
    accepted, tokens = call(backend, "verify", *case.args())
    for seq in range(len(case.seeds)):
        one = case.seq(seq)
        greedy = one.target_probs.astype(np.float64).argmax(axis=1)
        agree = one.draft_tokens == greedy[:-1]
        count = len(agree) if agree.all() else int(agree.argmin())
        assert accepted[seq] == count, f"verify: sequence {seq} accepted {accepted[seq]} of {count} greedy drafts"
        assert tokens[seq] == greedy[count], f"verify: sequence {seq} gave {tokens[seq]}, greedy is {greedy[count]}"


def own_drafts_are_all_accepted(backend: Backend, case: Drafted) -> None:
    """Drafts from the target's own distributions are accepted, every one."""
    assume_supported(backend, case.target_probs.dtype)
    row_of_draft = np.arange(len(case.draft_tokens)) + np.repeat(np.arange(len(case.seeds)), np.diff(case.cu_drafts))
    draft_probs = case.target_probs[row_of_draft]
    tokens = draft_probs.astype(np.float64).argmax(axis=1)
    accepted, _ = call(backend, "verify", case.target_probs, draft_probs, tokens, *case.args()[3:])
    assert accepted.tolist() == np.diff(case.cu_drafts).tolist(), f"verify: accepted only {accepted}"


def without_drafts_is_sample(backend: Backend, case: Sampling) -> None:
    """A sequence without drafts draws the token that `sample` draws at that position from the same distribution."""
    assume_supported(backend, case.logits.dtype)
    filtered = call(backend, "filter_logits", *case.filtering().args())
    shifted = np.exp(filtered.astype(np.float64))
    probs = (shifted / shifted.sum(axis=1, keepdims=True)).astype(filtered.dtype)
    num_rows = len(probs)
    named = (case.seeds, case.positions, case.sample_indices)
    none = (np.empty(0, np.int64), np.zeros(num_rows + 1, np.int32))
    accepted, tokens = call(backend, "verify", probs, None, *none, *named)
    assert not accepted.any(), f"verify: {accepted} accepted of no drafts"
    sampled = call(backend, "sample", *case.args())
    noise = call(backend, "random_gumbel", *named, purpose=PURPOSE_DRAW, num_draws=probs.shape[1])
    for row in np.flatnonzero(tokens != sampled):
        noisy = filtered[row].astype(np.float64) + noise[row]
        margin = abs(noisy[tokens[row]] - noisy[sampled[row]])
        assert margin < 2.0**-19, f"verify without drafts: row {row} gave {tokens[row]}, sample {sampled[row]}"


def sequences_do_not_depend_on_company(backend: Backend, case: Drafted) -> None:
    """A sequence alone is verified as in the batch."""
    assume_supported(backend, case.target_probs.dtype)
    accepted, tokens = call(backend, "verify", *case.args())
    for seq in range(len(case.seeds)):
        alone = tuple(x.item() for x in call(backend, "verify", *case.seq(seq).args()))
        assert alone == (accepted[seq], tokens[seq]), f"verify: sequence {seq} alone gave {alone}"


def what_comes_out_is_the_target(
    backend: Backend,
    target: np.ndarray,
    draft: np.ndarray | None,
    draft_tokens: Callable[[int, int], np.ndarray],
    num_seqs: int | None = None,
) -> None:
    """Speculation is lossless: whatever the drafts, the token emitted at each offset, among the sequences that get as
    far, is distributed as the target's row there; and as many are accepted as the distributions have in common.

    Args:
        target: One sequence's rows, [num_drafts + 1, vocab_size]; every sequence has the same.
        draft: The drafts' distributions, [num_drafts, vocab_size], or None for certain drafts.
        draft_tokens: Of (offset, num_seqs), tokens drawn from ``draft[offset]`` (or fixed).
    """
    num_drafts, vocab_size, num_seqs = len(target) - 1, target.shape[1], num_seqs or many(backend)
    drafts = np.stack([draft_tokens(i, num_seqs) for i in range(num_drafts)], axis=1).astype(np.int64)
    accepted, last = call(
        backend,
        "verify",
        np.tile(target, (num_seqs, 1)),
        None if draft is None else np.tile(draft, (num_seqs, 1)),
        drafts.ravel(),
        np.arange(num_seqs + 1, dtype=np.int32) * num_drafts,
        np.arange(num_seqs),
        np.full(num_seqs, 5, np.int32),
        np.zeros(num_seqs, np.int32),
    )
    emitted = np.column_stack([drafts, last])
    emitted[np.arange(num_seqs), accepted] = last
    for offset in range(num_drafts + 1):
        reached = accepted >= offset
        counts = np.bincount(emitted[reached, offset], minlength=vocab_size)
        frequencies_follow(counts, target[offset].astype(np.float64), f"verify, offset {offset}")
        if offset < num_drafts and draft is not None:
            in_common = np.minimum(target[offset], draft[offset]).sum(dtype=np.float64)
            outcome = np.array([(accepted > offset).sum(), (accepted == offset).sum()])
            common = np.array([in_common, max(1 - in_common, 0.0)])
            frequencies_follow(outcome, np.where(common < 1e-6, 0, common), f"verify, acceptance at {offset}")


# ---- lookup -----------------------------------------------------------------------------------------------------


def lookup_by_hand(tokens: Sequence[int], max_ngram: int, min_ngram: int, num_draft: int) -> list[int]:
    """The search as one would say it: the longest suffix first, and its occurrences from the latest on."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[len(tokens) - n :]:
                return list(tokens[start + n :][:num_draft])
    return []


def lookup_is_the_obvious_search(backend: Backend, history: np.ndarray, lengths: np.ndarray, **options: Any) -> None:
    """Every sequence's drafts are those of the slow search, then -1; what lies beyond its length changes nothing."""
    got = call(backend, "lookup", history, lengths, **options)
    assert got.dtype == np.int32, f"lookup: dtype {got.dtype}"
    for seq, length in enumerate(lengths):
        expected = lookup_by_hand(history[seq, :length].tolist(), **options)
        expected += [-1] * (options["num_draft"] - len(expected))
        assert got[seq].tolist() == expected, f"lookup: sequence {seq} gave {got[seq]}, not {expected}"
    garbage = history.copy()
    garbage[np.arange(history.shape[1]) >= lengths[:, None]] = -7
    assert same_bits(call(backend, "lookup", garbage, lengths, **options), got), "lookup: reads beyond a length"
