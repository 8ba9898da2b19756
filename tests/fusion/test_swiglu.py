"""SwiGLU, alone and into the projection and the residual."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast.fusion import _swiglu_linear
from fast.fusion.swiglu import TILE_SIZE, choose_tile
from twofold.conformance.properties import fusion as properties
from twofold.conformance.strategies.fusion import Call, linear_add_calls, swiglu_calls

fused = linear_add_calls("swiglu_linear_add")
each_op = pytest.mark.parametrize("calls", [pytest.param(swiglu_calls(), id="swiglu"), pytest.param(fused, id="fused")])


@each_op
@given(data=st.data())
def test_matches_the_oracle(backend, calls, data):
    properties.matches_the_oracle(backend, data.draw(calls))


@settings(max_examples=200)
@given(fused)
def test_fused_is_its_parts(call):
    properties.fused_is_its_parts(reference, call)


@each_op
@given(data=st.data())
def test_writes_only_where_it_says(backend, calls, data):
    call = data.draw(calls)
    properties.writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


def test_far_gates_neither_warn_nor_make_nan():
    """A gate of -10000 is shut, one of 10000 is open, and nothing is said about e^10000."""
    gate_up = np.array([[-1e4, 1e4, 3.0, 3.0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reference.swiglu(gate_up).tolist() == [[0.0, 3e4]]


@pytest.mark.parametrize("backend", [reference, fast])
@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("gate_up", np.ones((2, 3), np.float32)),
        ("gate_up", np.ones(4, np.float32)),
        ("gate_up", np.ones((2, 4), np.int64)),
        ("out", np.ones((2, 4), np.float32)),
    ],
)
def test_the_door_says_what_is_wrong(backend, argument, bad):
    properties.refuses(backend, "swiglu", argument, {"gate_up": np.ones((2, 4), np.float32)} | {argument: bad})


# ---- how the kernel is cut --------------------------------------------------------------------------------------


@given(call=swiglu_calls())
def test_a_row_keeps_no_company(call):
    properties.rows_keep_no_company(fast, call)


@pytest.mark.parametrize(
    ("intermediate_size", "tile"), [(24, (TILE_SIZE // 32, 32)), (2 * TILE_SIZE + 5, (1, TILE_SIZE))]
)
def test_narrow_rows_share_a_program_and_wide_ones_take_several(intermediate_size, tile):
    assert choose_tile(intermediate_size) == tile
    gate_up = np.random.default_rng(0).standard_normal((tile[0] + 1, 2 * intermediate_size)).astype(np.float32)
    properties.matches_the_oracle(fast, Call("swiglu", {"gate_up": gate_up}))


@pytest.mark.parametrize("gate", [-88.0, -60.0, -30.0, -5.0, 30.0])
def test_far_gates_are_as_exact_as_near_ones(backend, gate):
    """In float32 e^z is not to lose digits with the size of z; each gate stands alone, with no larger one beside it."""
    gate_up = np.stack([np.full(64, gate) + np.linspace(0, 1, 64), np.ones(64)], axis=1).astype(np.float32)
    if backend is not reference:
        properties.matches_the_oracle(backend, Call("swiglu", {"gate_up": gate_up}))


def test_one_token_of_a_large_layer_is_gated_on_the_way(monkeypatch):
    """What is chosen, and that it is right also where a layer of a test would be too small to be chosen."""
    assert _swiglu_linear.is_fused(1, 4096 * 14336)
    assert not _swiglu_linear.is_fused(2, 4096 * 14336)
    monkeypatch.setattr(_swiglu_linear, "LARGE", 1)
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16):
        shapes = {"gate_up": (1, 600), "weight": (70, 300), "residual": (1, 70)}
        arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
        properties.matches_the_oracle(fast, Call("swiglu_linear_add", arrays))
