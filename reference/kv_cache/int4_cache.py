"""A KV cache in 4 bits: groups along the head, each with a scale and a zero (the value of code 0).

value = zero + scale * code, code 0..15. With sixteen codes none may be wasted: a zero lets them span exactly the
values that occur, and a group keeps a large channel from coarsening the whole head. Scale and zero are float16: 32
bits for each group, so groups of 32 cost 5 bits a value, groups of 64 cost 4.5.

Byte j of a head holds element j in its low nibble and element j + head_dim / 2 in its high nibble, so that a kernel
can dot the halves against a query split in two.
"""

import numpy as np
from jaxtyping import Float, Float16, Int32, Int64, UInt8
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_shape
from reference.attention.paged_attention import Span, gather_tokens
from reference.kv_cache._codes import affine_codes, affine_values, groups, heads, pack, unpack
from reference.kv_cache._paging import attend_dequantized, check_tokens, locate

BITS = 4


def write_kv_int4(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads half_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads half_head_dim"],
    k_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    k_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    r"""Quantize the keys and values of new tokens to 4 bits and put codes, scales and zeros into their slots.

    .. math::
        zero_g = \lfloor \min_{d \in g} k_d \rfloor_{16} \qquad
        scale_g = \lceil (\max_{d \in g} k_d - zero_g) / 15 \rceil_{16} \qquad
        code_d = \mathrm{round}((k_d - zero_g) / scale_g) \qquad
        |k_d - (zero_g + scale_g \cdot code_d)| \le scale_g / 2

    where the brackets round down and up to a float16: the range stays covered by what is stored.

    Args:
        k: Keys of the new tokens, already rotated. Finite where the token has a slot; values beyond float16's largest,
            65504, count as that.
        v: Their values, likewise.
        k_cache: Written: two codes a byte, element j low and element j + half_head_dim high. Only the named slots
            change, here and below.
        v_cache: Written: codes of the values.
        k_scale: Written: the step of a group. Group g is elements [g * head_dim / num_groups, ...) of the head; their
            number follows from the shape. 0 where all values of the group are one float16.
        k_zero: Written: the value of code 0.
        v_scale, v_zero: Written, likewise.
        slot_mapping: ``block * block_size + offset`` of each token, no slot twice; -1 skips the token.

    Numerics: float32 (float64 for float64 ``k``), ties to even, against the scale and zero as stored.

    Raises:
        ValueError: If shapes or dtypes disagree, a slot is out of range or named twice, or a value is not finite.

    Source:
        KVQuant (Hooper et al., 2024) and KIVI (Liu et al., 2024), section 2: asymmetric quantization with
        :math:`z` = ``zero`` and :math:`s` = ``scale``; the outward rounding is ours.

    Example:
        >>> codes = [np.zeros((1, 1, 1, 2), np.uint8) for _ in "kv"]
        >>> scales_and_zeros = [np.zeros((1, 1, 1, 1), np.float16) for _ in range(4)]
        >>> k = np.array([[[-1.0, 0.0, 1.0, 2.75]]], np.float32)
        >>> write_kv_int4(k, k, *codes, *scales_and_zeros, np.array([0]))
        >>> [hex(byte) for byte in codes[0].ravel()]         # codes 0, 4, 8, 15, first half low, second half high
        ['0x80', '0xf4']
        >>> scales_and_zeros[0].item(), scales_and_zeros[1].item()
        (0.25, -1.0)
    """
    op = "write_kv_int4"
    check_tokens(op, k, v, slot_mapping)
    head_dim = _check_caches(op, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    require(k.shape[1:] == (k_cache.shape[2], head_dim), op, "k", f"heads {k_cache.shape[2], head_dim}", k.shape)
    rows, slots = locate(op, "slot_mapping", slot_mapping, k_cache.shape)
    num_groups = k_scale.shape[-1]
    k_codes, k_step, k_start = affine_codes(op, "k", groups(k[rows], num_groups), BITS, axis=-1)
    v_codes, v_step, v_start = affine_codes(op, "v", groups(v[rows], num_groups), BITS, axis=-1)
    k_cache[slots], k_scale[slots], k_zero[slots] = pack(heads(k_codes), BITS), k_step, k_start
    v_cache[slots], v_scale[slots], v_zero[slots] = pack(heads(v_codes), BITS), v_step, v_start


def paged_attention_int4(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_cache: UInt8[Array, "num_blocks block_size num_kv_heads half_head_dim"],
    v_cache: UInt8[Array, "num_blocks block_size num_kv_heads half_head_dim"],
    k_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    k_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_scale: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
    v_zero: Float16[Array, "num_blocks block_size num_kv_heads num_groups"],
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
    r"""``paged_attention`` over a 4-bit cache.

    .. math::
        out = \mathrm{paged\_attention}(q,\ k\_zero + k\_scale \cdot k\_code,\ v\_zero + v\_scale \cdot v\_code)

    Args:
        q: Queries of the new tokens, packed; their own keys and values are already in the cache.
        k_cache: Codes, as ``write_kv_int4`` wrote them. A slot that no sequence owns may hold anything.
        v_cache: Codes of the values.
        k_scale, k_zero, v_scale, v_zero: Of each token, head and group; NaN where nobody owns the slot is fine.
        block_table: The blocks of each sequence in order; -1 pads.
        seq_lens: Tokens of each sequence in the cache, the new ones included.
        cu_seqlens_q: Offsets of each sequence's queries in ``q``.
        scale, sliding_window, sinks, logit_cap, out: As in ``paged_attention``.

    Numerics: dequantized in float32 (float64 for float64 ``q``), then as ``paged_attention``. A kernel need not
    dequantize: the zero of a group enters a score as zero times the sum of the query's elements there.

    Raises:
        ValueError: If shapes or dtypes disagree, or an id is out of range.

    Example:
        >>> codes = np.full((1, 2, 1, 1), 0x31, np.uint8)    # a head of two channels: codes 1 and 3
        >>> step, start = np.full((1, 2, 1, 1), 0.5, np.float16), np.full((1, 2, 1, 1), -1, np.float16)
        >>> one, offsets = np.array([1], np.int32), np.array([0, 1], np.int32)
        >>> q, table = np.ones((1, 1, 2), np.float32), np.array([[0]], np.int32)
        >>> paged_attention_int4(q, codes, codes, step, start, step, start, table, one, offsets).tolist()
        [[[-0.5, 0.5]]]
    """
    op = "paged_attention_int4"
    head_dim = _check_caches(op, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    num_groups, dtype = k_scale.shape[-1], compute_dtype(q.dtype)

    def read(span: Span, codes: Array, scales: Array, zeros: Array) -> np.ndarray:
        codes, scales, zeros = (gather_tokens(array, span) for array in (codes, scales, zeros))
        codes = groups(unpack(codes, BITS), num_groups)
        return heads(affine_values(codes, scales[..., None], zeros[..., None], dtype))

    def read_kv(span: Span) -> tuple[np.ndarray, np.ndarray]:
        return read(span, k_cache, k_scale, k_zero), read(span, v_cache, v_scale, v_zero)

    shape = (*k_cache.shape[:3], head_dim)
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    return attend_dequantized(op, q, shape, read_kv, block_table, seq_lens, cu_seqlens_q, **options)


def _check_caches(op, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero) -> int:
    """The caches agree with each other; returns the head_dim that they are for."""
    require_shape(op, "k_cache", k_cache, (None, None, None, None))
    require_shape(op, "v_cache", v_cache, k_cache.shape)
    for argument, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(cache.dtype == np.uint8, op, argument, "uint8", cache.dtype)
    require_shape(op, "k_scale", k_scale, (*k_cache.shape[:3], None))
    for argument, array in (("k_scale", k_scale), ("k_zero", k_zero), ("v_scale", v_scale), ("v_zero", v_zero)):
        require_shape(op, argument, array, k_scale.shape)
        require(array.dtype == np.float16, op, argument, "float16", array.dtype)
    head_dim, num_groups = k_cache.shape[-1] * 8 // BITS, k_scale.shape[-1]
    divides = num_groups > 0 and head_dim % num_groups == 0
    require(divides, op, "k_scale", f"a number of groups that divides head_dim {head_dim}", num_groups)
    return head_dim
