"""Adapters."""

import sys
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fast
import reference
from fast.linear.lora import lora_invariant
from reference.linear.weight import Weight
from twofold.conformance.properties import linear as properties
from twofold.conformance.properties.fusion import run, writes_only_where_it_says
from twofold.conformance.strategies.fusion import Call
from twofold.conformance.strategies.linear import lora_calls
from twofold.conformance.tolerance import assert_within, matmul_bound


@given(call=lora_calls())
def test_matches_the_oracle(backend, call):
    properties.lora_matches_the_oracle(backend, call)


@settings(max_examples=200)
@given(call=lora_calls(), seed=st.integers(0, 2**32 - 1))
def test_lora_is_merged(backend, call, seed):
    shape = call.arrays["base"].shape[1], call.arrays["x"].shape[1]
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    properties.lora_is_merged(backend, call, weight)


@settings(max_examples=200)
@given(call=lora_calls(), data=st.data())
def test_a_token_alone_is_a_token_in_any_batch(backend, call, data):
    tokens = list(range(len(call.arrays["x"])))
    keep = data.draw(st.lists(st.sampled_from(tokens), unique=True, max_size=3), "keep") if tokens else []
    properties.tokens_do_not_depend_on_company(backend, call, keep)


@given(call=lora_calls())
def test_writes_only_where_it_says(backend, call):
    writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


@given(call=lora_calls(), extra=st.integers(1, 5))
def test_rank_is_padded_with_zeros(backend, call, extra):
    """More rows and columns of zeros change nothing, within rounding."""
    a = call.arrays
    num_adapters, in_features = len(a["lora_a"]), a["x"].shape[1]
    of_layers = a["lora_a"].reshape(num_adapters, -1, a["lora_b"].shape[2], in_features)
    wider = np.concatenate([of_layers, np.zeros_like(of_layers[:, :, :1]).repeat(extra, 2)], axis=2)
    padded = call.with_arrays(
        lora_a=wider.reshape(num_adapters, -1, in_features),
        lora_b=np.concatenate([a["lora_b"], np.zeros_like(a["lora_b"][:, :, :1]).repeat(extra, 2)], axis=2),
    )
    assert_within(run(backend, padded)["out"], *properties.lora_expected(call), "padded")


# ---- the kernels of the fast backend --------------------------------------------------------------------------------


def batch(
    num_tokens: int, dtype: str, num_adapters: int = 5, in_features: int = 600, widths: tuple[int, ...] = (40,)
) -> Call:
    """Adapters anywhere in the batch, one that nobody uses, tokens without one."""
    rng = np.random.default_rng(0)
    cast = np.dtype(getattr(ml_dtypes, dtype, dtype))
    shapes = {
        "base": (num_tokens, sum(widths)),
        "x": (num_tokens, in_features),
        "lora_a": (num_adapters, 8 * len(widths), in_features),
        "lora_b": (num_adapters, sum(widths), 8),
    }
    arrays = {name: rng.normal(size=shape).astype(cast) for name, shape in shapes.items()}
    ids = rng.integers(-1, num_adapters - 1, num_tokens).astype(np.int32)
    ids += ids >= 1  # nobody's is adapter 1: behind the last one's numbers are no other's
    arrays |= {"scaling": rng.normal(size=num_adapters).astype(np.float32), "adapter_ids": ids}
    return Call("lora", arrays, {"widths": widths})


MODULE = sys.modules["fast.linear.lora"]


@pytest.fixture
def one_processor(monkeypatch):
    """A GPU so small that every adapter is enough to keep it busy."""
    monkeypatch.setattr(MODULE, "num_processors", lambda array: 1)


def launched(monkeypatch, call: Call) -> list[str]:
    """What a call launches, by name; it must be right, too."""
    seen = []
    with monkeypatch.context() as patch:
        for name in ("together", "few_tokens", "many_tokens", "expand", "expand_together"):
            run_it = getattr(MODULE, name)
            patch.setattr(MODULE, name, lambda *a, name=name, run_it=run_it: (seen.append(name), run_it(*a))[1])
        properties.lora_matches_the_oracle(fast, call)
    return seen


TOGETHER, FEW, MANY = ["together", "expand_together"], ["few_tokens", "expand"], ["many_tokens"]


