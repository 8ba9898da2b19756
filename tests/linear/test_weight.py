"""A weight in any format."""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from reference.linear import pruning
from reference.linear.weight import WEIGHT_FORMATS, Weight, weight_format
from twofold.conformance import plain_torch
from twofold.conformance.properties import linear as properties
from twofold.conformance.strategies.linear import float_matrices


def with_layout_of_its_own(base: Any) -> SimpleNamespace:
    """``base``, but packed: rows in reverse, garbage behind them. A `Weight` that forgets to pack or unpack shows."""

    def pack(weight: Any, *, format: str) -> Any:
        bytes_ = np.ascontiguousarray(base.to_host(weight)).view(np.uint8)[::-1]
        return base.from_host(np.concatenate([bytes_, np.full((2, bytes_.shape[1]), 0x55, np.uint8)]))

    def unpack(packed: Any, *, format: str, out_features: int) -> Any:
        bytes_ = np.ascontiguousarray(base.to_host(packed)[:out_features][::-1])
        return base.from_host(bytes_.view(properties.LAYOUTS[format]))

    def unpacking(layout: str, op: Any) -> Any:
        @functools.wraps(op)
        def wrapped(x: Any, weight: Any, weight_scale: Any, *args: Any, **kwargs: Any) -> Any:
            return op(x, unpack(weight, format=layout, out_features=len(weight_scale)), weight_scale, *args, **kwargs)

        return wrapped

    ops = {name: getattr(base, name) for name in reference.__all__ if hasattr(base, name)}
    ops |= {f"linear_{layout}": unpacking(layout, ops[f"linear_{layout}"]) for layout in properties.LAYOUTS}
    return SimpleNamespace(**ops | {"pack_weight": pack, "unpack_weight": unpack})


BACKENDS = {
    "reference": reference,
    "plain_torch": plain_torch,
    "fast": fast,
    "packed": with_layout_of_its_own(reference),
}
FORMATS = [*WEIGHT_FORMATS, "int4-6", "q4_1-64", "q8_0-40"]
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@st.composite
def weights(draw, backend):
    format = draw(st.sampled_from(FORMATS), label="format")
    matrix = draw(float_matrices(multiple=4))
    bias = draw(st.sampled_from([None, np.linspace(-1, 1, len(matrix), dtype=np.float32)]), label="bias")
    return Weight.from_float(matrix, bias, format=format, backend=backend)


def activations_for(weight: Weight, num_tokens: int) -> np.ndarray:
    return np.random.default_rng(num_tokens).normal(size=(num_tokens, weight.in_features)).astype(np.float32)


@each_backend
@settings(max_examples=100)
@given(data=st.data(), num_tokens=st.sampled_from([0, 1, 6]))
def test_it_computes_with_its_numbers(backend, data, num_tokens):
    weight = data.draw(weights(backend))
    properties.weight_computes_with_its_numbers(backend, weight, activations_for(weight, num_tokens))


@each_backend
@settings(max_examples=100)
@given(data=st.data(), num_tokens=st.sampled_from([1, 6]))
def test_fused_is_its_parts(backend, data, num_tokens):
    weight = data.draw(weights(backend))
    x = activations_for(weight, num_tokens)
    norm = np.linspace(0.5, 1.5, weight.in_features, dtype=np.float32)
    residual = np.random.default_rng(1).normal(size=(num_tokens, weight.out_features)).astype(np.float32)
    properties.fused_is_its_parts(backend, weight, x, norm, residual)


@each_backend
@settings(max_examples=100)
@given(data=st.data())
def test_rows_are_exact(backend, data):
    weight = data.draw(weights(backend))
    rows = data.draw(st.lists(st.integers(0, weight.out_features - 1), max_size=5), "rows")
    properties.rows_are_exact(backend, weight, np.array(rows, np.int64))


@each_backend
@settings(max_examples=100)
@given(data=st.data())
def test_stacking_is_stacking(backend, data):
    first = data.draw(weights(backend))
    matrix = np.random.default_rng(2).normal(size=(4, first.in_features)).astype(np.float32)
    second = Weight.from_float(matrix, format=first.format, backend=backend)
    properties.stacking_is_stacking(backend, [first, second], activations_for(first, 3))


@each_backend
@given(data=st.data())
def test_placing_changes_nothing(backend, data):
    properties.placing_changes_nothing(backend, data.draw(weights(None)))


