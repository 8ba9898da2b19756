"""Inputs for the linear layers: every code, ragged groups, few and many tokens, strided rows, adapters nobody uses.

Codes are drawn as such, not found by rounding: -128, both ends of a nibble, subnormal 8-bit floats, scales that are
zero or negative (GGUF's Q4_0 has them) are all valid, and a checkpoint from elsewhere may hold any of them.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from twofold.conformance.strategies.fusion import DTYPES, Call, drawn_dtype, matrix, rng_of

LINEAR_OPS = (
    "linear",
    "linear_int8",
    "linear_int8_int8",
    "linear_fp8",
    "linear_fp8_fp8",
    "linear_int4",
    "sparse_linear",
)
TOKENS = (0, 1, 2, 4, 5, 9, 66)  # both sides of where the reference changes its way
# 1536: more int8 products than float32 sums exactly; with many rows, more than one tile. Once in a while.
IN_FEATURES = (2, 4, 24, 32, 66, 96, 132, 2, 24, 66, 96, 132, 1536)
OUT_FEATURES = (1, 3, 40, 100)


@st.composite
def linear_calls(draw: st.DrawFn, op: str) -> Call:
    """One of ``LINEAR_OPS``, with weights of about unit size whatever they are stored in."""
    rng, dtype = rng_of(draw), drawn_dtype(draw)
    step = 4 if op == "sparse_linear" else 2
    in_features = draw(st.sampled_from([n for n in IN_FEATURES if n % step == 0]), label="in_features")
    shape = (draw(st.sampled_from(OUT_FEATURES), label="out_features"), in_features)
    x = matrix(draw, rng, (draw(st.sampled_from(TOKENS), label="num_tokens"), in_features), dtype, "x")
    arrays, options = {"x": x}, {}
    if op == "linear":
        arrays["weight"] = matrix(draw, rng, shape, _weight_dtype(draw, dtype), "weight")
    elif op == "sparse_linear":
        arrays |= _two_of_four(draw, rng, shape, _weight_dtype(draw, dtype))
    else:
        grouped = op == "linear_int4" or (op == "linear_int8" and draw(st.booleans(), label="groups"))
        if grouped:
            sizes = (2, 4, 32, 64, 128) if op == "linear_int4" else (1, 3, 32, 50)
            options["group_size"] = draw(st.sampled_from(sizes), label="group_size")
        arrays |= _codes(draw, rng, op, shape) | _scales(draw, rng, op, shape, options.get("group_size"))
    if draw(st.booleans(), label="bias"):
        arrays["bias"] = matrix(draw, rng, shape[:1], dtype, "bias")
    if op != "linear" and draw(st.booleans(), label="residual"):  # for `linear` that is `linear_add`
        arrays["residual"] = matrix(draw, rng, (len(x), shape[0]), dtype, "residual")
    return Call(op, arrays, options)


def _codes(draw: st.DrawFn, rng: np.random.Generator, op: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    out_features, in_features = shape
    codes = rng.integers(0, 256, (out_features, in_features // 2 if op == "linear_int4" else in_features), np.uint8)
    if draw(st.booleans(), label="weight: strided"):
        codes = np.pad(codes, [(0, 0), (0, 3)], constant_values=0xC7)[:, :-3]
    if op in ("linear_fp8", "linear_fp8_fp8"):
        codes[codes & 0x7F == 0x7F] = 0x7E  # the NaNs: 448, the largest number
        return {"weight": codes.view(ml_dtypes.float8_e4m3fn)}
    return {"weight": codes if op == "linear_int4" else codes.view(np.int8)}


def _scales(
    draw: st.DrawFn, rng: np.random.Generator, op: str, shape: tuple[int, int], group_size: int | None
) -> dict[str, np.ndarray]:
    out_features, in_features = shape
    largest = {"linear_int4": 8, "linear_fp8": 448, "linear_fp8_fp8": 448}.get(op, 127)
    count = (out_features,) if group_size is None else (out_features, -(-in_features // group_size))
    scale = rng.uniform(0.3, 1.5, count) / largest
    if draw(st.booleans(), label="scales of 0 and below"):
        scale *= rng.choice([1, 0, -1], count, p=[0.6, 0.2, 0.2])
    narrow = group_size is not None and draw(st.booleans(), label="float16 scales")
    arrays = {"weight_scale": scale.astype(np.float16 if narrow else np.float32)}
    if op == "linear_int4" and draw(st.booleans(), label="minimum"):
        arrays["weight_min"] = rng.normal(size=count).astype(arrays["weight_scale"].dtype)
    return arrays


def _weight_dtype(draw: st.DrawFn, dtype: np.dtype) -> np.dtype:
    """Any, but float16 with float16 activations: large weights in a wider one would give results beyond 65504."""
    return dtype if dtype == np.float16 else drawn_dtype(draw)


def _two_of_four(
    draw: st.DrawFn, rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Values, and indices whose last nibble would be refused if it were read, where no group owns it."""
    out_features, num_groups = shape[0], shape[1] // 4
    pairs = np.array([first | second << 2 for second in range(4) for first in range(second)], np.uint8)
    nibbles = rng.choice(pairs, (out_features, num_groups + num_groups % 2))
    nibbles[:, num_groups:] = 0  # both places 0
    values = matrix(draw, rng, (out_features, 2 * num_groups), dtype, "values")
    return {"values": values, "indices": nibbles[:, ::2] | nibbles[:, 1::2] << 4}


