"""Few tokens times a weight: what the linear layers of a decoding step share.

With so few tokens time is the weight's trip from memory, so the kernels here are ways of having enough of it in flight:
every program owns a few rows of the weight, all of their columns, and streams them once. Nobody waits for another
program's part of a sum. A single token is read by a helper that the caller hands over (``READ``): as it is, times a
norm's weight, or gated.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.overlap import let_successor_come, overlapped, wait_for_predecessor
from fast._triton.platform import INTERPRETING, cdiv, next_power_of_2, num_processors
from fast._triton.rounding import dot, store

FEW_TOKENS = 32  # beyond, the tensor cores' own tiles are full and cuBLAS is at its best
LINE = 128  # bytes that a prefetch brings to the L2 cache
MAX_PREFETCH = 8  # lines of each row for one token: more of them keep the loads waiting that are needed first
MAX_PREFETCH_FEW = 32  # for a few tokens


class Tiles(NamedTuple):
    """How a weight is cut up for so many tokens."""

    rows: int  # of the weight, that one program owns
    columns: int  # of them, that one step of a warp (several tokens) or of the program (one token) takes
    tokens: int  # 1: multiplied by the ordinary units; more: by the tensor cores, padded to this
    warps: int
    stages: int


def choose_tiles(num_tokens: int, out_features: int, in_features: int, itemsize: int, is_plain: bool = True) -> Tiles:
    """Enough programs for every processor to have some, each with as much in flight as fits.

    A single token that is not ``is_plain`` is made from something else by every program: so they are fewer.

    Example:
        >>> choose_tiles(1, 4096, 1024, 2).tokens, choose_tiles(9, 4096, 1024, 2).tokens
        (1, 16)
    """
    if num_tokens > 1:
        tokens = 8 if num_tokens <= 8 else next_power_of_2(num_tokens)
        if tokens == 8:
            return Tiles(16, 128, tokens, 4, 4)
        return Tiles(16 if out_features <= 2048 else 32, 64, tokens, 4, 4 if tokens < 32 else 3)
    if out_features < 2048:  # few rows: narrow programs, so that there are enough
        rows, vectors, warps = 1 if is_plain else 4, 128, 4
    elif in_features >= 2048:
        rows, vectors, warps = 1 if is_plain else 8, 256, 8
    else:  # a row is one step
        rows, vectors, warps = 16, 128, 8
    if INTERPRETING:  # a program takes milliseconds there
        rows = max(rows, 4)
    size = 16 // itemsize
    columns = min(vectors * size, max(next_power_of_2(in_features), 32 * size))
    return Tiles(rows, columns, 1, min(warps, max(1, rows * columns // (32 * size))), 1)


# ---- helpers --------------------------------------------------------------------------------------------------------


@triton.jit
def read_plain(x_ptr, side_ptr, k, in_features, mask):
    """What column ``k`` of the weight is multiplied by; and what is squared, where there is a norm: here the same."""
    x = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
    return x, x


@triton.jit
def load_columns(pointers, in_columns, EVEN: tl.constexpr):
    """Of the weight; no mask where every step has all of its columns."""
    if EVEN:
        w = tl.load(pointers)
    else:
        w = tl.load(pointers, mask=in_columns, other=0.0)
    return w


@triton.jit
def prefetch(pointers):
    """The 128 bytes around each are brought to the L2 cache; nothing is read, so anyone may still write them."""
    address = pointers.to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def begin(
    weight_ptr,
    row,
    stride_weight_n,
    in_features,
    NUM_LINES: tl.constexpr,
    LINE: tl.constexpr,
    OVERLAP: tl.constexpr,
    EARLY: tl.constexpr = True,
):
    """Ask for the head of the weight's rows, let the next kernel come if ``EARLY``, and wait for the one before to end.

    Only the L2 cache is told what will be needed, so nothing is wrong if the kernel before is what makes the weight.
    """
    if OVERLAP and NUM_LINES > 0:
        line = tl.minimum(tl.arange(0, NUM_LINES) * LINE, in_features - 1)
        prefetch(weight_ptr + row[:, None] * stride_weight_n + line[None, :])
    wait_for_predecessor(OVERLAP, EARLY)


@triton.jit
def finish(y, bias_ptr, residual_ptr, out_ptr, residual_offset, out_offset, n, mask):
    """``y + bias + residual``, rounded once."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=mask).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + residual_offset, mask=mask).to(tl.float32)
    store(out_ptr + out_offset, y, mask)


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _one_token_kernel(
    x_ptr,  # [1, in_features], or [1, 2 * in_features]
    side_ptr,  # [in_features]: what READ needs besides, or None
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [1, out_features] or None
    out_ptr,  # [1, out_features]
    eps,  # None: no norm
    stride_weight_n,
    out_features,
    in_features,
    READ: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    NUM_LINES: tl.constexpr,
    LINE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    row = tl.minimum(n, out_features - 1).to(tl.int64)  # rows past the end are read again, and not stored
    begin(weight_ptr, row, stride_weight_n, in_features, NUM_LINES, LINE, OVERLAP)
    acc = tl.zeros([TILE_N, TILE_K // VECTOR], tl.float32)
    squares = tl.zeros([TILE_K], tl.float32)
    for start in tl.range(0, in_features, TILE_K, num_stages=STAGES):  # type: ignore[reportGeneralTypeIssues]
        k = start + tl.arange(0, TILE_K)
        in_columns = k < in_features
        w = load_columns(weight_ptr + row[:, None] * stride_weight_n + k[None, :], in_columns[None, :], EVEN)
        value, x = READ(x_ptr, side_ptr, k, in_features, in_columns)
        if eps is not None:
            squares += x * x
        products = w.to(tl.float32) * value[None, :]
        acc += tl.sum(tl.reshape(products, [TILE_N, TILE_K // VECTOR, VECTOR]), axis=2)  # of one thread
    y = tl.sum(acc, axis=1)
    if eps is not None:
        y = y * (1.0 / tl.sqrt(tl.sum(squares, axis=0) / in_features + eps))
    finish(y, bias_ptr, residual_ptr, out_ptr, n, n, n, n < out_features)


@triton.jit
def _few_tokens_kernel(
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
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
    NUM_LINES: tl.constexpr,
    LINE: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each warp has columns of its own, and a sum of its own for every row; they are added up at the end."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    row = tl.minimum(n, out_features - 1).to(tl.int64)
    begin(weight_ptr, row, stride_weight_n, in_features, NUM_LINES, LINE, OVERLAP, EARLY)
    token = tl.arange(0, TILE_M)
    in_batch = token < num_tokens
    x_row = token.to(tl.int64) * stride_x_m
    column = tl.arange(0, WARPS)[:, None, None] * TILE_K + tl.arange(0, TILE_K)[None, None, :]
    acc = tl.zeros([WARPS, TILE_N, TILE_M], tl.float32)
    for start in tl.range(0, in_features, WARPS * TILE_K, num_stages=STAGES):  # type: ignore[reportGeneralTypeIssues]
        k = start + column
        in_columns = k < in_features
        w = load_columns(weight_ptr + row[None, :, None] * stride_weight_n + k, in_columns, EVEN)
        x_mask = in_batch[None, :, None] & in_columns
        x = tl.load(x_ptr + x_row[None, :, None] + k, mask=x_mask, other=0.0)
        acc = dot(w, tl.permute(x, (0, 2, 1)), acc)
    if not EARLY:
        let_successor_come(OVERLAP)
    y = tl.permute(tl.sum(acc, axis=0), (1, 0))  # [TILE_M, TILE_N]
    token = token[:, None].to(tl.int64)
    mask = in_batch[:, None] & (n < out_features)[None, :]
    n = n[None, :]
    finish(y, bias_ptr, residual_ptr, out_ptr, token * stride_residual_m + n, token * stride_out_m + n, n, mask)


# ---- launching ------------------------------------------------------------------------------------------------------


def skinny_linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    *,
    read: Any = read_plain,
    side: Array | None = None,
    eps: float | None = None,
    tiles: Tiles | None = None,
) -> Array:
    """``out = residual + x weight^T + bias`` for few tokens.

    For one, ``read`` may make more of ``x`` on the way in, and with ``eps`` the product is divided by the root mean
    square of ``x``.
    """
    num_tokens, (out_features, in_features) = len(x), weight.shape
    if not (num_tokens and out_features):
        return out
    itemsize = weight.element_size()
    tiles = tiles or choose_tiles(num_tokens, out_features, in_features, itemsize, read is read_plain)
    most = MAX_PREFETCH if tiles.tokens == 1 else MAX_PREFETCH_FEW
    grid = (cdiv(out_features, tiles.rows),)
    common: dict[str, Any] = {
        "TILE_N": tiles.rows,
        "TILE_K": tiles.columns,
        "NUM_LINES": min(next_power_of_2(cdiv(in_features * itemsize, LINE)), most),
        "LINE": LINE // itemsize,
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
        **(overlapped(weight) if in_features else {"OVERLAP": False}),  # nothing to prefetch
    }
    if tiles.tokens == 1:
        even = in_features % tiles.columns == 0
        _one_token_kernel[grid](
            x, side, weight, bias, residual, out, eps, weight.stride(0), out_features, in_features,
            **common, **{"READ": read, "VECTOR": 16 // itemsize, "EVEN": even},
        )  # fmt: skip
        return out
    even = in_features % (tiles.columns * tiles.warps) == 0
    early = grid[0] >= num_processors(x)  # fewer programs than processors are faster without the next kernel's
    _few_tokens_kernel[grid](
        x, weight, bias, residual, out, x.stride(0), weight.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0), num_tokens, out_features, in_features,
        **common, **{"TILE_M": tiles.tokens, "WARPS": tiles.warps, "EVEN": even, "EARLY": early},
    )  # fmt: skip
    return out


def whole_rows(array: Array) -> Array:
    """The array, if its last axis is contiguous, as the kernels want it; else a copy."""
    return array if array.stride(-1) == 1 or array.shape[-1] <= 1 else array.contiguous()


def rows_of(residual: Array | None) -> Array | None:
    """`whole_rows` of what may be there."""
    return None if residual is None else whole_rows(residual)
