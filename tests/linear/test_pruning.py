"""Which weights to leave out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.linear import pruning
from twofold.conformance.strategies.linear import calibrated_layers, float_matrices


@given(float_matrices(), st.floats(0, 1))
def test_rows_lose_the_share_that_was_asked_for(weight, sparsity):
    """Of every row exactly so many weights go, and none that stays scores lower than one that goes."""
    score = pruning.magnitude_score(weight)
    mask = pruning.mask_rows(score, sparsity=sparsity)
    gone = int(sparsity * weight.shape[1])
    assert ((~mask).sum(axis=1) == gone).all(), f"{(~mask).sum(axis=1)} weights left out, expected {gone}"
    kept = np.where(mask, score, np.inf).min(axis=1)
    lost = np.where(mask, -np.inf, score).max(axis=1)
    assert (kept >= lost).all(), "a weight was left out that scores higher than one that stays"


@given(float_matrices(multiple=4))
def test_two_of_every_four_stay(weight):
    """Exactly two of each group, and no pair of the group has a larger sum of scores."""
    score = pruning.magnitude_score(weight).reshape(len(weight), -1, 4)
    mask = pruning.mask_24(pruning.magnitude_score(weight)).reshape(score.shape)
    assert (mask.sum(axis=-1) == 2).all(), "not two of four"
    kept = np.where(mask, score, 0).astype(np.float64).sum(axis=-1)
    best = np.sort(score.astype(np.float64), axis=-1)[..., 2:].sum(axis=-1)
    np.testing.assert_allclose(kept, best, rtol=1e-12, err_msg="not the two largest")


@settings(max_examples=200)
@given(float_matrices(multiple=4), st.integers(0, 2**32 - 1))
def test_decompressing_gives_what_was_compressed(weight, seed):
    """Whatever two of four are kept, also fewer than two, the matrix comes back bit for bit, from half the values."""
    score = np.random.default_rng(seed).normal(size=weight.shape)
    pruned = np.where(pruning.mask_24(score), weight, np.float32(0))
    values, indices = pruning.compress_24(pruned)
    assert values.size * 2 == weight.size, f"{values.size} values of {weight.size}"
    assert indices.shape == (len(weight), -(-weight.shape[1] // 8)), f"indices of shape {indices.shape}"
    assert np.array_equal(pruning.decompress_24(values, indices), pruned), "not what was compressed"


@settings(max_examples=200)
@given(calibrated_layers())
def test_wandas_score_is_the_change_of_the_output(layer):
    """What the output changes by, over all tokens, if that one weight is left out."""
    x = np.concatenate(layer.calibration).astype(np.float64)
    score = pruning.wanda_score(layer.weight, pruning.feature_norm(layer.calibration))
    change = np.abs(layer.weight) * np.sqrt(np.square(x).sum(axis=0))
    np.testing.assert_allclose(score, change, rtol=1e-5, atol=1e-30)


def test_wanda_is_better_where_features_differ():
    """Half of the weights gone, and features whose sizes differ as e^(1.5 z): the output's squared error is less
    than a hundredth of what pruning by magnitude leaves, with two of four (measured: 1/750) or whole rows (1/2100)."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 64)) * np.exp(1.5 * rng.normal(size=64))).astype(np.float32)
    weight = rng.normal(size=(32, 64)).astype(np.float32)
    wanda = pruning.wanda_score(weight, pruning.feature_norm([x[:200], x[200:]]))
    magnitude = pruning.magnitude_score(weight)
    for mask_of in (pruning.mask_24, lambda score: pruning.mask_rows(score, sparsity=0.5)):
        errors = [np.square(x @ np.where(mask_of(s), 0, weight).T).mean() for s in (wanda, magnitude)]
        assert errors[0] < errors[1] / 100, f"Wanda {errors[0]:g}, magnitude {errors[1]:g}"


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pruning.mask_24(np.ones((2, 6))), "mask_24: score"),
        (lambda: pruning.mask_24(np.ones(8)), "mask_24: score"),
        (lambda: pruning.mask_rows(np.ones((2, 6)), sparsity=1.5), "mask_rows: sparsity"),
        (lambda: pruning.compress_24(np.ones((2, 6))), "compress_24: weight"),
        (lambda: pruning.compress_24(np.ones((2, 8))), "compress_24: weight: expected at most two"),
        (lambda: pruning.feature_norm([]), "feature_norm: calibration"),
        (lambda: pruning.wanda_score(np.ones((2, 4)), np.ones(3)), "wanda_score: norm"),
    ],
)
def test_the_door_says_what_is_wrong(call, named):
    with pytest.raises(ValueError, match=named):
        call()
