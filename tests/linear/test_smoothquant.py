"""Moving outliers from activations to weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference.linear.smoothquant import activation_absmax, smooth, smooth_quant, smoothing_scales
from reference.linear.weight import Weight
from twofold.conformance.strategies.linear import calibrated_layers


@settings(max_examples=200)
@given(calibrated_layers(), st.floats(0, 1))
def test_smoothing_changes_nothing(layer, alpha):
    """Before anything is rounded, norm and layer together do what they did."""
    x = np.concatenate(layer.calibration)
    norm = np.linspace(0.5, 2, x.shape[1])
    scales = smoothing_scales(activation_absmax(layer.calibration), [layer.weight], alpha=alpha)
    assert (scales > 0).all(), f"scales {scales}"
    assert np.isfinite(scales).all(), f"scales {scales}"
    new_norm, (new_weight,) = smooth(norm, [layer.weight], scales)
    got, want = (x * new_norm) @ new_weight.T, (x * norm) @ layer.weight.T
    size = (np.abs(x) * norm) @ np.abs(layer.weight).T
    np.testing.assert_array_less(np.abs(got - want), 8 * 2.0**-23 * size + 1e-30)


@given(calibrated_layers())
def test_half_balances_exactly(layer):
    """With alpha 1/2 every feature's activations and weights end up with the same maximum, the geometric mean."""
    largest = activation_absmax(layer.calibration)
    scales = smoothing_scales(largest, [layer.weight], alpha=0.5)
    columns = np.abs(layer.weight).max(axis=0)
    alive = (largest > 0) & (columns > 0)
    np.testing.assert_allclose((largest / scales)[alive], (columns * scales)[alive], rtol=1e-5)
    assert (scales[~alive] == 1).all(), "a silent feature was scaled"


@given(calibrated_layers())
def test_alpha_says_whose_columns_become_alike(layer):
    """At 1 all activations have the largest magnitude 1; at 0 all columns of the weight."""
    largest = activation_absmax(layer.calibration)
    alive = largest > 0
    all_in = smoothing_scales(largest, [layer.weight], alpha=1)
    none = smoothing_scales(largest, [layer.weight], alpha=0)
    np.testing.assert_allclose((largest / all_in)[alive], 1, rtol=1e-5)
    np.testing.assert_allclose((np.abs(layer.weight).max(axis=0) * none)[alive], 1, rtol=1e-5)


def test_layers_that_read_the_same_share_their_scales():
    """The scale answers to the largest column among q, k and v."""
    q, k = np.array([[1.0, 4.0]]), np.array([[-16.0, 1.0]])
    scales = smoothing_scales(np.array([4.0, 4.0]), [q, k])
    np.testing.assert_allclose(scales, [2 / 4, 2 / 2])


def test_outliers_are_what_it_is_for():
    """Two features sixty times louder than the rest, as large models have them: the error of W8A8 falls to a
    tenth or less (measured: a seventeenth), in both layers that read the norm."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 64)).astype(np.float32)
    x[:, [3, 17]] *= 60
    layers = [rng.normal(size=(48, 64)).astype(np.float32) for _ in range(2)]
    norm, smoothed = smooth_quant(np.ones(64), layers, [x[:250], x[250:]], backend=reference)
    for weight, layer in zip(layers, smoothed):
        plain = Weight.from_float(weight, format="w8a8", backend=reference)
        errors = [np.square(y - x @ weight.T).mean() for y in (layer.linear(x * norm), plain.linear(x))]
        assert errors[0] < errors[1] / 10, f"smoothed {errors[0]:g}, plain {errors[1]:g}"


def test_biases_and_formats_pass_through():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 8)).astype(np.float32), np.arange(3, dtype=np.float32)
    x = rng.normal(size=(5, 8)).astype(np.float32)
    norm, (layer,) = smooth_quant(np.ones(8), [weight], [x], biases=[bias], format="q8_0", backend=reference)
    assert layer.format.name == "q8_0", layer.format.name
    np.testing.assert_allclose(layer.linear(x * norm), x @ weight.T + bias, atol=0.1)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: activation_absmax([]), "activation_absmax: calibration"),
        (lambda: smoothing_scales(np.ones(2), [np.ones((3, 2))], alpha=1.5), "smoothing_scales: alpha"),
        (lambda: smoothing_scales(np.ones(2), [np.ones((3, 4))]), "smoothing_scales: weights"),
        (lambda: smoothing_scales(np.ones(2), []), "smoothing_scales: weights"),
        (lambda: smooth(np.ones(3), [], np.ones(2)), "smooth: norm_weight"),
        (lambda: smooth_quant(np.ones(2), [np.ones((3, 2))], [np.ones((1, 2))], biases=[]), "smooth_quant: biases"),
    ],
)
def test_the_door_says_what_is_wrong(call, named):
    with pytest.raises(ValueError, match=named):
        call()
