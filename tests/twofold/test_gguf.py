"""GGUF: what other programs write is read back number for number; what an enemy writes is a sentence."""

import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.linear.weight import Weight
from twofold.checkpoints.gguf import MAX_NESTING, GGUFFile
from twofold.checkpoints.gguf_blocks import BLOCK_TYPES
from twofold.checkpoints.gguf_model import BLOCK_FORMATS, config_from_gguf, load_gguf
from twofold.checkpoints.gguf_tokenizer import tokenizer_of
from twofold.conformance.strategies.checkpoints import (
    byte_level_vocabulary,
    damages,
    one_sentence_at_most,
    sentencepiece_vocabulary,
    write_gguf,
)
from twofold.conformance.strategies.model import random_model
from twofold.errors import TwofoldError

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GPT2 = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
VOCABULARY = len(byte_level_vocabulary()["tokens"])


# --- blocks -----------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(BLOCK_TYPES)), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_blocks_unpack_to_what_the_gguf_package_makes_of_them(number, num_rows, num_blocks, seed):
    block_type = BLOCK_TYPES[number]
    kind = gguf.GGMLQuantizationType(number)
    assert gguf.GGML_QUANT_SIZES[kind] == (block_type.block_size, block_type.block.itemsize), block_type.name
    stored = np.random.default_rng(seed).integers(
        0, 256, (num_rows, num_blocks * block_type.block.itemsize), dtype=np.uint8
    )
    with np.errstate(all="ignore"):  # random bytes make scales that are infinite or no number
        got = block_type.dequantize(stored)
        if block_type.name == "Q8_K":  # the one that the package does not unpack
            blocks = stored.view(block_type.block)
            expected = (blocks["scale"][..., None] * blocks["codes"]).reshape(num_rows, -1)
        else:
            floats = {"F32": np.float32, "F16": np.float16}.get(block_type.name, np.uint8)
            expected = gguf.dequantize(stored.view(floats), kind).astype(np.float32)
    np.testing.assert_array_equal(got, expected, err_msg=block_type.name)


def test_many_blocks_are_unpacked_as_one_at_a_time():
    """More than fit in one chunk."""
    stored = np.random.default_rng(0).integers(0, 120, (9, 1000 * 18), dtype=np.uint8)
    rows = [BLOCK_TYPES[2].dequantize(row[None]) for row in stored]
    np.testing.assert_array_equal(
        BLOCK_TYPES[2].dequantize(np.tile(stored, (1, 3))), np.tile(np.concatenate(rows), (1, 3))
    )


# --- models -----------------------------------------------------------------------------------------------------


def small(family: str, **fields):
    fields = {"rope_scaling": None, "sliding_layers": None, "vocab_size": VOCABULARY, "bos_token_id": 1} | fields
    return random_model(family, **fields)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"num_heads": 6, "num_kv_heads": 1, "head_dim": 4, "tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "output_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"sliding_window": None, "tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_a_model_of_each_family_comes_back_as_it_was_written(tmp_path, family, fields):
    config, tensors = small(family, **fields)
    checkpoint = load_gguf(write_gguf(tmp_path / "model.gguf", config, tensors, vocabulary=byte_level_vocabulary()))
    written = replace(config, rms_norm_eps=float(np.float32(config.rms_norm_eps)))  # a GGUF has it in 4 bytes
    assert replace(checkpoint.config, sliding_layers=None) == written
    assert checkpoint.eos_token_ids == (2,)
    read = checkpoint.tensors()
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor, err_msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_weights_from_the_same_file(tmp_path, family):
    import torch
    from transformers import AutoModelForCausalLM

    head_dim = 128 if family == "qwen3" else 8  # transformers takes a Qwen3 with any other for a damaged one
    config, tensors = small(family, sliding_window=None, head_dim=head_dim)
    path = write_gguf(tmp_path / "model.gguf", config, tensors, vocabulary=byte_level_vocabulary())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    checkpoint = load_gguf(path)
    for name, tensor in theirs.state_dict().items():
        ours = checkpoint.tensors()["model.embed_tokens.weight" if tied(name, config) else name]
        np.testing.assert_array_equal(ours, tensor.numpy(), err_msg=name)
    assert theirs.config.hidden_size == checkpoint.config.hidden_size
    assert theirs.config.num_key_value_heads == checkpoint.config.num_kv_heads


