"""Rounding: every 16-bit pattern, everything around them, and whatever Hypothesis finds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.conformance.properties import numerics as properties
from twofold.conformance.strategies import numerics as inputs

narrow_formats = pytest.mark.parametrize("format", inputs.NARROW_FORMATS)


@narrow_formats
def test_every_16_bit_value_rounds_as_in_ml_dtypes(backend, format):
    properties.rounds_like_ml_dtypes(backend, inputs.every_16_bit_value(), format)


@narrow_formats
def test_everything_around_every_value_rounds_as_in_ml_dtypes(backend, format):
    properties.rounds_like_ml_dtypes(backend, inputs.around_every_value(format, "float32"), format)


@pytest.mark.needs("float64")
@narrow_formats
@pytest.mark.parametrize("saturate", [False, True])
def test_float64_is_rounded_once(backend, format, saturate):
    """Next to a midpoint by less than float32 can tell, the side still decides."""
    properties.rounds_to_nearest_even(backend, inputs.around_every_value(format, "float64"), format, saturate)


@given(case=inputs.rounding_inputs(), saturate=st.booleans())
def test_rounds_to_nearest_even(backend, case, saturate):
    x, format = case
    properties.rounds_to_nearest_even(backend, x, format, saturate)


@pytest.mark.needs("float64")
def test_float64_to_float32_is_the_hardware_s(backend):
    """From below float32's subnormals to beyond its largest value, rounding is what the processor does."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, 20000) * 2.0 ** rng.integers(-152, 130, 20000)
    edge = (2 - 2.0**-24) * 2.0**127  # halfway from the largest to 2**128
    x[:4] = edge, -edge, np.nextafter(edge, 0), np.inf
    largest = float(np.finfo(np.float32).max)
    for saturate, clipped in ((False, x), (True, x.clip(-largest, largest))):
        with np.errstate(over="ignore"):
            expected = clipped.astype(np.float32)
        got = properties.call(backend, "cast", x, "float32", saturate=saturate)
        assert properties.same_bits(got, expected), f"cast to float32, saturate={saturate}: not the processor's"


@narrow_formats
def test_the_way_back_to_float32_is_exact(backend, format):
    """Every pattern of a narrow format, infinities and NaNs too, is the same number in float32, saturating or not."""
    bits = 8 * inputs.dtype_named(format).itemsize
    x = np.arange(2**bits, dtype=f"uint{bits}").view(inputs.dtype_named(format))
    with np.errstate(invalid="ignore"):  # NaNs that signal
        for saturate in (False, True):
            back = properties.call(backend, "cast", x, "float32", saturate=saturate)
            np.testing.assert_array_equal(back, x.astype(np.float32), err_msg=f"{format} to float32", strict=True)


def test_what_is_rounded_already_is_a_copy(backend):
    """A result never shares memory with x, not even when there is nothing to round."""
    x = backend.from_host(np.ones(3, np.float32))
    for result in (backend.round_to(x, "float32"), backend.cast(x, "float32")):
        result[...] = 2
    assert backend.to_host(x).tolist() == [1, 1, 1], "a write to the result reached x"


def test_out_may_be_x(backend):
    x = backend.from_host(np.array([1.0625, 500.0], np.float32))
    rounded = backend.round_to(x, "float8_e4m3fn", out=x)
    assert backend.to_host(rounded).tolist() == [1.0, 448.0], "round_to in place"


@pytest.mark.parametrize("op", ["round_to", "cast"])
def test_refuses_what_is_not_a_float_or_a_format(backend, op):
    x = np.ones(3, np.float32)
    properties.refuses(backend, op, "x", np.ones(3, np.int32), "float16")
    properties.refuses(backend, op, "format", x, "float8_e8m0fnu")
    if op == "round_to":
        properties.refuses(backend, op, "out", x, "float16", out=np.ones(4, np.float32))
        properties.refuses(backend, op, "out", x, "float16", out=np.ones(3, np.float64))
