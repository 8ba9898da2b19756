"""Rounding to fp16, bf16 and fp8, by arithmetic one can follow.

A binary floating-point format is a ruler whose marks lie closer together near zero. Between :math:`2^e` and
:math:`2^{e+1}` the marks are :math:`2^{e-m}` apart, m being the bits of its fraction: that distance is the *ulp*, the
unit in the last place. Below the smallest normal exponent the distance stops shrinking, and what lies there are the
subnormals. To round is to measure x in ulps, take the nearest whole number of them, and multiply back.

| format   | fraction | smallest normal | largest | ulp at 1 | beyond the largest  |
|----------|----------|-----------------|---------|----------|---------------------|
| float16  | 10 bits  | `2**-14`        | 65504   | `2**-10` | inf                 |
| bfloat16 | 7 bits   | `2**-126`       | 3.39e38 | `2**-7`  | inf                 |
| e4m3fn   | 3 bits   | `2**-6`         | 448     | `2**-3`  | NaN (it has no inf) |
| e5m2     | 2 bits   | `2**-14`        | 57344   | `2**-2`  | inf                 |
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray as Array

from reference._checks import compute_dtype, deliver, require, require_float, require_out
from reference.numerics.arrays import dtype_named


class FloatFormat(NamedTuple):
    """What there is to know about a binary floating-point format in order to round to it."""

    fraction_bits: int  # after the leading 1
    min_exponent: int  # of the smallest normal number
    largest: float  # finite
    overflow: float  # what stands for a value beyond the largest


FLOAT_FORMATS = {
    "float32": FloatFormat(23, -126, (2 - 2**-23) * 2.0**127, np.inf),
    "float16": FloatFormat(10, -14, (2 - 2**-10) * 2.0**15, np.inf),
    "bfloat16": FloatFormat(7, -126, (2 - 2**-7) * 2.0**127, np.inf),
    # "fn": finite, NaN only. The pattern that would be 480 is the NaN, so the largest value is 1.75 * 2**8.
    "float8_e4m3fn": FloatFormat(3, -6, 1.75 * 2.0**8, np.nan),
    "float8_e5m2": FloatFormat(2, -14, 1.75 * 2.0**15, np.inf),
}


def round_to(
    x: Float[Array, "*shape"], format: str, *, saturate: bool = True, out: Float[Array, "*shape"] | None = None
) -> Float[Array, "*shape"]:
    r"""The values of ``x`` rounded to the nearest number of a narrower format, ties to even, in the dtype of ``x``.

    .. math::
        ulp = 2^{\max(\lfloor \log_2 |x| \rfloor, \; e_{min}) - m} \qquad out = ulp \cdot round(x / ulp)

    with m the format's fraction bits and :math:`e_{min}` its smallest normal exponent. *Even* is a whole number of
    ulps that 2 divides, which is a bit pattern that ends in 0.

    Args:
        x: Any shape. NaN stays NaN; zeros keep their sign.
        format: "float16", "bfloat16", "float8_e4m3fn" or "float8_e5m2" (or "float32", for float64 values).
        saturate: Beyond the largest finite value give that value, for infinities too, as KV caches and weights want
            it; otherwise what ml_dtypes gives: infinity, or NaN for e4m3fn, once a value rounds past the largest.
            Where ``format`` is the dtype of ``x``, or "float32" and that dtype narrower, all values stay, infinities
            too.
        out: Where to write the result; may be ``x``.

    Numerics:
        Dividing by a power of two is exact, so the only rounding is the one that is wanted: float64 values are rounded
        once, never through float32. (A result that the dtype of ``x`` cannot hold, 65504 as bfloat16 in float16,
        becomes infinite there.)

    Raises:
        ValueError: If the format is unknown, ``x`` is not floating or ``out`` has another shape.

    Source:
        IEEE 754-2019, section 4.3.1 (roundTiesToEven); Micikevicius et al., "FP8 Formats for Deep Learning" (2022),
        table 1, for e4m3 and e5m2; bfloat16 is the upper half of a float32.

    Example:
        >>> x = np.array([1.0625, 1.1875, 0.001, 500.0])    # two ties (to 1 and to 1.25), a subnormal, too large
        >>> [float(value) for value in round_to(x, "float8_e4m3fn")]
        [1.0, 1.25, 0.001953125, 448.0]
    """
    require_float("round_to", "x", x)
    require_out("round_to", out, x.shape, x.dtype)
    rounded = _round("round_to", x, format, saturate)
    with np.errstate(over="ignore", invalid="ignore"):  # a narrow dtype of x may not hold what a wide format does
        return deliver(rounded, x.dtype, out)


def cast(x: Float[Array, "*shape"], format: str, *, saturate: bool = True) -> Shaped[Array, "*shape"]:
    """``round_to``, stored in the dtype named ``format``: ``cast(x, "float8_e5m2")`` takes a byte a value.

    Args and raises as ``round_to``; "float32" is the way back, and exact unless ``x`` is float64.

    Example:
        >>> cast(np.array([0.25, 1e9]), "float8_e4m3fn").view(np.uint8)      # 1.0 x 2**-2; the largest, 448
        array([ 40, 126], dtype=uint8)
    """
    require_float("cast", "x", x)
    with np.errstate(invalid="ignore"):  # NaNs that signal
        return _round("cast", x, format, saturate).astype(dtype_named(format), copy=False)  # exact by now


@np.errstate(over="ignore", invalid="ignore")  # 256 ulps of 2**120: the infinity is meant; and NaNs that signal
def _round(op: str, x: Array, name: str, saturate: bool) -> Array:
    require(name in FLOAT_FORMATS, op, "format", f"one of {', '.join(FLOAT_FORMATS)}", repr(name))
    if np.can_cast(x.dtype, dtype_named(name)):
        return x.copy()  # all its values are the format's
    format = FLOAT_FORMATS[name]
    x = x.astype(compute_dtype(x.dtype), copy=False)
    if saturate:
        x = np.clip(x, -format.largest, format.largest)  # NaN passes
    exponent = np.frexp(x)[1] - 1  # floor(log2 |x|): frexp's fraction lies in [0.5, 1)
    ulp = np.ldexp(x.dtype.type(1), np.maximum(exponent, format.min_exponent) - format.fraction_bits)
    rounded = np.rint(x / ulp) * ulp  # rint: ties to even
    if not saturate:
        rounded = np.where(np.abs(rounded) > format.largest, np.copysign(x.dtype.type(format.overflow), x), rounded)
    return rounded
