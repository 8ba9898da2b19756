"""RMSNorm, alone and with its neighbours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast.fusion.rms_norm import choose_tile
from twofold.conformance.properties import fusion as properties
from twofold.conformance.strategies.fusion import Call, norm_calls

each_op = pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "rms_norm_linear"])


@each_op
@given(data=st.data())
def test_matches_the_oracle(backend, op, data):
    properties.matches_the_oracle(backend, data.draw(norm_calls(op)))


@settings(max_examples=200)
@given(norm_calls().filter(lambda call: call.op != "rms_norm"))
def test_fused_is_its_parts(call):
    properties.fused_is_its_parts(reference, call)


@each_op
@given(data=st.data())
def test_writes_only_where_it_says(backend, op, data):
    call = data.draw(norm_calls(op))
    properties.writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


def test_a_row_of_zeros_stays_zeros(backend):
    """eps keeps it from dividing nothing by nothing."""
    zeros, ones = (backend.from_host(np.full(shape, value, np.float32)) for shape, value in (((2, 4), 0), ((4,), 1)))
    assert not backend.to_host(backend.rms_norm(zeros, ones, eps=1e-6)).any()


GOOD = {"x": np.ones((3, 4), np.float32), "weight": np.ones(4, np.float32), "eps": 1e-6}
BAD = {
    "rows": ("x", {"x": GOOD["x"][:, :-1]}),
    "whole numbers": ("x", {"x": np.ones((3, 4), np.int32)}),
    "weight": ("weight", {"weight": np.ones((1, 4), np.float32)}),
    "eps": ("eps", {"eps": 0.0}),
    "shape of out": ("out", {"out": np.empty((1, 4), np.float32)}),
    "dtype of out": ("out", {"out": np.empty((3, 4), np.float16)}),
}


@pytest.mark.parametrize("backend", [reference, fast])
@pytest.mark.parametrize("bad", BAD)
def test_the_door_says_what_is_wrong(backend, bad):
    argument, arguments = BAD[bad]
    properties.refuses(backend, "rms_norm", argument, GOOD | arguments)


@pytest.mark.parametrize("backend", [reference, fast])
def test_the_door_of_add_rms_norm_says_what_is_wrong(backend):
    good = GOOD | {"residual": GOOD["x"]}
    properties.refuses(backend, "add_rms_norm", "residual", good | {"residual": GOOD["x"][:2]})
    properties.refuses(backend, "add_rms_norm", "out", good | {"residual_out": np.empty((3, 4), np.float16)})


# ---- how the kernels are cut ------------------------------------------------------------------------------------


@given(call=norm_calls().filter(lambda call: call.op != "rms_norm_linear"))
def test_a_row_keeps_no_company(call):
    properties.rows_keep_no_company(fast, call)


@pytest.mark.parametrize(("hidden_size", "num_rows"), [(24, 64), (1500, 1), (5000, 1)])
def test_narrow_rows_share_a_program(hidden_size, num_rows):
    """Many rows of heads, or one row of a layer: either way the oracle's result, and the last program ends inside."""
    assert choose_tile(hidden_size)[0] == num_rows
    rng = np.random.default_rng(0)
    x, residual = rng.standard_normal((2, num_rows + 1, hidden_size)).astype(np.float32)
    weight = rng.standard_normal(hidden_size).astype(np.float32)
    for op, arrays in (("rms_norm", {}), ("add_rms_norm", {"residual": residual})):
        properties.matches_the_oracle(fast, Call(op, {"x": x} | arrays | {"weight": weight}, {"eps": 1e-6}))


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (2, 2, 3, 8)])
def test_rows_of_any_rank(backend, shape):
    """Also where they lie apart, and are written apart."""
    rng = np.random.default_rng(1)
    wide = rng.standard_normal((*shape[:-1], 11)).astype(np.float32)
    x, out = wide[..., :8], np.full_like(wide, np.nan)[..., :8]
    weight = rng.standard_normal(8).astype(np.float32)
    expected = reference.rms_norm(x, weight, eps=1e-6)
    placed = [backend.from_host(a) for a in (x, weight, out)]
    result = backend.rms_norm(*placed[:2], eps=1e-6, out=placed[2])
    np.testing.assert_allclose(backend.to_host(result), expected, rtol=1e-5, err_msg="returned")
    np.testing.assert_allclose(backend.to_host(placed[2]), expected, rtol=1e-5, err_msg="written")
