"""Penalties, filters, draws and log-probabilities: their equations, their laws, and transformers' own filters."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fast
import reference
from fast.sampling import _draw, _filter, _keys, _threshold
from reference.numerics.philox import PURPOSE_DRAW
from twofold.conformance.properties import sampling as properties
from twofold.conformance.properties.numerics import call, refuses
from twofold.conformance.strategies import sampling as inputs
from twofold.conformance.strategies.sampling import Filtering, Penalties, Sampling


def one_row(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    values = zip((temperature, top_k, top_p, min_p), (np.float32, np.int32, np.float32, np.float32))
    return Filtering(np.array([logits], np.float32), *(np.array([value], dtype) for value, dtype in values))


# ---- penalize ---------------------------------------------------------------------------------------------------


@given(case=inputs.penalties())
def test_penalties_are_the_equations(backend, case):
    properties.penalties_are_the_equations(backend, case)


@given(case=inputs.penalties())
def test_penalties_do_not_depend_on_company(backend, case):
    properties.rows_do_not_depend_on_company(backend, "penalize", case)


@given(case=inputs.penalties())
def test_penalties_write_to_out(backend, case):
    properties.writes_to_out(backend, "penalize", case)


def test_repetition_is_as_in_transformers():
    rng = np.random.default_rng(0)
    logits, history = rng.normal(size=(3, 50)).astype(np.float32), rng.integers(0, 50, (3, 20)).astype(np.int32)
    ids, scores = cast(Any, torch.from_numpy(history).long()), cast(Any, torch.from_numpy(logits))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, scores)
    penalty, nothing, none = (np.full(3, x, np.float32) for x in (1.3, 0, 0))
    no_bias = np.empty((3, 0), np.int32), np.empty((3, 0), np.float32)
    ours = reference.penalize(logits, history, np.full(3, 12, np.int32), penalty, nothing, none, *no_bias)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2**-23, err_msg="repetition penalty")


# ---- filter_logits ----------------------------------------------------------------------------------------------


@given(case=inputs.filterings())
@settings(max_examples=100)
def test_filters_keep_what_they_say(backend, case):
    properties.filters_keep_what_they_say(backend, case)


@given(case=inputs.filterings())
def test_filters_do_not_depend_on_company(backend, case):
    properties.rows_do_not_depend_on_company(backend, "filter_logits", case)


@given(case=inputs.filterings())
def test_filters_write_to_out(backend, case):
    properties.writes_to_out(backend, "filter_logits", case)


def test_filters_that_are_off_exclude_nothing(backend):
    """Not even tokens so unlikely that adding them changes no sum."""
    case = one_row(np.linspace(0, -80, 50))
    assert np.isfinite(call(backend, "filter_logits", *case.args())).all(), "a token is excluded by no filter"


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(0.7, 0, 1.0, 0.0), (1.0, 40, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.1), (0.8, 30, 0.7, 0.02)],
)
def test_filters_are_those_of_transformers(temperature, top_k, top_p, min_p):
    """On logits without ties their warpers, put in our order, keep the same tokens with the same probabilities."""
    logits = np.random.default_rng(1).normal(scale=3, size=(4, 5000)).astype(np.float32)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    theirs += [MinPLogitsWarper(min_p)] if min_p else []
    theirs += [TopKLogitsWarper(top_k)] if top_k else []
    theirs += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    no_ids, scores = cast(Any, torch.zeros(4, 1, dtype=torch.long)), cast(Any, torch.from_numpy(logits.copy()))
    expected = theirs(no_ids, scores).softmax(1).numpy()
    types = (np.float32, np.int32, np.float32, np.float32)
    parameters = [np.full(4, x, t) for x, t in zip((temperature, top_k, top_p, min_p), types)]
    ours = reference.filter_logits(logits, *parameters)
    probs = np.exp(ours) / np.exp(ours).sum(axis=1, keepdims=True)
    assert ((probs > 0) == (expected > 0)).all(), "other tokens are kept"
    np.testing.assert_allclose(probs, expected, rtol=2**-16, err_msg="probabilities")


def test_filters_that_keep_few_and_many(backend):
    """From a token or two to half of the row: what is kept is found in several ways."""
    spread, top_k, top_p, min_p = zip(
        (2.0, 3, 0.7, 0.0), (20.0, 20, 1.0, 0.0), (8.0, 20, 0.9, 0.0), (2.0, 20, 0.7, 0.02), (0.3, 50, 0.95, 0.0),
        (1.5, 0, 0.2, 0.0), (2.0, 0, 0.3, 0.0), (2.5, 0, 0.4, 0.0), (3.0, 0, 0.5, 0.0), (8.0, 0, 0.95, 0.0),
        (1.0, 200, 0.7, 0.02), (2.0, 0, 0.95, 0.02),
    )  # fmt: skip
    logits = np.random.default_rng(6).normal(size=(len(spread), 600)) * np.array(spread)[:, None]
    filters = zip((np.ones_like(spread), top_k, top_p, min_p), (np.float32, np.int32, np.float32, np.float32))
    case = Filtering(logits.astype(np.float32), *(np.array(values, dtype) for values, dtype in filters))
    properties.filters_keep_what_they_say(backend, case)


@pytest.mark.needs("interpreter")  # where steps of a kernel can be counted, and the sizes that decide are small
@pytest.mark.parametrize(
    ("spread", "temperature", "top_k", "top_p", "min_p", "steps"),
    [
        (3.0, 0.0, 5, 0.5, 0.5, ""),  # greedy
        (3.0, 1.0, 0, 1.0, 0.0, ""),  # no filter
        (3.0, 1.0, 300, 1.0, 0.0, ""),  # one that excludes nothing
        (3.0, 1.0, 1, 1.0, 0.0, "head gather"),
        (3.0, 1.0, 5, 0.9, 0.0, "head gather"),
        (3.0, 1.0, 0, 1.0, 0.5, "head gather"),  # what passes min-p is in the head
        (3.0, 1.0, 0, 0.9, 0.5, "mass head gather"),
        (9.0, 1.0, 0, 0.5, 0.0, "mass head gather"),  # what top-p keeps is in the head
        (2.0, 1.0, 0, 0.2, 0.0, "mass head gather"),
        (0.3, 1.0, 0, 0.9, 0.0, "mass head full"),  # it cannot be: nobody looks
        (1.0, 1.0, 100, 0.9, 0.0, "head gather full"),  # too many candidates
        (0.0, 1.0, 0, 0.3, 0.0, "mass head gather full"),  # of equal chunks all are the best
    ],
)
def test_a_threshold_costs_what_it_must(monkeypatch, spread, temperature, top_k, top_p, min_p, steps):
    """The mass of a row, its head and all of it are looked at where the filters and the logits ask for that."""
    taken = []

    def noted(module, name, step):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: taken.append(step) or kernel(*arguments))

    noted(_filter, "row_mass", "mass")
    noted(_filter, "head_threshold", "head")
    noted(_threshold, "gather_best", "gather")
    noted(_filter, "full_threshold", "full")
    case = one_row(np.random.default_rng(5).normal(scale=spread, size=300), temperature, top_k, top_p, min_p)
    properties.filters_keep_what_they_say(fast, case)
    assert " ".join(taken) == steps


def test_more_equals_than_a_head_holds(backend):
    """Of 300 best tokens all are kept, by top-k and by top-p, and of the 300 next ones none."""
    logits = np.repeat(np.array([1, 0], np.float32), 300)
    rows = [one_row(logits, top_k=1), one_row(logits, top_k=300), one_row(logits, top_p=0.1)]
    case = Filtering(*(np.concatenate(arrays) for arrays in zip(*(row.args() for row in rows))))
    kept = np.isfinite(call(backend, "filter_logits", *case.args()))
    assert kept.tolist() == [[True] * 300 + [False] * 300] * 3, f"kept {kept.sum(axis=1)} of 300 equals"


@pytest.mark.needs("interpreter")
def test_a_search_takes_few_steps(monkeypatch):
    """Far fewer than halving, which takes 32; and none once a count is what was asked for."""
    guesses, counts, guess, count = [], [], _keys.first_guess, _keys.count_from

    def counted(*arguments):
        counts.append(int(count(*arguments).handle.data.item()))
        return count(*arguments)

    monkeypatch.setattr(_keys, "first_guess", lambda *arguments: guesses.append(0) or guess(*arguments))
    monkeypatch.setattr(_keys, "count_from", counted)
    logits = np.random.default_rng(5).normal(20, size=300)
    call(fast, "filter_logits", *one_row(logits, top_k=100).args())
    assert counts.index(100) == len(counts) - 1, f"the 100th is found at a count of 100, not of {counts}"
    assert len(counts) <= 12, f"{len(counts)} passes over the row"
    assert len(guesses) - len(counts) <= 8, f"{len(guesses) - len(counts)} steps in the head"


# ---- sample -----------------------------------------------------------------------------------------------------


@given(case=inputs.samplings())
@settings(max_examples=100)
def test_sample_is_the_noisy_maximum(backend, case):
    properties.sample_is_the_noisy_maximum(backend, case)


@pytest.mark.interpreted(8)
@given(case=inputs.samplings())
@settings(max_examples=200)
def test_a_row_alone_draws_as_in_any_batch(backend, case):
    properties.rows_do_not_depend_on_company(backend, "sample", case)


@given(case=inputs.samplings())
@settings(max_examples=200)
def test_top_k_1_is_greedy(backend, case):
    properties.top_k_1_is_greedy(backend, case)


@given(case=inputs.samplings())
@settings(max_examples=200)
def test_cold_is_greedy(backend, case):
    properties.cold_is_greedy(backend, case)


LOGITS = [2.0, 0.0, 1.0, 1.0, -np.inf, -3.0, 0.5, 1.5, -1.0, -0.5]


PEAKED = [5.0] + [0.0] * 150  # a rare token among very rare ones


@pytest.mark.parametrize(
    ("row", "varied"),
    [
        *((one_row(LOGITS), varied) for varied in ("seeds", "positions", "sample_indices")),
        (one_row(LOGITS, temperature=2.5), "positions"),
        (one_row(LOGITS, top_k=4, top_p=0.8), "positions"),
        (one_row([0.0] * 40), "positions"),
        (one_row(PEAKED), "positions"),
    ],
    ids=["by seed", "by position", "by sample", "hot", "filtered", "flat", "peaked"],
)
def test_draws_follow_the_softmax(backend, row, varied):
    properties.draws_follow_the_softmax(backend, row, varied)


@pytest.mark.needs("interpreter")  # the sizes at which a way is left are small only there
@pytest.mark.parametrize(
    ("spread", "temperature", "top_k", "top_p", "min_p", "way"),
    [
        (3.0, 0.0, 0, 1.0, 0.0, "DONE"),  # greedy
        (3.0, 1.0, 0, 1.0, 0.0, "DONE"),  # without filters
        (3.0, 1.0, 5, 0.9, 0.0, "DONE"),  # a head whose candidates are compared in pairs
        (0.5, 1.0, 18, 0.9, 0.0, "DONE"),  # a head that is bisected
        (9.0, 1.0, 0, 0.5, 0.0, "DONE"),  # top-p inside the head
        (0.3, 1.0, 0, 0.6, 0.0, "WEIGH"),  # a frontier to be weighed
        (0.3, 1.0, 0, 0.6, 0.7, "WEIGH"),
        (0.3, 1.0, 0, 1.0, 0.7, "DONE"),  # a frontier of which the first is taken
        (1.0, 1.0, 100, 0.9, 0.0, "SEARCH"),  # too many candidates
    ],
)
def test_every_way_to_a_token_is_taken(monkeypatch, spread, temperature, top_k, top_p, min_p, way):
    """Which way a row takes depends on its filters and its logits; each gives the reference's token."""
    ways = []

    class Watched:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                plan = next(x for x in arguments if isinstance(x, torch.Tensor) and x.shape[1:] == (_draw.PLAN_WIDTH,))
                ways.extend(plan[:, 0].tolist())
                return finish[grid](*arguments, **options)

            return launch

    finish = _draw._finish_kernel
    monkeypatch.setattr(_draw, "_finish_kernel", Watched())
    logits = np.random.default_rng(5).normal(scale=spread, size=(3, 300)).astype(np.float32)
    filters = [(temperature, np.float32), (top_k, np.int32), (top_p, np.float32), (min_p, np.float32)]
    case = Sampling(
        logits,
        *(np.full(3, value, dtype) for value, dtype in filters),
        seeds=np.arange(3),
        positions=np.zeros(3, np.int32),
        sample_indices=np.zeros(3, np.int32),
    )
    tokens = call(fast, "sample", *case.args())
    assert tokens.tolist() == reference.sample(*case.args()).tolist(), f"other tokens by way of {ways}"
    assert getattr(_draw, way).value in ways, f"went by way of {ways}"


