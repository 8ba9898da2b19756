"""Values as small integers: scales that cover a range, codes, and codes packed into bytes."""

import numpy as np
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_shape
from reference.numerics.low_precision import cast

FLOAT16_MAX = 65504.0


# ---- symmetric: value = scale * code ----------------------------------------------------------------------------


def symmetric_ratios(op: str, argument: str, x: np.ndarray, largest_code: float) -> tuple[np.ndarray, np.ndarray]:
    """``x / scale``, yet to be rounded to codes, and the scale of each row: max|x| / largest_code in float32.

    A scale below float32's smallest normal number would have lost its own digits: it is 0, and so are the ratios.
    """
    x = x.astype(compute_dtype(x.dtype), copy=False)
    largest = np.abs(x).max(axis=-1, initial=0.0)
    in_range = largest <= np.finfo(np.float32).max  # False for NaN, which max passes on
    require(in_range.all(), op, argument, "finite values where there is a slot", "inf or NaN")
    scale = (largest / largest_code).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 0.0
    return x / np.where(scale > 0, scale, np.inf)[..., None].astype(x.dtype), scale


def symmetric_values(codes: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """scale * code, in ``dtype``; ``scale`` lacks the last axis."""
    return codes.astype(dtype, copy=False) * scale[..., None].astype(dtype)


def check_symmetric_caches(
    op: str,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    k_scale: np.ndarray,
    v_scale: np.ndarray,
    *,
    codes: type,
    heads: tuple[int | None, ...] = (None, None),
) -> None:
    """Codes of the dtype ``codes`` for every slot, and a float32 scale for each token and head."""
    require_shape(op, "k_cache", k_cache, (None, None, *heads))
    require_shape(op, "v_cache", v_cache, k_cache.shape)
    for argument, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(cache.dtype == codes, op, argument, np.dtype(codes).name, cache.dtype)
    for argument, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        require_shape(op, argument, scale, k_cache.shape[:3])
        require(scale.dtype == np.float32, op, argument, "float32", scale.dtype)


# ---- with a zero: value = zero + scale * code -------------------------------------------------------------------


def affine_codes(op: str, argument: str, x: np.ndarray, bits: int, axis: int) -> tuple[Array, Array, Array]:
    """Codes of ``x`` (uint8, its shape); a scale and a zero (float16, without ``axis``) for each row along ``axis``.

    The codes are found against the scale and zero *as stored*. These are rounded outwards, zero down and scale up, so
    that zero .. zero + scale * largest_code covers the row and no value is further than half a step from its code.
    Values beyond float16's range count as its largest. A row of equal values that float16 can hold has scale 0.
    """
    largest_code = 2**bits - 1
    x = x.astype(compute_dtype(x.dtype), copy=False)
    require(np.isfinite(x).all(), op, argument, "finite values where there is a slot", "inf or NaN")
    x = np.clip(x, -FLOAT16_MAX, FLOAT16_MAX)
    zero = _float16_toward(-np.inf, x.min(axis))
    scale = _float16_toward(np.inf, (x.max(axis) - zero.astype(x.dtype)) / largest_code)
    step = np.where(scale > 0, scale, np.inf).astype(x.dtype)
    codes = np.rint((x - np.expand_dims(zero, axis)) / np.expand_dims(step, axis))
    return codes.astype(np.uint8), scale, zero


def affine_values(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """zero + scale * code, in ``dtype``."""
    return zero.astype(dtype) + scale.astype(dtype) * codes


def _float16_toward(end: float, x: np.ndarray) -> np.ndarray:
    """``x`` in float16, rounded towards ``end`` (-inf: down, inf: up)."""
    nearest = cast(x, "float16")
    wrong_side = nearest > x if end < 0 else nearest < x
    with np.errstate(over="ignore"):  # beyond the largest there is only infinity, but that side is never wrong
        return np.where(wrong_side, np.nextafter(nearest, np.float16(end)), nearest)


# ---- heads in groups, codes in bytes ----------------------------------------------------------------------------


def groups(x: np.ndarray, num_groups: int) -> np.ndarray:
    """[..., head_dim] -> [..., num_groups, group_size]."""
    return x.reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups)


def heads(x: np.ndarray) -> np.ndarray:
    """[..., num_groups, group_size] -> [..., head_dim]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 4 or 2 bits, 8 / bits of them in a byte, along the last axis.

    The axis is cut into 8 / bits equal parts and byte j holds element j of every part, the first in its lowest bits:
    a kernel that unpacks one shift of the bytes has one contiguous part, and dots it with that part of a query.

    Example:
        >>> [hex(byte) for byte in pack(np.array([1, 2, 3, 4], np.uint8), 4)]
        ['0x31', '0x42']
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(groups(codes, len(shifts)) << shifts[:, None], axis=-2)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of ``pack``.

    Example:
        >>> unpack(np.array([0x31, 0x42], np.uint8), 4).tolist()
        [1, 2, 3, 4]
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return heads((packed[..., None, :] >> shifts[:, None]) & (2**bits - 1))
