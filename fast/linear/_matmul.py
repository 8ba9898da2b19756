"""Tiles of a matrix product, always added up in the same order: what makes a row independent of its company.

Each program makes one tile of the result, from the first column of the weight to the last in one accumulator. The
weight is the first operand of the tensor cores and the tokens are the second, so that a single token takes the same
instruction as thousands (m64 n8..256 k16 on Hopper: n, the number of tokens, does not enter into a sum). Tiles of
different sizes then agree bit for bit, and the size may be chosen by the number of tokens.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.overlap import overlapped
from fast._triton.platform import INTERPRETING, cdiv, num_processors
from fast._triton.rounding import dot_in_order
from fast.linear._skinny import begin, finish, load_columns

LINE = 128  # bytes that a prefetch brings to the L2 cache
GROUP = 8  # tiles of tokens that are done for one tile of the weight before the next: both stay in the L2 cache


class Tile(NamedTuple):
    rows: int  # of the weight
    tokens: int
    columns: int  # of the weight, in one step
    warps: int
    stages: int


# From large to small: the larger, the less is read for each product. float32 has no tensor cores of its own precision.
TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 32, 128, 4, 4),
    Tile(64, 16, 128, 4, 5),
)
TILES_FLOAT32 = (Tile(64, 64, 32, 4, 3), Tile(32, 16, 32, 4, 3))
IN_INTERPRETER = 32  # columns of a step: there a step is one sum, on a GPU it is one after another of 16 columns each
FULL = 0.9  # of the processors: with fewer tiles than this, smaller ones


def choose_tile(num_tokens: int, out_features: int, processors: int, dtype: torch.dtype) -> Tile:
    """The largest tile of which there are enough; the smallest, if there are never enough.

    Example:
        >>> choose_tile(4096, 4096, 132, torch.bfloat16)[:2], choose_tile(1, 4096, 132, torch.bfloat16)[:2]
        ((128, 256), (64, 16))
    """
    tiles = TILES_FLOAT32 if dtype == torch.float32 else TILES
    for tile in tiles:
        fits = tile.tokens < 2 * num_tokens
        if fits and cdiv(num_tokens, tile.tokens) * cdiv(out_features, tile.rows) >= FULL * processors:
            return tile
    return tiles[-1]


@triton.jit
def place_of(tile, num_tokens, out_features, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr):
    """(first token, first row of the weight) of a tile. Tiles go down ``GROUP`` tiles of tokens, then across."""
    tiles_m = tl.cdiv(num_tokens, TILE_M)
    in_group = GROUP * tl.cdiv(out_features, TILE_N)
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return (first + tile % in_group % height) * TILE_M, tile % in_group // height * TILE_N


@triton.jit
def _matmul_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    stride_x_m,
    stride_weight_n,
    stride_residual_m,
    stride_out_m,
    num_tokens,
    out_features,
    in_features,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    NUM_LINES: tl.constexpr,
    LINE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    first_token, first_row = place_of(tl.program_id(0), num_tokens, out_features, TILE_M, TILE_N, GROUP)
    token, n = first_token + tl.arange(0, TILE_M), first_row + tl.arange(0, TILE_N)
    row = tl.minimum(n, out_features - 1).to(tl.int64)  # past the end the last is read again, and not stored
    begin(weight_ptr, row, stride_weight_n, in_features, NUM_LINES, LINE, OVERLAP)
    x_row = tl.minimum(token, num_tokens - 1).to(tl.int64)
    column = tl.arange(0, TILE_K)
    weight_ptrs = weight_ptr + row[:, None] * stride_weight_n + column[None, :]
    x_ptrs = x_ptr + x_row[:, None] * stride_x_m + column[None, :]
    acc = tl.zeros([TILE_N, TILE_M], tl.float32)
    for start in tl.range(0, in_features, TILE_K, num_stages=STAGES):  # type: ignore[reportGeneralTypeIssues]
        in_columns = (column < in_features - start)[None, :]
        w = load_columns(weight_ptrs, in_columns, EVEN)
        x = load_columns(x_ptrs, in_columns, EVEN)
        if w.dtype != x.dtype:  # neither can hold the other's numbers; float32 holds both
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = dot_in_order(w, tl.trans(x), acc)
        weight_ptrs += TILE_K
        x_ptrs += TILE_K

    token = token[:, None].to(tl.int64)
    mask = (token < num_tokens) & (n < out_features)[None, :]
    n = n[None, :]
    y = tl.trans(acc)
    finish(y, bias_ptr, residual_ptr, out_ptr, token * stride_residual_m + n, token * stride_out_m + n, n, mask)


def matmul(
    x: Array, weight: Array, bias: Array | None, residual: Array | None, out: Array, *, tile: Tile | None = None
) -> Array:
    """``out = residual + x weight^T + bias``, each row the same bits in any batch; any two of the float dtypes."""
    num_tokens, (out_features, in_features) = len(x), weight.shape
    if not (num_tokens and out_features):
        return out
    wide = torch.float32 if x.dtype != weight.dtype else x.dtype
    tile = tile or choose_tile(num_tokens, out_features, num_processors(x), wide)
    columns = IN_INTERPRETER if INTERPRETING else tile.columns
    lines = 8 if tile.tokens <= 32 else 1
    constants: dict[str, Any] = {
        "TILE_M": tile.tokens,
        "TILE_N": tile.rows,
        "TILE_K": columns,
        "GROUP": GROUP,
        "EVEN": in_features % columns == 0,
        "STAGES": tile.stages,
        "NUM_LINES": lines,
        "LINE": LINE // weight.element_size(),
        "num_warps": tile.warps,
        **(overlapped(weight) if in_features else {"OVERLAP": False}),  # nothing to prefetch
    }
    _matmul_kernel[(cdiv(num_tokens, tile.tokens) * cdiv(out_features, tile.rows),)](
        x, weight, bias, residual, out, x.stride(0), weight.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0), num_tokens, out_features, in_features,
        **constants,
    )  # fmt: skip
    return out
