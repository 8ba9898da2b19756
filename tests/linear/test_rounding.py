"""Rounding to nearest, and the bytes it ends in."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.linear import rounding
from twofold.conformance.strategies.linear import float_matrices

GROUPS = st.sampled_from([2, 6, 32, 64, 128])
HALF_ULP, SUBNORMAL = 2.0**-11, 2.0**-25  # what rounding to float16 may lose: of a normal number, of a subnormal


def spread(per_group: np.ndarray, group_size: int, in_features: int) -> np.ndarray:
    return per_group.astype(np.float64)[:, np.arange(in_features) // group_size]


def assert_close(got: np.ndarray, weight: np.ndarray, bound: np.ndarray, what: str) -> None:
    error = np.abs(got.astype(np.float64) - weight)
    worst = np.unravel_index((error - bound).argmax(), error.shape)
    allowed = np.broadcast_to(bound, error.shape)[worst]
    assert (error <= bound).all(), f"{what}: at {worst}: {weight[worst]} became {got[worst]}, more than {allowed} off"


@given(float_matrices())
def test_int8_is_within_half_a_step(weight):
    """A row's scale is its largest weight over 127, exactly enough: no weight moves further than half of it."""
    codes, scale = rounding.round_int8(weight)
    assert codes.min(initial=0) >= -127, "-128 is not to be used"
    step = scale.astype(np.float64)[:, None]
    bound = step / 2 * (1 + 2.0**-15) + 127 * 2.0**-149  # the scale is itself rounded, to float32
    assert_close(rounding.dequantize_8bit(codes, scale), weight, bound, "int8")


@given(float_matrices(), st.sampled_from([1, 3, 32, 50]))
def test_int8_in_groups_is_within_half_a_step(weight, group_size):
    codes, scale = rounding.round_int8(weight, group_size=group_size)
    assert scale.dtype == np.float16, f"scales in {scale.dtype}"
    step = spread(scale, group_size, weight.shape[1])
    bound = step / 2 + 127 * (step * HALF_ULP + SUBNORMAL)
    assert_close(rounding.dequantize_8bit(codes, scale, group_size=group_size), weight, bound, "int8 in groups")


@given(float_matrices())
def test_fp8_is_within_half_a_step_of_the_format(weight):
    """Relative to a weight 2**-4, half the distance between neighbours; near zero, half a subnormal."""
    codes, scale = rounding.round_fp8(weight)
    assert codes.dtype == ml_dtypes.float8_e4m3fn, f"codes in {codes.dtype}"
    step = scale.astype(np.float64)[:, None]
    bound = np.maximum(np.abs(weight) * 2.0**-4, step * 2.0**-10) * (1 + 2.0**-15) + 448 * 2.0**-149
    assert_close(rounding.dequantize_8bit(codes, scale), weight, bound, "fp8")


@settings(max_examples=100)
@given(float_matrices(), GROUPS, st.booleans())
def test_int4_is_within_half_a_step(weight, group_size, with_min):
    """Half a step, and what is lost by storing the scale (times the largest code) and the minimum in float16."""
    codes, scale, minimum = rounding.round_int4(weight, group_size=group_size, with_min=with_min)
    packed = rounding.pack_int4(codes, group_size=group_size)
    got = rounding.dequantize_int4(packed, scale, minimum, group_size=group_size)
    step = spread(scale, group_size, weight.shape[1])
    bound = step / 2 + (15 if with_min else 7) * (step * HALF_ULP + SUBNORMAL)
    if minimum is not None:
        least = np.abs(spread(minimum, group_size, weight.shape[1]))
        bound = bound + 2 * (least * HALF_ULP + SUBNORMAL) + 2.0**-23 * (least + 15 * step)  # summed in float32
    assert_close(got, weight, bound, f"int4, {'with' if with_min else 'without'} a minimum")


@given(float_matrices(), GROUPS)
def test_zero_stays_zero_and_signs_are_symmetric(weight, group_size):
    """Without a minimum, 0 is exactly 0, and the codes of -w stand for the opposite of those of w."""
    for round_, dequantize in (
        (rounding.round_int8, rounding.dequantize_8bit),
        (rounding.round_fp8, rounding.dequantize_8bit),
        (lambda w: _int4(w, group_size), lambda w: w),
    ):
        got, opposite = (dequantize(*_tuple(round_(w))) for w in (weight, -weight))
        assert not got[weight == 0].any(), f"a zero became {got[weight == 0].max()}"
        assert np.array_equal(got, -opposite), f"w and -w differ by {np.abs(got + opposite).max()}"


def _int4(weight: np.ndarray, group_size: int) -> np.ndarray:
    codes, scale, _ = rounding.round_int4(weight, group_size=group_size)
    return rounding.dequantize_int4(rounding.pack_int4(codes, group_size=group_size), scale, group_size=group_size)


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


