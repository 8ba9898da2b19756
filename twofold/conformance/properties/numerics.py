"""What any backend's numerics ops must satisfy. A property takes the backend, and raises AssertionError."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from reference.numerics.arrays import dtype_named
from reference.numerics.low_precision import FLOAT_FORMATS
from twofold.conformance.backends import assume_supported
from twofold.conformance.strategies.numerics import Draws, finite_values
from twofold.conformance.tolerance import assert_within

Backend = Any  # a module or object with the interface's names


def call(backend: Backend, op: str, *args: Any, out: np.ndarray | None = None, **kwargs: Any) -> Any:
    """The op's result(s) on the host, its host-array arguments placed on the backend, and left there unchanged."""
    before = [arg.copy() if isinstance(arg, np.ndarray) else None for arg in args]
    placed = [backend.from_host(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
    if out is not None:
        kwargs["out"] = backend.from_host(out)
    result = getattr(backend, op)(*placed, **kwargs)
    assert out is None or result is kwargs["out"], f"{op}: a result other than out"
    for place, (original, arg) in enumerate(zip(before, placed)):
        if original is not None:
            assert same_bits(backend.to_host(arg), original), f"{op}: argument {place} was changed"
    if isinstance(result, tuple):
        return tuple(np.asarray(backend.to_host(part)) for part in result)
    return np.asarray(backend.to_host(result))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in shape, dtype and every bit, NaN's and zero's sign included."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def refuses(backend: Backend, op: str, argument: str, *args: Any, **kwargs: Any) -> None:
    """A bad argument raises ValueError, whose text names it."""
    said = None
    try:
        call(backend, op, *args, **kwargs)
    except ValueError as error:
        said = str(error)
    assert said is not None, f"{op}: accepted a bad {argument}"
    assert argument in said, f"{op}: the error does not name {argument}: {said}"


# ---- low_precision ----------------------------------------------------------------------------------------------


def nearest_even(x: np.ndarray, format: str, saturate: bool) -> np.ndarray:
    """The right answer in float64, looked up in the table of all the format's values: the nearer neighbour, and of two
    equally near the one with the even bit pattern. Exact, because a midpoint has one bit more than its neighbours."""
    if x.dtype == dtype_named(format):
        return x.astype(np.float64)
    values, (*_, largest, overflow) = finite_values(format), FLOAT_FORMATS[format]
    marks = np.append(values, 2 * values[-1] - values[-2])  # what would come next, if the format went on
    size = np.abs(x.astype(np.float64))
    size = np.where(np.isnan(size), 0.0, np.minimum(size, marks[-1]))
    low = np.minimum(np.searchsorted(marks, size, side="right") - 1, len(marks) - 2)
    middle = (marks[low] + marks[low + 1]) / 2
    nearest = np.where(size == middle, low + low % 2, low + (size > middle))
    result = np.where(marks[nearest] > largest, largest if saturate else overflow, marks[nearest])
    return np.copysign(np.where(np.isnan(x.astype(np.float64)), np.nan, result), x.astype(np.float64))


def rounds_to_nearest_even(backend: Backend, x: np.ndarray, format: str, saturate: bool) -> None:
    """`round_to` gives the nearest value, ties to even, with the sign of x, in the dtype and shape of x."""
    assume_supported(backend, x.dtype)
    with np.errstate(over="ignore"):
        expected = nearest_even(x, format, saturate).astype(x.dtype)
    got = call(backend, "round_to", x, format, saturate=saturate)
    assert got.dtype == x.dtype, f"round_to: dtype {got.dtype} for {x.dtype}"
    _assert_same_numbers(got, expected, x, f"round_to {format}, saturate={saturate}")
    poisoned = np.full(x.shape, np.nan, x.dtype)
    written = call(backend, "round_to", x, format, saturate=saturate, out=poisoned)
    _assert_same_numbers(written, expected, x, f"round_to {format}, out")


def rounds_like_ml_dtypes(backend: Backend, x: np.ndarray, format: str) -> None:
    """`round_to` and `cast` give what a cast of ml_dtypes gives; saturated, its cast of what has been clipped."""
    target, largest = dtype_named(format), FLOAT_FORMATS[format].largest
    with np.errstate(over="ignore", invalid="ignore"):
        expected = {False: x.astype(target), True: np.clip(x, -largest, largest).astype(target)}
    for saturate, codes in expected.items():
        what = f"{format}, saturate={saturate}"
        rounded = call(backend, "round_to", x, format, saturate=saturate)
        _assert_same_numbers(rounded, codes.astype(x.dtype), x, f"round_to {what}")
        stored = call(backend, "cast", x, format, saturate=saturate)
        assert stored.dtype == target, f"cast: dtype {stored.dtype} for {format}"
        _assert_same_numbers(stored.astype(x.dtype), codes.astype(x.dtype), x, f"cast {what}")


@np.errstate(invalid="ignore")  # NaNs that signal
def _assert_same_numbers(got: np.ndarray, expected: np.ndarray, x: np.ndarray, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, not {expected.shape}"
    got, expected, x = (np.atleast_1d(a.astype(np.float64)) for a in (got, expected, x))
    same = (got == expected) & (np.signbit(got) == np.signbit(expected)) | (np.isnan(got) & np.isnan(expected))
    if not same.all():
        worst = tuple(np.argwhere(~same)[0])
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.size} differ; {x[worst]!r} became {got[worst]!r}, "
            f"not {expected[worst]!r}"
        )


# ---- philox -----------------------------------------------------------------------------------------------------


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python's integers, straight from the paper: the cipher, one counter at a time."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for step in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c2, 2**32)
        round_key = (k0 + step * 0x9E3779B9) % 2**32, (k1 + step * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = high_1 ^ c1 ^ round_key[0], low_1, high_0 ^ c3 ^ round_key[1], low_0
    return [c0, c1, c2, c3]


def philox_is_philox(backend: Backend, counter: np.ndarray, key: np.ndarray) -> None:
    """Every block of words is the one that Python's integers give."""
    expected = [philox_by_hand(c, k) for c, k in zip(counter.tolist(), key.tolist())]
    got = call(backend, "philox_4x32", counter, key)
    assert got.dtype == np.uint32, f"philox_4x32: dtype {got.dtype}"
    assert got.tolist() == expected, f"philox_4x32: {got.tolist()}, not {expected}"


def draw_numbers(backend: Backend, op: str, named: Draws) -> np.ndarray:
    arrays = (named.seeds, named.positions, named.sample_indices)
    got = call(backend, op, *arrays, purpose=named.purpose, num_draws=named.num_draws)
    assert got.dtype == np.float32, f"{op}: dtype {got.dtype}"
    assert got.shape == (len(named.seeds), named.num_draws), f"{op}: shape {got.shape}"
    return got


def uniform_words_are_the_counters(backend: Backend, named: Draws) -> None:
    """Column j is word j % 4 of counter (position, sample index, purpose, j // 4), bit for bit, inside (0, 1)."""
    got = draw_numbers(backend, "random_uniform", named)
    for row, (seed, position, index) in enumerate(zip(named.seeds, named.positions, named.sample_indices)):
        key = [int(seed) % 2**32, int(seed) // 2**32 % 2**32]
        blocks = range(-(-named.num_draws // 4))
        words = [w for b in blocks for w in philox_by_hand([int(position), int(index), named.purpose, b], key)]
        expected = [((word >> 9) + 0.5) / 2**23 for word in words][: named.num_draws]
        assert got[row].tolist() == expected, f"random_uniform: row {row}"
    assert ((got > 0) & (got < 1)).all(), "random_uniform: outside (0, 1)"


def gumbel_is_its_formula(backend: Backend, named: Draws) -> None:
    """Gumbel numbers are -log(-log u) of the uniform ones: a relative error of the inner logarithm is an absolute error
    of the outer."""
    u = draw_numbers(backend, "random_uniform", named).astype(np.float64)
    expected = -np.log(-np.log(u))
    bound = 8 * 2.0**-24 * (1 + np.abs(expected))
    assert_within(draw_numbers(backend, "random_gumbel", named), expected, bound, "random_gumbel", ("row", "column"))


def normal_is_its_formula(backend: Backend, named: Draws) -> None:
    """Normal numbers are Box and Muller's of the uniform ones; the angle, up to 2 pi, loses some units of rounding."""
    even = Draws(named.seeds, named.positions, named.sample_indices, named.purpose, -(-named.num_draws // 2) * 2)
    u = draw_numbers(backend, "random_uniform", even).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0::2])), 2 * np.pi * u[:, 1::2]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(u.shape)
    bound = 8 * 2.0**-24 * (1 + 2 * np.pi) * np.repeat(radius, 2, axis=1)
    got = draw_numbers(backend, "random_normal", named)
    assert_within(got, expected[:, : named.num_draws], bound[:, : named.num_draws], "random_normal", ("row", "column"))


def draws_do_not_depend_on_company(backend: Backend, op: str, named: Draws, fewer: int) -> None:
    """Fewer draws are a prefix of more; a row alone is the same row of the batch, and so is it in reverse order."""
    full = draw_numbers(backend, op, named)
    prefix = Draws(named.seeds, named.positions, named.sample_indices, named.purpose, min(fewer, named.num_draws))
    got = draw_numbers(backend, op, prefix)
    assert same_bits(got, np.ascontiguousarray(full[:, : prefix.num_draws])), f"{op}: fewer draws are others"
    for row in range(len(full)):
        assert same_bits(draw_numbers(backend, op, named.rows([row])), full[[row]]), f"{op}: row {row} alone"
    assert same_bits(draw_numbers(backend, op, named.rows(slice(None, None, -1))), full[::-1].copy()), f"{op}: reversed"


def purposes_never_collide(backend: Backend, seed: int, num_positions: int, num_samples: int) -> None:
    """Under one seed no two of (position, sample index, purpose, block) give the same four words."""
    position, index, purpose, block = np.meshgrid(range(num_positions), range(num_samples), range(4), range(3))
    counter = np.stack([axis.ravel() for axis in (position, index, purpose, block)], axis=1).astype(np.uint32)
    key = np.tile(np.array([[seed % 2**32, seed // 2**32 % 2**32]], np.uint32), (len(counter), 1))
    words = call(backend, "philox_4x32", counter, key)
    assert len(np.unique(words, axis=0)) == len(counter), "philox_4x32: two counters, one block"


def has_the_law(
    backend: Backend, op: str, named: Draws, cdf: Callable[[np.ndarray], np.ndarray], mean: float, variance: float
) -> None:
    """All numbers together follow the law (Kolmogorov-Smirnov), and mean and variance are its own, each within five
    standard deviations of what so many independent draws would show; neighbours in any direction are uncorrelated."""
    x = draw_numbers(backend, op, named).astype(np.float64)
    n = x.size
    empirical = np.arange(1, n + 1) / n
    distance = np.abs(cdf(np.sort(x.ravel())) - empirical).max()
    assert distance * math.sqrt(n) < 2.65, f"{op}: Kolmogorov-Smirnov {distance * math.sqrt(n):.2f}"  # p = 1.6e-6
    centred = (x - mean) / math.sqrt(variance)
    kurtosis = (centred**4).mean()
    for name, value, deviation in (
        ("mean", centred.mean(), 1.0),
        ("variance", (centred**2).mean() - 1, math.sqrt(kurtosis - 1)),
        ("correlation of columns", (centred[:, :-1] * centred[:, 1:]).mean(), 1.0),
        ("correlation of rows", (centred[:-1] * centred[1:]).mean(), 1.0),
    ):
        assert abs(value) * math.sqrt(n) < 5 * deviation + 1, f"{op}: {name} off by {value:.2e}"


# ---- arrays -----------------------------------------------------------------------------------------------------


def survives_the_trip(backend: Backend, x: np.ndarray) -> None:
    """From the host and back, every bit, the dtype and the shape are the same."""
    back = backend.to_host(backend.from_host(x))
    assert isinstance(back, np.ndarray), f"to_host: {type(back)}"
    assert same_bits(back, x), f"from_host, to_host: {back!r} for {x!r}"


def converts_on_the_way(backend: Backend, x: np.ndarray, dtype: str) -> None:
    """`from_host` with a dtype converts as NumPy does."""
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype_named(dtype))
        got = backend.to_host(backend.from_host(x, dtype=dtype))
    assert same_bits(got, expected), f"from_host to {dtype}: {got!r}, not {expected!r}"


def empty_is_as_asked(backend: Backend, shape: tuple[int, ...], dtype: str) -> None:
    """An empty array has the shape and dtype asked for, and what is written to it stays."""
    array = backend.empty(shape, dtype=dtype)
    array[...] = 1
    host = backend.to_host(array)
    assert host.shape == shape, f"empty: shape {host.shape}, not {shape}"
    assert same_bits(host, np.ones(shape, dtype_named(dtype))), f"empty: {host!r}, not ones of {dtype}"


def takes_rows(backend: Backend, x: np.ndarray, rows: np.ndarray) -> None:
    """Rows are copied in the order asked for, bit for bit, and lie one after another; into ``out`` if there is one."""
    expected = np.stack([x[row] for row in rows]) if len(rows) else np.empty((0, *x.shape[1:]), x.dtype)
    got = call(backend, "take_rows", x, rows)
    assert got.flags.c_contiguous, f"take_rows: strides {got.strides}"
    assert same_bits(got, expected), f"take_rows: {got!r}, not {expected!r}"
    written = call(backend, "take_rows", x, rows, out=np.zeros(expected.shape, x.dtype))
    assert same_bits(written, expected), "take_rows: out"


def bitcast_is_a_view(backend: Backend, pool: np.ndarray, start: int, stop: int, dtype: str) -> None:
    """Columns of a pool of bytes are seen as numbers, and what is written through them is in the pool."""
    size = dtype_named(dtype).itemsize
    on_backend = backend.from_host(pool.copy())
    view = backend.bitcast(on_backend[:, start:stop], dtype)
    expected = np.ascontiguousarray(pool[:, start:stop]).view(dtype_named(dtype))
    assert same_bits(backend.to_host(view), expected), f"bitcast: {start}:{stop} as {dtype}"
    view[...] = 0
    after = pool.copy()
    after[:, start : start + (stop - start) // size * size] = 0
    assert same_bits(backend.to_host(on_backend), after), "bitcast: a write did not reach the pool, or went beside"
