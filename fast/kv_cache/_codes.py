"""Values as small integers: the arithmetic of `reference/kv_cache/_codes.py` in kernels, and the door of its ops."""

from typing import Any

import torch
import triton
import triton.language as tl

from fast._checks import (
    checking_values,
    require,
    require_dtype,
    require_float,
    require_integers,
    require_range,
    require_same_device,
    require_shape,
    require_values,
)

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
FLOAT16_MAX = tl.constexpr(65504.0)
TILE_NUMBERS = 2048  # of k or v in one program that quantizes: 16 a thread, so that a write has loads in flight


# ---- in kernels -------------------------------------------------------------------------------------------------


@triton.jit
def locate_rows(
    slot_mapping_ptr, slot_mapping_stride, num_rows, num_slots, block_size, num_kv_heads, TILE_ROWS: tl.constexpr
):
    """A program's rows of keys or values: (token, head, has a slot, block, offset). A slot out of range is none, and
    its block and offset are for nobody to use."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token, head = row // num_kv_heads, row % num_kv_heads
    slot = tl.load(slot_mapping_ptr + token * slot_mapping_stride, mask=row < num_rows, other=-1)
    has_slot = (slot >= 0) & (slot < num_slots)
    slot = slot.to(tl.int64)
    return token, head, has_slot, slot // block_size, slot % block_size


@triton.jit
def rint(x):
    """To the nearest integer, ties to even, for |x| < 2^22: there are no fractions left beside 1.5 * 2^23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def symmetric_ratios(x, LARGEST_CODE: tl.constexpr):
    """``x / scale``, yet to be rounded, and the scale of each row; a scale that is no normal float32 is 0."""
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([x.shape[0]], LARGEST_CODE, tl.float32))
    scale = tl.where(scale < TINY, 0.0, scale)
    steps = tl.where(scale > 0, scale, float("inf"))[:, None]
    return tl.div_rn(x, tl.broadcast_to(steps, x.shape)), scale


@triton.jit
def float16_below(x):
    """The largest float16 that is not above ``x``; |x| at most 65504."""
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True)
    # Away from zero where negative, towards it where positive. (A zero above x is -0.)
    below = (bits + tl.where(bits < 0, 1, -1)).to(tl.int16)
    return tl.where(nearest.to(tl.float32) > x, below, bits).to(tl.float16, bitcast=True)


@triton.jit
def float16_above(x):
    """The smallest float16 that is not below ``x``; x >= 0."""
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True)
    return tl.where(nearest.to(tl.float32) < x, bits + 1, bits).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def affine_range(smallest, largest, LARGEST_CODE: tl.constexpr):
    """(scale, zero) in float16, rounded outwards so that zero .. zero + scale * LARGEST_CODE covers the range."""
    zero = float16_below(smallest)
    span = largest - zero.to(tl.float32)
    return float16_above(tl.div_rn(span, tl.full(span.shape, LARGEST_CODE, tl.float32))), zero


@triton.jit
def affine_codes(x, scale, zero):
    """Codes (float32) of ``x``, at most 65504, under a scale and a zero as stored."""
    step = tl.where(scale > 0, scale.to(tl.float32), float("inf"))
    return rint(tl.div_rn(x - zero.to(tl.float32), tl.broadcast_to(step, x.shape)))


# ---- the door ---------------------------------------------------------------------------------------------------


def require_tokens(op: str, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, cache: torch.Tensor) -> None:
    """Keys and values of the same tokens, and a slot of ``cache`` for each; when checking, finite and distinct."""
    require_shape(op, "v", v, tuple(k.shape))
    require_float(op, "k", k)
    require_float(op, "v", v)
    require_integers(op, "slot_mapping", slot_mapping, (len(k),))
    require_same_device(op, k=k, v=v, k_cache=cache, slot_mapping=slot_mapping)
    if checking_values():
        require_range(op, "slot_mapping", slot_mapping, -1, cache.shape[0] * cache.shape[1])
        slots = slot_mapping[slot_mapping >= 0]
        distinct = len(slots) == len(slots.unique())
        require_values(distinct, op, "slot_mapping", "every slot at most once", "one named twice")
        for argument, x in (("k", k), ("v", v)):
            is_finite = torch.isfinite(x[slot_mapping >= 0]).all()
            require_values(is_finite, op, argument, "finite values where there is a slot", "inf or NaN")


