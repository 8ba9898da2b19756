"""GGUF: one file with a model's metadata (tokenizer and chat template included) and its tensors.

    magic, version, number of tensors, number of metadata entries
    metadata:  key, type, value            values: numbers, strings, arrays of either, arrays of arrays
    tensors:   name, shape, type, offset   offsets count from the end of this table, aligned
    the tensors' bytes

Every count and length in it is a claim by a stranger. None is believed before it is compared with the bytes that are
left, every string and array counts against a budget, and nesting has a limit: so a hostile file costs a moment.

Source: docs/gguf.md of ggml-org/ggml.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from twofold.bounded import cannot_read, file_size, shown
from twofold.checkpoints.gguf_blocks import BLOCK_TYPES, BlockType
from twofold.errors import TwofoldError

MAX_METADATA_BYTES = 64 << 20  # five times the largest vocabulary known
MAX_OBJECTS = 3 << 18  # strings in a file; an array counts as many
ARRAY_COST = 16
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 15
MAX_NESTING = 3
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 16

NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
BOOL, STRING, ARRAY = 7, 8, 9
OTHER_TYPES = {  # ggml's numbers of types that are not read, to name them
    9: "Q8_1", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in its file. ``shape`` is NumPy's: rows first (the file says it the other way round)."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """One file: ``metadata`` by key, ``tensors`` by name, both checked; and each tensor's bytes, when asked for.

    Numbers are Python's, strings ``str``, arrays of strings lists and arrays of numbers NumPy's.

    Raises:
        TwofoldError: If the file is not GGUF, is cut short, or contradicts itself.
    """

    def __init__(self, path: Path):
        self.path = path
        size = file_size(path)
        try:
            with path.open("rb") as file:
                reader = _Reader(file, size, str(path))
                num_tensors, num_entries = _read_preamble(reader)
                self.metadata = _read_metadata(reader, num_entries)
                self.tensors = _read_tensor_table(reader, num_tensors, self.metadata)
        except OSError as error:
            raise cannot_read(path, error) from None

    def read(self, name: str) -> np.ndarray:
        """The tensor's stored bytes, one row of bytes for each row of weights."""
        tensor = self.tensors[name]
        try:
            stored = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.offset)
        except OSError as error:
            raise cannot_read(self.path, error) from None
        if len(stored) < tensor.nbytes:
            raise TwofoldError(f"{self.path}: truncated while it was read, in tensor {shown(name)}")
        return stored.reshape(*tensor.shape[:-1], tensor.type.row_bytes(tensor.shape[-1]))


