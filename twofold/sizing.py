"""What fits into memory: the model, the KV cache's pools, and how long a sequence may get in them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from reference.batching.config import EngineConfig
from reference.kv_cache.cache import KV_FORMATS, KVCache, KVFormat, block_bytes, bytes_per_token, resolve_format
from reference.linear.weight import WEIGHT_FORMATS, weight_format
from reference.model.config import ModelConfig
from reference.model.decoder import AdapterBank, Decoder
from twofold.errors import TwofoldError

DEFAULT_BYTES = 256 << 20  # of the pool, if nobody says
LARGEST_DEFAULT_BYTES = 1 << 30  # ... unless one sequence of full length takes more, and no more than this


@dataclass(frozen=True)
class PoolSizes:
    """The format, the blocks of each pool, and the longest sequence.

    Attributes:
        block_bytes: Of a block of each pool.
        longest: A sequence as anybody may want it, where the pool holds it.
    """

    format: KVFormat
    dtype: str
    block_size: int
    num_blocks: int
    num_window_blocks: int
    block_bytes: tuple[int, ...]
    longest: int

    @property
    def max_model_len(self) -> int:
        """The longest sequence that the pool holds."""
        return min(self.longest, self.num_blocks * self.block_size)

    @property
    def num_bytes(self) -> int:
        """Of the pools."""
        return sum(n * size for n, size in zip((self.num_blocks, self.num_window_blocks), self.block_bytes))

    def filling(self, num_bytes: int) -> "PoolSizes":
        """As many blocks as fit into so many bytes beside the window's pool; none may fit."""
        num_blocks = (num_bytes - replace(self, num_blocks=0).num_bytes) // self.block_bytes[0]
        return replace(self, num_blocks=max(num_blocks, 0))

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
    if max_model_len is not None and max_model_len > num_blocks * block_size:
        raise TwofoldError(
            f"--max-model-len {max_model_len}: the pool of {num_blocks} blocks of {block_size} tokens holds "
            f"{num_blocks * block_size}; give --num-blocks {-(-max_model_len // block_size)} or more"
        )
    window_blocks = format.window_blocks(
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        lookahead=lookahead,
    )
    return PoolSizes(format, dtype, block_size, num_blocks, window_blocks, sizes, wanted)


def weight_bytes(config: ModelConfig, weights: str, dtype: str) -> int:
    """Bytes of a model's weights in a format; the embedding and the head are kept in ``dtype`` by a quantized one."""
    bits, plain = weight_format(dtype if weights == "auto" else weights), weight_format(dtype)
    total = 0.0
    for name, shape in config.expected_tensors().items():
        is_table = name.startswith(("model.embed", "lm_head"))
        total += math.prod(shape) * (plain if len(shape) == 1 or (is_table and not bits.is_float) else bits).bits / 8
    return round(total)


def require_room(
    config: ModelConfig, weights: str, sizes: PoolSizes, *, free: int, weights_take: int | None = None
) -> None:
    """The weights and the pools must fit into the ``free`` bytes of a device.

    Args:
        weights_take: What the weights take, if they are kept as they come.

    Raises:
        TwofoldError: How large they are, and which formats would fit.
    """
    take = weight_bytes(config, weights, sizes.dtype) if weights_take is None else weights_take
    if take + sizes.num_bytes <= free:
        return
    options = [
        f"--weights {name}"
        for name in WEIGHT_FORMATS
        if name != "float32" and weight_bytes(config, name, sizes.dtype) + sizes.num_bytes <= free
    ]
    for name in KV_FORMATS:
        pools = block_bytes(name, **_shape(config), block_size=sizes.block_size, dtype=sizes.dtype)
        if take + replace(sizes, block_bytes=pools).num_bytes <= free:
            options.append(f"--kv-cache-dtype {name}")
    advice = f"{', '.join(options)} would fit" if options else "no format of weights or of the KV cache would fit"
    raise TwofoldError(
        f"the weights take {_gb(take)} and the KV cache {_gb(sizes.num_bytes)}, and the GPU has {_gb(free)} for them; "
        + advice
    )


def fill_room(
    sizes: PoolSizes,
    weights: str,
    decoder: Decoder,
    adapters: AdapterBank,
    make_runner: Callable[..., Any],
    room: Callable[[], int],
    *,
    num_tokens: int,
) -> PoolSizes:
    """As many blocks as there is room for beside the weights and a step of ``num_tokens``, which is tried out.

    Args:
        sizes: The fewest blocks that are wanted.
        make_runner: From a decoder and a cache to a runner that can tell ``bytes_of_a_step``.
        room: Gives the bytes that are free.

    Raises:
        TwofoldError: If there is no room for the fewest.
    """
    config = decoder.config
    cache = replace(sizes, num_blocks=1).cache(config, backend=decoder.backend, device=decoder.device)
    runner = make_runner(decoder, cache, adapters=adapters)
    step = runner.bytes_of_a_step(num_tokens, -(-sizes.longest // sizes.block_size))
    del runner, cache
    left = room() - step
    require_room(config, weights, sizes, free=left + decoder.nbytes, weights_take=decoder.nbytes)
    return sizes.filling(left)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def kv_bytes_per_token(
    config: ModelConfig, kv_cache_dtype: str, *, block_size: int = 16, dtype: str = "float32"
) -> float:
    """Bytes of KV cache that one token of this model takes, all layers together."""
    return bytes_per_token(kv_cache_dtype, **_shape(config), block_size=block_size, dtype=dtype)


def _shape(config: ModelConfig) -> dict[str, int]:
    return {"num_layers": config.num_layers, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
