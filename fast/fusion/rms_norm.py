"""RMSNorm, alone and after a residual add, in Triton. What the technique is for: `reference/fusion/rms_norm.py`."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor as Array

from fast._checks import require, require_float, require_out, require_same_device, require_shape
from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import cdiv, next_power_of_2
from fast._triton.rounding import store, to_dtype

# A program of narrow rows (heads) takes as many as make up this many numbers.
TILE_SIZE = 2048


def choose_tile(hidden_size: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program. By the width of a row alone: then the order in which a row is summed, and
    every bit of its result, is the same in any batch.

    A thread holds 8 to 16 numbers of a row, one or two loads of 16 bytes in bf16; more only in very wide rows.
    """
    columns = next_power_of_2(hidden_size)
    rows = max(1, TILE_SIZE // columns)
    size = rows * columns
    return rows, columns, min(max(size // 256, 1), 8) if size <= 4096 else min(size // 512, 32)


@triton.jit
def _norm_rows(values, weight, hidden_size, eps):
    """Each row of ``values`` over its root mean square, times ``weight``; beyond the row's end values are 0."""
    mean_square = tl.sum(values * values, axis=1) / hidden_size
    return values * tl.rsqrt(mean_square + eps)[:, None] * weight[None, :]


@triton.jit
def _steps(dim, stride):
    """Offsets along a row: past 2**31 where the numbers of a row lie far apart."""
    return (dim.to(tl.int64) * stride)[None, :]


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [num_outer, num_inner, hidden_size]
    weight_ptr,  # [hidden_size]
    out_ptr,  # like x
    stride_x_outer,
    stride_x_inner,
    stride_x_dim,
    stride_weight,
    stride_out_outer,
    stride_out_inner,
    stride_out_dim,
    num_rows,
    num_inner,
    hidden_size,
    eps,
    TILE_ROWS: tl.constexpr,
    TILE_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_predecessor(OVERLAP)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    dim = tl.arange(0, TILE_D)
    outer, inner = (row // num_inner).to(tl.int64), (row % num_inner).to(tl.int64)
    in_row = dim < hidden_size
    in_tile = (row < num_rows)[:, None] & in_row[None, :]

    x_ptrs = x_ptr + (outer * stride_x_outer + inner * stride_x_inner)[:, None] + _steps(dim, stride_x_dim)
    values = tl.load(x_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dim * stride_weight, mask=in_row).to(tl.float32)
    out_ptrs = out_ptr + (outer * stride_out_outer + inner * stride_out_inner)[:, None] + _steps(dim, stride_out_dim)
    store(out_ptrs, _norm_rows(values, weight, hidden_size, eps), in_tile)


def rms_norm(
    x: Float[Array, "*rows hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "*rows hidden_size"] | None = None,
) -> Float[Array, "*rows hidden_size"]:
    """Same contract as `reference.fusion.rms_norm.rms_norm`.

    Grid: one program per row; per several, where they are narrow.
    Moves: each row once in and once out; ``weight`` from cache.
    Limits: rows that lie more than two axes deep in a strided tensor are copied first. A row is held in registers,
    which it fills at 32768 features in 16 bits and 16384 in float32; wider ones are right, and slower.
    """
    require_shape("rms_norm", "weight", weight, (None,))
    if x.shape[-1:] != weight.shape:
        require(False, "rms_norm", "x", f"rows of {len(weight)}", f"shape {list(x.shape)}")
    require_float("rms_norm", "x", x)
    require_float("rms_norm", "weight", weight)
    require_same_device("rms_norm", x=x, weight=weight, out=out)
    require(eps > 0, "rms_norm", "eps", "a number above 0", eps)
    require_out("rms_norm", out, tuple(x.shape), x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not out.numel():
        return out
    rows_in, rows_out = _rows(x), _rows(out)
    rows_in = x.reshape(-1, 1, len(weight)) if rows_in is None else rows_in
    target = torch.empty(rows_in.shape, dtype=x.dtype, device=x.device) if rows_out is None else rows_out
    num_outer, num_inner, hidden_size = rows_in.shape
    tile_rows, tile_d, num_warps = choose_tile(hidden_size)
    _rms_norm_kernel[(cdiv(num_outer * num_inner, tile_rows),)](
        rows_in, weight, target,
        *rows_in.stride(), weight.stride(0), *target.stride(),
        num_outer * num_inner, num_inner, hidden_size, eps,
        TILE_ROWS=tile_rows, TILE_D=tile_d, num_warps=num_warps, **overlapped(x),
    )  # fmt: skip
    return out if rows_out is not None else out.copy_(target.view(out.shape))


def _rows(x: Array) -> Array | None:
    """The same memory as [num_outer, num_inner, hidden_size]; None if no such view exists."""
    if x.ndim == 2:
        return x[:, None]
    if x.ndim == 3:
        return x
    try:
        return x.view(-1, 1, x.shape[-1])
    except RuntimeError:
        return None


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,  # [num_tokens, hidden_size]
    residual_ptr,  # [num_tokens, hidden_size]
    weight_ptr,  # [hidden_size]
    out_ptr,  # [num_tokens, hidden_size]
    residual_out_ptr,  # [num_tokens, hidden_size]
    stride_x_token,
    stride_x_dim,
    stride_residual_token,
    stride_residual_dim,
    stride_weight,
    stride_out_token,
    stride_out_dim,
    stride_residual_out_token,
    stride_residual_out_dim,
    num_tokens,
    hidden_size,
    eps,
    TILE_ROWS: tl.constexpr,
    TILE_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_predecessor(OVERLAP)
    token = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    dim = tl.arange(0, TILE_D)
    in_row = dim < hidden_size
    in_tile = (token < num_tokens)[:, None] & in_row[None, :]

    x_ptrs = x_ptr + (token * stride_x_token)[:, None] + _steps(dim, stride_x_dim)
    residual_ptrs = residual_ptr + (token * stride_residual_token)[:, None] + _steps(dim, stride_residual_dim)
    x = tl.load(x_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dim * stride_weight, mask=in_row).to(tl.float32)

    total = to_dtype(x + residual, residual_out_ptr.dtype.element_ty)  # normed as later layers will read it
    sum_ptrs = (token * stride_residual_out_token)[:, None] + _steps(dim, stride_residual_out_dim)
    tl.store(residual_out_ptr + sum_ptrs, total, mask=in_tile)
    out_ptrs = out_ptr + (token * stride_out_token)[:, None] + _steps(dim, stride_out_dim)
    store(out_ptrs, _norm_rows(total.to(tl.float32), weight, hidden_size, eps), in_tile)


def add_rms_norm(
    x: Float[Array, "num_tokens hidden_size"],
    residual: Float[Array, "num_tokens hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
    residual_out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> tuple[Float[Array, "num_tokens hidden_size"], Float[Array, "num_tokens hidden_size"]]:
    """Same contract as `reference.fusion.rms_norm.add_rms_norm`.

    Grid: one program per row; per several, where they are narrow.
    Moves: two rows in and two rows out, where an addition and a norm by themselves move five.
    Limits: as ``rms_norm``.
    """
    require_shape("add_rms_norm", "x", x, (None, None))
    require_shape("add_rms_norm", "residual", residual, tuple(x.shape))
    require_shape("add_rms_norm", "weight", weight, (x.shape[1],))
    for name, array in (("x", x), ("residual", residual), ("weight", weight)):
        require_float("add_rms_norm", name, array)
    require_same_device("add_rms_norm", x=x, residual=residual, weight=weight, out=out, residual_out=residual_out)
    require(eps > 0, "add_rms_norm", "eps", "a number above 0", eps)
    require_out("add_rms_norm", out, tuple(x.shape), x.dtype)
    require_out("add_rms_norm", residual_out, tuple(x.shape), x.dtype)
    out = x.new_empty(x.shape) if out is None else out
    residual_out = x.new_empty(x.shape) if residual_out is None else residual_out
    if out.numel():
        num_tokens, hidden_size = x.shape
        tile_rows, tile_d, num_warps = choose_tile(hidden_size)
        _add_rms_norm_kernel[(cdiv(num_tokens, tile_rows),)](
            x, residual, weight, out, residual_out,
            *x.stride(), *residual.stride(), weight.stride(0), *out.stride(), *residual_out.stride(),
            num_tokens, hidden_size, eps,
            TILE_ROWS=tile_rows, TILE_D=tile_d, num_warps=num_warps, **overlapped(x),
        )  # fmt: skip
    return out, residual_out


def rms_norm_linear(
    x: Float[Array, "num_tokens hidden_size"],
    norm_weight: Float[Array, " hidden_size"],
    weight: Float[Array, "out_features hidden_size"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    eps: float,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.fusion.rms_norm.rms_norm_linear`. The kernel is in `_norm_linear`, which imports this
    file."""
    from fast.fusion import _norm_linear

    return _norm_linear.rms_norm_linear(x, norm_weight, weight, bias, eps=eps, out=out)