@settings(max_examples=200)
@given(float_matrices(), GROUPS, st.booleans())
def test_rounding_what_was_rounded_changes_nothing(weight, group_size, with_min):
    """What 4 bits can hold, they hold: a second rounding gives the same numbers, a group's extremes being among them,
    up to how a scale is stored. (Unless the scale is a subnormal of float16, with few bits of its own.)"""
    once, scale = _dequantized(weight, group_size, with_min)
    twice, _ = _dequantized(once, group_size, with_min)
    size = np.abs(once).max(axis=1, keepdims=True)
    normal = ((scale >= 2.0**-14) | (scale == 0)).all(axis=1)
    off = np.abs(twice - once)[normal]
    assert (off <= (4 * HALF_ULP * size + 30 * SUBNORMAL)[normal]).all(), f"differs by {off.max()}"


def _dequantized(weight: np.ndarray, group_size: int, with_min: bool) -> tuple[np.ndarray, np.ndarray]:
    codes, scale, minimum = rounding.round_int4(weight, group_size=group_size, with_min=with_min)
    packed = rounding.pack_int4(codes, group_size=group_size)
    return rounding.dequantize_int4(packed, scale, minimum, group_size=group_size), scale


@settings(max_examples=200)
@given(st.integers(0, 9), st.integers(0, 40), GROUPS, st.integers(0, 2**32 - 1))
def test_unpacking_gives_what_was_packed(out_features, half, group_size, seed):
    """Any codes, any group size, a short last group: back as they were, and every byte is used."""
    codes = np.random.default_rng(seed).integers(0, 16, (out_features, 2 * half), np.uint8)
    packed = rounding.pack_int4(codes, group_size=group_size)
    assert packed.shape == (out_features, half), f"packed into {packed.shape}"
    assert packed.flags.c_contiguous, "rows do not lie together"
    assert np.array_equal(rounding.unpack_int4(packed, group_size=group_size), codes), "not what was packed"


# ---- GGUF -------------------------------------------------------------------------------------------------------


def blocks(weight: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """What the gguf package's own quantizer makes of a matrix: [out_features, groups of 32, bytes]."""
    raw = gguf.quants.quantize(weight, kind)
    return raw.reshape(len(weight), weight.shape[1] // 32, -1)


def halves(raw: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(raw[..., at : at + 2]).view(np.float16)[..., 0]


@given(float_matrices(multiple=32))
def test_blocks_of_gguf_are_read_as_they_are(weight):
    """Blocks that the gguf package wrote dequantize here to what they dequantize to there, bit for bit: our nibbles
    lie in its order."""
    for kind in (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1):
        raw = blocks(weight, kind)
        want = gguf.quants.dequantize(raw.reshape(len(weight), -1), kind)
        with_min = kind == gguf.GGMLQuantizationType.Q4_1
        packed = raw[..., 4 if with_min else 2 :].reshape(len(weight), -1)
        minimum = halves(raw, 2) if with_min else None
        got = rounding.dequantize_int4(packed, halves(raw, 0), minimum, group_size=32)
        assert np.array_equal(got, want), f"{kind.name}: differs by {np.abs(got - want).max()}"
    raw = blocks(weight, gguf.GGMLQuantizationType.Q8_0)
    want = gguf.quants.dequantize(raw.reshape(len(weight), -1), gguf.GGMLQuantizationType.Q8_0)
    codes = np.ascontiguousarray(raw[..., 2:]).view(np.int8).reshape(weight.shape)
    got = rounding.dequantize_8bit(codes, halves(raw, 0), group_size=32)
    assert np.array_equal(got, want), f"Q8_0: differs by {np.abs(got - want).max()}"


@given(float_matrices(multiple=32))
def test_rounding_is_no_worse_than_ggufs(weight):
    """With a minimum, the squared error of a matrix is at most that of the gguf package's quantizer, to 2 %. (That one
    finds its codes with the scale before it is stored in float16.)"""
    with_min = gguf.GGMLQuantizationType.Q4_1
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight, with_min), with_min)
    ours, _ = _dequantized(weight, 32, True)
    errors = [np.square(w.astype(np.float64) - weight).sum() for w in (ours, theirs)]
    floor = weight.size * (np.abs(weight).max() * 2.0**-11 + SUBNORMAL) ** 2  # storing the minimum
    assert errors[0] <= 1.02 * errors[1] + floor, f"ours {errors[0]:g}, theirs {errors[1]:g}"


# ---- the door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: rounding.round_int8(np.ones(3)), "round_int8: weight"),
        (lambda: rounding.round_int8(np.ones((3, 2), int)), "round_int8: weight"),
        (lambda: rounding.round_fp8(np.ones(3)), "round_fp8: weight"),
        (lambda: rounding.round_int4(np.ones((3, 4)), group_size=3), "round_int4: group_size"),
        (lambda: rounding.round_int4(np.ones((3, 5)), group_size=4), "round_int4: weight"),
        (lambda: rounding.pack_int4(np.ones((3, 5), np.uint8), group_size=4), "pack_int4: codes"),
    ],
)
def test_the_door_says_what_is_wrong(call, named):
    with pytest.raises(ValueError, match=named):
        call()
