"""A few tokens times a weight on Hopper's wide tensor core instructions, the columns shared out among programs.

64 rows of the weight are the first operand, the tokens the second; the copy engine (tensor descriptors) keeps several
steps of both on their way. A small weight has too few tiles of 64 rows for all processors, so each may be split along
its columns: every program stores the sums of its columns, and the one that comes last of a tile adds them up, always in
the order of the columns.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor as Array
from triton.tools.tensor_descriptor import TensorDescriptor

from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import COMPILE_ONLY, INTERPRETING, cdiv, device_properties, next_power_of_2
from fast._triton.rounding import dot_in_order
from fast.linear._matmul import IN_INTERPRETER
from fast.linear._skinny import finish

ROWS = 64  # of the weight, the least that the instruction takes
MOST_SPLITS = 4
BUFFERS = 192 * 1024  # bytes of a processor's shared memory, for steps on their way
CHUNKS = 2  # of 512 bytes of each row, that are asked for while the kernel before this one ends
POOL = 2**20  # counters on each device
MOST_TILES = 1024  # of a weight that is split: fewer than a GPU has processors


class Split(NamedTuple):
    """How a product with few tokens is shared out."""

    tokens: int  # padded to
    splits: int  # programs for each tile
    columns: int  # in one step
    stages: int
    rows: int = ROWS  # of the weight, a tile's
    warps: int = 4


def most_tokens(out_features: int, in_features: int, processors: int) -> int:
    """Beyond so many cuBLAS is as fast or faster (measured on an H100): 32, 64, or 128 for large weights.

    With more than 32 a program has a processor to itself. Then, if there are more programs than processors, rows have
    to be long: what it takes to begin and to end is hidden behind nobody's work.
    """
    if out_features > ROWS * processors and in_features < 4096:
        return 32
    return 128 if out_features * in_features >= 2**25 and out_features % ROWS == 0 else 64


def choose_split(num_tokens: int, out_features: int, in_features: int, processors: int) -> Split:
    """Whole rows, unless most processors would have nothing to do: to add up parts costs two microseconds.

    Example:
        >>> [choose_split(16, n, 4096, 132).splits for n in (1024, 4096)]
        [4, 1]
    """
    tokens, tiles = max(16, next_power_of_2(num_tokens)), cdiv(out_features, ROWS)
    if tokens <= 32:
        splits = max(1, min(MOST_SPLITS, in_features // 512)) if MOST_SPLITS * tiles <= processors else 1
        alone = 2 * splits * tiles <= processors  # a program has a processor to itself, and more on its way
        return Split(tokens, splits, 128, 8 if tokens == 16 or alone else 5)
    long = in_features >= 1024
    splits = 2 if long and (4 if tokens == 64 else 2) * tiles <= processors else 1
    rows, warps = (2 * ROWS, 8) if tiles >= 3 * processors else (ROWS, 4)
    return Split(tokens, splits, 128, BUFFERS // ((tokens + rows) * 256), rows, warps)


def unsplit(num_tokens: int) -> Split:
    """One program for each tile and all of its columns: a sum's order is that of the columns, and of nothing else."""
    tokens = max(16, next_power_of_2(num_tokens))
    return Split(tokens, 1, 128, 8 if tokens <= 32 else 6)


def describable(*arrays: Array) -> bool:
    """Whether the copy engine is there, and takes them: contiguous rows that begin at multiples of 16 bytes."""
    engine = INTERPRETING or COMPILE_ONLY or device_properties(arrays[0].device.index).major >= 9
    return engine and all(map(_is_describable, arrays))


def _is_describable(array: Array) -> bool:
    step, unit = array.stride()
    return unit == 1 and step >= array.shape[1] and step * array.itemsize % 16 == 0 and array.data_ptr() % 16 == 0


