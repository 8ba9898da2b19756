"""Paged attention: the oracle's attention, wherever the tokens lie and however the work is cut."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.conformance.properties import attention as properties
from twofold.conformance.strategies.attention import COUNTED_FEATURES, paged_cases

laws = settings(max_examples=200)


@given(case=paged_cases())
def test_matches_the_oracle(backend, case):
    """Every element is within the rule, whatever lies in slots that nobody owns."""
    properties.paged_matches_oracle(backend, case)


@given(case=paged_cases())
def test_merged_split_matches_the_oracle(backend, case):
    """Attention over ranges of tokens, merged (a sink as one more part), is within the rule."""
    properties.merged_split_matches_oracle(backend, case)


@given(case=paged_cases())
def test_split_parts_are_partial(backend, case):
    """The number of parts follows from shapes, and a part without keys is (0, -inf)."""
    properties.split_parts_are_partial(backend, case)


@laws
@given(case=paged_cases())
def test_paged_equals_dense(backend, case):
    """Where keys and values lie changes nothing."""
    properties.paged_equals_dense(backend, case)


@laws
@given(case=paged_cases())
def test_split_equals_whole(backend, case):
    """Attention over ranges of tokens, merged, is attention over all of them."""
    properties.split_equals_whole(backend, case)


@laws
@given(case=paged_cases(), cut=st.integers(0, 40))
def test_chunked_equals_whole(backend, case, cut):
    """The same queries in two steps change nothing."""
    properties.chunked_equals_whole(backend, case, cut)


@laws
@given(case=paged_cases())
def test_alone_equals_batched(backend, case):
    """What a sequence is batched with changes nothing."""
    properties.alone_equals_batched(backend, case)


@given(case=paged_cases())
def test_arguments_are_unchanged(backend, case):
    """No argument is written to, poison included."""
    arguments, options = case.arguments(backend), case.options(backend)
    properties.arguments_are_unchanged(backend, "paged_attention", arguments, options)
    options.pop("sinks", None)
    options["split_size"] = case.split_size
    properties.arguments_are_unchanged(backend, "split_paged_attention", arguments, options)


@given(case=paged_cases())
def test_out_is_honoured(backend, case):
    """The result goes to ``out``, all of it (padded rows too) and nothing beside it."""
    properties.paged_honours_out(backend, case)


@pytest.mark.parametrize("op", ["paged_attention", "split_paged_attention"])
def test_refuses_bad_shapes(backend, op):
    """A wrong shape, dtype or option raises a ValueError that names the argument."""
    properties.refuses_bad_shapes(backend, op)


@pytest.mark.parametrize("op", ["paged_attention", "split_paged_attention"])
def test_refuses_bad_values(backend, op):
    """A block id, a length or an offset out of range, or a hole that a query sees, raises a ValueError."""
    properties.refuses_bad_values(backend, op)


def test_the_cases_have_what_matters():
    """Each of the features that a result file counts is in at least a fifth of the drawn cases."""
    counts, num_cases = Counter(), 0

    @settings(max_examples=200)
    @given(case=paged_cases())
    def draw(case):
        nonlocal num_cases
        num_cases += 1
        counts.update(case.features)

    draw()
    rare = {name: counts[name] for name in COUNTED_FEATURES if 5 * counts[name] < num_cases}
    assert not rare, f"of {num_cases} cases, too few had: {rare}"