@pytest.mark.parametrize("name", FORMATS)
def test_it_takes_the_bits_that_the_table_says(name):
    """For a matrix of whole groups: the format's bits for each weight, and 32 for each row that has a scale."""
    format = weight_format(name)
    weight = Weight.from_float(np.ones((8, 1920), np.float32), format=format)
    per_row = 32 if "weight_scale" in weight.arrays and format.group_size is None else 0
    expected = 1920 * format.bits + per_row  # for each of 8 rows
    assert weight.nbytes == pytest.approx(expected, rel=1e-12), f"{weight.nbytes} bytes, {format.bits} bits a weight"
    biased = Weight.from_float(np.ones((8, 1920), np.float32), np.ones(8, np.float32), format=format)
    assert biased.nbytes == weight.nbytes + 32, "the bias was not counted"


@given(float_matrices(multiple=4))
def test_what_was_pruned_stays_pruned(weight):
    """A matrix that has its zeros already keeps them, whoever chose: compressing is not choosing again."""
    mask = pruning.mask_24(np.random.default_rng(0).normal(size=weight.shape))
    pruned = np.where(mask, weight, np.float32(0))
    assert np.array_equal(Weight.from_float(pruned, format="sparse24").dequantize(), pruned)


def test_a_float_in_its_own_dtype_is_not_copied():
    matrix = np.ones((4, 4), np.float32)
    weight = Weight.from_float(matrix, format="float32", backend=reference)
    assert np.shares_memory(weight.arrays["weight"], matrix), "copied"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_floats_are_rounded_as_cast_rounds(dtype, source):
    """Nearest, ties to even, saturating: what `numerics.cast` gives, bit for bit."""
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(40, 50)) * 10.0 ** rng.integers(-12, 7, (40, 50))).astype(source)
    weight = Weight.from_float(matrix, format=dtype)
    want = reference.cast(matrix.astype(np.float32), dtype)
    assert weight.arrays["weight"].tobytes() == want.tobytes(), "differs from cast"


def test_rows_come_in_the_dtype_asked_for():
    weight = Weight.from_float(np.eye(4, dtype=np.float32), format="int8", backend=reference)
    rows = weight.rows(np.array([1, 1]), dtype="bfloat16")
    assert rows.dtype.name == "bfloat16", rows.dtype
    assert rows.astype(np.float32).tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]], rows


def test_layers_of_several_tiles_are_rounded_row_by_row():
    """A large matrix is rounded a tile at a time; its rows do not notice."""
    matrix = np.random.default_rng(0).normal(size=(300, 1024)).astype(np.float32)
    whole = Weight.from_float(matrix, format="q4_1")
    for row in (0, 127, 128, 299):
        alone = Weight.from_float(matrix[row : row + 1], format="q4_1")
        for name, array in alone.arrays.items():
            assert np.array_equal(array[0], whole.arrays[name][row]), f"{name} of row {row}"


@pytest.mark.parametrize("name", ["", "int3", "int4-", "int4-0", "int4-7", "int4-x", "int8-32", "int4-64-2"])
def test_unknown_formats_are_refused(name):
    with pytest.raises(ValueError, match=r"weight_format: name: expected one of float32|group_size: expected an even"):
        weight_format(name)


def test_group_sizes_by_name_and_by_number():
    assert weight_format("int4-64") == WEIGHT_FORMATS["int4"].in_groups_of(64)
    assert weight_format("int4-128") == WEIGHT_FORMATS["int4"], "its own size is not a name of its own"
    by_number = Weight.from_float(np.ones((2, 64), np.float32), format="int4-16", group_size=32)
    assert (by_number.format.name, by_number.format.group_size) == ("int4-32", 32), by_number.format
    with pytest.raises(ValueError, match="group_size"):
        Weight.from_float(np.ones((2, 4), np.float32), format="int8", group_size=32)


def test_different_formats_do_not_stack():
    one, other = (Weight.from_float(np.ones((2, 4), np.float32), format=f) for f in ("int8", "w8a8"))
    with pytest.raises(ValueError, match=r"Weight\.concatenate: weights"):
        Weight.concatenate([one, other])
    with pytest.raises(ValueError, match=r"Weight\.concatenate: weights"):
        Weight.concatenate([one, Weight.from_float(np.ones((2, 8), np.float32), format="int8")])
