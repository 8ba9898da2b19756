"""A sequence's block table: positions to slots, forks that share, and copy-on-write."""

from jaxtyping import Int64
from numpy import ndarray as Array

from reference.kv_cache.block_pool import BlockPool


class BlockTable:
    """The blocks of one sequence in one pool. ``block_ids[b]`` holds positions b * block_size and on; -1: released."""

    def __init__(self, pool: BlockPool, block_size: int, *, block_ids: list[int] | None = None, num_tokens: int = 0):
        self.pool = pool
        self.block_size = block_size
        self.block_ids: list[int] = list(block_ids or [])
        self.num_tokens = num_tokens

    def blocks_needed(self, num_new_tokens: int) -> int:
        """How many blocks ``append`` would take, the copy of a shared last block included."""

    def append(self, num_new_tokens: int) -> tuple[Int64[Array, " num_new_tokens"], list[tuple[int, int]]]:
        """Slots for the next tokens, and the (source, target) block copies that must happen before they are written.
        A shared block that would be written is replaced by a copy. Raises OutOfBlocks, changing nothing."""

    def fork(self) -> "BlockTable": ...

    def truncate(self, num_tokens: int) -> list[int]:
        """Forget the tokens past ``num_tokens``; returns the block ids no longer held (the caller releases them, now or
        when the last launched step that names them has resulted)."""

    def release_before(self, position: int) -> list[int]:
        """Drop the blocks that lie wholly before ``position`` (past a window); returns them as ``truncate`` does."""

    def free(self) -> list[int]: ...
