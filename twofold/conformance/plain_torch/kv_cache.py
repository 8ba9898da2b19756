"""The KV cache's ops in plain torch.

Written from the contracts again: the quantized attentions dequantize the whole pool and leave the rest to
``paged_attention``; KIVI adds two softmax sums, one over quantized keys and one over the window's; groups are sealed,
and blocks coded, one at a time. Values in tensors are not checked: a slot out of range is skipped like -1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Float32, Int, Int8, Int32, Int64, Shaped, UInt8, UInt16
from torch import Tensor as Array

from reference._checks import require, require_shape
from twofold.conformance.plain_torch.attention import paged_attention
from twofold.conformance.plain_torch.numerics import cast

# ---- slots ------------------------------------------------------------------------------------------------------


def write_kv(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    _check_tokens("write_kv", k, v, slot_mapping)
    _check_shapes("write_kv", k_cache=(k_cache, (None, None, *k.shape[1:])), v_cache=(v_cache, k_cache.shape))
    _check_floating("write_kv", k_cache=k_cache, v_cache=v_cache)
    rows, slots = _locate("write_kv", slot_mapping, k_cache)
    k_cache[slots], v_cache[slots] = _stored(k[rows], k_cache.dtype), _stored(v[rows], v_cache.dtype)


def gather_kv(
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> tuple[Float[Array, "num_tokens num_kv_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]]:
    _check_shapes("gather_kv", k_cache=(k_cache, (None,) * 4), v_cache=(v_cache, k_cache.shape))
    _check_shapes("gather_kv", slot_mapping=(slot_mapping, (None,)))
    _check_floating("gather_kv", k_cache=k_cache, v_cache=v_cache)
    rows, slots = _locate("gather_kv", slot_mapping, k_cache)
    k = k_cache.new_zeros(len(slot_mapping), *k_cache.shape[2:])
    v = v_cache.new_zeros(len(slot_mapping), *v_cache.shape[2:])
    k[rows], v[rows] = k_cache[slots], v_cache[slots]
    return k, v


def copy_blocks(
    pool: Shaped[Array, "num_blocks block_bytes"],
    source_ids: Int[Array, " num_copies"],
    target_ids: Int[Array, " num_copies"],
) -> None:
    _check_shapes("copy_blocks", pool=(pool, (None, None)), source_ids=(source_ids, (None,)))
    _check_shapes("copy_blocks", target_ids=(target_ids, source_ids.shape))
    _check_integers("copy_blocks", source_ids=source_ids, target_ids=target_ids)
    pool[target_ids.long()] = pool[source_ids.long()]


def swap_out(
    pool: Shaped[Array, "num_blocks block_bytes"], block_ids: Int[Array, " num_swapped"]
) -> Shaped[Array, "num_swapped block_bytes"]:
    _check_shapes("swap_out", pool=(pool, (None, None)), block_ids=(block_ids, (None,)))
    _check_integers("swap_out", block_ids=block_ids)
    return pool[block_ids.long()]


def swap_in(
    rows: Shaped[Array, "num_swapped block_bytes"],
    pool: Shaped[Array, "num_blocks block_bytes"],
    block_ids: Int[Array, " num_swapped"],
) -> None:
    _check_shapes("swap_in", pool=(pool, (None, None)), block_ids=(block_ids, (None,)))
    _check_integers("swap_in", block_ids=block_ids)
    _check_shapes("swap_in", rows=(rows, (len(block_ids), pool.shape[1])))
    require(rows.dtype == pool.dtype, "swap_in", "rows", f"dtype {pool.dtype}", rows.dtype)
    pool[block_ids.long()] = rows


# ---- a scale for each token and head: int8 and fp8 --------------------------------------------------------------


def write_kv_int8(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: Int8[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Int8[Array, "num_blocks block_size num_kv_heads head_dim"],
    k_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    v_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    _check_tokens("write_kv_int8", k, v, slot_mapping)
    _check_symmetric("write_kv_int8", k_cache, v_cache, k_scale, v_scale, torch.int8, k.shape[1:])
    rows, slots = _locate("write_kv_int8", slot_mapping, k_cache)
    for x, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        ratios, scales[slots] = _symmetric(x[rows], 127.0)
        cache[slots] = ratios.round().to(torch.int8)


def paged_attention_int8(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_cache: Int8[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Int8[Array, "num_blocks block_size num_kv_heads head_dim"],
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
    _check_symmetric("paged_attention_int8", k_cache, v_cache, k_scale, v_scale, torch.int8, (None, None))
    k, v = (_wide(cache, q) * _wide(scales, q)[..., None] for cache, scales in ((k_cache, k_scale), (v_cache, v_scale)))
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    return paged_attention(q, k, v, block_table, seq_lens, cu_seqlens_q, **options)


def write_kv_fp8(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    k_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    v_scale: Float32[Array, "num_blocks block_size num_kv_heads"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    _check_tokens("write_kv_fp8", k, v, slot_mapping)
    _check_symmetric("write_kv_fp8", k_cache, v_cache, k_scale, v_scale, torch.float8_e4m3fn, k.shape[1:])
    rows, slots = _locate("write_kv_fp8", slot_mapping, k_cache)
    for x, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        ratios, scales[slots] = _symmetric(x[rows], 448.0)
        cache[slots] = ratios.clamp(-448, 448).to(torch.float8_e4m3fn)


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
    _check_symmetric("paged_attention_fp8", k_cache, v_cache, k_scale, v_scale, torch.float8_e4m3fn, (None, None))
    k, v = (_wide(cache, q) * _wide(scales, q)[..., None] for cache, scales in ((k_cache, k_scale), (v_cache, v_scale)))
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    return paged_attention(q, k, v, block_table, seq_lens, cu_seqlens_q, **options)


def _symmetric(x: Array, largest_code: float) -> tuple[Array, Array]:
    """x / scale and scale; scales that are no normal float32 are 0, and so are their ratios."""
    x = _wide(x)
    scale = (x.abs().amax(-1) / largest_code).float()
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)
    return torch.where(scale[..., None] > 0, x / scale[..., None], 0), scale


# ---- 4 bits in groups -------------------------------------------------------------------------------------------


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
    op = "write_kv_int4"
    _check_tokens(op, k, v, slot_mapping)
    _check_int4(op, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero, head_dim=k.shape[2])
    _check_shapes(op, k_cache=(k_cache, (None, None, k.shape[1], None)))
    rows, slots = _locate(op, slot_mapping, k_cache)
    for x, cache, scales, zeros in ((k, k_cache, k_scale, k_zero), (v, v_cache, v_scale, v_zero)):
        codes, scales[slots], zeros[slots] = _affine(x[rows].unflatten(-1, (scales.shape[-1], -1)), 4, dim=-1)
        cache[slots] = _pack(codes.flatten(-2), 4)


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
    _check_int4("paged_attention_int4", k_cache, v_cache, k_scale, k_zero, v_scale, v_zero, head_dim=q.shape[-1])
    k = _grouped_values(q, k_cache, k_scale, k_zero, bits=4)
    v = _grouped_values(q, v_cache, v_scale, v_zero, bits=4)
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    return paged_attention(q, k, v, block_table, seq_lens, cu_seqlens_q, **options)


def _check_int4(op: str, k_cache: Array, v_cache: Array, *scales_and_zeros: Array, head_dim: int) -> None:
    _check_shapes(op, k_cache=(k_cache, (None,) * 4), v_cache=(v_cache, k_cache.shape))
    require(2 * k_cache.shape[-1] == head_dim, op, "k_cache", f"{head_dim} / 2 bytes a head", k_cache.shape[-1])
    for argument, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(cache.dtype == torch.uint8, op, argument, "uint8", cache.dtype)
    for argument, array in zip(("k_scale", "k_zero", "v_scale", "v_zero"), scales_and_zeros):
        _check_shapes(op, **{argument: (array, (*k_cache.shape[:3], scales_and_zeros[0].shape[-1]))})
        require(array.dtype == torch.float16, op, argument, "float16", array.dtype)
        num_groups = array.shape[-1]
        require(num_groups > 0 and head_dim % num_groups == 0, op, argument, f"a divisor of {head_dim}", num_groups)


def _affine(x: Array, bits: int, dim: int) -> tuple[Array, Array, Array]:
    """Codes, scale and zero, both rounded outwards to float16."""
    levels = 2**bits - 1
    x = _wide(x).clamp(-65504, 65504)
    zero = _half_towards(x.amin(dim), -torch.inf)
    scale = _half_towards((x.amax(dim) - zero.to(x.dtype)) / levels, torch.inf)
    step = scale.to(x.dtype).unsqueeze(dim)
    steps = torch.where(step > 0, (x - zero.to(x.dtype).unsqueeze(dim)) / step, 0)
    return steps.round().clamp(0, levels).to(torch.uint8), scale, zero


def _half_towards(x: Array, end: float) -> Array:
    nearest = x.half()
    short = nearest.double() > x.double() if end < 0 else nearest.double() < x.double()
    return torch.where(short, torch.nextafter(nearest, torch.full_like(nearest, end)), nearest)


def _grouped_values(like: Array, cache: Array, scales: Array, zeros: Array, *, bits: int) -> Array:
    """zero + scale * code, groups along the head."""
    codes = _wide(_unpack(cache, bits), like).unflatten(-1, (scales.shape[-1], -1))
    return (_wide(zeros, like)[..., None] + _wide(scales, like)[..., None] * codes).flatten(-2)


def _pack(codes: Array, bits: int) -> Array:
    """Byte j: element j of each part of the head, the first in the lowest bits."""
    packed = torch.zeros_like(codes.chunk(8 // bits, dim=-1)[0])
    for part in reversed(codes.chunk(8 // bits, dim=-1)):
        packed = packed * 2**bits + part
    return packed


def _unpack(packed: Array, bits: int) -> Array:
    return torch.cat([packed // 2**shift % 2**bits for shift in range(0, 8, bits)], dim=-1)


# ---- KIVI -------------------------------------------------------------------------------------------------------


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
    op = "write_kv_kivi"
    caches = k_window, v_window, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero
    _check_tokens(op, k, v, window_slot_mapping)
    bits, group_size = _check_kivi(op, *caches)
    _check_shapes(op, k=(k, (None, *k_window.shape[2:])), slot_mapping=(slot_mapping, (len(k),)))
    rows, window_slots = _locate(op, window_slot_mapping, k_window)
    k_window[window_slots], v_window[window_slots] = _stored(k[rows], k_window.dtype), _stored(v[rows], v_window.dtype)

    written = zip(window_slots[0].tolist(), *(ids.tolist() for ids in _locate(op, slot_mapping, k_cache)[1]))
    for window_block, block, offset in written:
        if (offset + 1) % group_size:
            continue
        tokens, group = slice(offset + 1 - group_size, offset + 1), offset // group_size
        codes, k_scale[block, group], k_zero[block, group] = _affine(k_window[window_block, tokens], bits, dim=0)
        k_cache[block, tokens] = _pack(codes, bits)
        grouped = v_window[window_block, tokens].unflatten(-1, (v_scale.shape[-1], -1))
        codes, v_scale[block, tokens], v_zero[block, tokens] = _affine(grouped, bits, dim=-1)
        v_cache[block, tokens] = _pack(codes.flatten(-2), bits)


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
    op = "paged_attention_kivi"
    bits, group_size = _check_kivi(op, k_window, v_window, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    _check_shapes(op, seq_lens=(seq_lens, (None,)))
    num_seqs = len(seq_lens)
    _check_shapes(op, q=(q, (None, None, k_window.shape[-1])), cu_seqlens_q=(cu_seqlens_q, (num_seqs + 1,)))
    _check_shapes(op, block_table=(block_table, (num_seqs, None)))
    _check_shapes(op, window_block_table=(window_block_table, block_table.shape))
    require(q.shape[1] % k_window.shape[2] == 0, op, "q", f"a multiple of {k_window.shape[2]} heads", q.shape[1])
    require(window >= 0, op, "window", "at least 0", window)
    require(sliding_window is None or sliding_window >= 1, op, "sliding_window", "at least 1", sliding_window)
    _check_floating(op, q=q)
    _check_integers(op, block_table=block_table, window_block_table=window_block_table)
    _check_integers(op, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    require(int(cu_seqlens_q[-1]) == len(q), op, "cu_seqlens_q", f"offsets up to {len(q)}", int(cu_seqlens_q[-1]))
    fits = int(seq_lens.amax()) <= block_table.shape[1] * k_window.shape[1] if num_seqs else True
    require(fits, op, "block_table", "as many blocks as seq_lens asks for", tuple(block_table.shape))
    if out is not None:
        _check_shapes(op, out=(out, q.shape))
    score_scale = q.shape[-1] ** -0.5 if scale is None else scale

    k_scale, k_zero = (_wide(x, q).repeat_interleave(group_size, dim=1) for x in (k_scale, k_zero))
    k_old = k_zero + k_scale * _wide(_unpack(k_cache, bits), q)
    v_old = _grouped_values(q, v_cache, v_scale, v_zero, bits=bits)
    result = torch.zeros_like(_wide(q))
    for seq in range(num_seqs):
        rows, length = slice(int(cu_seqlens_q[seq]), int(cu_seqlens_q[seq + 1])), int(seq_lens[seq])
        num_queries = rows.stop - rows.start
        if num_queries == 0 or length == 0:
            continue
        i = torch.arange(length - num_queries, length, device=q.device)[:, None]
        j = torch.arange(length, device=q.device)
        visible = (j <= i) & (j > i - (length if sliding_window is None else sliding_window))
        is_old = (j // group_size + 1) * group_size <= i + 1 - window
        sums = []
        for sees, block_ids, k, v in (
            (visible & is_old, block_table[seq], k_old, v_old),
            (visible & ~is_old, window_block_table[seq], k_window, v_window),
        ):
            k, v = (_wide(_tokens(x, block_ids, sees.any(0)), q) for x in (k, v))
            sums.append(_softmax_sums(_wide(q[rows]), k, v, sees, score_scale, logit_cap))
        (old, old_lse), (new, new_lse) = sums
        lse = torch.logaddexp(old_lse, new_lse)
        lse = lse if sinks is None else torch.logaddexp(lse, _wide(sinks, q)[None, :, None].expand_as(lse))
        lse = lse.masked_fill(lse == -torch.inf, 0)
        result[rows] = old * (old_lse - lse).exp() + new * (new_lse - lse).exp()
    result = result.to(q.dtype)
    return result if out is None else out.copy_(result)


def _tokens(cache: Array, block_ids: Array, is_read: Array) -> Array:
    """A sequence's tokens, 0 where nobody reads them: those may be NaN, or in a block that was released."""
    tokens = cache[block_ids.clamp(min=0).long()].flatten(0, 1)[: len(is_read)]
    return torch.where(is_read[:, None, None], tokens, 0)