def tied(name: str, config) -> bool:
    return name == "lm_head.weight" and config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_weights_kept_as_they_are_hold_the_same_numbers(tmp_path, kind):
    """Rows of q and k are put back in order in either form."""
    config, tensors = small("llama", intermediate_size=64)
    checkpoint = load_gguf(write_gguf(tmp_path / "model.gguf", config, tensors, matrices=kind))
    floats, kept = checkpoint.tensors(), checkpoint.tensors(as_is=True)
    scale = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 2e-2}.get(kind, 0.5)  # not another tensor: rounded, in this order
    for name in tensors:
        assert np.abs(np.float32(floats[name]) - tensors[name]).max() <= scale, name
        if tensors[name].ndim == 2 and kind in BLOCK_FORMATS:
            assert isinstance(kept[name], Weight), name
            assert kept[name].format.name == BLOCK_FORMATS[kind], name
            np.testing.assert_array_equal(kept[name].dequantize(), floats[name], err_msg=name)
        else:
            np.testing.assert_array_equal(kept[name], floats[name], err_msg=name)
            assert kept[name].dtype.name == {"F16": "float16", "BF16": "bfloat16"}.get(
                kind if tensors[name].ndim == 2 else "F32", "float32"
            )


def llama31_factors(head_dim: int, base: float) -> np.ndarray:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": 131072}
    scaled = LlamaConfig(**sizes, rope_parameters=LLAMA31 | {"rope_theta": base})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")
    return base ** -(np.arange(0, head_dim, 2) / head_dim) / frequencies.numpy()


def test_llama_3_scaling_is_found_again_in_its_factors(tmp_path):
    config, tensors = small("llama", head_dim=64, rope_base=500000.0)
    factors = llama31_factors(64, 500000.0)
    checkpoint = load_gguf(write_gguf(tmp_path / "model.gguf", config, tensors, rope_factors=factors))
    assert checkpoint.config.rope_scaling == LLAMA31


def test_other_factors_are_refused(tmp_path):
    config, tensors = small("llama", head_dim=64, rope_base=500000.0)
    factors = llama31_factors(64, 500000.0)
    factors[20] *= 1.1
    with pytest.raises(TwofoldError, match=r"rope_freqs\.weight"):
        load_gguf(write_gguf(tmp_path / "model.gguf", config, tensors, rope_factors=factors))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"{arch}.rope.scaling.type": "none"}, None),
        (
            {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"{arch}.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "{arch}.rope.scaling.type": "yarn",
                "{arch}.rope.scaling.factor": 4.0,
                "{arch}.rope.scaling.original_context_length": 64,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rotary_scaling_is_read(tmp_path, metadata, expected):
    config, tensors = small("qwen2", sliding_window=None)
    checkpoint = load_gguf(write_gguf(tmp_path / "model.gguf", config, tensors, metadata=metadata))
    assert checkpoint.config.rope_scaling == expected


# --- what is wrong is said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"split.count": 2}, "merge the parts"),
        ({"{arch}.rope.scaling.type": "longrope"}, "rope.scaling.type"),
        ({"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": -1.0}, "factor"),
        ({"general.alignment": 24}, "general.alignment"),
        (GPT2 | {"tokenizer.ggml.tokens": ["a"] * 999}, "999 tokens for a vocabulary of"),
        (GPT2 | {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": ["a b"]}, "'a b'"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]}, "scores"),
    ],
)
def test_metadata_that_makes_no_sense_is_named(tmp_path, metadata, says):
    config, tensors = small("llama")
    with pytest.raises(TwofoldError, match=says):
        load_gguf(write_gguf(tmp_path / "model.gguf", config, tensors, metadata=metadata))


def test_an_unknown_family_is_named_with_those_known():
    with pytest.raises(TwofoldError, match=r"unknown model family gemma3 .*llama, qwen2, qwen3"):
        config_from_gguf({"general.architecture": "gemma3"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": np.zeros((24, 32))}),
            r"k_proj\.weight has shape \(24, 32\); the config makes it \(16, 32\)",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.zeros(8)}), r"q_norm\.weight is not part of"),
    ],
)
def test_a_missing_strange_or_misshapen_tensor_is_named(tmp_path, damage, says):
    config, tensors = small("llama")
    damage(tensors)
    with pytest.raises(TwofoldError, match=says):
        load_gguf(write_gguf(tmp_path / "model.gguf", config, tensors))


# --- hostile files ------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(entries=(), tensors=(), data: bytes = b"", *, version: int = 3, counts=None) -> bytes:
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % 32) + data


