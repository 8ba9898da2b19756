"""A backend's arrays: there and back, converted, empty, by rows, and bytes seen as numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from reference.numerics.arrays import dtype_named
from twofold.conformance.properties import numerics as properties
from twofold.conformance.strategies import numerics as inputs


@given(x=inputs.host_arrays())
def test_survives_the_trip(backend, x):
    properties.survives_the_trip(backend, x)


@given(case=inputs.rounding_inputs(), dtype=st.sampled_from((*inputs.FLOAT_DTYPES, *inputs.NARROW_FORMATS)))
def test_converts_on_the_way(backend, case, dtype):
    properties.converts_on_the_way(backend, case[0], dtype)


@given(
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    dtype=st.sampled_from([d for d in inputs.ARRAY_DTYPES if d != "bool"]),
)
def test_empty_is_as_asked(backend, shape, dtype):
    properties.empty_is_as_asked(backend, shape, dtype)


@given(x=inputs.host_arrays(min_axes=1), data=st.data())
def test_takes_rows(backend, x, data):
    some = st.lists(st.integers(0, len(x) - 1), max_size=5) if len(x) else st.just([])
    dtype = data.draw(st.sampled_from([np.int32, np.int64]), label="dtype of rows")
    properties.takes_rows(backend, x, np.array(data.draw(some, label="rows"), dtype))


@given(
    num_rows=st.integers(0, 3),
    dtype=st.sampled_from([d for d in inputs.ARRAY_DTYPES if d != "bool"]),
    before=st.integers(0, 3),
    values=st.integers(0, 4),
    after=st.integers(0, 3),
)
def test_bitcast_is_a_view(backend, num_rows, dtype, before, values, after):
    """Of a pool whose rows are whole numbers, other columns on either side."""
    size = dtype_named(dtype).itemsize
    rng = np.random.default_rng(num_rows)
    pool = rng.integers(0, 256, (num_rows, size * (before + values + after)), np.uint8)
    properties.bitcast_is_a_view(backend, pool, size * before, size * (before + values), dtype)


def test_a_single_row_needs_no_stride(backend):
    """Where there is no second row, its distance does not matter."""
    properties.bitcast_is_a_view(backend, np.arange(7, dtype=np.uint8)[None], 0, 4, "float32")


def test_refuses_what_is_no_array_of_this_kind(backend):
    bytes_ = np.zeros((2, 8), np.uint8)
    properties.refuses(backend, "bitcast", "x", bytes_.astype(np.int8), "float16")
    properties.refuses(backend, "bitcast", "x", bytes_[0], "float16")
    properties.refuses(backend, "bitcast", "x", bytes_[:, :3], "float16")
    properties.refuses(backend, "bitcast", "dtype", bytes_, "float7")
    properties.refuses(backend, "bitcast", "dtype", bytes_, "finfo")
    pool = backend.from_host(np.zeros((2, 10), np.uint8))
    for unaligned in (pool[:, 1:9], pool[:, :8]):  # the start; the distance of the rows
        with pytest.raises(ValueError, match="bitcast"):
            backend.bitcast(unaligned, "float32")
    with pytest.raises(ValueError, match="bitcast"):
        backend.bitcast(pool[:, ::2], "uint8" if backend is reference else "int16")
    x, rows = np.zeros((3, 2)), np.array([0, 1])
    properties.refuses(backend, "take_rows", "rows", x, rows - 1)
    properties.refuses(backend, "take_rows", "rows", x, rows + 2)
    properties.refuses(backend, "take_rows", "rows", x, rows[None])
    properties.refuses(backend, "take_rows", "rows", x, rows.astype(float))
    properties.refuses(backend, "take_rows", "x", np.array(1.0), rows)
    properties.refuses(backend, "take_rows", "out", x, rows, out=np.zeros((3, 2)))
    properties.refuses(backend, "take_rows", "out", x, rows, out=np.zeros((2, 2), np.float32))
    for unknown in ({"dtype": "float7"}, {"dtype": "float32", "device": "nowhere"}):
        with pytest.raises(ValueError, match="empty"):
            backend.empty((2,), **unknown)
        with pytest.raises(ValueError, match="from_host"):
            backend.from_host(x, **unknown)
