"""The tolerance rule accepts what is rounded as it must be, refuses what is wrong, and says where."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from reference.attention.dense_attention import attention_scores, group_heads, ungroup_heads, visible_keys
from twofold.conformance.properties import attention as properties
from twofold.conformance.strategies.attention import packed_cases
from twofold.conformance.tolerance import (
    OutsideBound,
    assert_within,
    attention_bound,
    baseline_error,
    matmul_baseline_bound,
    matmul_bound,
    norm_bound,
    rounding_unit,
)

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float64"]
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_unit_is_the_largest_rounding_error(dtype):
    """Half a step above 1 rounds back to 1 and anything more does not, so no rounding is further off than the unit."""
    unit, to = rounding_unit(dtype), np.dtype(getattr(ml_dtypes, dtype, dtype))
    half, more = (np.array(1 + step).astype(to).astype(np.float64) for step in (unit, 1.5 * unit))
    assert half == 1, f"1 + {unit} rounds to {half}"
    assert more == 1 + 2 * unit or dtype == "float64", f"1 + 1.5 * {unit} rounds to {more}"


@given(seed=seeds, dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1.0, 1e-3, 1e-7, 100.0]))
def test_one_rounding_is_within_every_bound(seed, dtype, scale):
    """The oracle's own result, rounded to the output's dtype (to subnormals too), is right by every rule."""
    ref64 = scale * np.random.default_rng(seed).normal(size=(3, 2, 8))
    got, size = ref64.astype(getattr(ml_dtypes, dtype, dtype)), np.abs(ref64)
    assert_within(got, ref64, attention_bound(ref64, size, np.zeros((3, 2)), dtype), "attention")
    assert_within(got, ref64, matmul_bound(ref64, size, 1, dtype), "matmul")
    assert_within(got, ref64, norm_bound(ref64, 8, dtype), "norm")


@given(seed=seeds, num_terms=st.sampled_from([1, 64, 576, 4096]), offset=st.sampled_from([0.0, 1.0]))
def test_a_sum_in_float32_is_within_the_bounds_in_any_order(seed, num_terms, offset):
    """Blocked, or one term after another: a float32 matmul is right, and the baseline's bound holds for the worst."""
    rng = np.random.default_rng(seed)
    x, w = offset + rng.normal(size=(2, 3, num_terms)).astype(np.float32)
    ref64 = (x.astype(np.float64) * w).sum(-1)
    magnitude = np.abs(x.astype(np.float64) * w).sum(-1)
    for got in (np.einsum("nk,nk->n", x, w), np.cumsum(x * w, axis=-1, dtype=np.float32)[:, -1]):
        assert_within(got, ref64, matmul_bound(ref64, magnitude, num_terms, "float32"), "a sum in float32")
        assert_within(got, ref64, matmul_baseline_bound(ref64, magnitude, num_terms, "float32"), "the baseline")


def attention_as_kernels_do(q, k, v, *, causal=True, scale=None, sliding_window=None, sinks=None, logit_cap=None):
    """Scores and sums in float32, but the probabilities stored in the dtype of q before they meet the values."""
    positions = np.arange(len(k) - len(q), len(k))
    seen = visible_keys(positions, np.arange(len(k)), causal=causal, sliding_window=sliding_window)
    rows = group_heads(q.astype(np.float32) * np.float32(q.shape[2] ** -0.5 if scale is None else scale), k.shape[1])
    scores = attention_scores(rows, k.astype(np.float32), logit_cap)
    scores = np.where(np.repeat(seen, q.shape[1] // k.shape[1], axis=0), scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-1e30)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        sink = group_heads(np.broadcast_to(sinks.astype(np.float32)[:, None], (*q.shape[:2], 1)), k.shape[1])
        total = total + np.exp(np.minimum(sink - top, 80))
    out = weights.astype(q.dtype).astype(np.float32) @ v.astype(np.float32).swapaxes(0, 1)
    return ungroup_heads(out / np.maximum(total, 1e-30), q.shape[1]).astype(q.dtype)


@given(case=packed_cases(dtypes=["bfloat16", "float16"]))
def test_a_kernel_may_store_its_probabilities_in_low_precision(case):
    """The rule leaves room for what every fast kernel does: p in bf16 or fp16, for the tensor cores."""
    backend = SimpleNamespace(**vars(reference) | {"dense_attention": attention_as_kernels_do})
    properties.dense_matches_oracle(backend, case)


def test_a_wrong_row_does_not_hide_behind_a_large_one():
    """Each element has its own bound: an error of 1 % in a small row is seen beside a row of 1e6."""
    ref64 = np.stack([np.full((1, 8), 1e6), np.full((1, 8), 1e-2)])
    got = ref64.astype(np.float32)
    got[1, 0, 5] *= 1.01
    bound = attention_bound(ref64, np.abs(ref64), np.ones((2, 1)), "float32")
    with pytest.raises(OutsideBound, match="1 of 16") as failure:
        assert_within(got, ref64, bound, "toy", properties.OUT_AXES)
    error = failure.value
    assert error.index == (1, 0, 5), f"expected the element that is wrong, got {error.index}"
    assert "token 1, head 0, dim 5" in str(error), f"the message does not say where: {error}"
    assert (error.got, error.expected) == (got[1, 0, 5], 1e-2), f"other values reported: {error}"
    assert error.ratio == pytest.approx(abs(error.got - error.expected) / error.bound), f"ratio {error.ratio}"


@pytest.mark.parametrize(
    ("got", "expected"),
    [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.inf), (np.inf, -np.inf), (1.0, -np.inf), (-np.inf, 0.0), (1.0, np.nan)],
)
def test_what_is_not_finite_must_be_the_same(got, expected):
    """NaN or an infinity in place of a number, or the other way round, is outside every bound."""
    with pytest.raises(OutsideBound):
        assert_within(np.array([0.0, got]), np.array([0.0, expected]), 1e9, "toy")
    assert_within(np.array([expected]), np.array([expected]), 0.0, "the same is within")


def test_shapes_must_agree():
    """A result of another shape is wrong, even where it would broadcast."""
    with pytest.raises(AssertionError, match="expected shape"):
        assert_within(np.zeros((1, 3)), np.zeros((2, 3)), 1.0, "toy")


def test_a_baseline_that_is_not_finite_licenses_nothing():
    """NaN and infinity in the baseline count as no error; otherwise a row counts with its largest."""
    ref64 = np.zeros((3, 2))
    baseline = np.array([[np.nan, 0.5], [np.inf, np.nan], [0.25, -0.75]], np.float32)
    error = baseline_error(baseline, ref64)
    assert error.tolist() == [[0.5], [0.0], [0.75]], f"got {error.tolist()}"
