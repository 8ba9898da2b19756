"""Batch-invariant attention over quantized caches: a query's result has the same bits in any batch, for any chunking.

The kernel is that of `fast/attention/invariant_attention.py`, which says how it is done; what is read from a cache is
dequantized in registers. Each op has the contract and the arguments of the op of `fast` without ``_invariant``.

Grid, moves: as ``paged_attention_invariant``; of keys and values, codes and scales once for each tile of rows.
Limits: float16 and bfloat16 queries are multiplied on tensor cores, float32 ones (KIVI: and those of another dtype than
the window's) without; int4 and KIVI take two or three products for one, to have float32's precision.
"""

from typing import Any

import torch
from torch import Tensor

from fast._checks import checking_values, require, require_integers, require_same_device
from fast.attention._checks import require_attention, require_tables
from fast.attention._formats import load_affine, load_kivi, load_symmetric
from fast.attention.invariant_attention import Format, Window, attend_invariantly
from fast.kv_cache._codes import require_affine, require_symmetric
from fast.kv_cache.kivi_cache import KiviArrays, _require_arrays, _require_window_blocks


def paged_attention_int8_invariant(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, *tables: Tensor, **options: Any
) -> Tensor:
    arrays = k_cache, v_cache, k_scale, v_scale
    require_symmetric("paged_attention_int8", *arrays, codes=torch.int8)
    return _attend("paged_attention_int8", q, arrays, Format(load_symmetric), k_cache.shape[3], *tables, **options)


def paged_attention_fp8_invariant(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, *tables: Tensor, **options: Any
) -> Tensor:
    arrays = k_cache, v_cache, k_scale, v_scale
    require_symmetric("paged_attention_fp8", *arrays, codes=torch.float8_e4m3fn)
    return _attend("paged_attention_fp8", q, arrays, Format(load_symmetric), k_cache.shape[3], *tables, **options)


def paged_attention_int4_invariant(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    *tables: Tensor,
    **options: Any,
) -> Tensor:
    arrays = k_cache, v_cache, k_scale, k_zero, v_scale, v_zero
    head_dim = require_affine("paged_attention_int4", *arrays)
    format = Format(load_affine, 4, k_scale.shape[3])
    return _attend("paged_attention_int4", q, arrays, format, head_dim, *tables, **options)


def paged_attention_kivi_invariant(
    q: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    window_block_table: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    window: int,
    **options: Any,
) -> Tensor:
    op, tables = "paged_attention_kivi", (block_table, seq_lens, cu_seqlens_q)
    arrays = k_cache, v_cache, k_scale, k_zero, v_scale, v_zero
    cache = KiviArrays(k_window, v_window, *arrays)
    _require_arrays(op, cache)
    require(window >= 0, op, "window", "at least 0", window)
    format = Format(load_kivi, cache.bits, v_scale.shape[3], cache.group_size)
    young = Window(k_window, v_window, window_block_table, window)
    return _attend(op, q, arrays, format, k_window.shape[3], *tables, young=young, **options)


def _attend(
    op: str,
    q: Tensor,
    arrays: tuple[Tensor, ...],
    format: Format,
    head_dim: int,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    young: Window | None = None,
    **options: Any,
) -> Tensor:
    """The rest of the door, and the kernel; ``arrays`` have been checked against each other."""
    sliding_window = options.get("sliding_window")
    keys, values = 2 * (q.new_empty(()).expand(*arrays[0].shape[:3], head_dim),) if young is None else young[:2]
    names = ("k_cache", "v_cache") if young is None else ("k_window", "v_window")
    options["scale"] = require_attention(op, q, keys, values, names=names, **options)
    tables = block_table, seq_lens, cu_seqlens_q
    require_same_device(op, q=q, k_cache=arrays[0], block_table=block_table)
    require_tables(op, len(q), *arrays[0].shape[:2], *tables, sliding_window)
    if young is not None:
        require_integers(op, "window_block_table", young.block_table, tuple(block_table.shape))
        require_same_device(op, q=q, window_block_table=young.block_table)
        if checking_values():
            cache = KiviArrays(young.keys, young.values, *arrays)
            _require_window_blocks(op, cache, young.block_table, seq_lens, cu_seqlens_q, young.length, sliding_window)
    return attend_invariantly(q, arrays, format, *tables, young=young, **options)
