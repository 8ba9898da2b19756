"""What a plan of memory must hold: on lifetimes as such, and on a decoder that runs in the arena."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from reference import __all__ as OPS
from reference.memory.arena import ArenaPlan, PlannedBackend
from reference.memory.planner import Lifetime, MemoryPlan
from reference.model.decoder import Decoder

GARBAGE = 0xFF  # as a byte; every float that is made of it is NaN


def every_tensor_keeps_its_bytes(lifetimes: Sequence[Lifetime], plan: MemoryPlan) -> None:
    """Played through, op by op, each tensor marks its bytes when it is made, and finds them marked as long as it is
    wanted: by the ops in between, and by the op that reads it last, after that has written its own."""
    arena = np.full(plan.num_bytes, -1)
    place = [slice(offset, offset + tensor.num_bytes) for offset, tensor in zip(plan.offsets, lifetimes, strict=True)]
    for op in sorted({op for tensor in lifetimes for op in (tensor.first, tensor.last)}):
        made = [i for i, tensor in enumerate(lifetimes) if tensor.first == op]
        for i in made:
            arena[place[i]] = i
        for i, tensor in enumerate(lifetimes):
            if tensor.first <= op <= tensor.last:
                heirs = [new for new in made if lifetimes[new].over == i] if tensor.last == op else []
                found = set(arena[place[i]].tolist()) - {i}
                assert place[i].stop <= plan.num_bytes, f"tensor {i} reaches out of the arena"
                assert found <= set(heirs), f"op {op}: tensor {i} is wanted, and {found} have written to its bytes"


def a_plan_is_between_the_bound_and_the_total(lifetimes: Sequence[Lifetime], plan: MemoryPlan) -> None:
    """No arena is larger than all tensors together, nor smaller than what one op wants at once."""
    assert plan.bound <= plan.num_bytes <= plan.total
    ops = range(max((tensor.last for tensor in lifetimes), default=-1) + 1)
    live = [sum(t.num_bytes for t in lifetimes if t.first <= op <= t.last) for op in ops]
    most = max(live, default=0)
    in_place = any(tensor.over is not None for tensor in lifetimes)
    assert plan.bound <= most if in_place else plan.bound == most, f"the bound is {plan.bound}, an op wants {most}"


# ---- a decoder in the arena -------------------------------------------------------------------------------------


class Littered:
    """A planned backend that fills with garbage, before each op, whatever bytes of the arena nobody wants any more."""

    def __init__(self, planned: PlannedBackend):
        self.planned = planned
        self.plan: ArenaPlan | None = None
        self.arena: Any = None
        self.number = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.planned, name)
        if name not in OPS or name == "from_host":
            return found

        def op(*args: Any, **kwargs: Any) -> Any:
            if self.plan is not None:
                self._litter(self.plan)
            return found(*args, **kwargs)

        return op

    def _litter(self, plan: ArenaPlan) -> None:
        wanted = np.zeros(len(self.arena) + 1, bool)
        for lifetime, offset in zip(plan.lifetimes, plan.memory.offsets):
            if lifetime.first < self.number <= lifetime.last:
                wanted[offset : offset + lifetime.num_bytes] = True
        edges = np.flatnonzero(np.diff(wanted, prepend=True))
        for start, stop in zip(edges[::2], [*edges[1::2], len(self.arena)]):
            self.arena[int(start) : int(stop)] = GARBAGE
        self.number += 1

    def run(self, step: Any, plan: ArenaPlan, arena: Any) -> Any:
        """As `PlannedBackend.run`."""
        self.plan, self.arena, self.number = plan, arena, 0
        try:
            return self.planned.run(step, plan, arena)
        finally:
            self.plan = None


class ArenaDecoder(Decoder):
    """A decoder whose steps are computed twice: as ever and watched, then in an arena that is full of garbage, and so
    are the bytes of every activation as soon as nobody wants it. Both times bit for bit the same.

    Attributes:
        plans: Of its steps.
    """

    def __init__(self, *model: Any, backend: ModuleType | Any, **options: Any):
        self.littered = Littered(PlannedBackend(backend))
        self.plans: list[ArenaPlan] = []
        super().__init__(*model, backend=self.littered, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `Decoder.forward`."""

        def step() -> Any:
            return super(ArenaDecoder, self).forward(*args, **kwargs)

        logits, plan = self.littered.planned.record(step)
        expected = np.array(self.backend.to_host(logits))
        self.plans.append(plan)
        memory = self.backend.empty((plan.memory.num_bytes,), dtype="uint8")
        memory[:] = GARBAGE
        got = np.array(self.backend.to_host(self.littered.run(step, plan, memory)))
        same = got.dtype == expected.dtype and got.tobytes() == expected.tobytes()
        assert same, f"in the arena the logits are others: {np.abs(got - expected).max()} at most"
        every_tensor_keeps_its_bytes(plan.lifetimes, plan.memory)
        assert plan.memory.bound <= plan.memory.num_bytes <= plan.memory.total
        return logits
