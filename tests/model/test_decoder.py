"""The decoder is the model that `transformers` makes of the same checkpoint, however its tokens are cut into steps."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fast
from reference.model.config import ModelConfig
from reference.model.decoder import Decoder
from twofold.conformance.backends import is_interpreted
from twofold.conformance.properties import model as properties

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CHECKPOINTS = {
    "llama 2": (transformers.LlamaConfig, {"num_key_value_heads": 4, "rms_norm_eps": 0.03}),
    "llama 3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama, biases, linear scaling": (
        transformers.LlamaConfig,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5},
        },
    ),
    "smollm2": (
        transformers.LlamaConfig,
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 7}),
    "mistral, no window, yarn, wide heads": (
        transformers.MistralConfig,
        {"sliding_window": None, "head_dim": 24, "rope_parameters": YARN},
    ),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 1}),
    "qwen2, one layer sliding": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 24, "rms_norm_eps": 0.03}),
    "qwen3, biases, the first layer sliding": (
        transformers.Qwen3Config,
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
SEQUENCES = [list(range(3, 40)), [7], [90, 5, 5, 61, 33, 8, 8, 100, 0, 41, 17, 64]]
PLANS = {
    "prefill": properties.whole(SEQUENCES),
    "chunks": [[11, 0, 4], [1, 0, 5], [16, 1, 2], [9, 0, 1]],
    "decode": [[30, 1, 6], *[[1, 0, 1]] * 6, [1, 0, 0]],
}
BEGINNINGS = {"both": [[7, 1, 3], [1, 0, 2]]}


def random_model(name, **larger):
    """transformers' model of one family with random weights; ``larger``: how many times as large some sizes are."""
    make_config, special = CHECKPOINTS[name]
    sizes = SIZES | special
    sizes |= {key: times * sizes[key] for key, times in larger.items() if sizes.get(key)}
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(make_config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as initialised, norms are 1, biases 0 and logits flat
            spread = 0.5 if name.endswith("bias") else 0.2
            parameter.copy_(parameter + spread * torch.randn_like(parameter) * (parameter.ndim == 1 or "embed" in name))
            if parameter.ndim == 2:
                parameter.mul_(4.0 / larger.get("hidden_size", 1) ** 0.5)
    return model


def logits_of(model, sequences):
    """What transformers gives, a sequence at a time."""
    with torch.no_grad():
        found = [model(torch.tensor([tokens], device=model.device)).logits[0] for tokens in sequences]
    return [logits.float().cpu().numpy() for logits in found]


def saved(model, folder):
    """Its config and its tensors, as transformers writes them."""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    """A small random checkpoint of one family, saved by transformers, and the logits that it gives itself."""
    model = random_model(request.param)
    return *saved(model, tmp_path_factory.mktemp("checkpoint")), logits_of(model, SEQUENCES)


def test_logits_are_those_of_transformers(checkpoint, backend):
    """Prefill, chunks and decode give transformers' logits, on any backend."""
    config, tensors, expected = checkpoint
    decoder = Decoder(ModelConfig.from_hf(config), tensors, backend=backend)
    plans, sequences = PLANS, SEQUENCES
    if is_interpreted(backend):  # beginnings only: it takes seconds for a step
        plans, sequences = BEGINNINGS, [tokens[: sum(new)] for tokens, new in zip(SEQUENCES, zip(*BEGINNINGS["both"]))]
    expected = [logits[: len(tokens)] for logits, tokens in zip(expected, sequences)]
    for name, steps in plans.items():
        got = properties.paged_logits(decoder, sequences, steps, block_size=3, seed=1)
        properties.assert_same_logits(got, expected, name)


def test_a_checkpoint_has_the_tensors_that_its_config_says(checkpoint):
    """Names and shapes are those in the file, no more and no fewer."""
    config, tensors, _ = checkpoint
    expected = ModelConfig.from_hf(config).expected_tensors()
    assert {name: array.shape for name, array in tensors.items()} == expected


def as_exact_in_bfloat16(backend, model, folder, sequences, steps) -> None:
    """In bfloat16, over steps of chunks and decodes, logits are within twice the error that transformers makes in
    bfloat16 itself: of all logits together, and of the worst. The truth is its float32, of the same weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    config, tensors = saved(model, folder)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    exact = np.concatenate(logits_of(model, sequences))
    theirs = np.concatenate(logits_of(copy.deepcopy(model).bfloat16(), sequences)) - exact
    decoder = Decoder(ModelConfig.from_hf(config), tensors, backend=backend, dtype="bfloat16")
    ours = np.concatenate(properties.paged_logits(decoder, sequences, steps, block_size=16)) - exact
    for what, size in (
        ("all", lambda error: np.sqrt(np.mean(error**2))),
        ("the worst", lambda error: abs(error).max()),
    ):
        assert size(ours) <= 2 * size(theirs), f"error of {what}: {size(ours):.4f}, transformers' is {size(theirs):.4f}"
        assert size(theirs) < 0.1 * abs(exact).max(), "transformers' own error is no measure"


LARGER = {"vocab_size": 11, "hidden_size": 4, "intermediate_size": 4, "head_dim": 4, "sliding_window": 15}
LARGER |= {"max_position_embeddings": 8}


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("backend", [fast, fast.invariant], ids=["fast", "invariant"])
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_bfloat16_is_as_exact_as_in_transformers(backend, family, tmp_path):
    """Every family, 1099 tokens of four sequences."""
    model = random_model(family, **LARGER)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, model.config.vocab_size, length).tolist() for length in (700, 333, 65, 1)]
    steps = [[512, 300, 0, 0], [180, 25, 57, 1], *[[1, 1, 1, 0]] * 8]
    as_exact_in_bfloat16(backend, model, tmp_path, sequences, steps)


@pytest.mark.needs("interpreter")
def test_bfloat16_is_as_exact_as_in_transformers_where_kernels_are_interpreted(tmp_path):
    """A beginning."""
    sequences = [tokens[:9] for tokens in SEQUENCES]
    as_exact_in_bfloat16(fast, random_model("qwen3"), tmp_path, sequences, [[7, 1, 3], [1, 0, 5], [1, 0, 1]])