def test_a_frontier_of_any_length(backend):
    """Tokens whose logits rise as their noise falls: whichever of them top-p keeps first is drawn."""
    names = np.full(12, 7), np.zeros(12, np.int32), np.zeros(12, np.int32)
    noise = reference.random_gumbel(*(name[:1] for name in names), purpose=PURPOSE_DRAW, num_draws=300)[0]
    by_noise = np.argsort(-noise)
    logits = np.full(300, -0.05)
    logits[by_noise[:12]] = 1e-3 * np.arange(12)
    logits[by_noise[-100:]] = 0.05  # more than a head holds, and all of them kept
    mass = np.exp(logits)
    better = np.array([mass[logits > logits[token]].sum() for token in by_noise[:12]])
    top_p = ((better + 0.5) / mass.sum()).astype(np.float32)  # keeps this token, and not the one before
    filters = np.ones(12, np.float32), np.zeros(12, np.int32), top_p, np.zeros(12, np.float32)
    tokens = call(backend, "sample", np.tile(logits.astype(np.float32), (12, 1)), *filters, *names)
    assert tokens.tolist() == by_noise[:12].tolist(), f"drew {tokens}, and the first ones kept are {by_noise[:12]}"


# ---- log_probs --------------------------------------------------------------------------------------------------


@st.composite
def log_prob_cases(draw):
    logits = draw(inputs.logit_rows(draw(st.integers(0, 4), label="num_rows")))
    last = logits.shape[1] - 1
    token_ids = inputs.integers(draw, st.integers(0, last), len(logits), "token_ids", np.int64)
    return logits, token_ids, draw(st.sampled_from([0, 1, min(5, last + 1), last + 1]), label="num_top")


