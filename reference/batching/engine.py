"""The engine: add requests, step, stream, abort.

A step of the loop is four lines, and every technique of this house lives in one of them::

    batch = scheduler.schedule()          # who computes what: batching, paging, sharing, preemption
    pending = runner.launch(batch)        # the model, on some backend
    result = pending.result()             # tokens
    output = scheduler.update(result)     # who gained what, who is done

With a lookahead of 1 the next ``schedule`` and ``launch`` come before this ``result``.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from reference.batching import trace as tracing
from reference.batching.config import EngineConfig
from reference.batching.metrics import EngineMetrics, StepRecord
from reference.batching.request import (
    FinishReason,
    Request,
    RequestOutput,
    Sequence,
    SequenceOutput,
    StepOutput,
)
from reference.batching.runner import Pending, Runner
from reference.batching.scheduler import Scheduler
from reference.kv_cache.prefix_cache import prefix_root

__all__ = ["Engine", "EngineConfig", "StepOutput"]


class Drafter(Protocol):
    """Proposes what may come next, for the model to verify in one step: see `drafting`."""

    def propose(self, seqs: list[Sequence]) -> None:
        """Set ``drafts`` (and ``draft_probs``) of these sequences, as many as may be wanted or none."""
        ...


class Engine:
    """Requests in, tokens out.

    Args:
        runner: Executes the steps (`ModelRunner`, or any other of the protocol).
        drafter: Proposes tokens for speculation, or None.
        adapters: What the runner's LoRA adapters are called: name to (index, digest of the content).
        clock: Seconds. `Request.arrival_time` is on the same one.
        trace: Called with each record of the trace (`trace.TraceWriter`), or None.

    Attributes:
        scheduler: Its state, for those who want to look.
        metrics: Sums over the steps so far.
        failure: The last step that failed, with its cause and traceback; None: all went well.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        drafter: Drafter | None = None,
        adapters: Mapping[str, tuple[int, str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        trace: Callable[[tracing.Record], None] | None = None,
        scheduler: Scheduler | None = None,
    ):
        self.config = config
        self.runner = runner
        self.drafter = drafter
        self.adapters = adapters or {}
        self.clock = clock
        self.trace = trace
        self.scheduler = scheduler or Scheduler(config, speculative=drafter is not None)
        self.metrics = EngineMetrics()
        self.failure: StepFailed | None = None
        self._requests: dict[str, Request] = {}
        self._launched: deque[tuple[StepRecord, Pending, tracing.Record | None]] = deque()
        self._mailboxes: dict[str, deque[SequenceOutput | RequestOutput]] = {}
        if trace:
            trace(tracing.start_record(config, clock()))

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError with the reason if it can never run, and leaves all else as it was."""
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id}: another of this name is unfinished")
        if request.adapter is not None and request.adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"request {request.request_id}: unknown adapter {request.adapter!r}; known: {known}")
        self._check_tokens(request)
        request.adapter_id, digest = self.adapters[request.adapter] if request.adapter is not None else (-1, "")
        kv_format = f"{self.config.kv_cache_dtype}/{self.config.kv_window}"
        request.prefix_root = prefix_root(self.config.model_fingerprint, kv_format, digest, request.cache_salt)
        self.scheduler.add(request)
        self._requests[request.request_id] = request
        if self.trace:
            self.trace(tracing.add_record(request, self.clock()))

    def _check_tokens(self, request: Request) -> None:
        """Tokens and counts beyond the model's vocabulary would fail in the middle of a step, for everyone in it."""
        size, params, name = self.runner.vocab_size, request.params, f"request {request.request_id}"
        given = {
            "prompt": request.prompt_token_ids,
            "completion": request.forced_token_ids or (),
            "logit_bias": params.logit_bias or (),
        }
        for what, tokens in given.items():
            unknown = [token for token in tokens if not 0 <= token < size]
            if unknown:
                raise ValueError(f"{name}: {what}: token {unknown[0]} is not in the vocabulary of {size}")
        if (params.logprobs or 0) > size:
            raise ValueError(f"{name}: logprobs: expected at most the vocabulary's {size}, got {params.logprobs}")
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else self.config.eos_token_ids)}
        if request.num_beams * max(2, 1 + len(stop_ids)) > size:  # the candidates of a step
            raise ValueError(f"{name}: num_beams: {request.num_beams} are too many for a vocabulary of {size}")

    def has_unfinished(self) -> bool:
        """Is there anything left to do? A step in flight is, even if nobody waits for it."""
        return bool(self._requests or self._launched)

    def step(self) -> StepOutput:
        """Launch what may be in flight, then read the oldest step.

        An exception in the runner ends the requests that were running, with ERROR; the others go on.
        """
        try:
            while len(self._launched) <= self.config.lookahead and self._launch():
                pass
            output = self._read() if self._launched else self._idle()
        except StepFailed as failure:
            self.failure = failure
            self._launched.clear()
            self.scheduler.now = self.clock()
            output = StepOutput(finished=self.scheduler.fail_in_flight(str(failure)))
        for result in output.finished:
            self._ended(result)
        if self._mailboxes:
            for gained in output.sequences:
                self._deliver(gained.request_id, gained)
            for result in output.finished:
                self._deliver(result.request_id, result)
        return output

    def _launch(self) -> bool:
        """Schedule a step and launch it, if there is one."""
        start = self.scheduler.now = self.clock()
        if self.drafter is not None:
            try:
                self.drafter.propose(self.scheduler.draftable())
            except Exception as error:
                raise StepFailed("drafting", error) from error
        batch = self.scheduler.schedule()
        if batch is None:
            return False
        plan = self.scheduler.in_flight[-1]
        self._note_peak()
        record = tracing.step_record(plan, self.scheduler) if self.trace else None
        times = StepRecord(plan.step, start, len(plan.seqs), plan.num_tokens, len(plan.preempted))
        scheduled = self.clock()
        try:
            pending = self.runner.launch(batch)
        except Exception as error:
            raise StepFailed(f"step {plan.step}", error) from error
        times.schedule_time = scheduled - start
        times.launch_time = self.clock() - scheduled
        self._launched.append((times, pending, record))
        return True

    def _read(self) -> StepOutput:
        """Wait for the oldest step in flight, and hand its result to the scheduler."""
        times, pending, record = self._launched.popleft()
        start = self.clock()
        try:
            result = pending.result()
        except Exception as error:
            raise StepFailed(f"step {times.step}", error) from error
        read = self.scheduler.now = self.clock()
        output = self.scheduler.update(result)
        times.wait_time, times.update_time = read - start, self.clock() - read
        times.device_time = result.device_time
        self.metrics.add(times)
        self.metrics.num_output_tokens += sum(len(gained.new_token_ids) for gained in output.sequences)
        if self.trace and record is not None:
            self.trace(tracing.finish_step_record(record, times, output))
        return output

    def _idle(self) -> StepOutput:
        if self._requests and not self.scheduler.may_idle:
            raise RuntimeError(f"the scheduler is stuck: {len(self._requests)} unfinished requests, and nothing to do")
        return StepOutput()

    def _note_peak(self) -> None:
        metrics, num_used = self.metrics, self.scheduler.space.pools[0].num_used
        metrics.peak_blocks = max(metrics.peak_blocks, num_used)
        if not metrics.peak or num_used > 1.01 * metrics.peak[0].used:  # looking at all tables has its price
            metrics.peak = self.scheduler.usage()

    def stream(self, request: Request) -> Iterator[SequenceOutput | RequestOutput]:
        """Add a request, and yield what its sequences gain and then its `RequestOutput`.

        The engine is stepped when there is nothing to yield, for all requests: several streams may be read in turns.
        Closing a stream early aborts its request.
        """
        self.add(request)
        self._mailboxes[request.request_id] = deque()
        return self._stream(request.request_id)

    def _stream(self, request_id: str) -> Iterator[SequenceOutput | RequestOutput]:
        mailbox = self._mailboxes[request_id]
        try:
            while True:
                while not mailbox:
                    self.step()
                yield mailbox[0]
                if isinstance(mailbox.popleft(), RequestOutput):
                    return
        finally:
            del self._mailboxes[request_id]
            self.abort(request_id)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now. What it has so far; None if no unfinished request is called so."""
        return self.finish(request_id, FinishReason.ABORT)

    def finish(self, request_id: str, reason: FinishReason, *, index: int | None = None) -> RequestOutput | None:
        """End a request, or one of its parallel samples, for a reason found outside: a stop string, say.

        The request's output if that was the last of its samples; ``step`` does not report it again.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self.scheduler.now = self.clock()
        result = self.scheduler.end(request, reason, index=index)
        if result:
            self._ended(result)
            self._deliver(request_id, result)
        return result

    def _ended(self, result: RequestOutput) -> None:
        del self._requests[result.request_id]
        if self.trace:
            self.trace(tracing.end_record(result, self.clock()))

    def _deliver(self, request_id: str, output: SequenceOutput | RequestOutput) -> None:
        if request_id in self._mailboxes:
            self._mailboxes[request_id].append(output)


class StepFailed(Exception):
    """The runner, or the drafter, could not do its part."""

    def __init__(self, what: str, error: Exception):
        super().__init__(f"{what} failed: {type(error).__name__}: {error}")
