"""Inputs for the fusion ops: ragged sizes, every head ratio, strided rows, values that stretch a float's range."""

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from reference.fusion.rotary import rotary_tables

DTYPES = ("float32", "bfloat16", "float16")
SIZES = (1, 2, 24, 64, 80, 96)


@dataclass
class Call:
    """A call of an op, with host arrays: by argument name, in the order of the signature."""

    op: str
    arrays: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)
    mutates: tuple[str, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        """That of the activations."""
        return next(a.dtype for a in self.arrays.values() if a.dtype.kind not in "iu")

    def in_float64(self) -> "Call":
        """The same call for the oracle: the same values, widened."""
        return replace(self, arrays={n: a if a.dtype.kind in "iu" else widen(a) for n, a in self.arrays.items()})

    def with_arrays(self, **arrays: np.ndarray) -> "Call":
        return replace(self, arrays=self.arrays | arrays)


def widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def drawn_dtype(draw: st.DrawFn, names: tuple[str, ...] = DTYPES) -> np.dtype:
    name = draw(st.sampled_from(names), label="dtype")
    return np.dtype(getattr(ml_dtypes, name, name))


def number_of_tokens(draw: st.DrawFn) -> int:
    """Often one: kernels take another way then."""
    return draw(st.one_of(st.just(1), st.integers(0, 7)), label="num_tokens")


def rng_of(draw: st.DrawFn) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))


