"""What the fusion ops of any backend must do, judged against the reference in float64."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

import reference
from reference.fusion.rotary import rotary_tables
from twofold.conformance.backends import assume_supported, float_dtypes
from twofold.conformance.strategies.fusion import Call, widen
from twofold.conformance.tolerance import (
    assert_within,
    baseline_error,
    matmul_baseline_bound,
    norm_bound,
    rounding_unit,
)

Backend = ModuleType | Any

# From z = -88.7 on float32's e^-z is infinite and silu(z) comes out as 0; in truth it is at most this.
SILU_FLUSHED = 89 * float(np.exp(-88.7))

# Where a result may be written: what each ``out`` may be besides fresh memory.
OUTS = {
    "embedding": {"out": ()},
    "rms_norm": {"out": ("x",)},
    "add_rms_norm": {"out": ("x",), "residual_out": ("residual",)},
    "rms_norm_linear": {"out": ()},
    "linear_add": {"out": ("residual",)},
    "swiglu": {"out": ()},
    "swiglu_linear_add": {"out": ("residual",)},
    "rotary": {},
    "rotary_write_kv": {"out": ("q",)},
}
PER_TOKEN = ("token_ids", "x", "residual", "gate_up", "q", "k", "v", "positions", "slot_mapping")
RESULTS = {"add_rms_norm": ("out", "residual_out"), "rotary": ("q", "k")}  # of the ops that have two


def run(backend: Backend, call: Call, **extra: Any) -> dict[str, np.ndarray]:
    """Make the call; what it returned and what it wrote, by name, as host arrays."""
    placed = {name: backend.from_host(array) for name, array in call.arrays.items()}
    placed |= {name: backend.from_host(np.array(call.arrays[name])) for name in call.mutates}  # may be called again
    result = getattr(backend, call.op)(**placed | extra, **call.options)
    parts = dict(zip(RESULTS[call.op], result)) if call.op in RESULTS else {"out": result}
    return {name: backend.to_host(x) for name, x in (parts | {n: placed[n] for n in call.mutates}).items()}


# ---- the oracle -------------------------------------------------------------------------------------------------


@dataclass
class Size:
    """How large the numbers behind a result are; see `tolerance`."""

    magnitude: np.ndarray
    num_terms: int = 1
    stored: Any = 0.0  # what a fused kernel may keep in the result's dtype on the way
    rounded: Any = 0.0  # what every implementation rounds on the way
    flushed: Any = 0.0


def matches_the_oracle(backend: Backend, call: Call) -> None:
    """Each element lies within the tolerance rule of the reference in float64, and has the dtype of what came in."""
    from twofold.conformance import plain_torch

    assume_supported(backend, call.dtype)
    expected, got, base = run(reference, call.in_float64()), run(backend, call), run(plain_torch, call)
    sizes = SIZES[call.op](call.in_float64())
    for name, ref64 in expected.items():
        what, dtype = f"{call.op}: {name}", got[name].dtype
        assert dtype == call.dtype, f"{what}: expected dtype {call.dtype}, got {dtype}"
        size, bound = sizes.get(name), np.zeros(())  # an array that is only copied is copied exactly
        if size is not None and backend is plain_torch:
            bound = matmul_baseline_bound(ref64, size.magnitude, size.num_terms + 8, dtype)
        elif size is not None:
            error, stored = baseline_error(base[name], ref64), size.stored + size.rounded
            bound = norm_bound(
                ref64, size.num_terms, dtype, magnitude=size.magnitude, baseline_error=error, stored=stored
            )
        if size is not None:
            bound = bound + rounding_unit(dtype) * size.rounded + size.flushed
        assert_within(got[name], ref64, np.nan_to_num(bound), what)  # slots never written are NaN on both sides


def _norm_size(call: Call) -> dict[str, Size]:
    x, weight = call.arrays["x"], call.arrays["weight"]
    return {"out": Size(np.abs(reference.rms_norm(x, weight, **call.options)), x.shape[-1])}


def _add_norm_size(call: Call) -> dict[str, Size]:
    x, residual, weight = (call.arrays[n] for n in ("x", "residual", "weight"))
    added, total = np.abs(x) + np.abs(residual), x + residual
    rms = np.sqrt(np.square(total).mean(-1, keepdims=True) + call.options["eps"])
    normed = np.abs(weight * total / rms)
    lost = np.sqrt(np.square(added).mean(-1, keepdims=True) + call.options["eps"]) / rms  # the sum may cancel
    magnitude = np.abs(weight) * added / rms + normed * lost
    return {"out": Size(magnitude, x.shape[-1], rounded=2 * normed), "residual_out": Size(added)}


def _norm_linear_size(call: Call) -> dict[str, Size]:
    a = call.arrays
    normed = np.abs(reference.rms_norm(a["x"], a["norm_weight"], **call.options)) @ np.abs(a["weight"]).T
    return {"out": Size(normed + np.abs(a.get("bias", 0.0)), 2 * a["x"].shape[1], stored=normed)}


def _linear_add_size(call: Call) -> dict[str, Size]:
    a = call.arrays
    gated = call.op == "swiglu_linear_add"
    x = np.abs(reference.swiglu(a["gate_up"]) if gated else a["x"])
    projected = x @ np.abs(a["weight"]).T + np.abs(a.get("bias", 0.0))
    flushed = SILU_FLUSHED * _up(a["gate_up"]) @ np.abs(a["weight"]).T if gated else 0.0
    stored = projected * (2 if gated else 1)
    return {"out": Size(projected + np.abs(a["residual"]), x.shape[1], stored=stored, flushed=flushed)}


def _swiglu_size(call: Call) -> dict[str, Size]:
    gate_up = call.arrays["gate_up"]
    return {"out": Size(np.abs(reference.swiglu(gate_up)), flushed=SILU_FLUSHED * _up(gate_up))}


def _up(gate_up: np.ndarray) -> np.ndarray:
    return np.abs(gate_up[:, gate_up.shape[1] // 2 :])


def _rotary_size(call: Call) -> dict[str, Size]:
    """|a||cos| + |b||sin|: a rotation by |sin| has it in the second of each pair, one by -|sin| in the first."""
    a = dict(call.arrays)
    num_terms, stored = 1, 0.0
    if "q_norm" in a:
        num_terms, stored, eps = a["q"].shape[-1], 1.0, call.options["eps"]
        a["q"], a["k"] = (reference.rms_norm(a[n], a[f"{n}_norm"], eps=eps) for n in ("q", "k"))
    sizes = [
        reference.rotary(
            np.abs(a["q"]), np.abs(a["k"]), np.abs(a["cos"]), sign * np.abs(a["sin"]), a["positions"],
            interleaved=call.options["interleaved"],
        )
        for sign in (1, -1)
    ]  # fmt: skip
    q, k = (np.maximum(one, other) for one, other in zip(*sizes))
    if call.op == "rotary":
        return {"q": Size(q), "k": Size(k)}
    k_cache, unused = np.zeros(a["k_cache"].shape), np.zeros(a["v_cache"].shape)
    reference.write_kv(k, k, k_cache, unused, a["slot_mapping"])
    return {"out": Size(q, num_terms, stored * q), "k_cache": Size(k_cache, num_terms, stored * k_cache)}


SIZES = {
    "embedding": lambda call: {},
    "rms_norm": _norm_size,
    "add_rms_norm": _add_norm_size,
    "rms_norm_linear": _norm_linear_size,
    "linear_add": _linear_add_size,
    "swiglu": _swiglu_size,
    "swiglu_linear_add": _linear_add_size,
    "rotary": _rotary_size,
    "rotary_write_kv": _rotary_size,
}


# ---- composition, purity, destinations --------------------------------------------------------------------------


def fused_is_its_parts(backend: Backend, call: Call) -> None:
    """A fused op gives bit for bit what its parts give one after another. (Asked of the reference, where fusing is
    only a way of writing; a kernel that rounds less often is better and not equal.)"""
    got, expected = run(backend, call), _parts(backend, call)
    for name, array in got.items():
        same = np.array_equal(array.view(np.uint8), expected[name].view(np.uint8))
        assert same, f"{call.op}: {name} differs from its parts:\n{array}\n{expected[name]}"


def _parts(backend: Backend, call: Call) -> dict[str, np.ndarray]:
    a = call.arrays | {name: np.array(call.arrays[name]) for name in call.mutates}  # in the same layout as for the op
    options = call.options
    if call.op == "add_rms_norm":
        total = (widen32(a["x"]) + widen32(a["residual"])).astype(a["x"].dtype)
        return {"out": backend.rms_norm(total, a["weight"], **options), "residual_out": total}
    if call.op == "rms_norm_linear":
        normed = backend.rms_norm(a["x"], a["norm_weight"], **options)
        return {"out": backend.linear(normed, a["weight"], a.get("bias"))}
    if call.op in ("linear_add", "swiglu_linear_add"):
        x = a["x"] if call.op == "linear_add" else backend.swiglu(a["gate_up"])
        projected = backend.linear(x, a["weight"], a.get("bias"))
        return {"out": (widen32(projected) + widen32(a["residual"])).astype(x.dtype)}
    assert call.op == "rotary_write_kv", call.op
    q, k = a["q"], a["k"]
    if "q_norm" in a:
        q, k = (backend.rms_norm(x, a[f"{n}_norm"], eps=options["eps"]) for n, x in (("q", q), ("k", k)))
    q, k = backend.rotary(q, k, a["cos"], a["sin"], a["positions"], interleaved=options["interleaved"])
    backend.write_kv(k, a["v"], a["k_cache"], a["v_cache"], a["slot_mapping"])
    return {"out": q, "k_cache": a["k_cache"], "v_cache": a["v_cache"]}


def widen32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


def writes_only_where_it_says(backend: Backend, call: Call) -> None:
    """Arguments stay as they are, byte for byte, but for those the op says it writes."""
    assume_supported(backend, call.dtype)
    before = {name: np.array(array) for name, array in call.arrays.items()}
    placed = {name: backend.from_host(np.array(array)) for name, array in call.arrays.items()}
    getattr(backend, call.op)(**placed, **call.options)
    for name, array in before.items():
        if name not in call.mutates:
            after = np.ascontiguousarray(backend.to_host(placed[name]))
            assert after.tobytes() == array.tobytes(), f"{call.op} changed its argument {name}"


def honours_out(backend: Backend, call: Call) -> None:
    """A result goes where ``out`` says, which began as NaN, and is what it is without; where the contract lets ``out``
    be an argument, the same."""
    assume_supported(backend, call.dtype)
    expected = run(backend, call)
    for out, aliases in OUTS[call.op].items():
        fresh = backend.from_host(np.full(expected[out].shape, np.nan, expected[out].dtype))
        _assert_same_bits(call, out, run(backend, call, **{out: fresh}), expected)
        _assert_same_bits(call, out, {out: backend.to_host(fresh)}, {out: expected[out]})
        for alias in aliases:
            argument = backend.from_host(np.array(call.arrays[alias]))
            _assert_same_bits(call, f"{out}={alias}", run(backend, call, **{alias: argument, out: argument}), expected)
            _assert_same_bits(call, f"{out}={alias}", {out: backend.to_host(argument)}, {out: expected[out]})


def _assert_same_bits(call: Call, what: str, got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in got.items():
        same = np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(expected[name]).tobytes()
        assert same, f"{call.op} with {what}: {name} differs from the result without:\n{array}\n{expected[name]}"


def refuses(backend: Backend, op: str, argument: str, arguments: dict[str, Any]) -> None:
    """A bad argument raises ValueError, whose text begins with the op and the argument."""
    said = None
    try:
        getattr(backend, op)(
            **{n: backend.from_host(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
        )
    except ValueError as error:
        said = str(error)
    assert said is not None, f"{op}: accepted a bad {argument}"
    assert said.startswith(f"{op}: {argument}"), f"{op}: the error does not name {argument}: {said}"


def rows_keep_no_company(backend: Backend, call: Call) -> None:
    """A token's results are the same bits alone and with the others."""
    together = run(backend, call)
    for token in range(len(next(iter(together.values())))):
        mine = slice(token, token + 1)
        per_token = {name: a[mine] for name, a in call.arrays.items() if name in PER_TOKEN}
        alone = run(backend, call.with_arrays(**per_token))
        for name in RESULTS.get(call.op, ("out",)):
            same = np.array_equal(alone[name].view(np.uint8), together[name][mine].view(np.uint8))
            assert same, f"{call.op}: {name} of token {token} alone is not that in a batch"


