"""The schedule of attention over a paged cache, for every format of it: who computes what.

Work is counted in units: one tile of keys (``TILE_KV`` tokens) for one tile of query rows of one KV head. The rows
of a tile are ``TILE_Q // GROUP`` queries times the ``GROUP`` heads that share the KV head, so a decode fills the tile
with its group. A *segment* is all the units of one tile of rows. The units of a batch stand in one line: by sequence,
then KV head, then segment, then keys. Program p of n takes the p-th n-th of the line, wherever that begins and ends: a
persistent grid with the same load everywhere, be it one long decode, many short ones or a chunk of a prompt among
decodes. Nothing but ``seq_lens`` and ``cu_seqlens_q`` decides it, on the device, so a captured graph stays right.

The early segments of a prompt see few keys and the late ones many. So they stand in line in pairs, the last with the
first: each pair of a sequence then gets the same number of units, ``width``, and finding a segment takes a division,
not a search. (A unit or two at the end of a pair may be idle.)

A segment that lies in one program is written by it; one that was cut is put together by `merging.py`.

Sequences that pad a batch have no keys. They have no units either: to begin and end a segment takes as long as a unit
or two, and those of ten sequences would all be in the last program's share. `merging.store_rows_without_keys` sees to
them.

In a kernel::

    line, num_workers, begin, end, seq, seq_begin = find_share(...)
    merging.store_rows_without_keys(...)
    while unit < end:
        first_row, num_queries, seq_len = sequence(seq, ...)
        per_head, width = units_per_head(...)
        if unit >= seq_begin + per_head * num_kv_heads:      # on to the next sequence
        else: find_segment(...), rows_of_tile(...), (acc, top, total) over its keys, merging.finish_segment(...)
"""

import triton
import triton.language as tl

SEARCH = tl.constexpr(256)  # sequences that a program looks through at a time for its share
MIN_UNITS = tl.constexpr(2)  # a program takes so much where there is work for all: shorter parts cost more to merge


@triton.jit
def sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, PAST_L1: tl.constexpr = False):
    """(first row of q, number of queries, tokens) of a sequence or a vector of them, kept inside the arrays.

    PAST_L1: From the L2 cache, as before `overlap.wait_for_predecessor`.
    """
    CACHE: tl.constexpr = ".cg" if PAST_L1 else ""
    known = seq < num_seqs
    first = tl.load(cu_seqlens_q_ptr + seq, mask=known, other=0, cache_modifier=CACHE).to(tl.int32)
    stop = tl.load(cu_seqlens_q_ptr + seq + 1, mask=known, other=0, cache_modifier=CACHE).to(tl.int32)
    seq_len = tl.load(seq_lens_ptr + seq, mask=known, other=0, cache_modifier=CACHE).to(tl.int32)
    first = tl.minimum(tl.maximum(first, 0), num_tokens)
    num_queries = tl.minimum(tl.maximum(stop, first), num_tokens) - first
    return first, num_queries, tl.minimum(tl.maximum(seq_len, 0), capacity)


@triton.jit
def oldest_key(position, window, WINDOWED: tl.constexpr):
    """The first key that a query at this position sees."""
    oldest = position * 0
    if WINDOWED:
        oldest = tl.maximum(position + 1 - window, 0)
    return oldest


@triton.jit
def key_tiles(tile, num_queries, seq_len, window, QUERIES: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr):
    """(first, number of) the tiles of keys that some query of a tile sees; at least one, to have a result written."""
    context = seq_len - num_queries
    end = context + tl.minimum((tile + 1) * QUERIES, num_queries)
    stop = (tl.maximum(end, 0) + TILE_KV - 1) // TILE_KV
    start = oldest_key(context + tile * QUERIES, window, WINDOWED) // TILE_KV
    return start, tl.maximum(stop - start, 1)


@triton.jit
def has_units(num_queries, seq_len, QUERIES: tl.constexpr):
    """Whether a sequence has a place in the line; those with more queries than a tile holds always have one."""
    return (seq_len > 0) | (num_queries > QUERIES)


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
    per_head = tl.where(has_units(num_queries, seq_len, QUERIES), per_head, 0)
    if FEW:
        per_head = tl.where(num_tiles <= 1, per_head, 0)
    return per_head, width


@triton.jit
def sequences_from(first, look):
    """The next sequences to look through. ``look``: 0 to ``SEARCH`` in the layout of a kernel that has some (Gluon)."""
    if look is None:
        seq = tl.arange(0, SEARCH)
    else:
        seq = look
    return first + seq


@triton.jit
def total_units(
    seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
    QUERIES: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr, FEW: tl.constexpr = False, look=None,
    PAST_L1: tl.constexpr = False,
):  # fmt: skip
    """The length of the line."""
    total = 0
    for first in range(0, num_seqs, SEARCH):
        seq = sequences_from(first, look)
        _, num_queries, seq_len = sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, PAST_L1)
        per_head, _ = units_per_head(num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED, FEW)
        total += tl.sum(per_head, 0) * num_kv_heads
    return total


