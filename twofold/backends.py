"""Backends by the names a user types. Below this there is no dispatch by string: a backend is a module or an object."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import reference
from reference.batching.runner import ModelRunner
from reference.model.overlay import overlay
from twofold.errors import TwofoldError

NAMES = {"reference": "reference", "fast": "fast", "plain_torch": "twofold.conformance.plain_torch"}


def resolve_backend(backend: str | ModuleType | Any, *, deterministic: bool = False) -> Any:
    """The backend called ``backend``; an importable module's ops laid over the reference; or an object as it is.

    ``deterministic`` asks for the backend's batch-invariant twin, where it has one under the name ``invariant``.

    Raises:
        TwofoldError: If there is no such module, it cannot be imported or run here, or has none of the ops.
    """
    found = _import(backend) if isinstance(backend, str) else backend
    problem = getattr(found, "unavailable", lambda: None)()
    if problem:
        raise TwofoldError(f"--backend {backend}: {problem}; --backend reference needs none")
    if deterministic:
        found = getattr(found, "invariant", None)
        if found is None:
            raise TwofoldError(f"--deterministic: the backend {backend} has no batch-invariant ops")
    return found


@dataclass(frozen=True)
class Execution:
    """Who executes the steps on a backend, and what suits it where nobody says otherwise.

    Attributes:
        runner: Called with a decoder, its cache, and ``adapters``.
        room: Bytes of memory that are free, if this share of all may be used; None: memory is not measured.
        plans_memory: The runner puts activations into an arena, if the backend is a `PlannedBackend`.
    """

    runner: Callable[..., Any] = ModelRunner
    lookahead: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    room: Callable[[float], int] | None = None
    plans_memory: bool = False


def execution(backend: Any, device: str | None) -> Execution:
    """`fast`'s own runner where it has a GPU; everywhere else the plain one."""
    if getattr(backend, "__name__", "").partition(".")[0] == "fast":
        from fast._runner.memory import room
        from fast.runner import GraphRunner, is_on_gpu

        if is_on_gpu(device):
            return Execution(GraphRunner, 1, 256, 16384, partial(room, device), plans_memory=True)
    return Execution()


def _import(name: str) -> Any:
    try:
        module = importlib.import_module(NAMES.get(name, name))
    except ImportError as error:
        needs = ' (pip install "twofold[fast]")' if name in NAMES and error.name in ("torch", "triton") else ""
        raise TwofoldError(f"--backend {name}: cannot be imported: {error}{needs}") from None
    if name in NAMES:
        return module
    try:
        return overlay(module, reference)
    except ValueError as error:
        raise TwofoldError(f"--backend {name}: {error}") from None
