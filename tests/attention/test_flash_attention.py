"""Tiled attention with the online softmax is attention, and its lse is the logarithm of the denominator."""

import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast._triton import softmax
from fast._triton.platform import is_hopper, portable_kernels
from fast.attention.flash_attention import Tiles, choose_kernel, choose_tiles
from reference.attention import flash_attention as module
from reference.numerics.arrays import dtype_named
from twofold.conformance.properties import attention as properties
from twofold.conformance.strategies.attention import PackedCase, SequenceInput, packed_cases


@given(case=packed_cases())
def test_matches_the_oracle(backend, case):
    """Output and lse are within the rule, over packed sequences with more, fewer or no keys."""
    properties.flash_matches_oracle(backend, case)


@pytest.mark.needs("gpu")
@given(case=packed_cases(dtypes=["float16", "bfloat16"]))
def test_portable_kernel_matches_the_oracle(case):
    """What other GPUs run, on a Hopper GPU too."""
    with portable_kernels():
        properties.flash_matches_oracle(fast, case)


@pytest.mark.interpreted(6)
@settings(max_examples=200)
@given(case=packed_cases())
def test_equals_dense(backend, case):
    """Packing sequences and tiling their keys changes nothing."""
    properties.flash_equals_dense(backend, case)


@given(
    case=packed_cases(dtypes=["float64"]),
    tiles=st.tuples(st.sampled_from([1, 3, 64, 500]), st.sampled_from([1, 7, 64, 500])),
)
def test_the_size_of_tiles_does_not_matter(case, tiles):
    """Tiles of one query, of one key, or of everything give the same attention."""
    original = module.TILE_Q, module.TILE_KV
    module.TILE_Q, module.TILE_KV = tiles
    try:
        properties.flash_matches_oracle(reference, case)
    finally:
        module.TILE_Q, module.TILE_KV = original


@pytest.mark.parametrize("backend", [reference, fast])
@pytest.mark.parametrize(
    ("causal", "window", "hidden"),
    [
        (True, None, "after the last query"),
        (True, 0, "before the window"),  # the first query of the tile sees all but one key of the tile before it
        (True, 1, "before the window"),
        (False, 1, "before the window"),
        (False, 1, "after the window"),
    ],
)
def test_hidden_tiles_are_never_read(backend, causal, window, hidden):
    """A tile of keys that no query of a tile sees is skipped: it may hold NaN, and the third tile of queries does not
    mind. Windows are a tile of keys, or one more."""
    tile_q, tile_kv = (module.TILE_Q, module.TILE_KV) if backend is reference else choose_tiles(2, 4, 1000)[:2]
    first, end = 2 * tile_q, 3 * tile_q
    q, k, v = np.ones((3, end + 3 * tile_kv, 1, 2), np.float32)
    unseen = {
        "before the window": slice(0, first - tile_kv),
        "after the last query": slice(end, None),
        "after the window": slice(end + tile_kv, None),
    }
    k[unseen[hidden]] = v[unseen[hidden]] = np.nan
    arrays = [backend.from_host(x) for x in (q, k, v, *2 * [np.array([0, len(q)], np.int32)])]
    options = {"causal": causal, "sliding_window": None if window is None else tile_kv + window}
    for result in backend.flash_attention(*arrays, **options):
        assert np.isfinite(backend.to_host(result)[first:end]).all(), f"keys {hidden} were read"


@pytest.mark.needs("interpreter")  # where a step of a kernel can be counted
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 9), (True, 1), (False, None), (False, 9), (False, 2)]
)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(29, 29), (17, 40), (24, 10), (8, 32)])
def test_only_tiles_that_need_it_are_read_and_masked(monkeypatch, causal, window, num_queries, num_keys):
    """A tile of keys is read if any query of the tile sees any of them, and masked if not all queries see all."""
    tile_q, tile_kv = 8, 4
    counts = Counter()

    def counted(name):
        step = getattr(softmax, name)
        monkeypatch.setattr(softmax, name, lambda *arguments: counts.update([name]) or step(*arguments))

    counted("update")
    counted("hide")
    monkeypatch.setattr(sys.modules[choose_tiles.__module__], "choose_tiles", lambda *_: Tiles(tile_q, tile_kv, 4, 1))
    q, kv = (fast.from_host(np.ones((n, 1, 16), np.float32)) for n in (num_queries, num_keys))
    offsets = [fast.from_host(np.array([0, n], np.int32)) for n in (num_queries, num_keys)]
    fast.flash_attention(q, kv, kv, *offsets, causal=causal, sliding_window=window)

    query, key = np.arange(num_queries)[:, None] + num_keys - num_queries, np.arange(num_keys)
    seen = (key <= query) | (not causal)
    if window is not None:
        seen &= np.abs(query - key) < window
    num_read = num_masked = 0
    for rows in np.array_split(seen, range(tile_q, num_queries, tile_q)):
        read = [tile for tile in np.array_split(rows, range(tile_kv, num_keys, tile_kv), axis=1) if tile.any()]
        num_read += len(read)
        num_masked += sum(not tile.all() or tile.shape[1] < tile_kv for tile in read)
    assert counts["update"] == num_read, f"expected {num_read} tiles to be read, got {counts}"
    assert counts["hide"] == num_masked, f"expected {num_masked} of {num_read} tiles to be masked, got {counts}"