@st.composite
def lora_calls(draw: st.DrawFn, crowded: bool = False) -> Call:
    """Adapters of several ranks, filled up with zeros, of a layer or of several side by side; those that no token uses
    hold NaN. ``crowded``: at least four tokens for each adapter, and all in 16 bits."""
    rng, dtype = rng_of(draw), drawn_dtype(draw, ("bfloat16", "float16") if crowded else DTYPES)
    num_tokens = draw(st.sampled_from([16, 23, 40] if crowded else [0, 1, 3, 7]), label="num_tokens")
    in_features = draw(st.sampled_from([24, 264] if crowded else [1, 24, 66]), label="in_features")
    widths = draw(
        st.sampled_from([[1], [24], [66]])
        | st.lists(st.sampled_from([16, 32]), min_size=2, max_size=3)
        | st.lists(st.sampled_from([0, 3, 16]), min_size=1, max_size=4).filter(any),
        label="widths",
    )
    out_features, layers = sum(widths), len(widths)
    ranks = draw(st.lists(st.sampled_from([1, 3, 8, 16]), min_size=1, max_size=4), label="ranks")
    ids = draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=num_tokens, max_size=num_tokens), label="adapter_ids")
    factors = dtype if crowded else drawn_dtype(draw)
    lora_a = rng.normal(size=(len(ranks), layers, max(ranks), in_features)).astype(factors)
    lora_b = rng.normal(size=(len(ranks), out_features, max(ranks))).astype(factors)
    scaling = rng.choice([0.0, 0.5, 2.0, -1.0], len(ranks)).astype(np.float32)
    for adapter, rank in enumerate(ranks):
        lora_a[adapter, :, rank:], lora_b[adapter, :, rank:] = 0, 0
        if adapter not in ids:
            lora_a[adapter], lora_b[adapter], scaling[adapter] = np.nan, np.nan, np.nan
    x_shape = num_tokens, in_features
    arrays = {
        "base": matrix(draw, rng, (num_tokens, out_features), dtype, "base"),
        "x": rng.normal(size=x_shape).astype(dtype) if crowded else matrix(draw, rng, x_shape, dtype, "x"),
        "lora_a": lora_a.reshape(len(ranks), -1, in_features),
        "lora_b": lora_b,
        "scaling": scaling,
        "adapter_ids": np.array(ids, np.int32),
    }
    is_one = layers == 1 and draw(st.booleans(), label="without widths")
    return Call("lora", arrays, {} if is_one else {"widths": tuple(widths)})


