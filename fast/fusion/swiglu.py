"""SwiGLU, in Triton. What the technique is for: `reference/fusion/swiglu.py`."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor as Array

from fast._checks import require, require_float, require_out, require_same_device, require_shape
from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import INTERPRETED, cdiv, next_power_of_2
from fast._triton.rounding import store

# What a program makes: two loads of 16 bytes a thread from each half in bf16, with four warps.
TILE_SIZE = 2048

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_E_REST = tl.constexpr(1.925963033500e-08)  # what float32 drops of it
_LN_2 = tl.constexpr(0.6931471805599453)


def choose_tile(intermediate_size: int) -> tuple[int, int]:
    """(rows, columns) of a program: part of a wide row, or several narrow ones."""
    columns = min(next_power_of_2(intermediate_size), TILE_SIZE)
    return TILE_SIZE // columns, columns


@triton.jit
def _exp(x):
    """e^x to a unit or two in the last place: a GPU's is 2^(x log2 e), off by the rounding of a product of size x."""
    if INTERPRETED:
        y = tl.exp(x)
    else:
        power = x * _LOG2_E
        lost = tl.fma(x, _LOG2_E, -power) + x * _LOG2_E_REST
        y = tl.exp2(power)
        y = tl.where(y < float("inf"), y + y * (lost * _LN_2), y)
    return y


@triton.jit
def silu_times(gate, up, EXACT: tl.constexpr):
    """silu(gate) * up, in float32; ``EXACT`` where the result is not rounded to 16 bits."""
    # e^-z is infinite only where silu(z) = z / inf is 0 in truth as well
    grown = _exp(-gate) if EXACT else tl.exp(-gate)
    return gate / (1.0 + grown) * up


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,  # [num_tokens, 2 * intermediate_size]
    out_ptr,  # [num_tokens, intermediate_size]
    stride_gate_up_token,
    stride_gate_up_dim,
    stride_out_token,
    stride_out_dim,
    num_tokens,
    intermediate_size,
    TILE_ROWS: tl.constexpr,
    TILE_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_predecessor(OVERLAP)
    tiles_per_row = tl.cdiv(intermediate_size, TILE_D)
    token = (tl.program_id(0) // tiles_per_row).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    dim = (tl.program_id(0) % tiles_per_row * TILE_D + tl.arange(0, TILE_D)).to(tl.int64)
    in_tile = (token < num_tokens)[:, None] & (dim < intermediate_size)[None, :]

    gate_ptrs = gate_up_ptr + (token * stride_gate_up_token)[:, None] + (dim * stride_gate_up_dim)[None, :]
    up_ptrs = (
        gate_up_ptr
        + (token * stride_gate_up_token)[:, None]
        + ((dim + intermediate_size) * stride_gate_up_dim)[None, :]
    )
    gate = tl.load(gate_ptrs, mask=in_tile).to(tl.float32)
    up = tl.load(up_ptrs, mask=in_tile).to(tl.float32)
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    out_ptrs = out_ptr + (token * stride_out_token)[:, None] + (dim * stride_out_dim)[None, :]
    store(out_ptrs, silu_times(gate, up, EXACT), in_tile)


def swiglu(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    *,
    out: Float[Array, "num_tokens intermediate_size"] | None = None,
) -> Float[Array, "num_tokens intermediate_size"]:
    """Same contract as `reference.fusion.swiglu.swiglu`.

    Grid: one program per ``TILE_SIZE`` numbers of the result: of one row where it is wide, of several where not.
    Moves: two numbers in for each one out.
    """
    require_shape("swiglu", "gate_up", gate_up, (None, None))
    require_float("swiglu", "gate_up", gate_up)
    require_same_device("swiglu", gate_up=gate_up, out=out)
    num_tokens, width = gate_up.shape
    require(width % 2 == 0, "swiglu", "gate_up", "rows of even length", width)
    intermediate_size = width // 2
    require_out("swiglu", out, (num_tokens, intermediate_size), gate_up.dtype)
    out = gate_up.new_empty((num_tokens, intermediate_size)) if out is None else out
    if out.numel():
        tile_rows, tile_d = choose_tile(intermediate_size)
        _swiglu_kernel[(cdiv(intermediate_size, tile_d) * cdiv(num_tokens, tile_rows),)](
            gate_up, out,
            *gate_up.stride(), *out.stride(),
            num_tokens, intermediate_size,
            TILE_ROWS=tile_rows, TILE_D=tile_d, **overlapped(out),
        )  # fmt: skip
    return out


def swiglu_linear_add(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    weight: Float[Array, "out_features intermediate_size"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.fusion.swiglu.swiglu_linear_add`. The kernel is in `_swiglu_linear`, which imports
    this file."""
    from fast.fusion import _swiglu_linear

    return _swiglu_linear.swiglu_linear_add(gate_up, weight, residual, bias, out=out)
