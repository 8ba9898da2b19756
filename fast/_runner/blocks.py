"""Blocks on their way between a pool and the host, and from place to place in it: what a step begins with.

As they are, blocks travel through pinned memory and nobody waits. Coded they are fewer bytes, but how many is known on
the device: the host waits for that, and so for what is queued before.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast._runner.staging import to_device
from reference.batching.packing import Batch
from reference.kv_cache.cache import KVCache, copy_waves
from reference.kv_cache.coded_rows import CodedRows


class BlockMover:
    """Moves the blocks of a cache of `fast`.

    Attributes:
        host: Swapped blocks by key and pool, in pinned memory; coded ones in as much memory as they need.
    """

    def __init__(self, cache: KVCache):
        self.cache, self.backend, self.device = cache, cache.backend, cache.pools[0].device
        self.host: dict[tuple[int, int], Tensor | np.ndarray | CodedRows] = {}

    def move(self, batch: Batch) -> None:
        """Queue what a batch asks for, in its order."""
        for swap in batch.swaps_out:
            if swap.coded and self.cache.word_layouts[swap.pool] is not None:
                self.host[swap.key, swap.pool] = self.cache.swap_out(swap.block_ids, pool=swap.pool, coded=True)
                continue
            rows = self.backend.swap_out(self.cache.pools[swap.pool], self._ids(swap.block_ids))
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
            self.host[swap.key, swap.pool] = host.copy_(rows, non_blocking=True)
        for swap in batch.swaps_in:
            host = self.host.pop((swap.key, swap.pool))
            if not isinstance(host, Tensor):
                self.cache.swap_in(host[swap.host_rows], swap.block_ids, pool=swap.pool)
                continue
            rows = self.backend.take_rows(host.to(self.device, non_blocking=True), self._ids(swap.host_rows))
            self.backend.swap_in(rows, self.cache.pools[swap.pool], self._ids(swap.block_ids))
        for key in batch.drops:
            for pool in range(len(batch.copies)):
                self.host.pop((key, pool), None)
        for pool, copies in enumerate(batch.copies):
            for sources, targets in copy_waves(copies):
                self.backend.copy_blocks(self.cache.pools[pool], self._ids(sources), self._ids(targets))

    def _ids(self, ids: Any) -> Tensor:
        return to_device(np.asarray(ids, np.int64), self.device)
