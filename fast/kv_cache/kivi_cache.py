"""kivi_cache, in Triton. What the technique is for: `reference/kv_cache/kivi_cache.py`."""

from jaxtyping import Float, Float16, Int32, Int64, UInt8
from torch import Tensor as Array


def write_kv_kivi(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    v_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    k_scale: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    k_zero: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    window_slot_mapping: Int64[Array, " num_tokens"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    """Same contract as `reference.kv_cache.kivi_cache.write_kv_kivi`."""
    raise NotImplementedError("write_kv_kivi")


def paged_attention_kivi(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    v_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    k_scale: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    k_zero: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    window_block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    seq_lens: Int32[Array, " num_seqs"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    *,
    window: int,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Same contract as `reference.kv_cache.kivi_cache.paged_attention_kivi`."""
    raise NotImplementedError("paged_attention_kivi")
