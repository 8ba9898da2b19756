"""The dense linear layer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.conformance.backends import float_dtypes
from twofold.conformance.properties import linear as properties
from twofold.conformance.properties.fusion import writes_only_where_it_says
from twofold.conformance.strategies.linear import linear_calls

calls = linear_calls("linear")


@given(call=calls)
def test_matches_the_oracle(backend, call):
    properties.matches_the_oracle(backend, call)


@settings(max_examples=200)
@given(call=calls, data=st.data())
def test_tokens_do_not_depend_on_company(backend, call, data):
    keep = data.draw(st.lists(st.sampled_from(range(len(call.arrays["x"]) or 1)), unique=True, max_size=3), "keep")
    properties.tokens_do_not_depend_on_company(backend, call, keep if len(call.arrays["x"]) else [])


@given(call=calls)
def test_writes_only_where_it_says(backend, call):
    writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


@pytest.mark.parametrize("num_tokens", [1, 3, 80])
def test_float64_is_computed_in_float64(backend, num_tokens):
    """Sums of integers far beyond float32's 2**24 are exact; a backend without float64 refuses."""
    rng = np.random.default_rng(0)
    x, weight = rng.integers(-(2**20), 2**20, (num_tokens, 70)), rng.integers(-(2**20), 2**20, (9, 70))
    placed = [backend.from_host(array.astype(np.float64)) for array in (x, weight)]
    if "float64" not in float_dtypes(backend):
        with pytest.raises(ValueError, match="linear: x: expected"):
            backend.linear(*placed)
        return
    got = backend.to_host(backend.linear(*placed))
    assert got.dtype == np.float64, f"got {got.dtype}"
    assert np.array_equal(got, x @ weight.T), "not the integers' sums"


BAD = {
    "x": np.ones((2, 3, 1), np.float32),
    "weight": np.ones((4, 5), np.float32),
    "bias": np.ones(3, np.float32),
    "out": np.ones((4, 2), np.float32),
}
INTEGERS = {"x": np.ones((2, 3), int), "weight": np.ones((4, 3), np.int8), "bias": np.ones(4, int)}


@pytest.mark.parametrize(("named", "bad"), [*BAD.items(), *INTEGERS.items()])
def test_the_door_says_what_is_wrong(backend, named, bad):
    good = {"x": np.ones((2, 3)), "weight": np.ones((4, 3)), "bias": np.ones(4), "out": np.ones((2, 4))}
    good = {name: array.astype(np.float32) for name, array in good.items()}
    arrays = {name: backend.from_host(array) for name, array in (good | {named: bad}).items()}
    with pytest.raises(ValueError, match=f"linear: {named}: expected"):
        backend.linear(**arrays)
