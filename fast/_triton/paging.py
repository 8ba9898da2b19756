"""The schedule of attention over a paged cache, for every format of it: who computes what, and how parts are merged.

**Work** is counted in units: one tile of keys (``TILE_KV`` tokens) for one tile of query rows of one KV head. The rows
of a tile are ``TILE_Q // GROUP`` queries times the ``GROUP`` heads that share the KV head, so a decode fills the tile
with its group. A *segment* is all the units of one tile of rows. The units of a batch stand in one line: by sequence,
then KV head, then segment, then keys. Program p of n takes the p-th n-th of the line, wherever that begins and ends: a
persistent grid with the same load everywhere, be it one long decode, many short ones or a chunk of a prompt among
decodes. Nothing but ``seq_lens`` and ``cu_seqlens_q`` decides it, on the device, so a captured graph stays right.

The early segments of a prompt see few keys and the late ones many. So they stand in line in pairs, the last with the
first: each pair of a sequence then gets the same number of units, ``width``, and finding a segment takes a division,
not a search. (A unit or two at the end of a pair may be idle.)

**Merge.** A segment that lies in one program is written by it. One that was cut leaves a part in each of its programs:
(acc, top, total) in float32, in a scratch with two places a program, because a program cuts at most two segments, one
at either end. Each program then counts itself in, at the counter of the program where the segment begins; the one that
comes last merges all parts, in order, and sets the counter back to 0 for the next launch.

In a kernel::

    line, num_workers, begin, end, seq, seq_begin = find_share(...)
    while unit < end:
        first_row, num_queries, seq_len = sequence(seq, ...)
        per_head, width = units_per_head(...)
        if unit >= seq_begin + per_head * num_kv_heads:      # on to the next sequence
        else: find_segment(...), rows_of_tile(...), (acc, top, total) over its keys, finish_segment(...)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fast._triton import softmax
from fast._triton.platform import COMPILE_ONLY
from fast._triton.rounding import store

SEARCH = tl.constexpr(256)  # sequences that a program looks through at a time for its share
MIN_UNITS = tl.constexpr(2)  # a program takes at least so much: a shorter part costs more to merge than it saves

_counters: dict[tuple[int, int], torch.Tensor] = {}


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

    A graph captured before any ordinary launch gets its own, zeroed in the graph: what is allocated during a capture
    holds nothing until the graph runs.
    """
    on_gpu = like.is_cuda
    stream = torch.cuda.current_stream(like.device).cuda_stream if on_gpu else 0
    key = like.device.index or 0, stream
    counters = _counters.get(key)
    if counters is None or counters.numel() < count:
        counters = torch.zeros(max(count, 1024), dtype=torch.int32, device=like.device)
        if not (on_gpu and torch.cuda.is_current_stream_capturing()) and not COMPILE_ONLY:
            _counters[key] = counters
    return counters


@triton.jit
def sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity):
    """(first row of q, number of queries, tokens) of a sequence or a vector of them, kept inside the arrays."""
    known = seq < num_seqs
    first = tl.load(cu_seqlens_q_ptr + seq, mask=known, other=0).to(tl.int32)
    stop = tl.load(cu_seqlens_q_ptr + seq + 1, mask=known, other=0).to(tl.int32)
    seq_len = tl.load(seq_lens_ptr + seq, mask=known, other=0).to(tl.int32)
    first = tl.minimum(tl.maximum(first, 0), num_tokens)
    num_queries = tl.minimum(tl.maximum(stop, first), num_tokens) - first
    return first, num_queries, tl.minimum(tl.maximum(seq_len, 0), capacity)


@triton.jit
def key_tiles(tile, num_queries, seq_len, window, QUERIES: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr):
    """(first, number of) the tiles of keys that some query of a tile sees; at least one, to have a result written."""
    context = seq_len - num_queries
    end = context + tl.minimum((tile + 1) * QUERIES, num_queries)
    stop = (tl.maximum(end, 0) + TILE_KV - 1) // TILE_KV
    start = tile * 0
    if WINDOWED:
        start = tl.maximum(context + tile * QUERIES + 1 - window, 0) // TILE_KV
    return start, tl.maximum(stop - start, 1)