def scalars(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are one number, flag or string: an array compares with nothing."""
    return {key: value for key, value in metadata.items() if isinstance(value, (bool, int, float, str))}


class _Reader:
    """Takes bytes off the front of a file; never more than there are."""

    def __init__(self, file: BinaryIO, size: int, path: str):
        self.file, self.size, self.path = file, size, path
        self.position, self.limit = 0, min(size, MAX_METADATA_BYTES)
        self.objects_left = MAX_OBJECTS
        self.reading = "its header"  # named when something is wrong

    @property
    def left(self) -> int:
        return self.size - self.position

    def wrong(self, what: str) -> TwofoldError:
        return TwofoldError(f"{self.path}: {what}, in {self.reading}")

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self.limit:
            raise self.wrong(
                "truncated or corrupt: it ends, or points past its end"
                if end > self.size
                else f"more than the {MAX_METADATA_BYTES:,} bytes of metadata that are read"
            )
        self.position = end
        taken = self.file.read(count)
        if len(taken) < count:
            raise self.wrong("truncated while it was read")
        return taken

    def number(self, format: str) -> Any:
        return struct.unpack("<" + format, self.take(struct.calcsize(format)))[0]

    def spend(self, objects: int) -> None:
        self.objects_left -= objects
        if self.objects_left < 0:
            raise self.wrong(f"more than the {MAX_OBJECTS:,} strings that are read")

    def string(self) -> str:
        length = int.from_bytes(self.take(8), "little")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.wrong("a string that is not UTF-8") from None

    def value(self, type: int, nesting: int = 0) -> Any:
        if type == ARRAY:
            return self.array(nesting)
        if type in NUMBERS:
            return self.numbers(type, 1)[0].item()
        if type != STRING:
            raise self.wrong(f"unknown type of value {type}")
        return self.string()

    def array(self, nesting: int) -> Any:
        """All that it will make is paid for before it is made."""
        if nesting == MAX_NESTING:
            raise self.wrong(f"arrays nested more than {MAX_NESTING} deep")
        type, count = self.number("I"), self.number("Q")
        if type in NUMBERS:
            return self.numbers(type, count)
        smallest, cost = (8, 1) if type == STRING else (12, ARRAY_COST)  # bytes of an empty string or array
        if count * smallest > self.left:
            raise self.wrong(f"truncated or corrupt: an array of {count:,} that its bytes cannot hold")
        self.spend(count * cost)
        return [self.value(type, nesting + 1) for _ in range(count)]

    def numbers(self, type: int, count: int) -> np.ndarray:
        dtype = np.dtype(NUMBERS[type])
        stored = self.take(count * dtype.itemsize)
        return np.frombuffer(stored, "u1") != 0 if type == BOOL else np.frombuffer(stored, dtype)


def _read_preamble(reader: _Reader) -> tuple[int, int]:
    """(number of tensors, number of metadata entries)."""
    if reader.left < 24 or reader.take(4) != b"GGUF":
        raise TwofoldError(f"{reader.path}: not a GGUF file")
    version = reader.number("I")
    if version not in (2, 3):
        known = "big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
        raise TwofoldError(f"{reader.path}: a {known} GGUF; versions 2 and 3, little-endian, are read")
    num_tensors, num_entries = reader.number("Q"), reader.number("Q")
    for what, count, most in (("tensors", num_tensors, MAX_TENSORS), ("metadata entries", num_entries, MAX_ENTRIES)):
        if count > most:
            raise reader.wrong(f"corrupt: it claims {count:,} {what}; at most {most:,} are read")
    return num_tensors, num_entries


def _read_metadata(reader: _Reader, num_entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(num_entries):
        reader.reading = f"metadata entry {index}"
        key = reader.string()
        reader.reading = f"metadata {shown(key)}"
        if key in metadata:
            raise reader.wrong("a key given twice")
        metadata[key] = reader.value(reader.number("I"))
    return metadata


def _read_tensor_table(reader: _Reader, num_tensors: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for index in range(num_tensors):
        reader.reading = f"tensor {index}"
        tensor = _read_tensor_entry(reader)
        if tensor.name in tensors:
            raise reader.wrong("a name given twice")
        tensors[tensor.name] = tensor
    reader.reading = "its tensors"
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise reader.wrong(f"general.alignment is {shown(alignment)}, not a power of two")
    return _place(reader, tensors, alignment)


def _read_tensor_entry(reader: _Reader) -> GGUFTensor:
    """Name, shape, type and offset, the offset still counted from the table's end."""
    name = reader.string()
    reader.reading = f"tensor {shown(name)}"
    num_dims = reader.number("I")
    if not 1 <= num_dims <= MAX_DIMS:
        raise reader.wrong(f"{num_dims} dimensions")
    shape = struct.unpack(f"<{num_dims}Q", reader.take(8 * num_dims))[::-1]
    number, offset = reader.number("I"), reader.number("Q")
    stored_as = BLOCK_TYPES.get(number)
    if stored_as is None:
        known = ", ".join(block_type.name for block_type in BLOCK_TYPES.values())
        raise reader.wrong(f"type {OTHER_TYPES.get(number, number)}, which is not read (those that are: {known})")
    if min(shape) == 0 or shape[-1] % stored_as.block_size:
        raise reader.wrong(f"shape {shape} does not go with {stored_as.name}, in blocks of {stored_as.block_size}")
    return GGUFTensor(name, stored_as, shape, offset, math.prod(shape[:-1]) * stored_as.row_bytes(shape[-1]))


def _place(reader: _Reader, tensors: dict[str, GGUFTensor], alignment: int) -> dict[str, GGUFTensor]:
    """The tensors with offsets from the file's start: aligned, inside the file, none over another."""
    start = -(-reader.position // alignment) * alignment
    end, before = start, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        reader.reading = f"tensor {shown(tensor.name)}"
        if tensor.offset % alignment:
            raise reader.wrong(f"an offset that is not a multiple of {alignment}")
        offset = start + tensor.offset
        if offset + tensor.nbytes > reader.size:
            missing = offset + tensor.nbytes - reader.size
            raise reader.wrong(f"truncated or corrupt: it ends {missing:,} bytes past the file")
        if offset < end:
            raise reader.wrong(f"its bytes overlap those of {shown(before)}")
        end, before = offset + tensor.nbytes, tensor.name
        tensors[tensor.name] = GGUFTensor(tensor.name, tensor.type, tensor.shape, offset, tensor.nbytes)
    return tensors
