"""Backends by the names a user types. Below this there is no dispatch by string: a backend is a module or an object."""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import reference
from reference.batching.runner import ModelRunner, Runner
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
        raise TwofoldError(f"--backend {backend}: {problem}")
    if deterministic:
        found = getattr(found, "invariant", None)
        if found is None:
            raise TwofoldError(f"--deterministic: the backend {backend} has no batch-invariant ops")
    return found


def runner_type(backend: Any, device: str | None, *, max_num_seqs: int) -> tuple[Callable[..., Runner], int]:
    """Who executes the steps, and how many it likes to have scheduled ahead: `fast`'s own runner where it has a GPU."""
    if getattr(backend, "__name__", "").partition(".")[0] == "fast":
        from fast.runner import GraphRunner, is_on_gpu

        if is_on_gpu(device):
            return partial(GraphRunner, most_seqs=max_num_seqs), 1
    return ModelRunner, 0


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
