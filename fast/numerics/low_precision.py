"""Rounding to fp16, bf16 and fp8, in Triton. What it is for: `reference/numerics/low_precision.py`."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Shaped
from torch import Tensor as Array

from fast._checks import FLOATS, dtype_name, require, require_out
from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import INTERPRETING, cdiv, require_runnable
from fast._triton.rounding import to_dtype, to_dtype_saturating, to_float8, to_float32
from reference.numerics.low_precision import FLOAT_FORMATS

FLOATS8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FORMATS = {name: getattr(torch, name) for name in FLOAT_FORMATS}
_TRITON = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}

# Numbers a program rounds; in the interpreter a program costs milliseconds, however large.
TILE = 65536 if INTERPRETING else 2048


@triton.jit
def _round(x, dtype: tl.constexpr, SATURATE: tl.constexpr):
    """float32 as ``dtype``; beyond its largest number as ``round_to`` says."""
    if SATURATE:
        y = to_dtype_saturating(x, dtype)
    elif dtype == tl.float8e4nv or dtype == tl.float8e5:
        y = to_float8(x, dtype, False)
    else:
        y = to_dtype(x, dtype)
    return y


@triton.jit
def _round_kernel(
    x_ptr,  # [num_values]
    out_ptr,  # [num_values]
    num_values,
    FORMAT: tl.constexpr,
    SATURATE: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_predecessor(OVERLAP)
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = to_float32(tl.load(x_ptr + place, mask=place < num_values))
    rounded = _round(x, FORMAT, SATURATE)
    if out_ptr.dtype.element_ty != FORMAT:
        rounded = _round(to_float32(rounded), out_ptr.dtype.element_ty, False)
    tl.store(out_ptr + place, rounded, mask=place < num_values)


def round_to(
    x: Float[Array, "*shape"], format: str, *, saturate: bool = True, out: Float[Array, "*shape"] | None = None
) -> Float[Array, "*shape"]:
    """Same contract as `reference.numerics.low_precision.round_to`.

    Grid: one program per ``TILE`` numbers.
    Moves: every number in and out once.
    Limits: what is not contiguous is copied first (an ``out``, afterwards).
    """
    _check("round_to", x, format)
    require_out("round_to", out, tuple(x.shape), x.dtype)
    if _keeps_all(x.dtype, format):
        return x.clone() if out is None else out.copy_(x)
    if out is not None and out.is_contiguous():
        return _launch(x, format, saturate, out)
    rounded = _launch(x, format, saturate, torch.empty(x.shape, dtype=x.dtype, device=x.device))
    return rounded if out is None else out.copy_(rounded)


def cast(x: Float[Array, "*shape"], format: str, *, saturate: bool = True) -> Shaped[Array, "*shape"]:
    """Same contract as `reference.numerics.low_precision.cast`. As ``round_to``, but for the dtype of the result."""
    _check("cast", x, format)
    if x.dtype == FORMATS[format]:
        return x.clone()
    saturate = saturate and not _keeps_all(x.dtype, format)
    return _launch(x, format, saturate, torch.empty(x.shape, dtype=FORMATS[format], device=x.device))


def _check(op: str, x: Array, format: str) -> None:
    require(x.dtype in FLOATS + FLOATS8, op, "x", "a floating dtype of at most 32 bits", dtype_name(x.dtype))
    require_runnable(op, "x", x)
    require(format in FORMATS, op, "format", f"one of {', '.join(FORMATS)}", repr(format))


def _keeps_all(dtype: torch.dtype, format: str) -> bool:
    """Whether all values of ``dtype`` stay as they are, infinities too."""
    return dtype == FORMATS[format] or format == "float32"


def _launch(x: Array, format: str, saturate: bool, out: Array) -> Array:
    if x.numel():
        _round_kernel[(cdiv(x.numel(), TILE),)](
            x.contiguous(), out, x.numel(),
            FORMAT=_TRITON[FORMATS[format]], SATURATE=saturate, TILE=TILE, **overlapped(x),
        )  # fmt: skip
    return out
