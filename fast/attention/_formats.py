"""Tiles of keys and of values of every format of a cache, as numbers that a query can be multiplied with.

A *loader* is a jit function that loads one tile, keys or values. Attention takes it as a constexpr argument, and knows
no format itself::

    parts, scales = LOAD(cache, SIDE, kv_head, block, offset, owned, dim, dtype, HEAD_DIM, BITS, NUM_GROUPS, GROUP_SIZE)

``cache`` holds the arrays of the format, each as ``strided`` makes it; SIDE is ``KEYS`` or ``VALUES``; of each token
of the tile come its block, its offset in the block and whether it is any sequence's (what is not is 0, whatever the
cache holds there).

The tile is the sum of ``parts``, [tokens, head_dim] each, times ``scales``, which has one for each token or is empty.
Several parts are how float16s and bfloat16s, all that tensor cores multiply, hold a number of float32's precision:
scores need it, because an error in a score multiplies the weight. With ``dtype`` float32, there is one part. Codes of
int8 and fp8 are exact in one, and keep their token's scale apart.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fast._triton.rounding import clamp, to_dtype, to_float32

KEYS, VALUES = tl.constexpr(0), tl.constexpr(1)


def strided(array: Tensor) -> tuple[Any, ...]:
    """An array as a kernel's argument: its pointer and its strides."""
    return array, *array.stride()


@triton.jit
def in_parts(x, dtype: tl.constexpr, SIDE: tl.constexpr):
    """Float32 numbers as a sum of ``dtype``'s, the largest first: of keys to 22 bits or more, of values to 16."""
    PARTS: tl.constexpr = 1 if dtype == tl.float32 else (3 if dtype == tl.bfloat16 and SIDE == 0 else 2)
    parts = ()
    for i in tl.static_range(PARTS):
        if dtype == tl.float16 and i == 0:  # dequantized, it may lie a step beyond float16's largest: the rest is below
            part = to_dtype(clamp(x, 65504.0), dtype)
        else:
            part = to_dtype(x, dtype)
        x = x - to_float32(part)
        parts = parts + (part,)
    return parts


# ---- loaders --------------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(array, kv_head, block, offset, in_tile, column):
    """What an array [num_blocks, tokens of a block, num_kv_heads, ...] holds of one KV head; 0 outside ``in_tile``."""
    ptr, stride_block, stride_token, stride_head, stride_column = array
    rows = ptr + kv_head.to(tl.int64) * stride_head + block * stride_block + offset * stride_token
    return tl.load(rows[:, None] + column[None, :] * stride_column, mask=in_tile, other=0.0)


@triton.jit
def in_head(owned, dim, HEAD_DIM: tl.constexpr):
    """Which numbers of a tile are a token's."""
    in_tile = owned[:, None]
    if dim.shape[0] > HEAD_DIM:
        in_tile = in_tile & (dim < HEAD_DIM)[None, :]
    return in_tile


@triton.jit
def load_floats(
    cache, SIDE: tl.constexpr, kv_head, block, offset, owned, dim, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """From (keys, values), which have ``dtype`` already, unless it is float32."""
    x = load_tile(cache[SIDE], kv_head, block, offset, in_head(owned, dim, HEAD_DIM), dim)
    if x.dtype != dtype:
        x = x.to(tl.float32)
    return (x,), ()


@triton.jit
def load_symmetric(
    cache, SIDE: tl.constexpr, kv_head, block, offset, owned, dim, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """From (codes of keys, of values, their scales) of int8 or fp8.

    Values are bfloat16 even where ``dtype`` is float16: they meet weights that are multiplied with scales already, and
    these may lie beyond float16.
    """
    codes = load_tile(cache[SIDE], kv_head, block, offset, in_head(owned, dim, HEAD_DIM), dim)
    ptr, stride_block, stride_token, stride_head = cache[2 + SIDE]
    rows = ptr + kv_head.to(tl.int64) * stride_head + block * stride_block + offset * stride_token
    scale = tl.load(rows, mask=owned, other=0.0)
    if dtype == tl.float16 and SIDE == 1:
        numbers = to_dtype(to_float32(codes), tl.bfloat16)
    else:
        numbers = to_dtype(to_float32(codes), dtype)
    return (numbers,), (scale,)


@triton.jit
def load_affine(
    cache, SIDE: tl.constexpr, kv_head, block, offset, owned, dim, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """From (codes of keys, of values, steps and zeros of keys, of values), these for groups of a token's numbers."""
    codes = load_codes(cache[SIDE], kv_head, block, offset, owned, dim, HEAD_DIM, BITS)
    steps = load_of_groups(cache[2 + 2 * SIDE], kv_head, block, offset, owned, dim, HEAD_DIM, NUM_GROUPS)
    zeros = load_of_groups(cache[3 + 2 * SIDE], kv_head, block, offset, owned, dim, HEAD_DIM, NUM_GROUPS)
    return in_parts(zeros + steps * codes, dtype, SIDE), ()


@triton.jit
def load_kivi(
    cache, SIDE: tl.constexpr, kv_head, block, offset, owned, dim, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """As ``load_affine``; of keys, a channel has a step and a zero for each group of tokens."""
    codes = load_codes(cache[SIDE], kv_head, block, offset, owned, dim, HEAD_DIM, BITS)
    if SIDE == 0:
        group, in_tile = offset // GROUP_SIZE, in_head(owned, dim, HEAD_DIM)
        steps = load_tile(cache[2], kv_head, block, group, in_tile, dim).to(tl.float32)
        zeros = load_tile(cache[3], kv_head, block, group, in_tile, dim).to(tl.float32)
    else:
        steps = load_of_groups(cache[4], kv_head, block, offset, owned, dim, HEAD_DIM, NUM_GROUPS)
        zeros = load_of_groups(cache[5], kv_head, block, offset, owned, dim, HEAD_DIM, NUM_GROUPS)
    return in_parts(zeros + steps * codes, dtype, SIDE), ()


@triton.jit
def load_codes(array, kv_head, block, offset, owned, dim, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """Codes of 4 or 2 bits as float32: a byte holds, from its low bits up, one of each half (or quarter) of a head."""
    BYTES: tl.constexpr = HEAD_DIM * BITS // 8
    codes = load_tile(array, kv_head, block, offset, in_head(owned, dim, HEAD_DIM), dim % BYTES)
    return (codes.to(tl.int32) >> (dim // BYTES * BITS)[None, :] & (2**BITS - 1)).to(tl.float32)


@triton.jit
def load_of_groups(
    array, kv_head, block, offset, owned, dim, HEAD_DIM: tl.constexpr, NUM_GROUPS: tl.constexpr
):  # fmt: skip
    """A number for each group of a token's numbers, at all of them; float32."""
    ptr, stride_block, stride_token, stride_head, stride_group = array
    rows = ptr + kv_head.to(tl.int64) * stride_head + block * stride_block + offset * stride_token
    x = tl.load(rows, mask=owned, other=0.0).to(tl.float32)[:, None]
    for g in tl.static_range(1, NUM_GROUPS):
        of_group = tl.load(rows + g * stride_group, mask=owned, other=0.0).to(tl.float32)
        x = tl.where((dim >= g * (HEAD_DIM // NUM_GROUPS))[None, :], of_group[:, None], x)
    return x