@given(case=log_prob_cases())
def test_log_probs_are_the_logarithms(backend, case):
    properties.log_probs_are_the_logarithms(backend, *case)


def test_log_probs_of_rows_of_several_tiles(backend):
    """Tokens in the first tile, the last and between; the best anywhere, some of them equal."""
    logits = np.round(np.random.default_rng(0).normal(scale=3, size=(4, 700)), 1).astype(np.float32)
    properties.log_probs_are_the_logarithms(backend, logits, np.array([0, 699, 300, 511]), 9)


# ---- what is refused --------------------------------------------------------------------------------------------

GOOD_SAMPLING = {
    "logits": np.zeros((2, 5), np.float32),
    "temperature": np.ones(2, np.float32),
    "top_k": np.zeros(2, np.int32),
    "top_p": np.ones(2, np.float32),
    "min_p": np.zeros(2, np.float32),
    "seeds": np.arange(2),
    "positions": np.zeros(2, np.int32),
    "sample_indices": np.zeros(2, np.int32),
}
BAD_SAMPLING = [
    ("temperature", [1.0, -0.1]),
    ("temperature", [1.0, np.nan]),
    ("temperature", [np.inf, 1.0]),
    ("top_k", [0, -1]),
    ("top_p", [1.0, 0.0]),
    ("top_p", [1.0, 1.01]),
    ("top_p", [np.nan, 1.0]),
    ("min_p", [0.0, -0.1]),
    ("min_p", [1.5, 0.0]),
    ("logits", [[0.0] * 5, [-np.inf] * 5]),
    ("logits", [[0.0] * 5, [0.0, np.nan, 0, 0, 0]]),
    ("logits", [[0.0] * 5, [0.0, 0, np.inf, 0, 0]]),
    ("logits", [0.0, 0.0]),
    ("logits", [[], []]),
    ("temperature", [1.0]),
    ("top_k", [[0, 0]]),
    ("seeds", [1, 2, 3]),
    ("positions", [0, -1]),
    ("sample_indices", [-1, 0]),
]


