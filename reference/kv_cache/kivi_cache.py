"""KIVI: keys quantized per channel over groups of tokens, values per token, and a window kept in full precision.

A few channels of the keys are large in every token. A scale per token would be set by them and leave nothing to the
others, so keys share a scale along a channel, over a group of ``group_size`` consecutive tokens; values have no such
channels, and share one within the token. A group of keys can only be quantized once all its tokens are there, which is
why the newest tokens stay as they came: that window also happens to be what attention looks at most.

**Sealing.** Every token is written to an ordinary full-precision *window* block; when the last token of a group is
written, the group is sealed: quantized, from what the window holds, into its quantized block. Writing tokens again
(after a speculation was rejected) writes the window again, and seals a group again when its last token comes again.

**Age is positional.** Which of the two a query reads is a matter of position alone: query i sees key j quantized if
and only if j's group ends at or before i + 1 - window. So each query sees a prefix of quantized groups and the rest in
full, however the prompt was cut into chunks, and a window block may be released once every later query is that far
past it. Group g of a sequence is its tokens ``[g * group_size, (g + 1) * group_size)``; it ends where the next begins.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Int, Int32, Int64, UInt8
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_float, require_shape
from reference.attention._checks import require_attention, require_integers
from reference.attention.dense_attention import attend, visible_keys
from reference.attention.paged_attention import query_tiles, sequence_spans
from reference.kv_cache._codes import affine_codes, affine_values, groups, heads, pack, unpack
from reference.kv_cache._paging import as_stored, check_tokens, locate


class KiviArrays(NamedTuple):
    """The arrays of one layer's cache, and what follows from their shapes."""

    k_window: Array
    v_window: Array
    k_cache: Array
    v_cache: Array
    k_scale: Array
    k_zero: Array
    v_scale: Array
    v_zero: Array

    @property
    def bits(self) -> int:
        return 8 * self.k_cache.shape[-1] // self.k_window.shape[-1]

    @property
    def group_size(self) -> int:
        """Tokens of a group of keys."""
        return self.k_cache.shape[1] // self.k_scale.shape[1]


