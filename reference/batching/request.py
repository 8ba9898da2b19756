"""A request, its sampling parameters, and the sequences that grow from it."""

import enum
import time
from collections.abc import Mapping, Sequence as SequenceOf
from dataclasses import dataclass, field

from reference.kv_cache.block_table import BlockTable


@dataclass(frozen=True)
class SamplingParams:
    """Names and defaults as users of vLLM know them. Text-level ``stop`` strings are matched by `twofold.LLM`."""

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
    # __post_init__ raises ValueError for anything out of range: one sentence each


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass
class Request:
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    adapter: str | None = None
    cache_salt: str = ""
    num_beams: int = 0  # > 0: beam search
    arrival_time: float = field(default_factory=time.monotonic)


@dataclass
class Sequence:
    """One stream of tokens. A request with n > 1 (or beams) has several, forked where the prompt ends."""

    seq_id: int
    request: Request
    sample_index: int
    token_ids: list[int]  # prompt and output
    num_computed: int = 0  # tokens whose keys and values are, or will be after the launched steps, in the cache
    tables: tuple[BlockTable, ...] = ()
    finish_reason: FinishReason | None = None