@pytest.mark.parametrize(
    ("kernels", "num_tokens", "dtype"),
    [
        (TOGETHER, 33, "bfloat16"),
        (TOGETHER, 130, "float16"),  # more tokens than a tile has
        (FEW, 1, "bfloat16"),
        (FEW, 33, "float32"),
        (MANY, 257, "bfloat16"),
        (MANY, 257, "float16"),
        (MANY, 257, "float32"),
    ],
)
def test_each_kernel_is_chosen_and_right(monkeypatch, one_processor, kernels, num_tokens, dtype):
    """All tokens with every adapter, each token by itself, and in tiles. All over more than one part of x, for a layer
    of more than a tile, for three side by side in one launch, and one by one where tiles would cross their borders."""
    for widths, launches in (((300,), 1), ((32, 16, 16), 1), ((24, 8), 2)):
        seen = launched(monkeypatch, batch(num_tokens, dtype, widths=widths))
        of_slices = FEW if kernels == TOGETHER and launches > 1 else kernels
        assert seen == of_slices * launches, f"{widths}: expected {launches} times {of_slices}, got {seen}"


@pytest.mark.parametrize("wide", ["base", "lora_b"])
def test_adapters_expand_one_by_one_only_in_16_bits(monkeypatch, one_processor, wide):
    """Where one of them has more, numbers that are shrunk are not cut in two: each token expands by itself."""
    call = batch(33, "bfloat16")
    call = call.with_arrays(**{wide: call.arrays[wide].astype(np.float32)})
    assert launched(monkeypatch, call) == ["together", "expand"]


def test_adapters_expand_one_by_one_where_that_keeps_all_processors_busy(monkeypatch):
    monkeypatch.setattr(MODULE, "num_processors", lambda array: 132)
    base = torch.empty(64, 4096, dtype=torch.bfloat16)
    chosen = [MODULE.expands_together(base, base.new_empty(n, 4096, 16)) for n in (8, 9, 16)]
    assert chosen == [False, True, True], "16 tiles of 256 features each"


crowds = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@crowds
@given(call=lora_calls(crowded=True))
def test_a_crowd_matches_the_oracle(one_processor, call):
    """Each adapter has several tokens, anywhere in the batch, or more than it takes at a time."""
    properties.lora_matches_the_oracle(fast, call)


@crowds
@pytest.mark.interpreted(5)
@given(call=lora_calls(crowded=True))
def test_a_crowd_is_written_where_it_says(one_processor, call):
    writes_only_where_it_says(fast, call)
    properties.honours_out(fast, call)


@crowds
@pytest.mark.interpreted(12)
@given(call=lora_calls(crowded=True), data=st.data())
def test_a_crowd_does_not_see_its_company(one_processor, call, data):
    keep = data.draw(st.lists(st.sampled_from(range(len(call.arrays["x"]))), unique=True, max_size=20), label="keep")
    properties.tokens_do_not_depend_on_company(fast, call, keep)


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_another_adapter_s_numbers_reach_no_token(one_processor, strange):
    """Not where other tokens of the batch use it, either; and its own tokens get them."""
    call = batch(33, "bfloat16", widths=(32, 16))
    changed = {name: call.arrays[name].copy() for name in ("lora_a", "lora_b", "scaling")}
    for array in changed.values():
        array[2] = strange
    finite, got = (run(fast, each)["out"] for each in (call, call.with_arrays(**changed)))
    own = call.arrays["adapter_ids"] == 2
    assert got[~own].tobytes() == finite[~own].tobytes(), "another adapter's numbers reached a token"
    assert own.any(), "nobody has this adapter: the test would show nothing"
    assert np.isnan(got[own].astype(np.float32)).all(), "an adapter's numbers did not reach its own tokens"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_shrunk_keeps_its_bits(one_processor, dtype):
    """B takes the difference of two numbers that 16 bits cannot tell apart: of one token larger than float16 has them,
    of one so small that it has few bits for them, which another feature's weights make up for."""
    cast = np.dtype(getattr(ml_dtypes, dtype, dtype))
    size = 2.0 ** np.array([12, 0, -12, 4])
    x, lora_a = np.zeros((4, 8)), np.zeros((1, 2, 8))
    x[:, :2] = np.outer(size, [1, 2.0**-12])
    lora_a[0, :, :2] = [[32, 32], [32, 0]]
    lora_b = np.outer(1 / size, [1, -1])[None]
    floats = {"base": np.zeros((4, 4)), "x": x, "lora_a": lora_a, "lora_b": lora_b}
    call = Call("lora", {name: array.astype(cast) for name, array in floats.items()})
    call = call.with_arrays(scaling=np.ones(1, np.float32), adapter_ids=np.zeros(4, np.int32))
    with np.errstate(over="ignore"):  # a small token's weights are too large for the others
        got = run(fast, call)["out"].astype(np.float64)
    np.testing.assert_array_equal(np.diag(got), 2.0**-7)


