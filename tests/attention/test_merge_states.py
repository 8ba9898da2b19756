"""Merging the parts of an attention gives the attention."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.conformance.properties import attention as properties
from twofold.conformance.strategies.attention import states_cases


@given(case=states_cases())
def test_matches_the_oracle(backend, case):
    """The merged output and lse are the weighted mean and the log of the sum; parts without keys are not read."""
    properties.merge_matches_oracle(backend, case)


@settings(max_examples=200)
@given(case=states_cases(), cut=st.integers(0, 4))
def test_merging_in_two_steps_changes_nothing(backend, case, cut):
    """Merging is associative."""
    properties.merging_in_two_steps_changes_nothing(backend, case, cut)


@settings(max_examples=200)
@given(case=states_cases())
def test_merging_in_any_order_changes_nothing(backend, case):
    """Merging is commutative."""
    properties.merging_in_any_order_changes_nothing(backend, case)


@pytest.mark.interpreted(6)
@given(case=states_cases())
def test_arguments_are_unchanged(backend, case):
    """No argument is written to."""
    properties.arguments_are_unchanged(backend, "merge_states", case.arguments(backend), {})


@pytest.mark.interpreted(6)
@given(case=states_cases(dtypes=["float32", "float64"]), dtype=st.sampled_from(["bfloat16", "float16", "float32"]))
def test_out_is_honoured(backend, case, dtype):
    """The output goes to ``out``, in the dtype that ``out`` has, and nothing beside it is written."""
    properties.merge_honours_out(backend, case, dtype)


def test_refuses_bad_shapes(backend):
    """A wrong shape or dtype raises a ValueError that names the argument."""
    properties.refuses_bad_shapes(backend, "merge_states")