@pytest.mark.parametrize(("argument", "values"), BAD_SAMPLING)
def test_refuses_bad_sampling(backend, argument, values):
    bad = GOOD_SAMPLING | {argument: np.array(values, GOOD_SAMPLING[argument].dtype)}
    refuses(backend, "sample", argument, *bad.values())
    if argument in list(bad)[:5]:
        refuses(backend, "filter_logits", argument, *list(bad.values())[:5])


@pytest.mark.parametrize("argument", list(GOOD_SAMPLING))
def test_refuses_other_dtypes(backend, argument):
    good = GOOD_SAMPLING[argument]
    other = good.astype(np.int64 if good.dtype == np.float32 else np.int16)
    refuses(backend, "sample", argument, *(GOOD_SAMPLING | {argument: other}).values())


def test_names_the_row(backend):
    logits = np.zeros((3, 4), np.float32)
    logits[1] = -np.inf
    case = Sampling(logits, *(np.resize(x, 3) for x in list(GOOD_SAMPLING.values())[1:]))
    refuses(backend, "sample", "row 1", *case.args())
    refuses(backend, "log_probs", "row 1", logits, np.zeros(3, np.int64), num_top=1)
    history = GOOD_PENALTIES["history"] + np.array([[0, 0, 0], [0, 0, 9]], np.int32)
    refuses(backend, "penalize", "row 1", *(GOOD_PENALTIES | {"history": history}).values())


