"""The properties are tested: a layer with a known fault is caught by them."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings

import reference
from reference.linear import rounding
from twofold.conformance.properties import linear as properties
from twofold.conformance.properties.fusion import run
from twofold.conformance.strategies.linear import activations, int8_matrices, linear_calls, lora_calls
from twofold.conformance.tolerance import OutsideBound

# ---- faults: each takes the right op and its arguments by name ------------------------------------------------------


def returns_zeros(op, **a):
    return np.zeros_like(op(**a))


def forgets_the_bias(op, **a):
    return op(**a | {"bias": None})


def skips_the_last_feature(op, **a):
    x = a["x"].copy()
    x[:, -1:] = 0
    return op(**a | {"x": x})


def skips_the_last_token(op, **a):
    out = op(**a)
    out[-1:] = 0
    return out


def skips_the_last_row(op, **a):
    out = op(**a)
    out[:, -1:] = 0
    return out


def shifts_the_bias(op, **a):
    bias = a.get("bias")
    return op(**a | {"bias": None if bias is None else np.roll(bias, 1)})


def ignores_the_scale(op, **a):
    return op(**a | {"weight_scale": np.ones_like(a["weight_scale"])})


def takes_the_first_scale(op, **a):
    scale = a["weight_scale"]
    return op(**a | {"weight_scale": np.broadcast_to(scale[..., :1] if scale.ndim == 2 else scale[:1], scale.shape)})


def takes_the_next_groups_scale(op, **a):
    return op(**a | {"weight_scale": np.roll(a["weight_scale"], -1, axis=-1)})


def takes_scales_for_positive(op, **a):
    return op(**a | {"weight_scale": np.abs(a["weight_scale"])})


def ignores_the_minimum(op, **a):
    minimum = a.get("weight_min")
    return op(**a | {"weight_min": None if minimum is None else np.zeros_like(minimum)})


def swaps_the_nibbles(op, **a):
    return op(**a | {"weight": a["weight"] >> 4 | a["weight"] << 4})


def interleaves_the_nibbles(op, **a):
    """Byte j holds features 2j and 2j + 1: the obvious order, which is not ours."""
    codes = np.stack([a["weight"] & 15, a["weight"] >> 4], axis=-1).reshape(len(a["weight"]), -1)
    return op(**a | {"weight": rounding.pack_int4(codes, group_size=a["group_size"])})


def takes_the_last_group_for_a_full_one(op, **a):
    """Splits a short last group where a full one would be split."""
    group_size, in_features = a["group_size"], a["x"].shape[1]
    short = in_features % group_size
    codes = rounding.unpack_int4(a["weight"], group_size=group_size)
    codes[:, in_features - short :] = np.roll(codes[:, in_features - short :], short // 2, axis=1)
    return op(**a | {"weight": rounding.pack_int4(codes, group_size=group_size)})


def counts_from_seven(op, **a):
    """The code for 0 is 8; here it is 7."""
    if a.get("weight_min") is not None:
        return op(**a)
    return op(**a | {"weight_min": a["weight_scale"] * -7})


def loses_the_smallest_code(op, **a):
    return op(**a | {"weight": np.maximum(a["weight"], -127)})


def one_scale_for_all_tokens(op, **a):
    x, alone = a["x"], []
    for row in x:  # give every token the loudest one as company in its own row
        loud = np.append(row, np.abs(x).max(initial=0))[None].astype(x.dtype)
        weight = np.pad(a["weight"].astype(np.float32), [(0, 0), (0, 1)]).astype(a["weight"].dtype)
        alone.append(op(**a | {"x": loud, "weight": weight})[0])
    return np.array(alone, x.dtype).reshape(len(x), len(a["weight"]))


def sums_in_float32(op, **a):
    """Not exact beyond 2**24."""
    codes, scale = reference.quantize_rows(a["x"], format="int8")
    sums = np.cumsum(codes[:, None].astype(np.float32) * a["weight"].astype(np.float32), axis=-1, dtype=np.float32)
    return (sums[..., -1] * scale[:, None] * a["weight_scale"]).astype(a["x"].dtype)


def swaps_the_places(op, **a):
    """Takes the first index of a group for the second: the values change places."""
    pairs = a["values"].reshape(len(a["values"]), -1, 2)
    return op(**a | {"values": pairs[..., ::-1].reshape(a["values"].shape)})


def swaps_the_groups_of_a_byte(op, **a):
    values, num_groups = a["values"], a["values"].shape[1] // 2
    if num_groups % 2:
        return op(**a)
    return op(**a | {"indices": a["indices"] >> 4 | a["indices"] << 4, "values": values})


ANY = [
    returns_zeros,
    forgets_the_bias,
    skips_the_last_feature,
    skips_the_last_token,
    skips_the_last_row,
    shifts_the_bias,
]
SCALED = [ignores_the_scale, takes_scales_for_positive]
FAULTS = {
    "linear": ANY,
    "linear_int8": [*ANY, *SCALED, takes_the_first_scale, takes_the_next_groups_scale, loses_the_smallest_code],
    "linear_int8_int8": [*ANY, *SCALED, takes_the_first_scale, loses_the_smallest_code, one_scale_for_all_tokens],
    "linear_fp8": [*ANY, *SCALED, takes_the_first_scale],
    "linear_fp8_fp8": [*ANY, *SCALED, takes_the_first_scale, one_scale_for_all_tokens],
    "linear_int4": [
        *ANY,
        *SCALED,
        takes_the_first_scale,
        takes_the_next_groups_scale,
        ignores_the_minimum,
        swaps_the_nibbles,
        interleaves_the_nibbles,
        takes_the_last_group_for_a_full_one,
        counts_from_seven,
    ],
    "sparse_linear": [*ANY, swaps_the_places, swaps_the_groups_of_a_byte],
}


def with_fault(op: str, fault) -> SimpleNamespace:
    """The reference, but for one op."""
    names = {name: getattr(reference, name) for name in reference.__all__}
    return SimpleNamespace(**names | {op: lambda **arguments: fault(names[op], **arguments)})


def assert_caught(backend, calls, check, by: type[AssertionError] = OutsideBound) -> None:
    """Some drawn call shows the fault."""

    @settings(max_examples=200, phases=[Phase.generate], report_multiple_bugs=False, derandomize=True)
    @given(calls)
    def judge(call):
        check(backend, call)

    with pytest.raises(by):
        judge()


@pytest.mark.parametrize(("op", "fault"), [(op, fault) for op, faults in FAULTS.items() for fault in faults])
def test_a_layer_with_a_fault_is_caught(op, fault):
    assert_caught(with_fault(op, fault), linear_calls(op), properties.matches_the_oracle)


def test_sums_that_are_not_exact_are_caught():
    backend = with_fault("linear_int8_int8", sums_in_float32)
    assert_caught(backend, int8_matrices(), lambda b, pair: properties.int8_sums_are_exact(b, *pair), AssertionError)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def ignores_the_scaling(op, **a):
    return op(**a | {"scaling": np.ones_like(a["scaling"])})


def takes_the_first_tokens_adapter(op, **a):
    return op(**a | {"adapter_ids": np.broadcast_to(a["adapter_ids"][:1], a["adapter_ids"].shape)})


def counts_from_the_end(op, **a):
    """-1 indexes the last adapter, as it does in NumPy."""
    return op(**a | {"adapter_ids": a["adapter_ids"] % len(a["lora_a"])})


def multiplies_by_a_mask(op, **a):
    """Every adapter for every token, times 0 where it is another's: 0 times NaN is NaN."""
    out, alone = a["base"].astype(np.float32), np.zeros_like(a["base"], np.float32)
    for adapter in range(len(a["lora_a"])):
        every = np.full_like(a["adapter_ids"], adapter)
        out = out + (a["adapter_ids"] == adapter)[:, None] * op(
            **a | {"base": alone, "adapter_ids": every, "out": None}
        )
    return out.astype(a["base"].dtype)


