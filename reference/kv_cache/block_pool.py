"""The block pool: which blocks are free, and how many tables own each of the others."""

from collections.abc import Callable, Iterable

import numpy as np


class OutOfBlocks(Exception):
    """The pool cannot give as many blocks as were asked for; nothing was taken."""


class BlockPool:
    """Reference-counted blocks. Free blocks are handed out least recently freed first, so a freed block whose contents
    may still be wanted (a cached prefix) survives as long as it can; ``on_evict`` hears when one is handed out."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.ref_counts = np.zeros(num_blocks, np.int32)
        self.on_evict: Callable[[int], None] | None = None
        raise NotImplementedError

    @property
    def num_free(self) -> int: ...

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with a count of one each. Raises OutOfBlocks, taking nothing."""

    def share(self, block_ids: Iterable[int]) -> None:
        """One more owner each; a cached free block (count 0) comes back to life."""

    def release(self, block_ids: Iterable[int]) -> None:
        """One owner fewer each; those left with none become free. -1 is skipped. Releasing a free block raises."""

    def forget(self, block_ids: Iterable[int]) -> None:
        """These free blocks hold nothing worth keeping: hand them out first."""
