"""What a benchmark of kernels consists of: rows, the peers beside them, and the figures to reach."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

Call = Callable[[], Any]
Arrays = SimpleNamespace  # one set of buffers, by name
Contender = Callable[[Any, Arrays], Call]  # (backend, buffers) to a call that is ready to run: no setup is timed


@dataclass(frozen=True)
class Target:
    """A figure to reach: how many times faster than the fastest of ``over`` that ran.

    ``over`` may name peers, or "copy": then the figure is the share of the machine's copy bandwidth. ``of`` names the
    contender that is judged where it is not the backend's own choice.
    """

    at_least: float
    reach_for: float | None
    over: tuple[str, ...]
    of: str | None = None

    @property
    def says(self) -> str:
        return f"{self.at_least:g} × {' / '.join(self.over)}" + (f" by {self.of}" if self.of else "")


@dataclass(frozen=True)
class Row:
    """One op on one deck.

    Attributes:
        op: A name of the interface; ``--only`` selects by it.
        deck: Shapes and dtypes, for the reader.
        build: Makes one set of buffers. It is called until the sets together do not fit a cache.
        ours: The backend's call on a set.
        peers: What else does the same work, by name. A peer that cannot run is left out and says why.
        num_bytes: Read and written at the least, as stored, of one set.
        flops: Of the matrix products; 0 where there are none.
        targets: Figures to reach.
        quick: Whether ``--quick`` measures it.
    """

    op: str
    deck: str
    build: Callable[[], Arrays]
    ours: Contender
    num_bytes: Callable[[Arrays], int]
    flops: float = 0.0
    peers: Mapping[str, Contender] = field(default_factory=dict)
    targets: Sequence[Target] = ()
    quick: bool = True


def size(*arrays: torch.Tensor) -> int:
    """Bytes that these hold."""
    return sum(array.numel() * array.itemsize for array in arrays)


def default_device() -> torch.device:
    """The one that `torch.device` in a ``with`` has set: the GPU when measuring."""
    return torch.get_default_device()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float32).mul_(scale).to(dtype)


def integers(low: int, high: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, tuple(shape), dtype=torch.int64).to(dtype)


def int32(values: Sequence[int] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32).to(default_device())
