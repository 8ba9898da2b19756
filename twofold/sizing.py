"""How large the KV cache's pools are, and how long a sequence may get in them."""

from dataclasses import dataclass
from typing import Any

from reference.batching.config import EngineConfig
from reference.kv_cache.cache import KVCache, KVFormat, block_bytes, bytes_per_token, resolve_format
from reference.model.config import ModelConfig
from twofold.errors import TwofoldError

DEFAULT_BYTES = 256 << 20  # of the pool, if nobody says
LARGEST_DEFAULT_BYTES = 1 << 30  # ... unless one sequence of full length takes more, and no more than this


@dataclass(frozen=True)
class PoolSizes:
    """The format, the blocks of each pool, and the longest sequence."""

    format: KVFormat
    dtype: str
    block_size: int
    num_blocks: int
    num_window_blocks: int
    max_model_len: int

    def cache(self, config: ModelConfig, *, backend: Any, device: str | None) -> KVCache:
        """The cache of these sizes."""
        return KVCache(
            self.format,
            **_shape(config),
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            num_window_blocks=self.num_window_blocks,
            dtype=self.dtype,
            backend=backend,
            device=device,
        )

    def engine_config(self, config: ModelConfig, **settings: Any) -> EngineConfig:
        """The engine's, with what follows from the sizes and the model filled in."""
        slides = all(config.layer_window(layer) is not None for layer in range(config.num_layers))
        return EngineConfig(
            num_blocks=self.num_blocks,
            num_window_blocks=self.num_window_blocks,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            kv_cache_dtype=self.format.name,
            kv_window=self.format.window,
            sliding_window=config.sliding_window if slides else None,
            **settings,
        )


def pool_sizes(
    config: ModelConfig,
    kv_cache_dtype: str,
    dtype: str,
    *,
    block_size: int,
    num_blocks: int | None,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    lookahead: int,
    kv_window: int | None = None,
) -> PoolSizes:
    """The sizes asked for, checked; and those nobody asked for, chosen.

    Raises:
        TwofoldError: If a number is out of its range, or the longest sequence asked for does not fit.
    """
    for name, value in (
        ("block size", block_size),
        ("number of blocks", num_blocks),
        ("longest sequence (--max-model-len)", max_model_len),
        ("number of sequences (--max-num-seqs)", max_num_seqs),
        ("token budget (--max-num-batched-tokens)", max_num_batched_tokens),
    ):
        if value is not None and value < 1:
            raise TwofoldError(f"the {name} is {value}; it must be at least 1")
    context = config.max_position_embeddings
    if max_model_len is not None and max_model_len > context:
        raise TwofoldError(f"--max-model-len {max_model_len}: the model was made for {context} tokens at most")
    try:
        format = resolve_format(kv_cache_dtype, dtype).with_window(kv_window)
        sizes = block_bytes(format, **_shape(config), block_size=block_size, dtype=dtype)
    except ValueError as error:
        raise TwofoldError(str(error)) from None
    wanted = max_model_len or context
    if num_blocks is None:
        whole = -(-wanted // block_size)
        affordable = max(DEFAULT_BYTES // sizes[0], 1)
        num_blocks = max(affordable, whole if whole * sizes[0] <= LARGEST_DEFAULT_BYTES else 0)
    held = num_blocks * block_size
    if max_model_len is not None and max_model_len > held:
        raise TwofoldError(
            f"--max-model-len {max_model_len}: the pool of {num_blocks} blocks of {block_size} tokens holds {held}; "
            f"give --num-blocks {-(-max_model_len // block_size)} or more"
        )
    window_blocks = format.window_blocks(
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        lookahead=lookahead,
    )
    return PoolSizes(format, dtype, block_size, num_blocks, window_blocks, min(wanted, held))


def kv_bytes_per_token(
    config: ModelConfig, kv_cache_dtype: str, *, block_size: int = 16, dtype: str = "float32"
) -> float:
    """Bytes of KV cache that one token of this model takes, all layers together."""
    return bytes_per_token(kv_cache_dtype, **_shape(config), block_size=block_size, dtype=dtype)


def _shape(config: ModelConfig) -> dict[str, int]:
    return {"num_layers": config.num_layers, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
