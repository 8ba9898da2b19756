"""Weights of 4 bits as floats: looked up one by one, for groups of any size, or all written out, for cuBLAS."""

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.platform import cdiv
from fast._triton.rounding import dot_in_order, store, to_dtype
from fast.linear._int4_codes import nibbles, store_tile, strides_of


@triton.jit
def _any_groups_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features / 2] uint8
    scale_ptr,  # [out_features, num_groups]
    min_ptr,  # [out_features, num_groups] or None
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_t,
    stride_weight_o,
    stride_scale_o,
    stride_min_o,
    stride_residual_t,
    stride_out_t,
    stride_out_o,
    num_tokens,
    out_features,
    in_features,
    group_size,
    TILE_T: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_B: tl.constexpr,
):
    """Every byte looks up its group's scale and which two features it holds; weights are rounded to the dtype of x."""
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    token = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    in_batch = token < num_tokens
    row = tl.minimum(o, out_features - 1).to(tl.int64)[:, None]
    x_row = token.to(tl.int64)[:, None] * stride_x_t
    half_size, num_bytes = group_size // 2, in_features // 2
    acc = tl.zeros([TILE_O, TILE_T], tl.float32)
    for start in range(0, num_bytes, TILE_B):
        byte = start + tl.arange(0, TILE_B)[None, :]
        group = byte // half_size
        low = byte + group * half_size  # the feature in the low nibble
        high = low + tl.minimum(group_size, in_features - group * group_size) // 2  # the last group may have fewer
        in_row = byte < num_bytes
        packed = tl.load(weight_ptr + row * stride_weight_o + byte, mask=in_row, other=0)
        scale = tl.load(scale_ptr + row * stride_scale_o + group, mask=in_row, other=0.0).to(tl.float32)
        w_low = nibbles(packed, False, min_ptr, tl.float32) * scale
        w_high = nibbles(packed, True, min_ptr, tl.float32) * scale
        if min_ptr is not None:
            least = tl.load(min_ptr + row * stride_min_o + group, mask=in_row, other=0.0).to(tl.float32)
            w_low += least
            w_high += least
        x_mask = in_batch[:, None] & in_row
        x_low = tl.load(x_ptr + x_row + low, mask=x_mask, other=0.0)
        x_high = tl.load(x_ptr + x_row + high, mask=x_mask, other=0.0)
        acc = dot_in_order(to_dtype(w_low, x_low.dtype), tl.trans(x_low), acc)
        acc = dot_in_order(to_dtype(w_high, x_high.dtype), tl.trans(x_high), acc)
    strides = stride_residual_t, stride_out_t, stride_out_o
    store_tile(acc, bias_ptr, residual_ptr, out_ptr, strides, o, token, num_tokens, out_features)


def any_groups(
    x: Array,
    weight: Array,
    scale: Array,
    least: Array | None,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    group_size: int,
) -> Array:
    num_tokens, out_features = out.shape
    tile_t, tile_o, tile_b = 16, 32, 64
    _any_groups_kernel[(cdiv(out_features, tile_o), cdiv(num_tokens, tile_t))](
        x, weight, scale, least, bias, residual, out, *strides_of(x, weight, scale, least, residual, out),
        num_tokens, out_features, x.shape[1], group_size, TILE_T=tile_t, TILE_O=tile_o, TILE_B=tile_b, num_warps=4,
        enable_fp_fusion=False,  # scale * code + min rounds twice, as whoever dequantizes elsewhere does
    )  # fmt: skip
    return out


@triton.jit
def _dequantize_kernel(
    weight_ptr,  # [out_features, in_features / 2] uint8
    scale_ptr,  # [out_features, num_groups]
    min_ptr,  # [out_features, num_groups] or None
    dense_ptr,  # [out_features, in_features]
    stride_weight_o,
    stride_scale_o,
    stride_min_o,
    out_features,
    num_groups,
    TILE_O: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
):
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)[:, None]
    group = tl.program_id(1) * PARTS + tl.arange(0, PARTS)[None, :]
    mask = (o < out_features) & (group < num_groups)
    row = o.to(tl.int64)
    scale = tl.load(scale_ptr + row * stride_scale_o + group, mask=mask, other=0.0).to(tl.float32)[:, :, None]
    j = tl.arange(0, HALF)[None, None, :]
    row, group, mask = row[:, :, None], group[:, :, None], mask[:, :, None]
    packed = tl.load(weight_ptr + row * stride_weight_o + group * HALF + j, mask=mask, other=0)
    low = nibbles(packed, False, min_ptr, dense_ptr.dtype.element_ty).to(tl.float32) * scale
    high = nibbles(packed, True, min_ptr, dense_ptr.dtype.element_ty).to(tl.float32) * scale
    if min_ptr is not None:
        least = tl.load(min_ptr + row * stride_min_o + group, mask=mask, other=0.0).to(tl.float32)
        low += least
        high += least
    pointers = dense_ptr + row * (num_groups * 2 * HALF) + group * (2 * HALF) + j
    store(pointers, low, mask)
    store(pointers + HALF, high, mask)


def dense(
    x: Array,
    weight: Array,
    scale: Array,
    least: Array | None,
    bias: None,
    residual: Array | None,
    out: Array,
    group_size: int,
) -> Array:
    """The weight as floats, in memory of its own, and cuBLAS."""
    floats = dequantize(weight, scale, least, group_size, x.dtype)
    if residual is None:
        return torch.mm(x, floats.T, out=out)
    return torch.addmm(residual.to(x.dtype), x, floats.T, out=out)


def dequantize(weight: Array, scale: Array, least: Array | None, group_size: int, dtype: torch.dtype) -> Array:
    out_features, num_groups = scale.shape
    floats = torch.empty(out_features, num_groups * group_size, dtype=dtype, device=weight.device)
    parts = min(8192 // group_size, num_groups & -num_groups)  # so many that they divide a row evenly
    tile_o = max(1, 8192 // group_size // parts)  # 32 weights for each thread
    _dequantize_kernel[(cdiv(out_features, tile_o), cdiv(num_groups, parts))](
        weight, scale, least, floats, weight.stride(0), scale.stride(0), 0 if least is None else least.stride(0),
        out_features, num_groups, TILE_O=tile_o, HALF=group_size // 2, PARTS=parts, num_warps=8,
    )  # fmt: skip
    return floats