HOSTILE = {
    "nothing at all": (b"", "not a GGUF file"),
    "another format": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "a version to come": (file(version=4), "version 4"),
    "the other byte order": (file(version=3 << 24), "big-endian"),
    "2^60 tensors": (file(counts=(2**60, 0)), "claims 1,152,921,504,606,846,976 tensors"),
    "2^60 entries": (file(counts=(0, 2**60)), "claims 1,152,921,504,606,846,976 metadata entries"),
    "a string of 2^60 bytes": (file([struct.pack("<Q", 2**60) + b"key"]), "truncated or corrupt"),
    "a string of 2^64 - 1 bytes": (file([entry("a", 8, struct.pack("<Q", 2**64 - 1))]), "truncated or corrupt"),
    "an array of 2^60 strings": (file([entry("a", 9, array(8, 2**60))]), "truncated or corrupt"),
    "an array of 2^62 numbers": (file([entry("a", 9, array(10, 2**62))]), "truncated or corrupt"),
    "arrays in arrays": (file([entry("a", 9, array(9, 1) * 50_000)]), f"nested more than {MAX_NESTING} deep"),
    "a value of no type": (file([entry("a", 99, b"")]), "unknown type of value 99"),
    "an array of no type": (file([entry("a", 9, array(99, 1, bytes(64)))]), "unknown type of value 99"),
    "bytes that are no text": (file([entry("a", 8, text(b"\xff\xfe"))]), "not UTF-8"),
    "a key twice": (file([entry("a", 4, bytes(4))] * 2), "a key given twice"),
    "a name twice": (file([], [tensor("a", (8,)), tensor("a", (8,), 0, 32)], bytes(64)), "a name given twice"),
    "no dimensions": (file([], [tensor("a", ())]), "0 dimensions"),
    "five dimensions": (file([], [tensor("a", (1,) * 5)]), "5 dimensions"),
    "2^32 - 1 dimensions": (file([], [text("a") + struct.pack("<I", 2**32 - 1)]), "4294967295 dimensions"),
    "an empty tensor": (file([], [tensor("a", (8, 0))]), "does not go with F32"),
    "sizes that overflow": (file([], [tensor("a", (2**32, 2**32))], bytes(64)), "past the file"),
    "sizes that overflow to 0": (file([], [tensor("a", (2**63, 2))], bytes(64)), "past the file"),
    "half a block": (file([], [tensor("a", (33,), 2)], bytes(64)), "in blocks of 32"),
    "a type that is not read": (file([], [tensor("a", (256,), 16)], bytes(999)), "type IQ2_XXS, which is not read"),
    "a type that is none": (file([], [tensor("a", (256,), 12345)], bytes(999)), "type 12345, which is not read"),
    "an offset astray": (file([], [tensor("a", (8,), 0, 4)], bytes(64)), "not a multiple of 32"),
    "an offset past the end": (file([], [tensor("a", (8,), 0, 2**63)], bytes(64)), "past the file"),
    "an offset that wraps": (file([], [tensor("a", (8,), 0, 2**64 - 32)], bytes(64)), "past the file"),
    "tensors that overlap": (
        file([], [tensor("a", (16,)), tensor("b", (8,), 0, 32)], bytes(64)),
        "its bytes overlap those of a, in tensor b",
    ),
    "tensors in one place": (file([], [tensor("a", (8,)), tensor("b", (8,))], bytes(64)), "overlap"),
    "an alignment of 0": (file([entry("general.alignment", 4, bytes(4))]), "not a power of two"),
    "an alignment of no number": (file([entry("general.alignment", 8, text("x"))]), "not a power of two"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_sentence(tmp_path, name):
    data, says = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(TwofoldError) as raised:
        load_gguf(path)
    assert says in str(raised.value), raised.value
    assert str(raised.value).isprintable()


EXCESSIVE = {
    "strings": (
        lambda: file([entry("a", 9, array(8, n := (3 << 18) + 1, bytes(8 * n)))]),
        "786,432 strings that are read",
    ),
    "arrays": (lambda: file([entry("a", 9, array(9, 50_000, array(4, 0) * 50_000))]), "strings that are read"),
    "a string": (lambda: file([entry("a", 8, text(bytes(64 << 20)))]), "bytes of metadata that are read"),
    "numbers": (lambda: file([entry("a", 9, array(0, 64 << 20, bytes(64 << 20)))]), "bytes of metadata that are read"),
}


@pytest.mark.parametrize("name", EXCESSIVE)
def test_a_file_with_more_in_it_than_any_model_is_refused(tmp_path, name):
    make, says = EXCESSIVE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(make())
    with pytest.raises(TwofoldError, match=says):
        load_gguf(path)


COSTLY = {  # within the bounds, yet as much work as they let pass
    "strings": lambda: file([entry("a", 9, array(8, 3 << 18, b"".join(text(b"%050d" % i) for i in range(3 << 18))))]),
    "a string": lambda: file([entry("a", 8, text(bytes(63 << 20)))]),
    "numbers": lambda: file([entry("a", 9, array(0, 63 << 20, bytes(63 << 20)))]),
    "arrays": lambda: file([entry("a", 9, array(9, 49_000, array(4, 1, bytes(4)) * 49_000))]),
    "tensors": lambda: file([], [tensor(f"{i:06}", (1,), 0, 32 * i) for i in range(1 << 15)], bytes(32 << 15)),
}
MEASURE = """
import resource, sys
from pathlib import Path
from twofold.checkpoints.gguf_model import load_gguf
from twofold.errors import TwofoldError
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
seconds, megabytes = used()
try:
    load_gguf(Path(sys.argv[1]))
except TwofoldError as error:
    print(used()[0] - seconds, used()[1] - megabytes)
"""


@pytest.mark.parametrize("name", COSTLY)
def test_the_costliest_file_takes_less_than_2_seconds_of_computing_and_200_mb(tmp_path, name):
    path = tmp_path / "model.gguf"
    path.write_bytes(COSTLY[name]())
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 2, f"{seconds} seconds of computing"
    assert megabytes < 200, f"{megabytes} MB"


def whole_model(path: Path, vocabulary) -> Path:
    config, tensors = small("llama", vocab_size=320, hidden_size=8, intermediate_size=8, num_layers=1, head_dim=4)
    return write_gguf(path, config, tensors, vocabulary=vocabulary)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    kinds = {"byte-level": byte_level_vocabulary("smollm"), "sentencepiece": sentencepiece_vocabulary()}
    return {kind: whole_model(folder / f"{kind}.gguf", vocabulary) for kind, vocabulary in kinds.items()}


@given(data=st.data())
@settings(max_examples=200)
def test_a_damaged_file_loads_or_is_a_sentence(whole, tmp_path_factory, data):
    """And nothing else: no other error, from loading or from reading any tensor."""
    kind = data.draw(st.sampled_from(sorted(whole)), label="tokenizer")
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    sound = whole[kind].read_bytes()
    path.write_bytes(data.draw(damages(len(sound)))(sound))
    with one_sentence_at_most():
        checkpoint = load_gguf(path)
        for name in checkpoint.shapes:
            assert checkpoint.tensors()[name].shape == checkpoint.shapes[name]
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("hello 123 €"))


ANY_VALUE = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.text(max_size=3), max_size=5),
    st.lists(st.integers(-9, 9), max_size=5).map(np.array),
    st.lists(st.just(["nested"]), max_size=2),
)


