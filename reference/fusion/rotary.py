"""Rotary position embedding; and the one op that norms, rotates and writes a step's keys and values to the cache."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int64
from numpy import ndarray as Array


def rotary_tables(
    head_dim: int, max_positions: int, *, base: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Float32[Array, "max_positions half_dim"], Float32[Array, "max_positions half_dim"]]:
    """(cos, sin) on the host; scaling is Hugging Face's ``rope_scaling``: linear, llama3 or yarn. Not an op."""
    raise NotImplementedError


def rotary(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    cos: Float32[Array, "max_positions half_dim"],
    sin: Float32[Array, "max_positions half_dim"],
    positions: Int[Array, " num_tokens"],
    *,
    interleaved: bool = False,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]]:
    """Half-split (Llama as Hugging Face stores it) or interleaved pairs; dims past 2 * half_dim pass through."""
    raise NotImplementedError


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
    """Optional q/k norm per head, rotary, write k and v by slot; returns the rotated q. Writes k_cache, v_cache."""
    raise NotImplementedError
