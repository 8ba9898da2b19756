"""LoRA: many low-rank adapters in one batch, in Triton. What the technique is for: `reference/linear/lora.py`.

Two launches: x shrinks to A x, of the rank's length, and B (A x) is added to the base. A batch that decodes with a few
adapters shrinks all of its tokens with every one of them, and each token keeps what its own adapter made: what is read
then hangs on no id, so that all of it is under way at once, and the tensor cores' tiles are as high whether they are
filled or not. To expand, each adapter counts its own tokens while the others still shrink, so that its rows are read
and multiplied once, and by no one else. With many adapters, or few tokens, each token looks up its own. Where tokens
are many, a tile of them goes through the adapters that it finds in it, in the order of their ids. None of them sorts,
and no grid depends on an id.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32
from torch import Tensor as Array
from triton.tools.tensor_descriptor import TensorDescriptor

from fast._checks import require_float, require_integers, require_out, require_range, require_same_device, require_shape
from fast._triton.overlap import overlapped
from fast._triton.platform import cdiv, next_power_of_2, num_processors
from fast._triton.rounding import dot, store, to_dtype, to_float32
from fast.linear._skinny import prefetch, whole_rows
from fast.linear._split import describable
from reference.linear.lora import num_layers

FEW_TOKENS = 256  # up to here every token reads its adapter itself, from the L2 cache if others use it too
SPLIT = 512  # input features of a program that shrinks: 64 tokens of 4096 features are 512 programs
MAX_SPLITS = 16
TILE_T = 64  # tokens that a program goes through at once, where all of them shrink together, or they are many
TOGETHER_TOKENS = 4  # for each adapter there is, at the least, for all tokens to shrink together
MOST_RANK = 64  # of the adapters then: what shared memory holds
TOGETHER_SPLITS = 8  # programs that share out the input features there: 16 adapters are 128 programs
TOGETHER_I = 128  # input features of a step
MOST_COLUMNS = 1 << 30  # of a tile that nothing limits
TILE_O = 256  # output features of a program that expands
PICKED = 8  # tokens of an adapter that it takes at a time, where they were shrunk together
LINE = tl.constexpr(64)  # numbers of 16 bits that a prefetch brings to the L2 cache


# ---- kernels for few tokens -----------------------------------------------------------------------------------------


@triton.jit
def wait_for_base(OVERLAP: tl.constexpr):
    """Until what is older has ended, and only then lets the kernel that expands come: so it may read all of that."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _shrink_together_kernel(
    x_desc,  # [num_tokens, in_features] in tiles of [TILE_T, TILE_I]
    lora_a_desc,  # [num_adapters * rank, in_features] in tiles of [TILE_R, TILE_I]; the rank of all layers together
    adapter_ids_ptr,  # [num_tokens]
    shrunk_ptr,  # [num_tokens, num_splits, rank] float32
    num_tokens,
    rank,
    in_features,
    split_features,
    TILE_T: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_I: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One adapter, a tile of tokens, a part of the input features. Another adapter's NaN reach no token."""
    wait_for_base(OVERLAP)
    this, split, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * TILE_T
    token, r = first + tl.arange(0, TILE_T), tl.arange(0, TILE_R)
    adapter = tl.load(adapter_ids_ptr + token, mask=token < num_tokens, other=-1)
    start = split * split_features
    acc = tl.zeros([TILE_T, TILE_R], tl.float32)
    for i in tl.range(start, tl.minimum(start + split_features, in_features), TILE_I, num_stages=STAGES):
        x = x_desc.load([first, i])
        a = lora_a_desc.load([this * rank, i])  # past the rank: the next adapter's rows, which are not stored
        acc = dot(x, tl.trans(a), acc)
    pointers = shrunk_ptr + (token.to(tl.int64) * tl.num_programs(1) + split)[:, None] * rank + r[None, :]
    tl.store(pointers, acc, mask=(adapter == this)[:, None] & (r < rank)[None, :])


