"""Attention over a paged KV cache: any mix of prefill chunks and decodes in one packed batch; split-KV decoding.

A sequence's keys and values lie in blocks scattered over the cache, and its row of the block table says where: token
t is in slot ``t % block_size`` of block ``block_ids[t // block_size]``. Attention follows the table, and is otherwise
the attention of `dense_attention`. The queries of a sequence are its last tokens: one in a decode, a chunk of the
prompt in a prefill, and the same code serves both.

Slots that no token of the sequence fills are never read, so they may hold anything, NaN included.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, Shaped
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_shape
from reference.attention._checks import require_attention, require_cu_seqlens, require_integers
from reference.attention.dense_attention import attend, visible_keys

# Queries scored at once: a prompt's scores take num_heads * TILE_Q * num_keys numbers, never num_keys squared.
TILE_Q = 64


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
    r"""Causal attention of every sequence's new tokens over its own tokens in the cache, the new ones included.

    .. math::
        out_s = \mathrm{dense\_attention}(q_s, k_s, v_s) \qquad
        k_{s,t} = k\_cache[block\_table[s, \lfloor t / block\_size \rfloor],\; t \bmod block\_size]

    for each sequence s and its tokens t < ``seq_lens[s]``; v likewise.

    Args:
        q: Queries, packed: those of sequence s are rows ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]``, and they are
            its last tokens.
        k_cache: Keys, those of the queries' own tokens already written. Any strides, any float dtype.
        v_cache: Values, likewise.
        block_table: The blocks of each sequence in order; -1 pads. Sequences may share blocks. A block may also be -1
            (released) if it lies before everything that the sliding window shows to this step's queries.
        seq_lens: Tokens of each sequence, new and cached. 0 marks a padded row: its queries, if any, give 0.
        cu_seqlens_q: Offsets of each sequence's queries, from 0 to ``num_tokens``; a sequence may have none.
        scale, sliding_window, sinks, logit_cap: As in `dense_attention`.
        out: Where to write the result; may not overlap the other arguments.

    Returns:
        The output, in the dtype of ``q``.

    Numerics:
        float32 throughout, whatever the storage; float64 for a float64 ``q``.

    Raises:
        ValueError: If shapes, dtypes or options disagree with the above, a sequence has more queries than tokens or
            more tokens than its row of the table can hold, a block id is out of range, or a block that a query sees
            is -1.

    Source:
        PagedAttention (Kwon et al., 2023), section 4.1: :math:`B` is ``block_size``, :math:`K_j, V_j` are blocks of
        the caches. Packed mixed batches with ``cu_seqlens_q``: FlashAttention's variable-length interface; chunked
        prefill: Sarathi-Serve (Agrawal et al., 2024).

    Example:
        >>> v_cache = np.array([[3.0, 9.0], [1.0, 2.0]]).reshape(2, 2, 1, 1)     # two blocks of two slots
        >>> table, lens = np.array([[1, 0]]), np.array([3])                      # one sequence: tokens 1, 2, 3
        >>> q = np.zeros((2, 1, 1))                                              # its last two, all weights equal
        >>> paged_attention(q, v_cache, v_cache, table, lens, np.array([0, 2])).ravel().tolist()
        [1.5, 2.0]
    """
    op = "paged_attention"
    require_shape(op, "k_cache", k_cache, (None, None, None, None))
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    options["scale"] = require_attention(op, q, k_cache, v_cache, names=("k_cache", "v_cache"), **options)
    spans = sequence_spans(op, len(q), k_cache.shape[:2], block_table, seq_lens, cu_seqlens_q, sliding_window)
    return attend_spans(q, spans, lambda span: (gather_tokens(k_cache, span), gather_tokens(v_cache, span)), **options)


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
    r"""Paged attention over each range of ``split_size`` tokens alone, for ``merge_states`` to put together.

    .. math::
        (out_p, lse_p) = \text{attention over tokens } p \cdot split\_size \le t < (p + 1) \, split\_size

    A decode has one query a sequence, so a long sequence alone leaves all but a few processors idle. Its keys can be
    attended to in parts, in parallel. A fixed ``split_size`` makes the parts of a sequence, and so its rounding, the
    same in whatever batch it comes.

    Args:
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q: As in ``paged_attention``.
        split_size: Tokens in a part, at least 1; need not be a multiple of the block size.
        scale, sliding_window, logit_cap: As in ``paged_attention``. There is no ``sinks``: a sink belongs to no part,
            and merges as one more, whose output is 0 and whose ``lse`` is the sink.

    Returns:
        The outputs of the parts and their ``lse`` (natural log), both float32, float64 for a float64 ``q``: a partial
        result is not rounded to the dtype of ``q``. A part that a query sees nothing of has 0 and ``-inf``. There are
        ``ceil(max_blocks_per_seq * block_size / split_size)`` parts, at least one: a number known from shapes alone.

    Raises:
        ValueError: As ``paged_attention``; if ``split_size`` is less than 1.

    Source:
        Flash-Decoding (Dao et al., 2023).

    Example:
        >>> v_cache = np.array([[3.0, 9.0], [1.0, 2.0]]).reshape(2, 2, 1, 1)     # two blocks of two slots
        >>> table, lens = np.array([[1, 0]]), np.array([3])                      # one sequence: tokens 1, 2, 3
        >>> arguments = np.zeros((1, 1, 1)), v_cache, v_cache, table, lens, np.array([0, 1])
        >>> out_parts, lse_parts = split_paged_attention(*arguments, split_size=2)
        >>> out_parts.ravel().tolist(), np.exp(lse_parts).round(4).ravel().tolist()   # of tokens 1, 2; of token 3
        ([1.5, 3.0], [2.0, 1.0])
    """
    op = "split_paged_attention"
    require_shape(op, "k_cache", k_cache, (None, None, None, None))
    options = {"scale": scale, "sliding_window": sliding_window, "logit_cap": logit_cap}
    scale = require_attention(op, q, k_cache, v_cache, names=("k_cache", "v_cache"), **options)
    require(split_size >= 1, op, "split_size", "at least 1", split_size)
    spans = sequence_spans(op, len(q), k_cache.shape[:2], block_table, seq_lens, cu_seqlens_q, sliding_window)

    num_parts = max(1, -(-block_table.shape[1] * k_cache.shape[1] // split_size))
    out_parts = np.zeros((num_parts, *q.shape), compute_dtype(q.dtype))
    lse_parts = np.full((num_parts, *q.shape[:2]), -np.inf, compute_dtype(q.dtype))
    for span in spans:
        k, v = gather_tokens(k_cache, span), gather_tokens(v_cache, span)
        for queries, keys in query_tiles(span, sliding_window):
            for part in range(keys.start // split_size, (keys.stop - 1) // split_size + 1):
                part_keys = range(max(keys.start, part * split_size), min(keys.stop, (part + 1) * split_size))
                rows = span.rows_of(queries)
                out_parts[part, rows], lse_parts[part, rows] = attend_tile(
                    q, k, v, span, queries, part_keys, scale=scale, sliding_window=sliding_window, logit_cap=logit_cap
                )
    return out_parts, lse_parts


class Span(NamedTuple):
    """One sequence's share of a step: its queries, and the tokens that any of them sees."""

    first_row: int  # of q
    num_queries: int
    seq_len: int  # the last query is token seq_len - 1
    first_key: int  # the oldest token that the first query sees
    first_block: int  # the block, counted within the sequence, that holds it
    block_ids: np.ndarray  # from that block to the last token's

    def rows_of(self, queries: range) -> slice:
        """The rows of q of the queries at these positions."""
        offset = self.first_row - (self.seq_len - self.num_queries)
        return slice(queries.start + offset, queries.stop + offset)

    def keys_of(self, positions: range) -> slice:
        """Where the tokens at these positions are in what ``gather_tokens`` gives."""
        return slice(positions.start - self.first_key, positions.stop - self.first_key)