def require_symmetric(
    op: str,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    codes: torch.dtype,
) -> None:
    """Codes of the dtype ``codes`` for every slot, and a float32 scale for each token and head."""
    require_shape(op, "k_cache", k_cache, (None, None, None, None))
    require_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
    require_shape(op, "k_scale", k_scale, tuple(k_cache.shape[:3]))
    require_shape(op, "v_scale", v_scale, tuple(k_cache.shape[:3]))
    require_dtype(op, "k_cache", k_cache, codes)
    require_dtype(op, "v_cache", v_cache, codes)
    require_dtype(op, "k_scale", k_scale, torch.float32)
    require_dtype(op, "v_scale", v_scale, torch.float32)
    require_same_device(op, k_cache=k_cache, v_cache=v_cache, k_scale=k_scale, v_scale=v_scale)


def require_affine(
    op: str,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    k_zero: torch.Tensor,
    v_scale: torch.Tensor,
    v_zero: torch.Tensor,
) -> int:
    """Two codes of 4 bits a byte, and a float16 scale and zero for each group; returns the head_dim they are for."""
    require_shape(op, "k_cache", k_cache, (None, None, None, None))
    require_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
    require_dtype(op, "k_cache", k_cache, torch.uint8)
    require_dtype(op, "v_cache", v_cache, torch.uint8)
    require_shape(op, "k_scale", k_scale, (*k_cache.shape[:3], None))
    arrays = {"k_scale": k_scale, "k_zero": k_zero, "v_scale": v_scale, "v_zero": v_zero}
    for argument, array in arrays.items():
        require_shape(op, argument, array, tuple(k_scale.shape))
        require_dtype(op, argument, array, torch.float16)
    head_dim, num_groups = 2 * k_cache.shape[3], k_scale.shape[3]
    divides = num_groups > 0 and head_dim % num_groups == 0
    require(divides, op, "k_scale", f"a number of groups that divides head_dim {head_dim}", num_groups)
    require_same_device(op, k_cache=k_cache, v_cache=v_cache, **arrays)
    return head_dim


# ---- launching --------------------------------------------------------------------------------------------------


def launch_write(
    kernel: Any,
    k: tuple[torch.Tensor, ...],
    v: tuple[torch.Tensor, ...],
    slot_mapping: torch.Tensor,
    *sizes: int,
    TILE_ROWS: int,
    **constants: int | float,
) -> None:
    """Launch a kernel that writes keys (programs with id 0 on axis 1) and values (id 1) alike.

    ``k`` and ``v`` are what it takes of each: new tokens, their cache, its scales... One launch where these have the
    same strides, as views of one projection and one pool do; else two.
    """
    (num_tokens, num_kv_heads, _), (num_blocks, block_size) = k[0].shape, k[1].shape[:2]
    num_rows = num_tokens * num_kv_heads
    alike = all(a.stride() == b.stride() and a.dtype == b.dtype for a, b in zip(k, v))
    for ks, vs, num_sides in [(k, v, 2)] if alike else [(k, k, 1), (v, v, 1)]:
        pointers = (pointer for pair in zip(ks, vs) for pointer in pair)
        strides = (stride for x in ks for stride in x.stride())
        kernel[triton.cdiv(num_rows, TILE_ROWS), num_sides](
            *pointers, slot_mapping, slot_mapping.stride(0), *strides,
            num_rows, num_blocks * block_size, block_size, num_kv_heads, *sizes, TILE_ROWS=TILE_ROWS, **constants,
        )  # fmt: skip
