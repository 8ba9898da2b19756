"""The schedule of paged attention: every tile of keys for every tile of rows, once, wherever the line is cut."""

# pyright: reportCallIssue=false
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fast
from fast._triton import merging, paging
from fast._triton.platform import INTERPRETING

TILE_KV = 16
MOST_VISITS = 1024  # of a program


@triton.jit
def _walk_kernel(
    visits_ptr,  # [num_programs, MOST_VISITS, 8]
    shares_ptr,  # [num_programs, 3]: units of the line, first and last + 1 of the program's
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    num_seqs,
    num_tokens,
    capacity,
    num_kv_heads,
    window,
    QUERIES: tl.constexpr,
    TILE_KV: tl.constexpr,
    WINDOWED: tl.constexpr,
    FEWEST: tl.constexpr,
    FEW: tl.constexpr,
    MOST_VISITS: tl.constexpr,
):
    """What a kernel of paged attention does with its share, but for the attention."""
    program = tl.program_id(0)
    line, num_workers, begin, end, seq, seq_begin = paging.find_share(
        program, tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_kv_heads,
        window, QUERIES, TILE_KV, WINDOWED, FEWEST, FEW,
    )  # fmt: skip
    tl.store(shares_ptr + program * 3, line)
    tl.store(shares_ptr + program * 3 + 1, begin)
    tl.store(shares_ptr + program * 3 + 2, end)
    visit_ptr = visits_ptr + program * (MOST_VISITS * 8)
    unit = begin
    while unit < end:
        _, num_queries, seq_len = paging.sequence(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity)
        per_head, width = paging.units_per_head(num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED, FEW)
        if unit >= seq_begin + per_head * num_kv_heads:
            seq_begin += per_head * num_kv_heads
            seq += 1
        else:
            kv_head, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED
            )
            if unit < seg_end:
                tl.store(visit_ptr, seq)
                tl.store(visit_ptr + 1, kv_head)
                tl.store(visit_ptr + 2, tile)
                tl.store(visit_ptr + 3, first_tile + unit - seg_begin)
                tl.store(visit_ptr + 4, first_tile + tl.minimum(end, seg_end) - seg_begin)
                tl.store(visit_ptr + 5, paging.worker_of(seg_begin, num_workers, line))
                tl.store(visit_ptr + 6, paging.worker_of(seg_end - 1, num_workers, line))
                tl.store(visit_ptr + 7, merging.place_of_part(program, seg_begin, begin))
                visit_ptr += 8
            unit = tl.minimum(following, end)


@triton.jit
def _find_tile_kernel(found_ptr, cu_seqlens_q_ptr, num_seqs, QUERIES: tl.constexpr):
    seq, tile = paging.find_tile(tl.program_id(0), cu_seqlens_q_ptr, num_seqs, QUERIES)
    tl.store(found_ptr + tl.program_id(0) * 2, seq)
    tl.store(found_ptr + tl.program_id(0) * 2 + 1, tile)


@pytest.fixture(params=[4, 256] if INTERPRETING else [256])
def search(request, monkeypatch):
    """Sequences that a program looks through at a time: fewer than there are, or more."""
    if request.param != paging.SEARCH.value:
        monkeypatch.setattr(paging, "SEARCH", tl.constexpr(request.param))


drawn = settings(max_examples=25 if INTERPRETING else 100, suppress_health_check=[HealthCheck.function_scoped_fixture])
lengths = st.tuples(st.sampled_from([1, 0, 2, 8, 9, 33, 70]), st.sampled_from([0, 1, 15, 16, 100, 190, None]))
batches = st.lists(lengths, min_size=1, max_size=7)


def placed(batch):
    """(query lengths, tokens, ``seq_lens``, ``cu_seqlens_q``), the last two as tensors. Context None: no tokens."""
    query_lens = np.array([num_queries for num_queries, _ in batch])
    seq_lens = np.array([0 if context is None else num_queries + context for num_queries, context in batch])
    offsets = np.concatenate([[0], query_lens.cumsum()])
    return query_lens, seq_lens, *(fast.from_host(array.astype(np.int32)) for array in (seq_lens, offsets))


