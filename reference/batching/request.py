"""A request, its sampling parameters, the sequences that grow from it, and what comes out.

A *request* is what a user asks: a prompt, and how to go on from it. A *sequence* is one stream of tokens of it: one for
a plain request, ``n`` for parallel samples, ``num_beams`` for a beam search. They begin as one (the prompt is computed
once) and fork where it ends, so a request is also the *group* of sequences that share memory, and is preempted, swapped
and resumed as a whole.
"""

import enum
import math
import secrets
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from reference.batching.metrics import RequestMetrics
from reference.kv_cache.block_table import BlockTable


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token, and when to stop. Names and defaults as users of vLLM know them.

    Attributes:
        temperature: Logits are divided by it; 0 is greedy.
        top_p: Keep the smallest set of best tokens whose probability reaches it, in (0, 1].
        top_k: Keep so many best tokens; 0 or -1: all.
        min_p: Drop tokens less probable than this share of the best one's probability, in [0, 1].
        n: Parallel samples of one prompt.
        max_tokens: Most tokens to generate; None: until the context is full.
        stop: Strings that end the text. Matched on text, by `twofold.LLM`; the engine knows tokens only.
        stop_token_ids: Tokens that end the sequence, as the model's end-of-text tokens do.
        ignore_eos: Go on past the model's end-of-text tokens.
        seed: Of the draws; None: drawn, and reported as ``Request.seed``.
        logprobs: Report the log-probability of each token and of so many best ones; None: of none. They are of the
            model's own distribution, before penalties, temperature and filters.
        presence_penalty: Subtracted from the logits of tokens that the output has.
        frequency_penalty: Subtracted as many times as the output has them.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens seen, prompt included.
        logit_bias: Added to the logits of these tokens.

    Raises:
        ValueError: For a value out of its range: which, what was expected, what came.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    max_tokens: int | None = 16
    stop: str | SequenceOf[str] | None = None
    stop_token_ids: SequenceOf[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        self._check("temperature", _is_real(self.temperature) and self.temperature >= 0, "a number of at least 0")
        self._check("top_p", _is_real(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        self._check("top_k", _is_int(self.top_k) and self.top_k >= -1, "a whole number of at least 1, or 0 for all")
        self._check("min_p", _is_real(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]")
        self._check("n", _is_int(self.n) and self.n >= 1, "a whole number of at least 1")
        self._check_optional("max_tokens", 1)
        self._check_optional("logprobs", 0)
        self._check_optional("seed", 0)
        self._check("seed", self.seed is None or self.seed < 2**63, "a whole number below 2**63")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, _is_real(getattr(self, name)) and abs(getattr(self, name)) <= 2, "a number in [-2, 2]")
        self._check(
            "repetition_penalty", _is_real(self.repetition_penalty) and self.repetition_penalty > 0, "a number above 0"
        )
        stop = (self.stop,) if isinstance(self.stop, str) else (self.stop or ())
        self._check("stop", all(isinstance(s, str) and s for s in stop), "strings that are not empty")
        self._check(
            "stop_token_ids", all(_is_int(t) and t >= 0 for t in self.stop_token_ids), "token ids of at least 0"
        )
        bias = self.logit_bias or {}
        self._check(
            "logit_bias",
            all(_is_int(t) and t >= 0 and _is_real(b) for t, b in bias.items()),
            "token ids of at least 0 and finite numbers",
        )
        self._check("n", self.n == 1 or self.temperature > 0, "1 when greedy (temperature 0): all would be the same")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"SamplingParams: {name}: expected {expected}, got {getattr(self, name)!r}")

    def _check_optional(self, name: str, least: int) -> None:
        value = getattr(self, name)
        self._check(name, value is None or (_is_int(value) and value >= least), f"a whole number of at least {least}")

    @property
    def has_penalties(self) -> bool:
        """Does a logit depend on the tokens so far, or on a bias?"""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token, or a stop string found outside
    LENGTH = "length"  # max_tokens, the context or the pool is full
    ABORT = "abort"
    ERROR = "error"  # RequestOutput.error says what


class Status(enum.Enum):
    """Where a request stands."""

    NEW = enum.auto()
    WAITING = enum.auto()  # it has no memory: not yet, or no longer
    SWAPPED = enum.auto()  # it waits, and its blocks are on the host
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False)
class Request:
    """What a user asks of the engine, and the group of sequences that grow from it.

    Args:
        request_id: A name of the caller's choosing; unique among the unfinished.
        prompt_token_ids: At least one token.
        adapter: Name of a LoRA adapter that the engine knows, or None.
        cache_salt: Prefix blocks are shared among requests of the same salt only.
        num_beams: Of a beam search; 0: sample as ``params`` say. A beam search draws nothing: of ``params`` it heeds
            the lengths, the stop tokens, the penalties and the bias.
        length_penalty: Of a beam search: a finished beam's score is its log-probability over length ** this.
        forced_token_ids: The output, given beforehand: each token is taken whatever the model thinks of it, and with
            ``params.logprobs`` that is reported. Their number is the length; None: the model chooses.
        arrival_time: Of the engine's clock.

    Attributes:
        seed: Of its draws: that of ``params``, or one drawn here.
        live: Its unfinished sequences: one until the fork, which is where the prompt ends.
        completed: What the finished ones gave.
        forked: Do its sequences have tables of their own? False until the prompt is computed, and again when it has
            to be computed once more after a preemption.
        is_plain: Is it one sequence that never waits for the value of a token?
        limit: Tokens at which a sequence is full, prompt included.
        search: The state of a beam search, or None.
        error: What went wrong, if it finished with ERROR.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    cache_salt: str = ""
    num_beams: int = 0
    length_penalty: float = 1.0
    forced_token_ids: list[int] | None = None
    arrival_time: float = field(default_factory=time.monotonic)

    seed: int = field(init=False)
    metrics: RequestMetrics = field(init=False, repr=False)
    status: Status = field(init=False, default=Status.NEW)
    error: str | None = field(init=False, default=None)
    # the scheduler's
    live: "list[Sequence]" = field(init=False, repr=False, default_factory=list)
    completed: "list[CompletionOutput]" = field(init=False, repr=False, default_factory=list)
    forked: bool = field(init=False, default=False)
    is_plain: bool = field(init=False, repr=False, default=False)
    search: Any = field(init=False, repr=False, default=None)
    limit: int = field(init=False, repr=False, default=0)
    stop_ids: frozenset[int] = field(init=False, repr=False, default=frozenset())
    adapter_id: int = field(init=False, repr=False, default=-1)
    prefix_root: bytes = field(init=False, repr=False, default=b"")

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(f"request {self.request_id}: expected a prompt of at least one token, got none")
        if self.num_beams < 0 or (self.num_beams and self.params.n > 1):
            raise ValueError(f"request {self.request_id}: expected num_beams of at least 1, and n of 1 beside it")
        if self.forced_token_ids is not None and (not self.forced_token_ids or self.num_sequences > 1):
            raise ValueError(f"request {self.request_id}: expected forced tokens, at least one, of a single sequence")
        self.seed = secrets.randbits(32) if self.params.seed is None else self.params.seed
        self.metrics = RequestMetrics(arrival_time=self.arrival_time)

    @property
    def num_sequences(self) -> int:
        """How many sequences it has after the fork."""
        return self.num_beams or self.params.n

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of its output; None: as many as there is room for."""
        return self.params.max_tokens if self.forced_token_ids is None else len(self.forced_token_ids)

    @property
    def num_rows(self) -> int:
        """How many it may still have at once: those that are left, counting the ones that are yet to fork off."""
        return self.num_sequences - len(self.completed)


@dataclass(eq=False, slots=True)
class Sequence:
    """One stream of tokens, and where it stands.

    Attributes:
        seq_id: Unique in an engine.
        sample_index: Which of a request's parallel samples; goes into the counter of its draws.
        token_ids: Prompt and output, as far as they were read back from the runner.
        num_computed: Tokens whose keys and values are in the cache, or will be after the launched steps. While it is
            swapped out: on the host.
        num_pending: Tokens that launched steps will give and nobody has read yet (at least; speculation gives more).
        source: The row that draws the pending token, in the last step.
        tables: Its block tables, one a pool; empty while it waits.
        host_rows: While it is swapped out: its blocks' places on the host, a list a pool.
        row: Its row in `RunningRows`; -1 while it waits.
        last_step: The last step that names its blocks.
        drafts: Tokens proposed to follow ``token_ids``, and their distributions (None: certain).
        keys: Keys of its full blocks, as far as they were wanted; the first ``num_published`` are in the prefix cache.
    """

    seq_id: int
    request: Request
    sample_index: int
    token_ids: list[int]
    num_computed: int = 0
    tables: tuple[BlockTable, ...] = ()
    num_pending: int = 0
    source: int = -1
    row: int = -1
    last_step: int = -1
    finish_reason: FinishReason | None = None
    host_rows: list[list[int]] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    draft_probs: Any = None
    keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    logprobs: "list[TokenLogprobs]" = field(default_factory=list)

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose keys and values are still to be computed: 1 when decoding."""
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def output_token_ids(self) -> list[int]:
        """What was generated so far."""
        return self.token_ids[len(self.request.prompt_token_ids) :]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token: its log-probability, its rank (1 is best), and the best tokens with theirs, best first."""

    logprob: float
    rank: int
    top: dict[int, float]


@dataclass(slots=True)
class SequenceOutput:
    """What one sequence gained in a step."""

    request_id: str
    index: int  # which of the request's parallel samples
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    new_logprobs: list[TokenLogprobs] | None = None  # one a token, if asked for


@dataclass(slots=True)
class CompletionOutput:
    """One finished sequence: its output tokens, the stop token that ended it included."""

    index: int
    token_ids: list[int]
    finish_reason: FinishReason
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None  # if logprobs were asked for; of a beam, always
    score: float | None = None  # of a beam: cumulative_logprob / length ** length_penalty


@dataclass(slots=True)
class RequestOutput:
    """A finished request. Samples by index; beams best first."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    seed: int
    error: str | None = None


@dataclass(slots=True)
class StepOutput:
    """What a step of the engine gave: the tokens that were read in it, and the requests that ended with it."""

    step: int = -1  # the step that was read; -1: none was in flight
    sequences: list[SequenceOutput] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)
