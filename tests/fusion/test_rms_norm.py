"""RMSNorm, alone and with its neighbours."""

import numpy as np
import pytest
from hypothesis import given, settings

import reference
from twofold.conformance.properties import fusion as properties
from twofold.conformance.strategies.fusion import norm_calls


@given(call=norm_calls())
def test_matches_the_oracle(backend, call):
    properties.matches_the_oracle(backend, call)


@settings(max_examples=200)
@given(norm_calls().filter(lambda call: call.op != "rms_norm"))
def test_fused_is_its_parts(call):
    properties.fused_is_its_parts(reference, call)


@given(call=norm_calls())
def test_writes_only_where_it_says(backend, call):
    properties.writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


def test_a_row_of_zeros_stays_zeros(backend):
    """eps keeps it from dividing nothing by nothing."""
    zeros, ones = (backend.from_host(np.full(shape, value, np.float32)) for shape, value in (((2, 4), 0), ((4,), 1)))
    assert not backend.to_host(backend.rms_norm(zeros, ones, eps=1e-6)).any()


GOOD = {"x": np.ones((3, 4), np.float32), "weight": np.ones(4, np.float32), "eps": 1e-6}
BAD = {
    "x: expected rows of 4": {"x": GOOD["x"][:, :-1]},
    "x: expected a floating": {"x": np.ones((3, 4), np.int32)},
    "weight": {"weight": np.ones((1, 4), np.float32)},
    "eps": {"eps": 0.0},
    "out: expected shape": {"out": np.empty((1, 4), np.float32)},
    "out: expected dtype": {"out": np.empty((3, 4), np.float16)},
}


@pytest.mark.parametrize("named", BAD)
def test_the_door_says_what_is_wrong(named):
    with pytest.raises(ValueError, match=f"rms_norm: {named}"):
        reference.rms_norm(**GOOD | BAD[named])


def test_the_door_of_add_rms_norm_says_what_is_wrong():
    x, ones = np.ones((3, 4), np.float32), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="add_rms_norm: residual"):
        reference.add_rms_norm(x, x[:2], ones, eps=1e-6)
    with pytest.raises(ValueError, match="add_rms_norm: out: expected dtype"):
        reference.add_rms_norm(x, x, ones, eps=1e-6, residual_out=np.empty((3, 4)))
