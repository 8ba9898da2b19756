"""A Hugging Face folder: config.json, one or many .safetensors, tokenizer.json, a chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reference.model.config import ModelConfig
from twofold.bounded import MAX_BYTES, read_bytes, read_json_object, shown
from twofold.checkpoints.checkpoint import Checkpoint, check_tensors
from twofold.checkpoints.safetensors import SafetensorsFile
from twofold.errors import TwofoldError
from twofold.tokenizer import Tokenizer

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
MAX_FILES = 1024
MAX_TEMPLATE_BYTES = 1 << 20
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError)  # what a config of odd types may cause


def load_folder(path: Path, *, with_tokenizer: bool = True) -> Checkpoint:
    """The checkpoint in a folder. Raises ``TwofoldError`` saying what is wrong with it."""
    if not (path / "config.json").exists():
        adapter = (path / "adapter_config.json").exists()
        what = "a LoRA adapter, not a model (see --lora-modules)" if adapter else "not a model folder (no config.json)"
        raise TwofoldError(f"{path}: {what}")
    config = read_config(path)
    files = weight_files(path)
    holder = _holders(files)
    stored = {name: file.tensors[name] for name, file in holder.items()}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    check_tensors(config, shapes, path)

    def read(name: str, as_is: bool) -> np.ndarray:
        return holder[name].read(name)

    tokenizer, no_tokenizer = read_tokenizer(path) if with_tokenizer else (None, "its tokenizer was not asked for")
    return Checkpoint(
        name=path.name,
        path=path,
        files=tuple(files),
        config=config,
        shapes=shapes,
        stored_as={name: tensor.dtype for name, tensor in stored.items()},
        nbytes=sum(tensor.nbytes for tensor in stored.values()),
        read=read,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        eos_token_ids=read_eos_token_ids(path, config),
    )


def _holders(paths: list[Path]) -> dict[str, SafetensorsFile]:
    """Which file holds each tensor."""
    holder: dict[str, SafetensorsFile] = {}
    header_bytes = 0
    for path in paths:
        file = SafetensorsFile(path)
        header_bytes += file.header_bytes
        if header_bytes > MAX_BYTES:
            raise TwofoldError(f"{path}: headers of more than {MAX_BYTES:,} bytes in all")
        for name in file.tensors:
            if name in holder:
                raise TwofoldError(f"{path}: tensor {shown(name)} is in {holder[name].path.name} and {path.name}")
            holder[name] = file
    return holder


def weight_files(path: Path) -> list[Path]:
    """The folder's .safetensors: those its index names, or the one there is. Pickle files run code and are refused."""
    if (path / INDEX).exists():
        return _indexed_files(path)
    found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if path / "model.safetensors" in found:
        return [path / "model.safetensors"]
    if len(found) == 1 or (found and all("-of-" in file.name for file in found)):
        return found
    if found:
        raise TwofoldError(f"{path}: {len(found)} .safetensors files, none of them model.safetensors, and no {INDEX}")
    pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
    if pickles:
        raise refuse_pickle(path / pickles[0])
    raise TwofoldError(f"{path}: no weights (*.safetensors)")


def refuse_pickle(path: Path) -> TwofoldError:
    return TwofoldError(
        f"{path}: a pickle file, which can run any code when it is opened; use the model's .safetensors or .gguf"
    )


def _indexed_files(path: Path) -> list[Path]:
    index = read_json_object(path / INDEX)
    named = index.get("weight_map")
    if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named.values()):
        raise TwofoldError(f"{path / INDEX}: weight_map is not a map from tensors to files")
    names = sorted(set(named.values()))
    if len(names) > MAX_FILES:
        raise TwofoldError(f"{path / INDEX}: names {len(names):,} files, more than any checkpoint has")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise TwofoldError(f"{path / INDEX}: {shown(name)} is not the name of a .safetensors file in this folder")
        if not (path / name).exists():
            raise TwofoldError(f"{path / name}: missing, though {INDEX} names it")
    return [path / name for name in names]


def read_config(path: Path) -> ModelConfig:
    config = read_json_object(path / "config.json")
    try:
        return ModelConfig.from_hf(config)
    except MALFORMED as error:
        raise TwofoldError(f"{path / 'config.json'}: {str(error).removeprefix('ModelConfig: ')}") from None


def read_eos_token_ids(path: Path, config: ModelConfig) -> tuple[int, ...]:
    """What ends a text by the config, and what ends an answer by the generation config."""
    file = path / "generation_config.json"
    more = read_json_object(file).get("eos_token_id") if file.exists() else None
    more = more if isinstance(more, list) else [] if more is None else [more]
    if not all(type(i) is int and 0 <= i < config.vocab_size for i in more):
        raise TwofoldError(f"{file}: eos_token_id: expected token ids below {config.vocab_size}, got {shown(more)}")
    return tuple(dict.fromkeys([*config.eos_token_ids, *more]))


def read_tokenizer(path: Path) -> tuple[Tokenizer | None, str]:
    if not (path / "tokenizer.json").exists():
        old = " (only a tokenizer.model, which is not read)" if (path / "tokenizer.model").exists() else ""
        return None, f"the folder has no tokenizer.json{old}"
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).exists():
            settings |= read_json_object(path / name)
    special_tokens = {role: text for role in ROLES if (text := _text(settings.get(role))) is not None}
    tokenizer = Tokenizer.from_file(
        path / "tokenizer.json",
        special_tokens=special_tokens,
        chat_template=_chat_template(path, settings),
    )
    return tokenizer, ""


def _text(token: Any) -> str | None:
    """A special token is written as its text, or as an object with its text and how it is matched."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """A file of its own, or in the tokenizer's config: one template, or several with names."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return read_bytes(file, MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError:
            raise TwofoldError(f"{file}: not UTF-8 text") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
