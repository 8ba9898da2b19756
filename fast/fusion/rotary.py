"""rotary, in Triton. What the technique is for: `reference/fusion/rotary.py`."""

from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor as Array


def rotary(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    cos: Float32[Array, "max_positions half_dim"],
    sin: Float32[Array, "max_positions half_dim"],
    positions: Int[Array, " num_tokens"],
    *,
    interleaved: bool = False,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]]:
    """Same contract as `reference.fusion.rotary.rotary`."""
    raise NotImplementedError("rotary")


def rotary_write_kv(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    cos: Float32[Array, "max_positions half_dim"],
    sin: Float32[Array, "max_positions half_dim"],
    positions: Int[Array, " num_tokens"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
    *,
    q_norm: Float[Array, " head_dim"] | None = None,
    k_norm: Float[Array, " head_dim"] | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Same contract as `reference.fusion.rotary.rotary_write_kv`."""
    raise NotImplementedError("rotary_write_kv")
