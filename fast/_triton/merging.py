"""Segments of attention that several programs computed parts of (`paging.py` says who), put together in one launch.

A segment that lies in one program is written by it. One that was cut leaves a part in each of its programs: (acc, top,
total) in float32, in a scratch with two places a program, because a program cuts at most two segments, one at either
end. Each program then counts itself in, at the counter of the program where the segment begins; the one that comes last
merges all parts, in order, and sets the counter back to 0 for the next launch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fast._triton import softmax
from fast._triton.paging import has_units, sequence, worker_of
from fast._triton.rounding import store

FEWEST_COUNTERS = 1024  # more than the programs that any GPU is given

_counters: dict[tuple[int, int], torch.Tensor] = {}  # by device and stream
_spare: dict[int, torch.Tensor] = {}  # by device


class Scratch(NamedTuple):
    """What the programs of a launch leave for each other."""

    parts: torch.Tensor  # [num_programs, 2, TILE_Q, TILE_D], sums of values
    stats: torch.Tensor  # [num_programs, 2, 2, TILE_Q], the top and the total of each row
    counters: torch.Tensor  # [num_programs], 0 between launches


def make_scratch(like: torch.Tensor, num_programs: int, tile_q: int, tile_d: int) -> Scratch:
    """For one launch. The counters are kept, one set for each stream, because launches on one do not overlap."""
    parts = torch.empty((num_programs, 2, tile_q, tile_d), dtype=torch.float32, device=like.device)
    stats = torch.empty((num_programs, 2, 2, tile_q), dtype=torch.float32, device=like.device)
    return Scratch(parts, stats, zero_counters(like, num_programs))


def zero_counters(like: torch.Tensor, count: int) -> torch.Tensor:
    """At least ``count`` int32 zeros on that device, which every launch must leave as zeros.

    What is allocated during a capture holds nothing until the graph runs, and would have to be zeroed in it, launch by
    launch. So an ordinary launch leaves a set behind for the next stream that captures one.
    """
    device = like.device.index or 0
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    counters = _counters.get((device, stream))
    if counters is None or len(counters) < count:
        counters = _spare.pop(device, None) if capturing else None
        if counters is None or len(counters) < count:
            counters = torch.zeros(max(count, FEWEST_COUNTERS), dtype=torch.int32, device=like.device)
            if capturing:
                return counters
        _counters[device, stream] = counters
    if like.is_cuda and not capturing and device not in _spare:
        _spare[device] = torch.zeros_like(counters)
    return counters


@triton.jit
def store_rows(
    acc, top, total, out_ptr, sinks_ptr, token, head, there, dim, stride_out_token, stride_out_head, stride_out_dim,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Divide by the total, a sink counted in, and store the rows that are there. ``top`` is in base 2.

    ``dim`` says which number of the head each column of ``acc`` is; ``HEAD_DIM`` or more, and it is none.
    """
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=there, other=0.0).to(tl.float32) * softmax.LOG2E
        new_top = tl.maximum(top, sink)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.exp2(sink - shift)
        acc = acc * rescale[:, None]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # a row without keys: 0 / 1
    offset = token[:, None] * stride_out_token + head[:, None] * stride_out_head + dim[None, :] * stride_out_dim
    store(out_ptr + offset, acc, there[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def store_rows_without_keys(
    program, num_programs, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_heads, dim, out_ptr,
    stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Zeros for every ``num_programs``-th of the sequences, where it has no units (`paging.has_units`)."""
    zeros = (dim * 0).to(out_ptr.dtype.element_ty)
    for seq in range(program, num_seqs, num_programs):
        first, num_queries, seq_len = sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity)
        if not has_units(num_queries, seq_len, QUERIES):
            for row in range(num_queries * num_heads):
                token, head = (first + row // num_heads).to(tl.int64), row % num_heads
                row_ptr = out_ptr + token * stride_out_token + head * stride_out_head
                tl.store(row_ptr + dim * stride_out_dim, zeros, mask=dim < HEAD_DIM)


@triton.jit
def finish_segment(
    acc, top, total, seg_begin, seg_end, begin, end, line, num_workers, program, parts_ptr, stats_ptr, counters_ptr,
    out_ptr, sinks_ptr, token, head, there, dim, stride_out_token, stride_out_head, stride_out_dim,
    HEAD_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Write a segment's result, or leave this program's part of it, and merge the parts if all are there."""
    if (seg_begin >= begin) & (seg_end <= end):
        store_rows(
            acc, top, total, out_ptr, sinks_ptr, token, head, there, dim, stride_out_token, stride_out_head,
            stride_out_dim, HEAD_DIM,
        )  # fmt: skip
    else:
        store_part(
            acc, top, total, tl.arange(0, TILE_Q), tl.arange(0, TILE_D), place_of_part(program, seg_begin, begin),
            parts_ptr, stats_ptr, there, dim, HEAD_DIM, TILE_Q, TILE_D,
        )  # fmt: skip
        if is_last(seg_begin, seg_end, line, num_workers, counters_ptr):
            first = worker_of(seg_begin, num_workers, line)
            last = worker_of(seg_end - 1, num_workers, line)
            merge_parts(
                first, last, parts_ptr, stats_ptr, out_ptr, sinks_ptr, token, head, there, dim,
                stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, TILE_Q, TILE_D,
            )  # fmt: skip


@triton.jit
def place_of_part(program, seg_begin, begin):
    """Of a program's two places, the first is for a segment that began before its share."""
    return program * 2 + (seg_begin >= begin).to(tl.int32)


@triton.jit
def store_part(
    acc, top, total, row, column, place, parts_ptr, stats_ptr, there, dim,
    HEAD_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Leave a part at its place in the scratch, the rows that are there."""
    place = place.to(tl.int64)
    stored = there[:, None] & (dim < HEAD_DIM)[None, :]
    offset = row[:, None] * TILE_D + column[None, :]
    tl.store(parts_ptr + place * (TILE_Q * TILE_D) + offset, acc, mask=stored)
    tl.store(stats_ptr + place * (2 * TILE_Q) + row, top, mask=there)
    tl.store(stats_ptr + place * (2 * TILE_Q) + TILE_Q + row, total, mask=there)


@triton.jit
def merge_parts(
    first, last, parts_ptr, stats_ptr, out_ptr, sinks_ptr, token, head, there, dim,
    stride_out_token, stride_out_head, stride_out_dim,
    HEAD_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Merge what the programs from ``first`` to ``last`` left of a segment, and store its rows.

    Nobody else works on it by now, so what counts is how many loads are under way at once: a step takes a few rows of
    many parts, and the loads of the steps after it are started before it is computed.
    """
    FEW: tl.constexpr = 4 if TILE_Q <= 32 else 32
    PARTS: tl.constexpr = max(1, 8192 // (FEW * TILE_D))
    in_dims = (dim < HEAD_DIM)[None, :]
    steps = (last - first + PARTS) // PARTS  # for the same rows
    num_rows = tl.sum(there.to(tl.int32), 0)
    top, total = softmax.empty(FEW)
    acc = tl.zeros([FEW, TILE_D], tl.float32)
    for step in tl.range(0, (num_rows + FEW - 1) // FEW * steps, num_stages=3):
        row = step // steps * FEW + tl.arange(0, FEW)
        part = first + step % steps * PARTS + tl.arange(0, PARTS)
        loaded = (part <= last)[:, None] & (row < num_rows)[None, :]
        place = (part * 2 + (part == first).to(tl.int32)).to(tl.int64)[:, None] * TILE_Q
        stats = stats_ptr + place * 2 + row[None, :]
        part_top = tl.load(stats, mask=loaded, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(stats + TILE_Q, mask=loaded, other=0.0, cache_modifier=".cg")
        values = tl.load(
            parts_ptr + ((place + row[None, :]) * TILE_D)[:, :, None] + tl.arange(0, TILE_D)[None, None, :],
            mask=loaded[:, :, None] & in_dims[None, :, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        begins = step % steps == 0  # other rows begin
        top, total = tl.where(begins, float("-inf"), top), tl.where(begins, 0.0, total)
        acc = tl.where(begins, 0.0, acc)
        new_top = tl.maximum(top, tl.max(part_top, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        old, weights = tl.exp2(top - shift), tl.exp2(part_top - shift[None, :])
        total = total * old + tl.sum(weights * part_total, 0)
        acc = acc * old[:, None] + tl.sum(weights[:, :, None] * values, 0)
        top = new_top
        if step % steps == steps - 1:
            own = row[:, None] == tl.arange(0, TILE_Q)[None, :]
            store_rows(
                acc, top, total, out_ptr, sinks_ptr,
                tl.sum(tl.where(own, token[None, :], 0), 1), tl.sum(tl.where(own, head[None, :], 0), 1),
                row < num_rows, dim, stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM,
            )  # fmt: skip


@triton.jit
def is_last(seg_begin, seg_end, line, num_workers, counters_ptr):
    """Count this program in, its part of a cut segment stored; whether the others were all there already."""
    first = worker_of(seg_begin, num_workers, line)
    last = worker_of(seg_end - 1, num_workers, line)
    tl.debug_barrier()  # the stores of all threads come before the count
    arrived = tl.atomic_add(counters_ptr + first, 1, sem="acq_rel", scope="gpu")
    if arrived == last - first:
        tl.store(counters_ptr + first, 0)
    return arrived == last - first


@triton.jit
def merge(acc, top, total, part_acc, part_top, part_total):
    """Two states of the same rows as one; the multiply-adds are spelled out, so that every kernel rounds alike."""
    new_top = tl.maximum(top, part_top)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = tl.exp2(top - shift), tl.exp2(part_top - shift)
    acc = tl.fma(part_acc, tl.broadcast_to(new[:, None], part_acc.shape), acc * old[:, None])
    return acc, new_top, tl.fma(part_total, new, total * old)
