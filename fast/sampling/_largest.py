"""The largest logit of each row: by it the runner knows whether a row is sound.

It is read of every row of every step, beside the draw. A vocabulary is long and rows may be few, so a row is shared
out among programs; what each of them finds is compared by torch.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import cdiv, next_power_of_2, runs_kernels

MOST_COLUMNS = 8192  # of a program: 32 a thread


@triton.jit
def _largest_kernel(
    logits_ptr,  # [num_rows, num_columns]
    found_ptr,  # [num_rows, num_parts] float32
    stride_row,
    num_columns,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    wait_for_predecessor(OVERLAP)
    x = tl.load(logits_ptr + row * stride_row + column, mask=column < num_columns, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    tl.store(found_ptr + row * tl.num_programs(1) + part, tl.max(x, 0))


def largest(logits: Tensor) -> Tensor:
    """Of each row, in float32; +inf if one of them is NaN.

    The runner serves decoders of plain torch too, whose logits may lie where no kernel runs.

    Example:
        >>> largest(torch.tensor([[1.0, 3.0, -2.0], [0.0, torch.nan, 1.0], [-torch.inf] * 3])).tolist()
        [3.0, inf, -inf]
    """
    if not runs_kernels(logits):
        best = logits.float().amax(dim=1)
        return torch.where(best.isnan(), torch.inf, best)
    num_rows, num_columns = logits.shape
    columns = min(next_power_of_2(num_columns), MOST_COLUMNS)
    parts = cdiv(num_columns, columns)
    found = torch.empty(num_rows, parts, dtype=torch.float32, device=logits.device)
    if num_rows:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        _largest_kernel[(num_rows, parts)](
            logits, found, logits.stride(0), num_columns, COLUMNS=columns, num_warps=8, **overlapped(logits)
        )
    return found[:, 0] if parts == 1 else found.amax(dim=1)
