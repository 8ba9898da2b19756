"""Prefix sharing: full blocks found again by the hash of everything before them, least recently used evicted."""

from collections.abc import Iterable, Sequence

from reference.kv_cache.block_pool import BlockPool


def prefix_root(model_fingerprint: str, kv_format: str, adapter_digest: str = "", cache_salt: str = "") -> bytes: ...


def block_keys(token_ids: Sequence[int], block_size: int, *, root: bytes, parent: bytes | None = None) -> list[bytes]:
    """SHA-256 chain over full blocks of tokens. ``parent``: the key of the block before, to go on from it."""


class PrefixCache:
    def __init__(self, pool: BlockPool): ...

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of known keys, each shared once more with the caller."""

    def publish(self, block_id: int, key: bytes) -> None:
        """The block's contents are known and final. A key already published stays with its first block."""
