"""Static and dynamic batches: what people come from, as a scheduler to compare with.

A *static* batch is made of what waits, and runs until its last sequence has ended; a sequence that ends early keeps its
row, and the model goes on computing it for nothing. A *dynamic* batch differs only in when it is closed: when it is
full, or when the oldest request has waited so long. Everything else (memory, packing, sampling, the model) is the
engine's, so that steps and times compare: ``Engine(config, runner, scheduler=StaticScheduler(config))``.

What is modest here: a row that has ended computes its last token again, and no more memory is taken for it, where the
padded batches of old went on to reserve. And nothing is padded: prompts of different lengths cost what they are long.
"""

import math

from reference.batching.config import EngineConfig
from reference.batching.plan import StepPlan
from reference.batching.request import Request, RequestOutput, Sequence
from reference.batching.scheduler import Scheduler


class StaticScheduler(Scheduler):
    """Batches of up to ``max_num_seqs`` sequences, that begin and end together.

    Args:
        max_wait: Seconds (of the engine's clock) that a batch which is not full waits for more, from the arrival of its
            oldest request. 0: static batches of whatever is there.

    Attributes:
        batch: The requests of the batch that runs.
        ended: Its sequences that have ended, and are computed on.
    """

    may_idle = True

    def __init__(self, config: EngineConfig, *, max_wait: float = 0.0):
        if not 0 <= max_wait < math.inf:
            raise ValueError(f"StaticScheduler: max_wait: expected seconds of at least 0, got {max_wait}")
        super().__init__(config)
        self.max_wait = max_wait
        self.batch: list[Request] = []
        self.ended: list[Sequence] = []

    def _go_on(self, plan: StepPlan) -> None:
        super()._go_on(plan)
        for seq in self.ended if plan.seqs else ():
            plan.drawn.append(plan.add(seq, 1))  # its last computed token, once more; what is drawn goes nowhere
            plan.samples.append(seq.sample_index)
            seq.last_step = plan.step

    def _may_admit(self, request: Request) -> bool:
        if not self.running and not self.in_flight:
            self._close_batch()
        return request in self.batch

    def _close_batch(self) -> None:
        """The next batch, if it is full or has waited long enough; else none."""
        self.batch, free_rows = [], self.config.max_num_seqs
        for request in self.waiting:
            free_rows -= request.num_rows
            if free_rows >= 0:
                self.batch.append(request)
        if free_rows > 0 and self.now - self.waiting[0].arrival_time < self.max_wait:
            self.batch = []

    def _vacate(self, seq: Sequence) -> None:
        if seq.tables:
            self.ended.append(seq)

    def _end_request(self, request: Request) -> RequestOutput:
        result = super()._end_request(request)
        if not self.running:
            for seq in self.ended:
                self.space.close(seq)
            self.ended = []
        return result
