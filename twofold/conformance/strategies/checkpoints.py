"""Small checkpoints on disk, as other programs write them; and what a disk, a network or an enemy may do to a file.

A GGUF is written by the `gguf` package, in the conventions of llama.cpp's converter. So a reader is tested against
what strangers write, never against itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from reference.model.config import ModelConfig
from twofold.errors import TwofoldError
from twofold.tokenizer import ALPHABET, SPACE

MERGES = [
    "h e",
    "l l",
    "he ll",
    "hell o",
    "Ġ w",
    "o r",
    "Ġ Ġ",
    "1 2",
    "12 3",
    "Ã ©",
    "â Ĥ",
    "âĤ ¬",
    "i n",
    "in g",
    "Ċ Ċ",
]
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def byte_level_vocabulary(pre: str = "gpt-2") -> dict[str, Any]:
    """``tokenizer.ggml.*`` of a small byte-level BPE: three special tokens, a user-defined one, 256 letters, merges."""
    tokens = [*SPECIAL_TOKENS, "<think>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }


def sentencepiece_vocabulary() -> dict[str, Any]:
    """``tokenizer.ggml.*`` of a small SentencePiece BPE: its three specials, 256 bytes, pieces with scores."""
    pieces = ["he", "ll", "hell", "hello", f"{SPACE}hello", f"{SPACE}w", "or", f"{SPACE}wor", "ld", f"{SPACE}{SPACE}"]
    letters = [SPACE, *"abcdefghilmnorstuwéA.,!12"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1000.0 - i for i in range(len(letters))]
    return {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters)),
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    vocabulary: Mapping[str, Any] | None = None,
    matrices: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    rope_factors: np.ndarray | None = None,
) -> Path:
    """Write a model as llama.cpp's converter does, its matrices stored as ``matrices`` (what `gguf` can quantize)."""
    import gguf
    from gguf.quants import quantize

    architecture = {"mistral": "llama"}.get(config.family, config.family)
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, architecture, config, vocabulary or {}, metadata or {})
    for name, tensor in tensors.items():
        stored = tensor.astype(np.float32)
        num_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if architecture == "llama" and num_heads:
            halves = stored.reshape(num_heads, 2, -1, *stored.shape[1:])
            stored = halves.swapaxes(1, 2).reshape(stored.shape)
        kind = gguf.GGMLQuantizationType[matrices if stored.ndim == 2 else "F32"]
        writer.add_tensor(_gguf_name(name), quantize(stored, kind), raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def _write_metadata(
    writer: Any, architecture: str, config: ModelConfig, vocabulary: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab_size)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    for key, value in vocabulary.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    for key, value in metadata.items():
        _add(writer, key.format(arch=architecture), value)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@contextlib.contextmanager
def one_sentence_at_most() -> Iterator[None]:
    """What is done inside may end in a `TwofoldError` of one printable line; in no other error."""
    said = ""
    try:
        yield
    except TwofoldError as error:
        said = str(error)
    assert said.isprintable(), f"not one plain line: {said!r}"


@st.composite
def damages(draw: st.DrawFn, size: int) -> Callable[[bytes], bytes]:
    """What may happen to a file of ``size`` bytes: cut short, bytes flipped, a count or length made huge, a piece
    repeated or lost. Most of it hits the first part, where the claims are."""
    near = st.integers(0, min(size, 600) - 1) | st.integers(0, size - 1)
    kind = draw(st.sampled_from(["flip", "flip", "count", "count", "cut", "insert", "remove"]), label="damage")
    where = sorted(draw(st.lists(near, min_size=1, max_size=4, unique=True), label="where"))
    if kind == "flip":
        masks = draw(st.lists(st.integers(1, 255), min_size=len(where), max_size=len(where)), label="masks")
        return lambda data: _with_bytes(data, {i: bytes([data[i] ^ mask]) for i, mask in zip(where, masks)})
    if kind == "count":
        value = draw(st.sampled_from([0, 1, 2, 2**8, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]), label="count")
        width = draw(st.sampled_from([4, 8]), label="width")
        number = (value % 2 ** (8 * width)).to_bytes(width, "little")
        return lambda data: _with_bytes(data, {where[0]: number})
    if kind == "cut":
        return lambda data: data[: where[0]]
    piece = draw(st.integers(1, 64), label="length")
    if kind == "insert":
        return lambda data: data[: where[0]] + data[where[0] : where[0] + piece] + data[where[0] :]
    return lambda data: data[: where[0]] + data[where[0] + piece :]


def _with_bytes(data: bytes, changes: Mapping[int, bytes]) -> bytes:
    changed = bytearray(data)
    for start, new in changes.items():
        changed[start : start + len(new)] = new
    return bytes(changed[: len(data)])
