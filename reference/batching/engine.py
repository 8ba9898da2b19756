"""The engine: add requests, step, stream, abort."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reference.batching.config import EngineConfig
from reference.batching.request import FinishReason, Request, RequestOutput, SequenceOutput, StepOutput
from reference.batching.runner import Runner

__all__ = ["Engine", "EngineConfig", "StepOutput"]


class Engine:
    """Requests in, tokens out.

    Args:
        runner: Executes the steps (`ModelRunner`, or any other of the protocol).
        drafter: Proposes tokens for speculation (`drafting.NgramDrafter`, `drafting.ModelDrafter`), or None.
        adapters: What the runner's adapters are called: name to (index, digest of the content).
        clock: Seconds; `Request.arrival_time` is on the same one.
        trace: Called with each record of the trace (`trace.TraceWriter`), or None.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        drafter: Any = None,
        adapters: Mapping[str, tuple[int, str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        trace: Callable[[dict[str, Any]], None] | None = None,
    ):
        raise NotImplementedError

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError with the reason if it can never run, and leaves all else as it was."""
        raise NotImplementedError

    def has_unfinished(self) -> bool:
        """Is there anything left to do?"""
        raise NotImplementedError

    def step(self) -> StepOutput:
        """Schedule and launch what may be in flight, then read the oldest step."""
        raise NotImplementedError

    def stream(self, request: Request) -> Iterator[SequenceOutput | RequestOutput]:
        """Add a request and yield what its sequences gain, then its `RequestOutput`. Steps the engine when it has
        nothing to yield, so several streams may be read in turns; closing one early aborts its request."""
        raise NotImplementedError

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; what it has so far. None if it is not unfinished."""
        raise NotImplementedError

    def finish(self, request_id: str, reason: FinishReason, *, index: int | None = None) -> RequestOutput | None:
        """End a request, or one of its samples, for a reason found outside (a stop string). Returns the request's
        output if that was the last of its samples; it is not reported again by ``step``."""
        raise NotImplementedError
