"""What an engine may use, and how it goes about it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits and choices. Raises ValueError, one sentence, for a value out of its range.

    Attributes:
        num_blocks: Of the KV cache's pool: all the memory that the sequences share.
        max_model_len: Tokens of the longest sequence, prompt and output.
        block_size: Tokens in a KV block.
        num_window_blocks: Of the second pool, if the KV format has one (``kv_window``).
        max_num_seqs: Most sequences running at a time.
        max_num_batched_tokens: Most tokens of a step. A longer prompt is computed in chunks.
        preemption: What becomes of the newest request's blocks when the pool runs out: computed again later, or
            swapped to the host and back.
        swap_coding: How swapped blocks travel and wait: as they are ("none"), or "lossless": coded in fewer bytes, and
            bit for bit the same when they are back (`CodedRows`).
        enable_prefix_caching: Find the blocks of prompts computed before.
        lookahead: How many steps are scheduled before the tokens of the last one are read: 0 or 1.
        watermark: Share of the pool that the admission of a request leaves free, lest it be preempted at once.
        kv_cache_dtype: The KV format's name; part of a prefix block's key.
        kv_window: Tokens that the KV format keeps in full precision, in the second pool, beside those not sealed yet;
            None: it has no second pool.
        sliding_window: Keys that a query sees, if *every* layer of the model slides: blocks past it are released.
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
    swap_coding: Literal["none", "lossless"] = "none"
    enable_prefix_caching: bool = True
    lookahead: int = 0
    watermark: float = 0.01
    kv_cache_dtype: str = "auto"
    kv_window: int | None = None
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    model_fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("lookahead", self.lookahead in (0, 1), "0 or 1")
        self._check("preemption", self.preemption in ("recompute", "swap"), "recompute or swap")
        self._check("swap_coding", self.swap_coding in ("none", "lossless"), "none or lossless")
        nothing_to_code = self.swap_coding != "none" and self.preemption != "swap"
        self._check("swap_coding", not nothing_to_code, "none, unless preemption is swap")
        self._check("watermark", 0 <= self.watermark < 1, "a share in [0, 1)")
        self._check("sliding_window", self.sliding_window is None or self.sliding_window >= 1, "at least 1, or none")
        self._check("kv_window", self.kv_window is None or self.kv_window >= 0, "at least 0, or none")
        least = 0 if self.kv_window is None else -(-(max(1, self.kv_window) - 1) // self.block_size) + 2
        self._check("num_window_blocks", self.num_window_blocks >= least, f"at least {least}, for one sequence")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"EngineConfig: {name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def pool_sizes(self) -> tuple[int, ...]:
        """Blocks of each pool."""
        return (self.num_blocks,) if self.kv_window is None else (self.num_blocks, self.num_window_blocks)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each pool: how far back a block can still be read, in tokens; None: all the way.

        At least 1: a token is written to the window before it is sealed, even if no query reads it there.
        """
        if self.kv_window is None:
            return (self.sliding_window,)
        kept = max(1, self.kv_window)
        return (self.sliding_window, min(kept, self.sliding_window or kept))
