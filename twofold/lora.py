"""LoRA adapters from disk: a folder as `peft` saves it."""

from pathlib import Path
from typing import Any

from twofold.bounded import read_json_object
from twofold.checkpoints.safetensors import SafetensorsFile
from twofold.errors import TwofoldError


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, config) of the adapter in the folder ``path``.

    Raises:
        TwofoldError: If the folder lacks ``adapter_config.json`` or ``adapter_model.safetensors``, or one is broken.
    """
    folder = Path(path)
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file():
        raise TwofoldError(f"LoRA adapter {folder}: no adapter_config.json there")
    if not weights_file.is_file():
        pickled = " (pickle files are not read)" if (folder / "adapter_model.bin").exists() else ""
        raise TwofoldError(f"LoRA adapter {folder}: no adapter_model.safetensors there{pickled}")
    file = SafetensorsFile(weights_file)
    return {name: file.read(name) for name in file.tensors}, read_json_object(config_file)
