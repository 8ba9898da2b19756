"""A KV cache in fp8 (e4m3fn), one scale per token and head.

As large as `int8_cache`, with the codes spent otherwise: int8's are evenly spaced, so a small channel beside a large
one has few of them to choose from; e4m3 keeps four significant bits down to 1/28672 of the largest value. So fp8 is
the better one for rows with outliers, int8 for rows without.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int32, Int64
from numpy import ndarray as Array

from reference._checks import compute_dtype
from reference.attention.paged_attention import Span, gather_tokens
from reference.kv_cache._codes import check_symmetric_caches, symmetric_ratios, symmetric_values
from reference.kv_cache._paging import attend_dequantized, check_tokens, locate
from reference.numerics.low_precision import cast

LARGEST_CODE = 448.0  # of e4m3fn
CODE_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # by bit pattern


def write_kv_fp8(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    k_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    v_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    r"""Round the keys and values of new tokens to fp8 and put codes and scales into their slots.

    .. math::
        k\_scale = \max_d |k_d| / 448 \qquad code_d = \mathrm{e4m3}(k_d / k\_scale) \qquad
        |k_d - k\_scale \cdot code_d| \le \max(2^{-4} |k_d|,\ 2^{-10} k\_scale)

    Args:
        k: Keys of the new tokens, already rotated. Finite where the token has a slot.
        v: Their values, likewise.
        k_cache: Written: codes of the keys, float8_e4m3fn. Only the named slots change, here and below.
        v_cache: Written: codes of the values.
        k_scale: Written: what a code of the same token and head is multiplied by. A row of zeros, or one so small that
            its scale would not be a normal float32, has scale 0 and codes 0.
        v_scale: Written, likewise.
        slot_mapping: ``block * block_size + offset`` of each token, no slot twice; -1 skips the token.

    Numerics: float32 (float64 for float64 ``k``), then nearest even, subnormals kept, saturating.

    Raises:
        ValueError: If shapes or dtypes disagree, a slot is out of range or named twice, or a value is not finite.

    Source:
        FP8 Formats for Deep Learning (Micikevicius et al., 2022), section 3.1: e4m3 and the scale that fills its range.

    Example:
        >>> caches = [np.zeros((1, 2, 1, 3), ml_dtypes.float8_e4m3fn) for _ in "kv"]
        >>> scales = [np.zeros((1, 2, 1), np.float32) for _ in "kv"]
        >>> k = np.array([[[44.8, -6.4, 0.01]]], np.float32)
        >>> write_kv_fp8(k, 10 * k, *caches, *scales, np.array([1]))
        >>> caches[0][0, 1, 0].astype(float).tolist(), round(float(scales[0][0, 1, 0]), 3)
        ([448.0, -64.0, 0.1015625], 0.1)
    """
    op = "write_kv_fp8"
    check_tokens(op, k, v, slot_mapping)
    codes = ml_dtypes.float8_e4m3fn
    check_symmetric_caches(op, k_cache, v_cache, k_scale, v_scale, codes=codes, heads=k.shape[1:])
    rows, slots = locate(op, "slot_mapping", slot_mapping, k_cache.shape)
    k_ratios, k_steps = symmetric_ratios(op, "k", k[rows], LARGEST_CODE)
    v_ratios, v_steps = symmetric_ratios(op, "v", v[rows], LARGEST_CODE)
    k_cache[slots], k_scale[slots] = cast(k_ratios, "float8_e4m3fn"), k_steps
    v_cache[slots], v_scale[slots] = cast(v_ratios, "float8_e4m3fn"), v_steps


def paged_attention_fp8(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    k_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    v_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
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
    r"""``paged_attention`` over an fp8 cache.

    .. math::
        out = \mathrm{paged\_attention}(q,\ k\_scale \cdot k\_cache,\ v\_scale \cdot v\_cache)

    Args:
        q: Queries of the new tokens, packed; their own keys and values are already in the cache.
        k_cache: Codes, as ``write_kv_fp8`` wrote them. A slot that no sequence owns may hold anything, NaN included.
        v_cache: Codes of the values.
        k_scale: The scale of each token and head; NaN where nobody owns the slot is fine.
        v_scale: Likewise.
        block_table: The blocks of each sequence in order; -1 pads.
        seq_lens: Tokens of each sequence in the cache, the new ones included.
        cu_seqlens_q: Offsets of each sequence's queries in ``q``.
        scale, sliding_window, sinks, logit_cap, out: As in ``paged_attention``.

    Numerics: dequantized in float32 (float64 for float64 ``q``), then as ``paged_attention``.

    Raises:
        ValueError: If shapes or dtypes disagree, or an id is out of range.

    Example:
        >>> codes = np.full((1, 2, 1, 1), 448.0, ml_dtypes.float8_e4m3fn)
        >>> scales = np.array([[[0.5], [np.nan]]], np.float32)
        >>> one, offsets = np.array([1], np.int32), np.array([0, 1], np.int32)
        >>> q = np.ones((1, 1, 1), np.float32)               # one token is owned: attention returns its value
        >>> paged_attention_fp8(q, codes, codes, scales, scales, np.array([[0]], np.int32), one, offsets).item()
        224.0
    """
    op = "paged_attention_fp8"
    check_symmetric_caches(op, k_cache, v_cache, k_scale, v_scale, codes=ml_dtypes.float8_e4m3fn)
    dtype = compute_dtype(q.dtype)

    def read(span: Span, cache: Array, scales: Array) -> np.ndarray:
        patterns = gather_tokens(cache, span).view(np.uint8)  # looking 256 values up is faster than converting
        return symmetric_values(CODE_VALUES[patterns], gather_tokens(scales, span), dtype)

    def read_kv(span: Span) -> tuple[np.ndarray, np.ndarray]:
        return read(span, k_cache, k_scale), read(span, v_cache, v_scale)

    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    return attend_dequantized(op, q, k_cache.shape, read_kv, block_table, seq_lens, cu_seqlens_q, **options)
