"""A model's config is read from Hugging Face's files as transformers reads them, and hostile ones are refused."""

import math
from dataclasses import replace

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from reference.model.config import FAMILIES, ModelConfig

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """What a config leaves out is what transformers' class has."""
    theirs = CONFIGS[family](**{name: value for name, value in SMALL.items() if isinstance(value, int)})
    ours = ModelConfig.from_hf(SMALL | {"model_type": family, "architectures": None})
    assert ours.family == family
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_base == theirs.rope_parameters["rope_theta"]
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope_scaling is None


@given(
    family=st.sampled_from(FAMILIES),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "attention_bias": st.booleans(),
            "mlp_bias": st.booleans(),
            "head_dim": st.sampled_from([8, 16, 48]),
            "tie_word_embeddings": st.booleans(),
            "num_key_value_heads": st.sampled_from([1, 2, 4]),
            "sliding_window": st.sampled_from([None, 1, 77]),
            "use_sliding_window": st.booleans(),
            "max_window_layers": st.integers(0, 5),
        },
    ),
)
def test_tensors_are_those_of_transformers(family, fields):
    """Names, shapes and the layers that slide, for every combination of switches."""
    import torch

    kept = {name: value for name, value in SMALL.items() if isinstance(value, int)} | fields
    theirs = CONFIGS[family](**kept)
    ours = ModelConfig.from_hf(kept | {"model_type": family})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    tied = {"lm_head.weight"} if theirs.tie_word_embeddings else set()
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}
    assert ours.expected_tensors() == shapes
    windows = [layer.self_attn.sliding_window for layer in model.model.layers] if family.startswith("qwen") else None
    if family == "mistral":
        windows = [theirs.sliding_window] * 4
    assert [ours.layer_window(i) for i in range(4)] == (windows or [None] * 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_reads_back_what_transformers_writes(family):
    """From ``to_dict`` of a whole config of transformers 5, rotary parameters included."""
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
    kept = {name: value for name, value in SMALL.items() if isinstance(value, int)}
    theirs = CONFIGS[family](**kept, rope_parameters=rope, eos_token_id=[5, 6], dtype="bfloat16")
    ours = ModelConfig.from_hf(theirs.to_dict())
    assert (ours.rope_base, ours.rope_scaling["factor"], ours.rope_scaling["rope_type"]) == (5e5, 4.0, "yarn")
    assert (ours.eos_token_ids, ours.dtype) == ((5, 6), "bfloat16")


OLD_AND_NEW = [
    ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 64},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
    ),
]


@pytest.mark.parametrize(("old", "new"), OLD_AND_NEW)
def test_both_generations_of_rotary_names_mean_the_same(old, new):
    assert ModelConfig.from_hf(SMALL | old) == ModelConfig.from_hf(SMALL | new)


def test_the_family_can_be_told_by_the_architecture_alone():
    assert ModelConfig.from_hf(SMALL | {"model_type": None, "architectures": ["Qwen2ForCausalLM"]}).family == "qwen2"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            r"unknown model family \(gpt2, GPT2LMHeadModel\)",
        ),
        ({"model_type": None, "architectures": []}, "unknown model family"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "unknown model family .*known are llama"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"model_type": {"a": 1}}, "unknown model family"),
        ({"vocab_size": None}, "vocab_size: expected to be in the config"),
        ({"hidden_size": 2**60}, "hidden_size"),
        ({"hidden_size": 65}, "hidden_size: expected a multiple of 4 heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"intermediate_size": 96.0}, "intermediate_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads.*a divisor of 4 heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"head_dim": [8]}, "head_dim"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": "big"}, "rope_base"),
        ({"rope_theta": math.inf}, "rope_base"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "default, linear, llama3, yarn"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
        ({"eos_token_id": [2, 100]}, "eos_token_ids"),
        ({"eos_token_id": "2"}, "eos_token_ids"),
        ({"bos_token_id": -5}, "bos_token_id"),
        ({"dtype": "float8"}, "dtype"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "architectures": None, "num_key_value_heads": None}, None),
        (
            {"model_type": "qwen2", "architectures": None, "use_sliding_window": True, "max_window_layers": -1},
            "max_window",
        ),
        (
            {"model_type": "qwen2", "architectures": None, "use_sliding_window": True, "layer_types": ["chunked"] * 4},
            "layer_types",
        ),
        (
            {
                "model_type": "qwen3",
                "architectures": None,
                "use_sliding_window": True,
                "layer_types": ["full_attention"],
            },
            "sliding_layers: expected one flag for each of 4 layers",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_named(changed, named):
    """One sentence that names the field; null where transformers allows null."""
    if named is None:
        assert ModelConfig.from_hf(SMALL | changed).num_kv_heads == 4
        return
    with pytest.raises(ValueError, match=named) as raised:
        ModelConfig.from_hf(SMALL | changed)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [[], None, "llama", {}])
def test_no_config_at_all_is_refused(config):
    with pytest.raises(ValueError, match="ModelConfig"):
        ModelConfig.from_hf(config)


def test_a_missing_count_of_kv_heads_is_only_the_old_llamas_way():
    """Llama's first configs had none and meant one for each head; a Mistral without it would be guessed at."""
    without = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    assert ModelConfig.from_hf(without).num_kv_heads == 4
    with pytest.raises(ValueError, match="num_key_value_heads"):
        ModelConfig.from_hf(without | {"model_type": "mistral", "architectures": None})


def test_a_config_made_by_hand_is_checked_alike():
    """As for a GGUF, whose fields have other names."""
    good = ModelConfig.from_hf(SMALL)
    for field, bad in (("family", "gpt2"), ("num_layers", 0), ("sliding_layers", (True,)), ("vocab_size", 2**40)):
        with pytest.raises(ValueError, match=f"ModelConfig: {field}"):
            replace(good, **{field: bad})