def write_kv_kivi(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    v_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    k_scale: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    k_zero: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    window_slot_mapping: Int64[Array, " num_tokens"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    r"""Write new tokens to their window slots, and seal the groups whose last token is among them.

    For the keys of a sealed group G of tokens, and for each token's group C of a value's channels,

    .. math::
        k\_zero_d = \lfloor \min_{t \in G} k_{td} \rfloor_{16} \qquad
        k\_scale_d = \lceil (\max_{t \in G} k_{td} - k\_zero_d) / (2^{bits} - 1) \rceil_{16} \qquad
        v\_zero_t = \lfloor \min_{d \in C} v_{td} \rfloor_{16} \qquad \ldots

    and a code is the rounded number of steps above its zero; the brackets round down and up to a float16, so that no
    value is further than half a step from its code.

    Everything else follows from shapes: bits = 8 * packed_head_dim / head_dim (4 or 2), group_size = block_size /
    groups_per_block for keys, head_dim / num_groups for values. A byte holds two codes of 4 bits (element j low, j +
    head_dim / 2 high), or four of 2 bits (elements j, j + head_dim / 4, j + head_dim / 2, j + 3 head_dim / 4, from its
    low bits to its high ones).

    Args:
        k: Keys of the new tokens, already rotated. Finite where the token has a slot.
        v: Their values, likewise.
        k_window: Written: the tokens as they are (as ``write_kv`` stores them). A group's earlier tokens must still be
            here when its last one is written.
        v_window: Written, likewise.
        k_cache, v_cache: Written: codes of the sealed groups. Nothing but the sealed groups changes, here and below.
        k_scale, k_zero: Written: of each channel, for a group of tokens. Beyond float16's largest, 65504, values count
            as that.
        v_scale, v_zero: Written: of each token, for a group of channels.
        window_slot_mapping: Where each token goes in the window; -1 in both mappings skips it.
        slot_mapping: Where each token's codes go, or will go when its group is sealed; at the same offset within its
            block as in the window.

    Numerics: what is quantized is what the window stored, so it does not matter in which call a token came. float32
    (float64 for a float64 window), ties to even, against the scale and zero as stored.

    Raises:
        ValueError: If shapes or dtypes disagree, a slot is out of range or named twice, the mappings skip different
            tokens or disagree about an offset, or a value is not finite (a group's earlier tokens included).

    Source:
        KIVI (Liu et al., 2024), section 3.2: :math:`G` is ``group_size``, :math:`R` the window. There the residual is
        emptied R tokens at a time, as they are computed; here age is positional.

    Example:
        >>> k_window, v_window = np.zeros((2, 1, 2, 1, 2), np.float32)      # one block of two tokens: one group
        >>> k_cache, v_cache = np.zeros((2, 1, 2, 1, 1), np.uint8)          # two channels in a byte: 4 bits
        >>> k_scale, k_zero = np.zeros((2, 1, 1, 1, 2), np.float16)
        >>> v_scale, v_zero = np.zeros((2, 1, 2, 1, 1), np.float16)
        >>> caches = k_window, v_window, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero
        >>> k = np.array([[[0.0, 100.0]], [[15.0, 130.0]]], np.float32)
        >>> write_kv_kivi(k[:1], k[:1], *caches, np.array([0]), np.array([0]))   # half a group: nothing is sealed
        >>> k_cache.ravel().tolist()
        [0, 0]
        >>> write_kv_kivi(k[1:], k[1:], *caches, np.array([1]), np.array([1]))
        >>> [hex(byte) for byte in k_cache.ravel()], k_scale.ravel().tolist(), k_zero.ravel().tolist()
        (['0x0', '0xff'], [1.0, 2.0], [0.0, 100.0])
    """
    op = "write_kv_kivi"
    cache = KiviArrays(k_window, v_window, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    check_tokens(op, k, v, window_slot_mapping)
    _check_arrays(op, cache)
    require_shape(op, "k", k, (None, *k_window.shape[2:]))
    require_shape(op, "slot_mapping", slot_mapping, (len(k),))
    rows, window_slots = locate(op, "window_slot_mapping", window_slot_mapping, k_window.shape)
    _, slots = locate(op, "slot_mapping", slot_mapping, k_cache.shape)
    alike = np.array_equal(slot_mapping < 0, window_slot_mapping < 0) and np.array_equal(slots[1], window_slots[1])
    require(alike, op, "slot_mapping", "-1 and offsets within blocks as in window_slot_mapping", slot_mapping.tolist())
    k, v = k[rows], v[rows]
    for argument, x in (("k", k), ("v", v)):
        require(np.isfinite(x).all(), op, argument, "finite values where there is a slot", "inf or NaN")

    k_window[window_slots], v_window[window_slots] = as_stored(k, k_window.dtype), as_stored(v, v_window.dtype)
    _seal(op, cache, *window_slots, slots[0])


def _seal(op: str, cache: KiviArrays, window_blocks: Array, offsets: Array, blocks: Array) -> None:
    """Quantize the groups whose last token is among those just written."""
    group_size = cache.group_size
    last = offsets % group_size == group_size - 1
    if not last.any():
        return
    window_blocks, offsets, blocks = window_blocks[last], offsets[last], blocks[last]
    of_group = blocks, offsets // group_size
    tokens = offsets[:, None] + np.arange(1 - group_size, 1)  # of each sealed group, by their offsets in the block
    in_window, of_tokens = (window_blocks[:, None], tokens), (blocks[:, None], tokens)

    codes, scale, zero = affine_codes(op, "k_window", cache.k_window[in_window], cache.bits, axis=1)
    cache.k_cache[of_tokens], cache.k_scale[of_group], cache.k_zero[of_group] = pack(codes, cache.bits), scale, zero

    values = groups(cache.v_window[in_window], cache.v_scale.shape[-1])
    codes, scale, zero = affine_codes(op, "v_window", values, cache.bits, axis=-1)
    cache.v_cache[of_tokens] = pack(heads(codes), cache.bits)
    cache.v_scale[of_tokens], cache.v_zero[of_tokens] = scale, zero


def paged_attention_kivi(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    v_window: Float[Array, "num_window_blocks block_size num_kv_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads packed_head_dim"],
    k_scale: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    k_zero: Float16[Array, "num_blocks groups_per_block num_kv_heads head_dim"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    window_block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    block_table: Int32[Array, "num_seqs max_blocks_per_seq"],
    seq_lens: Int32[Array, " num_seqs"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    *,
    window: int,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    r"""``paged_attention`` in which old keys and values are quantized and recent ones are not.

    .. math::
        out_i = \mathrm{softmax}_j(scale \; q_i \cdot k_{ij}) \, v_{ij} \qquad
        k_{ij} = \begin{cases}
            k\_zero + k\_scale \cdot k\_code_j & j < b_i \\ k\_window_j & b_i \le j \le i
        \end{cases} \qquad
        b_i = \left\lfloor \frac{\max(i + 1 - window, 0)}{group\_size} \right\rfloor group\_size

    Args:
        q: Queries of the new tokens, packed; their own keys and values are already written.
        k_window, v_window: Tokens in full precision.
        k_cache, v_cache, k_scale, k_zero, v_scale, v_zero: As ``write_kv_kivi`` wrote them. What nobody owns and what
            is not sealed yet may hold anything.
        window_block_table: The window blocks of each sequence in order; -1 where a block was released, because every
            query of this step and later is far enough past it, and as padding.
        block_table: The quantized blocks, one for every block of the sequence; -1 pads.
        seq_lens: Tokens of each sequence in the cache, the new ones included.
        cu_seqlens_q: Offsets of each sequence's queries in ``q``.
        window: Tokens, at least 0: a group is read quantized from ``window`` tokens past its end, so a query reads
            between window and window + group_size - 1 tokens in full, itself included. With 0 it reads every sealed
            group quantized. It need not be a multiple of the group size.
        scale, sliding_window, sinks, logit_cap, out: As in ``paged_attention``. A sliding window is another matter: it
            hides keys, where ``window`` only says how exactly they are read.

    Numerics: dequantized in float32 (float64 for float64 ``q``), then as ``paged_attention``.

    Raises:
        ValueError: If shapes or dtypes disagree, an id is out of range, or a block that a query reads is -1.

    Source:
        KIVI (Liu et al., 2024), section 3.2 and algorithm 1.

    Example:
        >>> k_window, v_window = np.full((2, 1, 2, 1, 2), 7.0, np.float32)
        >>> k_cache, v_cache = np.full((2, 1, 2, 1, 1), 0x21, np.uint8)     # two channels: codes 1 and 2
        >>> k_scale, k_zero = np.ones((2, 1, 1, 1, 2), np.float16)          # one group of two tokens
        >>> v_scale, v_zero = np.ones((2, 1, 2, 1, 1), np.float16)
        >>> caches = k_window, v_window, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero
        >>> table, length, offsets = (np.array(a, np.int32) for a in ([[0]], [2], [0, 1]))
        >>> q = np.zeros((1, 1, 2), np.float32)
        >>> paged_attention_kivi(q, *caches, table, table, length, offsets, window=1).tolist()   # group too young
        [[[7.0, 7.0]]]
        >>> paged_attention_kivi(q, *caches, table, table, length, offsets, window=0).tolist()   # 1 + 1 * code
        [[[2.0, 3.0]]]
    """
    op = "paged_attention_kivi"
    cache = KiviArrays(k_window, v_window, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    _check_arrays(op, cache)
    require(window >= 0, op, "window", "at least 0", window)
    options = {"sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap}
    scale = require_attention(
        op, q, k_window, v_window, names=("k_window", "v_window"), scale=scale, out=out, **options
    )
    tables = block_table, seq_lens, cu_seqlens_q
    spans = sequence_spans(op, len(q), k_cache.shape[:2], *tables, sliding_window)
    require_integers(op, "window_block_table", window_block_table, block_table.shape)
    dtype = compute_dtype(q.dtype)

    out = np.empty(q.shape, q.dtype) if out is None else out
    out[...] = 0  # rows of padded sequences
    busy = np.flatnonzero((seq_lens > 0) & (np.diff(cu_seqlens_q) > 0))  # the sequences that have a span
    for seq, span in zip(busy, spans):
        for queries, keys in query_tiles(span, sliding_window):
            positions = np.arange(queries.start, queries.stop)
            boundaries = quantized_before(positions, window, cache.group_size)
            old = np.arange(keys.start, boundaries[-1])  # quantized for the last query, and maybe for others
            new = np.arange(max(keys.start, boundaries[0]), keys.stop)  # in full for the first, and maybe for others
            k_old, v_old = _read_quantized(cache, block_table[seq], old, dtype)
            k_new, v_new = _read_window(op, cache, window_block_table[seq], new, dtype)

            # A key that is both comes twice, and each query sees one of the two.
            k, v, both = (np.concatenate(parts) for parts in ((k_old, k_new), (v_old, v_new), (old, new)))
            in_full = np.arange(len(both)) >= len(old)
            seen = visible_keys(positions, both, sliding_window=sliding_window)
            seen &= in_full == (both >= boundaries[:, None])
            rows = span.rows_of(queries)
            out[rows], _ = attend(q[rows], k, v, seen=seen, scale=scale, sinks=sinks, logit_cap=logit_cap)
    return out


def quantized_before(queries: Int[Array, " num_queries"], window: int, group_size: int) -> Int[Array, " num_queries"]:
    """The position before which a query reads keys and values quantized: the end of the last group old enough."""
    return np.maximum(queries + 1 - window, 0) // group_size * group_size


def _read_quantized(cache: KiviArrays, block_ids: Array, keys: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """Keys and values at these positions of a sequence, dequantized."""
    block_size = cache.k_cache.shape[1]
    blocks, offsets = block_ids[keys // block_size], keys % block_size
    of_token, of_group = (blocks, offsets), (blocks, offsets // cache.group_size)
    k = affine_values(
        unpack(cache.k_cache[of_token], cache.bits), cache.k_scale[of_group], cache.k_zero[of_group], dtype
    )

    v_scale, v_zero = cache.v_scale[of_token][..., None], cache.v_zero[of_token][..., None]
    v_codes = groups(unpack(cache.v_cache[of_token], cache.bits), cache.v_scale.shape[-1])
    return k, heads(affine_values(v_codes, v_scale, v_zero, dtype))


def _read_window(op: str, cache: KiviArrays, block_ids: Array, keys: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """Keys and values at these positions of a sequence, as they were written."""
    num_blocks, block_size = cache.k_window.shape[:2]
    blocks = block_ids[keys // block_size]
    inside = blocks.min(initial=0) >= 0 and blocks.max(initial=-1) < num_blocks
    wanted = f"a block in [0, {num_blocks}) for every token that a query reads in full"
    require(inside, op, "window_block_table", wanted, block_ids.tolist())
    slots = blocks, keys % block_size
    return cache.k_window[slots].astype(dtype), cache.v_window[slots].astype(dtype)


def _check_arrays(op: str, cache: KiviArrays) -> None:
    """The arrays agree with each other."""
    require_shape(op, "k_window", cache.k_window, (None, None, None, None))
    _, block_size, num_kv_heads, head_dim = cache.k_window.shape
    require_shape(op, "k_cache", cache.k_cache, (None, block_size, num_kv_heads, None))
    num_blocks, _, _, packed_head_dim = cache.k_cache.shape
    fits = head_dim in (2 * packed_head_dim, 4 * packed_head_dim)
    require(fits, op, "k_cache", f"half or a quarter of head_dim {head_dim} in bytes", packed_head_dim)
    require_shape(op, "k_scale", cache.k_scale, (num_blocks, None, num_kv_heads, head_dim))
    require_shape(op, "v_scale", cache.v_scale, (num_blocks, block_size, num_kv_heads, None))
    for first, second in (
        ("k_window", "v_window"),
        ("k_cache", "v_cache"),
        ("k_scale", "k_zero"),
        ("v_scale", "v_zero"),
    ):
        require_shape(op, second, getattr(cache, second), getattr(cache, first).shape)

    for argument, array in cache._asdict().items():
        if argument.endswith("_window"):
            require_float(op, argument, array)
        else:
            dtype = "uint8" if argument.endswith("_cache") else "float16"
            require(array.dtype == dtype, op, argument, dtype, array.dtype)
    for argument, whole in (("k_scale", block_size), ("v_scale", head_dim)):
        parts = getattr(cache, argument).shape[1 if argument == "k_scale" else 3]
        divides = parts > 0 and whole % parts == 0
        require(divides, op, argument, f"a number of groups that divides {whole}", parts)