def sequence_spans(
    op: str,
    num_tokens: int,
    cache_shape: tuple[int, ...],
    block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    seq_lens: Int32[Array, " num_seqs"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    sliding_window: int | None,
) -> list[Span]:
    """The sequences of a step that have something to compute, in order; ``cache_shape`` is (num_blocks, block_size)."""
    num_blocks, block_size = cache_shape
    require(block_size > 0, op, "k_cache", "at least one slot a block", cache_shape)
    offsets = require_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, num_tokens)
    num_seqs = len(offsets) - 1
    require_integers(op, "seq_lens", seq_lens, (num_seqs,))
    require_integers(op, "block_table", block_table, (num_seqs, None))
    lowest, highest = block_table.min(initial=-1), block_table.max(initial=-1)
    require(lowest >= -1 and highest < num_blocks, op, "block_table", f"-1 to {num_blocks - 1}", (lowest, highest))
    capacity = block_table.shape[1] * block_size

    spans = []
    for seq, seq_len in enumerate(seq_lens.tolist()):
        first_row, num_queries = offsets[seq], offsets[seq + 1] - offsets[seq]
        fits = seq_len == 0 or num_queries <= seq_len <= capacity
        require(fits, op, "seq_lens", f"0, or from its number of queries to {capacity}", seq_len)
        if seq_len == 0 or num_queries == 0:
            continue  # a padded row
        first_key = oldest_key(seq_len - num_queries, sliding_window)
        first_block = first_key // block_size
        block_ids = block_table[seq, first_block : -(-seq_len // block_size)]
        require(block_ids.min() >= 0, op, "block_table", "a block for every token that a query sees", block_ids)
        spans.append(Span(first_row, num_queries, seq_len, first_key, first_block, block_ids))
    return spans


def oldest_key(position: int, sliding_window: int | None) -> int:
    """The first token that a query at ``position`` sees."""
    return 0 if sliding_window is None else max(0, position + 1 - sliding_window)


def gather_tokens(cache: Shaped[Array, "num_blocks block_size *rest"], span: Span) -> Shaped[Array, "num_keys *rest"]:
    """The tokens of a span, end to end: its blocks, less what is not its own at either end."""
    block_size = cache.shape[1]
    tokens = cache[span.block_ids].reshape(-1, *cache.shape[2:])
    start = span.first_block * block_size
    return tokens[span.first_key - start : span.seq_len - start]


def attend_spans(
    q: Float[Array, "num_tokens num_heads head_dim"],
    spans: list[Span],
    read_kv: Callable[[Span], tuple[np.ndarray, np.ndarray]],
    *,
    scale: float,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Attention over a paged cache of any format: ``read_kv`` gives a span's keys and values as floats."""
    out = np.empty(q.shape, q.dtype) if out is None else out
    out[...] = 0  # rows of padded sequences
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap}
    for span in spans:
        k, v = read_kv(span)
        for queries, keys in query_tiles(span, sliding_window):
            out[span.rows_of(queries)], _ = attend_tile(q, k, v, span, queries, keys, **options)
    return out


def query_tiles(span: Span, sliding_window: int | None) -> Iterator[tuple[range, range]]:
    """The positions of up to ``TILE_Q`` queries at a time, and those of the keys that any of them sees."""
    for first in range(span.seq_len - span.num_queries, span.seq_len, TILE_Q):
        end = min(first + TILE_Q, span.seq_len)
        yield range(first, end), range(oldest_key(first, sliding_window), end)


def attend_tile(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_keys num_kv_heads head_dim"],
    v: Float[Array, "num_keys num_kv_heads head_dim"],
    span: Span,
    queries: range,
    keys: range,
    *,
    scale: float,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
) -> tuple[Float[Array, "num_queries num_heads head_dim"], Float[Array, "num_queries num_heads"]]:
    """Output and ``lse`` of the queries at some positions over the keys at others; k and v hold the span's tokens."""
    seen = None  # one query sees all the keys in its range
    if len(queries) > 1:
        positions = np.arange(queries.start, queries.stop), np.arange(keys.start, keys.stop)
        seen = visible_keys(*positions, sliding_window=sliding_window)
    at = span.keys_of(keys)
    return attend(q[span.rows_of(queries)], k[at], v[at], seen=seen, scale=scale, sinks=sinks, logit_cap=logit_cap)
