"""merge_states, in Triton. What the technique is for: `reference/attention/merge_states.py`."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor as Array

from fast._checks import require, require_float, require_same_device, require_shape
from fast._triton.rounding import store

TILE_NUMBERS = 2048  # of one part per program: 16 rows of 128, enough bytes in flight for an H100


@triton.jit
def merge_states_kernel(
    out_parts_ptr,  # [num_parts, num_rows, head_dim]
    lse_parts_ptr,  # [num_parts, num_rows]
    out_ptr,  # [num_tokens, num_heads, head_dim]
    lse_ptr,  # [num_rows]
    stride_part,
    stride_out_token,
    stride_out_head,
    stride_out_dim,
    num_parts,
    num_rows,
    num_heads,
    HEAD_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    dim = tl.arange(0, TILE_D)
    in_rows = row < num_rows
    in_tile = in_rows[:, None] & (dim < HEAD_DIM)[None, :]

    top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    lse_pointers = lse_parts_ptr + row
    for _ in range(num_parts):
        lse = tl.load(lse_pointers, mask=in_rows)
        top = tl.maximum(top, lse.to(tl.float32))
        lse_pointers += num_rows
    shift = tl.where(top == float("-inf"), 0.0, top)  # a row without keys: -inf - -inf would be NaN

    total = tl.zeros([TILE_ROWS], tl.float32)
    merged = tl.zeros([TILE_ROWS, TILE_D], tl.float32)
    lse_pointers = lse_parts_ptr + row
    out_pointers = out_parts_ptr + row[:, None] * HEAD_DIM + dim[None, :]
    for _ in range(num_parts):
        lse = tl.load(lse_pointers, mask=in_rows).to(tl.float32)
        weight = tl.exp(lse - shift)
        seen = (weight > 0)[:, None]  # never read what was not written
        values = tl.load(out_pointers, mask=in_tile & seen, other=0.0).to(tl.float32)
        merged += weight[:, None] * values
        total += weight
        lse_pointers += num_rows
        out_pointers += stride_part

    total = tl.where(total > 0, total, 1.0)
    merged = merged / total[:, None]
    token, head = row // num_heads, row % num_heads
    place = (token * stride_out_token + head * stride_out_head)[:, None] + dim[None, :] * stride_out_dim
    store(out_ptr + place, merged, in_tile)
    tl.store(lse_ptr + row, top + tl.log(total), mask=in_rows)


def merge_states(
    out_parts: Float[Array, "num_parts num_tokens num_heads head_dim"],
    lse_parts: Float[Array, "num_parts num_tokens num_heads"],
    *,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_heads"]]:
    """Same contract as `reference.attention.merge_states.merge_states`.

    Grid: one program per tile of rows of (token, head); it owns them in ``out`` and reads them in every part.
    Moves: every part that saw a key once, and the result once; ``lse_parts`` twice, from cache the second time.
    Limits: the parts are contiguous, or copied first.
    """
    op = "merge_states"
    require_float(op, "out_parts", out_parts)
    require_float(op, "lse_parts", lse_parts)
    require_shape(op, "out_parts", out_parts, (None, None, None, None))  # type: ignore[reportArgumentType]
    require(len(out_parts) > 0, op, "out_parts", "at least one part", list(out_parts.shape))
    require_shape(op, "lse_parts", lse_parts, tuple(out_parts.shape[:3]))  # type: ignore[reportArgumentType]
    if out is not None:
        require_float(op, "out", out)
        require_shape(op, "out", out, tuple(out_parts.shape[1:]))  # type: ignore[reportArgumentType]
    require_same_device(op, out_parts=out_parts, lse_parts=lse_parts, out=out)

    num_parts, num_tokens, num_heads, head_dim = out_parts.shape
    out = torch.empty(out_parts.shape[1:], dtype=out_parts.dtype, device=out_parts.device) if out is None else out
    lse = torch.empty(lse_parts.shape[1:], dtype=torch.float32, device=out_parts.device)
    num_rows = num_tokens * num_heads
    if num_rows:
        TILE_D = triton.next_power_of_2(max(head_dim, 1))
        TILE_ROWS = max(1, TILE_NUMBERS // TILE_D)
        merge_states_kernel[(triton.cdiv(num_rows, TILE_ROWS),)](
            out_parts.contiguous(),
            lse_parts.contiguous(),
            out,
            lse,
            num_rows * head_dim,
            *out.stride(),
            num_parts,
            num_rows,
            num_heads,
            HEAD_DIM=head_dim,
            TILE_ROWS=TILE_ROWS,
            TILE_D=TILE_D,
        )
    return out, lse
