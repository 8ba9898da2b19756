"""The KV cache of a model: the arrays of one format, and the ops that serve it.

The formats are in a table (`formats`); here is what is done with a row of it. Everything else sees rows of bytes (copy,
swap) or ``write`` and ``attend``.

**Layout.** A pool is one allocation of bytes, one row a block. In a row lie all layers, and of each layer every array
of the format, scales included, each at a multiple of ``ALIGNMENT`` bytes::

    block 0 | layer 0: k_cache v_cache k_scale v_scale | layer 1: k_cache ... |
    block 1 | layer 0: k_cache ...

A layer's array is a strided view: the columns where it lies, ``pool[:, start:stop]``, seen as numbers (`bitcast`) and
cut into ``[num_blocks, ...]``. So a block is copied, swapped and shared as a row by those who know no format, while an
op gets arrays with ``num_blocks`` in front and knows no pool.

A pool starts as memory found lying about: a slot that no sequence has written may hold anything, NaN included.

**Two pools.** KIVI keeps the newest tokens in full precision as well. Their blocks are in a second pool, the window's,
with block tables of its own: such a block is released when no later query is near enough (`KVFormat.window_start`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from reference.kv_cache.coded_rows import CodedRows, word_layout
from reference.kv_cache.formats import (
    ALIGNMENT,
    KV_FORMATS,
    ArraySpec,
    KVFormat,
    block_bytes,
    block_layout,
    blocks_for,
    bytes_per_token,
    resolve_format,
)

__all__ = [
    "ALIGNMENT",
    "KV_FORMATS",
    "CacheView",
    "KVCache",
    "KVFormat",
    "block_bytes",
    "blocks_for",
    "bytes_per_token",
    "resolve_format",
]


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
    """The pools of a model's cache, and what the decoder and the runner do with them.

    Attributes:
        format: The resolved format: never "auto".
        pools: Backend arrays of bytes, a row a block: one, and for KIVI the window's after it.
        block_bytes: The length of a row, for each pool.
        word_layouts: How each pool's rows are coded; None: they are not.

    Args:
        num_window_blocks: How many blocks the window's pool has, for a format that has one (`KVFormat.window_blocks`).
        dtype: The model's: what "auto" stands for, and what a window is kept in.
        backend: Whose ops move and read the data.

    Raises:
        ValueError: For an unknown format, or sizes that it cannot serve.
        NotImplementedError: If the backend lacks an op that the format needs.
    """

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
        if num_layers < 0 or num_blocks < 0 or num_window_blocks < 0:
            counts = (num_layers, num_blocks, num_window_blocks)
            raise ValueError(f"KVCache: num_layers, num_blocks, num_window_blocks: expected 0 or more, got {counts}")
        shape = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
        specs = block_layout(format, **shape)
        self.format = resolve_format(format, dtype)
        self.block_bytes = block_bytes(format, num_layers=num_layers, **shape)
        self.num_layers, self.block_size = num_layers, block_size
        self.backend, self.device = backend, device
        self._write, self._attend = self._op(self.format.write_op), self._op(self.format.attend_op)
        self._fused = self._op(self.format.fused_op) if self.format.fused_op else None
        self._window = {"window": self.format.window} if len(specs) > 1 else {}
        self.word_layouts = [word_layout(pool_specs) for pool_specs in specs]

        rows = zip((num_blocks, num_window_blocks), self.block_bytes)
        self.pools = [backend.empty(shape, dtype="uint8", device=device) for shape in rows]
        self._arrays: list[dict[str, Any]] = [{} for _ in range(num_layers)]
        for pool, pool_specs in reversed([*zip(self.pools, specs)]):  # the window's first, as the ops take them
            self._add_views(pool, pool_specs)

    def _op(self, name: str) -> Callable[..., Any]:
        op = getattr(self.backend, name, None)
        if op is None:
            raise NotImplementedError(f"the backend has no {name}, which the KV format {self.format.name} needs")
        return op

    def _add_views(self, pool: Any, specs: tuple[ArraySpec, ...]) -> None:
        start = 0
        for arrays in self._arrays:
            for spec in specs:
                numbers = self.backend.bitcast(pool[:, start : start + spec.num_bytes], spec.dtype)
                arrays[spec.name] = numbers.reshape(len(pool), *spec.shape)  # cuts the last axis: still a view
                start += spec.aligned_bytes

    def arrays(self, layer: int) -> dict[str, Any]:
        """The views of a layer, by name, in the order in which the format's ops take them."""
        return self._arrays[layer]

    @property
    def bytes_per_token(self) -> float:
        """What a token costs in all layers, its window copy left out: `bytes_per_token`."""
        return self.block_bytes[0] / self.block_size

    def write(self, layer: int, k: Any, v: Any, view: CacheView) -> None:
        """Write a step's keys and values, quantized as the format has it."""
        slots = (view.window_slot_mapping, view.slot_mapping) if self._window else (view.slot_mapping,)
        self._write(k, v, *self._arrays[layer].values(), *slots)

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
    ) -> Any:
        """Attention of a step's queries over everything cached of their sequences, their own tokens included: `write`
        comes first. The arguments are those of `paged_attention`."""
        tables = (view.window_block_table, view.block_table) if self._window else (view.block_table,)
        return self._attend(
            q, *self._arrays[layer].values(), *tables, view.seq_lens, view.cu_seqlens_q, **self._window,
            scale=scale, sliding_window=sliding_window, sinks=sinks, logit_cap=logit_cap, out=out,
        )  # fmt: skip

    def rotate_and_write(
        self,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        cos: Any,
        sin: Any,
        positions: Any,
        view: CacheView,
        *,
        q_norm: Any = None,
        k_norm: Any = None,
        eps: float = 1e-6,
        interleaved: bool = False,
    ) -> Any:
        """Norm q and k per head (where weights are given), rotate them, write k and v; returns the rotated q.

        One fused op where the format is plain, its parts where it is quantized. The arguments are those of
        `rotary_write_kv`.
        """
        if self._fused:
            caches = self._arrays[layer].values()
            norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
            return self._fused(
                q, k, v, cos, sin, positions, *caches, view.slot_mapping, interleaved=interleaved, **norms
            )
        q = q if q_norm is None else self.backend.rms_norm(q, q_norm, eps=eps)
        k = k if k_norm is None else self.backend.rms_norm(k, k_norm, eps=eps)
        q, k = self.backend.rotary(q, k, cos, sin, positions, interleaved=interleaved)
        self.write(layer, k, v, view)
        return q

    def copy_blocks(self, copies: Sequence[tuple[int, int]], *, pool: int = 0) -> None:
        """Copy blocks from source to target, as if one pair after the other.

        The op moves all rows at once, in no order: see `copy_waves`.
        """
        for sources, targets in copy_waves(copies):
            self.backend.copy_blocks(self.pools[pool], self._ids(sources), self._ids(targets))

    def swap_out(self, block_ids: Sequence[int], *, pool: int = 0, coded: bool = False) -> np.ndarray | CodedRows:
        """These blocks' rows on the host, all layers, in the order given; coded, if that is asked for and saves any."""
        rows, layout = self.backend.swap_out(self.pools[pool], self._ids(block_ids)), self.word_layouts[pool]
        return CodedRows.encode(rows, layout, self.backend) if coded and layout else self.backend.to_host(rows)

    def swap_in(self, rows: np.ndarray | CodedRows, block_ids: Sequence[int], *, pool: int = 0) -> None:
        """Rows from ``swap_out`` into these blocks; they need not be those they came from."""
        if isinstance(rows, CodedRows):
            on_device = rows.decode(self.backend, device=self.device)
        else:
            on_device = self.backend.from_host(rows, device=self.device)
        self.backend.swap_in(on_device, self.pools[pool], self._ids(block_ids))

    def _ids(self, block_ids: Sequence[int]) -> Any:
        return self.backend.from_host(np.array(block_ids, np.int64), device=self.device)


def copy_waves(copies: Sequence[tuple[int, int]]) -> Iterator[tuple[list[int], list[int]]]:
    """Copies meant one after the other, as (sources, targets) that may be moved at once.

    A pair that touches what an earlier one writes, or writes what an earlier one reads, waits for the next wave; tables
    that append once a step make no such pairs.

    Example:
        >>> list(copy_waves([(0, 1), (0, 2), (1, 3)]))
        [([0, 0], [1, 2]), ([1], [3])]
    """
    source_of: dict[int, int] = {}  # by target
    read: set[int] = set()
    for source, target in copies:
        if source in source_of or target in source_of or target in read:
            yield [*source_of.values()], [*source_of]
            source_of, read = {}, set()
        source_of[target] = source
        read.add(source)
    if source_of:
        yield [*source_of.values()], [*source_of]