def stops_at_rank_eight(op, **a):
    up = a["lora_b"].copy()
    up[:, :, 8:] = 0
    return op(**a | {"lora_b": up})


def shrinks_by_the_first_layer_s(op, **a):
    rank = a["lora_b"].shape[2]
    layers = a["lora_a"].shape[1] // rank
    return op(**a | {"lora_a": np.tile(a["lora_a"][:, :rank], (1, layers, 1))})


def forgets_the_base(op, **a):
    return op(**a | {"base": np.zeros_like(a["base"])})


LORA = [
    ignores_the_scaling,
    takes_the_first_tokens_adapter,
    counts_from_the_end,
    multiplies_by_a_mask,
    stops_at_rank_eight,
    shrinks_by_the_first_layer_s,
    forgets_the_base,
]


@pytest.mark.parametrize("fault", LORA)
def test_lora_with_a_fault_is_caught(fault):
    assert_caught(with_fault("lora", fault), lora_calls(), properties.lora_matches_the_oracle)


# ---- quantizing activations -----------------------------------------------------------------------------------------


def cuts_off(x, scale):
    return np.trunc(x / scale)


def rounds_away(x, scale):
    return np.clip(np.floor(x / scale + 1), -127, 127)


def divides_by_128(x, scale):
    return np.clip(np.rint(x / scale * (127 / 128)), -128, 127)


@pytest.mark.parametrize("code_of", [cuts_off, rounds_away, divides_by_128])
def test_codes_that_are_not_the_nearest_are_caught(code_of):
    def quantize_rows(x, *, format):
        _, scale = reference.quantize_rows(x, format=format)
        step = np.where(scale > 0, scale, 1)[:, None]
        return code_of(x.astype(np.float32), step).astype(np.int8), scale

    backend = SimpleNamespace(quantize_rows=quantize_rows, from_host=reference.from_host, to_host=reference.to_host)
    assert_caught(backend, activations(), lambda b, x: properties.quantizes_rows(b, x, "int8"))


# ---- out, and what a layer must not touch ---------------------------------------------------------------------------


def test_an_out_that_is_ignored_is_caught():
    def ignores_out(op, **a):
        return op(**a | {"out": None})

    assert_caught(with_fault("linear", ignores_out), linear_calls("linear"), properties.honours_out, AssertionError)


def test_company_that_shows_is_caught():
    """A mean over the batch, taken off and put back, changes nothing but rounding; with NaN in the batch, all of it."""

    def centres(op, **a):
        if not len(a["x"]):
            return op(**a)
        mean = a["x"].astype(np.float32).mean(axis=0, keepdims=True)
        rest = (a["x"].astype(np.float32) - mean).astype(a["x"].dtype)
        both = op(**a | {"x": rest}).astype(np.float32) + op(**a | {"x": mean, "bias": None})
        return both.astype(a["x"].dtype)

    def check(backend, call):
        properties.tokens_do_not_depend_on_company(backend, call, [0] if len(call.arrays["x"]) else [])

    assert_caught(with_fault("linear", centres), linear_calls("linear"), check)


def test_without_a_fault_nothing_is_caught():
    """The harness itself: the reference passed through it is the reference."""

    @settings(max_examples=20)
    @given(linear_calls("linear_int4"))
    def judge(call):
        backend = with_fault("linear_int4", lambda op, **a: op(**a))
        properties.matches_the_oracle(backend, call)
        assert np.array_equal(run(backend, call)["out"], run(reference, call)["out"])

    judge()
