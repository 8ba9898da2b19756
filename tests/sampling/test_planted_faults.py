"""The properties are tested: sampling with a known fault is caught by them, and without it is not."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings

import reference
from twofold.conformance.properties import sampling as properties
from twofold.conformance.strategies import sampling as inputs

# ---- faults: each takes the right op and its arguments --------------------------------------------------------------


def counts_the_prompt(op, logits, history, prompt_lens, *rest, **options):
    return op(logits, history, np.zeros_like(prompt_lens), *rest, **options)


def penalizes_twice_where_it_is_negative(op, logits, history, prompt_lens, repetition, *rest, **options):
    return op(
        logits, history, prompt_lens, np.where((logits < 0).all(axis=1), repetition**2, repetition), *rest, **options
    )


def ignores_the_bias(op, *arguments, **options):
    *rest, bias_ids, bias_values = arguments
    return op(*rest, bias_ids, np.zeros_like(bias_values), **options)


def keeps_one_more(op, logits, temperature, top_k, *rest, **options):
    return op(logits, temperature, np.where((top_k > 0) & (top_k < 2**20), top_k + 1, top_k), *rest, **options)


def filters_before_the_temperature(op, logits, temperature, top_k, top_p, min_p, **options):
    kept = op(logits, np.ones_like(temperature), top_k, top_p, min_p)
    scaled = op(logits, temperature, np.zeros_like(top_k), np.ones_like(top_p), np.zeros_like(min_p))
    return np.where(np.isneginf(kept), kept, scaled)


def takes_top_p_for_min_p(op, logits, temperature, top_k, top_p, min_p, **options):
    return op(logits, temperature, top_k, np.ones_like(top_p), np.where(top_p < 1, 1 - top_p, min_p), **options)


def uses_the_first_rows_filters(op, logits, temperature, top_k, top_p, min_p, *rest, **options):
    first = (np.full_like(x, x[0]) if len(x) else x for x in (temperature, top_k, top_p, min_p))
    return op(logits, *first, *rest, **options)


def draws_by_position_alone(op, *arguments):
    *rest, seeds, positions, sample_indices = arguments
    return op(*rest, np.zeros_like(seeds), positions, sample_indices)


def every_sample_is_the_first(op, *arguments):
    return op(*arguments[:-1], np.zeros_like(arguments[-1]))


def returns_the_second_best(op, logits, *rest):
    best = op(logits, *rest)
    return (best + 1) % max(1, logits.shape[1])


def accepts_all(op, target_probs, draft_probs, draft_tokens, cu_drafts, *rest):
    _, tokens = op(target_probs, draft_probs, draft_tokens, cu_drafts, *rest)
    return np.diff(cu_drafts).astype(np.int32), tokens


def draws_from_the_target_after_a_rejection(op, target_probs, draft_probs, *rest):
    accepted, _ = op(target_probs, draft_probs, *rest)
    uniform = np.full_like(target_probs[: len(rest[0])], 1 / target_probs.shape[1])
    _, tokens = op(target_probs, uniform, *rest)
    return accepted, tokens


FAULTS = {
    ("penalize", properties.penalties_are_the_equations, inputs.penalties): [
        counts_the_prompt,
        penalizes_twice_where_it_is_negative,
        ignores_the_bias,
    ],
    ("filter_logits", properties.filters_keep_what_they_say, inputs.filterings): [
        keeps_one_more,
        filters_before_the_temperature,
        takes_top_p_for_min_p,
        uses_the_first_rows_filters,
    ],
    ("sample", properties.sample_is_the_noisy_maximum, inputs.samplings): [
        keeps_one_more,
        uses_the_first_rows_filters,
        draws_by_position_alone,
        every_sample_is_the_first,
        returns_the_second_best,
    ],
    ("verify", properties.verify_is_rejection_sampling, inputs.drafted): [
        accepts_all,
        draws_from_the_target_after_a_rejection,
    ],
}
EVERY = [(*where, fault) for where, faults in FAULTS.items() for fault in faults]


def with_fault(op: str, fault) -> SimpleNamespace:
    """The reference, but for one op."""
    names = {name: getattr(reference, name) for name in reference.__all__}
    return SimpleNamespace(**names | {op: lambda *a, **options: fault(names[op], *a, **options)})


def is_caught(strategy, check, backend) -> bool:
    """Whether some drawn case fails the property."""

    @settings(max_examples=200, phases=[Phase.generate], report_multiple_bugs=False, derandomize=True)
    @given(strategy())
    def judge(case):
        check(backend, case)

    try:
        judge()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(("op", "check", "strategy", "fault"), EVERY, ids=lambda x: getattr(x, "__name__", str(x)))
def test_is_caught(op, check, strategy, fault):
    """Each fault fails its property somewhere."""
    assert is_caught(strategy, check, with_fault(op, fault))


@pytest.mark.parametrize(("op", "check", "strategy"), FAULTS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_without_a_fault_nothing_is_caught(op, check, strategy):
    """What the faults are planted in is right."""
    assert not is_caught(strategy, check, with_fault(op, lambda op, *a, **options: op(*a, **options)))
