"""The simulations of `twofold bench memory`: whose memory, what requests, which strategy; and what comes of one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from reference.batching.config import EngineConfig
from reference.memory.allocators import (
    BestFitAllocator,
    BuddyAllocator,
    reserve_max,
    reserve_pow2,
    reserve_true_length,
)
from reference.memory.beam_forks import BeamForks
from reference.memory.reserving import ReservingScheduler
from reference.memory.simulator import LinearStepTime, MemoryUse, SimulatedStep, Simulation, StepTime
from reference.memory.workload import Workload, requests
from twofold.errors import TwofoldError

Figures = dict[str, float]

SHAREGPT = Workload("ShareGPT", 161.31, 337.99)
ALPACA = Workload("Alpaca", 19.31, 58.45)
# An example in the prompt is a sentence and its translation: of the published prefixes, of 1 and of 5 examples, one has
# (341 - 80) / 4 tokens. Half of it is taken for the sentence, half for the translation.
TRANSLATION = Workload("WMT16 En-De", (341 - 80) / 8, (341 - 80) / 8)


@dataclass(frozen=True)
class Served:
    """A model on its GPUs, and what they leave for the cache.

    Attributes:
        num_slots: Tokens that the cache holds: published.
        bytes_per_s, flops_per_s: Of one GPU: an A100's data sheet.
    """

    name: str
    num_weights: float
    num_layers: int
    hidden_size: int
    num_slots: int
    num_gpus: int
    bytes_per_s: float
    flops_per_s: float = 312e12

    def step_time(self) -> StepTime:
        """By the data sheet."""
        kv_bytes = 2 * 2 * self.num_layers * self.hidden_size  # K and V, 16 bits each
        bytes_per_s, flops_per_s = self.num_gpus * self.bytes_per_s, self.num_gpus * self.flops_per_s
        return StepTime(self.num_weights, kv_bytes, bytes_per_s, flops_per_s)


OPT_13B = Served("OPT-13B", 13e9, 40, 5120, 15_728, 1, 1555e9)
OPT_66B = Served("OPT-66B", 66e9, 64, 9216, 9_696, 4, 1555e9)
OPT_175B = Served("OPT-175B", 173e9, 96, 12288, 60_096, 8, 2039e9)  # 346 GB of weights

# How long the paper's own steps took, by Little's law (requests in the system = rate x time in it) from two of its own
# figures: 30.42 requests at 2 a second, of 337.99 steps each, and 132.44 at 30 a second, of 58.45; a line through both.
_SECONDS = 30.42 / (2 * 337.99), 132.44 / (30 * 58.45)
_PER_SEQ = (_SECONDS[1] - _SECONDS[0]) / (132.44 - 30.42)
PUBLISHED_STEP_TIME = LinearStepTime(_SECONDS[0] - 30.42 * _PER_SEQ, _PER_SEQ)

RESERVE = {"max": reserve_max, "pow2": reserve_pow2, "oracle": reserve_true_length}
ALLOCATORS = {"buddy": BuddyAllocator, "best fit": BestFitAllocator}
STRATEGIES = (*RESERVE, "paged")


@dataclass(frozen=True)
class Case:
    """One simulation.

    Attributes:
        strategy: A reservation, or "paged".
        rate: Requests a second; inf: somebody is always waiting, so that memory is what limits.
        step_time: By the data sheet, or by the published figures (`PUBLISHED_STEP_TIME`).
        allocator: Of a reservation.
        forks: Which recording beams go by: of short answers, of long ones, or of the one whose beams agree latest.
    """

    workload: Workload
    strategy: str
    rate: float = math.inf
    served: Served = OPT_13B
    step_time: Literal["data sheet", "published"] = "data sheet"
    allocator: str = "buddy"
    block_size: int = 16
    num_samples: int = 1
    num_beams: int = 0
    forks: Literal["short", "long", "divergent"] = "short"
    prefix_len: int = 0

    @property
    def num_sequences(self) -> int:
        """Of each request."""
        return self.num_beams or self.num_samples

    @property
    def name(self) -> str:
        """All that differs from the default, in words."""
        parts = [self.workload.name, self.strategy]
        if self.workload.shape != "geometric":
            parts.append(f"{self.workload.shape} lengths")
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                value = value.name if isinstance(value, Served) else value
                parts.append(f"{field.name} {value:g}" if isinstance(value, float) else f"{field.name} {value}")
        return ", ".join(parts)

    def simulation(self, forks: BeamForks) -> Simulation:
        """The engine that runs it.

        Raises:
            TwofoldError: If its memory is smaller than one request may be.
        """
        needed, num_slots = self.workload.max_model_len + self.prefix_len, self.served.num_slots
        if num_slots < needed:
            raise TwofoldError(
                f"a memory of {num_slots} tokens is too small: one request of {self.workload.name} may need {needed}"
            )
        config = EngineConfig(
            num_blocks=num_slots // self.block_size,
            max_model_len=needed,
            block_size=self.block_size,
            max_num_seqs=2048,
            enable_prefix_caching=self.prefix_len > 0,
        )
        scheduler = None
        if self.strategy != "paged":
            scheduler = ReservingScheduler(config, ALLOCATORS[self.allocator](num_slots), RESERVE[self.strategy])
        step_time = self.served.step_time() if self.step_time == "data sheet" else PUBLISHED_STEP_TIME
        return Simulation(config, step_time, scheduler=scheduler, forks=forks)


def measure(case: Case, *, seed: int, num_finished: int, num_answers: int, forks: Mapping[str, BeamForks]) -> Figures:
    """Run a case until it is steady, and then a while; means over the steps of the latter.

    It is taken to be steady after three times a mean answer.

    Args:
        num_finished: It is measured until so many requests have ended, or half as many that fork,
        num_answers: and for at least so many times a mean answer.
    """
    simulation = case.simulation(forks[case.forks])
    asked = requests(
        case.workload,
        rate=case.rate,
        seed=seed,
        prefix_len=case.prefix_len,
        num_samples=case.num_samples,
        num_beams=case.num_beams,
    )
    warm_up = math.ceil(3 * case.workload.mean_output_len)
    least = math.ceil(num_answers * case.workload.mean_output_len)
    wanted = num_finished if case.num_sequences == 1 else num_finished // 2
    steps: list[SimulatedStep] = []
    start, finished = 0.0, 0
    for count, step in enumerate(simulation.run(asked)):
        if count < warm_up:
            start = step.time
            continue
        steps.append(step)
        finished += step.num_finished
        if finished >= wanted and len(steps) >= least:
            break
    seconds = steps[-1].time - start
    num_slots = case.served.num_slots
    output_tokens_each = case.workload.mean_output_len * case.num_sequences

    def mean(of: Callable[[MemoryUse], float]) -> float:
        return float(np.mean([of(step.memory) for step in steps]))

    return {
        "tokens": mean(lambda m: m.slots.tokens) / num_slots,
        "reserved": mean(lambda m: m.slots.reserved) / num_slots,
        "internal": mean(lambda m: m.slots.internal) / num_slots,
        "external": mean(lambda m: m.slots.external) / num_slots,
        "last_blocks": mean(lambda m: m.slots.internal / (m.slots.internal + m.slots.tokens)),
        "batched": mean(lambda m: m.num_running),
        "saved": mean(lambda m: 1 - m.used_blocks / max(1, m.table_blocks)),
        "waiting": mean(lambda m: m.num_waiting > 0),
        "requests_per_s": sum(step.num_output_tokens for step in steps) / output_tokens_each / seconds,
        "step_ms": 1e3 * seconds / len(steps),
        "num_steps": len(steps),
        "num_finished": finished,
        "num_preemptions": simulation.engine.metrics.num_preemptions,
    }
