"""Codes times codes: activations rounded on their way in, and the tensor cores' 8-bit products for many tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor as Array
from triton.tools.tensor_descriptor import TensorDescriptor

from fast._triton.platform import cdiv, device_properties
from fast._triton.rounding import store, to_dtype
from fast.linear._eight_bit import stride_of_rows

SCALED_MM_TOKENS = 256  # from here on the tensor cores' float8 products are worth their rounding
TILE_COLUMNS = 8192  # of a row that is rounded, at a time
TILE = 128, 256, 128  # tokens, rows of the weight, columns of a step: as much as registers and shared memory hold
BAND = 8  # tiles of tokens beside each other
SMALL = tl.constexpr(2.0**-64)
MAGIC = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: added and taken away, it rounds to the nearest whole number, ties to even


@triton.jit
def load_row(x_ptr, first, num_columns, TILE: tl.constexpr):
    """Part of a row as float32; zeros past its end."""
    column = first + tl.arange(0, TILE)
    return tl.load(x_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)


@triton.jit
def sizes(x):
    """|x|; NaN counts as infinite, since a maximum may overlook it."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))


@triton.jit
def store_codes(codes_ptr, x, factor, inverse, first, num_columns, MOST: tl.constexpr):
    """``x`` divided by its scale and rounded to nearest, ties to even."""
    column = first + tl.arange(0, x.shape[0])
    code = tl.minimum(tl.maximum(x * factor * inverse, -MOST), MOST)
    if codes_ptr.dtype.element_ty == tl.int8:
        tl.store(codes_ptr + column, ((code + MAGIC) - MAGIC).to(tl.int8), mask=column < num_columns)
    else:
        tl.store(codes_ptr + column, to_dtype(code, codes_ptr.dtype.element_ty), mask=column < num_columns)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [num_rows, num_columns]
    codes_ptr,  # [num_rows, num_columns] int8 or float8e4nv
    scale_ptr,  # [num_rows]
    stride_x_row,
    num_columns,
    MOST: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``WHOLE`` rows stay in registers between the two looks at them; longer ones are read again."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x_row
    codes_ptr += row * num_columns
    x = load_row(x_ptr, 0, num_columns, TILE)
    largest = sizes(x)
    if not WHOLE:
        for first in range(TILE, num_columns, TILE):
            largest = tl.maximum(largest, sizes(load_row(x_ptr, first, num_columns, TILE)))
    peak = tl.max(largest, axis=0)
    scale = tl.div_rn(tl.where(peak < float("inf"), peak, float("nan")), tl.full([], MOST, tl.float32))
    tl.store(scale_ptr + row, scale)
    usable = scale > 0  # neither 0 nor NaN
    factor = tl.where(scale < SMALL, 1.0 / SMALL, 1.0)  # the inverse of a tiny scale would be infinite
    inverse = tl.where(usable, tl.div_rn(tl.full([], 1.0, tl.float32), scale * factor), 0.0)
    store_codes(codes_ptr, tl.where(usable, x, 0.0), factor, inverse, 0, num_columns, MOST)
    if not WHOLE:
        for first in range(TILE, num_columns, TILE):
            x = load_row(x_ptr, first, num_columns, TILE)
            store_codes(codes_ptr, tl.where(usable, x, 0.0), factor, inverse, first, num_columns, MOST)


