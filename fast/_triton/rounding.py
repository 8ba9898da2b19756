"""Rounding in kernels, and dot products: right in the interpreter too, which truncates where a GPU rounds."""

import triton
import triton.language as tl

from fast._triton.platform import INTERPRETED


@triton.jit
def to_dtype(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest, ties to even; float8 saturates at its largest number."""
    if INTERPRETED and dtype == tl.bfloat16:
        y = round_to_bfloat16(x)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def round_to_bfloat16(x):
    """By adding half of the last place that stays, less what makes a tie go to even; the interpreter only cuts off."""
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)  # NaN stays NaN
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def store(pointers, x, mask):
    """Store float32 numbers in the dtype behind the pointers, rounded to nearest."""
    tl.store(pointers, to_dtype(x, pointers.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` with float32 sums; float32 operands are multiplied as float32, never as tf32.

    The interpreter multiplies bfloat16 bit patterns as if they were numbers, hence the detour over float32.
    """
    if INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