@drawn
@given(
    batch=batches,
    num_programs=st.sampled_from([3, 1, 2, 7, 17]),
    num_kv_heads=st.sampled_from([1, 2]),
    queries=st.sampled_from([8, 1, 3]),
    window=st.sampled_from([None, 1, 16, 17, 60]),
    fewest=st.sampled_from([2, 1, 4]),
    few=st.booleans(),
)
def test_every_tile_of_keys_has_its_turn(search, batch, num_programs, num_kv_heads, queries, window, fewest, few):
    """Once for each tile of rows that sees it, in consecutive programs, whose shares differ by a unit at the most.

    A sequence without keys, whose rows fill one tile at most, has none.
    """
    query_lens, seq_lens, *tensors = placed(batch)
    visits = torch.full((num_programs, MOST_VISITS, 8), -1, dtype=torch.int32, device=tensors[0].device)
    shares = torch.zeros(num_programs, 3, dtype=torch.int32, device=tensors[0].device)
    _walk_kernel[(num_programs,)](
        visits, shares, *tensors, len(batch), int(query_lens.sum()), 1000, num_kv_heads, window or 0,
        QUERIES=queries, TILE_KV=TILE_KV, WINDOWED=window is not None, FEWEST=fewest, FEW=few,
        MOST_VISITS=MOST_VISITS,
    )  # fmt: skip
    shares_are_even(fast.to_host(shares), fewest)
    segments = defaultdict(list)
    for program, mine in enumerate(fast.to_host(visits)):
        for seq, kv_head, tile, *visit in mine[mine[:, 0] >= 0].tolist():
            segments[seq, kv_head, tile].append((program, *visit))
    expected = {}
    for seq, (num_queries, seq_len) in enumerate(zip(query_lens.tolist(), seq_lens.tolist())):
        if not few if num_queries > queries else seq_len > 0:
            for tile in range(-(-num_queries // queries)):
                keys = keys_seen(tile, num_queries, seq_len, queries, window)
                expected |= {(seq, kv_head, tile): keys for kv_head in range(num_kv_heads)}
    assert segments.keys() == expected.keys(), f"tiles of rows: {sorted(segments)}, expected {sorted(expected)}"
    places = set()
    for segment, parts in segments.items():
        programs, starts, stops, firsts, lasts, own = zip(*parts)
        assert (starts[0], stops[-1]) == expected[segment], f"{segment}: {parts}, expected {expected[segment]}"
        assert starts[1:] == stops[:-1], f"{segment}: not one after another: {parts}"
        assert programs == tuple(range(firsts[0], lasts[0] + 1)), f"{segment}: not of those programs: {parts}"
        assert {*firsts, *lasts} == {firsts[0], lasts[0]}, f"{segment}: they do not agree whose it is: {parts}"
        cut = len(parts) > 1
        assert not (cut and places & {*own}), f"{segment}: another segment's part is in the same place: {parts}"
        places |= {*own} if cut else set()


@pytest.mark.parametrize("num_seqs", [8, 4, 16, 12])
def test_like_segments_are_not_cut_where_programs_are_nearly_enough(search, num_seqs):
    """Of 17 programs 16 take one segment, two, or a half or a quarter of one; 24 segments are an equal line for all."""
    query_lens, _, *tensors = placed([(1, 4 * TILE_KV - 1)] * num_seqs)
    visits = torch.full((17, MOST_VISITS, 8), -1, dtype=torch.int32, device=tensors[0].device)
    shares = torch.zeros(17, 3, dtype=torch.int32, device=tensors[0].device)
    _walk_kernel[(17,)](
        visits, shares, *tensors, num_seqs, int(query_lens.sum()), 1000, 2, 0,
        QUERIES=8, TILE_KV=TILE_KV, WINDOWED=False, FEWEST=1, FEW=False, MOST_VISITS=MOST_VISITS,
    )  # fmt: skip
    sizes = np.diff(fast.to_host(shares)[:, 1:])[:, 0]
    expected = {8: [4] * 16 + [0], 4: [2] * 16 + [0], 16: [8] * 16 + [0], 12: [6] * 11 + [5] * 6}[num_seqs]
    assert sizes.tolist() == expected


def keys_seen(tile, num_queries, seq_len, queries, window):
    """(first, last + 1) of the tiles of keys that some query of the tile sees; one, if there is none."""
    context = seq_len - num_queries
    first, last = context + tile * queries, context + min((tile + 1) * queries, num_queries) - 1
    oldest = 0 if window is None else max(first + 1 - window, 0)
    return oldest // TILE_KV, max(last // TILE_KV + 1, 1)


def shares_are_even(shares, fewest):
    """They make up the line, in order; no two differ by more than a unit; and none is too small without need."""
    line = shares[0, 0]
    assert (shares[:, 0] == line).all(), f"lines {shares[:, 0]}"
    sizes = shares[:, 2] - shares[:, 1]
    sizes = sizes[sizes > 0]
    assert sizes.sum() == line, f"{line} units, shares {shares[:, 1:].tolist()}"
    for (_, _, end), (_, begin, _) in pairwise(shares[: len(sizes)].tolist()):
        assert begin == end, f"a gap: {shares[:, 1:].tolist()}"
    assert np.ptp(sizes) <= 1 if line else True, f"shares of {sizes} units"
    enough = len(sizes) in (0, 1, len(shares)) or sizes.min() >= min(fewest, -(-line // len(shares)))
    assert enough, f"shares of {sizes} units, and {len(shares)} programs"


@drawn
@given(batch=batches, queries=st.sampled_from([8, 1, 3]))
def test_every_tile_of_rows_has_a_slot(search, batch, queries):
    """One, among slots that need no counting; no slot is another sequence's."""
    query_lens, _, _, offsets = placed(batch)
    num_slots = int(query_lens.sum()) // queries + len(batch)
    found = torch.full((num_slots, 2), -1, dtype=torch.int32, device=offsets.device)
    _find_tile_kernel[(num_slots,)](found, offsets, len(batch), QUERIES=queries)
    tiles = [(seq, tile) for seq, tile in fast.to_host(found).tolist() if tile * queries < query_lens[seq]]
    expected = [(seq, tile) for seq, count in enumerate(query_lens) for tile in range(-(-count // queries))]
    assert sorted(tiles) == expected, f"slots have {tiles}, expected {expected}"
