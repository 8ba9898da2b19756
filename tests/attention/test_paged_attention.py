"""Paged attention: the oracle's attention, wherever the tokens lie and however the work is cut."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
from fast._triton import merging, paging
from fast._triton.platform import INTERPRETING, portable_kernels
from fast.attention import invariant_attention, paged_attention, paged_attention_hopper, paged_decode_hopper
from fast.attention.paged_attention_hopper import heads_of_a_tile, parts_of_an_item
from reference.numerics.arrays import dtype_named
from twofold.conformance.properties import attention as properties
from twofold.conformance.strategies.attention import COUNTED_FEATURES, PagedCase, SequenceInput, paged_cases

laws = settings(max_examples=200)
kernels = settings(max_examples=8 if INTERPRETING else 100)  # of tests about fast alone
invariant = SimpleNamespace(**vars(fast) | {"paged_attention": invariant_attention.paged_attention_invariant})


@given(case=paged_cases())
def test_matches_the_oracle(backend, case):
    """Every element is within the rule, whatever lies in slots that nobody owns."""
    properties.paged_matches_oracle(backend, case)


@pytest.mark.needs("gpu")
@given(case=paged_cases(dtypes=["float16", "bfloat16"]))
def test_portable_kernel_matches_the_oracle(case):
    """What other GPUs run, on a Hopper GPU too."""
    with portable_kernels():
        properties.paged_matches_oracle(fast, case)


@given(case=paged_cases())
def test_merged_split_matches_the_oracle(backend, case):
    """Attention over ranges of tokens, merged (a sink as one more part), is within the rule."""
    properties.merged_split_matches_oracle(backend, case)


@pytest.mark.interpreted(6)
@given(case=paged_cases())
def test_split_parts_are_partial(backend, case):
    """The number of parts follows from shapes, and a part without keys is (0, -inf)."""
    properties.split_parts_are_partial(backend, case)


@pytest.mark.interpreted(6)
@laws
@given(case=paged_cases())
def test_paged_equals_dense(backend, case):
    """Where keys and values lie changes nothing."""
    properties.paged_equals_dense(backend, case)


@pytest.mark.interpreted(6)
@laws
@given(case=paged_cases())
def test_split_equals_whole(backend, case):
    """Attention over ranges of tokens, merged, is attention over all of them."""
    properties.split_equals_whole(backend, case)


@pytest.mark.interpreted(6)
@laws
@given(case=paged_cases(), cut=st.integers(0, 40))
def test_chunked_equals_whole(backend, case, cut):
    """The same queries in two steps change nothing."""
    properties.chunked_equals_whole(backend, case, cut)


@pytest.mark.interpreted(6)
@laws
@given(case=paged_cases())
def test_alone_equals_batched(backend, case):
    """What a sequence is batched with changes nothing."""
    properties.alone_equals_batched(backend, case)


@pytest.mark.interpreted(6)
@given(case=paged_cases())
def test_arguments_are_unchanged(backend, case):
    """No argument is written to, poison included."""
    arguments, options = case.arguments(backend), case.options(backend)
    properties.arguments_are_unchanged(backend, "paged_attention", arguments, options)
    options.pop("sinks", None)
    options["split_size"] = case.split_size
    properties.arguments_are_unchanged(backend, "split_paged_attention", arguments, options)


@pytest.mark.interpreted(6)
@given(case=paged_cases())
def test_out_is_honoured(backend, case):
    """The result goes to ``out``, all of it (padded rows too) and nothing beside it."""
    properties.paged_honours_out(backend, case)


@pytest.mark.parametrize("op", ["paged_attention", "split_paged_attention"])
def test_refuses_bad_shapes(backend, op):
    """A wrong shape, dtype or option raises a ValueError that names the argument."""
    properties.refuses_bad_shapes(backend, op)


@pytest.mark.parametrize("op", ["paged_attention", "split_paged_attention"])
def test_refuses_bad_values(backend, op):
    """A block id, a length or an offset out of range, or a hole that a query sees, raises a ValueError."""
    properties.refuses_bad_values(backend, op)


def test_the_cases_have_what_matters():
    """Each of the features that a result file counts is in at least a fifth of the drawn cases."""
    counts, num_cases = Counter(), 0

    @settings(max_examples=200)
    @given(case=paged_cases())
    def draw(case):
        nonlocal num_cases
        num_cases += 1
        counts.update(case.features)

    draw()
    rare = {name: counts[name] for name in COUNTED_FEATURES if 5 * counts[name] < num_cases}
    assert not rare, f"of {num_cases} cases, too few had: {rare}"


# ---- the kernels of fast ----------------------------------------------------------------------------------------


def test_tiles_follow_from_shapes():
    """Decodes get the fewest rows that hold a group, chunks the most; never fewer than a group, whatever the dtype."""
    of = paged_attention.choose_tiles
    assert {of(32, 32, 4, 128, 2).tile_q, of(1, 1, 1, 64, 2).tile_q} == {16}, "decodes"
    assert of(64, 64, 32, 128, 2).tile_q == 32, "decodes of one KV head for 32"
    assert [of(n, 32, 4, 128, 2).tile_q for n in (128, 256)] == [16, 32], "a few drafts each"
    assert of(512, 1, 4, 128, 2).tile_q == 128, "a chunk"
    assert of(512 + 31, 32, 4, 128, 2).tile_q == 128, "a chunk among decodes"
    for rows in (1, 3, 48, 1000):
        for group in (1, 3, 17, 200):
            for itemsize in (2, 4):
                tile_q = of(rows, 1, group, 64, itemsize).tile_q
                assert tile_q >= max(16, group), f"{rows} queries of {group} heads: {tile_q} rows"
                assert tile_q.bit_count() == 1, f"{rows} queries of {group} heads: {tile_q} rows"


def test_every_variant_is_reached():
    """Among the drawn cases are some for the tiles of decodes and some for those of chunks, in either precision."""
    reached = set()

    @settings(max_examples=40)
    @given(case=paged_cases(dtypes=["bfloat16", "float16", "float32"]))
    def draw(case):
        if len(case.host_q):
            itemsize = 2 if case.dtype == case.pool.dtype.name != "float32" else 4
            shape = len(case.host_q), len(case.seq_lens), case.num_heads // case.num_kv_heads, case.head_dim, itemsize
            reached.add((paged_attention.choose_tiles(*shape).tile_q >= 64, itemsize))

    draw()
    assert {(False, 2), (True, 2), (False, 4)} <= reached, f"reached only {reached}"


@kernels
@given(case=paged_cases(dtypes=["float32", "bfloat16"]))
def test_counters_are_zero_between_launches(case):
    """Whoever merges last sets its counter back: the next launch on the stream finds zeros."""
    properties.paged_of(fast, case)
    assert all(int(counters.abs().sum()) == 0 for counters in merging._counters.values())


def test_counters_of_a_capture_were_zeroed_before_it(monkeypatch):
    """A stream that captures takes the set that an ordinary launch left, and keeps it; else zeros of its own."""
    capturing, stream = True, 1
    monkeypatch.setattr(merging, "_counters", {})
    monkeypatch.setattr(merging, "_spare", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=stream))
    like = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))

    first, second = (merging.zero_counters(like, 5) for _ in range(2))
    assert first is not second, "what one graph zeroes, another cannot count on"
    capturing, stream = False, 2
    ordinary = merging.zero_counters(like, 5)
    assert merging.zero_counters(like, 5) is ordinary
    capturing, stream = True, 1
    captured = merging.zero_counters(like, 5)
    assert merging.zero_counters(like, 5) is captured is not ordinary
    stream = 3
    assert merging.zero_counters(like, 5) is not captured, "launches on two streams may overlap"


def batch(query_lens: list[int], seq_lens: list[int], *, dtype: str = "float32", **sizes: int) -> PagedCase:
    """A case of these lengths; by default two heads of 16 that share a KV head, in blocks of four, out of order."""
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16} | sizes
    block_size = heads.pop("block_size", 4)
    rng = np.random.default_rng(0)
    num_blocks = [-(-n // block_size) for n in seq_lens]
    pool = np.full((sum(num_blocks) + 1, 1, 2, block_size, heads["num_kv_heads"], heads["head_dim"]), np.nan)
    ids = iter(rng.permutation(len(pool)).tolist())
    table = np.full((len(seq_lens), max(num_blocks)), -1, np.int32)
    sequences = []
    for seq, (num_queries, seq_len) in enumerate(zip(query_lens, seq_lens)):
        q = rng.normal(size=(num_queries, heads["num_heads"], heads["head_dim"]))
        kv = rng.normal(size=(2, seq_len, *pool.shape[4:])).astype(dtype_named(dtype))
        for index in range(num_blocks[seq]):
            tokens = kv[:, index * block_size : (index + 1) * block_size]
            table[seq, index] = next(ids)
            pool[table[seq, index], 0, :, : tokens.shape[1]] = tokens
        sequences.append(SequenceInput(q.astype(dtype_named(dtype)), *kv))
    arrays = {"pool": pool.astype(dtype_named(dtype)), "block_table": table, "seq_lens": np.array(seq_lens, np.int32)}
    return PagedCase(dtype=dtype, sequences=sequences, layer=0, split_size=16, **arrays, **heads)


def test_a_long_sequence_is_cut_and_merged(monkeypatch):
    """One sequence of one head is taken by more than one program, which leave parts of it, and is right."""
    taken, make_scratch = [], merging.make_scratch

    def spy(*sizes):
        taken.append(make_scratch(*sizes))
        taken[-1].stats.fill_(np.nan)
        return taken[-1]

    monkeypatch.setattr(merging, "make_scratch", spy)
    properties.paged_matches_oracle(fast, batch([1], [709]))
    num_parts = int(taken[0].stats.isfinite().any(-1).any(-1).sum())
    assert num_parts > 1, f"the sequence left {num_parts} parts in the scratch"


@pytest.mark.parametrize("backend", [fast, invariant], ids=["fast", "invariant"])
def test_more_sequences_than_one_look_takes(backend):
    """Programs find their share among more sequences than they look through at a time."""
    num_seqs = paging.SEARCH.value + 10
    busy = 0, 3, 100, num_seqs - 11, num_seqs - 10, num_seqs - 9, num_seqs - 1
    properties.paged_matches_oracle(backend, batch([int(seq in busy) for seq in range(num_seqs)], [7] * num_seqs))


@pytest.mark.parametrize("query_lens", [[1, 0, 2], [40, 1, 33]], ids=["decodes", "chunks"])
@pytest.mark.parametrize("op", [properties.paged_of, properties.merged_split_of], ids=["whole", "split"])
@pytest.mark.parametrize("backend", [fast, invariant], ids=["fast", "invariant"])
def test_blocks_that_the_window_is_past(backend, op, query_lens):
    """A table may still name them when they are another's: NaN there reaches no result."""
    case = replace(batch(query_lens, [107, 100, 68]), sliding_window=18)
    for row, seq_len, num_queries in zip(case.block_table, case.seq_lens, case.query_lens):
        oldest = seq_len - num_queries + 1 - case.sliding_window
        case.pool[row[: max(0, oldest // case.block_size)]] = np.nan
    properties.assert_out(backend, case, op, "attention within a window")


@pytest.mark.parametrize("backend", [fast, invariant], ids=["fast", "invariant"])
def test_what_is_out_of_range_is_not_there_where_nobody_looks(monkeypatch, backend):
    """As an engine runs: `fast` looks at no value; a block that does not exist is a hole, and nothing is read or
    written beside the arrays, whatever lengths and offsets say."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    case = batch([3, 40, 1], [30, 60, 70])
    q, k_cache, v_cache, table, seq_lens, offsets = case.arguments(backend)
    around = fast.from_host(np.full((3 * len(q), *q.shape[1:]), 7.0, np.float32))
    out = around[len(q) : 2 * len(q)]

    def attend(table=table, seq_lens=seq_lens, offsets=offsets):
        return backend.to_host(backend.paged_attention(q, k_cache, v_cache, table, seq_lens, offsets, out=out))

    hole = table.clone()
    hole[1, 2] = hole[2, 0] = -1
    expected = attend(hole).copy()
    last, seen = case.sequences[2], slice(case.block_size, None)  # all but the first block
    weights = np.exp(np.einsum("hd,kd->hk", last.q[0], last.k[seen, 0]).astype(np.float64) / 4)
    weights /= weights.sum(axis=1, keepdims=True)
    error, bound = expected[-1] - weights @ last.v[seen, 0], 2.0**-18 * (weights @ np.abs(last.v[seen, 0]))
    assert (np.abs(error) <= bound).all(), "keys in a hole were seen"
    for wrong in (len(k_cache), 2**31 - 1, -2, -(2**31)):
        hole[1, 2] = hole[2, 0] = wrong
        assert attend(hole).tobytes() == expected.tobytes(), f"block {wrong} is not as good as none"
    for wrong in ([2**31 - 1, -5, 70], [-(2**31), 60, 10**6]):
        attend(seq_lens=fast.from_host(np.array(wrong, np.int32)))
    for wrong in ([0, 3, 43, 10**6], [-9, 3, 43, 44], [44, 3, 0, 44]):
        attend(offsets=fast.from_host(np.array(wrong, np.int32)))
    outside = fast.to_host(around)[[*range(len(q)), *range(2 * len(q), 3 * len(q))]]
    assert (outside == 7).all(), "rows outside out were written"


@pytest.mark.needs("interpreter")  # where a step of a kernel can be counted
@pytest.mark.parametrize("window", [None, 1, 65, 130, 213])  # 213: one key of the first tile is not seen by all
@pytest.mark.parametrize(("num_queries", "seq_len"), [(150, 300), (128, 128), (30, 193)])
def test_only_tiles_that_need_it_are_read_and_masked(monkeypatch, num_queries, seq_len, window):
    """Of a chunk: a tile of keys is read if any query of the tile sees any of them, and masked if not all see all."""
    counts, attend = Counter(), paged_attention.attend_cached_tiles

    def counted(*arguments):
        start, stop, masked = arguments[7], arguments[8], arguments[13]
        counts[masked] += len(range(start, stop))
        return attend(*arguments)

    monkeypatch.setattr(paged_attention, "attend_cached_tiles", counted)
    case = replace(batch([num_queries], [seq_len], dtype="float16"), sliding_window=window)
    properties.paged_of(fast, case)
    tiles = paged_attention.choose_tiles(num_queries, 1, 2, 16, 2)
    tile_q, tile_kv = tiles.tile_q // 2, tiles.tile_kv

    query, key = np.arange(num_queries)[:, None] + seq_len - num_queries, np.arange(seq_len)
    seen = (key <= query) & (key > query - (window or seq_len))
    expected = Counter()
    for rows in np.array_split(seen, range(tile_q, num_queries, tile_q)):
        for tile in np.array_split(rows, range(tile_kv, seq_len, tile_kv), axis=1):
            if tile.any():
                expected[not tile.all() or tile.shape[1] < tile_kv] += 1
    assert counts == expected, f"tiles that are masked, and not: expected {expected}, got {counts}"


@pytest.mark.needs("interpreter")
@pytest.mark.parametrize("window", [None, 40])
def test_parts_read_only_tiles_that_are_seen(monkeypatch, window):
    """Of each part's tokens, tiles of keys that some query of the tile sees; of many a part none."""
    num_tiles, attend = 0, paged_attention.attend_cached_tiles

    def counted(*arguments):
        nonlocal num_tiles
        num_tiles += len(range(arguments[7], arguments[8]))
        return attend(*arguments)

    monkeypatch.setattr(paged_attention, "attend_cached_tiles", counted)
    num_queries, seq_len, split_size = 150, 206, 127  # the second part is after what the first queries see
    case = replace(batch([num_queries], [seq_len], dtype="float16"), sliding_window=window, split_size=split_size)
    properties.merged_split_of(fast, case)
    tiles = paged_attention.choose_tiles(num_queries, 1, 2, 16, 2)

    query, key = np.arange(num_queries)[:, None] + seq_len - num_queries, np.arange(seq_len)
    seen = (key <= query) & (key > query - (window or seq_len))
    expected = 0
    for rows in np.array_split(seen, range(tiles.tile_q // 2, num_queries, tiles.tile_q // 2)):
        for part in np.array_split(rows, range(split_size, seq_len, split_size), axis=1):
            expected += sum(
                tile.any() for tile in np.array_split(part, range(tiles.tile_kv, part.shape[1], tiles.tile_kv), axis=1)
            )
    assert num_tiles == expected, f"expected {expected} tiles, got {num_tiles}"


MIXED = [130, 1, 70, 0, 2, 3], [177, 100, 70, 64, 50, 3]  # queries and tokens


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_chunks_among_decodes(dtype, head_dim):
    """A batch of the kind that a Hopper GPU has a kernel of its own for; what lies behind a sequence is not read."""
    case = batch(*MIXED, dtype=dtype, num_heads=6, num_kv_heads=2, head_dim=head_dim, block_size=16)
    properties.paged_matches_oracle(fast, case)


@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 64), (16, 128), (128, 128)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (20, 1)], ids=["3 heads", "20 heads"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decodes(dtype, num_heads, num_kv_heads, block_size, head_dim):
    """Of the kind that a Hopper GPU has a kernel of its own for: with drafts, a padded row, a sequence that is cut."""
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size}
    case = batch([1, 3, 0, 1, 1, 2], [300, 130, 5, 64, 0, 2], dtype=dtype, **sizes)
    sinks = np.linspace(-2, 2, num_heads).astype(case.host_q.dtype)
    properties.paged_matches_oracle(fast, case)
    properties.paged_matches_oracle(fast, replace(case, sinks=sinks))


def test_rings_follow_from_shapes():
    """Two programs share a processor where their rows leave them the registers."""
    assert paged_decode_hopper.choose_ring(16).programs_per_processor == 2, "up to 16 query heads a KV head"
    assert paged_decode_hopper.choose_ring(32).programs_per_processor == 1, "20, say"


@pytest.mark.parametrize("kernel", [paged_attention_hopper, paged_decode_hopper], ids=lambda module: module.__name__)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_what_a_copy_brings_has_room_in_its_tile(kernel, block_size):
    """A block may be longer than a tile of keys; the tiles' memory ends with them."""
    tile_kv = int(kernel.TILE_KV)
    cache = torch.zeros(3, block_size, 2, 64, dtype=torch.float16)
    layout = paged_attention_hopper.gl.NVMMASharedLayout.get_default_for(
        [tile_kv, 64], paged_attention_hopper.gl.float16
    )
    descriptor, _ = paged_attention_hopper.describe_cache(cache, layout, tile_kv)
    rows, _ = descriptor.block_shape
    assert rows <= tile_kv, f"a copy of {rows} rows into a tile of {tile_kv}"
    assert tile_kv % rows == block_size % rows == 0, (
        f"copies of {rows} rows, tiles of {tile_kv}, blocks of {block_size}"
    )


def test_decodes_on_hopper_are_plain_ones(monkeypatch):
    """Tiles of up to 32 rows without window or cap go to the Hopper GPU's own kernel; all else to the portable one.

    Decodes among chunks are plain ones too: the chunks are left to their own kernel.
    """
    rows = []
    for name, value in {"is_hopper": lambda _: True, "hopper_fits": lambda *_: True}.items():
        monkeypatch.setattr(paged_attention, name, value)
    monkeypatch.setattr(paged_attention, "attend_decodes_on_hopper", lambda *given: rows.append(given[-2:]))
    monkeypatch.setattr(paged_attention, "attend_chunks_on_hopper", lambda *_: None)
    sizes = {"dtype": "float16", "num_heads": 20, "num_kv_heads": 1, "head_dim": 64, "block_size": 16}
    case = batch([1, 1], [70, 5], **sizes)
    properties.paged_of(fast, case)
    assert rows == [(32, False)], "a tile of 32 rows holds 20 heads"
    properties.paged_of(fast, batch([1, 60], [70, 80], **sizes))
    assert rows.pop() == (32, True)
    properties.paged_matches_oracle(fast, replace(case, sliding_window=9))
    properties.paged_matches_oracle(fast, replace(case, logit_cap=5.0))
    assert len(rows) == 1, "windows and caps are the portable kernel's"
    assert not paged_attention.decodes_on_hopper(64, *case.arguments(fast)[:4]), "so are tiles of more rows"


def test_decodes_are_left_to_the_kernel_that_splits(monkeypatch):
    """Where another kernel has the chunks, the rest, and only that, is computed beside it."""
    fewest = []

    def attend_chunks(*arguments):
        *_, cu_seqlens_q, _, _, out, fewest_queries = arguments
        fewest.append(fewest_queries)
        for first, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
            if end - first > fewest_queries:
                out[first:end] = 7

    for name, value in {"is_hopper": lambda _: True, "hopper_fits": lambda *_: True}.items():
        monkeypatch.setattr(paged_attention, name, value)
    monkeypatch.setattr(paged_attention, "attend_chunks_on_hopper", attend_chunks)
    monkeypatch.setattr(paged_attention, "decodes_on_hopper", lambda *_: False)  # it is tried on such a GPU
    case = batch(*MIXED, dtype="float16")
    got, baseline = (properties.paged_of(backend, case) for backend in (fast, properties.plain_torch()))
    assert fewest == [8], f"sequences of up to {fewest} queries are decodes: expected 16 rows / 2 heads"
    for seq, rows in properties.sequence_rows(case):
        if case.query_lens[seq] > 8:
            assert (got[rows] == 7).all(), f"sequence {seq}, a chunk, was written by the kernel of decodes"
        elif case.query_lens[seq]:
            error = np.abs(got[rows] - case.oracle.out[rows])
            assert (error <= properties.out_bound(case, baseline)[rows]).all(), f"sequence {seq}, a decode, is wrong"


@pytest.mark.parametrize("attention", [paged_attention.paged_attention, paged_attention.paged_attention_invariant])
def test_a_table_without_columns_has_no_keys(monkeypatch, attention):
    """Whatever the lengths say, where nobody looks: every row is written."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    q, cache = fast.from_host(np.ones((3, 2, 64), np.float16)), fast.from_host(np.ones((4, 16, 1, 64), np.float16))
    table, lens = (fast.from_host(np.array(x, np.int32)) for x in (np.zeros((2, 0)), [5, 40]))
    out = torch.full_like(q, torch.nan)
    attention(q, cache, cache, table, lens, fast.from_host(np.array([0, 1, 3], np.int32)), out=out)
    assert (out == 0).all()


def test_a_chunk_alone_is_one_launch(monkeypatch):
    """Where one sequence has all rows, no decode is left for the other kernel."""
    calls = []
    for name, value in {"is_hopper": lambda _: True, "hopper_fits": lambda *_: True}.items():
        monkeypatch.setattr(paged_attention, name, value)
    monkeypatch.setattr(paged_attention, "attend_chunks_on_hopper", lambda *arguments: calls.append(len(arguments)))
    monkeypatch.setattr(paged_attention, "paged_attention_kernel", None)
    case = batch([70], [100], dtype="float16", num_heads=6, num_kv_heads=2, head_dim=64, block_size=16)
    properties.paged_of(fast, case)
    assert calls == [9], "without a number of queries that are left: none are"


def test_short_chunks_fill_tiles_and_processors():
    """Few queries are laid beside those of the other heads of their group; few tiles have their keys in parts."""
    assert heads_of_a_tile(4, 512) == heads_of_a_tile(4, 100) == 1
    assert [heads_of_a_tile(group, 17) for group in (3, 4, 6, 32)] == [1, 4, 2, 16]
    assert parts_of_an_item(128, 132) == parts_of_an_item(5000, 132) == 1, "512 queries of 32 heads"
    assert parts_of_an_item(32, 132) == 4, "128 queries of 32 heads"


@pytest.mark.needs("gpu")  # contexts of real prompts
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 6), (6, 3), (6, 2), (6, 1), (8, 2), (8, 1), (32, 2)])
@pytest.mark.parametrize("query_lens", [[17], [128], [70, 20], [33, 129, 1]])
def test_short_chunks_over_long_contexts(query_lens, num_heads, num_kv_heads):
    """On a Hopper GPU heads share tiles of rows, and the keys of a tile pass in parts that are put together."""
    seq_lens = [3000, 1031, 4097][: len(query_lens)]
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": 128}
    case = batch(query_lens, seq_lens, dtype="bfloat16", block_size=16, **heads)
    properties.paged_matches_oracle(fast, case)


def invariant_of(case, **constants):
    """The batch-invariant attention, its parts so short that drawn sequences have several."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"SPLIT": 48} | constants).items():
            patch.setattr(invariant_attention, name, value)
        return properties.paged_of(invariant, case)


@kernels
@given(case=paged_cases())
def test_invariant_matches_the_oracle(case):
    """The batch-invariant attention is within the same rule."""

    def run(backend, case):
        return invariant_of(case) if backend is invariant else properties.paged_of(backend, case)

    properties.assert_out(invariant, case, run, "batch-invariant paged_attention")


@kernels
@given(case=paged_cases(), cut=st.integers(0, 40))
def test_invariant_is_bitwise_the_same(case, cut):
    """A query has the same bits in the batch, alone, and in whatever chunk of its prompt it comes."""
    whole = invariant_of(case)
    for seq, rows in properties.sequence_rows(case):
        one = slice(seq, seq + 1)
        alone = replace(
            case, sequences=case.sequences[one], block_table=case.block_table[one], seq_lens=case.seq_lens[one]
        )
        assert_same_bits(invariant_of(alone), whole[rows], f"sequence {seq} alone")
        if not (len(case.sequences[seq].q) and case.seq_lens[seq]):
            continue
        (s,) = alone.sequences
        first = cut % (len(s.q) + 1)
        for chunk in (range(first), range(first, len(s.q))):
            if len(chunk):
                seq_len = len(s.k) - len(s.q) + chunk.stop
                part = replace(s, q=s.q[chunk.start : chunk.stop], k=s.k[:seq_len], v=s.v[:seq_len])
                part = replace(alone, sequences=[part], seq_lens=np.array([seq_len], np.int32))
                got = invariant_of(part)
                expected = whole[rows][chunk.start : chunk.stop]
                assert_same_bits(got, expected, f"sequence {seq}, queries {chunk} as a chunk")


@kernels
@given(case=paged_cases(dtypes=["float32", "bfloat16"]))
def test_invariant_cut_or_not(case):
    """Whether programs may share a sequence changes no bit."""
    cut, whole = invariant_of(case), invariant_of(case, MOST_SCRATCH=0)
    assert_same_bits(cut, whole, "cut against whole")


def assert_same_bits(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Equal as bytes, not as numbers."""
    same = got.tobytes() == np.ascontiguousarray(expected).tobytes()
    assert same, f"{what}: {np.count_nonzero(got != expected)} of {got.size} numbers have other bits"