# ---- laws of rotation -------------------------------------------------------------------------------------------


def rotation_keeps_lengths(backend: Backend, call: Call) -> None:
    """Turning a head changes no length, at any position."""
    wide = _widened_for(backend, call)
    for name, turned in run(backend, wide).items():
        length, expected = (np.linalg.norm(widen(x), axis=-1) for x in (turned, wide.arrays[name]))
        np.testing.assert_allclose(length, expected, rtol=1e-6, atol=1e-12, err_msg=f"length of {name}")


def scores_depend_on_distance(backend: Backend, call: Call, shift: int) -> None:
    """q·k of two tokens stays what it is when both move on by as many positions."""
    wide = _widened_for(backend, call)
    half_dim, positions = wide.arrays["cos"].shape[1], wide.arrays["positions"] % 64
    cos, sin = (table.astype(wide.arrays["cos"].dtype) for table in rotary_tables(2 * half_dim, 64 + shift, base=1e4))
    scores = []
    for moved in (positions, positions + shift):
        got = run(backend, wide.with_arrays(cos=cos, sin=sin, positions=moved))
        scores.append(np.einsum("thd,sgd->tshg", widen(got["q"]), widen(got["k"])))
    size = np.abs(wide.arrays["q"]).sum() * np.abs(wide.arrays["k"]).max(initial=0) + 1e-12
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-6 * size, err_msg="scores before and after the shift")


def _widened_for(backend: Backend, call: Call) -> Call:
    """The call in the widest float that the backend computes with."""
    widest = np.float64 if "float64" in float_dtypes(backend) else np.float32
    return call.with_arrays(**{n: a.astype(widest) for n, a in call.arrays.items() if a.dtype.kind not in "iu"})