@triton.jit
def ask_for(
    weight_ptr,
    n,
    column,
    stride_weight_n,
    out_features,
    in_features,
    CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """512 bytes each into the L2 cache. Nothing is wrong if the kernel before is what makes the weight."""
    if OVERLAP and CHUNKS > 0:
        row = tl.minimum(n, out_features - 1).to(tl.int64)[:, None]
        chunk = tl.minimum(column + 256 * tl.arange(0, CHUNKS), in_features - 256)[None, :]
        address = (weight_ptr + row * stride_weight_n + chunk).to(tl.int64)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0;",
            "=r,l",
            [address],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _split_kernel(
    x_desc,  # [num_tokens, in_features] in tiles of [TILE_M, TILE_K]
    weight_desc,  # [out_features, in_features] in tiles of [TILE_N, TILE_K]
    weight_ptr,
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [num_tokens, out_features] or None
    out_ptr,  # [num_tokens, out_features]
    parts_ptr,  # [num_tiles, splits, TILE_N, TILE_M] float32, or None: not split
    counters_ptr,  # [num_tiles], zeros before and after
    stride_weight_n,
    stride_residual_m,
    stride_out_m,
    num_tokens,
    out_features,
    in_features,
    split_features,  # a multiple of TILE_K
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * TILE_N + tl.arange(0, TILE_N)
    start = split * split_features
    ask_for(weight_ptr, n, start, stride_weight_n, out_features, in_features, CHUNKS, OVERLAP)
    wait_for_predecessor(OVERLAP)
    acc = tl.zeros([TILE_N, TILE_M], tl.float32)
    stop = tl.minimum(start + split_features, in_features)
    for k in tl.range(start, stop, TILE_K, num_stages=STAGES):  # type: ignore[reportGeneralTypeIssues]
        w = weight_desc.load([tile * TILE_N, k])
        x = x_desc.load([0, k])
        acc = dot_in_order(w, tl.trans(x), acc)

    token = tl.arange(0, TILE_M)
    if parts_ptr is not None:
        splits = tl.num_programs(1)
        place = tl.arange(0, TILE_N)[:, None] * TILE_M + token[None, :]
        part_ptrs = parts_ptr + (tile * splits).to(tl.int64) * (TILE_N * TILE_M) + place
        tl.store(part_ptrs + split * (TILE_N * TILE_M), acc)
        tl.debug_barrier()  # all of the program's threads have stored when one of them counts it in
        last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == splits - 1
        if last:
            acc = tl.zeros([TILE_N, TILE_M], tl.float32)
            for other in range(splits):
                acc += tl.load(part_ptrs + other * (TILE_N * TILE_M), cache_modifier=".cg")
            tl.store(counters_ptr + tile, 0)
        num_tokens = tl.where(last, num_tokens, 0)  # the others have nothing to store
    token = token[:, None].to(tl.int64)
    mask = (token < num_tokens) & (n < out_features)[None, :]
    n = n[None, :]
    y = tl.trans(acc)
    finish(y, bias_ptr, residual_ptr, out_ptr, token * stride_residual_m + n, token * stride_out_m + n, n, mask)


def split_linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    split: Split,
    chunks: int = CHUNKS,
) -> Array:
    """``out = residual + x weight^T + bias`` for as many tokens as ``split`` has room for."""
    num_tokens, (out_features, in_features) = len(x), weight.shape
    num_tiles = cdiv(out_features, split.rows)
    columns = IN_INTERPRETER if INTERPRETING else split.columns
    split_features = cdiv(cdiv(in_features, split.splits), columns) * columns
    splits = cdiv(in_features, split_features)
    parts = counters = None
    if splits > 1:
        parts = torch.empty(num_tiles * splits * split.rows * split.tokens, dtype=torch.float32, device=x.device)
        counters = take_counters(x, num_tiles)
    constants: dict[str, Any] = {
        "TILE_M": split.tokens,
        "TILE_N": split.rows,
        "TILE_K": columns,
        "CHUNKS": chunks if in_features >= 256 else 0,
        "STAGES": split.stages,
        "num_warps": split.warps,
        **overlapped(x),
    }
    _split_kernel[(num_tiles, splits)](
        TensorDescriptor.from_tensor(x, [split.tokens, columns]),
        TensorDescriptor.from_tensor(weight, [split.rows, columns]),
        weight, bias, residual, out, parts, counters,
        weight.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        num_tokens, out_features, in_features, split_features, **constants,
    )  # fmt: skip
    return out


# ---- counters -------------------------------------------------------------------------------------------------------

_pools: dict[int, Array] = {}  # by device
_of_stream: dict[tuple[int, int], int] = {}  # where in the pool those of (device, stream) begin
_next: dict[int, int] = {}  # by device: the first that nobody has


def take_counters(like: Array, count: int) -> Array:
    """``count`` zeros, which a launch must leave as zeros, that no launch on another stream uses at the same time.

    Launches on a stream follow each other and share theirs. A launch that is captured into a graph may be replayed on
    any stream, and gets its own.
    """
    if not like.is_cuda:
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    device, capturing = like.device.index, torch.cuda.is_current_stream_capturing()
    if device not in _pools:
        if capturing:  # what is allocated now holds nothing until the graph runs: it is zeroed in the graph
            return torch.zeros(count, dtype=torch.int32, device=like.device)
        _pools[device] = torch.zeros(POOL, dtype=torch.int32, device=like.device)
        torch.cuda.current_stream(like.device).synchronize()  # once: another stream may be the next to use them
    if capturing:
        start = _reserve(device, count)
    else:
        key = device, torch.cuda.current_stream(like.device).cuda_stream
        if key not in _of_stream:
            _of_stream[key] = _reserve(device, MOST_TILES)
        start = _of_stream[key]
    return _pools[device][start : start + count]


def _reserve(device: int, count: int) -> int:
    """The next so many of the pool; after the last the first are taken again."""
    start = _next.get(device, 0)
    start = 0 if start + count > POOL else start
    _next[device] = start + count
    return start
