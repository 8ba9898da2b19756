"""From what a user types to a checkpoint: a name, a folder, a file. And what is already here."""

import re
from pathlib import Path
from typing import Any

from twofold.bounded import shown
from twofold.checkpoints import fetch, hub
from twofold.checkpoints.checkpoint import Checkpoint
from twofold.checkpoints.gguf_model import load_gguf
from twofold.checkpoints.huggingface import PICKLES, load_folder, refuse_pickle
from twofold.errors import TwofoldError

LOOKS_LIKE_A_PATH = re.compile(r"^[./~\\]|^[A-Za-z]:[/\\]|\.(gguf|safetensors|json|bin|pt|pth|ckpt)$|/.*/|/$")


def load_checkpoint(name_or_path: str | Path | None = None, *, on_progress: fetch.Progress | None = None) -> Checkpoint:
    """The checkpoint of a model.

    Args:
        name_or_path: A folder with a ``config.json`` and ``.safetensors``, a ``.gguf`` file, a hub name (``org/name``),
            or None, "SmolLM2" or "SmolLM2-135M-Instruct" for the default model. What is not here yet is fetched.
        on_progress: Called with (what, bytes done, bytes in all or None) while something is fetched.

    Raises:
        TwofoldError: One sentence that says what is wrong and what to do.
    """
    return load_path(resolve_model(name_or_path, on_progress=on_progress))


def resolve_model(name_or_path: str | Path | None = None, *, on_progress: fetch.Progress | None = None) -> Path:
    """The folder or file of a model, fetched first if need be."""
    name = str(name_or_path or fetch.DEFAULT_MODEL)
    path = Path(name).expanduser()
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # too long, or with a null byte in it
        raise TwofoldError(f"{shown(name)}: no such model, folder or file") from None
    if name.lower() in fetch.ALIASES:
        return fetch.fetch_default_model(on_progress)
    if LOOKS_LIKE_A_PATH.search(name):
        raise TwofoldError(f"{shown(name)}: no such folder or file")
    if hub.NAME.fullmatch(name):
        return hub.download(name)
    raise TwofoldError(
        f"{shown(name)}: no such model; give a folder, a .gguf file, a hub name (org/name), or {fetch.DEFAULT_MODEL}"
    )


def load_path(path: Path, *, with_tokenizer: bool = True) -> Checkpoint:
    """The checkpoint in a folder or a file, by what it is."""
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").exists():
            if len(ggufs) > 1:
                raise TwofoldError(
                    f"{path}: several models; name one: {', '.join(shown(file.name) for file in ggufs[:5])}"
                )
            return load_gguf(ggufs[0], with_tokenizer=with_tokenizer)
        return load_folder(path, with_tokenizer=with_tokenizer)
    if path.suffix.lower() in PICKLES:
        raise refuse_pickle(path)
    if path.suffix.lower() == ".safetensors":
        raise TwofoldError(f"{path}: weights alone; give the folder that also has their config.json")
    return load_gguf(path, with_tokenizer=with_tokenizer)


def list_local_models() -> list[dict[str, Any]]:
    """The models that are here and can be run: ``name``, ``path``, ``bytes`` and ``config`` of each.

    Those in Twofold's own cache, then those in the hub's. What cannot be loaded is left out.
    """
    own = [(file.stem, file) for file in sorted(fetch.default_model_path().parent.glob("*.gguf"))]
    own = [(fetch.DEFAULT_MODEL if file == fetch.default_model_path() else name, file) for name, file in own]
    found = []
    for name, path in [*own, *hub.cached_models()]:
        try:
            checkpoint = load_path(path, with_tokenizer=False)
        except TwofoldError:
            continue
        found.append({"name": name, "path": str(path), "bytes": checkpoint.nbytes, "config": checkpoint.config})
    return found
