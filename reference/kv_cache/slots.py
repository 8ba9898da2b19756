"""The paged cache's data movement: write and gather tokens by slot, copy blocks, swap them out and in.

The pool is one allocation of bytes, `[num_blocks, block_bytes]`: everything a block holds, all layers, scales
included, lies in its row. Copying, swapping, coding and sharing move rows and know no format.
"""

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped
from numpy import ndarray as Array


def write_kv(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    raise NotImplementedError


def gather_kv(
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> tuple[
    Float[Array, "num_tokens num_kv_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]
]:
    """The inverse of ``write_kv``; -1 gives a row of zeros."""
    raise NotImplementedError


def copy_blocks(
    pool: Shaped[Array, "num_blocks block_bytes"],
    source_ids: Int[Array, " num_copies"],
    target_ids: Int[Array, " num_copies"],
) -> None:
    raise NotImplementedError


def swap_out(
    pool: Shaped[Array, "num_blocks block_bytes"], block_ids: Int[Array, " num_swapped"]
) -> Shaped[Array, "num_swapped block_bytes"]:
    raise NotImplementedError


def swap_in(
    rows: Shaped[Array, "num_swapped block_bytes"],
    pool: Shaped[Array, "num_blocks block_bytes"],
    block_ids: Int[Array, " num_swapped"],
) -> None:
    raise NotImplementedError
