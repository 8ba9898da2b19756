"""A linear layer and the residual."""

import numpy as np
import pytest
from hypothesis import given, settings

import reference
from twofold.conformance.properties import fusion as properties
from twofold.conformance.strategies.fusion import linear_add_calls

calls = linear_add_calls("linear_add")


@given(call=calls)
def test_matches_the_oracle(backend, call):
    properties.matches_the_oracle(backend, call)


@settings(max_examples=200)
@given(calls)
def test_fused_is_its_parts(call):
    properties.fused_is_its_parts(reference, call)


@given(call=calls)
def test_writes_only_where_it_says(backend, call):
    properties.writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


@pytest.mark.parametrize("named", ["residual", "out"])
def test_the_door_says_what_is_wrong(named):
    arrays = {"x": np.ones((2, 3)), "weight": np.ones((4, 3)), "residual": np.ones((2, 4)), "out": np.ones((2, 4))}
    with pytest.raises(ValueError, match=f"linear_add: {named}"):
        reference.linear_add(**arrays | {named: np.ones((1, 4))})
