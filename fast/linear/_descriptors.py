"""Many tokens times a weight, both brought by the copy engine: tiles whose bits are those of `_matmul`.

A sum is taken 16 columns at a time, from first to last, on whichever tensor core instruction the shape of the tile
brings (measured on an H100: mma.sync m16n8k16 and wgmma m64n8..256k16 agree bit for bit, with either operand first).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor as Array
from triton.tools.tensor_descriptor import TensorDescriptor

from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import INTERPRETING, cdiv, num_processors
from fast._triton.rounding import dot_in_order, to_dtype
from fast.linear._matmul import GROUP, IN_INTERPRETER, place_of


class Block(NamedTuple):
    """How a program cuts tokens, rows of the weight, and columns."""

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    persistent: bool  # one program a processor, which goes on to the next tile while the last is being stored


# From large to small: the larger, the less is read for each product.
BLOCKS = (
    Block(128, 256, 64, 8, 3, True),
    Block(128, 128, 64, 4, 6, False),
    Block(64, 128, 64, 4, 7, False),
    Block(64, 64, 128, 4, 5, False),
)
FULL = 0.9  # of the processors: with fewer tiles than this, smaller ones


def choose_block(num_tokens: int, out_features: int, processors: int) -> Block:
    """The largest of which there are enough; the smallest, if there are never enough.

    Example:
        >>> [choose_block(n, 4096, 132).tokens for n in (4096, 512, 128)]
        [128, 128, 64]
    """
    for block in BLOCKS:
        if cdiv(num_tokens, block.tokens) * cdiv(out_features, block.rows) >= FULL * processors:
            return block
    return BLOCKS[-1]


@triton.jit
def _one_tile(
    tile,
    x_desc,
    weight_desc,
    out_desc,
    bias_ptr,
    residual_ptr,
    stride_residual_m,
    num_tokens,
    out_features,
    in_features,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    STAGES: tl.constexpr,
):
    first_token, first_row = place_of(tile, num_tokens, out_features, TILE_M, TILE_N, GROUP)
    acc = tl.zeros([TILE_M, TILE_N], tl.float32)
    for k in tl.range(0, in_features, TILE_K, num_stages=STAGES):  # type: ignore[reportGeneralTypeIssues]
        x = x_desc.load([first_token, k])
        w = weight_desc.load([first_row, k])
        acc = dot_in_order(x, tl.trans(w), acc)
    if HALVES:
        left, right = tl.split(tl.permute(tl.reshape(acc, [TILE_M, 2, TILE_N // 2]), (0, 2, 1)))
        _finish(
            left, first_token, first_row, out_desc, bias_ptr, residual_ptr, stride_residual_m, num_tokens, out_features
        )
        first_row += TILE_N // 2
        _finish(
            right, first_token, first_row, out_desc, bias_ptr, residual_ptr, stride_residual_m, num_tokens, out_features
        )
    else:
        _finish(
            acc, first_token, first_row, out_desc, bias_ptr, residual_ptr, stride_residual_m, num_tokens, out_features
        )


@triton.jit
def _finish(
    y, first_token, first_row, out_desc, bias_ptr, residual_ptr, stride_residual_m, num_tokens, out_features
):  # fmt: skip
    """``y + bias + residual``, rounded once."""
    n = first_row + tl.arange(0, y.shape[1])
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < out_features).to(tl.float32)[None, :]
    if residual_ptr is not None:
        token = first_token + tl.arange(0, y.shape[0]).to(tl.int64)
        mask = (token < num_tokens)[:, None] & (n < out_features)[None, :]
        pointers = residual_ptr + token[:, None] * stride_residual_m + n[None, :]
        y += tl.load(pointers, mask=mask).to(tl.float32)
    out_desc.store([first_token, first_row], to_dtype(y, out_desc.dtype))


@triton.jit
def _tile_kernel(
    x_desc,  # [num_tokens, in_features] in tiles of [TILE_M, TILE_K]
    weight_desc,  # [out_features, in_features] in tiles of [TILE_N, TILE_K]
    out_desc,  # [num_tokens, out_features] in tiles of [TILE_M, TILE_N], or halves of them
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    stride_residual_m,
    num_tokens,
    out_features,
    in_features,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_predecessor(OVERLAP)
    _one_tile(
        tl.program_id(0), x_desc, weight_desc, out_desc, bias_ptr, residual_ptr, stride_residual_m,
        num_tokens, out_features, in_features, TILE_M, TILE_N, TILE_K, GROUP, HALVES, STAGES,
    )  # fmt: skip


@triton.jit
def _persistent_kernel(
    x_desc,  # [num_tokens, in_features] in tiles of [TILE_M, TILE_K]
    weight_desc,  # [out_features, in_features] in tiles of [TILE_N, TILE_K]
    out_desc,  # [num_tokens, out_features] in tiles of [TILE_M, TILE_N], or halves of them
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    stride_residual_m,
    num_tokens,
    out_features,
    in_features,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A processor's tiles one after another in one flat loop: loads for the next begin before this one is stored."""
    wait_for_predecessor(OVERLAP)
    num_tiles = tl.cdiv(num_tokens, TILE_M) * tl.cdiv(out_features, TILE_N)
    for tile in tl.range(  # type: ignore[reportGeneralTypeIssues]
        tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True
    ):
        _one_tile(
            tile, x_desc, weight_desc, out_desc, bias_ptr, residual_ptr, stride_residual_m,
            num_tokens, out_features, in_features, TILE_M, TILE_N, TILE_K, GROUP, HALVES, STAGES,
        )  # fmt: skip


def matmul_described(
    x: Array, weight: Array, bias: Array | None, residual: Array | None, out: Array, block: Block | None = None
) -> Array:
    """``out = residual + x weight^T + bias``; x, weight and out as the copy engine wants them, of one 16-bit dtype."""
    num_tokens, (out_features, in_features) = len(x), weight.shape
    processors = num_processors(x)
    block = block or choose_block(num_tokens, out_features, processors)
    columns = IN_INTERPRETER if INTERPRETING else block.columns
    tiles = cdiv(num_tokens, block.tokens) * cdiv(out_features, block.rows)
    halves = residual is not None and block.persistent  # the residual takes shared memory beside the loads to come
    # and one whose rows are too odd for wide loads takes more of it than a stage
    narrow = halves and residual is not None and residual.stride(0) % 16 != 0
    constants: dict[str, Any] = {
        "TILE_M": block.tokens,
        "TILE_N": block.rows,
        "TILE_K": columns,
        "GROUP": GROUP,
        "HALVES": halves,
        "STAGES": block.stages - narrow,
        "num_warps": block.warps,
        **overlapped(x),
    }
    kernel, grid = (_persistent_kernel, min(processors, tiles)) if block.persistent else (_tile_kernel, tiles)
    kernel[(grid,)](
        TensorDescriptor.from_tensor(x, [block.tokens, columns]),
        TensorDescriptor.from_tensor(weight, [block.rows, columns]),
        TensorDescriptor.from_tensor(out, [block.tokens, block.rows // 2 if halves else block.rows]),
        bias, residual, 0 if residual is None else residual.stride(0), num_tokens, out_features, in_features,
        **constants,
    )  # fmt: skip
    return out
