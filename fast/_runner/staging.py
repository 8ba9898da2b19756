"""Host arrays to the device, and results back, through pinned memory: nobody waits, whichever side is busy.

A step's inputs are a dozen small arrays. They are laid end to end in one buffer, so that a single copy brings them all.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: what the widest load of a kernel asks for


@dataclass(frozen=True)
class Column:
    """An array's place in a buffer."""

    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.dtype.itemsize * math.prod(self.shape)


class Layout:
    """Where several arrays lie in one buffer of bytes.

    Example:
        >>> layout = Layout({"ids": (np.int32, (3,)), "seeds": (np.int64, (2, 1))})
        >>> layout.num_bytes, layout.columns["seeds"].start
        (32, 16)
    """

    def __init__(self, arrays: Mapping[str, tuple[Any, tuple[int, ...]]]):
        self.columns: dict[str, Column] = {}
        start = 0
        for name, (dtype, shape) in arrays.items():
            self.columns[name] = column = Column(start, np.dtype(dtype), shape)
            start = -(-column.stop // ALIGNMENT) * ALIGNMENT
        self.num_bytes = start

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of ``buffer``, which has ``num_bytes`` bytes."""
        return {
            name: buffer[c.start : c.stop].view(getattr(torch, c.dtype.name)).view(c.shape)
            for name, c in self.columns.items()
        }

    def arrays(self, buffer: Tensor) -> dict[str, np.ndarray]:
        """The same of a buffer on the host, as NumPy sees it (which makes a view several times as fast)."""
        host = buffer.numpy()
        return {name: host[c.start : c.stop].view(c.dtype).reshape(c.shape) for name, c in self.columns.items()}


def host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Zeros on the host; pinned if the device is a GPU. Torch reuses one only when all copies from it have ended."""
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy that is under way when this returns; what is queued on the stream afterwards finds it done."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Bus:
    """Copies between the device and the host on a stream of their own, while the current stream computes.

    They go one after another, so that what comes back has arrived on the host before. Without a GPU they are copies
    like others. (Memory that is let go while a copy is under way waits for it: device memory since it is recorded
    here, pinned memory since torch does so.)
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def on_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for what is sent."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def send(self, x: Tensor, host: Tensor) -> None:
        """What the current stream has made of ``x`` when it comes here, to the host: nobody waits."""
        if self._stream is None:
            host.copy_(x)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self._stream)

    def fetch(self, host: Tensor, rows: Sequence[int]) -> Tensor:
        """These rows on the device: what is queued on the current stream from now on finds them there."""
        if self._stream is None:
            return host[list(rows)].to(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):  # memory of this stream: to be filled while the other is busy
            x = torch.empty(len(rows), *host.shape[1:], dtype=host.dtype, device=self._device)
            for place, first, count in runs(rows):
                x[place : place + count].copy_(host[first : first + count], non_blocking=True)
        current.wait_stream(self._stream)
        x.record_stream(current)
        return x


def runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of rows that follow one another: the place of each in ``rows``, its first row, and how many.

    Example:
        >>> list(runs([4, 5, 6, 2, 1]))
        [(0, 4, 3), (3, 2, 1), (4, 1, 1)]
    """
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield start, rows[start], place - start
            start = place


def stamp(device: torch.device) -> torch.cuda.Event | None:
    """A mark at this place of the stream; None without a GPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Readback:
    """Tensors on their way to the host.

    Args:
        tensors: Those wanted, by name. They may be overwritten afterwards by whatever the stream does next.
        start: Marks where their computation began; None without a GPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, start: torch.cuda.Event | None):
        self._tensors = {}
        for name, tensor in tensors.items():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._tensors[name] = host.copy_(tensor, non_blocking=True)
        self._start, self._end = start, stamp(device)

    def wait(self) -> dict[str, np.ndarray]:
        """Wait until they have come."""
        if self._end is not None:
            self._end.synchronize()
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}

    @property
    def seconds(self) -> float | None:
        """From the start until they had come, on the device; None without a GPU."""
        if self._start is None or self._end is None:
            return None
        return self._start.elapsed_time(self._end) / 1e3