@triton.jit
def units_per_head(
    num_queries, seq_len, window, QUERIES: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr,
    FEW: tl.constexpr = False,
):  # fmt: skip
    """(units of a sequence for one KV head, units of a pair of its segments).

    FEW: sequences with more queries than a tile holds have none; they are another kernel's.
    """
    num_tiles = (num_queries + QUERIES - 1) // QUERIES
    context = tl.maximum(seq_len - num_queries, 0)
    width = (2 * context + num_queries + 2 * QUERIES) // TILE_KV + 2  # at least what the two segments see
    if WINDOWED:
        width = tl.minimum(width, 2 * ((window + QUERIES) // TILE_KV + 2))
    _, middle = key_tiles(num_tiles // 2, num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED)
    per_head = (num_tiles // 2) * width + (num_tiles % 2) * middle
    if FEW:
        per_head = tl.where(num_tiles <= 1, per_head, 0)
    return per_head, width


@triton.jit
def total_units(
    seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
    QUERIES: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr, FEW: tl.constexpr = False,
):  # fmt: skip
    """The length of the line."""
    total = 0
    for first in range(0, num_seqs, SEARCH):
        seq = first + tl.arange(0, SEARCH)
        _, num_queries, seq_len = sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity)
        per_head, _ = units_per_head(num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED, FEW)
        total += tl.sum(per_head, 0) * num_kv_heads
    return total


@triton.jit
def share_of(program, num_programs, total, FEWEST: tl.constexpr = MIN_UNITS):
    """(first unit, last + 1, programs that have any) of a program's share of the line."""
    num_workers = tl.minimum(num_programs, tl.maximum(total // FEWEST, 1))
    share, more = total // num_workers, total % num_workers  # the first ``more`` programs take one unit more
    begin = program * share + tl.minimum(program, more)
    end = begin + share + (program < more).to(tl.int32)
    return begin, tl.where(program < num_workers, end, begin), num_workers


@triton.jit
def worker_of(unit, num_workers, total):
    """The program whose share holds a unit."""
    share, more = total // num_workers, total % num_workers
    long = more * (share + 1)  # units of the programs that take one more
    return tl.where(unit < long, unit // (share + 1), more + (unit - long) // tl.maximum(share, 1))


@triton.jit
def find_sequence(
    unit, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
    QUERIES: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr, FEW: tl.constexpr = False,
):  # fmt: skip
    """(the sequence that holds a unit of the line, that sequence's first unit)."""
    found, found_begin, before = 0, 0, 0
    for first in range(0, num_seqs, SEARCH):
        seq = first + tl.arange(0, SEARCH)
        _, num_queries, seq_len = sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity)
        per_head, _ = units_per_head(num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED, FEW)
        ends = before + tl.cumsum(per_head * num_kv_heads, 0)
        passed = (ends <= unit) & (seq < num_seqs)
        found += tl.sum(passed.to(tl.int32), 0)
        found_begin = tl.maximum(found_begin, tl.max(tl.where(passed, ends, 0), 0))
        before = tl.max(ends, 0)
    return found, found_begin


@triton.jit
def find_share(
    program, num_programs, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
    QUERIES: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr, FEWEST: tl.constexpr = MIN_UNITS,
    FEW: tl.constexpr = False,
):  # fmt: skip
    """``total_units``, ``share_of`` and ``find_sequence`` at once, for up to ``SEARCH`` sequences in one look.

    Returns (units of the line, programs that have any, first unit of the share, last + 1, sequence, its first unit).
    """
    if num_seqs <= SEARCH:
        seq = tl.arange(0, SEARCH)
        _, num_queries, seq_len = sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity)
        per_head, _ = units_per_head(num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED, FEW)
        ends = tl.cumsum(per_head * num_kv_heads, 0)
        line = tl.max(ends, 0)
        begin, end, num_workers = share_of(program, num_programs, line, FEWEST)
        passed = (ends <= begin) & (seq < num_seqs)
        found = tl.sum(passed.to(tl.int32), 0)
        found_begin = tl.max(tl.where(passed, ends, 0), 0)
    else:
        line = total_units(
            seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
            QUERIES, TILE_KV, WINDOWED, FEW,
        )  # fmt: skip
        begin, end, num_workers = share_of(program, num_programs, line, FEWEST)
        found, found_begin = find_sequence(
            begin, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
            QUERIES, TILE_KV, WINDOWED, FEW,
        )  # fmt: skip
    return line, num_workers, begin, end, found, found_begin


@triton.jit
def find_segment(
    unit, seq_begin, per_head, width, num_queries, seq_len, window,
    QUERIES: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The segment at a unit: (KV head, tile of rows, first tile of keys, its first unit, its last + 1, the next's).

    An idle unit gives the segment before it, which it lies behind.
    """
    kv_head = (unit - seq_begin) // per_head
    head_begin = seq_begin + kv_head * per_head
    early = (unit - head_begin) // width
    late = (num_queries + QUERIES - 1) // QUERIES - 1 - early  # of an odd number, the middle one is its own partner
    pair_begin = head_begin + early * width
    late_start, late_units = key_tiles(late, num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED)
    early_start, early_units = key_tiles(early, num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED)
    late_end = pair_begin + late_units
    in_late = unit < late_end
    return (
        kv_head,
        tl.where(in_late, late, early),
        tl.where(in_late, late_start, early_start),
        tl.where(in_late, pair_begin, late_end),
        tl.where(in_late, late_end, late_end + early_units),
        tl.where(in_late, late_end, pair_begin + width),
    )


@triton.jit
def find_tile(slot, cu_seqlens_q_ptr, num_seqs, QUERIES: tl.constexpr):
    """(the sequence that owns this slot, which of its tiles of rows the slot is): for a grid with a program a tile.

    Sequence s has the slots from ``cu_seqlens_q[s] // QUERIES + s``: enough for its tiles wherever it begins, so
    nothing has to be counted on the host. The last of them may be one too many.
    """
    before = 0
    for first in range(0, num_seqs, SEARCH):
        seq = first + tl.arange(0, SEARCH)
        start = tl.load(cu_seqlens_q_ptr + seq, mask=seq < num_seqs, other=0)
        before += tl.sum(((start // QUERIES + seq <= slot) & (seq < num_seqs)).to(tl.int32), 0)
    seq = tl.maximum(before - 1, 0)
    return seq, slot - (tl.load(cu_seqlens_q_ptr + seq) // QUERIES + seq).to(tl.int32)


@triton.jit
def rows_of_tile(tile, kv_head, first_row, num_queries, GROUP: tl.constexpr, TILE_Q: tl.constexpr):
    """(query within the sequence, row of q, head, whether there is such a row) of each row of a tile."""
    row = tl.arange(0, TILE_Q)
    query = tile * (TILE_Q // GROUP) + row // GROUP
    there = (row < TILE_Q // GROUP * GROUP) & (query < num_queries)
    return query, (first_row + query).to(tl.int64), kv_head * GROUP + row % GROUP, there


@triton.jit
def load_block_ids(row_ptr, stride_table_block, keys, end, num_blocks, max_blocks_per_seq, BLOCK_SIZE: tl.constexpr):
    """The block of each key before ``end``, from a sequence's row of the table; -1 where there is none."""
    index = keys // BLOCK_SIZE
    ids = tl.load(row_ptr + index * stride_table_block, mask=(keys < end) & (index < max_blocks_per_seq), other=-1)
    return tl.where((ids >= 0) & (ids < num_blocks), ids, -1).to(tl.int32)


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
            acc, top, total, program * 2 + (seg_begin >= begin).to(tl.int32), parts_ptr, stats_ptr, there, dim,
            HEAD_DIM, TILE_Q, TILE_D,
        )  # fmt: skip
        if is_last(seg_begin, seg_end, line, num_workers, counters_ptr):
            first = worker_of(seg_begin, num_workers, line)
            last = worker_of(seg_end - 1, num_workers, line)
            merge_parts(
                first, last, parts_ptr, stats_ptr, out_ptr, sinks_ptr, token, head, there, dim,
                stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, TILE_Q, TILE_D,
            )  # fmt: skip


@triton.jit
def store_part(
    acc, top, total, place, parts_ptr, stats_ptr, there, dim,
    HEAD_DIM: tl.constexpr, TILE_Q: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Leave a part at its place in the scratch, the rows that are there."""
    row, place = tl.arange(0, TILE_Q), place.to(tl.int64)
    offset = row[:, None] * TILE_D + tl.arange(0, TILE_D)[None, :]
    stored = there[:, None] & (dim < HEAD_DIM)[None, :]
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