@st.composite
def activations(draw: st.DrawFn) -> np.ndarray:
    """Rows to quantize: of sizes that differ by orders of magnitude, some zero, some with one outlier, some tiny."""
    rng, dtype = rng_of(draw), drawn_dtype(draw)
    shape = (draw(st.sampled_from([0, 1, 4, 30]), label="num_rows"), draw(st.sampled_from([1, 2, 65]), label="columns"))
    x = matrix(draw, rng, shape, dtype, "x").copy()
    kinds = draw(st.sampled_from([(1.0,), (1.0, 0.0, 30.0, 1e-4)]), label="sizes of rows")
    with np.errstate(over="ignore", under="ignore"):
        x *= rng.choice(kinds, (shape[0], 1)).astype(dtype)
    if x.size and draw(st.booleans(), label="an outlier in each row"):
        x[:, 0] = 3e4
    return x


@st.composite
def int8_matrices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Codes of activations (each row has a 127, so that its scale is 1) and of weights, often all at the extremes."""
    rng = rng_of(draw)
    num_tokens, out_features = draw(st.sampled_from([1, 2, 70]), label="num_tokens"), 3
    in_features = draw(st.sampled_from([1, 30, 1024, 1025, 3000]), label="in_features")
    spread = draw(st.sampled_from([127, 127, 1]), label="size of the codes")
    x = rng.integers(-spread, spread + 1, (num_tokens, in_features))
    weight = rng.integers(-128, 128, (out_features, in_features))
    if draw(st.booleans(), label="extremes"):  # the largest sums there are, just below and just above nothing lost
        x, weight = np.full_like(x, 127), np.where(weight < -120, 127, -128)
    x[:, 0] = 127
    return x, weight.astype(np.int8)


@st.composite
def float_matrices(draw: st.DrawFn, multiple: int = 2) -> np.ndarray:
    """Weights to round: normal, with outliers, all of one sign, constant, sparse, tiny; rows of different sizes."""
    rng = rng_of(draw)
    shape = (
        draw(st.sampled_from([1, 3, 20]), label="out_features"),
        multiple * draw(st.sampled_from([1, 3, 16, 33]), label="in_features / multiple"),
    )
    kind = draw(st.sampled_from(["normal", "outliers", "one sign", "constant", "sparse", "zero"]), label="kind")
    weight = rng.normal(size=shape)
    if kind == "outliers":
        weight *= np.where(rng.random(shape) < 0.05, 50, 1)
    elif kind == "one sign":
        weight = 3 + np.abs(weight)
    elif kind == "constant":
        weight[:] = weight[:, :1]
    elif kind in ("sparse", "zero"):
        weight[rng.random(shape) < (0.8 if kind == "sparse" else 1.1)] = 0
    rows = rng.choice([1.0, 1e-3, 20.0], (shape[0], 1))
    return (weight * rows * draw(st.sampled_from([1.0, 1e-6]), label="size")).astype(np.float32)


@dataclass
class Calibrated:
    """A layer, and what goes into it: features that go together, some much louder than the rest, some silent."""

    weight: np.ndarray
    calibration: list[np.ndarray]


@st.composite
def calibrated_layers(draw: st.DrawFn) -> Calibrated:
    rng = rng_of(draw)
    in_features = 2 * draw(st.sampled_from([1, 2, 8, 20, 70]), label="in_features / 2")
    out_features = draw(st.sampled_from([1, 6]), label="out_features")
    rank = draw(st.sampled_from([1, 4, 64]), label="how many things the features follow")
    mixing = rng.normal(size=(rank, in_features)) * np.exp(rng.normal(size=in_features))
    mixing[:, rng.random(in_features) < draw(st.sampled_from([0.0, 0.2]), label="share of silent features")] = 0
    noise = draw(st.sampled_from([0.0, 0.3]), label="noise")
    batches = draw(st.lists(st.sampled_from([1, 5, 40]), min_size=1, max_size=3), label="batches")
    calibration = [
        (rng.normal(size=(n, rank)) @ mixing + noise * rng.normal(size=(n, in_features))).astype(np.float32)
        for n in batches
    ]
    weight = rng.normal(size=(out_features, in_features)).astype(np.float32)
    return Calibrated(weight, calibration)