@triton.jit
def _shrink_kernel(
    x_ptr,  # [num_tokens, in_features]
    lora_a_ptr,  # [num_adapters, rank, in_features]
    adapter_ids_ptr,  # [num_tokens]
    shrunk_ptr,  # [num_tokens, num_splits, rank] float32
    stride_x_t,
    stride_a_n,
    stride_a_r,
    num_adapters,
    rank,
    in_features,
    split_features,
    TILE_R: tl.constexpr,
    TILE_I: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_base(OVERLAP)
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    adapter = tl.load(adapter_ids_ptr + token).to(tl.int64)
    if (adapter >= 0) & (adapter < num_adapters):
        r = tl.arange(0, TILE_R)
        stop = tl.minimum((split + 1) * split_features, in_features)
        acc = tl.zeros([TILE_R, TILE_I], tl.float32)
        for start in range(split * split_features, stop, TILE_I):
            i = start + tl.arange(0, TILE_I)
            x = tl.load(x_ptr + token * stride_x_t + i, mask=i < stop, other=0.0).to(tl.float32)
            pointers = lora_a_ptr + adapter * stride_a_n + r[:, None] * stride_a_r + i[None, :]
            a = tl.load(pointers, mask=(r < rank)[:, None] & (i < stop)[None, :], other=0.0)
            acc += a.to(tl.float32) * x[None, :]
        pointers = shrunk_ptr + (token * tl.num_programs(1) + split) * rank + r
        tl.store(pointers, tl.sum(acc, axis=1), mask=r < rank)


@triton.jit
def first_rank(o, rank, second, third):
    """Where, in a token's shrunk row, the numbers stand for the layer that output feature ``o`` belongs to."""
    return ((o >= second).to(tl.int32) + (o >= third).to(tl.int32)) * rank


@triton.jit
def _expand_kernel(
    base_ptr,  # [num_tokens, out_features]
    shrunk_ptr,  # [num_tokens, num_splits, all_ranks] float32
    lora_b_ptr,  # [num_adapters, out_features, rank]
    scaling_ptr,  # [num_adapters]
    adapter_ids_ptr,  # [num_tokens]
    out_ptr,  # [num_tokens, out_features], may be base
    stride_base_t,
    stride_b_n,
    stride_b_o,
    stride_out_t,
    stride_out_o,
    num_adapters,
    rank,
    all_ranks,
    out_features,
    second,
    third,
    TILE_R: tl.constexpr,
    TILE_O: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    in_row = o < out_features
    own_rows = first_rank(tl.program_id(1) * TILE_O, rank, second, third)
    base = tl.load(base_ptr + token * stride_base_t + o, mask=in_row, other=0.0)
    out_ptrs = out_ptr + token * stride_out_t + o.to(tl.int64) * stride_out_o
    adapter = tl.load(adapter_ids_ptr + token).to(tl.int64)
    if (adapter >= 0) & (adapter < num_adapters):
        r = tl.arange(0, TILE_R)
        pointers = lora_b_ptr + adapter * stride_b_n + o[:, None] * stride_b_o + r[None, :]
        b = tl.load(pointers, mask=in_row[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
        scaling = tl.load(scaling_ptr + adapter).to(tl.float32)
        if OVERLAP:
            tl.extra.cuda.gdc_wait()  # what is read above is older than the kernel that shrinks
        shrunk = tl.zeros([TILE_R], tl.float32)
        for split in tl.static_range(NUM_SPLITS):
            row_ptr = shrunk_ptr + (token * NUM_SPLITS + split) * all_ranks + own_rows
            shrunk += tl.load(row_ptr + r, mask=r < rank, other=0.0)
        grown = tl.sum(b * shrunk[None, :], axis=1)
        store(out_ptrs, base.to(tl.float32) + scaling * grown, in_row)
    else:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()  # whoever comes after this kernel is to find the other one ended, too
        tl.store(out_ptrs, base, mask=in_row)


@triton.jit
def in_two(x, DTYPE: tl.constexpr):
    """Rows of float32 as ``unit * (whole + rest)``, of 16 bits each: a product of both loses none that a result keeps.

    The unit is a power of two, such that a row's largest number is 2^14 to 2^15 of them: in float16 that is not too
    large, and what is 2^16 times smaller not too small.
    """
    exponent = tl.max(x.to(tl.uint32, bitcast=True) & 0x7F800000, axis=1).to(tl.int32)
    unit = tl.maximum(exponent, 15 << 23) - (14 << 23)  # a normal number, and so is its inverse
    x = x * ((254 << 23) - unit).to(tl.float32, bitcast=True)[:, None]
    whole = to_dtype(x, DTYPE)
    return whole, to_dtype(x - to_float32(whole), DTYPE), unit.to(tl.float32, bitcast=True)


@triton.jit
def _expand_together_kernel(
    base_ptr,  # [num_tokens, out_features]
    shrunk_ptr,  # [num_tokens, num_splits, all_ranks] float32
    lora_b_ptr,  # [num_adapters, out_features, rank]
    scaling_ptr,  # [num_adapters]
    adapter_ids_ptr,  # [num_tokens]
    out_ptr,  # [num_tokens, out_features], may be base
    stride_base_t,
    stride_b_n,
    stride_b_o,
    stride_out_t,
    stride_out_o,
    num_tokens,
    num_adapters,
    rank,
    all_ranks,
    out_features,
    second,
    third,
    TILE_T: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_O: tl.constexpr,
    PICKED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One adapter, a tile of output features, its own tokens a few at a time. After the last one: those without.

    All but what was shrunk is asked for early: it is older than the kernel that shrinks.
    """
    this, start = tl.program_id(0), tl.program_id(1) * TILE_O
    o, r, t = start + tl.arange(0, TILE_O), tl.arange(0, TILE_R), tl.arange(0, TILE_T)
    in_row, in_rank, is_adapter = o < out_features, r < rank, this < num_adapters
    b_ptr = lora_b_ptr + tl.minimum(this, num_adapters - 1).to(tl.int64) * stride_b_n
    if OVERLAP:  # before it is known whether any token wants them
        asked = start + tl.arange(0, TILE_O * TILE_R // LINE) * (LINE // TILE_R)
        prefetch(b_ptr + tl.minimum(asked, out_features - 1) * stride_b_o)
    scaling = tl.load(scaling_ptr + this, mask=is_adapter).to(tl.float32)
    adapter = tl.load(adapter_ids_ptr + t, mask=t < num_tokens)
    adapter = tl.where((adapter >= 0) & (adapter < num_adapters), adapter, num_adapters)
    count = tl.cumsum(((adapter == this) & (t < num_tokens)).to(tl.int32), axis=0)[None, :]
    own_rows = first_rank(start, rank, second, third)
    for first in tl.range(0, tl.max(count), PICKED, num_stages=1):  # pipelined, it would read before it waits
        wanted = first + 1 + tl.arange(0, PICKED)[:, None]
        token = tl.sum((count < wanted).to(tl.int32), axis=1)[:, None]  # as many as come before the one wanted
        is_there = token < TILE_T
        mask = is_there & in_row[None, :]
        base = tl.load(base_ptr + token.to(tl.int64) * stride_base_t + o[None, :], mask=mask)
        b_ptrs = b_ptr + o[:, None] * stride_b_o + r[None, :]
        b = tl.load(b_ptrs, mask=in_row[:, None] & in_rank[None, :], other=0.0)
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        shrunk = tl.zeros([PICKED, TILE_R], tl.float32)
        for split in tl.static_range(NUM_SPLITS):
            row_ptrs = shrunk_ptr + (token * NUM_SPLITS + split) * all_ranks + own_rows
            shrunk += tl.load(row_ptrs + r[None, :], mask=is_there & in_rank[None, :], other=0.0)
        whole, rest, unit = in_two(shrunk, b.dtype)
        grown = dot(b, tl.trans(whole), dot(b, tl.trans(rest), tl.zeros([TILE_O, PICKED], tl.float32)))
        y = base.to(tl.float32) + (scaling * unit)[:, None] * tl.trans(grown)
        y = tl.where(is_adapter, to_dtype(y, out_ptr.dtype.element_ty), base)
        out_ptrs = out_ptr + token.to(tl.int64) * stride_out_t + o.to(tl.int64)[None, :] * stride_out_o
        tl.store(out_ptrs, y, mask=mask)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # whoever comes after this kernel is to find the other one ended, too


# ---- kernels for many tokens ----------------------------------------------------------------------------------------


@triton.jit
def next_adapter(adapter, previous, num_adapters):
    """The smallest id in the tile above ``previous``; ``num_adapters`` or more if no adapter is there."""
    return tl.min(tl.where(adapter > previous, adapter, num_adapters), axis=0)


@triton.jit
def _shrink_tiles_kernel(
    x_ptr,  # [num_tokens, in_features]
    lora_a_ptr,  # [num_adapters, rank, in_features]
    adapter_ids_ptr,  # [num_tokens]
    shrunk_ptr,  # [num_tokens, num_splits, rank] float32
    stride_x_t,
    stride_a_n,
    stride_a_r,
    num_tokens,
    num_adapters,
    rank,
    in_features,
    split_features,
    DTYPE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_I: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    adapter = tl.load(adapter_ids_ptr + token, mask=token < num_tokens, other=-1)
    r = tl.arange(0, TILE_R)
    first = tl.program_id(1) * split_features
    stop = tl.minimum(first + split_features, in_features)
    row = (token * tl.num_programs(1) + tl.program_id(1))[:, None] * rank
    this = next_adapter(adapter, -1, num_adapters)
    while this < num_adapters:
        mine = adapter == this
        a_ptrs = lora_a_ptr + this.to(tl.int64) * stride_a_n + r[:, None] * stride_a_r
        acc = tl.zeros([TILE_T, TILE_R], tl.float32)
        for start in range(first, stop, TILE_I):
            i = start + tl.arange(0, TILE_I)[None, :]
            mask = mine[:, None] & (i < stop)
            x = tl.load(x_ptr + token[:, None] * stride_x_t + i, mask=mask, other=0.0)
            a = tl.load(a_ptrs + i, mask=(r < rank)[:, None] & (i < stop), other=0.0)
            acc = dot(x.to(DTYPE), tl.trans(a.to(DTYPE)), acc)
        tl.store(shrunk_ptr + row + r[None, :], acc, mask=mine[:, None] & (r < rank)[None, :])
        this = next_adapter(adapter, this, num_adapters)


@triton.jit
def _expand_tiles_kernel(
    base_ptr,  # [num_tokens, out_features]
    shrunk_ptr,  # [num_tokens, num_splits, rank] float32
    lora_b_ptr,  # [num_adapters, out_features, rank]
    scaling_ptr,  # [num_adapters]
    adapter_ids_ptr,  # [num_tokens]
    out_ptr,  # [num_tokens, out_features], may be base
    stride_base_t,
    stride_b_n,
    stride_b_o,
    stride_out_t,
    stride_out_o,
    num_tokens,
    num_adapters,
    rank,
    all_ranks,
    out_features,
    second,
    third,
    num_splits,
    DTYPE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_O: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    in_batch, in_row = token < num_tokens, o < out_features
    adapter = tl.load(adapter_ids_ptr + token, mask=in_batch, other=-1)
    base_ptrs = base_ptr + token[:, None] * stride_base_t + o[None, :]
    out_ptrs = out_ptr + token[:, None] * stride_out_t + o.to(tl.int64)[None, :] * stride_out_o
    without = (in_batch & ((adapter < 0) | (adapter >= num_adapters)))[:, None] & in_row[None, :]
    tl.store(out_ptrs, tl.load(base_ptrs, mask=without, other=0.0), mask=without)
    r = tl.arange(0, TILE_R)
    own_rows = first_rank(tl.program_id(1) * TILE_O, rank, second, third)
    this = next_adapter(adapter, -1, num_adapters)
    while this < num_adapters:
        mine = adapter == this
        mask = mine[:, None] & in_row[None, :]
        shrunk_mask = mine[:, None] & (r < rank)[None, :]
        shrunk = tl.zeros([TILE_T, TILE_R], tl.float32)
        for split in range(num_splits):
            row = (token * num_splits + split)[:, None] * all_ranks + own_rows
            shrunk += tl.load(shrunk_ptr + row + r[None, :], mask=shrunk_mask, other=0.0)
        b_ptrs = lora_b_ptr + this.to(tl.int64) * stride_b_n + o[:, None] * stride_b_o + r[None, :]
        b = tl.load(b_ptrs, mask=in_row[:, None] & (r < rank)[None, :], other=0.0)
        grown = dot(to_dtype(shrunk, DTYPE), tl.trans(b.to(DTYPE)), tl.zeros([TILE_T, TILE_O], tl.float32))
        base = tl.load(base_ptrs, mask=mask, other=0.0).to(tl.float32)
        store(out_ptrs, base + tl.load(scaling_ptr + this).to(tl.float32) * grown, mask)
        this = next_adapter(adapter, this, num_adapters)


# ---- the op ---------------------------------------------------------------------------------------------------------


def lora(
    base: Float[Array, "num_tokens out_features"],
    x: Float[Array, "num_tokens in_features"],
    lora_a: Float[Array, "num_adapters all_ranks in_features"],
    lora_b: Float[Array, "num_adapters out_features max_rank"],
    scaling: Float32[Array, " num_adapters"],
    adapter_ids: Int32[Array, " num_tokens"],
    *,
    widths: Sequence[int] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.lora.lora`.

    Grid: up to ``FEW_TOKENS`` tokens, to shrink, one program per adapter and share of the input features; with fewer
    than ``TOGETHER_TOKENS`` tokens for each adapter, one per token and ``SPLIT`` input features. To expand, one per
    adapter (of 16 bits, after they shrank all together) or token, and tile of output features. Beyond that, tiles of
    ``TILE_T`` tokens take the place of a token.
    Moves: all adapters once from memory, or those in use (again from the L2 cache for each program); base and x once.
    Limits: beyond ``FEW_TOKENS``, ``A x`` is rounded to the dtype of ``lora_b`` where that is the dtype of ``base``.
    More than three layers side by side, or such whose widths 16 does not divide, have launches of their own.
    """
    out = _door(base, x, lora_a, lora_b, scaling, adapter_ids, widths, out)
    if not out.numel():
        return out
    sides = side_by_side(widths, out.shape[1])
    if sides is None:
        return _one_by_one(lora, base, x, lora_a, lora_b, scaling, adapter_ids, widths, out)
    base, x, lora_a, lora_b = map(whole_rows, (base, x, lora_a, lora_b))
    kind = choose(len(base), len(lora_a), x.dtype == lora_a.dtype != torch.float32 and is_described(x, lora_a))
    kernel = {"together": together, "few": few_tokens, "many": many_tokens}[kind]
    return kernel(base, x, lora_a, lora_b, scaling, adapter_ids.contiguous(), sides, out)


def lora_invariant(
    base: Array,
    x: Array,
    lora_a: Array,
    lora_b: Array,
    scaling: Array,
    adapter_ids: Array,
    *,
    widths: Sequence[int] | None = None,
    out: Array | None = None,
) -> Array:
    """`lora` of which no token's result depends on how many others there are: always each token by itself."""
    out = _door(base, x, lora_a, lora_b, scaling, adapter_ids, widths, out)
    if not out.numel():
        return out
    sides = side_by_side(widths, out.shape[1])
    if sides is None:
        return _one_by_one(lora_invariant, base, x, lora_a, lora_b, scaling, adapter_ids, widths, out)
    return few_tokens(*map(whole_rows, (base, x, lora_a, lora_b)), scaling, adapter_ids.contiguous(), sides, out)


class Sides(NamedTuple):
    """Up to three layers side by side: where the second and the third begin, and a tile that crosses no border."""

    second: int
    third: int
    widest_tile: int


def side_by_side(widths: Sequence[int] | None, out_features: int) -> Sides | None:
    """None for layers that a launch of its own each suits better.

    Example:
        >>> side_by_side((4096, 1024, 1024), 6144), side_by_side((40, 8), 48)
        (Sides(second=4096, third=5120, widest_tile=1024), None)
    """
    starts = [*accumulate(widths or ())][:-1]
    second, third = (*starts, out_features, out_features)[:2]
    border = gcd(*starts)
    widest_tile = border & -border if border else MOST_COLUMNS
    return Sides(second, third, widest_tile) if len(starts) <= 2 and widest_tile >= 16 else None


def _one_by_one(
    op: Callable[..., Array],
    base: Array,
    x: Array,
    lora_a: Array,
    lora_b: Array,
    scaling: Array,
    adapter_ids: Array,
    widths: Sequence[int] | None,
    out: Array,
) -> Array:
    rank, end = lora_b.shape[2], 0
    for layer, width in enumerate(widths or ()):
        rows, columns = slice(layer * rank, (layer + 1) * rank), slice(end, end + width)
        end += width
        op(base[:, columns], x, lora_a[:, rows], lora_b[:, columns], scaling, adapter_ids, out=out[:, columns])
    return out


def choose(num_tokens: int, num_adapters: int, is_described: bool) -> str:
    """Which kernels: all tokens shrink "together", with every adapter; "few", each with its own; or "many".

    Example:
        >>> [choose(n, 16, True) for n in (1, 64, 4096)], choose(64, 1000, True)
        (['few', 'together', 'many'], 'few')
    """
    if num_tokens > FEW_TOKENS:
        return "many"
    return "together" if is_described and num_tokens >= TOGETHER_TOKENS * num_adapters else "few"


def is_described(x: Array, lora_a: Array) -> bool:
    """Whether the copy engine reads tokens, and all adapters, narrow enough, as one matrix."""
    narrow = 0 < lora_a.shape[1] <= MOST_RANK and x.shape[1] > 0
    return narrow and lora_a.is_contiguous() and describable(x, lora_a.flatten(0, 1))


def together(
    base: Array, x: Array, lora_a: Array, lora_b: Array, scaling: Array, adapter_ids: Array, sides: Sides, out: Array
) -> Array:
    """``A x`` of every token with every adapter, of which its own is kept."""
    num_tokens, (num_adapters, rank, in_features) = len(x), lora_a.shape
    split = cdiv(cdiv(in_features, TOGETHER_SPLITS), TOGETHER_I) * TOGETHER_I
    num_splits = cdiv(in_features, split)
    shrunk = torch.empty(num_tokens, num_splits, rank, dtype=torch.float32, device=x.device)
    tile_t, tile_r = min(TILE_T, max(16, next_power_of_2(num_tokens))), max(16, next_power_of_2(rank))
    _shrink_together_kernel[(num_adapters, num_splits, cdiv(num_tokens, tile_t))](
        TensorDescriptor.from_tensor(x, [tile_t, TOGETHER_I]),
        TensorDescriptor.from_tensor(lora_a.flatten(0, 1), [tile_r, TOGETHER_I]),
        adapter_ids, shrunk, num_tokens, rank, in_features, split,
        TILE_T=tile_t, TILE_R=tile_r, TILE_I=TOGETHER_I, STAGES=4, num_warps=4, **overlapped(x),
    )  # fmt: skip
    grow = expand_together if expands_together(base, lora_b) else expand
    return grow(base, shrunk, lora_b, scaling, adapter_ids, sides, out)


def few_tokens(
    base: Array, x: Array, lora_a: Array, lora_b: Array, scaling: Array, adapter_ids: Array, sides: Sides, out: Array
) -> Array:
    """``A x`` of every token by itself."""
    num_tokens, (num_adapters, rank, in_features) = len(x), lora_a.shape
    split, num_splits = split_features(in_features)
    shrunk = torch.empty(num_tokens, num_splits, rank, dtype=torch.float32, device=x.device)
    tile_r = next_power_of_2(max(1, rank))
    tile_i = max(16, min(SPLIT, 8192 // tile_r, next_power_of_2(in_features)))
    _shrink_kernel[(num_tokens, num_splits)](
        x, lora_a, adapter_ids, shrunk, x.stride(0), lora_a.stride(0), lora_a.stride(1),
        num_adapters, rank, in_features, split, TILE_R=tile_r, TILE_I=tile_i, num_warps=4, **overlapped(x),
    )  # fmt: skip
    return expand(base, shrunk, lora_b, scaling, adapter_ids, sides, out)


def split_features(in_features: int) -> tuple[int, int]:
    """Input features of a program that shrinks, and how many there are: the order of a sum hangs on nothing else."""
    split = max(SPLIT, next_power_of_2(cdiv(in_features, MAX_SPLITS)))
    return split, max(1, cdiv(in_features, split))


def expand(
    base: Array, shrunk: Array, lora_b: Array, scaling: Array, adapter_ids: Array, sides: Sides, out: Array
) -> Array:
    """``base`` plus ``scaling`` times B times the sum of the parts of ``A x``, token by token."""
    (num_tokens, num_splits, all_ranks), (num_adapters, out_features, rank) = shrunk.shape, lora_b.shape
    tile_r = next_power_of_2(max(1, rank))
    tile_o = feature_tile(tile_r, out_features, sides)
    _expand_kernel[(num_tokens, cdiv(out_features, tile_o))](
        base, shrunk, lora_b, scaling, adapter_ids, out,
        base.stride(0), lora_b.stride(0), lora_b.stride(1), out.stride(0), out.stride(1),
        num_adapters, rank, all_ranks, out_features, sides.second, sides.third,
        TILE_R=tile_r, TILE_O=tile_o, NUM_SPLITS=num_splits, num_warps=4, **overlapped(base),
    )  # fmt: skip
    return out


def expands_together(base: Array, lora_b: Array) -> bool:
    """Whether all is in 16 bits, and a program for each adapter and tile of its rows is one for every processor."""
    programs = len(lora_b) * cdiv(lora_b.shape[1], TILE_O)
    return torch.float32 not in (base.dtype, lora_b.dtype) and programs >= num_processors(base)


def expand_together(
    base: Array, shrunk: Array, lora_b: Array, scaling: Array, adapter_ids: Array, sides: Sides, out: Array
) -> Array:
    """`expand`, adapter by adapter: each one's rows are read once, for all of its tokens."""
    (num_tokens, num_splits, all_ranks), (num_adapters, out_features, rank) = shrunk.shape, lora_b.shape
    tile_r = max(16, next_power_of_2(rank))
    tile_o = feature_tile(tile_r, out_features, sides)
    _expand_together_kernel[(num_adapters + 1, cdiv(out_features, tile_o))](
        base, shrunk, lora_b, scaling, adapter_ids, out,
        base.stride(0), lora_b.stride(0), lora_b.stride(1), out.stride(0), out.stride(1),
        num_tokens, num_adapters, rank, all_ranks, out_features, sides.second, sides.third,
        TILE_T=next_power_of_2(num_tokens), TILE_R=tile_r, TILE_O=tile_o, PICKED=PICKED,
        NUM_SPLITS=num_splits, num_warps=4, **overlapped(base),
    )  # fmt: skip
    return out


def feature_tile(tile_r: int, out_features: int, sides: Sides) -> int:
    """Output features of a program that expands: as many as its registers hold, across no border."""
    return max(16, min(TILE_O, 4096 // tile_r, next_power_of_2(out_features), sides.widest_tile))


def many_tokens(
    base: Array, x: Array, lora_a: Array, lora_b: Array, scaling: Array, adapter_ids: Array, sides: Sides, out: Array
) -> Array:
    """Tiles of tokens, each through the adapters that are in it."""
    num_tokens, (num_adapters, all_ranks, in_features) = len(x), lora_a.shape
    half, half_b = _halves(base, x, lora_a, lora_b)
    split, num_splits = split_features(in_features)
    shrunk = torch.empty(num_tokens, num_splits, all_ranks, dtype=torch.float32, device=x.device)
    _shrink_tiles_kernel[(cdiv(num_tokens, TILE_T), num_splits)](
        x, lora_a, adapter_ids, shrunk, x.stride(0), lora_a.stride(0), lora_a.stride(1),
        num_tokens, num_adapters, all_ranks, in_features, split,
        DTYPE=half, TILE_T=TILE_T, TILE_R=max(16, next_power_of_2(all_ranks)), TILE_I=32 if half == tl.float32 else 128,
        num_warps=8 if half == tl.float32 else 4,
    )  # fmt: skip
    out_features, rank = lora_b.shape[1:]
    tile_o = min(64 if half_b == tl.float32 else 128, sides.widest_tile)
    _expand_tiles_kernel[(cdiv(num_tokens, TILE_T), cdiv(out_features, tile_o))](
        base, shrunk, lora_b, scaling, adapter_ids, out,
        base.stride(0), lora_b.stride(0), lora_b.stride(1), out.stride(0), out.stride(1),
        num_tokens, num_adapters, rank, all_ranks, out_features, sides.second, sides.third, num_splits,
        DTYPE=half_b,
        TILE_T=TILE_T, TILE_R=max(16, next_power_of_2(rank)), TILE_O=tile_o, num_warps=4,
    )  # fmt: skip
    return out


def _door(
    base: Array,
    x: Array,
    lora_a: Array,
    lora_b: Array,
    scaling: Array,
    adapter_ids: Array,
    widths: Sequence[int] | None,
    out: Array | None,
) -> Array:
    require_shape("lora", "base", base, (None, None))
    require_shape("lora", "x", x, (len(base), None))
    require_shape("lora", "lora_a", lora_a, (None, None, x.shape[1]))
    rank = lora_a.shape[1] // num_layers(widths, base.shape[1], lora_a.shape[1])
    require_shape("lora", "lora_b", lora_b, (len(lora_a), base.shape[1], rank))
    require_shape("lora", "scaling", scaling, (len(lora_a),))
    require_integers("lora", "adapter_ids", adapter_ids, (len(base),))
    for name, array in (("base", base), ("x", x), ("lora_a", lora_a), ("lora_b", lora_b), ("scaling", scaling)):
        require_float("lora", name, array)
    require_out("lora", out, tuple(base.shape), base.dtype)
    require_same_device("lora", base=base, x=x, lora_a=lora_a, lora_b=lora_b, scaling=scaling, adapter_ids=adapter_ids)
    require_range("lora", "adapter_ids", adapter_ids, -1, len(lora_a))
    return torch.empty_like(base, memory_format=torch.contiguous_format) if out is None else out


def _halves(base: Array, x: Array, lora_a: Array, lora_b: Array) -> tuple[tl.dtype, tl.dtype]:
    """What the two products are multiplied in: 16 bits where both operands have the same, else float32."""
    first = _DTYPES[x.dtype] if x.dtype == lora_a.dtype else tl.float32
    second = _DTYPES[base.dtype] if base.dtype == lora_b.dtype else tl.float32
    return first, second


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
