"""2:4 sparsity in Triton. What the technique is for: `reference/linear/sparse_linear.py`.

The weight stays compressed on its way from memory, nine sixteenths of its bytes. One token picks the activations that
its two weights of a group go with; several tokens multiply a tile of the weight that is spread out in registers.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor as Array

from fast._checks import (
    checking_values,
    require,
    require_float,
    require_out,
    require_same_device,
    require_shape,
    require_values,
)
from fast._triton.platform import cdiv, next_power_of_2
from fast._triton.rounding import store
from fast.linear._eight_bit import dot_in_order

ROWS = 4  # of the weight, that a program owns when there is one token
GROUPS = 512  # of a row, that it takes in a step: 16 bytes for each of its threads, four times


@triton.jit
def halves(words, dtype: tl.constexpr):
    """The two 16-bit floats of each word, the first in its low half, as float32."""
    if dtype == tl.bfloat16:
        first, second = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        first = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        second = ((words >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _one_token_kernel(
    x_ptr,  # [1, in_features]
    words_ptr,  # [out_features, num_groups] int32: both weights of a group
    indices_ptr,  # [out_features, num_groups / 2] uint8
    bias_ptr,  # [out_features] or None
    out_ptr,  # [1, out_features]
    stride_words_o,
    stride_indices_o,
    stride_out_o,
    out_features,
    num_groups,
    DTYPE: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_G: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Groups in fours: 16 bytes of weights, two bytes of places, 16 activations."""
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    row = tl.minimum(o, out_features - 1).to(tl.int64)  # rows past the end are read again, and not stored
    within = tl.arange(0, 4)
    acc = tl.zeros([TILE_O, TILE_G // 4, 4], tl.float32)
    for start in tl.range(0, num_groups, TILE_G, num_stages=STAGES):
        four = start // 4 + tl.arange(0, TILE_G // 4)
        group = four[:, None] * 4 + within[None, :]
        in_row = group < num_groups
        words = tl.load(
            words_ptr + row[:, None, None] * stride_words_o + group[None, :, :], mask=in_row[None, :, :], other=0
        )
        bytes_ptr = indices_ptr + row[:, None] * stride_indices_o + four[None, :] * 2
        low = tl.load(bytes_ptr, mask=(four * 4 < num_groups)[None, :], other=0).to(tl.int32)
        high = tl.load(bytes_ptr + 1, mask=(four * 4 + 2 < num_groups)[None, :], other=0).to(tl.int32)
        places = (low | (high << 8))[:, :, None] >> (4 * within)[None, None, :]
        place, other = places & 3, (places >> 2) & 3
        x0 = tl.load(x_ptr + group * 4, mask=in_row, other=0.0).to(tl.float32)[None, :, :]
        x1 = tl.load(x_ptr + group * 4 + 1, mask=in_row, other=0.0).to(tl.float32)[None, :, :]
        x2 = tl.load(x_ptr + group * 4 + 2, mask=in_row, other=0.0).to(tl.float32)[None, :, :]
        x3 = tl.load(x_ptr + group * 4 + 3, mask=in_row, other=0.0).to(tl.float32)[None, :, :]
        first, second = halves(words, DTYPE)
        acc += first * tl.where(place == 0, x0, tl.where(place == 1, x1, x2))
        acc += second * tl.where(other == 1, x1, tl.where(other == 2, x2, x3))
    y = tl.sum(tl.sum(acc, axis=2), axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)
    store(out_ptr + o.to(tl.int64) * stride_out_o, y, o < out_features)


@triton.jit
def _tiles_kernel(
    x_ptr,  # [num_tokens, in_features]
    values_ptr,  # [out_features, in_features / 2]
    indices_ptr,  # [out_features, num_groups / 2] uint8
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_values_o,
    stride_indices_o,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    num_groups,
    DTYPE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_G: tl.constexpr,
    STAGES: tl.constexpr,
):
    num_token_tiles = tl.cdiv(num_tokens, TILE_T)
    o = (tl.program_id(0) // num_token_tiles) * TILE_O + tl.arange(0, TILE_O)
    token = (tl.program_id(0) % num_token_tiles) * TILE_T + tl.arange(0, TILE_T)
    in_batch = token < num_tokens
    row = tl.minimum(o, out_features - 1).to(tl.int64)[:, None]
    acc = tl.zeros([TILE_O, TILE_T], tl.float32)
    for start in tl.range(0, num_groups, TILE_G, num_stages=STAGES):
        k = start * 2 + tl.arange(0, 2 * TILE_G)[None, :]
        pairs = tl.load(values_ptr + row * stride_values_o + k, mask=k < num_groups * 2, other=0.0)
        first, second = tl.split(tl.reshape(pairs.to(DTYPE), [TILE_O, TILE_G, 2]))
        group = start + tl.arange(0, TILE_G)[None, :]
        byte = tl.load(indices_ptr + row * stride_indices_o + group // 2, mask=group < num_groups, other=0)
        places = byte.to(tl.int32) >> (4 * (group % 2))
        place, other = places & 3, (places >> 2) & 3
        nothing = tl.zeros([TILE_O, TILE_G], DTYPE)
        w0 = tl.where(place == 0, first, nothing)
        w1 = tl.where(place == 1, first, tl.where(other == 1, second, nothing))
        w2 = tl.where(place == 2, first, tl.where(other == 2, second, nothing))
        w3 = tl.where(other == 3, second, nothing)
        w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TILE_O, 4 * TILE_G])
        i = start * 4 + tl.arange(0, 4 * TILE_G)[None, :]
        mask = in_batch[:, None] & (i < num_groups * 4)
        x = tl.load(x_ptr + token.to(tl.int64)[:, None] * stride_x_t + i, mask=mask, other=0.0)
        acc = dot_in_order(w, tl.trans(x.to(DTYPE)), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row).to(tl.float32)
    pointers = out_ptr + token.to(tl.int64)[None, :] * stride_out_t + o.to(tl.int64)[:, None] * stride_out_o
    store(pointers, acc, in_batch[None, :] & (o < out_features)[:, None])


def sparse_linear(
    x: Float[Array, "num_tokens in_features"],
    values: Float[Array, "out_features half_features"],
    indices: UInt8[Array, "out_features index_bytes"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.sparse_linear.sparse_linear`.

    Grid: one program per ``ROWS`` rows of the weight for one token; per tile of rows and tokens for more.
    Moves: values and indices once for each tile of tokens, and the tokens.
    Limits: the tensor cores' own 2:4 products, which Triton does not offer, are not used: many tokens take as long as
    with a dense weight.
    """
    out = _door(x, values, indices, bias, out)
    if not out.numel():
        return out
    values = _rows(values)
    return (one_token if is_one(x, values) else tiles)(_rows(x), values, _rows(indices), bias, out)


def sparse_linear_invariant(
    x: Array, values: Array, indices: Array, bias: Array | None = None, *, out: Array | None = None
) -> Array:
    """`sparse_linear` of which no token's result depends on how many others there are: tiles, also for one token."""
    out = _door(x, values, indices, bias, out)
    return tiles(_rows(x), _rows(values), _rows(indices), bias, out) if out.numel() else out


def is_one(x: Array, values: Array) -> bool:
    """Whether the ordinary units multiply: for one token the tensor cores have nothing to save.

    A group's two weights are read as one word, so they must be of 16 bits, at even places.
    """
    return len(x) == 1 and values.dtype != torch.float32 and values.stride(0) % 2 == 0 and values.data_ptr() % 4 == 0


def one_token(
    x: Array, values: Array, indices: Array, bias: Array | None, out: Array, rows=ROWS, groups=GROUPS, stages=1, warps=4
) -> Array:
    out_features, num_groups = len(values), values.shape[1] // 2
    words = values.view(torch.int32)
    tile_g = max(16, min(groups, next_power_of_2(num_groups)))
    _one_token_kernel[(cdiv(out_features, rows),)](
        x, words, indices, bias, out, words.stride(0), indices.stride(0), out.stride(1), out_features, num_groups,
        DTYPE=_DTYPES[values.dtype], TILE_O=rows, TILE_G=tile_g, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


def tiles(x: Array, values: Array, indices: Array, bias: Array | None, out: Array) -> Array:
    (num_tokens, out_features), num_groups = out.shape, values.shape[1] // 2
    half = x.dtype == values.dtype and x.dtype != torch.float32
    tile_t = max(16, next_power_of_2(min(num_tokens, 128 if half else 16)))
    tile_o = 64 if half else 32
    _tiles_kernel[(cdiv(out_features, tile_o) * cdiv(num_tokens, tile_t),)](
        x, values, indices, bias, out,
        x.stride(0), values.stride(0), indices.stride(0), out.stride(0), out.stride(1),
        num_tokens, out_features, num_groups, DTYPE=_DTYPES[x.dtype] if half else tl.float32,
        TILE_T=tile_t, TILE_O=tile_o, TILE_G=16, STAGES=3, num_warps=4,
    )  # fmt: skip
    return out


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _door(x: Array, values: Array, indices: Array, bias: Array | None, out: Array | None) -> Array:
    op = "sparse_linear"
    require_shape(op, "values", values, (None, None))
    require_float(op, "values", values)
    out_features, half_features = values.shape
    require_shape(op, "x", x, (None, None))
    require_float(op, "x", x)
    require(
        x.shape[1] == 2 * half_features, op, "weight", f"shape [*, {x.shape[1]}]", [out_features, 2 * half_features]
    )
    require(half_features % 2 == 0, op, "values", "two values for each group of four", tuple(values.shape))
    require_shape(op, "indices", indices, (out_features, -(-half_features // 4)))
    if bias is not None:
        require_shape(op, "bias", bias, (out_features,))
        require_float(op, "bias", bias)
    require_out(op, out, (len(x), out_features), x.dtype)
    require_same_device(op, x=x, values=values, indices=indices, bias=bias, out=out)
    if checking_values():
        nibbles = torch.stack([indices & 15, indices >> 4], dim=2).flatten(1)[:, : half_features // 2]
        ascend = ((nibbles & 3) < (nibbles >> 2)).all()
        require_values(ascend, op, "indices", "two ascending places in each nibble", "others")
    return torch.empty(len(x), out_features, dtype=x.dtype, device=x.device) if out is None else out


def _rows(array: Array) -> Array:
    """The array with its last axis contiguous, as the kernels read it; a copy only where it is not."""
    return array if array.stride(-1) == 1 or array.shape[-1] <= 1 else array.contiguous()