@triton.jit
def share_of(program, num_programs, total, num_segments, FEWEST: tl.constexpr = MIN_UNITS):
    """(first unit, last + 1, programs that have any) of a program's share of the line.

    ``FEWEST`` units, where there are so many: of a line too short for that nobody takes two while another takes none.
    If ``num_segments`` (were they all as long) and programs would come out even but for a sixteenth of the programs,
    these have none: a segment that nobody cuts needs no merge.
    """
    even = (total + num_programs - 1) // num_programs
    fewest = tl.minimum(tl.maximum(even, 1), FEWEST)
    num_workers = tl.minimum(num_programs, tl.maximum(total // fewest, 1))
    num_segments = tl.maximum(num_segments, 1)
    together = (num_segments + num_programs - 1) // num_programs  # segments of a program, or else
    uncut = tl.where(together > 1, num_segments // together, num_programs // num_segments * num_segments)
    is_even = (total % num_segments == 0) & (total % uncut == 0) & (num_segments % together == 0)
    is_better = is_even & (num_workers == num_programs) & (16 * uncut >= 15 * num_programs)
    num_workers = tl.where(is_better, uncut, num_workers)
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
    QUERIES: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr, FEW: tl.constexpr = False, look=None,
    PAST_L1: tl.constexpr = False,
):  # fmt: skip
    """(the sequence that holds a unit of the line, that sequence's first unit)."""
    found, found_begin, before = 0, 0, 0
    for first in range(0, num_seqs, SEARCH):
        seq = sequences_from(first, look)
        _, num_queries, seq_len = sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, PAST_L1)
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
    FEW: tl.constexpr = False, look=None, PAST_L1: tl.constexpr = False,
):  # fmt: skip
    """``total_units``, ``share_of`` and ``find_sequence`` at once, for up to ``SEARCH`` sequences in one look.

    Returns (units of the line, programs that have any, first unit of the share, last + 1, sequence, its first unit).
    """
    if num_seqs <= SEARCH:
        seq = sequences_from(0, look)
        _, num_queries, seq_len = sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, PAST_L1)
        per_head, _ = units_per_head(num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED, FEW)
        ends = tl.cumsum(per_head * num_kv_heads, 0)
        line = tl.max(ends, 0)
        begin, end, num_workers = share_of(program, num_programs, line, num_seqs * num_kv_heads, FEWEST)
        passed = (ends <= begin) & (seq < num_seqs)
        found = tl.sum(passed.to(tl.int32), 0)
        found_begin = tl.max(tl.where(passed, ends, 0), 0)
    else:
        line = total_units(
            seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
            QUERIES, TILE_KV, WINDOWED, FEW, look, PAST_L1,
        )  # fmt: skip
        begin, end, num_workers = share_of(program, num_programs, line, num_seqs * num_kv_heads, FEWEST)
        found, found_begin = find_sequence(
            begin, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads, window,
            QUERIES, TILE_KV, WINDOWED, FEW, look, PAST_L1,
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
        start = tl.load(cu_seqlens_q_ptr + seq, mask=seq < num_seqs)
        before += tl.sum(((start // QUERIES + seq <= slot) & (seq < num_seqs)).to(tl.int32), 0)
    seq = tl.maximum(before - 1, 0)
    return seq, slot - (tl.load(cu_seqlens_q_ptr + seq) // QUERIES + seq).to(tl.int32)


@triton.jit
def query_of(column, tile, QUERIES: tl.constexpr, GROUP: tl.constexpr, COLS: tl.constexpr):
    """(the query of a column, its head within the group, whether there is one in such a column)."""
    row = column % COLS
    return tile * QUERIES + row // GROUP, row % GROUP, row < QUERIES * GROUP


@triton.jit
def rows_of_tile(tile, kv_head, first_row, num_queries, GROUP: tl.constexpr, TILE_Q: tl.constexpr):
    """(query within the sequence, row of q, head, whether there is such a row) of each row of a tile."""
    return place_of(tl.arange(0, TILE_Q), tile, kv_head, first_row, num_queries, GROUP, TILE_Q)


@triton.jit
def place_of(row, tile, kv_head, first_row, num_queries, GROUP: tl.constexpr, TILE_Q: tl.constexpr):
    """``rows_of_tile`` of some rows of it."""
    query = tile * (TILE_Q // GROUP) + row // GROUP
    there = (row < TILE_Q // GROUP * GROUP) & (query < num_queries)
    return query, (first_row + query).to(tl.int64), kv_head * GROUP + row % GROUP, there


@triton.jit
def times_stride(block, stride):
    """Where a block begins, in one multiplication (neither is negative)."""
    stride = stride + 0 * block  # a tensor, even if it is 1
    return (block.to(tl.uint32).to(tl.uint64) * stride.to(tl.uint32).to(tl.uint64)).to(tl.int64)


@triton.jit
def load_block_ids(row_ptr, stride_table_block, keys, end, num_blocks, max_blocks_per_seq, BLOCK_SIZE: tl.constexpr):
    """The block of each key before ``end``, from a sequence's row of the table; -1 where there is none."""
    index = keys // BLOCK_SIZE
    ids = tl.load(row_ptr + index * stride_table_block, mask=(keys < end) & (index < max_blocks_per_seq), other=-1)
    return tl.where((ids >= 0) & (ids < num_blocks), ids, -1).to(tl.int32)
