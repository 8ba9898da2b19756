"""The attention ops in plain torch: each sequence through ``scaled_dot_product_attention`` with an explicit mask.

A sink is one more key, of zeros, whose score is the sink through the mask and whose value is 0. Only a capped score,
which that function cannot bend, is a softmax written out.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor as Array

from reference._checks import require


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
    scale = _check("dense_attention", q, k, v, 3, scale, sliding_window, sinks, logit_cap, out)
    seen = _seen(_aligned(len(q), len(k), q), _aligned(len(k), len(k), q), causal, sliding_window)
    result, _ = _attend(q, k, v, seen, scale, sinks, logit_cap)
    return _deliver(result, q.dtype, out)


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
    op = "flash_attention"
    scale = _check(op, q, k, v, 3, scale, sliding_window, sinks, logit_cap, out)
    offsets = _offsets(op, "cu_seqlens_q", cu_seqlens_q, len(q)), _offsets(op, "cu_seqlens_k", cu_seqlens_k, len(k))
    require(len(offsets[0]) == len(offsets[1]), op, "cu_seqlens_k", "as many sequences as cu_seqlens_q", offsets[1])
    states = [_empty_state(q)]
    for (first, end), (first_key, end_key) in zip(*map(pairwise, offsets)):
        positions = _aligned(end - first, end_key - first_key, q)
        seen = _seen(positions, _aligned(end_key - first_key, end_key - first_key, q), causal, sliding_window)
        keys = slice(first_key, end_key)
        states.append(_attend(q[first:end], k[keys], v[keys], seen, scale, sinks, logit_cap))
    result, lse = (torch.cat(parts) for parts in zip(*states))
    return _deliver(result, q.dtype, out), lse


def merge_states(
    out_parts: Float[Array, "num_parts num_tokens num_heads head_dim"],
    lse_parts: Float[Array, "num_parts num_tokens num_heads"],
    *,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_heads"]]:
    op = "merge_states"
    for name, array in (("out_parts", out_parts), ("lse_parts", lse_parts)):
        require(array.is_floating_point(), op, name, "a floating dtype", array.dtype)
    require(out_parts.ndim == 4 and len(out_parts) > 0, op, "out_parts", "at least one part", out_parts.shape)
    require(lse_parts.shape == out_parts.shape[:3], op, "lse_parts", "a number per row", lse_parts.shape)
    if out is not None:
        require(out.shape == out_parts.shape[1:], op, "out", f"shape {list(out_parts.shape[1:])}", out.shape)
        require(out.is_floating_point(), op, "out", "a floating dtype", out.dtype)
    lse_parts = lse_parts.to(_wide(out_parts))
    lse = lse_parts.logsumexp(0)
    weights = (lse_parts - lse).exp().nan_to_num(0.0)[..., None]  # NaN: the row of a query without keys
    merged = torch.where(weights > 0, weights * out_parts, 0.0).sum(0)
    return _deliver(merged, out_parts.dtype, out), lse


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
    op = "paged_attention"
    scale = _check(op, q, k_cache, v_cache, 4, scale, sliding_window, sinks, logit_cap, out, ("k_cache", "v_cache"))
    result, _ = _empty_state(q, len(q))
    tables = block_table, seq_lens, cu_seqlens_q
    for rows, positions, keys, slots in _sequences(op, q, k_cache, *tables, sliding_window):
        seen = _seen(positions, keys, True, sliding_window)
        result[rows], _ = _attend(q[rows], k_cache[slots], v_cache[slots], seen, scale, sinks, logit_cap)
    return _deliver(result, q.dtype, out)


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
    op = "split_paged_attention"
    scale = _check(op, q, k_cache, v_cache, 4, scale, sliding_window, None, logit_cap, None, ("k_cache", "v_cache"))
    require(split_size >= 1, op, "split_size", "at least 1", split_size)
    capacity = block_table.shape[-1] * k_cache.shape[1]
    states = [_empty_state(q, len(q)) for _ in range(max(1, math.ceil(capacity / split_size)))]
    tables = block_table, seq_lens, cu_seqlens_q
    for rows, positions, keys, slots in _sequences(op, q, k_cache, *tables, sliding_window):
        seen = _seen(positions, keys, True, sliding_window)
        for part, (out, lse) in enumerate(states):
            mine = seen & (keys // split_size == part)
            out[rows], lse[rows] = _attend(q[rows], k_cache[slots], v_cache[slots], mine, scale, None, logit_cap)
    out_parts, lse_parts = (torch.stack(parts) for parts in zip(*states))
    return out_parts, lse_parts


def _attend(
    q: Array, k: Array, v: Array, seen: Array, scale: float, sinks: Array | None, logit_cap: float | None
) -> tuple[Array, Array]:
    """Output and lse of one sequence, in float32 or float64; ``seen`` [num_queries, num_keys] is the mask."""
    wide, group = _wide(q), q.shape[1] // k.shape[1]
    q, k, v = (x.to(wide).transpose(0, 1) for x in (q, k, v))  # [heads, tokens, head_dim]
    bias = torch.zeros(seen.shape, dtype=wide, device=q.device).masked_fill(~seen, -torch.inf).expand(len(q), -1, -1)
    scores = scale * (q @ k.repeat_interleave(group, 0).transpose(1, 2))
    if logit_cap is not None:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    scores = scores + bias
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None].expand(-1, q.shape[1], 1)
        k, v, bias, scores = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), _join(bias, sink), _join(scores, sink)

    lse = scores.logsumexp(-1)
    if logit_cap is not None or scores.numel() == 0:
        out = scores.softmax(-1) @ v.repeat_interleave(group, 0)
    else:
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], bias[None], scale=scale, enable_gqa=True)[0]
    out = torch.where(lse.isneginf()[..., None], 0.0, out)  # a query without keys
    return out.transpose(0, 1), lse.transpose(0, 1)


def _seen(positions: Array, keys: Array, causal: bool, sliding_window: int | None) -> Array:
    ahead = keys[None] - positions[:, None]
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen if sliding_window is None else seen & (ahead.abs() < sliding_window)


def _sequences(
    op: str,
    q: Array,
    cache: Array,
    block_table: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    sliding_window: int | None,
) -> Iterator[tuple[slice, Array, Array, tuple[Array, Array]]]:
    """Of each sequence with something to do: rows of q, their positions, those of the keys seen, and their slots."""
    (num_blocks, block_size), offsets = cache.shape[:2], _offsets(op, "cu_seqlens_q", cu_seqlens_q, len(q))
    num_seqs = len(offsets) - 1
    require(block_size > 0, op, "k_cache", "at least one slot a block", cache.shape)
    require(tuple(seq_lens.shape) == (num_seqs,), op, "seq_lens", f"shape [{num_seqs}]", seq_lens.shape)
    shape_fits = block_table.ndim == 2 and len(block_table) == num_seqs
    require(shape_fits, op, "block_table", f"shape [{num_seqs}, *]", block_table.shape)
    for name, array in (("seq_lens", seq_lens), ("block_table", block_table)):
        require(not array.is_floating_point(), op, name, "integers", array.dtype)
    in_range = ((block_table >= -1) & (block_table < num_blocks)).all()
    require(in_range, op, "block_table", f"-1 to {num_blocks - 1}", block_table)

    for seq, ((first, end), seq_len) in enumerate(zip(pairwise(offsets), seq_lens.tolist())):
        fits = seq_len == 0 or end - first <= seq_len <= block_table.shape[1] * block_size
        require(fits, op, "seq_lens", "0, or from its number of queries to what its row can hold", seq_len)
        if seq_len == 0 or end == first:
            continue
        positions = _aligned(end - first, seq_len, q)
        oldest = 0 if sliding_window is None else max(0, seq_len - (end - first) - sliding_window + 1)
        keys = torch.arange(oldest, seq_len, device=q.device)
        blocks = block_table[seq, keys // block_size].long()
        require((blocks >= 0).all(), op, "block_table", "a block for every token that a query sees", block_table[seq])
        yield slice(first, end), positions, keys, (blocks, keys % block_size)


def _check(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    num_axes: int,
    scale: float | None,
    sliding_window: int | None,
    sinks: Array | None,
    logit_cap: float | None,
    out: Array | None,
    names: tuple[str, str] = ("k", "v"),
) -> float:
    arrays = {"q": q, names[0]: k, names[1]: v, "sinks": sinks, "out": out}
    for name, array in arrays.items():
        require(array is None or array.is_floating_point(), op, name, "a floating dtype", getattr(array, "dtype", None))
    require(k.ndim == num_axes, op, names[0], f"{num_axes} axes", k.shape)
    require(v.shape == k.shape, op, names[1], f"shape {list(k.shape)}", v.shape)
    require(q.ndim == 3 and q.shape[2] == k.shape[-1] > 0, op, "q", f"3 axes, head_dim {k.shape[-1]}", q.shape)
    fits = k.shape[-2] > 0 and q.shape[1] > 0 and q.shape[1] % k.shape[-2] == 0
    require(fits, op, "q", f"a multiple of {k.shape[-2]} heads", q.shape)
    require(sinks is None or sinks.shape == q.shape[1:2], op, "sinks", "a number per head", sinks)
    require(out is None or (out.shape == q.shape and out.dtype == q.dtype), op, "out", "the shape and dtype of q", out)
    require(scale is None or math.isfinite(scale), op, "scale", "None or a finite number", scale)
    require(sliding_window is None or sliding_window >= 1, op, "sliding_window", "None or at least 1", sliding_window)
    require(logit_cap is None or 0 < logit_cap < math.inf, op, "logit_cap", "None or a positive number", logit_cap)
    return q.shape[2] ** -0.5 if scale is None else scale


def _offsets(op: str, argument: str, cu_seqlens: Array, num_tokens: int) -> list[int]:
    require(not cu_seqlens.is_floating_point(), op, argument, "integers", cu_seqlens.dtype)
    require(cu_seqlens.ndim == 1 and len(cu_seqlens) > 0, op, argument, "one axis, at least [0]", cu_seqlens.shape)
    offsets = cu_seqlens.tolist()
    fits = offsets[0] == 0 and offsets[-1] == num_tokens and offsets == sorted(offsets)
    require(fits, op, argument, f"offsets that rise from 0 to {num_tokens}", offsets)
    return offsets


def _aligned(num_queries: int, num_keys: int, like: Array) -> Array:
    """Positions of the last ``num_queries`` of ``num_keys`` tokens."""
    return torch.arange(num_keys - num_queries, num_keys, device=like.device)


def _empty_state(q: Array, num_tokens: int = 0) -> tuple[Array, Array]:
    out = torch.zeros(num_tokens, *q.shape[1:], dtype=_wide(q), device=q.device)
    return out, torch.full_like(out[..., 0], -torch.inf)


def _join(rows: Array, column: Array) -> Array:
    return torch.cat([rows, column], -1)


def _wide(x: Array) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _deliver(result: Array, dtype: torch.dtype, out: Array | None) -> Array:
    return result.to(dtype) if out is None else out.copy_(result)
