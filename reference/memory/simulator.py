"""The engine without a model: how many requests a memory holds, and what its slots are used for, step by step.

Everything that decides about memory is the engine's own: its scheduler, its block pool and tables, its preemption, its
beams. What is replaced is the model, which has no say in it but for two things:

- *how long a step takes*, from which follows how many requests have arrived meanwhile: `StepTime` says it;
- *where beams fork*: replayed from a recording (`beam_forks`).

So with paging a simulation is the engine's run on the same requests, block for block, and a test holds it to that.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference.batching.config import EngineConfig
from reference.batching.engine import Engine
from reference.batching.packing import Batch, SamplingBatch
from reference.batching.request import Request
from reference.batching.runner import Done, StepResult
from reference.batching.scheduler import Scheduler
from reference.memory.beam_forks import BeamForks
from reference.memory.reserving import ReservingScheduler, SlotUsage

MAX_WAITING = 64  # requests in the engine's queue


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by its bytes and operations alone: the best a machine could do.

    A step reads all weights once, and multiplies each by every token of the step: whichever of the two takes longer.
    Then it reads the keys and values of all its sequences. Nothing is added for starting kernels, for talk between
    GPUs, or for the host.

    Attributes:
        num_weights: Of the model, in 16 bits each.
        kv_bytes_per_token: Of all layers.
        bytes_per_s, flops_per_s: Of all GPUs together.
    """

    num_weights: float
    kv_bytes_per_token: float
    bytes_per_s: float
    flops_per_s: float

    def __call__(self, batch: Batch) -> float:
        """Of one step."""
        read = 2 * self.num_weights / self.bytes_per_s
        multiply = 2 * self.num_weights * batch.num_tokens / self.flops_per_s
        return max(read, multiply) + self.kv_bytes_per_token * int(batch.seq_lens.sum()) / self.bytes_per_s


@dataclass(frozen=True)
class LinearStepTime:
    """Seconds of a step by its sequences alone: to see what depends on it.

    Attributes:
        seconds: Of any step.
        seconds_per_seq: And for each of its sequences.
    """

    seconds: float
    seconds_per_seq: float = 0.0

    def __call__(self, batch: Batch) -> float:
        """Of one step."""
        return self.seconds + self.seconds_per_seq * len(batch.seq_ids)


class Clock:
    """Simulated seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Now."""
        return self.now


class SimulatedRunner:
    """Executes steps by letting time pass. No two sequences say the same; beams fork as they did in the recording.

    Args:
        forks: None: there are no beams.
        on_launch: Called when a step has all its memory, before its time passes.
    """

    vocab_size = 2**31

    def __init__(
        self,
        clock: Clock,
        step_time: StepTime | LinearStepTime,
        *,
        forks: BeamForks | None = None,
        on_launch: Callable[[Batch], None] = lambda batch: None,
    ):
        self.clock = clock
        self.step_time = step_time
        self.forks = forks
        self.on_launch = on_launch

    def launch(self, batch: Batch) -> Done:
        """Let the step's time pass."""
        self.on_launch(batch)
        self.clock.now += self.step_time(batch)
        sampling = batch.sampling
        drawn = slice(0, sampling.num_drawn)
        result = StepResult(_own_tokens(sampling.seeds[drawn], sampling.sample_indices[drawn]))
        if sampling.cu_beams is not None:
            self._replay(sampling, sampling.cu_beams, result)
        return Done(result)

    def _replay(self, sampling: SamplingBatch, cu_beams: np.ndarray, result: StepResult) -> None:
        """The candidates of each search: the recorded ones first, and enough others after them."""
        if self.forks is None:
            raise ValueError("SimulatedRunner: forks: expected a recording for a request with beams, got none")
        result.beam_rows = np.zeros((len(cu_beams) - 1, sampling.num_candidates), np.int32)
        for group, (start, end) in enumerate(zip(cu_beams[:-1], cu_beams[1:])):
            row = sampling.num_drawn + start
            seed, position = int(sampling.seeds[row]), int(sampling.positions[row])
            if end - start > 1:  # the first fork is all from one
                parents = self.forks.parents(int(end - start), search=seed, step=position)
                result.beam_rows[group, : len(parents)] = parents
        candidates = np.arange(sampling.num_candidates)
        first_rows = sampling.num_drawn + cu_beams[:-1]
        result.beam_tokens = _own_tokens(sampling.seeds[first_rows, None], candidates)
        result.beam_scores = np.zeros(result.beam_rows.shape, np.float32) - candidates


