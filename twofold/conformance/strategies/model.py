"""Small random models of every family: a config and its tensors, made without torch."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from reference.model.config import FAMILIES, ModelConfig
from twofold.checkpoints.shapes import SHAPES

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_ids": (2,),
}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3_SCALING},
    "mistral": {"sliding_window": 11},
    "qwen2": {"attention_bias": True, "sliding_window": 9, "sliding_layers": (False, True)},
    "qwen3": {"qk_norm": True, "head_dim": 12, "tie_word_embeddings": True},
}


def small_shape(model: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` of a small model, otherwise like one of `twofold.checkpoints.shapes.SHAPES`."""
    small = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return SHAPES[model] | small | changes


def random_model(family: str = "llama", seed: int = 0, **overrides: Any) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A small model of ``family`` as (config, host float32 tensors by Hugging Face's names).

    What sets the family apart is on: llama has Llama 3's rotary scaling, mistral a window of 11, qwen2 biases and one
    sliding layer of two, qwen3 q/k norms, heads wider than hidden_size / num_heads, and tied embeddings. Norms and
    biases are random too, so that leaving one out shows. ``overrides`` are fields of `ModelConfig`.

    Args:
        family: One of ``FAMILIES``.
        seed: Of the weights. The same arguments give the same model, bit for bit.

    Example:
        >>> config, tensors = random_model("qwen3", seed=1, num_layers=1)
        >>> tensors["model.layers.0.self_attn.q_norm.weight"].shape == (config.head_dim,)
        True
    """
    fields = SMALL | SPECIAL[family] | overrides
    layers = fields.get("sliding_layers")
    if layers is not None and len(layers) != fields["num_layers"]:  # as many as there are layers, alternating
        fields["sliding_layers"] = tuple(bool(i % 2) for i in range(fields["num_layers"]))
    config = ModelConfig(family=family, **fields)
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    return config, {name: _random_tensor(rng, name, shape) for name, shape in config.expected_tensors().items()}


def _random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Of a size that keeps activations near 1 through the layers, and tokens far enough apart to be told apart."""
    if "norm" in name:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("bias"):
        return rng.normal(scale=0.3, size=shape).astype(np.float32)
    if name.startswith(("model.embed", "lm_head")):
        return rng.normal(scale=0.5, size=shape).astype(np.float32)
    return (rng.standard_normal(shape, np.float32) * np.float32(1.5 / np.sqrt(shape[1]))).astype(np.float32)


@st.composite
def models(draw: st.DrawFn, **overrides: Any) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A small model of a drawn family, head ratio and rotary scaling."""
    family = draw(st.sampled_from(FAMILIES), label="family")
    num_kv_heads = draw(st.sampled_from([1, 2, 4]), label="num_kv_heads")
    drawn: dict[str, Any] = {
        "num_kv_heads": num_kv_heads,
        "num_heads": num_kv_heads * draw(st.sampled_from([1, 2, 3]), label="query heads per KV head"),
        "head_dim": draw(st.sampled_from([2, 6, 8]), label="head_dim"),
        "num_layers": draw(st.integers(1, 2), label="num_layers"),
        "rope_interleaved": draw(st.booleans(), label="rope_interleaved"),
        "tie_word_embeddings": draw(st.booleans(), label="tied"),
        "rope_scaling": draw(st.sampled_from([None, LLAMA3_SCALING, YARN_SCALING]), label="rope_scaling"),
    }
    return random_model(family, draw(st.integers(0, 2**16), label="seed"), **drawn | overrides)


@st.composite
def token_steps(draw: st.DrawFn, vocab_size: int = SMALL["vocab_size"]) -> tuple[list[list[int]], list[list[int]]]:
    """(sequences, steps): ragged sequences, and how many tokens of each every step computes; some wait, some end."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=3), label="lengths")
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="token seed"))
    sequences = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
    steps, left = [], list(lengths)
    while any(left):
        chunk = draw(st.sampled_from([1, 3, 8, 30]), label="largest chunk")
        counts = [min(rest, draw(st.integers(0, chunk), label="chunk")) for rest in left]
        if not any(counts):  # a step computes something
            counts = [min(rest, chunk) for rest in left]
        steps.append(counts)
        left = [rest - count for rest, count in zip(left, counts)]
    return sequences, steps


def random_adapter(config: ModelConfig, rank: int, seed: int = 0, **options: Any) -> tuple[dict[str, np.ndarray], dict]:
    """An adapter of every linear layer but some, drawn by ``seed``, as (tensors by peft's names, its config)."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in config.expected_tensors().items():
        if name.endswith("_proj.weight") and (rng.random() < 0.7 or not tensors):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = rng.normal(scale=shape[1] ** -0.5, size=(rank, shape[1])).astype(
                np.float32
            )
            tensors[f"{layer}.lora_B.weight"] = rng.normal(scale=rank**-0.5, size=(shape[0], rank)).astype(np.float32)
    return tensors, {"r": rank, "lora_alpha": 2 * rank, "use_rslora": False} | options
