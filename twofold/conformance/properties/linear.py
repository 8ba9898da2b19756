"""What the linear layers of any backend must do, and the `Weight`s that put them to use."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np

from reference.linear.weight import Weight
from twofold.conformance.backends import assume_supported
from twofold.conformance.properties.fusion import Backend, run
from twofold.conformance.strategies.fusion import Call, widen
from twofold.conformance.tolerance import assert_within, baseline_error, matmul_baseline_bound, matmul_bound

ROUNDED = {"linear_int8_int8": "int8", "linear_fp8_fp8": "float8_e4m3fn"}  # ops that round the activations, and to what
LAYOUTS = {"int8": np.int8, "int8_int8": np.int8, "int4": np.uint8, "fp8": ml_dtypes.float8_e4m3fn}
LAYOUTS["fp8_fp8"] = LAYOUTS["fp8"]


# ---- the oracle: weights one by one, sums in float64 --------------------------------------------------------------


def dense(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The matrix that a call's arrays stand for, in float64, and the size of what was added up to make each weight."""
    a, group_size = call.arrays, call.options.get("group_size")
    if call.op == "sparse_linear":
        weight = _spread_out(widen(a["values"]), a["indices"])
        return weight, np.abs(weight)
    if call.op == "linear":
        return widen(a["weight"]), np.abs(widen(a["weight"]))
    codes = _nibbles(a["weight"], call.options["group_size"]) if call.op == "linear_int4" else widen(a["weight"])
    group = np.arange(codes.shape[1]) // (group_size or codes.shape[1])
    scale = widen(a["weight_scale"]).reshape(len(codes), -1)[:, group]
    if call.op != "linear_int4":
        return scale * codes, np.abs(scale * codes)
    if "weight_min" not in a:
        return scale * (codes - 8), np.abs(scale * (codes - 8))
    minimum = widen(a["weight_min"])[:, group]
    return scale * codes + minimum, np.abs(scale * codes) + np.abs(minimum)


