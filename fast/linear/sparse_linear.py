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
    require_added,
    require_float,
    require_out,
    require_same_device,
    require_shape,
    require_values,
)
from fast._triton.overlap import let_successor_come, overlapped, wait_for_predecessor
from fast._triton.platform import INTERPRETED, cdiv, next_power_of_2
from fast._triton.rounding import dot_in_order, store
from fast.linear._eight_bit import stride_of_rows
from fast.linear._skinny import rows_of, whole_rows

ROWS = 4  # of the weight, that a program owns when there is one token
GROUPS = 512  # of a row, that it takes in a step: 16 bytes for each of its threads, four times
FEW_ROWS = 4096  # up to here half of that: more programs fit a processor


_TABLE = "mul.lo.u32 s, $4, 0x41; and.b32 s, s, 0x0303; mad.lo.u32 s, s, 0x22, 0x1010;"  # the bytes of two activations
_ADD_BF16 = tl.constexpr(
    "{ .reg .b32 s, p, a, b; .reg .f32 t; "
    + _TABLE
    + """ prmt.b32 p, $2, $3, s;
    shl.b32 a, $1, 16; shl.b32 b, p, 16; fma.rn.f32 t, a, b, $5;
    and.b32 a, $1, 0xffff0000; and.b32 b, p, 0xffff0000; fma.rn.f32 $0, a, b, t; }"""
)
_ADD_FP16 = tl.constexpr(
    "{ .reg .b32 s, p; .reg .b16 a, b, c, d; .reg .f32 t, v, x; "
    + _TABLE
    + """ prmt.b32 p, $2, $3, s;
    mov.b32 {a, b}, $1; mov.b32 {c, d}, p;
    cvt.f32.f16 v, a; cvt.f32.f16 x, c; fma.rn.f32 t, v, x, $5;
    cvt.f32.f16 v, b; cvt.f32.f16 x, d; fma.rn.f32 $0, v, x, t; }"""
)


