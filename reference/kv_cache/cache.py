"""The KV cache of a model: the arrays of one format, and the ops that serve it.

The one place that knows the formats. Everything else sees rows of bytes (copy, swap) or `write` and `attend`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class KVFormat:
    """One row of the table that every command shows."""

    name: str  # "auto" (the model's dtype), "bfloat16", "float16", "float32", "int8", "fp8", "int4", "kivi4", "kivi2"
    summary: str
    window: int = 0  # KIVI: tokens kept in full precision; > 0 means a second pool of window blocks


KV_FORMATS: dict[str, KVFormat] = {}


@dataclass(frozen=True)
class CacheView:
    """Where a step's tokens lie in the cache: backend arrays, shared by all layers."""

    cu_seqlens_q: Any  # int32 [num_seqs_plus_1]
    seq_lens: Any  # int32 [num_seqs]
    block_table: Any  # int32 [num_seqs, max_blocks_per_seq]
    slot_mapping: Any  # int64 [num_tokens]
    window_block_table: Any = None
    window_slot_mapping: Any = None


class KVCache:
    def __init__(
        self,
        format: KVFormat | str,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        num_blocks: int,
        num_window_blocks: int = 0,
        dtype: str = "float32",
        backend: ModuleType | Any,
        device: str | None = None,
    ):
        raise NotImplementedError

    pools: list  # of backend byte arrays [num_blocks, block_bytes]: one, and for KIVI the window's as well
    block_bytes: tuple[int, ...]  # per pool

    @property
    def bytes_per_token(self) -> float: ...

    def write(self, layer: int, k: Any, v: Any, view: CacheView) -> None: ...

    def attend(
        self,
        layer: int,
        q: Any,
        view: CacheView,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        sinks: Any = None,
        logit_cap: float | None = None,
        out: Any = None,
    ) -> Any: ...

    def rotate_and_write(self, layer: int, q: Any, k: Any, v: Any, cos: Any, sin: Any, positions: Any, view: CacheView,
                         *, q_norm: Any = None, k_norm: Any = None, eps: float = 1e-6, interleaved: bool = False) -> Any:
        """The fused op where the format is plain, its parts where it is quantized; returns the rotated q."""  # fmt: skip

    def copy_blocks(self, copies: Sequence[tuple[int, int]], *, pool: int = 0) -> None: ...

    def swap_out(self, block_ids: Sequence[int], *, pool: int = 0) -> np.ndarray: ...

    def swap_in(self, rows: np.ndarray, block_ids: Sequence[int], *, pool: int = 0) -> None: ...
