"""A sequence's block table: positions to slots, forks that share, and copy-on-write.

A sequence's tokens lie wherever its blocks happen to lie; the table says where. Position ``p`` is in block
``block_ids[p // block_size]`` at offset ``p % block_size``, and the two make its *slot*,

    slot = block * block_size + offset,

which is all that the ops that write the cache need. Two sequences with a common beginning (a fork, a cached prefix)
name the same blocks. They can, because keys and values of a token depend on nothing after it, and are never changed;
only the *last* block is ever written again, where there is room for more tokens. So a table that is about to write
into a last block that others own too takes a fresh block, asks for a copy, and goes on in the copy: copy-on-write.
The data itself is moved later, by the `copy_blocks` op at the head of the step.

A table decides what it holds, not when that becomes free: ``truncate``, ``release_before`` and ``free`` return block
ids which the caller gives to ``pool.release``, now or when the last launched step that names them has resulted.
"""

import numpy as np
from jaxtyping import Int64
from numpy import ndarray as Array

from reference.kv_cache.block_pool import RELEASED, BlockPool


class BlockTable:
    """The blocks of one sequence in one pool.

    Attributes:
        block_ids: ``block_ids[b]`` holds positions ``b * block_size`` and on; -1 where the block was released.
        num_tokens: Positions in use. Always ``len(block_ids) == ceil(num_tokens / block_size)``.

    Args:
        block_ids: Blocks to begin with, one ownership of each passing to the table: a cached prefix
            (`PrefixCache.match`), or blocks that a swapped-out sequence comes back to.
        num_tokens: How many positions they hold.

    Example:
        >>> pool = BlockPool(8)
        >>> a = BlockTable(pool, block_size=4)
        >>> a.append(6)                                     # two blocks, no copies
        (array([0, 1, 2, 3, 4, 5]), [])
        >>> b = a.fork()
        >>> b.append(1)                                     # block 1 is shared: copy it to 2, write there
        (array([10]), [(1, 2)])
        >>> a.block_ids, b.block_ids, pool.ref_counts[:3]
        ([0, 1], [0, 2], [2, 1, 1])
    """

    def __init__(self, pool: BlockPool, block_size: int, *, block_ids: list[int] | None = None, num_tokens: int = 0):
        self.pool = pool
        self.block_size = block_size
        self.block_ids: list[int] = list(block_ids or [])
        self.num_tokens = num_tokens
        if block_size < 1 or num_tokens < 0 or len(self.block_ids) != -(-num_tokens // block_size):
            raise ValueError(
                f"BlockTable: block_ids: expected ceil(num_tokens / block_size) = {num_tokens} / {block_size} of them, "
                f"got {len(self.block_ids)}"
            )

    def blocks_needed(self, num_new_tokens: int) -> int:
        """How many blocks ``append`` would take, the copy of a shared last block included."""
        if num_new_tokens <= 0:
            return 0
        total = -(-(self.num_tokens + num_new_tokens) // self.block_size)
        return total - len(self.block_ids) + self._must_copy()

    def append(self, num_new_tokens: int) -> tuple[Int64[Array, " num_new_tokens"], list[tuple[int, int]]]:
        """Make room for the next tokens.

        Returns:
            Their slots, and the (source, target) block copies that must happen before they are written. Until then
            a target holds nothing: it may be written and read by the step that copies first, but not be swapped out.

        Raises:
            OutOfBlocks: If the pool has too few; nothing is changed.
        """
        start = self.num_tokens
        copies = self.extend(num_new_tokens)
        return self.slots(start, self.num_tokens), copies

    def extend(self, num_new_tokens: int) -> list[tuple[int, int]]:
        """As ``append``, for who finds the slots otherwise (as `pack` does for a whole batch): the copies alone."""
        if num_new_tokens < 0:
            raise ValueError(f"BlockTable.append: num_new_tokens: expected 0 or more, got {num_new_tokens}")
        fresh = self.pool.allocate(self.blocks_needed(num_new_tokens))
        copies = []
        if num_new_tokens and self._must_copy():
            source, target = self.block_ids[-1], fresh.pop(0)
            copies.append((source, target))
            self.block_ids[-1] = target
            self.pool.release([source])
        elif num_new_tokens and self._writes_last() and self.pool.published[self.block_ids[-1]]:
            self.pool.forget([self.block_ids[-1]])  # ours alone: what its key promises is about to be overwritten
        self.block_ids += fresh
        self.num_tokens += num_new_tokens
        return copies

    def append_one(self) -> int | None:
        """The slot of one more token if it fits into the last block as it is, else None and nothing is changed.

        The common case of decoding, without an array: ``append(1)`` for a table that needs no block and no copy.
        """
        offset = self.num_tokens % self.block_size
        if offset == 0:
            return None
        block_id = self.block_ids[-1]
        if self.pool.ref_counts[block_id] != 1 or self.pool.published[block_id]:
            return None
        self.num_tokens += 1
        return block_id * self.block_size + offset

    def slots(self, start: int, stop: int) -> Int64[Array, " num_slots"]:
        """The slots of positions ``start`` to ``stop``. Positions of a released block get meaningless ones, below 0."""
        blocks, offsets = np.divmod(np.arange(start, stop), self.block_size)
        first = start // self.block_size
        block_ids = np.array(self.block_ids[first : -(-stop // self.block_size)], np.int64)
        return block_ids[blocks - first] * self.block_size + offsets

    def fork(self) -> "BlockTable":
        """A second sequence with the same past. Nothing is copied until one of the two writes into the last block."""
        self.pool.share(self.block_ids)
        return type(self)(self.pool, self.block_size, block_ids=self.block_ids, num_tokens=self.num_tokens)

    def truncate(self, num_tokens: int) -> list[int]:
        """Forget the positions from ``num_tokens`` on (a rejected speculation, a discarded token).

        Returns the block ids no longer held, for the caller to release. A block that is still partly used stays.
        Raises ValueError if there are fewer tokens, or if the next token would have to go into a released block.
        """
        keep = -(-num_tokens // self.block_size)
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"BlockTable.truncate: num_tokens: expected 0 to {self.num_tokens}, got {num_tokens}")
        if num_tokens % self.block_size and self.block_ids[keep - 1] == RELEASED:
            raise ValueError(f"BlockTable.truncate: num_tokens: the block of position {num_tokens} was released")
        dropped = [block_id for block_id in self.block_ids[keep:] if block_id != RELEASED]
        del self.block_ids[keep:]
        self.num_tokens = num_tokens
        return dropped

    def release_before(self, position: int) -> list[int]:
        """Drop the blocks that lie wholly before ``position``: no later query sees them (they are past a window).

        Returns their ids, for the caller to release; their places in ``block_ids`` become -1.
        """
        if not position <= self.num_tokens:
            raise ValueError(f"BlockTable.release_before: position: expected <= {self.num_tokens}, got {position}")
        dropped = []
        for index in range(position // self.block_size - 1, -1, -1):
            if self.block_ids[index] == RELEASED:
                break  # and so is everything before it
            dropped.append(self.block_ids[index])
            self.block_ids[index] = RELEASED
        return dropped[::-1]

    def free(self) -> list[int]:
        """Hold nothing any more; returns the block ids that were held, for the caller to release."""
        return self.truncate(0)

    def _writes_last(self) -> bool:
        """Would the next token go into a block that is there already?"""
        return self.num_tokens % self.block_size != 0

    def _must_copy(self) -> bool:
        return self._writes_last() and self.pool.ref_counts[self.block_ids[-1]] > 1
