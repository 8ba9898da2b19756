"""SwiGLU, alone and into the projection and the residual."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings

import reference
from twofold.conformance.properties import fusion as properties
from twofold.conformance.strategies.fusion import linear_add_calls, swiglu_calls

fused = linear_add_calls().filter(lambda call: call.op == "swiglu_linear_add")


@given(call=swiglu_calls() | fused)
def test_matches_the_oracle(backend, call):
    properties.matches_the_oracle(backend, call)


@settings(max_examples=200)
@given(fused)
def test_fused_is_its_parts(call):
    properties.fused_is_its_parts(reference, call)


@given(call=swiglu_calls() | fused)
def test_writes_only_where_it_says(backend, call):
    properties.writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


def test_far_gates_neither_warn_nor_make_nan():
    """A gate of -10000 is shut, one of 10000 is open, and nothing is said about e^10000."""
    gate_up = np.array([[-1e4, 1e4, 3.0, 3.0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reference.swiglu(gate_up).tolist() == [[0.0, 3e4]]


@pytest.mark.parametrize(
    ("named", "bad"),
    [
        ("gate_up: expected rows of even length", {"gate_up": np.ones((2, 3), np.float32)}),
        ("gate_up: expected shape", {"gate_up": np.ones(4, np.float32)}),
        ("gate_up: expected a floating", {"gate_up": np.ones((2, 4), np.int64)}),
        ("out", {"out": np.ones((2, 4), np.float32)}),
    ],
)
def test_the_door_says_what_is_wrong(named, bad):
    with pytest.raises(ValueError, match=f"swiglu: {named}"):
        reference.swiglu(**{"gate_up": np.ones((2, 4), np.float32)} | bad)
