"""The linear layer with two of every four weights."""

import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast.linear.sparse_linear import choose_groups, sparse_linear_invariant
from reference.linear.pruning import compress_24, magnitude_score, mask_24
from twofold.conformance import plain_torch
from twofold.conformance.properties import linear as properties
from twofold.conformance.properties.fusion import writes_only_where_it_says
from twofold.conformance.strategies.fusion import Call, widen
from twofold.conformance.strategies.linear import float_matrices, linear_calls
from twofold.conformance.tolerance import assert_within, matmul_bound

calls = linear_calls("sparse_linear")


@given(call=calls)
def test_matches_the_oracle(backend, call):
    properties.matches_the_oracle(backend, call)


@pytest.mark.interpreted(6)
@given(call=calls)
def test_writes_only_where_it_says(backend, call):
    writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


@settings(max_examples=200)
@given(calls, st.data())
def test_tokens_do_not_depend_on_company(call, data):
    tokens = list(range(len(call.arrays["x"])))
    keep = data.draw(st.lists(st.sampled_from(tokens), unique=True, max_size=3), "keep") if tokens else []
    properties.tokens_do_not_depend_on_company(reference, call, keep)


@settings(max_examples=200)
@given(weight=float_matrices(multiple=4))
def test_it_is_the_dense_layer_with_zeros(backend, weight):
    """Compressed, the layer gives what the dense layer gives with the pruned weights set to zero: bit for bit where
    both multiply the same matrix, and to rounding where the compressed one is multiplied as it is."""
    pruned = np.where(mask_24(magnitude_score(weight)), weight, np.float32(0))
    x = np.random.default_rng(0).normal(size=(3, weight.shape[1])).astype(np.float32)
    values, indices = compress_24(pruned)
    place = backend.from_host
    sparse = backend.to_host(backend.sparse_linear(place(x), place(values), place(indices)))
    dense = backend.to_host(backend.linear(place(x), place(pruned)))
    bound = 0.0
    if backend is not reference and backend is not plain_torch:
        bound = 2 * matmul_bound(widen(dense), np.abs(widen(x)) @ np.abs(widen(pruned)).T, x.shape[1], "float32")
    assert_within(sparse, widen(dense), bound, "sparse, against dense", ("token", "feature"))


# ---- the kernels of the fast backend --------------------------------------------------------------------------------


def layer(num_tokens: int, in_features: int, dtype: str) -> Call:
    rng, cast = np.random.default_rng(0), np.dtype(getattr(ml_dtypes, dtype, dtype))
    weight = rng.normal(size=(70, in_features)).astype(np.float32)
    values, indices = compress_24(np.where(mask_24(magnitude_score(weight)), weight, np.float32(0)))
    x = rng.normal(size=(num_tokens, in_features)).astype(cast)
    bias = rng.normal(size=70).astype(cast)
    return Call("sparse_linear", {"x": x, "values": values.astype(cast), "indices": indices, "bias": bias})


@pytest.mark.parametrize(
    ("kernel", "num_tokens", "dtype"),
    [("one_token", 1, "bfloat16"), ("one_token", 1, "float16"), ("tiles", 1, "float32"), ("tiles", 2, "bfloat16")]
    + [("tiles", 70, dtype) for dtype in ("float16", "float32")],
)
def test_each_kernel_is_chosen_and_right(monkeypatch, kernel, num_tokens, dtype):
    """One token and several go to different kernels, over an odd number of groups and more than one step."""
    module, seen = sys.modules["fast.linear.sparse_linear"], []
    for name in ("one_token", "tiles"):
        run_it = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, run_it=run_it: (seen.append(name), run_it(*a))[1])
    call = layer(num_tokens, 4 * 519, dtype)
    properties.matches_the_oracle(fast, call)
    residual = np.random.default_rng(1).normal(size=(num_tokens, 70)).astype(call.arrays["x"].dtype)
    properties.matches_the_oracle(fast, call.with_arrays(residual=residual))
    assert seen == [kernel] * 2, f"expected {kernel}, got {seen}"


def test_steps_suit_the_layer():
    """Few rows and many are cut up differently; a row is never shorter than half of its step."""
    assert choose_groups(4096, 1024) < choose_groups(14336, 1024)
    assert all(choose_groups(n, 40) == 64 for n in (64, 14336))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_invariant_variant_does_not_see_the_batch(dtype):
    """A token's bits are the same alone, in a small batch and in a large one, wherever in it."""
    call = layer(70, 100, dtype)
    place = {name: fast.from_host(array) for name, array in call.arrays.items()}
    whole = fast.to_host(sparse_linear_invariant(**place))
    assert_within(whole, *properties.expected(fast, call), "sparse_linear_invariant", ("token", "feature"))
    for tokens in ([0], [69], [3, 68, 5], list(range(20, 60))):
        got = fast.to_host(sparse_linear_invariant(**place | {"x": fast.from_host(call.arrays["x"][tokens])}))
        assert got.tobytes() == whole[tokens].tobytes(), f"tokens {tokens} differ from themselves in the batch"


GOOD = {"values": np.ones((3, 4), np.float32), "indices": np.full((3, 1), 0x44, np.uint8)}
BAD = {
    "x": {"x": np.ones((2, 8, 1), np.float32)},
    "weight": {"x": np.ones((2, 4), np.float32)},
    "values": {"values": np.ones((3, 4), np.int8)},
    "indices": {"indices": np.full((3, 2), 0x44, np.uint8)},
    "residual": {"residual": np.ones((2, 4), np.float32)},
    "out": {"out": np.ones((2, 4), np.float32)},
}


@pytest.mark.parametrize("named", BAD)
def test_the_door_says_what_is_wrong(backend, named):
    arguments = {"x": np.ones((2, 8), np.float32)} | GOOD | BAD[named]
    with pytest.raises(ValueError, match=f"sparse_linear: {named}: expected"):
        backend.sparse_linear(**{name: backend.from_host(array) for name, array in arguments.items()})


@pytest.mark.parametrize("byte", [0x00, 0x45, 0xF4, 0x41])
def test_places_that_do_not_ascend_are_refused(backend, byte):
    x, indices = np.ones((2, 8), np.float32), np.full((3, 1), byte, np.uint8)
    with pytest.raises(ValueError, match="indices: expected two ascending places"):
        backend.sparse_linear(*(backend.from_host(a) for a in (x, GOOD["values"], indices)))


def test_half_a_group_is_refused(backend):
    arrays = np.ones((2, 6), np.float32), np.ones((3, 3), np.float32), np.full((3, 1), 4, np.uint8)
    with pytest.raises(ValueError, match="sparse_linear: values: expected"):
        backend.sparse_linear(*(backend.from_host(a) for a in arrays))
