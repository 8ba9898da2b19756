"""int8_cache, in Triton. What the technique is for: `reference/kv_cache/int8_cache.py`."""

import torch
from jaxtyping import Float, Float32, Int8, Int32, Int64
from torch import Tensor as Array

from fast.kv_cache._attention import attend_codes
from fast.kv_cache._codes import require_symmetric
from fast.kv_cache._symmetric import write_symmetric


def write_kv_int8(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: Int8[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Int8[Array, "num_blocks block_size num_kv_heads head_dim"],
    k_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    v_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    """Same contract as `reference.kv_cache.int8_cache.write_kv_int8`.

    Grid, moves: `fast.kv_cache._symmetric.write_symmetric`.
    """
    arrays = k, v, k_cache, v_cache, k_scale, v_scale, slot_mapping
    write_symmetric("write_kv_int8", *arrays, codes=torch.int8, largest_code=127.0)


def paged_attention_int8(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_cache: Int8[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Int8[Array, "num_blocks block_size num_kv_heads head_dim"],
    k_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    v_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    seq_lens: Int32[Array, " num_seqs"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Same contract as `reference.kv_cache.int8_cache.paged_attention_int8`.

    Grid, moves, limits: `fast.kv_cache._attention.attend_codes`.
    """
    op = "paged_attention_int8"
    require_symmetric(op, k_cache, v_cache, k_scale, v_scale, codes=torch.int8)
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    tables = block_table, seq_lens, cu_seqlens_q
    return attend_codes(op, q, k_cache, v_cache, (k_scale, v_scale), None, *tables, codes="int8", **options)
