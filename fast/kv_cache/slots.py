"""slots, in Triton. What the technique is for: `reference/kv_cache/slots.py`."""

from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor as Array


def write_kv(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    """Same contract as `reference.kv_cache.slots.write_kv`."""
    raise NotImplementedError("write_kv")


def gather_kv(
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> tuple[Float[Array, "num_tokens num_kv_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]]:
    """Same contract as `reference.kv_cache.slots.gather_kv`."""
    raise NotImplementedError("gather_kv")


def copy_blocks(
    pool: Shaped[Array, "num_blocks block_bytes"],
    source_ids: Int[Array, " num_copies"],
    target_ids: Int[Array, " num_copies"],
) -> None:
    """Same contract as `reference.kv_cache.slots.copy_blocks`."""
    raise NotImplementedError("copy_blocks")


def swap_out(
    pool: Shaped[Array, "num_blocks block_bytes"], block_ids: Int[Array, " num_swapped"]
) -> Shaped[Array, "num_swapped block_bytes"]:
    """Same contract as `reference.kv_cache.slots.swap_out`."""
    raise NotImplementedError("swap_out")


def swap_in(
    rows: Shaped[Array, "num_swapped block_bytes"],
    pool: Shaped[Array, "num_blocks block_bytes"],
    block_ids: Int[Array, " num_swapped"],
) -> None:
    """Same contract as `reference.kv_cache.slots.swap_in`."""
    raise NotImplementedError("swap_in")