def test_what_is_shrunk_keeps_its_bits_next_to_larger_and_when_rounded_up(one_processor):
    """In float16: 2^-14 of the largest number of its row, a bit 2^-12 of it; and what rounds to a power of two."""
    x, lora_a = np.zeros((4, 8)), np.zeros((1, 2, 8))
    x[:2, :3] = [1, 2.0**-14, 2.0**-13]
    x[2:, 3:5] = [2, -(2.0**-13)]
    lora_a[0, 0, 0] = 1
    lora_a[0, 1, 1:5] = [1, 2.0**-13, 1, 1]
    lora_b = np.array([[[0, 2.0**14], [0, 1]]])
    base = np.array([[-1, 0], [-1, 0], [0, -2], [0, -2]])
    floats = {"base": base, "x": x, "lora_a": lora_a, "lora_b": lora_b}
    call = Call("lora", {name: array.astype(np.float16) for name, array in floats.items()})
    call = call.with_arrays(scaling=np.ones(1, np.float32), adapter_ids=np.zeros(4, np.int32))
    got = run(fast, call)["out"]
    np.testing.assert_array_equal(got[:2, 0], 2.0**-12)
    np.testing.assert_array_equal(got[2:, 1], -(2.0**-13))


def test_tokens_without_an_adapter_keep_their_bits(one_processor):
    """NaN of every kind and -0, next to tokens that have one; more of them than are taken at a time."""
    call = batch(40, "bfloat16", num_adapters=3, widths=(48,))
    odd = np.resize(np.array([0x7FC1, 0xFF81, 0x8000, 0x7F80, 0x0001], np.uint16), call.arrays["base"].shape)
    ids = np.resize(np.array([-1, 0, -1, 2], np.int32), 40)
    base = np.where(ids[:, None] < 0, odd, call.arrays["base"].view(np.uint16)).view(ml_dtypes.bfloat16)
    got = run(fast, call.with_arrays(base=base, adapter_ids=ids))["out"]
    assert got[ids < 0].tobytes() == base[ids < 0].tobytes()


def test_rows_of_the_result_may_lie_apart(one_processor):
    """As a slice of a wider tensor, columns apart too; around it nothing is written."""
    call = batch(33, "bfloat16", widths=(48,))
    placed: dict[str, Any] = {name: fast.from_host(array) for name, array in call.arrays.items()}
    room = torch.full((33, 3, 100), 7.0, dtype=torch.bfloat16, device=placed["x"].device)
    out = room[:, 1, 2:98:2]
    fast.lora(**placed, out=out)
    assert fast.to_host(out).tobytes() == run(fast, call)["out"].tobytes()
    out[:] = 7.0
    assert (room == 7.0).all(), "something was written beside out"


@pytest.mark.parametrize("num_tokens", [33, 257])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ids_out_of_range_are_none_where_nobody_looks(monkeypatch, num_tokens, dtype):
    """As an engine runs: `fast` does not look at ids, and a token whose adapter is not there has none."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    call = batch(num_tokens, dtype)
    ids = call.arrays["adapter_ids"].copy()
    ids[1::3] = np.resize([5, 2**31 - 1, -2, -(2**31)], len(ids[1::3]))
    none = np.where((ids < 0) | (ids >= 5), -1, ids)
    results = [run(fast, call.with_arrays(adapter_ids=each))["out"] for each in (ids, none)]
    assert results[0].tobytes() == results[1].tobytes(), "an id that is out of range is not as good as none"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_invariant_variant_does_not_see_the_batch(dtype):
    """A token's bits are the same alone, in a small batch and in a large one, wherever in it."""
    call = batch(300, dtype, in_features=100, widths=(16, 32))
    place = {name: fast.from_host(array) for name, array in call.arrays.items()}
    whole = fast.to_host(lora_invariant(**place, **call.options))
    assert_within(whole, *properties.lora_expected(call), "lora_invariant", ("token", "feature"))
    for tokens in ([0], [299], [7, 298, 8]):
        part = {name: fast.from_host(call.arrays[name][tokens]) for name in ("base", "x", "adapter_ids")}
        got = fast.to_host(lora_invariant(**place | part, **call.options))
        assert got.tobytes() == whole[tokens].tobytes(), f"tokens {tokens} differ from themselves in the batch"


# ---- against peft -----------------------------------------------------------------------------------------------


