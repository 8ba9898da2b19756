"""Checkpoints: GGUF files and Hugging Face folders, read within bounds; the default model, fetched once."""

from twofold.checkpoints.checkpoint import Checkpoint
from twofold.checkpoints.dummy import RandomTensors, dummy_checkpoint
from twofold.checkpoints.fetch import DEFAULT_MODEL, fetch_default_model
from twofold.checkpoints.local import list_local_models, load_checkpoint, resolve_model

__all__ = [
    "DEFAULT_MODEL",
    "Checkpoint",
    "RandomTensors",
    "dummy_checkpoint",
    "fetch_default_model",
    "list_local_models",
    "load_checkpoint",
    "resolve_model",
]