@given(data=st.data())
@settings(max_examples=200)
def test_metadata_of_any_type_makes_a_model_or_a_sentence(whole, data):
    """The file is sound; what it says of the model is not what such a key should hold."""
    metadata = GGUFFile(whole[data.draw(st.sampled_from(sorted(whole)), label="tokenizer")]).metadata
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=2), label="keys"):
        metadata[key] = data.draw(ANY_VALUE, label=key)
    with one_sentence_at_most():
        config = config_from_gguf(metadata, ["output.weight"])
        tokenizer, why_not = tokenizer_of(metadata, config.vocab_size)
        assert (tokenizer is None) == bool(why_not)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_file_cut_short_anywhere_is_refused(whole, tmp_path, kind):
    """The writer pads the last tensor to its alignment; every byte before that counts."""
    path, sound = tmp_path / "cut.gguf", whole[kind].read_bytes()
    last = max(tensor.offset + tensor.nbytes for tensor in GGUFFile(whole[kind]).tensors.values())
    for length in [*range(0, 150), *range(150, last, 97), last - 1]:
        path.write_bytes(sound[:length])
        with pytest.raises(TwofoldError):
            load_gguf(path)


def test_a_file_cut_short_after_it_was_opened_is_a_sentence(whole, tmp_path):
    path = tmp_path / "model.gguf"
    sound = whole["byte-level"].read_bytes()
    path.write_bytes(sound)
    tensors = load_gguf(path).tensors()
    path.write_bytes(sound[:-2000])
    with pytest.raises(TwofoldError, match="truncated while it was read"):
        [tensors[name] for name in tensors]


def test_the_default_model(smollm2_path):
    """SmolLM2: 134.5 million weights in 4.9 bits each, and a fingerprint that stays."""
    checkpoint = load_gguf(smollm2_path)
    assert checkpoint.config.num_layers == 30
    assert checkpoint.config.tie_word_embeddings
    assert sum(int(np.prod(shape)) for shape in checkpoint.shapes.values()) == 134_515_008
    assert checkpoint.eos_token_ids == (2,)
    assert checkpoint.fingerprint() == load_gguf(smollm2_path).fingerprint()
    assert checkpoint.tokenizer.chat_template is not None
