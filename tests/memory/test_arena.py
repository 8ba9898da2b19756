"""A step in one arena: found by watching it, and bit for bit the same."""

import re
from typing import Any

import numpy as np
import pytest

import fast
import reference
from reference.linear.weight import Weight
from reference.memory.arena import IN_PLACE, PlannedBackend
from reference.model.adapters import AdapterBank
from reference.model.config import FAMILIES
from reference.model.decoder import Decoder
from twofold.conformance import plain_torch
from twofold.conformance.properties.model import paged_logits
from twofold.conformance.properties.planner import ArenaDecoder
from twofold.conformance.strategies.model import random_adapter, random_model

backends = pytest.mark.parametrize("backend", [reference, plain_torch], ids=["reference", "plain_torch"])

TOKENS = np.random.default_rng(0).integers(0, 97, 70).tolist()
STEPS = [[64], [1], [5]]


def run(backend, model, *, steps=STEPS, cache="auto", last_only=True, adapters=None, **options) -> ArenaDecoder:
    """A decoder's steps, in the arena and out of it: `ArenaDecoder` compares."""
    decoder = ArenaDecoder(*model, backend=backend, **options)
    bank = None
    if adapters:
        bank = AdapterBank(model[0], backend=decoder.backend, dtype=decoder.dtype)
        for number, adapter in enumerate(adapters):
            bank.add(f"adapter {number}", *adapter)
    tokens = TOKENS[: sum(chunk for [chunk] in steps)]
    paged_logits(
        decoder, [tokens], steps, kv_format=cache, last_only=last_only,
        adapters=bank, adapter_of=[0] if bank else None,
    )  # fmt: skip
    return decoder


def deep(family: str, **changed):
    """A model of a family, with the proportions and enough of the layers of a real one."""
    sizes = {"num_layers": 8, "hidden_size": 64, "intermediate_size": 176, "num_heads": 4, "num_kv_heads": 2}
    return random_model(family, **sizes | {"head_dim": 16, "max_position_embeddings": 128} | changed)


@backends
@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_an_arena_of_the_largest_live_set(backend, family, last_only):
    """Prefill, decode and a chunk: at most 1.05 of what one op wants, and a quarter of all activations together."""
    for plan in run(backend, deep(family), last_only=last_only).plans:
        assert plan.memory.num_bytes <= 1.05 * plan.memory.bound
        assert plan.memory.num_bytes <= 0.25 * plan.memory.total
        assert plan.elsewhere == 0
        exact = sum(lifetime.num_bytes for lifetime in plan.lifetimes)
        assert plan.memory.total - exact < 256 * len(plan.lifetimes), "sizes are rounded up by more than they must be"


@backends
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_in_the_arena(backend, dtype):
    """All but the logits: they are cast at the end, by an op that takes no ``out``."""
    [prefill, *_] = run(backend, deep("qwen3"), dtype=dtype).plans
    assert {activation.dtype for activation in prefill.activations} == {dtype}
    assert prefill.elsewhere == 97 * 4


@backends
@pytest.mark.parametrize("format", ["int8", "q4_1", "w8a8", "sparse24"])
def test_rounded_weights_in_the_arena(backend, format):
    """Norms, SwiGLU and residuals are ops of their own where the weights are not floats."""
    run(backend, deep("qwen2"), weight_format=format)


@backends
def test_mixed_weights_in_the_arena(backend):
    """Weights of several formats side by side: their results are written into an array that `empty` gives."""
    config, arrays = deep("llama")
    tensors: dict[str, Any] = dict(arrays)
    kinds = {"v_proj.weight": "q8_0", "up_proj.weight": "int8", "_proj.weight": "q4_0", "embed_tokens.weight": "q8_0"}
    for name, array in arrays.items():
        format = next((kind for end, kind in kinds.items() if name.endswith(end)), None)
        tensors[name] = Weight.from_float(array, format=format) if format else array
    decoder = run(backend, (config, tensors), weight_format="as-is")
    assert any(decoder.plans[0].ops[activation.op] == "empty" for activation in decoder.plans[0].activations)


@backends
@pytest.mark.parametrize("cache", ["int8", "int4", "kivi4"])
def test_quantized_caches_in_the_arena(backend, cache):
    """All but the rotated queries and keys, which come from an op that takes no ``out``."""
    [prefill, *_] = run(backend, deep("qwen3"), cache=cache).plans
    assert prefill.elsewhere == 8 * 64 * (4 + 2) * 16 * 4


@backends
def test_adapters_in_the_arena(backend):
    model = deep("mistral")
    run(backend, model, adapters=[random_adapter(model[0], 4)])


@pytest.mark.interpreted(1)
def test_fast_runs_in_the_arena():
    """Kernels write where they are told."""
    model = random_model("qwen3", num_layers=2, hidden_size=16, head_dim=8)
    run(fast, model, steps=[[5], [1]])


