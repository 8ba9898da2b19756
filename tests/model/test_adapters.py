"""LoRA adapters: what `peft` makes of the same files, several in one batch."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

import reference
from reference.model.config import ModelConfig
from reference.model.decoder import AdapterBank, Decoder
from twofold.conformance.properties import model as properties
from twofold.conformance.strategies.model import random_adapter, random_model

ADAPTERS = {
    "everything": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False),
    "attention, rank 7, rsLoRA": LoraConfig(
        r=7, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False
    ),
    "ranks and alphas of their own": LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["k_proj", "up_proj", "down_proj"],
        rank_pattern={"down_proj": 5, "layers.1.mlp.up_proj": 3},
        alpha_pattern={"up_proj": 9, "model.layers.0.self_attn.k_proj": 1},
        init_lora_weights=False,
    ),
}
SEQUENCES = [[7, 3, 50, 50, 12, 0, 31, 9, 9, 4, 27], [1, 2, 3, 4, 5], [60, 61, 62, 63, 64, 65, 66], [10, 20, 30]]
ADAPTER_OF = [1, 0, 2, -1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A base model, three adapters saved by peft, and for each sequence the logits that peft gives with its own."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=101, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in base.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    tensors = {name: array.numpy().copy() for name, array in base.state_dict().items()}
    folder = tmp_path_factory.mktemp("adapters")
    model, expected = base, {}
    with torch.no_grad():
        expected[3] = base(torch.tensor([SEQUENCES[3]])).logits[0].numpy()
        for i, lora in enumerate(ADAPTERS.values()):
            model = get_peft_model(base, lora)
            model.save_pretrained(folder / str(i))
            s = ADAPTER_OF.index(i)
            expected[s] = model.eval()(torch.tensor([SEQUENCES[s]])).logits[0].numpy()
            base = model.unload()
    adapters = [
        (
            load_file(folder / str(i) / "adapter_model.safetensors"),
            (folder / str(i) / "adapter_config.json").read_text(),
        )
        for i in range(len(ADAPTERS))
    ]
    return config.to_dict(), tensors, [(t, json.loads(text)) for t, text in adapters], [expected[s] for s in range(4)]


def test_a_batch_of_adapters_is_what_peft_makes_of_each(checkpoint, backend):
    """Four sequences, three adapters and none, in prefill, chunks and decode: each has its own adapter's logits."""
    hf_config, tensors, adapters, expected = checkpoint
    config = ModelConfig.from_hf(hf_config)
    decoder, bank = Decoder(config, tensors, backend=backend), AdapterBank(config, backend=backend)
    for name, (adapter, adapter_config) in zip(ADAPTERS, adapters, strict=True):
        bank.add(name, adapter, adapter_config)
    assert bank.names == [*ADAPTERS]
    for steps in ([[11, 5, 7, 3]], [[4, 0, 6, 1], [6, 4, 0, 1], [1, 1, 1, 1]]):
        got = properties.paged_logits(decoder, SEQUENCES, steps, adapters=bank, adapter_of=ADAPTER_OF)
        properties.assert_same_logits(got, expected, f"steps {steps}")
    base = properties.paged_logits(decoder, SEQUENCES, [[11, 5, 7, 3]])
    assert properties.relative_error(base[0], expected[0]) > 0.01, "the adapter makes no difference"


def test_a_quantized_base_takes_adapters():
    """The adapter is added to what the layer gives, however its weight is stored."""
    config, tensors = random_model("llama", hidden_size=64, intermediate_size=64, num_heads=8)
    adapter, options = random_adapter(config, rank=3)
    bank = AdapterBank(config, backend=reference)
    bank.add("a", adapter, options)
    tokens, values = [[5, 6, 7, 8, 9]], dict(tensors)
    for name in tensors:
        if "_proj" in name:
            values[name] = reference_values(tensors[name])
    got = properties.paged_logits(
        Decoder(config, tensors, backend=reference, weight_format="q8_0"), tokens, [[5]], adapters=bank, adapter_of=[0]
    )
    expected = properties.paged_logits(
        Decoder(config, properties.merged(config, values, adapter, 2.0), backend=reference), tokens, [[5]]
    )
    properties.assert_same_logits(got, expected, "q8_0 and an adapter")


def reference_values(array):
    from reference.linear.weight import Weight

    return Weight.from_float(array, format="q8_0").dequantize()


