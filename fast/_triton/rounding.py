"""Rounding in kernels, and dot products: right in the interpreter too, which truncates where a GPU rounds."""

import triton
import triton.language as tl

from fast._triton.platform import INTERPRETED


@triton.jit
def to_dtype(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest, ties to even; float8 saturates at its largest number."""
    if dtype == tl.float8e4nv or dtype == tl.float8e5:
        y = to_float8(x, dtype, True)
    elif INTERPRETED and dtype == tl.bfloat16:
        y = round_to_bfloat16(x)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def to_dtype_saturating(x, dtype: tl.constexpr):
    """Like ``to_dtype``; what lies beyond the largest number of ``dtype``, infinities too, becomes that number."""
    if dtype == tl.float16:
        x = clamp(x, 65504.0)
    elif dtype == tl.bfloat16:
        x = clamp(x, 3.3895313892515355e38)
    elif dtype == tl.float32:
        x = clamp(x, 3.4028234663852886e38)
    return to_dtype(x, dtype)


@triton.jit
def clamp(x, largest):
    """Into ``-largest`` to ``largest``; NaN stays NaN."""
    x = tl.where(x > largest, largest, x)
    return tl.where(x < -largest, -largest, x)


@triton.jit
def round_to_bfloat16(x):
    """By adding half of the last place that stays, less what makes a tie go to even; the interpreter only cuts off."""
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    number = tl.where(x == x, bits, 0)
    rounded = (number + 0x7FFF + ((number >> 16) & 1)) >> 16
    rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)  # NaN stays NaN
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_float8(x, dtype: tl.constexpr, SATURATE: tl.constexpr):
    """float32 (nothing else) to float8e4nv (e4m3fn) or float8e5 (e5m2), ties to even; NaN stays NaN.

    Beyond the largest number lies, saturating, that number (infinities too); otherwise NaN for e4m3fn, which has no
    infinity, and infinity for e5m2, from where a value rounds past the largest.
    """
    if INTERPRETED:
        if dtype == tl.float8e4nv:
            y = _float8_codes(x, 3, 7, 0x7E, SATURATE).to(dtype, bitcast=True)
        else:
            y = _float8_codes(x, 2, 15, 0x7B, SATURATE).to(dtype, bitcast=True)
    elif SATURATE:
        y = x.to(dtype)  # the GPU's conversion saturates
    else:
        codes = x.to(dtype).to(tl.uint8, bitcast=True)
        if dtype == tl.float8e4nv:
            codes = tl.where(tl.abs(x) > 464.0, 0x7F, codes)  # 464 lies between 448, which is even, and 480
        else:
            infinity = tl.where(x < 0, 0xFC, 0x7C)
            codes = tl.where(tl.abs(x) >= 61440.0, infinity, codes)  # between 57344, which is odd, and 65536
        y = codes.to(tl.uint8).to(dtype, bitcast=True)
    return y


@triton.jit
def _float8_codes(x, FRACTION: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, SATURATE: tl.constexpr):
    """The bits of ``x`` in float8, by integers: for the interpreter, whose conversion neither rounds nor saturates."""
    cut = 23 - FRACTION  # fraction bits that go
    bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    half = (1 << (cut - 1)) - 1 + ((size >> cut) & 1)  # less what makes a tie go to even
    normal = ((size + half) >> cut).to(tl.int32) - ((127 - BIAS) << FRACTION)
    # Below the smallest normal number: adding one whose last place is float8's smallest step rounds to that step.
    step = tl.full(x.shape, (127 + (1 - BIAS - FRACTION) + 23) << 23, tl.uint32)
    small = (size.to(tl.float32, bitcast=True) + step.to(tl.float32, bitcast=True)).to(tl.uint32, bitcast=True) - step
    codes = tl.where(size < ((128 - BIAS) << 23), small.to(tl.int32), normal)
    codes = tl.where(codes > LARGEST, LARGEST if SATURATE else LARGEST + 1, codes)  # after it: NaN, or infinity
    codes = tl.where(x == x, codes, 0x7F)
    return (codes | ((bits >> 31) << 7).to(tl.int32)).to(tl.uint8)


@triton.jit
def to_float32(x):
    """Any narrower float as float32, exactly.

    The interpreter knows neither infinities nor NaN in float8, and takes subnormals of bfloat16 for zeros.
    """
    y = x.to(tl.float32)
    if INTERPRETED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif INTERPRETED and x.dtype == tl.float8e4nv:
        y = tl.where((x.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F, float("nan"), y)
    elif INTERPRETED and x.dtype == tl.float8e5:
        beyond = tl.where((x.to(tl.uint8, bitcast=True) & 3) > 0, float("nan"), y * float("inf"))
        y = tl.where(tl.abs(y) > 65535.0, beyond, y)
    return y


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


@triton.jit
def dot_in_order(a, b, acc):
    """``dot``, each element of it added up in an order that does not depend on the shapes.

    On a GPU that is the instruction's, 16 products after another; the interpreter's BLAS has one for each shape.
    """
    if INTERPRETED and len(acc.shape) == 3:
        acc = acc + tl.sum(a.to(tl.float32)[:, :, :, None] * b.to(tl.float32)[:, None, :, :], axis=2)
    elif INTERPRETED:
        acc = acc + tl.sum(a.to(tl.float32)[:, None, :] * tl.trans(b.to(tl.float32))[None, :, :], axis=2)
    else:
        acc = dot(a, b, acc)
    return acc