def _nibbles(packed: np.ndarray, group_size: int) -> np.ndarray:
    """The code of each feature, found on its own."""
    in_features = 2 * packed.shape[1]
    codes = np.empty((len(packed), in_features))
    for feature in range(in_features):
        start = feature // group_size * group_size
        half = min(group_size, in_features - start) // 2
        offset = feature - start
        byte = packed[:, start // 2 + offset % half]
        codes[:, feature] = byte % 16 if offset < half else byte // 16
    return codes


def _spread_out(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    rows, weight = np.arange(len(values)), np.zeros((len(values), 2 * values.shape[1]))
    for k in range(values.shape[1]):
        group, which = divmod(k, 2)
        place = (indices[:, group // 2] >> (4 * (group % 2) + 2 * which) & 3).astype(np.intp)
        weight[rows, 4 * group + place] = values[:, k]
    return weight


def oracle(backend: Backend, call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The result in float64, the magnitude of its sums, and the part of it that a kernel may have stored narrow.

    Where the op rounds the activations, they are what the backend's ``quantize_rows`` makes of them: which of two
    equally near codes it took is its own affair.
    """
    x, (weight, size) = widen(call.arrays["x"]), dense(call)
    if call.op in ROUNDED:
        codes, scale = backend.quantize_rows(backend.from_host(call.arrays["x"]), format=ROUNDED[call.op])
        x = widen(backend.to_host(codes)) * widen(backend.to_host(scale))[:, None]
    bias, residual = (widen(call.arrays[name]) if name in call.arrays else 0.0 for name in ("bias", "residual"))
    ref64, summed = x @ weight.T, np.abs(x) @ size.T
    if call.op == "linear_int8_int8":
        summed = np.abs(ref64)  # the sums are exact integers: nothing is lost before they are scaled
    stored = summed if "group_size" in call.options else np.zeros_like(summed)
    if "residual" in call.arrays:
        stored = stored + np.abs(ref64 + bias)  # which the contract rounds before it is added
    return ref64 + bias + residual, summed + np.abs(bias) + np.abs(residual), stored


def matches_the_oracle(backend: Backend, call: Call) -> None:
    """Every element is a sum of the dequantized weights times the activations, within the tolerance rule."""
    assume_supported(backend, *(array.dtype for array in call.arrays.values()))
    got = run(backend, call)["out"]
    assert got.dtype == call.arrays["x"].dtype, f"{call.op}: expected {call.arrays['x'].dtype}, got {got.dtype}"
    ref64, bound = expected(backend, call)
    assert_within(got, ref64, bound, call.op, ("token", "feature"))


def expected(backend: Backend, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """What the oracle says, and how far from it the backend may be."""
    from twofold.conformance import plain_torch

    dtype, terms = call.arrays["x"].dtype, 1 if call.op == "linear_int8_int8" else call.arrays["x"].shape[1]
    ref64, magnitude, stored = oracle(backend, call)
    if backend is plain_torch:
        return ref64, matmul_baseline_bound(ref64, magnitude, terms + 2, dtype)
    error = baseline_error(run(plain_torch, call)["out"], oracle(plain_torch, call)[0])
    return ref64, matmul_bound(ref64, magnitude, terms, dtype, baseline_error=error, stored=stored)


def tokens_do_not_depend_on_company(backend: Backend, call: Call, keep: Sequence[int]) -> None:
    """A token gives the same whether it is alone, among others, or among others that are NaN; exactly so where the
    arithmetic is exact."""
    assume_supported(backend, *(array.dtype for array in call.arrays.values()))
    per_token = [name for name in ("base", "x", "residual", "adapter_ids") if name in call.arrays]
    chosen = np.array(keep, np.intp)
    poisoned = {name: np.array(call.arrays[name]) for name in per_token if name != "adapter_ids"}
    for array in poisoned.values():
        array[np.setdiff1d(np.arange(len(array)), chosen)] = np.nan
    alone = call.with_arrays(**{name: call.arrays[name][chosen] for name in per_token})
    ref64, bound = lora_expected(alone) if call.op == "lora" else expected(backend, alone)
    for what, got in (
        ("alone", run(backend, alone)["out"]),
        ("among others", run(backend, call)["out"][chosen]),
        ("among NaN", run(backend, call.with_arrays(**poisoned))["out"][chosen]),
    ):
        assert_within(got, ref64, bound, f"{call.op}, tokens {keep} {what}", ("kept token", "feature"))
        if call.op == "linear_int8_int8":
            first = run(backend, alone)["out"]
            assert got.tobytes() == first.tobytes(), f"{call.op}: tokens {keep} {what} differ from themselves alone"


def honours_out(backend: Backend, call: Call) -> None:
    """The result goes where ``out`` says, which began as NaN (or is the argument that it may be), and is returned."""
    alias = next((name for name in ("base", "residual") if name in call.arrays), None)
    assume_supported(backend, *(array.dtype for array in call.arrays.values()))
    want = run(backend, call)["out"]
    for out in (np.full(want.shape, np.nan, want.dtype), np.array(call.arrays[alias]) if alias else None):
        if out is None:
            continue
        placed = {name: backend.from_host(array) for name, array in call.arrays.items()}
        target = backend.from_host(out)
        placed |= {alias: target} if alias and not np.isnan(out).any() else {}
        result = getattr(backend, call.op)(**placed, **call.options, out=target)
        assert result is target, f"{call.op}: returned something other than out"
        got = np.ascontiguousarray(backend.to_host(target))
        assert got.tobytes() == np.ascontiguousarray(want).tobytes(), f"{call.op}: out differs from the result without"


# ---- quantizing activations; exact sums; layouts --------------------------------------------------------------------


def quantizes_rows(backend: Backend, x: np.ndarray, format: str) -> None:
    """The largest of a row becomes 127 (or 448), and every code is a nearest one, with half a step to spare at ties."""
    assume_supported(backend, x.dtype)
    codes, scale = backend.quantize_rows(backend.from_host(x), format=format)
    codes, scale = backend.to_host(codes), backend.to_host(scale)
    assert (codes.dtype.name, scale.dtype.name) == (format, "float32"), f"{codes.dtype}, {scale.dtype}"
    most = 127 if format == "int8" else 448
    values, codes, scale = widen(x), widen(codes), widen(scale)
    largest = np.abs(values).max(axis=1, initial=0)
    tiny = 2.0**-149  # half a subnormal lost in the scale is all there is to lose
    assert_within(scale, largest / most, 2.0**-23 * largest / most + tiny, "scale", ("row",))

    usable = scale > 2.0**-120  # below, the scale itself has few bits
    exact = np.divide(values, scale[:, None], out=np.zeros_like(values), where=usable[:, None])
    step = 1.0 if format == "int8" else _step_of_fp8(exact)
    bound = np.where(usable[:, None], step / 2 + 2.0**-21 * np.abs(exact), most)
    assert_within(codes, exact, bound, f"{format} codes", ("row", "column"))
    peak = np.abs(codes).max(axis=1, initial=0)
    full = peak[usable] == most
    assert full.all(), f"{format}: the largest code of each row should be {most}, got {peak[usable]}"
    assert not codes[largest == 0].any(), "a row of zeros has codes other than 0"


def _step_of_fp8(x: np.ndarray) -> np.ndarray:
    """The distance of neighbouring e4m3 numbers around x: 2**-9 near 0, an eighth of a power of two further out."""
    exponent = np.floor(np.log2(np.maximum(np.abs(x) * (1 + 2.0**-20), 2.0**-6)))
    return 2.0 ** (exponent - 3)


def int8_sums_are_exact(backend: Backend, x: np.ndarray, weight: np.ndarray) -> None:
    """With all scales 1 the result is the integer that int64 arithmetic gives, rounded once to float32."""
    one = np.ones(len(weight), np.float32)
    got = run(backend, Call("linear_int8_int8", {"x": x.astype(np.float32), "weight": weight, "weight_scale": one}))
    want = (x.astype(np.int64) @ weight.astype(np.int64).T).astype(np.float32)
    assert np.array_equal(got["out"], want), f"expected\n{want}\ngot\n{got['out']}"


def unpacks_what_it_packed(backend: Backend, stored: np.ndarray, layout: str) -> None:
    """``unpack_weight`` gives back what ``pack_weight`` was given, bit for bit."""
    weight = stored.view(LAYOUTS[layout])
    packed = backend.pack_weight(backend.from_host(weight), format=layout)
    got = backend.to_host(backend.unpack_weight(packed, format=layout, out_features=len(weight)))
    assert got.dtype == weight.dtype, f"{layout}: {weight.dtype} came back as {got.dtype}"
    same = np.array_equal(np.asarray(got).view(np.uint8), weight.view(np.uint8))
    assert same, f"{layout}: not what was packed"


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def lora_expected(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Token by token in float64: base + scaling B (A x), and how far from it a backend may be."""
    a = {name: widen(array) for name, array in call.arrays.items()}
    ref64, magnitude = a["base"].copy(), np.abs(a["base"])
    for token, adapter in enumerate(call.arrays["adapter_ids"]):
        if adapter >= 0:
            x, scaling = a["x"][token], a["scaling"][adapter]
            for columns, down, up in _factors(call, adapter):
                ref64[token, columns] += scaling * (up @ (down @ x))
                magnitude[token, columns] += np.abs(scaling) * (np.abs(up) @ (np.abs(down) @ np.abs(x)))
    terms = call.arrays["x"].shape[1] + call.arrays["lora_b"].shape[2]
    stored = magnitude - np.abs(a["base"])  # A x, in the dtype of x
    return ref64, matmul_bound(ref64, magnitude, terms, call.arrays["base"].dtype, stored=stored)


def _factors(call: Call, adapter: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Of each layer side by side: its columns of the result, its A and its B."""
    a, b = (widen(call.arrays[name][adapter]) for name in ("lora_a", "lora_b"))
    rank, end = b.shape[1], 0
    for layer, width in enumerate(call.options.get("widths", [len(b)])):
        end += width
        yield slice(end - width, end), a[layer * rank : (layer + 1) * rank], b[end - width : end]


def lora_matches_the_oracle(backend: Backend, call: Call) -> None:
    """Each token gets its own adapter's part; one without an adapter is returned bit for bit."""
    assume_supported(backend, *(array.dtype for array in call.arrays.values()))
    got = run(backend, call)["out"]
    assert got.dtype == call.arrays["base"].dtype, f"lora: got {got.dtype}"
    assert_within(got, *lora_expected(call), "lora", ("token", "feature"))
    without = call.arrays["adapter_ids"] < 0
    same = got[without].tobytes() == call.arrays["base"][without].tobytes()
    assert same, "lora changed a token that has no adapter"


def lora_is_merged(backend: Backend, call: Call, weight: np.ndarray) -> None:
    """LoRA over a layer is the layer with the adapter added to its weight, token by token."""
    assume_supported(backend, *(array.dtype for array in call.arrays.values()))
    a = {name: array if array.dtype.kind == "i" else array.astype(np.float32) for name, array in call.arrays.items()}
    base = run(backend, Call("linear", {"x": a["x"], "weight": weight}))["out"]
    got = run(backend, replace(call, arrays=a | {"base": base}))["out"]
    for token, adapter in enumerate(a["adapter_ids"]):
        x, merged, size = widen(a["x"][token]), widen(weight), np.abs(widen(weight))
        if adapter >= 0:
            factors = [*_factors(replace(call, arrays=a), adapter)]
            merged = merged + a["scaling"][adapter] * np.concatenate([up @ down for _, down, up in factors])
            added = np.concatenate([np.abs(up) @ np.abs(down) for _, down, up in factors])
            size = size + np.abs(a["scaling"][adapter]) * added
        ref64, magnitude = merged @ x, size @ np.abs(x)
        terms = 2 * len(x) + a["lora_b"].shape[2]
        assert_within(got[token], ref64, matmul_bound(ref64, magnitude, terms, "float32"), f"token {token}")


# ---- Weight ---------------------------------------------------------------------------------------------------------


def weight_computes_with_its_numbers(backend: Backend, weight: Weight, x: np.ndarray) -> None:
    """``linear`` is a matrix product with what ``dequantize`` says, activations rounded first where the format does."""
    assume_supported(backend, x.dtype)
    x64, w64 = widen(x), widen(weight.dequantize())
    rounds = {"linear_int8_int8": "int8", "linear_fp8_fp8": "float8_e4m3fn"}.get(weight.format.op)
    if rounds:
        codes, scale = (backend.to_host(part) for part in backend.quantize_rows(backend.from_host(x), format=rounds))
        x64 = widen(codes) * widen(scale)[:, None]
    bias = np.zeros(len(w64)) if weight.bias is None else widen(backend.to_host(weight.bias))
    ref64, magnitude = x64 @ w64.T + bias, np.abs(x64) @ _size(weight).T + np.abs(bias)
    got = backend.to_host(weight.linear(backend.from_host(x)))
    bound = matmul_bound(ref64, magnitude, x.shape[1] + 2, x.dtype, stored=magnitude)
    assert_within(got, ref64, bound, f"{weight.format.name}: linear", ("token", "feature"))


def _size(weight: Weight) -> np.ndarray:
    """|scale code| + |min| of each weight; |w| where there is no minimum."""
    size = np.abs(widen(weight.dequantize()))
    if not weight.format.with_min:
        return size
    group = np.arange(weight.in_features) // (weight.format.group_size or 1)
    return size + 2 * np.abs(widen(weight.host_arrays()["weight_min"]))[:, group]


def fused_is_its_parts(backend: Backend, weight: Weight, x: np.ndarray, norm: np.ndarray, residual: np.ndarray) -> None:
    """What a `Weight` fuses, or composes, equals its parts one after another, to the backend's own rounding; also
    when it is written over the residual."""
    assume_supported(backend, x.dtype)
    place = backend.from_host
    gate_up = np.concatenate([x, x[:, ::-1]], axis=1)
    normed = backend.rms_norm(place(x), place(norm), eps=1e-5)
    gated = backend.swiglu(place(gate_up))
    parts = {name: widen(backend.to_host(weight.linear(part))) for name, part in (("norm", normed), ("gate", gated))}
    plain = widen(backend.to_host(weight.linear(place(x))))
    written, gate_written = place(residual.copy()), place(residual.copy())
    results = {
        "rms_norm_linear": (weight.rms_norm_linear(place(x), place(norm), eps=1e-5), parts["norm"]),
        "linear_add": (weight.linear_add(place(x), place(residual)), plain + residual),
        "linear_add out=residual": (weight.linear_add(place(x), written, out=written), plain + residual),
        "swiglu_linear_add": (weight.swiglu_linear_add(place(gate_up), place(residual)), parts["gate"] + residual),
        "swiglu_linear_add out=residual": (
            weight.swiglu_linear_add(place(gate_up), gate_written, out=gate_written),
            parts["gate"] + residual,
        ),
    }
    for name, (got, want) in results.items():
        sources = [widen(backend.to_host(part)) for part in (normed, gated, place(x))]
        magnitude = max(np.abs(source).max(initial=0) for source in sources) * _size(weight).sum(axis=1)
        bound = matmul_bound(want, magnitude + np.abs(want) + np.abs(residual), x.shape[1], x.dtype)
        assert_within(backend.to_host(got), want, bound, f"{weight.format.name}: {name}", ("token", "feature"))
    for name, target in (("linear_add", written), ("swiglu_linear_add", gate_written)):
        assert results[f"{name} out=residual"][0] is target, f"{name}: returned something other than out"


def rows_are_exact(backend: Backend, weight: Weight, rows: np.ndarray) -> None:
    """``rows`` gives rows of the matrix, in any order and repeated, bit for bit what ``dequantize`` says."""
    got = backend.to_host(weight.rows(backend.from_host(rows)))
    want = weight.dequantize()[rows].astype(got.dtype)
    assert got.shape == want.shape, f"{weight.format.name}: expected shape {want.shape}, got {got.shape}"
    assert np.array_equal(widen(got), widen(want)), f"{weight.format.name}: rows {rows}:\n{want}\n{got}"


def stacking_is_stacking(backend: Backend, weights: Sequence[Weight], x: np.ndarray) -> None:
    """A concatenated weight holds the same numbers, in as many bytes, and gives the results side by side."""
    stacked = Weight.concatenate(weights)
    want = np.concatenate([weight.dequantize() for weight in weights])
    assert np.array_equal(stacked.dequantize(), want), f"{stacked.format.name}: other numbers after stacking"
    assert stacked.out_features == len(want), f"{stacked.out_features} rows, of {len(want)}"
    unbiased = [replace(weight.to(None), bias=None) for weight in (stacked, *weights)]  # a layout may pad
    assert unbiased[0].nbytes == sum(w.nbytes for w in unbiased[1:]), "stacking changed the number of bytes"
    got = backend.to_host(stacked.linear(backend.from_host(x)))
    parts = np.concatenate([backend.to_host(weight.linear(backend.from_host(x))) for weight in weights], axis=1)
    magnitude = np.abs(widen(x)).max(initial=0) * _size(stacked).sum(axis=1)
    assert_within(got, widen(parts), 2 * matmul_bound(widen(parts), magnitude, x.shape[1], x.dtype), "stacked")


def placing_changes_nothing(backend: Backend, weight: Weight) -> None:
    """To a backend and back to the host, every array is what it was, bit for bit."""
    back = weight.to(backend).to(None)
    before = weight.to(None)
    assert back.arrays.keys() == before.arrays.keys(), f"{back.arrays.keys()}"
    for name, array in before.arrays.items():
        same = array.dtype == back.arrays[name].dtype and array.tobytes() == back.arrays[name].tobytes()
        assert same, f"{weight.format.name}: {name} changed on the way"
