"""Rounding with repairs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference.linear.gptq import gptq, hessian, row_errors
from reference.linear.weight import Weight
from twofold.conformance.strategies.linear import calibrated_layers

FORMATS = ["int8", "w8a8", "q8_0", "int4", "int4-4", "q4_0", "q4_1", "q4_1-6"]


def output_error(weight: np.ndarray, layer: Weight, x: np.ndarray) -> float:
    return float(np.square(x.astype(np.float64) @ (layer.dequantize() - weight).T.astype(np.float64)).mean())


@settings(max_examples=200)
@given(calibrated_layers(), st.sampled_from(FORMATS), st.booleans())
def test_never_worse_than_rounding(layer, format, act_order):
    """On the calibration data no output feature is further off than if its weights had been rounded to nearest, but
    for what float64 loses in telling."""
    h = hessian(layer.calibration)
    found = gptq(layer.weight, layer.calibration, format=format, act_order=act_order)
    nearest = Weight.from_float(layer.weight, format=format)
    errors = [row_errors(layer.weight - w.dequantize(), h) for w in (found, nearest)]
    slack = 1e-12 * np.trace(h) * np.square(layer.weight).max()
    assert (errors[0] <= errors[1] + slack).all(), f"gptq {errors[0]}, to nearest {errors[1]}"


@given(calibrated_layers(), st.sampled_from(FORMATS), st.booleans())
def test_its_arrays_are_the_formats(layer, format, act_order):
    """The same names, shapes and dtypes that rounding gives, and codes in the same range: any op serves them."""
    found = gptq(layer.weight, layer.calibration, format=format, act_order=act_order)
    nearest = Weight.from_float(layer.weight, format=format)
    kinds = [{name: (a.shape, a.dtype, a.flags.c_contiguous) for name, a in w.arrays.items()} for w in (found, nearest)]
    assert kinds[0] == kinds[1], f"{kinds[0]}, expected {kinds[1]}"
    if found.format.code_bits == 8:
        assert found.arrays["weight"].min() >= -127, "-128 was used"


@given(calibrated_layers(), st.sampled_from(FORMATS))
def test_without_correlation_it_is_rounding(layer, format):
    """Features that have nothing to do with each other cannot make up for each other: the result is that of rounding
    to nearest."""
    x = 3 * np.eye(layer.weight.shape[1], dtype=np.float32)
    found, nearest = gptq(layer.weight, [x], format=format), Weight.from_float(layer.weight, format=format)
    assert np.array_equal(found.dequantize(), nearest.dequantize()), "differs from rounding to nearest"


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4", "int4-64", "q4_0", "q4_1"])
def test_correlated_features_make_up_for_each_other(format, act_order):
    """A layer of 96 features that follow 12 things and a little noise: the output's squared error falls to an eighth
    of what rounding to nearest leaves, to a fortieth with act_order (measured: 11 to 14 times less, 59 to 66 times), on
    data it has not seen as well."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 96))
    x = rng.normal(size=(2000, 12)) @ mixing + 0.3 * rng.normal(size=(2000, 96))
    x = (x * np.exp(0.7 * rng.normal(size=96))).astype(np.float32)
    weight = (rng.normal(size=(64, 96)) / 10).astype(np.float32)
    found = gptq(weight, [x[:500], x[500:1000]], format=format, act_order=act_order)
    nearest = Weight.from_float(weight, format=format)
    for what, data in (("calibration", x[:1000]), ("unseen", x[1000:])):
        errors = [output_error(weight, w, data) for w in (found, nearest)]
        assert errors[0] < errors[1] / (40 if act_order else 8), f"{what}: gptq {errors[0]:g}, to nearest {errors[1]:g}"


def test_it_comes_close_to_the_best_there_is():
    """On four weights all 15**4 choices of codes can be tried: GPTQ's error is at most three times the best one's
    where rounding's is ten times (geometric means over 20 rows; measured: 1.9 and 14.6)."""
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(100, 2)) @ rng.normal(size=(2, 4)) + 0.05 * rng.normal(size=(100, 4))).astype(np.float32)
    h, weight = hessian([x]), rng.normal(size=(20, 4)).astype(np.float32)
    nearest = Weight.from_float(weight, format="int4-4")
    found = gptq(weight, [x], format="int4-4", act_order=True)
    codes = np.array(list(itertools.product(range(-7, 8), repeat=4)))
    scale = nearest.arrays["weight_scale"].astype(np.float64)
    best = np.array([row_errors(row - s * codes, h).min() for row, s in zip(weight, scale)])
    ratios = [np.exp(np.log(row_errors(weight - w.dequantize(), h) / best).mean()) for w in (found, nearest)]
    assert ratios[0] < 3 < 10 < ratios[1], f"of the best: gptq {ratios[0]:.2f}, to nearest {ratios[1]:.2f}"


def test_batches_are_one_set():
    """How calibration data is cut into batches does not matter."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 8)).astype(np.float32)
    np.testing.assert_allclose(hessian([x[:7], x[7:8], x[8:]]), hessian([x]), rtol=1e-12)
    np.testing.assert_allclose(hessian([x]), x.astype(np.float64).T @ x / 30, rtol=1e-6)


def test_a_layer_that_hears_nothing_is_rounded():
    weight = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    found = gptq(weight, [np.zeros((5, 8), np.float32)], np.ones(3), format="int4-4", backend=reference)
    assert np.array_equal(found.dequantize(), Weight.from_float(weight, format="int4-4").dequantize())
    assert found.backend is reference, "not placed"
    assert found.bias.tolist() == [1, 1, 1], "the bias was lost"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"format": "fp8"}, "gptq: format"),
        ({"format": "float32"}, "gptq: format"),
        ({"damping": 0}, "gptq: damping"),
        ({"calibration": []}, "hessian: calibration"),
        ({"calibration": [np.ones((2, 5), np.float32)]}, "gptq: calibration"),
        ({"weight": np.ones(4)}, "gptq: weight"),
    ],
)
def test_the_door_says_what_is_wrong(options, named):
    arguments = {"weight": np.ones((3, 4)), "calibration": [np.ones((2, 4))], "format": "int4-4"} | options
    with pytest.raises(ValueError, match=named):
        gptq(**arguments)
