"""What a GPU has room for, and the arena in which recorded steps compute."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reference.memory.arena import ArenaPlan, PlannedBackend


def room(device: str | None, share: float) -> int:
    """Bytes of a GPU (None: the current one) that are free now, if this program is to leave all but ``share`` of it."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what torch holds and nobody uses is free
    free, total = torch.cuda.mem_get_info(device)
    return round(free - (1 - share) * total)


class Arena:
    """Bytes for the activations of recorded steps. All use the same ones, for they run one after another.

    A step that needs more than those before it gets new ones, and those before it keep theirs: their addresses are
    recorded. Each time there are twice as many, so that all together are no more than twice the last.
    """

    def __init__(self, device: torch.device):
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def at_least(self, num_bytes: int) -> Tensor:
        """The bytes."""
        if len(self._memory) < num_bytes:
            size = max(num_bytes, 2 * len(self._memory))
            self._memory = torch.empty(size, dtype=torch.uint8, device=self._memory.device)
        return self._memory


class InArena:
    """A step's computation, which is watched when it is called for the first time, and from then on is in the arena.

    Args:
        compute: From the step's tensors, of the same shapes every time, to its results.
        backend: Whose ops it calls.
    """

    def __init__(self, compute: Callable[[Any], Any], backend: PlannedBackend, arena: Arena):
        self._compute, self._backend, self._arena = compute, backend, arena
        self._planned: tuple[ArenaPlan, Tensor] | None = None

    def __call__(self, inputs: Any) -> Any:
        if self._planned is not None:
            return self._backend.run(lambda: self._compute(inputs), *self._planned)
        results, plan = self._backend.record(lambda: self._compute(inputs))
        self._planned = plan, self._arena.at_least(plan.memory.num_bytes)
        return results