def _softmax_sums(
    q: Array, k: Array, v: Array, sees: Array, scale: float, logit_cap: float | None
) -> tuple[Array, Array]:
    """Attention over these keys alone, and its lse; 0 and -inf for a query that sees none."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->ihj", q, k) * scale
    scores = scores if logit_cap is None else logit_cap * torch.tanh(scores / logit_cap)
    scores = scores.masked_fill(~sees[:, None], -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0)
    return torch.einsum("ihj,jhd->ihd", weights, v), torch.logsumexp(scores, -1, keepdim=True)


def _check_kivi(op: str, k_window: Array, v_window: Array, k_cache: Array, v_cache: Array, *rest: Array):
    """Bits of a code and tokens of a group, if the shapes agree."""
    k_scale, k_zero, v_scale, v_zero = rest
    _check_shapes(op, k_window=(k_window, (None,) * 4), v_window=(v_window, k_window.shape))
    _check_floating(op, k_window=k_window, v_window=v_window)
    _, block_size, num_kv_heads, head_dim = k_window.shape
    _check_shapes(op, k_cache=(k_cache, (None, block_size, num_kv_heads, None)), v_cache=(v_cache, k_cache.shape))
    num_blocks, _, _, packed = k_cache.shape
    require(head_dim in (2 * packed, 4 * packed), op, "k_cache", "4 or 2 bits for each channel", packed)
    _check_shapes(op, k_scale=(k_scale, (num_blocks, None, num_kv_heads, head_dim)), k_zero=(k_zero, k_scale.shape))
    _check_shapes(op, v_scale=(v_scale, (num_blocks, block_size, num_kv_heads, None)), v_zero=(v_zero, v_scale.shape))
    for argument, array in zip(("k_scale", "k_zero", "v_scale", "v_zero"), rest):
        require(array.dtype == torch.float16, op, argument, "float16", array.dtype)
    for argument, array in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(array.dtype == torch.uint8, op, argument, "uint8", array.dtype)
    for argument, whole, parts in (("k_scale", block_size, k_scale.shape[1]), ("v_scale", head_dim, v_scale.shape[3])):
        require(parts > 0 and whole % parts == 0, op, argument, f"a divisor of {whole}", parts)
    return 8 * packed // head_dim, block_size // k_scale.shape[1]


# ---- lossless ---------------------------------------------------------------------------------------------------

_WORD_FORMATS = {"bfloat16": (8, 7), "float16": (5, 10)}  # bits of exponent and fraction


def encode_lossless(
    words: UInt16[Array, "num_blocks num_values"], *, format: str
) -> tuple[UInt8[Array, "num_blocks capacity"], Int64[Array, " num_blocks"]]:
    op = "encode_lossless"
    require(format in _WORD_FORMATS, op, "format", " or ".join(_WORD_FORMATS), format)
    _check_shapes(op, words=(words, (None, None)))
    require(words.dtype == torch.uint16, op, "words", "uint16", words.dtype)
    num_blocks, num_values = words.shape
    codes = torch.zeros(num_blocks, 4 + 2 * num_values, dtype=torch.uint8, device=words.device)
    sizes = torch.zeros(num_blocks, dtype=torch.int64, device=words.device)
    for block in range(num_blocks):
        coded = _encode_block(words[block].to(torch.int64), *_WORD_FORMATS[format])
        codes[block, : len(coded)], sizes[block] = coded.to(torch.uint8), len(coded)
    return codes, sizes


def decode_lossless(
    codes: UInt8[Array, "num_blocks capacity"], sizes: Int64[Array, " num_blocks"], *, num_values: int, format: str
) -> UInt16[Array, "num_blocks num_values"]:
    op = "decode_lossless"
    require(format in _WORD_FORMATS, op, "format", " or ".join(_WORD_FORMATS), format)
    _check_shapes(op, codes=(codes, (None, 4 + 2 * num_values)), sizes=(sizes, (len(codes),)))
    require(codes.dtype == torch.uint8, op, "codes", "uint8", codes.dtype)
    words = torch.zeros(len(codes), num_values, dtype=torch.int64, device=codes.device)
    for block, size in enumerate(sizes.tolist()):
        words[block] = _decode_block(codes[block, :size].to(torch.int64), num_values, *_WORD_FORMATS[format])
    return words.to(torch.uint16)


def _encode_block(words: Array, exponent_bits: int, fraction_bits: int) -> Array:
    """Every coding there is, and the first of the shortest."""
    sign, exponent = words >> 15, words >> fraction_bits & 2**exponent_bits - 1
    noise = sign << fraction_bits | words & 2**fraction_bits - 1
    noise_planes = [noise >> bit & 1 for bit in range(8, fraction_bits + 1)]
    header = torch.tensor([0, 0, 0, 0], device=words.device)
    best = torch.cat([header, torch.stack([words & 255, words >> 8], 1).flatten()])
    histogram = torch.bincount(exponent, minlength=2**exponent_bits)
    for width in range(1, exponent_bits):
        escape = 2**width - 1
        base = int(histogram.unfold(0, escape, 1).sum(1).argmax())
        code = torch.where((exponent < base) | (exponent >= base + escape), escape, exponent - base)
        planes = [_bits_to_bytes(plane) for plane in (*noise_planes, *(code >> bit & 1 for bit in range(width)))]
        header = torch.tensor([width, base, 0, 0], device=words.device)
        coded = torch.cat([header, noise & 255, *planes, exponent[code == escape]])
        best = coded if len(coded) < len(best) else best
    return best


def _decode_block(codes: Array, num_values: int, exponent_bits: int, fraction_bits: int) -> Array:
    (width, base), body = codes[:2].tolist(), codes[4:]
    if width == 0:
        low, high = body.unflatten(0, (num_values, 2)).unbind(1)
        return low | high << 8
    plane_bytes, high_bits = -(-num_values // 8), fraction_bits - 7
    noise, planes, exceptions = body.tensor_split([num_values, num_values + (high_bits + width) * plane_bytes])
    planes = [_bytes_to_bits(plane, num_values) for plane in planes.tensor_split(high_bits + width)]
    noise = noise + sum(plane << 8 + bit for bit, plane in enumerate(planes[:high_bits]))
    code = sum((plane << bit for bit, plane in enumerate(planes[high_bits:])), torch.zeros_like(noise))
    exponent = base + code
    exponent[code == 2**width - 1] = exceptions
    return noise >> fraction_bits << 15 | exponent << fraction_bits | noise & 2**fraction_bits - 1


def _bits_to_bytes(bits: Array) -> Array:
    """Eight values of 0 or 1 a byte, the first in the lowest bit."""
    bytes_of_bits = F.pad(bits, (0, -len(bits) % 8)).unflatten(0, (-1, 8))
    return (bytes_of_bits << torch.arange(8, device=bits.device)).sum(1)


def _bytes_to_bits(packed: Array, count: int) -> Array:
    return (packed[:, None] >> torch.arange(8, device=packed.device) & 1).flatten()[:count]


# ---- the door ---------------------------------------------------------------------------------------------------


def _check_shapes(op: str, **arguments: tuple[Any, tuple[int | None, ...]]) -> None:
    """Each argument has its shape; None allows any length."""
    for name, (array, shape) in arguments.items():
        require_shape(op, name, array, tuple(shape))


def _check_floating(op: str, **arguments: Array) -> None:
    for name, array in arguments.items():
        require(array.is_floating_point(), op, name, "a floating dtype", array.dtype)


def _check_integers(op: str, **arguments: Array) -> None:
    for name, array in arguments.items():
        require(array.dtype in (torch.int32, torch.int64), op, name, "integers", array.dtype)


def _check_tokens(op: str, k: Array, v: Array, slot_mapping: Array) -> None:
    _check_shapes(op, k=(k, (None,) * 3), v=(v, k.shape), slot_mapping=(slot_mapping, (len(k),)))
    _check_floating(op, k=k, v=v)


def _check_symmetric(
    op: str, k_cache: Array, v_cache: Array, k_scale: Array, v_scale: Array, codes: torch.dtype, heads: tuple
) -> None:
    shapes = {"k_scale": (k_scale, k_cache.shape[:3]), "v_scale": (v_scale, k_cache.shape[:3])}
    _check_shapes(op, k_cache=(k_cache, (None, None, *heads)), v_cache=(v_cache, k_cache.shape), **shapes)
    for argument, array in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(array.dtype == codes, op, argument, str(codes), array.dtype)
    for argument, array in (("k_scale", k_scale), ("v_scale", v_scale)):
        require(array.dtype == torch.float32, op, argument, "float32", array.dtype)


def _locate(op: str, slot_mapping: Array, cache: Array) -> tuple[Array, tuple[Array, Array]]:
    """Which rows have a slot, and the block and offset of each of those."""
    _check_integers(op, slot_mapping=slot_mapping)
    num_blocks, block_size = cache.shape[:2]
    rows = (slot_mapping >= 0) & (slot_mapping < num_blocks * block_size)
    slots = slot_mapping[rows].long()
    return rows, (slots // block_size, slots % block_size)


def _stored(x: Array, dtype: torch.dtype) -> Array:
    """In a cache's dtype: exact where that is wider, otherwise to nearest even, saturating."""
    wider = torch.promote_types(x.dtype, dtype) == dtype
    return x.to(dtype) if wider else cast(x, str(dtype).removeprefix("torch."))


def _wide(x: Array, like: Array | None = None) -> Array:
    """In the dtype to compute in: float64 for float64 (of ``like``, if given), otherwise float32."""
    return x.to(torch.float64 if (x if like is None else like).dtype == torch.float64 else torch.float32)
