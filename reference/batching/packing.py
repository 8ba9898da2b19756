"""Packing: what the scheduler chose, as the arrays of one step, end to end and without padding."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float32, Int32, Int64
from numpy import ndarray as Array


@dataclass
class Batch:
    """One step, as host arrays. It names sequences, not values still in flight: where ``token_ids`` is -1 the token is
    the result of row ``token_sources`` of the step before."""

    step: int
    seq_ids: list[int]
    token_ids: Int32[Array, " num_tokens"]
    token_sources: Int32[Array, " num_tokens"]
    positions: Int32[Array, " num_tokens"]
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"]
    seq_lens: Int32[Array, " num_seqs"]
    block_tables: tuple[Int32[Array, "num_seqs max_blocks_per_seq"], ...]  # one a pool
    slot_mappings: tuple[Int64[Array, " num_tokens"], ...]
    copies: tuple[list[tuple[int, int]], ...]  # (source, target) blocks, done first, one list a pool
    swaps_out: list[Any] = field(default_factory=list)  # before the copies
    swaps_in: list[Any] = field(default_factory=list)
    adapter_ids: Int32[Array, " num_tokens"] | None = None
    logit_rows: Int32[Array, " num_rows"] | None = None  # token rows whose logits are wanted; repeated for n > 1
    # ... and what sampling, beams and verification need for each logit row: see `SamplingBatch`
