"""Rounding to nearest: the simplest way to find the numbers of a quantized weight.

A weight is kept as a small integer (or an 8-bit float), its *code*, and a scale shared with its neighbours, so that
``scale * code`` is near it. With 8 bits one scale serves a whole output row. With 4 bits there are only 16 values to
choose from, one large weight would leave none for the rest, and so the neighbours are few: a *group* of 32 to 128
input features. A group that does not lie evenly about zero spends its codes better with a minimum:
``scale * code + min``.

Everything here is host NumPy and runs once, when a model is loaded. It treats each weight alone: `gptq.py` lets the
weights of a row make up for each other's errors, `smoothquant.py` moves the outliers of the activations into the
weights, and both end in the formats of this module.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Float16, Float32, Int8, Shaped, UInt8
from numpy import ndarray as Array

from reference._checks import require, require_float, require_shape
from reference.numerics.low_precision import cast

INT8_MAX = 127  # -128 is left out, so that the codes of w and -w are opposite
INT4_MAX = 7  # as stored: 1..15 about 8; 0, which would be -8, is left out for the same reason
FP8_MAX = 448.0  # the largest finite float8_e4m3fn


def round_int8(
    weight: Float[Array, "out_features in_features"], *, group_size: int | None = None
) -> tuple[Int8[Array, "out_features in_features"], Float[Array, "out_features *num_groups"]]:
    r"""Codes of 8 bits, with a scale for each output row or for each group of a row.

    .. math::
        scale = \max_j |w_j| / 127 \qquad code_j = round(w_j / scale)

    Args:
        weight: The matrix; zeros stay exactly zero.
        group_size: Input features that share a scale, the last group of a row may have fewer; None: the whole row.

    Returns:
        The codes, -127 to 127, and the scales: float32 for rows, float16 for groups (as GGUF's Q8_0 has them). A code
        is found with the scale as stored, so the float16 rounding of a scale costs its largest weights a little.

    Source:
        Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
        2018, section 2.1, with the zero point at 0.

    Example:
        >>> codes, scale = round_int8(np.array([[0.5, -1.27, 0.002]]))
        >>> codes, scale
        (array([[  50, -127,    0]], dtype=int8), array([0.01], dtype=float32))
    """
    weight = _matrix("round_int8", weight)
    if group_size is None:
        scale = np.abs(weight).max(axis=1, initial=0) / np.float32(INT8_MAX)
        codes = weight / _divisor(scale)[:, None]
    else:
        scale = cast(_per_group(np.maximum, np.abs(weight), group_size) / np.float32(INT8_MAX), "float16")
        codes = weight / _spread(_divisor(scale), weight.shape[1], group_size)
    return np.clip(np.rint(codes), -INT8_MAX, INT8_MAX).astype(np.int8), scale


def round_fp8(
    weight: Float[Array, "out_features in_features"],
) -> tuple[Float[Array, "out_features in_features"], Float32[Array, " out_features"]]:
    r"""Codes that are 8-bit floats (e4m3), with a scale for each output row that sends its largest weight to 448.

    .. math::
        scale = \max_j |w_j| / 448 \qquad code_j = fp8(w_j / scale)

    Small weights keep a relative precision of :math:`2^{-4}` where an integer would have an absolute one: better for
    rows with outliers, worse for rows without.

    Source:
        Micikevicius et al., *FP8 Formats for Deep Learning*, 2022.

    Example:
        >>> codes, scale = round_fp8(np.array([[448.0, -0.1]]))
        >>> codes.tolist(), scale.item()
        ([[448.0, -0.1015625]], 1.0)
    """
    weight = _matrix("round_fp8", weight)
    scale = np.abs(weight).max(axis=1, initial=0) / np.float32(FP8_MAX)
    return cast(weight / _divisor(scale)[:, None], "float8_e4m3fn"), scale


def round_int4(
    weight: Float[Array, "out_features in_features"], *, group_size: int, with_min: bool = False
) -> tuple[
    UInt8[Array, "out_features in_features"],
    Float16[Array, "out_features num_groups"],
    Float16[Array, "out_features num_groups"] | None,
]:
    r"""Codes of 4 bits, 0 to 15, one a byte (`pack_int4` puts two), with a scale for each group and maybe a minimum.

    .. math::
        scale = \max_j |w_j| / 7, \quad code_j = round(w_j / scale) + 8 \qquad \text{or} \qquad
        scale = (\max_j w_j - min) / 15, \quad code_j = round((w_j - min) / scale)

    Args:
        weight: The matrix, of an even number of input features. Without a minimum, zeros stay exactly zero.
        group_size: Input features that share a scale, even; the last group of a row may have fewer.
        with_min: Spend 16 more bits a group on its smallest value.

    Returns:
        Codes, scales and minima (None without), the last two as float16. Codes are found with both as stored.

    Source:
        The symmetric form is that of GPTQ (Frantar et al., 2023, section 4); with a minimum, GGUF's Q4_1.

    Example:
        >>> codes, scale, _ = round_int4(np.array([[0.0, 7.0, -3.0, 2.0]]), group_size=4)
        >>> codes, scale.item()
        (array([[ 8, 15,  5, 10]], dtype=uint8), 1.0)
        >>> codes, scale, minimum = round_int4(np.array([[1.0, 7.0, 2.0, 16.0]]), group_size=4, with_min=True)
        >>> codes, scale.item(), minimum.item()
        (array([[ 0,  6,  1, 15]], dtype=uint8), 1.0, 1.0)
    """
    weight = _matrix("round_int4", weight)
    require(weight.shape[1] % 2 == 0, "round_int4", "weight", "an even number of in_features", weight.shape[1])
    scale, minimum = int4_scales(weight, group_size=group_size, with_min=with_min)
    zero = 8 if minimum is None else 0
    offset = np.float32(0) if minimum is None else _spread(minimum, weight.shape[1], group_size)
    codes = np.rint((weight - offset) / _spread(_divisor(scale), weight.shape[1], group_size)) + zero
    return np.clip(codes, 1 if zero else 0, 15).astype(np.uint8), scale, minimum


def int4_scales(
    weight: Float[Array, "out_features in_features"], *, group_size: int, with_min: bool
) -> tuple[Float16[Array, "out_features num_groups"], Float16[Array, "out_features num_groups"] | None]:
    """The scales and minima of `round_int4`, without the codes."""
    require(group_size > 0 and group_size % 2 == 0, "round_int4", "group_size", "a positive even number", group_size)
    if not with_min:
        return cast(_per_group(np.maximum, np.abs(weight), group_size) / np.float32(INT4_MAX), "float16"), None
    low, high = (_per_group(extreme, weight, group_size) for extreme in (np.minimum, np.maximum))
    return cast((high - low) / np.float32(15), "float16"), cast(low, "float16")


@lru_cache(maxsize=64)
def nibble_features(in_features: int, group_size: int) -> Shaped[Array, "2 packed_features"]:
    """Which input feature each packed byte holds in its low nibble (first row) and in its high one.

    Within a group of g features byte j holds feature j and feature j + g / 2. So half a group is unpacked with one mask
    and the other half with one shift, and each stays in order; GGUF's Q4_0 and Q4_1 have the same order.

    Example:
        >>> nibble_features(6, 4)       # a group of four, and a short one of two
        array([[0, 1, 4],
               [2, 3, 5]])
    """
    starts = range(0, in_features, group_size)
    groups = [np.arange(start, min(start + group_size, in_features)).reshape(2, -1) for start in starts]
    features = np.concatenate(groups, axis=1) if groups else np.zeros((2, 0), np.intp)
    features.setflags(write=False)  # the cache hands the same array to everyone
    return features


def pack_int4(
    codes: UInt8[Array, "out_features in_features"], *, group_size: int
) -> UInt8[Array, "out_features packed_features"]:
    """Two codes a byte, as `nibble_features` says.

    Example:
        >>> [hex(byte) for byte in pack_int4(np.array([[1, 2, 3, 4, 5, 6]], np.uint8), group_size=4)[0]]
        ['0x31', '0x42', '0x65']
    """
    even = codes.ndim == 2 and codes.shape[1] % 2 == 0
    require(
        even and group_size % 2 == 0, "pack_int4", "codes", "an even number of features and group_size", codes.shape
    )
    low, high = nibble_features(codes.shape[1], group_size)
    return codes.take(low, axis=1) | codes.take(high, axis=1) << 4  # take: codes[:, low] would lie column by column


def unpack_int4(
    packed: UInt8[Array, "out_features packed_features"], *, group_size: int
) -> UInt8[Array, "out_features in_features"]:
    """The inverse of `pack_int4`."""
    low, high = nibble_features(2 * packed.shape[1], group_size)
    codes = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    codes[:, low], codes[:, high] = packed & 15, packed >> 4
    return codes


def dequantize_8bit(
    weight: Shaped[Array, "out_features in_features"],
    weight_scale: Float[Array, "out_features *num_groups"],
    *,
    group_size: int | None = None,
) -> Float32[Array, "out_features in_features"]:
    """``scale * code``: what the codes of `round_int8` and `round_fp8` stand for.

    Example:
        >>> dequantize_8bit(np.array([[50, -127]], np.int8), np.array([0.5], np.float32))
        array([[ 25. , -63.5]], dtype=float32)
    """
    step = weight_scale[:, None] if group_size is None else _spread(weight_scale, weight.shape[1], group_size)
    return weight.astype(np.float32) * step.astype(np.float32)


def dequantize_int4(
    weight: UInt8[Array, "out_features packed_features"],
    weight_scale: Float[Array, "out_features num_groups"],
    weight_min: Float[Array, "out_features num_groups"] | None = None,
    *,
    group_size: int,
) -> Float32[Array, "out_features in_features"]:
    """``scale * code + min``, or ``scale * (code - 8)`` without a minimum.

    Example:
        >>> dequantize_int4(np.array([[0x31]], np.uint8), np.array([[0.5]]), np.array([[10.0]]), group_size=2)
        array([[10.5, 11.5]], dtype=float32)
    """
    codes = unpack_int4(weight, group_size=group_size).astype(np.float32)
    step = _spread(weight_scale, codes.shape[1], group_size)
    return (codes - 8) * step if weight_min is None else codes * step + _spread(weight_min, codes.shape[1], group_size)


def _matrix(op: str, weight: Array) -> Array:
    require_shape(op, "weight", weight, (None, None))
    require_float(op, "weight", weight)
    return weight.astype(np.float32, copy=False)


def _divisor(scale: Array) -> Array:
    """The scales, with 1 for 0: there all weights are 0, or so small that they round to it (or alike, at a minimum)."""
    return np.where(scale > 0, scale, scale.dtype.type(1))


def _per_group(extreme: np.ufunc, weight: Array, group_size: int) -> Array:
    """The extreme (`np.maximum`, `np.minimum`) of each group of a row."""
    return extreme.reduceat(weight, np.arange(0, weight.shape[1], group_size), axis=1)


def _spread(per_group: Array, in_features: int, group_size: int) -> Array:
    """One number a group, repeated for every feature of the group, as float32."""
    return np.repeat(per_group.astype(np.float32), group_size, axis=1)[:, :in_features]
