"""flash_attention, in Triton. What the technique is for: `reference/attention/flash_attention.py`."""

from jaxtyping import Float, Int32
from torch import Tensor as Array


def flash_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_keys num_kv_heads head_dim"],
    v: Float[Array, "num_keys num_kv_heads head_dim"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    cu_seqlens_k: Int32[Array, " num_seqs_plus_1"],
    *,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_heads"]]:
    """Same contract as `reference.attention.flash_attention.flash_attention`."""
    raise NotImplementedError("flash_attention")