@pytest.mark.parametrize("argument", ["positions", "sample_indices"])
def test_names_of_draws_are_checked_for_greedy_rows_too(backend, argument):
    greedy = GOOD_SAMPLING | {"temperature": np.zeros(2, np.float32), argument: np.array([0, -1], np.int32)}
    refuses(backend, "sample", argument, *greedy.values())


GOOD_PENALTIES = {
    "logits": np.zeros((2, 5), np.float32),
    "history": np.array([[0, 4, 4], [1, -1, -1]], np.int32),
    "prompt_lens": np.array([2, 1], np.int32),
    "repetition_penalty": np.ones(2, np.float32),
    "presence_penalty": np.ones(2, np.float32),
    "frequency_penalty": np.ones(2, np.float32),
    "bias_ids": np.array([[0, 1], [-1, -1]], np.int32),
    "bias_values": np.zeros((2, 2), np.float32),
}
BAD_PENALTIES = [
    ("logits", [0.0, 0.0]),
    ("history", [[0, 5], [0, 0]]),
    ("history", [[0, -2], [0, 0]]),
    ("history", [0, 1]),
    ("prompt_lens", [4, 0]),
    ("prompt_lens", [0, -1]),
    ("repetition_penalty", [1.0, 0.0]),
    ("repetition_penalty", [1.0, np.nan]),
    ("repetition_penalty", [1.0, np.inf]),
    ("presence_penalty", [np.nan, 0.0]),
    ("frequency_penalty", [np.inf, 0.0]),
    ("frequency_penalty", [0.0]),
    ("bias_ids", [0, 1]),
    ("bias_ids", [[0, 5], [0, 1]]),
    ("bias_ids", [[0, 0], [0, 1]]),
    ("bias_values", [[np.nan, 0.0], [0, 0]]),
    ("bias_values", [[0.0, np.inf], [0, 0]]),
    ("bias_values", [[0.0], [0.0]]),
]


