"""KIVI: keys quantized per channel over groups of tokens, values per token, and a window kept in full precision.

Every token is written to an ordinary full-precision *window* block; when the last token of a group of
``group_size`` tokens is written, the group is sealed: quantized, once, into the quantized block. Which of the two a
query reads is a matter of position alone: query i sees key j quantized if and only if j's group ends at or before
i + 1 - window. So a window block may be released once every later query is that far past it.
"""

import numpy as np
from jaxtyping import Float, Float16, Int32, Int64, UInt8
from numpy import ndarray as Array


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
    """bits = 8 * packed_head_dim / head_dim (4 or 2); group_size = block_size / groups_per_block."""
    raise NotImplementedError


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
    raise NotImplementedError
