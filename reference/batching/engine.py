"""The engine: add requests, step, stream, abort."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reference.batching.request import FinishReason, Request, RequestOutput, SequenceOutput, StepOutput
from reference.batching.runner import Runner


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may use, and how it goes about it.

    Attributes:
        num_blocks: Of the KV cache's pool; every sequence together.
        max_model_len: Longest sequence, prompt and output.
        block_size: Tokens in a KV block.
        num_window_blocks: Of the second pool, for a KV format that has one (KIVI).
        max_num_seqs: Most sequences running at a time.
        max_num_batched_tokens: Most tokens of a step. A longer prompt is computed in chunks.
        preemption: What happens to the newest request's blocks when the pool runs out: computed again later, or
            swapped to the host and back.
        enable_prefix_caching: Find computed prompt blocks again.
        lookahead: Steps scheduled before the tokens of the last one are read: 0 or 1.
        watermark: Share of the pool that admission of a new request leaves free, so that it is not preempted at once.
        kv_cache_dtype: The KV format's name; part of a prefix block's key.
        kv_window: Tokens that the KV format keeps in full precision (KIVI's window); 0: no second pool.
        sliding_window: Keys that a query sees, if *every* layer slides: blocks past it are released.
        eos_token_ids: Tokens with which the model ends a text.
        model_fingerprint: Says which weights; part of a prefix block's key.
    """

    num_blocks: int
    max_model_len: int
    block_size: int = 16
    num_window_blocks: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    preemption: Literal["recompute", "swap"] = "recompute"
    enable_prefix_caching: bool = True
    lookahead: int = 0
    watermark: float = 0.01
    kv_cache_dtype: str = "auto"
    kv_window: int = 0
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    model_fingerprint: str = ""


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