def quantize(x: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    """The codes and the scale of every row."""
    num_rows, num_columns = x.shape
    codes = torch.empty(num_rows, num_columns, dtype=dtype, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        tile = min(TILE_COLUMNS, max(16, triton.next_power_of_2(num_columns)))
        most = 127.0 if dtype == torch.int8 else 448.0
        _quantize_rows_kernel[(num_rows,)](
            x, codes, scale, x.stride(0), num_columns,
            MOST=most, TILE=tile, WHOLE=num_columns <= tile, num_warps=4 if tile < 4096 else 8,
        )  # fmt: skip
    return codes, scale


@triton.jit
def _many_tokens_kernel(
    x_desc,  # [num_tokens, in_features] int8
    weight_desc,  # [out_features, in_features], the same
    x_scale_ptr,  # [num_tokens]
    weight_scale_ptr,  # [out_features]
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_residual_t,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    in_features,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Tiles in bands of ``BAND`` tiles of tokens, so that what runs at the same time shares rows and columns in L2."""
    num_t, num_o = tl.cdiv(num_tokens, TILE_T), tl.cdiv(out_features, TILE_O)
    band = tl.program_id(0) // (BAND * num_o)
    height = tl.minimum(num_t - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * num_o)
    first_t, first_o = (band * BAND + place % height) * TILE_T, (place // height) * TILE_O
    acc = tl.zeros([TILE_T, TILE_O], tl.int32)
    for i in tl.range(0, in_features, TILE_I, num_stages=STAGES):
        x = x_desc.load([first_t, i])
        weight = weight_desc.load([first_o, i])
        acc = tl.dot(x, tl.trans(weight), acc, out_dtype=tl.int32)
    token, o = first_t + tl.arange(0, TILE_T), first_o + tl.arange(0, TILE_O)
    in_batch, in_row = token < num_tokens, o < out_features
    x_scale = tl.load(x_scale_ptr + token, mask=in_batch)
    weight_scale = tl.load(weight_scale_ptr + o, mask=in_row).to(tl.float32)
    bias = tl.zeros([TILE_T, TILE_O], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + o, mask=in_row).to(tl.float32)[None, :]
    y = tl.fma(acc.to(tl.float32), x_scale[:, None] * weight_scale[None, :], bias)  # as `_eight_bit.finish` does
    mask, token = in_batch[:, None] & in_row[None, :], token.to(tl.int64)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + token * stride_residual_t + o[None, :], mask=mask).to(tl.float32)
    store(out_ptr + token * stride_out_t + o[None, :] * stride_out_o, y, mask)


def many_tokens(
    x: Array,
    x_scale: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array,
) -> Array:
    """For int8 codes whose rows lie a multiple of 16 bytes apart (`fits`), as the copy engine wants them."""
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    tile_t, tile_o, tile_i = TILE
    _many_tokens_kernel[(cdiv(num_tokens, tile_t) * cdiv(out_features, tile_o),)](
        TensorDescriptor.from_tensor(x, [tile_t, tile_i]), TensorDescriptor.from_tensor(weight, [tile_o, tile_i]),
        x_scale, weight_scale, bias, residual, out, stride_of_rows(residual), out.stride(0), out.stride(1),
        num_tokens, out_features, in_features,
        TILE_T=tile_t, TILE_O=tile_o, TILE_I=tile_i, BAND=BAND, STAGES=4, num_warps=8,
    )  # fmt: skip
    return out


def scaled_mm(
    x: Array, x_scale: Array, weight: Array, weight_scale: Array, bias: None, residual: Array | None, out: Array
) -> Array:
    """float8 by torch, without fast accumulation, which is no accumulation of float32 (see `linear_fp8_fp8`)."""
    scales = {"scale_a": x_scale[:, None], "scale_b": weight_scale.float()[None, :]}
    multiply = torch._scaled_mm  # type: ignore[reportPrivateImportUsage]
    place = out if residual is None else torch.empty_like(out)
    multiply(x, weight.T, **scales, out_dtype=out.dtype, use_fast_accum=False, out=place)
    return out if residual is None else torch.add(residual, place, out=out)


def scaled_mm_takes(weight: Array, bias: Array | None, out: Array) -> bool:
    """Whether torch has a kernel for this, and a device to run it on."""
    sixteens = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    plain = bias is None and out.dtype == torch.bfloat16 and out.is_contiguous() and weight.is_contiguous()
    able = out.device.type == "cuda" and device_properties(out.device.index).major >= 9
    return sixteens and plain and able


def fits(x: Array, weight: Array) -> bool:
    """Whether the copy engine can read both: rows that begin at multiples of 16 bytes and do not overlap."""
    return x.shape[1] > 0 and _copyable(x) and _copyable(weight)


def _copyable(array: Array) -> bool:
    row, column = array.stride()
    aligned = row * array.element_size() % 16 == 0 and array.data_ptr() % 16 == 0
    return column == 1 and row >= array.shape[1] and aligned
