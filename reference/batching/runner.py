"""The runner: executes one packed batch on a backend. `fast/runner.py` is the same protocol on a GPU."""

from typing import Protocol

from reference.batching.packing import Batch


class StepResult:
    """What a step gives back: a token for each sampled row, and what was asked for beside it."""


class Pending(Protocol):
    def result(self) -> StepResult: ...


class Runner(Protocol):
    def launch(self, batch: Batch) -> Pending:
        """Start the step: swaps and copies first, then the model, then sampling. Returns at once where it can."""
