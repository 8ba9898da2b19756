"""What every format of the paged cache does alike: find the slots of new tokens, and attend over what is owned."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, Int64
from numpy import ndarray as Array

from reference._checks import require, require_float, require_shape
from reference.attention._checks import require_attention
from reference.attention.paged_attention import Span, attend_spans, sequence_spans
from reference.numerics.low_precision import cast

Rows = slice | Array  # of the new tokens: which of them have a slot
Slots = tuple[Array, Array]  # (block, offset) of each of those: indexes a cache of any strides


def check_tokens(op: str, k: np.ndarray, v: np.ndarray, slot_mapping: np.ndarray) -> None:
    """Keys and values of the same tokens, and a slot for each."""
    require_shape(op, "k", k, (None, None, None))
    require_shape(op, "v", v, k.shape)
    require_float(op, "k", k)
    require_float(op, "v", v)
    require_shape(op, "slot_mapping", slot_mapping, (len(k),))


def locate(
    op: str,
    argument: str,
    slot_mapping: Int64[Array, " num_tokens"],
    cache_shape: tuple[int, ...],
    *,
    distinct: bool = True,
) -> tuple[Rows, Slots]:
    """The rows that have a slot (not -1), and where those slots are in a cache [num_blocks, block_size, ...]."""
    num_slots, block_size = cache_shape[0] * cache_shape[1], cache_shape[1]
    require(slot_mapping.dtype.kind in "iu", op, argument, "integers", slot_mapping.dtype)
    lowest, highest = slot_mapping.min(initial=0), slot_mapping.max(initial=-1)
    require(lowest >= -1 and highest < num_slots, op, argument, f"slots in [-1, {num_slots})", (lowest, highest))
    rows = slot_mapping >= 0 if lowest < 0 else slice(None)  # a slice copies nothing, and is the common case
    slots = slot_mapping[rows]
    if distinct and len(slots) > 1:
        require(len(np.unique(slots)) == len(slots), op, argument, "every slot at most once", slot_mapping.tolist())
    return rows, (slots // block_size, slots % block_size)


def as_stored(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``x`` in a cache's dtype: exact where that is wider, otherwise rounded to nearest, saturating."""
    return x.astype(dtype, copy=False) if np.can_cast(x.dtype, dtype) else cast(x, dtype.name)


def attend_dequantized(
    op: str,
    q: Float[Array, "num_tokens num_heads head_dim"],
    cache_shape: tuple[int, ...],
    read_kv: Callable[[Span], tuple[np.ndarray, np.ndarray]],
    block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    seq_lens: Int32[Array, " num_seqs"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    *,
    out: Array | None,
    **options: Any,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """`paged_attention`, with keys and values that are dequantized a sequence at a time: the pool may be large.

    Args:
        op: Who asks, for the messages.
        cache_shape: Of the cache that ``paged_attention`` would get: [num_blocks, block_size, num_kv_heads, head_dim].
        read_kv: From a span of tokens to their keys and values, in the dtype to compute in. It need not read more
            than the span, so what lies in slots that nobody owns cannot matter.
        options: ``scale``, ``sliding_window``, ``sinks`` and ``logit_cap``.
    """
    stand_in = np.broadcast_to(np.float32(0), cache_shape)  # the dequantized cache, for the checks: takes no memory
    options["scale"] = require_attention(op, q, stand_in, stand_in, names=("k_cache", "v_cache"), out=out, **options)
    tables = block_table, seq_lens, cu_seqlens_q
    spans = sequence_spans(op, len(q), cache_shape[:2], *tables, options["sliding_window"])
    return attend_spans(q, spans, read_kv, out=out, **options)
