"""A GGUF file as a checkpoint: its metadata as a config, its tensors by Hugging Face's names.

Two conventions differ, and both are undone here:

- The converter for the Llama family reorders the rows of q and k so that the two halves of a rotary pair lie side by
  side (interleaved), where Hugging Face keeps first halves first (half-split). The rows are put back. They are whole
  runs of blocks, so quantized tensors are reordered as they are. (Without it SmolLM2's perplexity is 307, not 26.)
- Llama 3's scaling of rotary frequencies is stored as its result, a tensor of one factor a frequency. What it was
  made from is looked for and must give these very factors.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from numpy import ndarray as Array

from reference.fusion.rotary import rotary_tables
from reference.linear.weight import Weight, weight_format
from reference.model.config import ModelConfig
from twofold.bounded import shown
from twofold.checkpoints.checkpoint import Checkpoint, check_tensors
from twofold.checkpoints.gguf import GGUFFile, GGUFTensor, scalars
from twofold.checkpoints.gguf_tokenizer import eos_ids_of, tokenizer_of
from twofold.errors import TwofoldError

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral calls itself llama, and so does SmolLM2
PERMUTED = ("llama",)
ROPE_FACTORS = "rope_freqs.weight"
MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "vocab_size": "vocab_size",
}
BLOCK_FORMATS = {"Q4_0": "q4_0", "Q4_1": "q4_1", "Q8_0": "q8_0"}  # those that a layer computes with as they are


def load_gguf(path: Path, *, with_tokenizer: bool = True) -> Checkpoint:
    """The checkpoint in a GGUF file. Raises ``TwofoldError`` saying what is wrong with it."""
    file = GGUFFile(path)
    if scalars(file.metadata).get("split.count", 1) != 1:
        raise TwofoldError(f"{path}: one part of a GGUF that was split; merge the parts (llama-gguf-split --merge)")
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 1 and tensor.type.unpack is not None:
            raise TwofoldError(f"{path}: tensor {shown(name)} is a vector stored as {tensor.type.name}")
    config = config_from_gguf(file.metadata, file.tensors, rope_factors=_rope_factors(file), where=str(path))
    stored_names = {hf_name(name): name for name in file.tensors if name != ROPE_FACTORS}
    shapes = {name: file.tensors[stored].shape for name, stored in stored_names.items()}
    check_tensors(config, shapes, path)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    permuted = heads if file.metadata["general.architecture"] in PERMUTED else {}

    def read(name: str, as_is: bool) -> np.ndarray | Weight:
        tensor = file.tensors[stored_names[name]]
        rows = file.read(tensor.name)
        part = name.split(".")[-2]
        if part in permuted:
            rows = unpermute_rows(rows.reshape(tensor.shape[0], -1), permuted[part]).reshape(rows.shape)
        return as_weight(rows, tensor) if as_is else as_floats(rows, tensor)

    tokenizer, no_tokenizer = None, "its tokenizer was not asked for"
    try:
        if with_tokenizer:
            tokenizer, no_tokenizer = tokenizer_of(file.metadata, config.vocab_size)
    except TwofoldError as error:
        raise TwofoldError(f"{path}: {error}") from None
    return Checkpoint(
        name=path.stem,
        path=path,
        files=(path,),
        config=config,
        shapes=shapes,
        stored_as={name: file.tensors[stored].type.name for name, stored in stored_names.items()},
        nbytes=sum(tensor.nbytes for tensor in file.tensors.values()),
        read=read,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        eos_token_ids=eos_ids_of(file.metadata),
    )


def hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name that has none is left as it is.

    Example:
        >>> hf_name("blk.7.ffn_down.weight")
        'model.layers.7.mlp.down_proj.weight'
    """
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def unpermute_rows(
    rows: Shaped[Array, "num_heads_times_head_dim row"], num_heads: int
) -> Shaped[Array, "num_heads_times_head_dim row"]:
    """Rows of q or k from interleaved order (a0 b0 a1 b1 ...) to half-split (a0 a1 ... b0 b1 ...), head by head.

    Example:
        >>> unpermute_rows(np.array([["a0"], ["b0"], ["a1"], ["b1"]]), num_heads=1).ravel().tolist()
        ['a0', 'a1', 'b0', 'b1']
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def as_floats(rows: UInt8[Array, "num_rows row_bytes"], tensor: GGUFTensor) -> np.ndarray:
    """A tensor's stored rows as numbers: floats in their own type, quantized ones unpacked to float32."""
    if tensor.type.unpack is None:
        return rows.view(tensor.type.block).reshape(tensor.shape)
    return tensor.type.dequantize(rows).reshape(tensor.shape)