@triton.jit
def floats(word, dtype: tl.constexpr):
    """The two 16-bit floats of each word, the first in its low half, as float32."""
    if dtype == tl.bfloat16:
        first, second = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        first = word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def add_group(pair, low, high, nibble, acc, dtype: tl.constexpr):
    """``acc`` plus the two weights in ``pair`` times the activations, of the four in ``low`` and ``high``, at their
    places. The places become the selector of one byte permutation, which picks both activations."""
    if INTERPRETED:
        x0, x1 = floats(low, dtype)
        x2, x3 = floats(high, dtype)
        place, other = nibble & 3, nibble >> 2
        first, second = floats(pair, dtype)
        acc += first * tl.where(place == 0, x0, tl.where(place == 1, x1, x2))
        acc += second * tl.where(other == 1, x1, tl.where(other == 2, x2, x3))
    else:
        acc = tl.inline_asm_elementwise(
            _ADD_BF16 if dtype == tl.bfloat16 else _ADD_FP16,
            "=f,r,r,r,r,f",
            [pair, low, high, nibble, acc],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return acc


@triton.jit
def _one_token_kernel(
    x_ptr,  # [num_groups] int64: four activations each
    pairs_ptr,  # [out_features, num_groups] int32: both weights of a group
    indices_ptr,  # [out_features, num_groups / 2] uint8
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [1, out_features]
    stride_pairs_o,
    stride_indices_o,
    stride_out_o,
    out_features,
    num_groups,
    DTYPE: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_G: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Groups in fours: 16 bytes of weights, two bytes of places, 16 activations."""
    wait_for_predecessor(OVERLAP, EARLY=False)
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    row = tl.minimum(o, out_features - 1).to(tl.int64)  # rows past the end are read again, and not stored
    within = tl.arange(0, 4)
    acc = tl.zeros([TILE_O, TILE_G // 4, 4], tl.float32)
    for start in tl.range(0, num_groups, TILE_G, num_stages=1):
        four = start // 4 + tl.arange(0, TILE_G // 4)
        group = four[:, None] * 4 + within[None, :]
        in_row = group < num_groups
        pairs = tl.load(
            pairs_ptr + row[:, None, None] * stride_pairs_o + group[None, :, :], mask=in_row[None, :, :], other=0
        )
        bytes_ptr = indices_ptr + row[:, None] * stride_indices_o + four[None, :] * 2
        first = tl.load(bytes_ptr, mask=(four * 4 < num_groups)[None, :], other=0).to(tl.int32)
        second = tl.load(bytes_ptr + 1, mask=(four * 4 + 2 < num_groups)[None, :], other=0).to(tl.int32)
        nibble = ((first | (second << 8))[:, :, None] >> (4 * within)[None, None, :]) & 15
        x = tl.load(x_ptr + group, mask=in_row, other=0)
        shape: tl.constexpr = [TILE_O, TILE_G // 4, 4]
        low, high = (
            tl.broadcast_to(x.to(tl.int32)[None, :, :], shape),
            tl.broadcast_to((x >> 32).to(tl.int32)[None, :, :], shape),
        )
        acc = add_group(pairs, low, high, nibble, acc, DTYPE)
    let_successor_come(OVERLAP)
    y = tl.sum(tl.sum(acc, axis=2), axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row).to(tl.float32)
    store(out_ptr + o.to(tl.int64) * stride_out_o, y, o < out_features)


@triton.jit
def _tiles_kernel(
    x_ptr,  # [num_tokens, in_features]
    values_ptr,  # [out_features, in_features / 2]
    indices_ptr,  # [out_features, num_groups / 2] uint8
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_values_o,
    stride_indices_o,
    stride_residual_t,
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
    mask, token = in_batch[None, :] & (o < out_features)[:, None], token.to(tl.int64)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + token * stride_residual_t + o[:, None], mask=mask).to(tl.float32)
    store(out_ptr + token * stride_out_t + o.to(tl.int64)[:, None] * stride_out_o, acc, mask)


def sparse_linear(
    x: Float[Array, "num_tokens in_features"],
    values: Float[Array, "out_features half_features"],
    indices: UInt8[Array, "out_features index_bytes"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.sparse_linear.sparse_linear`.

    Grid: one program per ``ROWS`` rows of the weight for one token; per tile of rows and tokens for more.
    Moves: values and indices once for each tile of tokens, and the tokens.
    Limits: the tensor cores' own 2:4 products, which Triton does not offer, are not used: many tokens take as long as
    with a dense weight.
    """
    out = _door(x, values, indices, bias, residual, out)
    if not out.numel():
        return out
    values = whole_rows(values)
    kernel = one_token if is_one(x, values) else tiles
    return kernel(whole_rows(x), values, whole_rows(indices), bias, rows_of(residual), out)


def sparse_linear_invariant(
    x: Array,
    values: Array,
    indices: Array,
    bias: Array | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """`sparse_linear` of which no token's result depends on how many others there are: tiles, also for one token."""
    out = _door(x, values, indices, bias, residual, out)
    if not out.numel():
        return out
    return tiles(whole_rows(x), whole_rows(values), whole_rows(indices), bias, rows_of(residual), out)


def is_one(x: Array, values: Array) -> bool:
    """Whether the ordinary units multiply: for one token the tensor cores have nothing to save.

    A group's two weights are read as one word and its four activations as one of twice the size, so both must be of the
    same 16 bits and lie at such places.
    """
    aligned = x.data_ptr() % 8 == 0 and values.data_ptr() % 4 == 0 and values.stride(0) % 2 == 0
    return len(x) == 1 and x.dtype == values.dtype != torch.float32 and aligned


def one_token(x: Array, values: Array, indices: Array, bias: Array | None, residual: Array | None, out: Array) -> Array:
    out_features, num_groups = len(values), values.shape[1] // 2
    fours, pairs = x[0].view(torch.int64), values.view(torch.int32)
    _one_token_kernel[(cdiv(out_features, ROWS),)](
        fours, pairs, indices, bias, residual, out,
        pairs.stride(0), indices.stride(0), out.stride(1), out_features, num_groups,
        DTYPE=_DTYPES[values.dtype], TILE_O=ROWS, TILE_G=choose_groups(out_features, num_groups),
        num_warps=4, **overlapped(x),
    )  # fmt: skip
    return out


def choose_groups(out_features: int, num_groups: int) -> int:
    """How many of a row a program takes in a step.

    Example:
        >>> choose_groups(4096, 1024), choose_groups(14336, 1024), choose_groups(4096, 9)
        (256, 512, 16)
    """
    return max(16, min(GROUPS // 2 if out_features <= FEW_ROWS else GROUPS, next_power_of_2(num_groups)))


def tiles(x: Array, values: Array, indices: Array, bias: Array | None, residual: Array | None, out: Array) -> Array:
    (num_tokens, out_features), num_groups = out.shape, values.shape[1] // 2
    half = x.dtype == values.dtype and x.dtype != torch.float32
    tile_t = max(16, next_power_of_2(min(num_tokens, 128 if half else 16)))
    tile_o = 64 if half else 32
    _tiles_kernel[(cdiv(out_features, tile_o) * cdiv(num_tokens, tile_t),)](
        x, values, indices, bias, residual, out,
        x.stride(0), values.stride(0), indices.stride(0), stride_of_rows(residual), out.stride(0), out.stride(1),
        num_tokens, out_features, num_groups, DTYPE=_DTYPES[x.dtype] if half else tl.float32,
        TILE_T=tile_t, TILE_O=tile_o, TILE_G=16, STAGES=3, num_warps=4,
    )  # fmt: skip
    return out


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _door(
    x: Array, values: Array, indices: Array, bias: Array | None, residual: Array | None, out: Array | None
) -> Array:
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
    require_added(op, "bias", bias, (out_features,))
    require_added(op, "residual", residual, (len(x), out_features))
    require_out(op, out, (len(x), out_features), x.dtype)
    require_same_device(op, x=x, values=values, indices=indices, bias=bias, residual=residual, out=out)
    if checking_values():
        nibbles = torch.stack([indices & 15, indices >> 4], dim=2).flatten(1)[:, : half_features // 2]
        ascend = ((nibbles & 3) < (nibbles >> 2)).all()
        require_values(ascend, op, "indices", "two ascending places in each nibble", "others")
    return torch.empty(len(x), out_features, dtype=x.dtype, device=x.device) if out is None else out
