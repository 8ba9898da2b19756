"""Blocks on their way between a pool and the host, and from place to place in it: what a step begins with.

As they are, blocks travel through pinned memory and nobody waits. Coded they are fewer bytes (`coded_blocks`), but how
many is known on the device: the host waits for that, and so for what is queued before.
"""

from typing import Any

import numpy as np
from torch import Tensor

from fast._runner.coded_blocks import CodedBlocks, Leaving, codes_here
from fast._runner.staging import Bus, to_device
from reference.batching.packing import Batch
from reference.batching.plan import Swap
from reference.kv_cache.cache import KVCache, copy_waves
from reference.kv_cache.coded_rows import CodedRows


class BlockMover:
    """Moves the blocks of a cache of `fast`.

    Attributes:
        host: Swapped blocks by key and pool, in pinned memory; coded ones in as much memory as they need.
    """

    def __init__(self, cache: KVCache):
        self.cache, self.backend, self.device = cache, cache.backend, cache.pools[0].device
        self.host: dict[tuple[int, int], Tensor | CodedBlocks | np.ndarray | CodedRows] = {}
        self._bus = Bus(self.device)

    def move(self, batch: Batch) -> None:
        """Queue what a batch asks for, in its order."""
        leaving = []
        for swap in batch.swaps_out:
            pool, layout = self.cache.pools[swap.pool], self.cache.word_layouts[swap.pool]
            if not swap.coded or layout is None or not swap.block_ids or not pool.numel():
                self.host[swap.key, swap.pool] = self._out_as_it_is(swap)
            elif codes_here(self.backend):
                leaving.append((swap, Leaving(pool, layout, self._ids(swap.block_ids))))
            else:
                self.host[swap.key, swap.pool] = self.cache.swap_out(swap.block_ids, pool=swap.pool, coded=True)
        for swap, blocks in leaving:  # when all of them are queued, for the first of them is waited for
            self.host[swap.key, swap.pool] = blocks.send(self._bus)
        for swap in batch.swaps_in:
            self._back(swap, self.host.pop((swap.key, swap.pool)))
        for key in batch.drops:
            for pool in range(len(batch.copies)):
                self.host.pop((key, pool), None)
        for pool, copies in enumerate(batch.copies):
            for sources, targets in copy_waves(copies):
                self.backend.copy_blocks(self.cache.pools[pool], self._ids(sources), self._ids(targets))

    def _out_as_it_is(self, swap: Swap) -> Tensor:
        rows = self.backend.swap_out(self.cache.pools[swap.pool], self._ids(swap.block_ids))
        return self._bus.on_host(rows.shape, rows.dtype).copy_(rows, non_blocking=True)

    def _back(self, swap: Swap, host: Tensor | CodedBlocks | np.ndarray | CodedRows) -> None:
        pool, block_ids = self.cache.pools[swap.pool], self._ids(swap.block_ids)
        if isinstance(host, CodedBlocks):
            host.fetch(self._bus, swap.host_rows, pool, block_ids)
        elif isinstance(host, Tensor):
            rows = self.backend.take_rows(host.to(self.device, non_blocking=True), self._ids(swap.host_rows))
            self.backend.swap_in(rows, pool, block_ids)
        else:
            self.cache.swap_in(host[swap.host_rows], swap.block_ids, pool=swap.pool)

    def _ids(self, ids: Any) -> Tensor:
        return to_device(np.asarray(ids, np.int64), self.device)