def matrix(draw: st.DrawFn, rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    """Normal numbers of a drawn size. Sometimes some are zero, and sometimes rows lie apart, with NaN between them."""
    largest = 1.0 if dtype == np.float16 else 1e4  # sums of products stay below what the dtype can hold
    scale = draw(st.sampled_from([1.0, 1e-3, largest]), label=f"{name}: scale")
    values = rng.normal(scale=scale, size=shape)
    if draw(st.booleans(), label=f"{name}: some zeros"):
        values[rng.random(shape) < 0.3] = 0
    if len(shape) < 2 or not draw(st.booleans(), label=f"{name}: strided"):
        return values.astype(dtype)
    padded = np.full((*shape[:-1], shape[-1] + 3), np.nan, dtype)
    padded[..., :-3] = values
    return padded[..., :-3]


@st.composite
def embedding_calls(draw: st.DrawFn) -> Call:
    rng, dtype = rng_of(draw), drawn_dtype(draw)
    vocab_size = draw(st.integers(1, 40), label="vocab_size")
    table = matrix(draw, rng, (vocab_size, draw(st.sampled_from(SIZES), label="hidden_size")), dtype, "weight")
    ids = rng.integers(0, vocab_size, draw(st.integers(0, 9), label="num_tokens"))
    ids[: draw(st.integers(0, 2), label="last rows")] = vocab_size - 1
    return Call("embedding", {"token_ids": ids, "weight": table})


@st.composite
def norm_calls(draw: st.DrawFn, op: str | None = None) -> Call:
    """rms_norm of rows or of heads, add_rms_norm, or rms_norm_linear."""
    rng, dtype = rng_of(draw), drawn_dtype(draw)
    op = op or draw(st.sampled_from(["rms_norm", "add_rms_norm", "rms_norm_linear"]), label="op")
    hidden = draw(st.sampled_from(SIZES), label="hidden_size")
    rows: tuple[int, ...] = (number_of_tokens(draw),)
    if op == "rms_norm" and draw(st.booleans(), label="heads"):
        rows += (3,)
    options = {"eps": draw(st.sampled_from([1e-6, 1e-5, 0.1]), label="eps")}
    arrays = {"x": matrix(draw, rng, (*rows, hidden), dtype, "x")}
    scale = rng.uniform(0.5, 1.5, hidden).astype(dtype)
    if op == "rms_norm":
        return Call(op, arrays | {"weight": scale}, options)
    if op == "add_rms_norm":
        return Call(
            op, arrays | {"residual": matrix(draw, rng, (*rows, hidden), dtype, "residual"), "weight": scale}, options
        )
    return Call(op, arrays | {"norm_weight": scale} | _linear(draw, rng, hidden, dtype), options)


@st.composite
def linear_add_calls(draw: st.DrawFn, op: str | None = None) -> Call:
    """linear_add, or swiglu_linear_add. Gates reach far to both sides, where e^-z overflows or vanishes."""
    rng, dtype = rng_of(draw), drawn_dtype(draw)
    op = op or draw(st.sampled_from(["linear_add", "swiglu_linear_add"]), label="op")
    num_tokens, in_features = number_of_tokens(draw), draw(st.sampled_from(SIZES), label="in_features")
    linear = _linear(draw, rng, in_features, dtype)
    bias = {name: linear.pop(name) for name in list(linear) if name == "bias"}
    residual = matrix(draw, rng, (num_tokens, len(linear["weight"])), dtype, "residual")
    if op == "swiglu_linear_add":
        gate_up = gates(draw, rng, num_tokens, in_features, dtype)
        return Call("swiglu_linear_add", {"gate_up": gate_up} | linear | {"residual": residual} | bias)
    x = matrix(draw, rng, (num_tokens, in_features), dtype, "x")
    return Call("linear_add", {"x": x} | linear | {"residual": residual} | bias)


@st.composite
def swiglu_calls(draw: st.DrawFn) -> Call:
    rng, dtype = rng_of(draw), drawn_dtype(draw)
    size = draw(st.sampled_from(SIZES), label="intermediate_size")
    return Call("swiglu", {"gate_up": gates(draw, rng, number_of_tokens(draw), size, dtype)})


def gates(draw: st.DrawFn, rng: np.random.Generator, num_tokens: int, size: int, dtype: np.dtype) -> np.ndarray:
    gate_up = matrix(draw, rng, (num_tokens, 2 * size), dtype, "gate_up")
    if gate_up.size and draw(st.booleans(), label="extreme gates"):
        gate_up[:, 0] = draw(st.sampled_from([-1e4, -100.0, -88.0, 88.0]), label="gate")
    return gate_up


def _linear(draw: st.DrawFn, rng: np.random.Generator, in_features: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    out_features = draw(st.sampled_from([1, 5, 40]), label="out_features")
    arrays = {"weight": matrix(draw, rng, (out_features, in_features), dtype, "weight")}
    if draw(st.booleans(), label="bias"):
        arrays["bias"] = matrix(draw, rng, (out_features,), dtype, "bias")
    return arrays


@st.composite
def rotary_calls(draw: st.DrawFn, op: str | None = None) -> Call:
    """rotary, or rotary_write_kv into a cache of shuffled slots, some tokens skipped, everything else NaN."""
    rng, dtype = rng_of(draw), drawn_dtype(draw)
    op = op or draw(st.sampled_from(["rotary", "rotary_write_kv"]), label="op")
    half_dim = draw(st.sampled_from([1, 2, 12, 32]), label="half_dim")
    head_dim = 2 * half_dim + draw(st.sampled_from([0, 0, 1, 6]), label="features that are not turned")
    num_tokens, num_kv_heads = (
        draw(st.integers(0, 6), label="num_tokens"),
        draw(st.sampled_from([1, 2, 3]), label="KV heads"),
    )
    num_heads = num_kv_heads * draw(st.sampled_from([1, 3, 4]), label="query heads per KV head")
    max_positions = draw(st.sampled_from([1, 50, 4096]), label="max_positions")
    cos, sin = rotary_tables(2 * half_dim, max_positions, base=draw(st.sampled_from([10.0, 1e4, 5e5]), label="base"))
    positions = rng.integers(0, max_positions, num_tokens)
    positions[: draw(st.integers(0, 2), label="last positions")] = max_positions - 1
    arrays = {
        "q": matrix(draw, rng, (num_tokens, num_heads, head_dim), dtype, "q"),
        "k": matrix(draw, rng, (num_tokens, num_kv_heads, head_dim), dtype, "k"),
        "cos": cos,
        "sin": sin,
        "positions": positions,
    }
    options: dict[str, Any] = {"interleaved": draw(st.booleans(), label="interleaved")}
    if op == "rotary":
        return Call(op, arrays, options)

    v = matrix(draw, rng, (num_tokens, num_kv_heads, head_dim), dtype, "v")
    block_size, spare = (
        draw(st.sampled_from([1, 3, 16]), label="block_size"),
        draw(st.integers(0, 4), label="spare blocks"),
    )
    num_blocks = -(-num_tokens // block_size) + spare
    slots = rng.permutation(num_blocks * block_size)[:num_tokens].astype(np.int64)
    slots[rng.random(num_tokens) < draw(st.sampled_from([0.0, 0.3]), label="share skipped")] = -1
    caches = np.full((num_blocks, 2, block_size, num_kv_heads, head_dim), np.nan, dtype)
    arrays = {"q": arrays.pop("q"), "k": arrays.pop("k"), "v": v} | arrays
    arrays |= {"k_cache": caches[:, 0], "v_cache": caches[:, 1], "slot_mapping": slots}
    if draw(st.booleans(), label="q/k norms"):
        arrays["q_norm"], arrays["k_norm"] = rng.uniform(0.5, 1.5, (2, head_dim)).astype(dtype)
        options["eps"] = 1e-5
    return Call(op, arrays, options, mutates=("k_cache", "v_cache"))


calls = st.one_of(embedding_calls(), norm_calls(), linear_add_calls(), swiglu_calls(), rotary_calls())
