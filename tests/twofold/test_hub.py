"""From what a user types to a model: each kind of name leads where it should, and each dead end is a sentence."""

import errno
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from reference.model.config import ModelConfig
from twofold.checkpoints import fetch, hub, list_local_models, load_checkpoint, resolve_model
from twofold.conformance.strategies.checkpoints import byte_level_vocabulary, write_gguf
from twofold.conformance.strategies.model import random_model
from twofold.errors import TwofoldError


@pytest.fixture
def gguf(tmp_path):
    config, tensors = random_model("llama", vocab_size=300, rope_scaling=None, num_layers=1)
    (tmp_path / "models").mkdir()
    return write_gguf(tmp_path / "models" / "small.gguf", config, tensors, vocabulary=byte_level_vocabulary())


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch, tmp_path):
    """No test here reaches a network, or the user's caches."""

    def refuse(*args, **kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(fetch, "_fetch", refuse)
    monkeypatch.setattr("huggingface_hub.scan_cache_dir", lambda: SimpleNamespace(repos=[]))
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path))


def test_a_file_or_the_folder_with_it(gguf):
    for name in (gguf, str(gguf), gguf.parent):
        assert load_checkpoint(name).path == gguf


def test_several_files_in_a_folder_are_named(gguf):
    shutil.copy(gguf, gguf.with_name("other.gguf"))
    with pytest.raises(TwofoldError, match=r"several models; name one: other\.gguf, small\.gguf"):
        load_checkpoint(gguf.parent)


@pytest.mark.parametrize("name", [None, "smollm2", "SmolLM2", "SmolLM2-135M-Instruct", "smollm2-135m"])
def test_the_default_model_has_names(monkeypatch, gguf, name):
    monkeypatch.setattr(fetch, "fetch_default_model", lambda on_progress: gguf)
    assert resolve_model(name) == gguf


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "no-such-model",
            "no such model; give a folder, a .gguf file, a hub name (org/name), or SmolLM2",
        ),
        ("./no/such/folder", "no such folder or file"),
        ("models/nothing.gguf", "no such folder or file"),
        ("/nothing", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
        ("x" * 5000, "no such model"),
        ("null\x00byte", "no such model"),
        ("with spaces/in it", "no such model"),
        ("\x1b[2J", "no such model"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_sentence(name, says):
    with pytest.raises(TwofoldError, match=re.escape(says)) as raised:
        load_checkpoint(name)
    assert str(raised.value).isprintable()


def test_weights_alone_are_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(TwofoldError, match=r"give the folder that also has their config\.json"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_a_hub_name_asks_for_what_is_read_and_nothing_else(monkeypatch, gguf):
    asked = {}

    def snapshot_download(name, **patterns):
        asked.update(patterns, name=name)
        return str(gguf.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_checkpoint("org/name").path == gguf
    assert asked["name"] == "org/name"
    from huggingface_hub.utils import filter_repo_objects

    offered = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    offered += ["tokenizer.json", "generation_config.json", "special_tokens_map.json"]
    unwanted = ["pytorch_model.bin", "model.pt", "training_args.bin", "original/consolidated.00.pth", "README.md"]
    unwanted += ["consolidated.safetensors", "onnx/model.json", "model.Q4_0.gguf", "flax_model.msgpack", "evil.py"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*offered, *unwanted], **patterns)) == offered


def _hub_errors():
    from huggingface_hub import errors

    yield lambda: errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached (no network?)"
    yield lambda: errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached (no network?)"
    yield lambda: errors.HFValidationError("Repo id must be ..."), "not a name that the hub takes"
    yield lambda: OSError(errno.ENOSPC, "No space left on device"), "the disk is full"
    yield lambda: OSError(errno.EACCES, "Permission denied"), "cannot be fetched"
    yield lambda: RuntimeError("peer closed connection"), "cannot be fetched"


@pytest.mark.parametrize(("error", "says"), list(_hub_errors()))
def test_what_the_hub_says_becomes_a_sentence(monkeypatch, error, says):
    def fails(*args, **kwargs):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(TwofoldError, match=re.escape(says)):
        load_checkpoint("org/name")


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        ("RepositoryNotFoundError", 404, "no such model on the hub"),
        ("GatedRepoError", 403, "accept terms"),
        ("HfHubHTTPError", 500, "the hub refuses"),
    ],
)
def test_what_the_hub_answers_becomes_a_sentence(monkeypatch, kind, status, says):
    from huggingface_hub import errors

    response = SimpleNamespace(status_code=status, headers={}, request=None, text="")

    def fails(*args, **kwargs):
        raise getattr(errors, kind)("the server's words", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(TwofoldError, match=says):
        load_checkpoint("org/name")


def test_what_is_here_is_listed(gguf, monkeypatch):
    """What cannot be loaded is not."""
    gguf.with_name("broken.gguf").write_bytes(gguf.read_bytes()[:1000])
    monkeypatch.setattr(hub, "cached_models", lambda: [("org/name", gguf.parent / "nothing"), ("org/same", gguf)])
    models = list_local_models()
    assert [(model["name"], model["path"]) for model in models] == [("small", str(gguf)), ("org/same", str(gguf))]
    assert isinstance(models[0]["config"], ModelConfig)
    assert models[0]["bytes"] == load_checkpoint(gguf).nbytes


def test_the_hubs_cache_is_looked_through(monkeypatch, tmp_path):
    """Of each model, the revision that was fetched last; data sets are no models."""

    def repo(name, kind, *times):
        revisions = [SimpleNamespace(last_modified=time, snapshot_path=tmp_path / str(time)) for time in times]
        return SimpleNamespace(repo_id=name, repo_type=kind, revisions=revisions)

    repos = [
        repo("b/two", "model", 3, 9, 5),
        repo("a/one", "model", 1),
        repo("c/data", "dataset", 2),
        repo("d/none", "model"),
    ]
    monkeypatch.setattr("huggingface_hub.scan_cache_dir", lambda: SimpleNamespace(repos=repos))
    assert hub.cached_models() == [("a/one", tmp_path / "1"), ("b/two", tmp_path / "9")]


def test_nothing_heavy_is_imported():
    """Neither torch nor transformers, ever; the hub, tokenizers and Jinja when they are needed."""
    script = "import sys, twofold.checkpoints; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "twofold.checkpoints" in modules
    assert not {"torch", "transformers", "huggingface_hub", "tokenizers", "jinja2", "gguf", "safetensors"} & {*modules}
