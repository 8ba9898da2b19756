"""Attention of one sequence, all scores at once: MHA, GQA and MQA.

Every query scores every key it may see, a softmax turns the scores into weights, and the output is the weighted mean
of the values. Multi-head attention (MHA) gives every head its own keys and values; multi-query attention (MQA) shares
one set among all heads, grouped-query attention (GQA) one set per group of them, which makes the cache that much
smaller. All three are the same few lines here.

The score matrix takes ``num_heads * num_queries * num_keys`` numbers: 2 GB in float32 for 32 heads over 4096 tokens.
`flash_attention` is about never writing it down.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from reference._checks import compute_dtype, deliver, require_shape
from reference.attention._checks import require_attention


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
    r"""Softmax attention of every query over the keys it sees.

    .. math::
        out_i = \frac{\sum_j e^{s_{ij}} v_j}{e^{sink} + \sum_j e^{s_{ij}}}
        \qquad s_{ij} = scale \; q_i \cdot k_j \quad\text{or}\quad
        s_{ij} = cap \tanh \frac{scale \; q_i \cdot k_j}{cap}

    for each head, j over the keys that query i sees. The last query stands at the last key's position
    (bottom-right aligned): query i has position ``i + num_keys - num_queries``.

    Args:
        q: Queries. Head h reads KV head ``h // (num_heads // num_kv_heads)``.
        k: Keys.
        v: Values.
        causal: A query sees the keys at and before its own position; otherwise all of them.
        scale: Of the scores; ``head_dim ** -0.5`` if None.
        sliding_window: At least 1, a number of positions: a query at position p sees only keys after
            ``p - sliding_window``, so with ``causal`` it sees that many keys, its own included; without ``causal``
            as many ahead of it too: the keys before ``p + sliding_window``.
        sinks: A learned logit per head that joins the denominator and no value: a head with nothing to look at can
            look at it. It is neither scaled nor capped.
        logit_cap: Positive; bends every score smoothly into (-cap, cap), before the mask.
        out: Where to write the result; may not overlap the other arguments.

    Returns:
        The output, in the dtype of ``q``. A query that sees no key gives 0.

    Numerics:
        float32 throughout, whatever the storage; float64 for a float64 ``q``.

    Raises:
        ValueError: If shapes, dtypes or options disagree with the above.

    Source:
        Vaswani et al., 2017, section 3.2 (:math:`d_k` is ``head_dim``); MQA: Shazeer, 2019; GQA: Ainslie et al.,
        2023; sliding window: Mistral 7B (Jiang et al., 2023), section 2; ``sinks``: gpt-oss (OpenAI, 2025), after
        Xiao et al., 2023; ``logit_cap``: Gemma 2 (2024), section 2.

    Example:
        >>> q = k = np.zeros((3, 1, 2))                      # every score is 0: all weights equal
        >>> v = np.array([[[0.0, 8.0]], [[2.0, 4.0]], [[4.0, 0.0]]])
        >>> dense_attention(q, k, v)[:, 0].tolist()          # the mean of what has been seen so far
        [[0.0, 8.0], [1.0, 6.0], [2.0, 4.0]]
        >>> dense_attention(q, k, v, sliding_window=1, sinks=np.zeros(1))[:, 0].tolist()    # itself, or the sink
        [[0.0, 4.0], [1.0, 2.0], [2.0, 0.0]]
    """
    require_shape("dense_attention", "k", k, (None, None, None))
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    scale = require_attention("dense_attention", q, k, v, **options)
    positions = np.arange(len(k) - len(q), len(k))
    seen = visible_keys(positions, np.arange(len(k)), causal=causal, sliding_window=sliding_window)
    result, _ = attend(q, k, v, seen=seen, scale=scale, sinks=sinks, logit_cap=logit_cap)
    return deliver(result, q.dtype, out)


def visible_keys(
    queries: Int[Array, " num_queries"],
    keys: Int[Array, " num_keys"],
    *,
    causal: bool = True,
    sliding_window: int | None = None,
) -> Bool[Array, "num_queries num_keys"]:
    """Which keys each query sees, from the positions of both."""
    distance = queries[:, None] - keys
    seen = distance >= 0 if causal else np.ones(distance.shape, bool)
    if sliding_window is not None:
        seen &= np.abs(distance) < sliding_window
    return seen


def attend(
    q: Float[Array, "num_queries num_heads head_dim"],
    k: Float[Array, "num_keys num_kv_heads head_dim"],
    v: Float[Array, "num_keys num_kv_heads head_dim"],
    *,
    seen: Bool[Array, "num_queries num_keys"] | None = None,
    scale: float,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
) -> tuple[Float[Array, "num_queries num_heads head_dim"], Float[Array, "num_queries num_heads"]]:
    """The arithmetic of attention and nothing else: output and ``lse``, both in the compute dtype of ``q``.

    ``seen`` is None if every query sees every key.
    """
    compute = compute_dtype(q.dtype)
    k, v = k.astype(compute, copy=False), v.astype(compute, copy=False)
    num_queries, num_heads, num_kv_heads = *q.shape[:2], k.shape[1]

    rows = group_heads(q.astype(compute, copy=False) * compute.type(scale), num_kv_heads)
    scores = attention_scores(rows, k, logit_cap)
    if seen is not None:
        np.copyto(scores, -np.inf, where=~np.repeat(seen, num_heads // num_kv_heads, axis=0))

    # The largest score is subtracted, so the largest weight is 1 and nothing overflows. A row without keys subtracts
    # the lowest finite number instead of -inf, for -inf - -inf would be NaN: its weights and their total are 0.
    top = scores.max(axis=-1, keepdims=True, initial=np.finfo(compute).min)
    if sinks is not None:
        sink = sink_rows(sinks.astype(compute), num_queries, num_kv_heads)
        top = np.maximum(top, sink)
    scores -= top
    weights = np.exp(scores, out=scores)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sink - top)

    out = weights @ v.swapaxes(0, 1)
    out /= np.maximum(total, 1)  # at least 1 already, the largest weight, unless there is no key: 0 / 1
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)  # log 0 = -inf
    return ungroup_heads(out, num_heads), ungroup_heads(lse, num_heads)[..., 0]


def attention_scores(
    rows: Float[Array, "num_kv_heads num_rows head_dim"],
    k: Float[Array, "num_keys num_kv_heads head_dim"],
    logit_cap: float | None = None,
) -> Float[Array, "num_kv_heads num_rows num_keys"]:
    """Scores of grouped, scaled queries against every key, capped if asked."""
    scores = rows @ k.transpose(1, 2, 0)
    return scores if logit_cap is None else logit_cap * np.tanh(scores / logit_cap)


def group_heads(
    x: Float[Array, "num_queries num_heads size"], num_kv_heads: int
) -> Float[Array, "num_kv_heads num_rows size"]:
    """One matrix per KV head, its rows the (query, head) pairs that read it: GQA without repeating a key."""
    num_queries, num_heads, size = x.shape
    group = num_heads // num_kv_heads
    return x.reshape(num_queries, num_kv_heads, group, size).swapaxes(0, 1).reshape(num_kv_heads, -1, size)


def ungroup_heads(
    rows: Float[Array, "num_kv_heads num_rows size"], num_heads: int
) -> Float[Array, "num_queries num_heads size"]:
    """The inverse of ``group_heads``."""
    num_kv_heads, _, size = rows.shape
    return rows.reshape(num_kv_heads, -1, num_heads // num_kv_heads, size).swapaxes(0, 1).reshape(-1, num_heads, size)


def sink_rows(
    sinks: Float[Array, " num_heads"], num_queries: int, num_kv_heads: int
) -> Float[Array, "num_kv_heads num_rows 1"]:
    """The sink of each row of ``group_heads``."""
    return group_heads(np.broadcast_to(sinks[:, None], (num_queries, len(sinks), 1)), num_kv_heads)
