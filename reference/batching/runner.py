"""The runner: executes one packed batch on a backend. `fast/runner.py` is the same protocol on a GPU."""

from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import Float32, Int32, Int64
from numpy import ndarray as Array

from reference.batching.packing import Batch


@dataclass
class Logprobs:
    """What `log_probs` says of the tokens that some logit rows gave.

    Attributes:
        rows: Those of ``SamplingBatch.logprob_rows`` that gave one: not the rows of rejected drafts.
    """

    rows: Int32[Array, " num_reported"]
    logprobs: Float32[Array, " num_reported"]
    ranks: Int32[Array, " num_reported"]
    top_ids: Int64[Array, "num_reported num_top"]
    top_logprobs: Float32[Array, "num_reported num_top"]


@dataclass
class StepResult:
    """What a step gives back, as host arrays.

    Attributes:
        token_ids: Of the drawn rows.
        num_accepted, next_token_ids: Of the verified sequences: how many drafts, and the token after them.
        beam_scores, beam_rows, beam_tokens: Candidates of each beam search, best first.
        errors: Logit rows that gave no result, and why. Their tokens mean nothing.
    """

    token_ids: Int64[Array, " num_drawn"]
    num_accepted: Int32[Array, " num_verified"] | None = None
    next_token_ids: Int64[Array, " num_verified"] | None = None
    beam_scores: Float32[Array, "num_groups num_candidates"] | None = None
    beam_rows: Int32[Array, "num_groups num_candidates"] | None = None
    beam_tokens: Int64[Array, "num_groups num_candidates"] | None = None
    logprobs: Logprobs | None = None
    errors: dict[int, str] = field(default_factory=dict)


class Pending(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for it, and read what it gave."""
        ...


class Runner(Protocol):
    """Whatever executes steps."""

    def launch(self, batch: Batch) -> Pending:
        """Start the step: swaps and copies first, then the model, then sampling. Returns at once where it can.
        Steps are executed in the order in which they are launched."""
        ...
