"""What every attention op asks of its arguments."""

import math
from itertools import pairwise

from torch import Tensor

from fast._checks import (
    checking_values,
    require,
    require_float,
    require_integers,
    require_out,
    require_range,
    require_same_device,
    require_shape,
)


def require_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    logit_cap: float | None = None,
    out: Tensor | None = None,
    names: tuple[str, str] = ("k", "v"),
) -> float:
    """Queries, keys and values that fit each other, and options in range; returns the scale of the softmax.

    Keys and values may be packed or paged: their last two axes are KV heads and numbers.
    """
    require_float(op, "q", q)
    require_float(op, names[0], k)
    require_float(op, names[1], v)
    num_kv_heads, head_dim = k.shape[-2:]
    require_shape(op, "q", q, (None, None, head_dim))  # type: ignore[reportArgumentType]
    require_shape(op, names[1], v, tuple(k.shape))  # type: ignore[reportArgumentType]
    num_heads = q.shape[1]
    divides = head_dim > 0 and num_kv_heads > 0 and num_heads > 0 and num_heads % num_kv_heads == 0
    if not divides:
        require(False, op, "q", f"at least one number a head, and a multiple of {num_kv_heads} heads", list(q.shape))
    require_out(op, out, q.shape, q.dtype)
    if sinks is not None:
        require_float(op, "sinks", sinks)
        require_shape(op, "sinks", sinks, (num_heads,))  # type: ignore[reportArgumentType]
    require_same_device(op, **{"q": q, names[0]: k, names[1]: v, "sinks": sinks, "out": out})
    require(scale is None or math.isfinite(scale), op, "scale", "None or a finite number", scale)
    require(sliding_window is None or sliding_window >= 1, op, "sliding_window", "None or at least 1", sliding_window)
    require(logit_cap is None or 0 < logit_cap < math.inf, op, "logit_cap", "None or a positive number", logit_cap)
    return head_dim**-0.5 if scale is None else scale


def require_cu_seqlens(op: str, argument: str, cu_seqlens: Tensor, num_tokens: int) -> None:
    """Offsets of packed sequences; when checking values: from 0 to ``num_tokens`` and never falling."""
    require_integers(op, argument, cu_seqlens, (None,))
    require(len(cu_seqlens) > 0, op, argument, "at least one offset", list(cu_seqlens.shape))
    if checking_values():
        offsets = cu_seqlens.tolist()
        fits = offsets[0] == 0 and offsets[-1] == num_tokens and all(a <= b for a, b in pairwise(offsets))
        require(fits, op, argument, f"offsets that rise from 0 to {num_tokens}", offsets)


def require_tables(
    op: str,
    num_tokens: int,
    num_blocks: int,
    block_size: int,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    sliding_window: int | None,
) -> None:
    """Tables of a paged batch; when checking values: every token that a query sees has a block of the cache."""
    require(block_size > 0, op, "k_cache", "at least one slot a block", (num_blocks, block_size))
    require_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, num_tokens)
    num_seqs = len(cu_seqlens_q) - 1
    require_integers(op, "seq_lens", seq_lens, (num_seqs,))
    require_integers(op, "block_table", block_table, (num_seqs, None))
    if not checking_values():
        return
    require_range(op, "block_table", block_table, -1, num_blocks)
    capacity = block_table.shape[1] * block_size
    for row, seq_len, num_queries in zip(block_table.tolist(), seq_lens.tolist(), cu_seqlens_q.diff().tolist()):
        fits = seq_len == 0 or num_queries <= seq_len <= capacity
        require(fits, op, "seq_lens", f"0, or from its number of queries to {capacity}", seq_len)
        if seq_len and num_queries:
            oldest = 0 if sliding_window is None else max(0, seq_len - num_queries + 1 - sliding_window)
            seen = row[oldest // block_size : -(-seq_len // block_size)]
            require(min(seen) >= 0, op, "block_table", "a block for every token that a query sees", seen)