@pytest.mark.parametrize(("alone", "launches"), [(None, 1), ("k_proj", 3), ("no k_proj", 2)])
def test_layers_side_by_side_are_adapted_in_one_call(alone, launches):
    """Queries, keys and values read the same tokens. One with a scaling of its own, or without adapters, parts them."""
    config, _ = random_model("llama", num_layers=1)
    calls = []

    class Counting:
        def lora(self, *args, **kwargs):
            calls.append(kwargs.get("widths"))
            return reference.lora(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(reference, name)

    bank = AdapterBank(config, backend=Counting())
    for name, rank in (("a", 2), ("b", 5)):
        tensors, options = random_adapter(config, rank=rank, seed=rank)
        if alone == "no k_proj":
            tensors = {layer: array for layer, array in tensors.items() if "k_proj" not in layer}
        bank.add(name, tensors, options | ({"alpha_pattern": {"k_proj": 1}} if alone == "k_proj" else {}))
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    widths = [config.expected_tensors()[f"model.layers.0.{module}.weight"][0] for module in modules]
    rng = np.random.default_rng(0)
    x, base = rng.normal(size=(4, config.hidden_size)), rng.normal(size=(4, sum(widths)))
    ids = np.array([0, 1, -1, 1], np.int32)
    expected, end = base.copy(), 0
    for module, width in zip(modules, widths):  # each as if it stood alone
        columns, end = slice(end, end + width), end + width
        bank.apply(expected[:, columns], x, 0, [module], ids)
    calls.clear()
    got = bank.apply(base.copy(), x, 0, modules, ids)
    assert calls == ([widths] if launches == 1 else [None] * launches)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_the_digest_is_of_the_content():
    """The same content under another name has the same digest; another weight, or scaling, another."""
    config, _ = random_model("llama")
    adapter, options = random_adapter(config, rank=2)
    changed = {name: array.copy() for name, array in adapter.items()}
    next(iter(changed.values()))[0, 0] += 1e-6
    bank = AdapterBank(config, backend=reference)
    bank.add("one", adapter, options)
    bank.add("same", dict(reversed(adapter.items())), options | {"r": 2})
    bank.add("other weight", changed, options)
    bank.add("other scaling", adapter, options | {"lora_alpha": 5})
    assert bank.digests["one"] == bank.digests["same"]
    assert len(set(bank.digests.values())) == 3


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {f"{LAYER}.lora_A.weight": np.ones((2, 32)), f"{LAYER}.lora_B.weight": np.ones((32, 2))}


@pytest.mark.parametrize(
    ("tensors", "config", "named"),
    [
        ({}, {}, "tensors: expected lora_A and lora_B"),
        ({"base_model.model.lm_head.lora_A.weight": np.ones((2, 32))}, {}, "got base_model.model.lm_head"),
        ({f"{LAYER}.lora_magnitude_vector": np.ones(32)}, {}, "lora_magnitude_vector"),
        ({name.replace("layers.0", "layers.9"): array for name, array in GOOD.items()}, {}, "model.layers.9"),
        ({name.replace("q_proj", "z_proj"): array for name, array in GOOD.items()}, {}, "z_proj"),
        ({f"{LAYER}.lora_A.weight": np.ones((2, 32))}, {}, "q_proj.lora_B.weight: expected to be there"),
        (GOOD | {f"{LAYER}.lora_B.weight": np.ones((32, 3))}, {}, r"lora_B.weight: expected shape \[32, 2\]"),
        (GOOD | {f"{LAYER}.lora_A.weight": np.ones((2, 31))}, {}, r"lora_A.weight: expected shape \[2, 32\]"),
        (GOOD | {f"{LAYER}.lora_A.weight": np.ones((0, 32))}, {}, "lora_A.weight"),
        (GOOD, {"use_dora": True}, "use_dora"),
        (GOOD, {"bias": "all"}, "bias"),
        (GOOD, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (GOOD, {"init_lora_weights": "pissa"}, "init_lora_weights"),
        (GOOD, {"peft_type": "IA3"}, "peft_type"),
        (GOOD, {"lora_alpha": float("nan")}, "lora_alpha"),
        (GOOD, {"lora_alpha": "8"}, "lora_alpha"),
        (GOOD, {"alpha_pattern": {"(a+)+$": 4}}, "alpha_pattern"),
    ],
)
def test_what_cannot_be_served_is_named_and_leaves_nothing_behind(tensors, config, named):
    bank = AdapterBank(random_model("llama")[0], backend=reference)
    with pytest.raises(ValueError, match=re.escape(named) if "[" not in named else named):
        bank.add("bad", tensors, config)
    assert bank.names == []
    assert bank.add("good", GOOD, {}) == 0


def test_an_adapter_added_between_steps_serves_the_next():
    """And those that were there keep their numbers and their function."""
    config, tensors = random_model("llama")
    decoder, bank, tokens = (
        Decoder(config, tensors, backend=reference),
        AdapterBank(config, backend=reference),
        [[5, 6, 7]],
    )
    for i in range(3):
        adapter, options = random_adapter(config, rank=1 + i, seed=i)
        assert bank.add(f"adapter {i}", adapter, options) == i
        for j in range(i + 1):
            adapter, _ = random_adapter(config, rank=1 + j, seed=j)
            merged = Decoder(config, properties.merged(config, tensors, adapter, 2.0), backend=reference)
            got = properties.paged_logits(decoder, tokens, [[3]], adapters=bank, adapter_of=[j])
            properties.assert_same_logits(got, properties.paged_logits(merged, tokens, [[3]]), f"{j} of {i + 1}")


def test_a_pattern_is_whole_words_of_a_layers_name():
    """Not any end of it: "proj" is no module, and "q_proj" is not "k_proj"."""
    config, bases = random_model("llama")[0], {}
    for pattern in (
        "proj",
        "_proj",
        "attn.q_proj",
        "k_proj",
        "q_proj",
        "self_attn.q_proj",
        "layers.0.self_attn.q_proj",
    ):
        bank = AdapterBank(config, backend=reference)
        bank.add("a", GOOD, {"lora_alpha": 2, "alpha_pattern": {pattern: 20}})
        base = bank.apply(np.zeros((1, 32)), np.ones((1, 32)), 0, ["self_attn.q_proj"], np.zeros(1, np.int32))
        bases[pattern] = base[0, 0] / 64  # scaling 1 gives 64: ranks of 2, 32 features, all ones
    matching = {pattern for pattern, factor in bases.items() if factor == 10}
    assert matching == {"q_proj", "self_attn.q_proj", "layers.0.self_attn.q_proj"}
    assert {factor for pattern, factor in bases.items() if pattern not in matching} == {1}


def test_a_name_is_taken_once():
    bank = AdapterBank(random_model("llama")[0], backend=reference)
    bank.add("a", GOOD, {})
    with pytest.raises(ValueError, match="name that is not taken"):
        bank.add("a", GOOD, {})
