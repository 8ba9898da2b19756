"""Inputs for the numerics ops: numbers that sit where rounding decides, names of random draws, arrays of every kind."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from reference.numerics.arrays import dtype_named
from reference.numerics.low_precision import FLOAT_FORMATS

NARROW_FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
ARRAY_DTYPES = (
    *FLOAT_DTYPES,
    *("float8_e4m3fn", "float8_e5m2"),
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint32"),
)

# ---- rounding ---------------------------------------------------------------------------------------------------


def finite_values(format: str) -> np.ndarray:
    """The finite non-negative values of a format of at most 16 bits, ascending: their place is their bit pattern."""
    bits = 8 * dtype_named(format).itemsize
    patterns = np.arange(2 ** (bits - 1), dtype=f"uint{bits}")
    with np.errstate(invalid="ignore"):  # NaNs that signal
        values = patterns.view(dtype_named(format)).astype(np.float64)
    return values[np.isfinite(values)]


def every_16_bit_value() -> np.ndarray:
    """Every bit pattern of bfloat16 and of float16, as float32: NaNs, infinities and both zeros among them."""
    patterns = np.arange(2**16, dtype=np.uint16)
    return np.concatenate([patterns.view(t).astype(np.float32) for t in (ml_dtypes.bfloat16, np.float16)])


def around_every_value(format: str, dtype: str) -> np.ndarray:
    """Every finite value of a format, the midpoint to the next (beyond the largest too), and that midpoint's own
    neighbours in ``dtype``; of both signs."""
    values = finite_values(format)
    beyond = 2 * values[-1] - values[-2]
    midpoints = ((values + np.append(values[1:], beyond)) / 2).astype(dtype)
    around = [values.astype(dtype), midpoints, np.nextafter(midpoints, np.inf), np.nextafter(midpoints, -np.inf)]
    return np.concatenate([*around, *(-x for x in around)], dtype=dtype)


@st.composite
def rounding_inputs(draw) -> tuple[np.ndarray, str]:
    """A format and an array of values on, between and beyond its marks, in any float dtype, shape and strides."""
    format = draw(st.sampled_from(NARROW_FORMATS), label="format")
    dtype = draw(st.sampled_from(FLOAT_DTYPES), label="dtype")
    shape = draw(st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4)]), label="shape")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    values = finite_values(format)
    low = rng.integers(0, len(values), shape)
    high = np.minimum(low + 1, len(values) - 1)
    share = rng.choice([0.0, 0.5, 0.5 - 2.0**-40, 0.5 + 2.0**-40, 0.25, rng.random()], shape)
    x = values[low] + share * (values[high] - values[low])
    if draw(st.booleans(), label="extreme values"):
        largest = FLOAT_FORMATS[format].largest
        extremes = [0.0, np.inf, np.nan, largest, 1.01 * largest, 1.2 * largest, values[1] / 2, values[1] / 3, 5e-324]
        x = np.where(rng.random(shape) < 0.5, x, rng.choice(extremes, shape))
    x = x * rng.choice([1.0, -1.0], shape)
    with np.errstate(over="ignore"):
        x = np.asarray(x).astype(dtype_named(dtype))
    return with_strides(draw, x), format


# ---- random draws -----------------------------------------------------------------------------------------------


@dataclass
class Draws:
    """What names a draw, a row each."""

    seeds: np.ndarray
    positions: np.ndarray
    sample_indices: np.ndarray
    purpose: int
    num_draws: int

    def rows(self, rows) -> "Draws":
        return Draws(self.seeds[rows], self.positions[rows], self.sample_indices[rows], self.purpose, self.num_draws)


@st.composite
def draws(draw) -> Draws:
    """A few rows, some of which share a seed, a position or an index; seeds of all 64 bits; widths that end inside a
    block."""
    num_rows = draw(st.integers(0, 5), label="num_rows")
    per_row = {"min_size": num_rows, "max_size": num_rows}
    seed = st.sampled_from([0, 1, -1, 2**32, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)
    position = st.sampled_from([0, 1, 2**31 - 1]) | st.integers(0, 2**31 - 1)
    return Draws(
        np.array(draw(st.lists(seed, **per_row), label="seeds"), np.int64),
        np.array(draw(st.lists(position, **per_row), label="positions"), np.int32),
        np.array(draw(st.lists(st.integers(0, 3), **per_row), label="sample_indices"), np.int32),
        draw(st.integers(0, 3), label="purpose"),
        draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 63, 130]), label="num_draws"),
    )


@st.composite
def counters(draw) -> tuple[np.ndarray, np.ndarray]:
    """Counters and keys of Philox, words of all zeros and all ones among them."""
    num_draws = draw(st.integers(0, 4), label="num_draws")
    word = st.sampled_from([0, 1, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
    words = draw(st.lists(word, min_size=6 * num_draws, max_size=6 * num_draws), label="words")
    both = np.array(words, np.uint32).reshape(num_draws, 6)
    return both[:, :4], both[:, 4:]


# ---- arrays -----------------------------------------------------------------------------------------------------


@st.composite
def host_arrays(draw, min_axes: int = 0) -> np.ndarray:
    """Random bits in every dtype that crosses to a device, in any shape and strides."""
    dtype = dtype_named(draw(st.sampled_from(ARRAY_DTYPES), label="dtype"))
    shape = draw(st.lists(st.integers(0, 4), min_size=min_axes, max_size=3).map(tuple), label="shape")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    if dtype.name == "bool":
        x = np.asarray(rng.integers(0, 2, shape), bool)
    else:
        x = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape).copy()
    return with_strides(draw, x)


def with_strides(draw, x: np.ndarray) -> np.ndarray:
    """The same values, laid out as drawn: together, back to front, with gaps, or the last axis first."""
    layout = draw(st.sampled_from(["contiguous", "reversed", "gaps", "transposed", "read-only"]), label="layout")
    if layout == "read-only":
        x = x.copy()
        x.flags.writeable = False
    if x.ndim == 0 or layout in ("contiguous", "read-only"):
        return x
    if layout == "reversed":
        return x[::-1].copy()[::-1]
    if layout == "transposed":
        return x.T.copy().T
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]