def test_a_query_without_keys():
    """It gives 0 and -inf; with a sink, 0 and the sink."""
    q, kv = np.ones((2, 3, 4), np.float32), np.ones((0, 1, 4), np.float32)
    offsets = np.array([0, 2]), np.array([0, 0])
    out, lse = reference.flash_attention(q, kv, kv, *offsets)
    assert (out == 0).all(), f"expected 0, got {out}"
    assert np.isneginf(lse).all(), f"expected -inf, got {lse}"
    sinks = np.array([-2.0, 0.5, 3.0], np.float32)
    out, lse = reference.flash_attention(q, kv, kv, *offsets, sinks=sinks)
    assert (out == 0).all(), f"with a sink: expected 0, got {out}"
    assert (lse == sinks).all(), f"with a sink: expected {sinks}, got {lse}"


@pytest.mark.interpreted(6)
@given(case=packed_cases())
def test_arguments_are_unchanged(backend, case):
    """No argument is written to."""
    options = case.options(backend) | {"causal": case.causal}
    properties.arguments_are_unchanged(backend, "flash_attention", case.arguments(backend), options)


@pytest.mark.interpreted(6)
@given(case=packed_cases())
def test_out_is_honoured(backend, case):
    """The output goes to ``out``, all of it and nothing beside it."""
    properties.flash_honours_out(backend, case)


def test_refuses_bad_shapes(backend):
    """A wrong shape, dtype or option raises a ValueError that names the argument."""
    properties.refuses_bad_shapes(backend, "flash_attention")


def test_refuses_bad_values(backend):
    """Offsets that are none raise a ValueError that names the argument."""
    properties.refuses_bad_values(backend, "flash_attention")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "lens", "options", "expected"),
    [
        ("bfloat16", 128, [(100, 140), (70, 70)], {}, "hopper"),
        ("bfloat16", 64, [(100, 140), (70, 70)], {}, "descriptors"),
        ("float16", 128, [(129, 257), (0, 3), (64, 64), (300, 300)], {"sinks": True}, "hopper"),
        ("bfloat16", 128, [(130, 128), (90, 0)], {"causal": False}, "hopper"),
        ("bfloat16", 128, [(130, 200)], {"sliding_window": 65}, "descriptors"),
        ("float16", 64, [(130, 200)], {"logit_cap": 5.0}, "descriptors"),
        ("float32", 128, [(70, 90)], {}, "descriptors"),
        ("bfloat16", 256, [(70, 90)], {}, "descriptors"),
        ("bfloat16", 16, [(20, 40), (40, 40)], {}, "descriptors"),
        ("bfloat16", 80, [(70, 90)], {}, "pointers"),
        ("float32", 1, [(7, 90)], {}, "pointers"),
    ],
)
def test_each_kernel_is_chosen_and_right(dtype, head_dim, lens, options, expected):
    """Which kernel serves follows from the shapes alone, and each is within the rule."""
    rng = np.random.default_rng(head_dim)
    sinks = rng.normal(size=4).astype(dtype_named(dtype)) if options.get("sinks") else None
    sequences = []
    for num_queries, num_keys in lens:
        shapes = (num_queries, 4, head_dim), (num_keys, 2, head_dim), (num_keys, 2, head_dim)
        sequences.append(SequenceInput(*(rng.normal(size=shape).astype(dtype_named(dtype)) for shape in shapes)))
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": head_dim}
    case = PackedCase(dtype=dtype, sequences=sequences, **heads, **(options | {"sinks": sinks}))
    properties.assert_out(fast, case, lambda backend, case: properties.flash_of(backend, case)[0], expected)

    q, k, v, *_ = case.arguments(fast)
    plain = not {"sliding_window", "logit_cap"} & set(options)
    chosen = choose_kernel(q, k, v, len(q) / len(lens), plain)
    if expected == "hopper" and not is_hopper(q):
        expected = "descriptors"
    assert chosen == expected, f"expected {expected}, got {chosen}"


def test_more_sequences_than_are_searched_at_once(monkeypatch):
    """A program looks for its sequence among some at a time; those without queries have no programs."""
    monkeypatch.setattr(sys.modules[choose_tiles.__module__], "SEARCH", 4)
    rng = np.random.default_rng(0)
    lens = [(1, 3), (0, 2), (2, 2), (1, 1), (0, 0), (0, 4), (1, 2), (3, 5), (1, 1)]
    sequences = [SequenceInput(*(rng.normal(size=(n, 1, 4)).astype(np.float32) for n in (a, b, b))) for a, b in lens]
    case = PackedCase(dtype="float32", sequences=sequences, num_heads=1, num_kv_heads=1, head_dim=4)
    properties.flash_matches_oracle(fast, case)


def test_tiles_follow_the_shape(monkeypatch):
    """Small tiles where sequences have few queries, more warps where the head is wide."""
    monkeypatch.setattr(sys.modules[choose_tiles.__module__], "INTERPRETING", False)
    few, many = choose_tiles(128, 2, 16), choose_tiles(128, 2, 17)
    assert few.tile_q < many.tile_q, f"expected few queries in smaller tiles, got {few}, {many}"
    wide = choose_tiles(256, 2, 4096)
    assert wide.num_warps > many.num_warps, f"head_dim 256: expected more warps than {many}, got {wide}"


def test_wrong_offsets_touch_nothing_else(monkeypatch):
    """Without the check of values, offsets that are none make a wrong result and no access outside the arrays."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    around = fast.from_host(np.full((3 * 64, 2, 16), 7.0, np.float32))
    q, out = fast.from_host(np.ones((64, 2, 16), np.float32)), around[64:128]
    good = np.array([0, 30, 64], np.int32)
    for wrong in (good - 40, good + 1000, good[::-1].copy(), good * 2**20, np.array([64, 0, 64], np.int32)):
        for offsets in ((wrong, good), (good, wrong), (wrong, wrong)):
            fast.flash_attention(q, q, q, *map(fast.from_host, offsets), out=out)
    outside = fast.to_host(around)[[*range(64), *range(128, 192)]]
    assert (outside == 7).all(), "rows outside out were written"