def adapted_linear(rank: int, alpha: int, use_rslora: bool, seed: int) -> Any:
    """A linear layer that peft has wrapped, both factors random."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=True))
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], use_rslora=use_rslora)
    wrapped: Any = peft.get_peft_model(net, config)
    torch.nn.init.normal_(wrapped.base_model.model[0].lora_B["default"].weight)
    return wrapped


def factors_of(layer: Any) -> tuple[np.ndarray, np.ndarray, float]:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return a.detach().numpy(), b.detach().numpy(), layer.scaling["default"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_batch_of_adapters_gives_what_peft_gives_for_each(backend, use_rslora):
    """Adapters of ranks 2, 8 and 5, a token without one among them, over one base layer."""
    torch.manual_seed(0)
    nets = [adapted_linear(rank, alpha, use_rslora, seed=0) for rank, alpha in ((2, 4), (8, 3), (5, 16))]
    layers = [net.base_model.model[0] for net in nets]
    base_layer = layers[0].base_layer
    x = torch.randn(12, 24)
    ids = np.array([0, 1, 2, -1] * 3, np.int32)

    lora_a, lora_b = np.zeros((3, 8, 24), np.float32), np.zeros((3, 40, 8), np.float32)
    scaling = np.zeros(3, np.float32)
    for i, layer in enumerate(layers):
        a, b, scaling[i] = factors_of(layer)
        lora_a[i, : len(a)], lora_b[i, :, : len(a)] = a, b
    base = backend.linear(*(backend.from_host(t.detach().numpy()) for t in (x, base_layer.weight, base_layer.bias)))
    rest = (backend.from_host(array) for array in (x.numpy(), lora_a, lora_b, scaling, ids))
    got = backend.to_host(backend.lora(base, *rest))

    with torch.no_grad():
        want = np.stack([(nets[i] if i >= 0 else base_layer)(x[t]).numpy() for t, i in enumerate(ids)])
    size = np.abs(x.numpy()).sum(axis=1, keepdims=True) * 100  # weights, factors and scaling are a few units at most
    assert_within(got, want, matmul_bound(want, size, 24, "float32"), "lora, against peft", ("token", "feature"))


def test_over_a_quantized_base_it_is_the_adapter_on_top():
    """The adapter's part is the same over a 4-bit base: what it adds does not depend on what it is added to."""
    layer = adapted_linear(4, 8, False, seed=1).base_model.model[0]
    a, b, scaling = factors_of(layer)
    weight = layer.base_layer.weight.detach().numpy()
    base = Weight.from_float(weight, format="int4-8", backend=reference)
    x = np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)
    ids = np.array([0, -1] * 3, np.int32)
    below = base.linear(x)
    got = reference.lora(below, x, a[None], b[None], np.array([scaling], np.float32), ids)
    want = below + np.where(ids[:, None] == 0, scaling * x @ a.T @ b.T, 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_llama_layer_wrapped_by_peft():
    """The query projection of a small Llama, captured in a real forward pass: its input and its adapted output."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3, vocab_size=50
    )
    lora_config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = peft.get_peft_model(transformers.LlamaModel(config), lora_config)
    layer = model.base_model.model.layers[0].self_attn.q_proj
    seen = {}
    layer.register_forward_hook(lambda module, args, out: seen.update(x=args[0][0], out=out[0]))
    with torch.no_grad():
        model(torch.tensor([[1, 7, 3, 42]]))
    x, want = seen["x"].numpy(), seen["out"].numpy()
    a, b, scaling = factors_of(layer)
    base = reference.linear(x, layer.base_layer.weight.detach().numpy())
    ids = np.zeros(len(x), np.int32)
    got = reference.lora(base, x, a[None], b[None], np.array([scaling], np.float32), ids)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - base).max() > 0.1, "the adapter does nothing: the test would show nothing"


# ---- the door ---------------------------------------------------------------------------------------------------

GOOD = {
    "base": np.ones((2, 3), np.float32),
    "x": np.ones((2, 5), np.float32),
    "lora_a": np.ones((4, 6, 5), np.float32),
    "lora_b": np.ones((4, 3, 6), np.float32),
    "scaling": np.ones(4, np.float32),
    "adapter_ids": np.array([0, -1], np.int32),
}
BAD = [
    ("base", np.ones(3, np.float32)),
    ("x", np.ones((3, 5), np.float32)),
    ("lora_a", np.ones((4, 6, 4), np.float32)),
    ("lora_b", np.ones((4, 3, 5), np.float32)),
    ("lora_b", np.ones((4, 3, 6), np.int8)),
    ("scaling", np.ones(3, np.float32)),
    ("adapter_ids", np.zeros(3, np.int32)),
    ("adapter_ids", np.array([0, 4], np.int32)),
    ("adapter_ids", np.array([0, -2], np.int32)),
    ("out", np.ones((2, 4), np.float32)),
]


@pytest.mark.parametrize("widths", [(), (2,), (4, -1), (1, 2, 0, 0), (2, 2)])
def test_the_door_says_which_widths_are_wrong(backend, widths):
    """None, too few or too many features in all, less than none; and a number of layers that A's rows are not of."""
    arrays = {name: backend.from_host(array) for name, array in GOOD.items()}
    with pytest.raises(ValueError, match=r"lora: (widths|lora_a): expected"):
        backend.lora(**arrays, widths=widths)


@pytest.mark.parametrize(("named", "bad"), BAD)
def test_the_door_says_what_is_wrong(backend, named, bad):
    with pytest.raises(ValueError, match=f"lora: {named}: expected"):
        backend.lora(**{name: backend.from_host(array) for name, array in (GOOD | {named: bad}).items()})
