"""A folder that transformers has saved is read as transformers reads it; what is wrong with one is named."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.checkpoints import huggingface, load_checkpoint
from twofold.checkpoints.huggingface import load_folder
from twofold.conformance.strategies.checkpoints import CHATML, MERGES, SPECIAL_TOKENS
from twofold.errors import TwofoldError
from twofold.tokenizer import ALPHABET

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def saved_model(folder, *, dtype="float32", **settings):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(folder, **settings)
    return model


def saved_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model, tokenizer), as transformers saves them."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, saved_model(folder), saved_tokenizer(folder)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, to break."""
    return shutil.copytree(saved[0], tmp_path / "model")


@pytest.mark.parametrize(
    ("dtype", "shard"), [("float32", "50GB"), ("float32", "30KB"), ("bfloat16", "50GB"), ("float16", "20KB")]
)
def test_tensors_are_those_that_were_saved(tmp_path, dtype, shard):
    """In one file or many, in the type they were saved in."""
    model = saved_model(tmp_path, dtype=dtype, max_shard_size=shard)
    checkpoint = load_folder(tmp_path)
    assert (len(checkpoint.files) > 1) == shard.endswith("KB"), "the index is used"
    assert checkpoint.config.dtype == dtype
    read = checkpoint.tensors()
    state = model.state_dict()
    assert set(read) == set(state)
    for name, tensor in state.items():
        assert read[name].dtype.name == dtype, name
        np.testing.assert_array_equal(read[name].astype(np.float32), tensor.float().numpy(), err_msg=name)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in state.values())


