"""Safetensors: a header of JSON that says where each tensor lies, then the tensors, end to end.

The header is checked here, in full, before anything is read by what it says: every tensor must be as long as its
shape and type make it, begin where the one before it ends, and the last must end with the file.
A tensor is a stretch of the file, mapped into memory: nothing is copied before it is placed where it belongs, and
nothing stays mapped afterwards.

Source: the format's description in the README of huggingface/safetensors.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from twofold.bounded import MAX_BYTES, cannot_read, file_size, parse_json, shown
from twofold.errors import TwofoldError

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
MAX_DIMS = 8


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its type by the format's name, its shape, and its bytes counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """One file: its tensors by name, checked; and each tensor, when asked for.

    Raises:
        TwofoldError: If the file is not safetensors, is cut short, or its header contradicts itself or the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors, self.header_bytes = _read_header(path)

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the type it is stored in (bf16 as ``ml_dtypes.bfloat16``), mapped: pages come when touched."""
        stored = self.tensors[name]
        if stored.dtype not in FLOATS:
            raise TwofoldError(
                f"{self.path}: {name} is stored as {stored.dtype}; Twofold reads float checkpoints "
                f"({', '.join(FLOATS)}) and quantized ones as GGUF"
            )
        dtype, begin = FLOATS[stored.dtype], 8 + self.header_bytes + stored.begin
        if not stored.nbytes:
            return np.empty(stored.shape, dtype)
        try:
            tensor = np.asarray(np.memmap(self.path, dtype, "c", begin, stored.shape))
        except (OSError, ValueError) as error:  # it has become shorter, or was taken away
            raise TwofoldError(f"{self.path}: cannot be read ({error})") from None
        return tensor if tensor.flags.aligned else tensor.copy()


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], int]:
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise TwofoldError(f"{path}: truncated, or not a safetensors file (its header would not fit in it)")
            if length > MAX_BYTES:
                raise TwofoldError(f"{path}: a header of {length:,} bytes, more than the {MAX_BYTES:,} that are read")
            text = file.read(length)
    except OSError as error:
        raise cannot_read(path, error) from None
    if text[:1] != b"{":
        raise TwofoldError(f"{path}: not a safetensors file (its header is not a JSON object)")
    entries = parse_json(text, f"{path}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TwofoldError(f"{path}: header: __metadata__ is not a map of strings")
    tensors = {name: _stored_tensor(entry, f"{path}: {shown(name)}") for name, entry in entries.items()}
    _check_layout(path, tensors, size - 8 - length)
    return tensors, length


def _stored_tensor(entry: Any, where: str) -> StoredTensor:
    """One entry of the header, its bytes agreeing with its shape. Python's integers do not overflow."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TwofoldError(f"{where}: its entry is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise TwofoldError(f"{where}: unknown dtype {shown(dtype)!r}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise TwofoldError(f"{where}: its shape is not a list of at most {MAX_DIMS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise TwofoldError(f"{where}: its data_offsets are not two positions")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise TwofoldError(
            f"{where}: {dtype} of shape {shape} takes {expected:,} bytes, its data_offsets are {offsets}"
        )
    return StoredTensor(dtype, tuple(shape), *offsets)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(path: Path, tensors: dict[str, StoredTensor], data_bytes: int) -> None:
    """Tensors follow each other without overlap or hole, up to the end of the file."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.end > data_bytes:
            raise TwofoldError(f"{path}: truncated: {shown(name)} ends {tensor.end - data_bytes:,} bytes past its end")
        if tensor.begin != end:
            what = "overlaps the tensor before it" if tensor.begin < end else "leaves a hole before it"
            raise TwofoldError(f"{path}: {shown(name)} {what}")
        end = tensor.end
    if end != data_bytes:
        raise TwofoldError(f"{path}: {data_bytes - end:,} bytes after its last tensor belong to none")