def as_weight(rows: UInt8[Array, "num_rows row_bytes"], tensor: GGUFTensor) -> np.ndarray | Weight:
    """The same codes, scales and minima, taken out of their blocks; what no layer computes with, as floats."""
    if tensor.type.name not in BLOCK_FORMATS or len(tensor.shape) != 2:
        return as_floats(rows, tensor)
    blocks = rows.view(tensor.type.block)  # [rows, blocks of a row]
    parts = {"weight": "codes", "weight_scale": "scale", "weight_min": "min"}
    arrays = {name: blocks[part] for name, part in parts.items() if part in (tensor.type.block.names or ())}
    arrays["weight"] = arrays["weight"].reshape(len(rows), -1)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return Weight(weight_format(BLOCK_FORMATS[tensor.type.name]), *tensor.shape, arrays)


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Collection[str] = (),
    *,
    rope_factors: Float32[Array, " half_dim"] | None = None,
    where: str = "GGUF",
) -> ModelConfig:
    """The config that a GGUF's metadata describes, by way of the names that Hugging Face gives the same things.

    Args:
        metadata: The file's, by key.
        tensors: The names of the file's tensors: which biases there are, and whether the embeddings are tied.
        rope_factors: The tensor that divides the rotary frequencies, if there is one.
        where: What to call the file in a sentence.

    Raises:
        TwofoldError: For a family that is not known, naming those that are; for what is missing or makes no sense.
    """
    single = scalars(metadata)
    family = single.get("general.architecture")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        named = shown(metadata.get("general.architecture"))
        raise TwofoldError(f"{where}: unknown model family {named} (general.architecture); known are {known}")
    hf = {name: metadata[f"{family}.{key}"] for name, key in FIELDS.items() if f"{family}.{key}" in metadata}
    hf |= {name: metadata.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    hf.setdefault("vocab_size", _length(metadata.get("tokenizer.ggml.tokens")))
    hf.setdefault("num_key_value_heads", hf.get("num_attention_heads"))
    hf["model_type"] = "mistral" if family == "llama" and "sliding_window" in hf else family
    hf |= {"use_sliding_window": "sliding_window" in hf, "max_window_layers": 0}
    hf["tie_word_embeddings"] = "output.weight" not in tensors
    hf["attention_bias"] = "blk.0.attn_output.bias" in tensors
    hf["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    try:
        hf["rope_scaling"] = _rope_scaling(single, family)
        if rope_factors is not None:
            hf["rope_scaling"] = _llama3_scaling(rope_factors, hf.get("rope_theta", 10000.0))
        config = ModelConfig.from_hf(hf)
    except ValueError as error:
        raise TwofoldError(f"{where}: {str(error).removeprefix('ModelConfig: ')}") from None
    width = single.get(f"{family}.rope.dimension_count", config.head_dim)
    if width != config.head_dim:
        raise TwofoldError(f"{where}: rotary embedding of {shown(width)} of {config.head_dim} dimensions of a head")
    return config


def _length(tokens: Any) -> int | None:
    return len(tokens) if isinstance(tokens, list) else None


def _rope_scaling(metadata: Mapping[str, Any], family: str) -> dict[str, Any] | None:
    """`rope_scaling` in Hugging Face's words; ggml's YaRN has the same parameters under other names."""
    linear = metadata.get(f"{family}.rope.scale_linear")  # what older files say
    given = {key: metadata.get(f"{family}.rope.scaling.{key}") for key in ("type", "factor", "original_context_length")}
    kind = given["type"] or ("linear" if linear is not None else "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type: expected none, linear or yarn, got {shown(kind)}")
    if metadata.get(f"{family}.rope.scaling.attn_factor", 1.0) != 1.0:
        raise ValueError("rope.scaling.attn_factor: expected 1 or nothing")
    scaling = {"rope_type": kind, "factor": linear if given["factor"] is None else given["factor"]}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = given["original_context_length"]
        for name in ("beta_fast", "beta_slow"):
            scaling[name] = metadata.get(f"{family}.rope.scaling.yarn_{name}")
    return scaling


def _rope_factors(file: GGUFFile) -> np.ndarray | None:
    if ROPE_FACTORS not in file.tensors:
        return None
    return as_floats(file.read(ROPE_FACTORS), file.tensors[ROPE_FACTORS]).ravel()


def _llama3_scaling(factors: Float32[Array, " half_dim"], base: Any) -> dict[str, Any]:
    """The parameters of Llama 3's rule that give these very factors. Every release so far differs in one of them."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, scaled = (_frequencies(2 * len(factors), base, rule) for rule in (None, scaling))
    if not np.allclose(plain / scaled, factors, rtol=1e-3, atol=0):
        raise ValueError(f"{ROPE_FACTORS}: expected the factors of Llama 3's scaling of rotary frequencies")
    return scaling


def _frequencies(head_dim: int, base: Any, scaling: Mapping[str, Any] | None) -> np.ndarray:
    """What the tables turn each pair by from one position to the next."""
    cos, sin = rotary_tables(head_dim, 2, base=base, scaling=scaling)
    return np.arctan2(sin[1], cos[1])