@pytest.mark.parametrize(("argument", "values"), BAD_PENALTIES)
def test_refuses_bad_penalties(backend, argument, values):
    bad = GOOD_PENALTIES | {argument: np.array(values, GOOD_PENALTIES[argument].dtype)}
    refuses(backend, "penalize", argument, *bad.values())


@pytest.mark.parametrize("argument", list(GOOD_PENALTIES))
def test_penalize_refuses_other_dtypes(backend, argument):
    good = GOOD_PENALTIES[argument]
    other = good.astype(np.int64)
    refuses(backend, "penalize", argument, *(GOOD_PENALTIES | {argument: other}).values())


def test_log_probs_refuses_bad_ids_and_counts(backend):
    logits, ids = np.zeros((2, 5), np.float32), np.zeros(2, np.int64)
    refuses(backend, "log_probs", "token_ids", logits, ids - 1, num_top=1)
    refuses(backend, "log_probs", "token_ids", logits, ids + 5, num_top=1)
    refuses(backend, "log_probs", "token_ids", logits, ids[:1], num_top=1)
    refuses(backend, "log_probs", "token_ids", logits, ids.astype(np.int32), num_top=1)
    refuses(backend, "log_probs", "num_top", logits, ids, num_top=6)
    refuses(backend, "log_probs", "num_top", logits, ids, num_top=-1)


OUT_OF_RANGE = [5, -2, 2**31 - 1, -(2**31)]


def test_ids_out_of_range_are_none_where_nobody_looks(monkeypatch):
    """As an engine runs: `fast` does not look at ids, and passes over those that no token has."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    two = np.full(2, 2, np.float32)
    some = {"logits": np.array([[1, -1, 2, -2, 3]] * 2, np.float32), "prompt_lens": np.zeros(2, np.int32)}
    some |= {f"{name}_penalty": two for name in ("repetition", "presence", "frequency")}
    some["bias_values"] = np.ones((2, 6), np.float32)
    results = []
    for bad in (OUT_OF_RANGE, [-1] * 4):
        ids = np.array([[1, *bad, 4], [*bad, 4, 4]], np.int32)
        case = Penalties(**some, history=ids, bias_ids=np.array([[*bad, 0, 2], [3, *bad, 1]], np.int32))
        results.append(call(fast, "penalize", *case.args()))
    assert results[0].tolist() == results[1].tolist(), "an id that is out of range is not as good as none"
    ids = np.array([3, *OUT_OF_RANGE, 2**40])
    logprob, rank, _, _ = call(fast, "log_probs", np.tile(some["logits"][0], (6, 1)), ids, num_top=1)
    assert np.isfinite(logprob).tolist() == [True] + [False] * 5, f"log-probabilities {logprob} of tokens {ids}"
    assert rank.tolist() == [5] + [6] * 5, f"ranks {rank} of tokens {ids}"


def test_a_history_of_nothing_changes_nothing(backend):
    """No history columns, no biases, penalties on: the logits come back."""
    logits = np.array([[1.0, -2.0]], np.float32)
    two, none = np.full(1, 2, np.float32), np.empty((1, 0), np.int32)
    case = Penalties(logits, none, np.zeros(1, np.int32), two, two, two, none, none.astype(np.float32))
    assert call(backend, "penalize", *case.args()).tolist() == logits.tolist(), "penalize without a history"


def test_refuses_a_wrong_out(backend):
    cases = (("filter_logits", list(GOOD_SAMPLING.values())[:5]), ("penalize", list(GOOD_PENALTIES.values())))
    for op, arrays in cases:
        refuses(backend, op, "out", *arrays, out=np.zeros((2, 4), np.float32))
        refuses(backend, op, "out", *arrays, out=np.zeros((2, 5), np.float64))
