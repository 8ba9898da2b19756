"""paged_attention, in Triton. What the technique is for: `reference/attention/paged_attention.py`."""

from jaxtyping import Float, Int32
from torch import Tensor as Array


def paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
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
    """Same contract as `reference.attention.paged_attention.paged_attention`."""
    raise NotImplementedError("paged_attention")


def split_paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    seq_lens: Int32[Array, " num_seqs"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    *,
    split_size: int,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
) -> tuple[Float[Array, "num_parts num_tokens num_heads head_dim"], Float[Array, "num_parts num_tokens num_heads"]]:
    """Same contract as `reference.attention.paged_attention.split_paged_attention`."""
    raise NotImplementedError("split_paged_attention")
