"""What a user gets back: the names that users of vLLM know."""

from dataclasses import asdict, dataclass, field
from typing import Any

from reference.batching.metrics import RequestMetrics


@dataclass
class Logprob:
    """A token at one place: its log-probability, its rank there (1 is the likeliest), and its text."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass
class CompletionOutput:
    """One answer to a prompt.

    Attributes:
        index: Which of the prompt's samples or beams (best first).
        text: Without the stop string or the end-of-text token.
        token_ids: Every token generated, the stop token included.
        cumulative_logprob: Of all its tokens; None if log-probabilities were not asked for (a beam's is always there).
        logprobs: At each place the token chosen, first, and the likeliest ones.
        finish_reason: "stop", "length", "abort" or "error"; None while it runs.
        stop_reason: The stop string or token id that ended it; None for the model's own end of text.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """The answers to one prompt. ``error`` says why there are none, or why they end early."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    seed: int | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: as it is, with the derived times of ``metrics`` beside the raw ones."""
        result = asdict(self)
        if self.metrics is not None:
            for name in ("queue_time", "time_to_first_token", "time_between_tokens", "end_to_end_time"):
                result["metrics"][name] = getattr(self.metrics, name)
        return result


@dataclass(frozen=True)
class Chunk:
    """What one answer gained: text that may be shown now (perhaps none yet), and the tokens that made it."""

    prompt_index: int
    output_index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass(frozen=True)
class RunMetrics:
    """A whole run in figures.

    Attributes:
        time_to_first_token: Seconds from the start of the run to its first token; None if none came.
        tokens_per_second: Generated tokens over the seconds from start to end.
        num_blocks: KV blocks in the pool.
        peak_blocks: KV blocks in use at the peak.
        empty_slots: Share of the slots of the blocks in use at the peak that held no token.
        seed: The one drawn because none was given. None if it was given, nothing was drawn, or every prompt has its own
            (`RequestOutput.seed`).
    """

    num_prompt_tokens: int
    num_generated_tokens: int
    time_to_first_token: float | None
    tokens_per_second: float
    num_blocks: int
    peak_blocks: int
    empty_slots: float
    seed: int | None = None