def test_everything_else_is_found(saved):
    folder, _, tokenizer = saved
    checkpoint = load_checkpoint(folder)
    assert checkpoint.eos_token_ids == (2, 0), "the config's and the generation config's"
    assert checkpoint.config.bos_token_id == 1
    assert checkpoint.tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    messages = [{"role": "user", "content": "hello"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert checkpoint.tokenizer.apply_chat_template(messages) == expected


@pytest.fixture(scope="module")
def tokenizers(saved):
    """(ours, theirs), of one folder."""
    return load_folder(saved[0]).tokenizer, saved[2]


@given(text=st.text())
@settings(max_examples=200)
def test_text_becomes_the_tokens_that_transformers_makes_of_it(tokenizers, text):
    ours, theirs = tokenizers
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("around", [["$A"], ["<|im_start|>", "$A"], ["<|im_start|>", "$A", "<|im_end|>"]])
def test_what_goes_around_a_text_is_what_tokenizer_json_says(folder, around):
    """So it is for transformers, whatever ``add_bos_token`` in the tokenizer's config says."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(token, backend.token_to_id(token)) for token in around if token != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", lambda c: c.update(add_bos_token=True, add_eos_token=False))
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_folder(folder).tokenizer
    for added in (True, False):
        ids = ours.encode("hello", add_special_tokens=added)
        assert ids == theirs.encode("hello", add_special_tokens=added)
        assert len(ids) == (len(around) if added else 1)


def test_a_chat_template_in_its_own_file_or_in_the_config(folder):
    """The file comes first; in the config it is a text, or a list of which "default" counts."""
    own, settings_file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    for template in (
        "in the config",
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "in the config"}],
    ):
        settings_file.write_text(json.dumps(settings | {"chat_template": template}))
        own.write_text("in its file")
        assert load_folder(folder).tokenizer.chat_template.source == "in its file"
        own.unlink()
        assert load_folder(folder).tokenizer.chat_template.source == "in the config"


def test_without_a_tokenizer_token_ids_are_still_served(folder):
    (folder / "tokenizer.json").unlink()
    checkpoint = load_folder(folder)
    assert checkpoint.tokenizer is None
    with pytest.raises(TwofoldError, match=r"no tokenizer\.json; give prompts as token ids"):
        checkpoint.require_tokenizer()


def test_the_fingerprint_follows_the_files(folder):
    before = load_folder(folder).fingerprint()
    assert load_folder(folder).fingerprint() == before
    saved_model(folder, dtype="float16")
    assert load_folder(folder).fingerprint() != before


# --- what is wrong is said ----------------------------------------------------------------------------------------


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rewrite(folder, change):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            "tensor model.norm.weight has shape (31,); the config makes it (32,)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}),
            "model.layers.0.self_attn.q_proj.bias is not part of a llama model with this config",
        ),
        (lambda t: t.clear(), "tensor model.embed_tokens.weight is missing and 20 more"),
    ],
)
def test_a_missing_strange_or_misshapen_tensor_is_named(folder, change, says):
    rewrite(folder, change)
    with pytest.raises(TwofoldError) as raised:
        load_folder(folder)
    assert says in str(raised.value)


def test_leftovers_of_old_files_are_let_be(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    load_folder(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(model_type="mamba", architectures=["MambaForCausalLM"]), "unknown model family"),
        (lambda c: c.pop("hidden_size"), "hidden_size"),
        (lambda c: c.update(num_hidden_layers=2**60), "num_hidden_layers"),
        (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "gptq"),
    ],
)
def test_a_config_that_cannot_be_run_is_named(folder, change, says):
    edit(folder / "config.json", change)
    with pytest.raises(TwofoldError) as raised:
        load_folder(folder)
    assert says in str(raised.value)
    assert str(folder / "config.json") in str(raised.value)


def test_pickle_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(TwofoldError, match="a pickle file, which can run any code"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "../model.safetensors"}, "is not the name of a .safetensors file in this folder"),
        ({"a": "/etc/passwd"}, "is not the name of a .safetensors file in this folder"),
        ({"a": "pytorch_model.bin"}, "is not the name of a .safetensors file in this folder"),
        ({"a": "model-00002-of-00002.safetensors"}, "missing, though"),
        ({"a": 7}, "not a map"),
        ([], "not a map"),
        ({str(i): f"{i}.safetensors" for i in range(2000)}, "more than any checkpoint has"),
    ],
)
def test_an_index_leads_nowhere_else(folder, weight_map, says):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(TwofoldError, match=says):
        load_folder(folder)


def test_headers_of_many_files_are_bounded_together(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    monkeypatch.setattr(huggingface, "MAX_BYTES", 3000)
    with pytest.raises(TwofoldError, match="more than 3,000 bytes in all"):
        load_folder(folder)


def test_a_tensor_in_two_files_is_named(folder):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shutil.copy(folder / "model.safetensors", folder / names[0])
    (folder / "model.safetensors").rename(folder / names[1])
    with pytest.raises(TwofoldError, match=f"is in {names[0]} and {names[1]}"):
        load_folder(folder)


MODEL = json.dumps({"model_type": "llama", **SIZES})


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no config.json"),
        ({"adapter_config.json": "{}"}, "a LoRA adapter, not a model"),
        ({"config.json": "[1]"}, "expected a JSON object"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": '{"a": 1, "a": 2}'}, "says 'a' twice"),
        ({"config.json": MODEL}, "no weights"),
        (
            {"config.json": MODEL, "a.safetensors": "", "b.safetensors": ""},
            "2 .safetensors files",
        ),
    ],
)
def test_what_is_no_model_folder_is_said_to_be_none(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TwofoldError, match=says):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{}", "not a usable tokenizer"),
        ("tokenizer.json", "{", "not a usable tokenizer"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("generation_config.json", '{"eos_token_id": [2, 10000000]}', "expected token ids below 300"),
        ("generation_config.json", '{"eos_token_id": "2"}', "expected token ids below 300"),
        ("chat_template.jinja", "x" * (2 << 20), "more than the 1,048,576"),
    ],
)
def test_a_broken_file_beside_the_weights_is_named(folder, name, content, says):
    (folder / name).write_text(content)
    with pytest.raises(TwofoldError, match=says) as raised:
        load_folder(folder)
    assert name in str(raised.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*SIZES, "rope_parameters", "rope_scaling", "rope_theta", "architectures", "model_type", "head_dim"]
FIELDS += [
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "attention_bias",
    "quantization_config",
    "torch_dtype",
]


@given(data=st.data())
@settings(max_examples=200)
def test_a_config_of_any_types_is_read_or_is_a_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    config = {"model_type": data.draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"])), **SIZES}
    for field in data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3), label="fields"):
        config[field] = data.draw(JSON, label=field)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TwofoldError) as raised:
        load_folder(folder)  # there are no weights, so a config that can be read is followed by that
    assert str(raised.value).isprintable()
