"""Prefix sharing: full blocks found again by the hash of everything before them, least recently used evicted.

Two requests that begin with the same tokens (a system prompt, a conversation so far) need the same keys and values for
them. A block's key is the SHA-256 of the key of the block before it and of its own tokens,

    key_b = SHA256(key_{b-1} || tokens of block b),     key_{-1} = root,

so that equal keys mean equal tokens from the first one on. The root is the hash of everything else that the contents
depend on: the model, the KV format, the adapter, and a salt that keeps tenants apart (a hit is faster than a miss, and
so tells one tenant what another has asked).

The engine's side of it:

1. ``keys = block_keys(prompt, block_size, root=...)``. At least one token of a sequence has to be computed, since the
   next one is drawn from its logits: ask for the keys of ``(len(prompt) - 1) // block_size`` blocks at most.
2. ``block_ids = cache.match(keys)``, and a `BlockTable` over them with ``num_tokens = len(block_ids) * block_size``.
3. When a block is full and its tokens are *known* (not drafted, not still in flight): ``cache.publish(block_id, key)``.
   Always before the block is released.

Nothing is done to free a cached block: the pool hands it out again when it has none better, and the key goes then.

**Several pools.** A block of a KIVI cache lies in two pools, its full-precision copy only for as long as it is within
the window; a model of sliding layers only needs its last blocks. Each pool has its own `PrefixCache`, published under
the same keys. Of a prefix, a pool with a window must still hold the last ``tail`` blocks, those which the query right
after it sees (`KVFormat.tail_blocks`); `match_pools` finds the longest prefix which *every* pool can serve.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from reference.kv_cache.block_pool import RELEASED, BlockPool


def prefix_root(model_fingerprint: str, kv_format: str, adapter_digest: str = "", cache_salt: str = "") -> bytes:
    """The key before the first block: what the contents of a block depend on, other than tokens.

    Args:
        model_fingerprint: Says which weights, in which format and dtype.
        kv_format: What a block holds: the format's name, and whatever else shapes it (its window and group size).
        adapter_digest: A digest of the adapter's *content*; a name may be loaded again with other weights.
        cache_salt: Whatever the caller wants kept apart.

    Example:
        >>> prefix_root("m", "int8", "a", "b") == prefix_root("m", "int8", "ab")   # each part's length is hashed too
        False
    """
    digest = hashlib.sha256()
    for part in (model_fingerprint, kv_format, adapter_digest, cache_salt):
        encoded = part.encode(errors="surrogatepass")  # a salt may be any string
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def block_keys(token_ids: Sequence[int], block_size: int, *, root: bytes, parent: bytes | None = None) -> list[bytes]:
    """The chained keys of the full blocks in ``token_ids``; a partial block at the end has none.

    Args:
        parent: The key of the block before, to go on from it: then ``token_ids`` begin where it ends.

    Example:
        >>> root = prefix_root("model", "float16")
        >>> whole = block_keys([1, 2, 3, 4, 5], 2, root=root)
        >>> len(whole), block_keys([3, 4], 2, root=root, parent=whole[0]) == whole[1:]
        (2, True)
    """
    num_blocks = len(token_ids) // block_size
    tokens = np.array(token_ids[: num_blocks * block_size], "<i8")
    if tokens.size and tokens.min() < 0:
        raise ValueError("block_keys: token_ids: expected known tokens, got a negative one (still in flight?)")
    data, stride = tokens.tobytes(), 8 * block_size
    keys, key = [], root if parent is None else parent
    for start in range(0, len(data), stride):
        key = hashlib.sha256(key + data[start : start + stride]).digest()
        keys.append(key)
    return keys


class PrefixCache:
    """Which blocks of one pool can be found, by which key.

    Attributes:
        queried_blocks: Blocks asked for by ``match`` and `match_pools`.
        hit_blocks: Those of them that need not be computed.

    Example:
        >>> pool = BlockPool(3)
        >>> cache = PrefixCache(pool)
        >>> keys = block_keys([7, 8, 9, 10], 2, root=b"root")
        >>> blocks = pool.allocate(2)
        >>> for block_id, key in zip(blocks, keys):
        ...     cache.publish(block_id, key)
        >>> pool.release(blocks)                            # free, and not forgotten
        >>> cache.match(keys), pool.ref_counts
        ([0, 1], [1, 1, 0])
    """

    def __init__(self, pool: BlockPool):
        if pool.on_evict is not None:
            raise ValueError("PrefixCache: pool: expected one without a cache, got one that has")
        self.pool = pool
        self.queried_blocks = 0
        self.hit_blocks = 0
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        pool.on_evict = self._evict

    def __len__(self) -> int:
        return len(self._block_of)

    def match(self, keys: Sequence[bytes], *, tail: int | None = None) -> list[int]:
        """The blocks of the longest prefix that can be served, each with one owner more: the caller.

        Args:
            keys: Of a sequence's blocks, from the first one on; leave out what must be computed in any case.
            tail: If only the last so many blocks of a prefix will be read, the earlier ones need not be here
                any more: -1 stands in their places. None: all are needed.
        """
        return match_pools([self], keys, [tail])[0]

    def publish(self, block_id: int, key: bytes) -> None:
        """The live block's contents are known and final, and this is their key.

        A key already published stays with its first block; then this one stays unknown, and is blank when freed.
        Raises ValueError if the block is free, or published under another key.
        """
        if self._key_of.get(block_id, key) != key:
            raise ValueError(f"PrefixCache.publish: block {block_id} is published under another key")
        if self.pool.ref_counts[block_id] == 0:
            raise ValueError(f"PrefixCache.publish: block {block_id} is free: publish before releasing")
        if key not in self._block_of:
            self.pool.publish(block_id)
            self._block_of[key] = block_id
            self._key_of[block_id] = key

    def clear(self) -> None:
        """Forget every key (the weights have changed). Live blocks stay with their owners."""
        self.pool.forget([*self._key_of])

    def _evict(self, block_id: int) -> None:
        del self._block_of[self._key_of.pop(block_id)]

    def _serves(self, keys: Sequence[bytes], tail: int | None) -> list[bool]:
        """For every number of blocks from 0 to all: can a prefix of so many be served?"""
        run, serves = 0, [True]
        for num_blocks, key in enumerate(keys, 1):
            run = run + 1 if key in self._block_of else 0  # known blocks in a row, this one the last
            serves.append(run >= (num_blocks if tail is None else min(tail, num_blocks)))
        return serves

    def _take(self, keys: Sequence[bytes], tail: int | None) -> list[int]:
        skipped = 0 if tail is None else max(0, len(keys) - tail)
        block_ids = [RELEASED] * skipped + [self._block_of[key] for key in keys[skipped:]]
        self.pool.share(block_ids)
        return block_ids


def match_pools(
    caches: Sequence[PrefixCache], keys: Sequence[bytes], tails: Sequence[int | None]
) -> tuple[list[int], ...]:
    """The longest prefix which every pool can serve: its blocks in each pool, equally many, as `PrefixCache.match`.

    Example:
        >>> pools = BlockPool(4), BlockPool(2)              # quantized blocks; the window's
        >>> caches = [PrefixCache(pool) for pool in pools]
        >>> keys = block_keys([1, 2, 3, 4, 5, 6], 2, root=b"root")
        >>> for block_id, key in zip(pools[0].allocate(3), keys):
        ...     caches[0].publish(block_id, key)
        >>> caches[1].publish(pools[1].allocate(1)[0], keys[1])     # only the second block's window copy is left
        >>> match_pools(caches, keys, [None, 1])
        ([0, 1], [-1, 0])
    """
    served = zip(*(cache._serves(keys, tail) for cache, tail in zip(caches, tails)))
    num_blocks = max(n for n, by_pool in enumerate(served) if all(by_pool))
    for cache in caches:
        cache.queried_blocks += len(keys)
        cache.hit_blocks += num_blocks
    return tuple(cache._take(keys[:num_blocks], tail) for cache, tail in zip(caches, tails))
