"""The block pool: which blocks are free, and how many tables own each of the others.

A KV cache that reserves room for the longest answer wastes most of it. Paging hands out memory in blocks of a few
tokens, when a token needs one, and takes it back from any sequence for any other: a block is a number, and this is
where the numbers live. Nothing here knows what a block holds, or what an array is.

A block is in one of three states:

- *live*: ``ref_counts[block] >= 1`` block tables own it (more than one: it is shared, and must not be written);
- *free and blank*: nobody owns it and nobody wants what it held. These are handed out first, from a stack, so that a
  pool that is never full touches few of its blocks;
- *free and published*: nobody owns it, but the prefix cache can still find its contents under a key. These are handed
  out only when no blank one is left, least recently freed first, and ``on_evict`` hears of each.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

RELEASED = -1
"""In a table's ``block_ids``: the block that was here has been given back. Skipped wherever block ids are taken."""


class OutOfBlocks(Exception):
    """The pool cannot give as many blocks as were asked for; nothing was taken."""


class BlockPool:
    """Reference-counted blocks, O(1) each to hand out, share and take back.

    Attributes:
        ref_counts: Owners of each block. A plain list: for one number at a time it is several times faster than an
            array. Read it freely, and change it only through the methods.
        published: Which blocks can be found by a key (see `PrefixCache`): their contents may not change.
        on_evict: Called with a block's id when it stops being published: because it is about to be handed out, or
            because ``forget`` was called. Whoever published it takes it out of their books.
        num_shared: Blocks with more than one owner.
        peak_used: The most blocks that were live at once; set it back to ``num_used`` to measure anew.

    Source:
        Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention* (2023),
        sections 4.2 to 4.4: their physical blocks with reference counts.

    Example:
        >>> pool = BlockPool(4)
        >>> a = pool.allocate(2)
        >>> pool.share(a)                                   # a second owner, say a fork
        >>> pool.release(a)                                 # the first is done: nothing becomes free
        >>> a, pool.ref_counts, pool.num_free
        ([0, 1], [1, 1, 0, 0], 2)
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 0:
            raise ValueError(f"BlockPool: num_blocks: expected 0 or more, got {num_blocks}")
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.published = [False] * num_blocks
        self.on_evict: Callable[[int], None] | None = None
        self.num_shared = 0
        self.peak_used = 0
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 on top
        self._free_published: OrderedDict[int, None] = OrderedDict()  # in the order they were freed

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out: the blank ones and the published ones."""
        return len(self._blank) + len(self._free_published)

    @property
    def num_used(self) -> int:
        """Live blocks."""
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one owner each, blank ones first. Raises OutOfBlocks, taking nothing."""
        if count < 0:
            raise ValueError(f"BlockPool.allocate: count: expected 0 or more, got {count}")
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} free")
        taken = [self._blank.pop() for _ in range(min(count, len(self._blank)))]
        while len(taken) < count:
            block_id, _ = self._free_published.popitem(last=False)
            self._unpublish(block_id)
            taken.append(block_id)
        for block_id in taken:
            self.ref_counts[block_id] = 1
        self.peak_used = max(self.peak_used, self.num_used)
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more owner each; a published free block comes back to life. Raises ValueError for a blank free block."""
        for block_id in block_ids:
            if block_id == RELEASED:
                continue
            count = self._count(block_id)
            if count == 0:
                if not self.published[block_id]:
                    raise ValueError(f"BlockPool.share: block {block_id} is free and holds nothing to share")
                del self._free_published[block_id]
            elif count == 1:
                self.num_shared += 1
            self.ref_counts[block_id] = count + 1
        self.peak_used = max(self.peak_used, self.num_used)

    def release(self, block_ids: Iterable[int]) -> None:
        """One owner fewer each; those left with none become free.

        ``block_ids`` come in a sequence's order and are freed back to front, so that of one sequence the last blocks
        are evicted before the first: a prefix can be found only from its head on. Raises ValueError at a block that
        is free already: somebody gave back what they did not own.
        """
        for block_id in reversed([*block_ids]):
            if block_id == RELEASED:
                continue
            count = self._count(block_id) - 1
            if count < 0:
                raise ValueError(f"BlockPool.release: block {block_id} is free already")
            self.ref_counts[block_id] = count
            if count == 1:
                self.num_shared -= 1
            elif count == 0 and self.published[block_id]:
                self._free_published[block_id] = None
            elif count == 0:
                self._blank.append(block_id)

    def publish(self, block_id: int) -> None:
        """A live block's contents are final and can be found by a key: when it is freed, keep them while there is
        room. Raises ValueError for a free block: its contents are anybody's."""
        if self._count(block_id) == 0:
            raise ValueError(f"BlockPool.publish: block {block_id} is free: publish it before its release")
        self.published[block_id] = True

    def forget(self, block_ids: Iterable[int]) -> None:
        """What these blocks hold need not be found again: those that are free are handed out first, those that are
        live become blank when freed. ``on_evict`` hears of each that was published."""
        for block_id in block_ids:
            if block_id == RELEASED or not self.published[block_id]:
                continue
            if self._count(block_id) == 0:
                del self._free_published[block_id]
                self._blank.append(block_id)
            self._unpublish(block_id)

    def _unpublish(self, block_id: int) -> None:
        self.published[block_id] = False
        if self.on_evict is not None:
            self.on_evict(block_id)

    def _count(self, block_id: int) -> int:
        if not 0 <= block_id < self.num_blocks:  # a list would take -2 for the last but one
            raise ValueError(f"BlockPool: block id {block_id} is not in a pool of {self.num_blocks}")
        return self.ref_counts[block_id]
