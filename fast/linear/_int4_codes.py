"""Weights of 4 bits in kernels: two codes out of a byte, and what happens to a tile of the result before it is stored.

The layout is the documented one. Within a group the low nibbles are its first half and the high ones its second, so 16
bytes of a row become 16 features and 16 more without any moving about: two dot products, each with its half of ``x``.
A nibble becomes a float by being put into the mantissa of one (0x4300 is 128 in bfloat16, with 1 as its last place).
"""

import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.platform import INTERPRETED
from fast._triton.rounding import store
from fast.linear._eight_bit import stride_of_rows

_HEAD = "{ .reg .b32 s, a, b, m, o, z;"
_BFLOAT16 = """
prmt.b32 a, s, 0, 0x4140; prmt.b32 b, s, 0, 0x4342; mov.b32 o, 0x3f803f80; mov.b32 z, %s;
lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, a, o, z; fma.rn.bf16x2 $1, b, o, z; }"""
_FLOAT16 = """
prmt.b32 a, s, 0, 0x4140; prmt.b32 b, s, 0, 0x4342; mov.b32 z, %s;
lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea; lop3.b32 b, b, 0x000f000f, 0x64006400, 0xea;
sub.f16x2 $0, a, z; sub.f16x2 $1, b, z; }"""
# four bytes become four numbers: the nibble less 8, or the nibble
_ASM = {
    (half, dtype, zero): tl.constexpr(_HEAD + shift + body % less)
    for half, shift in (("low", "mov.b32 s, $2;"), ("high", "shr.u32 s, $2, 4;"))
    for dtype, body, zeros in (
        ("bf16", _BFLOAT16, ("0xc300c300", "0xc308c308")),
        ("fp16", _FLOAT16, ("0x64006400", "0x64086408")),
    )
    for zero, less in zip((0, 8), zeros)
}
_BF16_LOW_0, _BF16_LOW_8 = _ASM["low", "bf16", 0], _ASM["low", "bf16", 8]
_BF16_HIGH_0, _BF16_HIGH_8 = _ASM["high", "bf16", 0], _ASM["high", "bf16", 8]
_FP16_LOW_0, _FP16_LOW_8 = _ASM["low", "fp16", 0], _ASM["low", "fp16", 8]
_FP16_HIGH_0, _FP16_HIGH_8 = _ASM["high", "fp16", 0], _ASM["high", "fp16", 8]


@triton.jit
def nibbles(packed, HIGH: tl.constexpr, min_ptr, dtype: tl.constexpr):
    """The codes in the low or the high halves of bytes, less 8 if no minimum says where they begin: exact floats."""
    ZERO: tl.constexpr = 8 if min_ptr is None else 0
    if INTERPRETED or dtype == tl.float32:
        codes = ((packed >> 4) if HIGH else (packed & 15)).to(tl.int32) - ZERO
        y = codes.to(tl.float32).to(dtype)
    elif dtype == tl.bfloat16:
        low: tl.constexpr = _BF16_LOW_8 if ZERO else _BF16_LOW_0
        high: tl.constexpr = _BF16_HIGH_8 if ZERO else _BF16_HIGH_0
        y = tl.inline_asm_elementwise(
            high if HIGH else low, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        low: tl.constexpr = _FP16_LOW_8 if ZERO else _FP16_LOW_0
        high: tl.constexpr = _FP16_HIGH_8 if ZERO else _FP16_HIGH_0
        y = tl.inline_asm_elementwise(
            high if HIGH else low, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
        )
    return y


@triton.jit
def add_minimum(acc, low, high, min_ptr, stride_min_o, row, g):
    """A group's minimum, if there is one, times the sum of its activations: a minimum is in all of its weights."""
    if min_ptr is not None:
        least = tl.load(min_ptr + row * stride_min_o + g).to(tl.float32)
        total = tl.sum(low.to(tl.float32) + high.to(tl.float32), axis=1)
        acc += least[:, None] * total[None, :]
    return acc


@triton.jit
def store_tile(acc, bias_ptr, residual_ptr, out_ptr, strides, o, token, num_tokens, out_features):
    """Add the bias and the residual to a tile, features times tokens, and round it once.

    ``strides``: from token to token of the residual and of the result, and from feature to feature of the result.
    """
    stride_residual_t, stride_out_t, stride_out_o = strides
    in_row = o < out_features
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=in_row).to(tl.float32)[:, None]
    mask = (token < num_tokens)[None, :] & in_row[:, None]
    token = token.to(tl.int64)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + token * stride_residual_t + o[:, None], mask=mask).to(tl.float32)
    store(out_ptr + token * stride_out_t + o[:, None] * stride_out_o, acc, mask)


def strides_of(
    x: Array, weight: Array, scale: Array, least: Array | None, residual: Array | None, out: Array
) -> tuple[int, ...]:
    """In the order of the kernels' parameters."""
    rows = (stride_of_rows(array) for array in (x, weight, scale, least, residual))
    return *rows, out.stride(0), out.stride(1)