def _own_tokens(seeds: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Tokens that nobody else's prompt or sequence has: no prefix is found that a model would not have found."""
    return (1 + which.astype(np.int64)) * 2**20 + seeds % 2**20


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The memory at one moment.

    Attributes:
        num_running: Requests that hold some of it.
        num_waiting: Requests that have come and hold none.
        slots: What every slot is.
        used_blocks: Blocks that are taken.
        table_blocks: The same, counted once for every sequence that owns them: what they would be without sharing.
    """

    num_running: int
    num_waiting: int
    slots: SlotUsage
    used_blocks: int
    table_blocks: int


def memory_use(scheduler: Scheduler) -> MemoryUse:
    """What the scheduler's memory holds now."""
    (pool,) = scheduler.usage()
    if isinstance(scheduler, ReservingScheduler):
        slots = scheduler.slot_usage()
    else:
        config = scheduler.config
        free = config.num_blocks * config.block_size - pool.slots
        slots = SlotUsage(tokens=pool.slots - pool.empty_slots, reserved=0, internal=pool.empty_slots, external=free)
    return MemoryUse(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        slots=slots,
        used_blocks=pool.used,
        table_blocks=sum(len(seq.tables[0].block_ids) for r in scheduler.running for seq in r.live if seq.tables),
    )


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """One step.

    Attributes:
        time: Seconds, at its end.
        num_output_tokens: That it gave, one to each sequence that was decoding, beams included.
        num_finished: Requests that ended with it.
        memory: When it had all the memory that it needs.
    """

    time: float
    num_output_tokens: int
    num_finished: int
    memory: MemoryUse


class Simulation:
    """Requests through the engine, in simulated time.

    Args:
        scheduler: By default the engine's own.
        settings: Of `Engine`: a trace, say.

    Attributes:
        engine: For who wants to look.

    Example:
        >>> from reference.batching.request import SamplingParams
        >>> config = EngineConfig(num_blocks=4, max_model_len=32, block_size=4, watermark=0.0)
        >>> simulation = Simulation(config, LinearStepTime(0.5))
        >>> ask = SamplingParams(max_tokens=3, ignore_eos=True)
        >>> requests = [Request("a", [1] * 5, ask, arrival_time=0.0), Request("b", [2], ask, arrival_time=0.6)]
        >>> for step in simulation.run(requests):
        ...     print(step.time, step.memory.num_running, step.memory.slots)
        0.5 1 SlotUsage(tokens=5, reserved=0, internal=3, external=8)
        1.0 1 SlotUsage(tokens=6, reserved=0, internal=2, external=8)
        1.5 2 SlotUsage(tokens=8, reserved=0, internal=4, external=4)
        2.0 1 SlotUsage(tokens=2, reserved=0, internal=2, external=12)
        2.5 1 SlotUsage(tokens=3, reserved=0, internal=1, external=12)
    """

    def __init__(
        self,
        config: EngineConfig,
        step_time: StepTime | LinearStepTime,
        *,
        scheduler: Scheduler | None = None,
        forks: BeamForks | None = None,
        **settings: Any,
    ):
        self.clock = Clock()
        runner = SimulatedRunner(self.clock, step_time, forks=forks, on_launch=self._look)
        self.engine = Engine(config, runner, scheduler=scheduler, clock=self.clock, **settings)

    def run(self, requests: Iterable[Request]) -> Iterator[SimulatedStep]:
        """Step until all requests have ended; they come in the order of their arrival."""
        upcoming = iter(requests)
        following = next(upcoming, None)
        while following is not None or self.engine.has_unfinished():
            while following is not None and self._comes_in(following):
                self.engine.add(following)
                following = next(upcoming, None)
            if self.engine.has_unfinished():
                yield self._step()
            elif following is not None:
                self.clock.now = following.arrival_time

    def _comes_in(self, request: Request) -> bool:
        """Has it arrived? Behind a long queue it waits outside: there may be no end of those who come at once."""
        return request.arrival_time <= self.clock.now and len(self.engine.scheduler.waiting) < MAX_WAITING

    def _step(self) -> SimulatedStep:
        output = self.engine.step()
        if self.engine.failure:
            raise self.engine.failure.__cause__ or self.engine.failure
        return SimulatedStep(self.clock.now, self._num_output_tokens, len(output.finished), self._memory)

    def _look(self, batch: Batch) -> None:
        self._num_output_tokens = len(batch.logit_rows)
        self._memory = memory_use(self.engine.scheduler)
