"""Work on every core: a matrix product uses them all by itself, NumPy's other functions use one.

Rows do not depend on each other. So a long prompt is worked through in tiles of rows, small enough to stay in a core's
cache from one elementwise pass to the next, and handed out to whichever core is free. The result is the same bits.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")

TILE = 1 << 16  # numbers in a tile: 256 KiB of float32, so that a few arrays of that size fit a core's cache


def num_cores() -> int:
    """As many as BLAS takes: ``OMP_NUM_THREADS`` where it is set, or all that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(asked), usable) if asked.isdecimal() and int(asked) else usable


def row_tiles(num_rows: int, row_size: int) -> list[slice]:
    """Slices that together are all rows: one where there is little to do, or else tiles.

    Example:
        >>> row_tiles(3, row_size=10), [rows.stop for rows in row_tiles(500, row_size=1000)]
        ([slice(0, 3, None)], [65, 130, 195, 260, 325, 390, 455, 500])
    """
    step = num_rows if num_rows * row_size <= 2 * TILE else max(1, TILE // row_size)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, max(1, step))]


def on_every_core(work: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Call ``work`` with each item, in any order and on all cores at once. It writes where no other item does.

    What it raises is raised here. One item is done at once, without a thread.
    """
    if len(items) <= 1 or num_cores() == 1:
        for item in items:
            work(item)
        return
    left = iter(items)  # one iterator for all: who is done with an item takes the next

    def take() -> None:
        for item in left:
            work(item)

    helpers = [_pool().submit(take) for _ in range(min(num_cores(), len(items)) - 1)]
    take()
    for helper in helpers:
        helper.result()


_pools: list[ThreadPoolExecutor] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def _pool() -> ThreadPoolExecutor:
    if not _pools:
        _pools.append(ThreadPoolExecutor(num_cores() - 1, thread_name_prefix="rows"))
    return _pools[0]
