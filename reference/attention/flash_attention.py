"""FlashAttention: attention in tiles with the online softmax, over packed sequences.

A softmax needs the largest score and the sum over all keys before the first weight is known, which seems to ask for
all scores at once. The *online* softmax does not wait: it keeps, for every query, the largest score so far, and the
sum of weights and the weighted sum of values relative to it. When a larger score comes, both sums are rescaled. So the
keys can pass by a tile at a time, and no more than ``TILE_Q * TILE_KV`` scores of a head ever exist: on a GPU they
live and die on the chip, and memory is read and written once.

Tiles that the mask hides entirely are never computed: half of them when causal, nearly all in a small window.

What this does not do: the backward pass, and being faster than `dense_attention` in NumPy, whose tiles are no nearer to
the processor than its matrices.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32
from numpy import ndarray as Array

from reference._checks import compute_dtype, deliver, require_shape
from reference.attention._checks import require_attention, require_cu_seqlens
from reference.attention.dense_attention import attention_scores, group_heads, sink_rows, ungroup_heads, visible_keys

TILE_Q = 64
TILE_KV = 64


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
    r"""`dense_attention` of each of several packed sequences, a tile of queries and a tile of keys at a time.

    With the state (top, total, acc) of a query, which starts as (-inf, 0, 0), or as (sink, 1, 0) if there is a sink,
    every tile of scores s and values v makes

    .. math::
        top' = \max(top, \max_j s_j) \qquad
        total' = e^{top - top'} total + \sum_j e^{s_j - top'} \qquad
        acc' = e^{top - top'} acc + \sum_j e^{s_j - top'} v_j

    and in the end :math:`out = acc / total`, :math:`lse = top + \log total`.

    Args:
        q: Queries, packed: those of sequence s are rows ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]``.
        k: Keys, packed likewise by ``cu_seqlens_k``; a sequence may have more or fewer of them than queries.
        v: Values of the same tokens.
        cu_seqlens_q: Offsets of each sequence's queries, from 0 to ``num_tokens``; empty sequences are fine.
        cu_seqlens_k: Offsets of each sequence's keys, from 0 to ``num_keys``.
        causal, scale, sliding_window, sinks, logit_cap: As in `dense_attention`, within each sequence.
        out: Where to write the output; may not overlap the other arguments.

    Returns:
        The output, in the dtype of ``q``, and its ``lse``: the natural logarithm of each softmax denominator, the sink
        included; float32, float64 for a float64 ``q``. A query that sees no key gives 0 and ``-inf``, or the sink.

    Numerics:
        float32 throughout, whatever the storage; float64 for a float64 ``q``.

    Raises:
        ValueError: If shapes, dtypes, offsets or options disagree with the above.

    Source:
        FlashAttention-2 (Dao, 2023), algorithm 1: :math:`m, \ell, O` are top, total and acc, :math:`L` is ``lse``,
        :math:`B_r, B_c` are TILE_Q and TILE_KV; the online softmax: Milakov and Gimelshein, 2018.

    Example:
        >>> q = k = np.zeros((3, 1, 1))
        >>> v = np.array([2.0, 4.0, 9.0]).reshape(3, 1, 1)
        >>> offsets = np.array([0, 2, 3])                    # two sequences: tokens 0 and 1, token 2
        >>> out, lse = flash_attention(q, k, v, offsets, offsets)
        >>> out.ravel().tolist(), np.exp(lse).round(4).ravel().tolist()
        ([2.0, 3.0, 9.0], [1.0, 2.0, 1.0])
    """
    op = "flash_attention"
    require_shape(op, "k", k, (None, None, None))
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    scale = require_attention(op, q, k, v, **options)
    ends_q = require_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, len(q))
    ends_k = require_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, len(k))
    require_shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)

    compute = compute_dtype(q.dtype)
    result, lse = np.zeros(q.shape, compute), np.zeros(q.shape[:2], compute)
    options = {"causal": causal, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap}
    for (first, end), (first_key, end_key) in zip(pairwise(ends_q), pairwise(ends_k)):
        k_seq, v_seq = k[first_key:end_key].astype(compute), v[first_key:end_key].astype(compute)
        last_position = end_key - first_key - 1  # of the sequence's last query, at its last key
        for tile in range(first, end, TILE_Q):
            rows = slice(tile, min(tile + TILE_Q, end))
            positions = np.arange(rows.start, rows.stop) - (end - 1) + last_position
            q_tile = q[rows].astype(compute) * compute.type(scale)
            result[rows], lse[rows] = attend_query_tile(q_tile, k_seq, v_seq, positions, **options)
    return deliver(result, q.dtype, out), lse


def attend_query_tile(
    q: Float[Array, "num_queries num_heads head_dim"],
    k: Float[Array, "num_keys num_kv_heads head_dim"],
    v: Float[Array, "num_keys num_kv_heads head_dim"],
    positions: Int[Array, " num_queries"],
    *,
    causal: bool,
    sliding_window: int | None,
    sinks: Float[Array, " num_heads"] | None,
    logit_cap: float | None,
) -> tuple[Float[Array, "num_queries num_heads head_dim"], Float[Array, "num_queries num_heads"]]:
    """What one program of a kernel does: a tile of scaled queries meets the keys of its sequence, tile by tile."""
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    rows = group_heads(q, num_kv_heads)  # one row a (query, head)
    state = empty_state(rows, -np.inf if sinks is None else sink_rows(sinks.astype(q.dtype), len(q), num_kv_heads))

    start, stop = keys_seen_by_any(positions, len(k), causal, sliding_window)
    for first in range(start // TILE_KV * TILE_KV, stop, TILE_KV):
        keys = np.arange(first, min(first + TILE_KV, len(k)))
        scores = attention_scores(rows, k[keys], logit_cap)
        seen = visible_keys(positions, keys, causal=causal, sliding_window=sliding_window)
        scores = np.where(np.repeat(seen, num_heads // num_kv_heads, axis=0), scores, -np.inf)
        state = update_state(state, scores, v[keys].swapaxes(0, 1))

    out, lse = finish_state(state)
    return ungroup_heads(out, num_heads), ungroup_heads(lse, num_heads)[..., 0]


def keys_seen_by_any(
    positions: Int[Array, " num_queries"], num_keys: int, causal: bool, sliding_window: int | None
) -> tuple[int, int]:
    """The range of keys outside which no query of the tile sees anything: tiles beyond it are skipped."""
    start, stop = 0, num_keys
    if causal:
        stop = min(stop, positions[-1] + 1)
    if sliding_window is not None:
        start = max(start, positions[0] - sliding_window + 1)
        stop = min(stop, positions[-1] + sliding_window)
    return start, stop


class SoftmaxState(NamedTuple):
    """What the online softmax remembers of the keys that have passed, for each (query, head)."""

    top: Float[Array, "num_kv_heads num_rows 1"]  # the largest score
    total: Float[Array, "num_kv_heads num_rows 1"]  # the sum of e^(score - top)
    acc: Float[Array, "num_kv_heads num_rows head_dim"]  # the sum of e^(score - top) * value


def empty_state(
    rows: Float[Array, "num_kv_heads num_rows head_dim"], sink: Float[Array, "num_kv_heads num_rows 1"] | float
) -> SoftmaxState:
    """Before any key: a sink is a key that came first and brought no value, and no sink is one of -inf."""
    lowest = np.finfo(rows.dtype).min  # in the place of -inf, because -inf - -inf would be NaN
    top = np.maximum(sink, np.full((*rows.shape[:2], 1), lowest))
    return SoftmaxState(top, np.exp(sink - top), np.zeros_like(rows))


def update_state(
    state: SoftmaxState,
    scores: Float[Array, "num_kv_heads num_rows tile_kv"],
    v: Float[Array, "num_kv_heads tile_kv head_dim"],
) -> SoftmaxState:
    """The online softmax: let one more tile of keys pass."""
    top = np.maximum(state.top, scores.max(axis=-1, keepdims=True))
    rescale = np.exp(state.top - top)  # at most 1: what the older sums are worth under the new maximum
    weights = np.exp(scores - top)
    return SoftmaxState(
        top,
        rescale * state.total + weights.sum(axis=-1, keepdims=True),
        rescale * state.acc + weights @ v,
    )


def finish_state(
    state: SoftmaxState,
) -> tuple[Float[Array, "num_kv_heads num_rows head_dim"], Float[Array, "num_kv_heads num_rows 1"]]:
    """Output and ``lse``, after the last key."""
    out = state.acc / np.maximum(state.total, 1)  # at least 1 already, the largest weight, unless there was no key
    with np.errstate(divide="ignore"):
        return out, state.top + np.log(state.total)  # log 0 = -inf
