"""A step's activations in one arena: a backend that notes what a step makes and reads, and then says where it goes.

Which tensors a step makes, and when each is read for the last time, is the same whenever the step has the same shape.
So it need not be written down by hand, model by model: run the step once and watch. A decoder touches its backend's
arrays through ops, reshapes and slices alone; so whoever stands between the two sees everything::

    backend = PlannedBackend(reference)                      # a backend like any other
    decoder = Decoder(config, tensors, backend=backend)
    logits, plan = backend.record(lambda: decoder.forward(...))          # runs as ever, and is watched
    arena = backend.empty((plan.memory.num_bytes,), dtype="uint8")
    logits = backend.run(lambda: decoder.forward(...), plan, arena)      # the same ops; their results in the arena

The decoder knows nothing of it. Each op that takes an ``out``, and was not given one, is given its place in the arena.
The places are fixed: a CUDA graph, which repeats addresses, can be captured around `run`, and steps of other shapes,
which run at other times, can use the same arena.

Which array a tensor is seen in, whole or as a slice, is told by its address. An address says who it is only as long as
the tensor is wanted; when its bytes are found in use by a newer one, it is forgotten.

Not here: what an op needs inside (a normed row, the partial results of a split); results of ops that take no ``out``
(`cast`'s, and `rotary`'s, which quantized caches need: they are counted); the cache; a step's inputs.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from reference import __all__ as OPS
from reference._checks import require
from reference.memory.planner import Lifetime, MemoryPlan, plan_memory

T = TypeVar("T")

IN_PLACE = {
    "add_rms_norm": {"out": "x", "residual_out": "residual"},
    "filter_logits": {"out": "logits"},
    "linear_add": {"out": "residual"},
    "linear_fp8": {"out": "residual"},
    "linear_fp8_fp8": {"out": "residual"},
    "linear_int4": {"out": "residual"},
    "linear_int8": {"out": "residual"},
    "linear_int8_int8": {"out": "residual"},
    "lora": {"out": "base"},
    "penalize": {"out": "logits"},
    "rms_norm": {"out": "x"},
    "rotary_write_kv": {"out": "q"},
    "round_to": {"out": "x"},
    "sparse_linear": {"out": "residual"},
    "swiglu_linear_add": {"out": "residual"},
}
"""The arguments that ops say they may write their results over."""


class Activation(NamedTuple):
    """A tensor that a step makes.

    Attributes:
        op: The op that makes it, by its number in the step.
        parameter: By which the op is told where to put it.
    """

    op: int
    parameter: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ArenaPlan:
    """What a step does with memory, and where everything goes.

    Attributes:
        ops: The step's ops, in order.
        activations: What they make, in order.
        lifetimes, memory: Of the activations.
        elsewhere: Bytes of results that no op can be told a place for.
    """

    ops: tuple[str, ...]
    activations: tuple[Activation, ...]
    lifetimes: tuple[Lifetime, ...]
    memory: MemoryPlan
    elsewhere: int


class PlannedBackend:
    """Another backend's ops, whose results go where a plan says. Without a plan, as ever.

    Example:
        >>> import reference
        >>> backend = PlannedBackend(reference)
        >>> x, norm = np.ones((4, 64), np.float32), np.ones(64, np.float32)
        >>> def step():
        ...     y = backend.swiglu(backend.rms_norm(x, norm, eps=1e-6))
        ...     return backend.rms_norm(y, norm[:32], eps=1e-6)     # over y, which nobody reads any more
        >>> expected, plan = backend.record(step)
        >>> plan.memory.offsets, plan.memory.num_bytes, plan.memory.total
        ((0, 1024, 1024), 1536, 2048)
        >>> arena = backend.empty((plan.memory.num_bytes,), dtype="uint8")
        >>> bool((backend.run(step, plan, arena) == expected).all())
        True
    """

    def __init__(self, backend: ModuleType | Any):
        self._base = backend
        self._watcher: _Recorder | _Director | None = None

    def __getattr__(self, name: str) -> Any:  # only what is asked for the first time comes here
        found = getattr(self._base, name)
        if name in OPS and name != "from_host":  # what comes from the host is nobody's activation, and may come once
            found = self._watched(name, found)
            setattr(self, name, found)
        return found

    def _watched(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(op)
        def call(*args: Any, **kwargs: Any) -> Any:
            return op(*args, **kwargs) if self._watcher is None else self._watcher(name, op, args, kwargs)

        return call

    def record(self, step: Callable[[], T]) -> tuple[T, ArenaPlan]:
        """Run a step as it is; its results, and the plan for all steps like it.

        Args:
            step: Calls this backend's ops. The arrays that it returns (in lists, tuples and dicts too) are wanted to
                its end.
        """
        recorder = _Recorder()
        result = self._watch(step, recorder)
        return result, recorder.plan(result)

    def run(self, step: Callable[[], T], plan: ArenaPlan, arena: Any) -> T:
        """Run a step with its activations in the arena.

        Args:
            step: Like the one that was recorded: the same ops on arrays of the same shapes.
            arena: Bytes, at least ``plan.memory.num_bytes``. What they held is lost.

        Returns:
            What the step returns: in the arena, so until the next step that uses it.

        Raises:
            ValueError: If the step has other ops, or one gives another shape.
        """
        director = _Director(plan, self._base, arena)
        result = self._watch(step, director)
        director.finish()
        return result

    def _watch(self, step: Callable[[], T], watcher: "_Recorder | _Director") -> T:
        self._watcher = watcher
        try:
            return step()
        finally:
            self._watcher = None


class _Recorder:
    """Runs ops as they are, and notes what they make and read."""

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.activations: list[Activation] = []
        self.lifetimes: list[Lifetime] = []
        self.elsewhere = 0
        self.regions: dict[int, range] = {}  # of each activation that is not forgotten, the addresses

    def __call__(self, name: str, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.ops.append(name)
        result = op(*args, **kwargs)
        arguments = inspect.signature(op).bind(*args, **kwargs).arguments
        given = [*_arrays([*arguments.values()])]
        self._read(given)
        new = [x for x in _arrays(result) if _address(x) not in map(_address, given)]
        outputs = _outputs(name, op)
        if not outputs:
            self.elsewhere += sum(array.nbytes for array in new)
        for parameter, array in zip(outputs, result if isinstance(result, tuple) else (result,)):
            if any(array is x for x in new):
                self._make(parameter, array, arguments.get(IN_PLACE.get(name, {}).get(parameter, "")))
        return result

    def _read(self, arrays: list[Any]) -> None:
        for array in arrays:
            which = self._activation(array)
            if which is not None:
                self.lifetimes[which] = self.lifetimes[which]._replace(last=len(self.ops) - 1)

    def _make(self, parameter: str, array: Any, over: Any) -> None:
        start, place = _address(array), len(self.activations)
        region = range(start, start + array.nbytes)
        older = None if over is None else self._activation(over)
        same = older is not None and self._shape(over) == self._shape(array) == self.activations[older][2:]
        self.regions = {i: r for i, r in self.regions.items() if r.stop <= region.start or region.stop <= r.start}
        self.regions[place] = region
        number = len(self.ops) - 1
        self.activations.append(Activation(number, parameter, *self._shape(array)))
        self.lifetimes.append(Lifetime(array.nbytes, number, number, older if same else None))

    def _activation(self, array: Any) -> int | None:
        """Which one the array is, or is a slice of."""
        return next((which for which, region in self.regions.items() if _address(array) in region), None)

    def _shape(self, array: Any) -> tuple[tuple[int, ...], str]:
        return tuple(array.shape), str(array.dtype).removeprefix("torch.")

    def plan(self, result: Any) -> ArenaPlan:
        """The plan of what was seen. The step's results are wanted to its end."""
        self._read([*_arrays(result)])
        noted = tuple(self.ops), tuple(self.activations), tuple(self.lifetimes)
        return ArenaPlan(*noted, plan_memory(self.lifetimes), self.elsewhere)