# ---- watching ---------------------------------------------------------------------------------------------------


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_a_slice_is_its_tensor():
    """A tensor is wanted as long as an op reads a part of it."""
    backend, x = PlannedBackend(reference), ones(2, 8)

    def step():
        y = backend.swiglu(x)
        backend.swiglu(x)
        return backend.swiglu(y[:, 2:].reshape(2, 2))

    _, plan = backend.record(step)
    assert [(lifetime.first, lifetime.last) for lifetime in plan.lifetimes] == [(0, 2), (1, 1), (2, 2)]


def test_what_a_step_returns_is_wanted_to_its_end():
    """In lists, tuples and dicts too; and a slice of it."""
    backend, x = PlannedBackend(reference), ones(2, 8)

    def step():
        return {"a": backend.swiglu(x)}, [backend.swiglu(x)[:, 2:]], backend.swiglu(x)

    _, plan = backend.record(step)
    assert [lifetime.last for lifetime in plan.lifetimes] == [2, 2, 2]


def test_memory_that_is_used_again_is_another_tensor():
    """What lies where a tensor was is not taken for it, however often its address comes back."""
    backend, x = PlannedBackend(reference), ones(64, 64)

    def step():
        for _ in range(9):
            x[:1] = backend.swiglu(backend.rms_norm(x, x[0], eps=1e-6))[:1, :1]  # and is gone
        return backend.swiglu(x)

    _, plan = backend.record(step)
    assert [lifetime.last - lifetime.first for lifetime in plan.lifetimes] == [1, 0] * 9 + [0]
    assert plan.memory.num_bytes == plan.memory.bound


def test_an_op_in_place_takes_no_place():
    """What the step itself writes over an argument is no new tensor; what the plan may, inherits."""
    backend, norm = PlannedBackend(reference), ones(4)

    def step():
        y = backend.swiglu(ones(2, 8))
        y = backend.rms_norm(y, norm, eps=1e-6, out=y)
        z = backend.rms_norm(y, norm, eps=1e-6)
        return backend.linear_add(z, ones(4, 4), z)

    _, plan = backend.record(step)
    assert [lifetime.over for lifetime in plan.lifetimes] == [None, 0, 1]
    assert plan.memory.num_bytes == plan.memory.bound == 256


def test_a_slice_is_not_written_over():
    """The rest of it, and its strides, are not those of the result."""
    backend = PlannedBackend(reference)
    _, plan = backend.record(lambda: backend.rms_norm(backend.swiglu(ones(2, 8))[:, :2], ones(2), eps=1e-6))
    assert [lifetime.over for lifetime in plan.lifetimes] == [None, None]


def test_ops_say_what_they_may_be_written_over():
    """The table is what the ops' docstrings promise, no more and no less."""
    promised = {}
    for name in reference.__all__:
        doc = re.sub(r"\s+", " ", getattr(reference, name).__doc__)
        found = dict(re.findall(r"(\w*out): [^:]*?may be ``(\w+)``", doc))
        if found:
            promised[name] = found
    assert promised == IN_PLACE


def test_a_step_of_other_ops_or_shapes_is_refused():
    """One sentence that says what was expected."""
    backend, x = PlannedBackend(reference), ones(2, 8)
    _, plan = backend.record(lambda: backend.swiglu(backend.swiglu(x)))
    arena = backend.empty((plan.memory.num_bytes,), dtype="uint8")
    for step, wrong in (
        (lambda: backend.rms_norm(x, x[0], eps=1e-6), "step: expected swiglu as its op 0, got rms_norm"),
        (lambda: backend.swiglu(x), "step: expected 2 ops, got 1"),
        (lambda: backend.swiglu(backend.swiglu(backend.swiglu(x))), "step: expected the end as its op 2, got swiglu"),
        (lambda: backend.swiglu(ones(3, 8)), "out: expected shape"),
    ):
        with pytest.raises(ValueError, match=wrong):
            backend.run(step, plan, arena)
    with pytest.raises(ValueError, match="arena: expected at least 512 bytes, got 511"):
        backend.run(lambda: None, plan, arena[:511])
    assert np.array_equal(backend.swiglu(x), reference.swiglu(x)), "after an error ops are as ever"


def test_it_is_a_backend():
    """Every op of the interface with its signature, and whatever else the other has."""
    backend = PlannedBackend(reference)
    assert all(callable(getattr(backend, name)) for name in reference.__all__)
    assert backend.__name__ == "reference"
    assert not hasattr(backend, "no_such_op")
    model = random_model("llama")
    ours, its = (paged_logits(Decoder(*model, backend=b), [[1, 2, 3]], [[3]])[0] for b in (backend, reference))
    assert np.array_equal(ours, its)
