"""dense_attention, in Triton. What the technique is for: `reference/attention/dense_attention.py`."""

from jaxtyping import Float
from torch import Tensor as Array


def dense_attention(
    q: Float[Array, "num_queries num_heads head_dim"],
    k: Float[Array, "num_keys num_kv_heads head_dim"],
    v: Float[Array, "num_keys num_kv_heads head_dim"],
    *,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_queries num_heads head_dim"] | None = None,
) -> Float[Array, "num_queries num_heads head_dim"]:
    """Same contract as `reference.attention.dense_attention.dense_attention`."""
    raise NotImplementedError("dense_attention")