class _Director:
    """Runs ops with their results in the arena."""

    def __init__(self, plan: ArenaPlan, backend: Any, arena: Any):
        need = plan.memory.num_bytes
        require(len(arena) >= need, "PlannedBackend.run", "arena", f"at least {need} bytes", len(arena))
        self.plan, self.backend, self.arena = plan, backend, arena
        self.number = 0
        self.placed = zip(plan.activations, plan.lifetimes, plan.memory.offsets)
        self.next = next(self.placed, None)

    def __call__(self, name: str, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        expected = self.plan.ops[self.number] if self.number < len(self.plan.ops) else "the end"
        require(name == expected, "PlannedBackend.run", "step", f"{expected} as its op {self.number}", name)
        places = self._places()
        self.number += 1
        if name == "empty" and places:
            return places["out"]
        return op(*args, **kwargs | places)

    def _places(self) -> dict[str, Any]:
        """Where this op's results go, by parameter."""
        places = {}
        while self.next is not None and self.next[0].op == self.number:
            activation, lifetime, offset = self.next
            row = self.arena[offset : offset + lifetime.num_bytes].reshape(1, lifetime.num_bytes)
            places[activation.parameter] = self.backend.bitcast(row, activation.dtype).reshape(activation.shape)
            self.next = next(self.placed, None)
        return places

    def finish(self) -> None:
        """The step has ended; it may not have left anything out."""
        expected = len(self.plan.ops)
        require(self.number == expected, "PlannedBackend.run", "step", f"{expected} ops", self.number)


def _outputs(name: str, op: Callable[..., Any]) -> list[str]:
    """The parameters that say where an op's results go, in the order of the results."""
    if name == "empty":
        return ["out"]  # it has none, but what it gives can come from the arena as well
    return [parameter for parameter in inspect.signature(op).parameters if parameter.endswith("out")]


def _arrays(value: Any) -> Iterator[Any]:
    """A backend's arrays in what was passed or returned."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _arrays(part)
    elif _address(value) is not None and value.nbytes:
        yield value


def _address(array: Any) -> Any:
    """Where its first number lies in memory; None if it is no array."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    data_ptr = getattr(array, "data_ptr", None)
    return None if data_ptr is None else data_ptr()
