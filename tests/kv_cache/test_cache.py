"""The KV cache in every format: its bytes lie where the layout says, its ops get what they name, the laws hold."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from reference.kv_cache.block_pool import BlockPool
from reference.kv_cache.block_table import BlockTable
from reference.kv_cache.cache import (
    ALIGNMENT,
    KV_FORMATS,
    CacheView,
    KVCache,
    block_bytes,
    blocks_for,
    bytes_per_token,
    resolve_format,
)
from reference.kv_cache.formats import block_layout
from reference.numerics.arrays import dtype_named
from twofold.conformance import plain_torch
from twofold.conformance.properties import cache as properties
from twofold.conformance.strategies.cache import cache_runs, formats
from twofold.conformance.tolerance import rounding_unit

BACKENDS = [pytest.param(reference, id="reference"), pytest.param(plain_torch, id="plain_torch")]
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_backends_and_fast = pytest.mark.parametrize("backend", [*BACKENDS, pytest.param(fast, id="fast")])
over_formats = pytest.mark.parametrize("name", KV_FORMATS)
KIVI = ("kivi4", "kivi2")

MODEL = {"num_kv_heads": 3, "head_dim": 8, "block_size": 4}


def make_cache(name, backend, **changed):
    sizes = {"num_layers": 2, "num_blocks": 5, "num_window_blocks": 4, **MODEL, **changed}
    return KVCache(name, backend=backend, **sizes)


def fill(cache, seed=0):
    """Random bytes in every pool; returns them."""
    rng = np.random.default_rng(seed)
    filled = [rng.integers(0, 256, (len(pool), pool.shape[1]), np.uint8) for pool in cache.pools]
    for index, rows in enumerate(filled):
        cache.swap_in(rows, range(len(rows)), pool=index)
    return filled


def pool_bytes(cache):
    return [np.array(cache.backend.to_host(pool)) for pool in cache.pools]


# ---- the laws, over drawn runs ----------------------------------------------------------------------------------


@over_backends
@given(run=cache_runs())
@settings(max_examples=100)
def test_reads_what_was_written(backend, run):
    properties.reads_what_was_written(backend, run)


@settings(max_examples=3)  # a dozen launches of interpreted kernels each; their own tests have more
@given(run=cache_runs())
def test_fast_reads_what_was_written(run):
    properties.reads_what_was_written(fast, run)


@over_backends
@given(run=cache_runs())
def test_chunked_is_whole(backend, run):
    properties.chunked_is_whole(backend, run)


@over_backends
@given(run=cache_runs(), coded=st.booleans())
def test_swapped_is_uninterrupted(backend, run, coded):
    properties.swapped_is_uninterrupted(backend, run, coded=coded)


@over_backends
@given(run=cache_runs(min_sequences=2))
def test_copied_on_write_is_copied(backend, run):
    properties.copied_on_write_is_copied(backend, run)


@over_backends
@given(run=cache_runs())
def test_hit_is_cold(backend, run):
    properties.hit_is_cold(backend, run)


@over_backends
@given(run=cache_runs(KIVI))
def test_released_is_kept(backend, run):
    properties.released_is_kept(backend, run)


# ---- the layout -------------------------------------------------------------------------------------------------


@over_backends
@over_formats
def test_an_array_of_a_layer_is_a_view_of_its_own_columns(name, backend):
    """Written through its view, an array changes its columns of the pool and no other byte; it begins aligned."""
    cache = make_cache(name, backend)
    expected, rng = fill(cache), np.random.default_rng(1)
    for pool, specs in enumerate(block_layout(name, **MODEL)):
        start = 0
        for layer in range(2):
            for spec in specs:
                assert start % ALIGNMENT == 0
                written = rng.integers(0, 256, (len(expected[pool]), spec.num_bytes), np.uint8)
                expected[pool][:, start : start + spec.num_bytes] = written
                view = cache.arrays(layer)[spec.name]
                assert tuple(view.shape) == (len(written), *spec.shape)
                view[...] = backend.bitcast(backend.from_host(written), spec.dtype).reshape(view.shape)
                for got, want in zip(pool_bytes(cache), expected):
                    assert np.array_equal(got, want), f"{spec.name} of layer {layer} is not a view of bytes {start} on"
                start += spec.aligned_bytes
        assert start == cache.block_bytes[pool], "a row is its arrays"


@over_formats
def test_an_array_has_the_dtype_its_layout_says(name):
    cache = make_cache(name, reference)
    for specs in block_layout(name, **MODEL):
        for spec in specs:
            assert cache.arrays(1)[spec.name].dtype == dtype_named(spec.dtype)


@over_backends_and_fast
@given(copies=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[0] != pair[1])))
def test_copies_happen_one_after_the_other(backend, copies):
    """Even where a block is a target and then a source, or twice a target; and no other pool is touched."""
    cache = make_cache("kivi2", backend, num_window_blocks=5)
    for pool in range(2):
        expected = fill(cache)
        cache.copy_blocks(copies, pool=pool)
        for source, target in copies:
            expected[pool][target] = expected[pool][source]
        for got, want in zip(pool_bytes(cache), expected):
            assert np.array_equal(got, want)


@over_backends_and_fast
@over_formats
def test_a_row_carries_everything_a_block_holds(name, backend):
    """Swapped out, overwritten, and swapped in elsewhere: every array of every layer has moved along."""
    cache = make_cache(name, backend)
    for pool in range(len(cache.pools)):
        filled = fill(cache)[pool]
        names = [spec.name for spec in block_layout(name, **MODEL)[pool]]
        before = [backend.to_host(cache.arrays(layer)[n])[[3, 0]].tobytes() for layer in range(2) for n in names]
        rows = cache.swap_out([3, 0], pool=pool)
        assert np.array_equal(rows, filled[[3, 0]])
        cache.swap_in(np.zeros_like(filled), range(len(filled)), pool=pool)
        cache.swap_in(rows, [1, 2], pool=pool)
        after = [backend.to_host(cache.arrays(layer)[n])[[1, 2]].tobytes() for layer in range(2) for n in names]
        assert before == after


# ---- the ops ----------------------------------------------------------------------------------------------------


def step_of_one_sequence(backend, num_tokens=6, num_heads=6):
    """A view of one sequence's first step, its tables different in the two pools, and its q, k and v."""
    rng = np.random.default_rng(2)
    block_size, num_kv_heads, head_dim = MODEL["block_size"], MODEL["num_kv_heads"], MODEL["head_dim"]
    block_ids = [3, 1], [0, 2]
    tables = [BlockTable(BlockPool(5), block_size, block_ids=ids, num_tokens=num_tokens) for ids in block_ids]
    slots = [table.slots(0, num_tokens) for table in tables]
    place = backend.from_host
    view = CacheView(
        cu_seqlens_q=place(np.array([0, num_tokens], np.int32)),
        seq_lens=place(np.array([num_tokens], np.int32)),
        block_table=place(np.array([block_ids[0]], np.int32)),
        slot_mapping=place(slots[0]),
        window_block_table=place(np.array([block_ids[1]], np.int32)),
        window_slot_mapping=place(slots[1]),
    )
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return view, [place(rng.normal(size=(num_tokens, h, head_dim)).astype(np.float32)) for h in heads]


@over_backends
@over_formats
def test_every_array_reaches_the_op_under_its_own_name(name, backend):
    """`write` and `attend` are the format's ops called with every array by keyword, bit for bit; the options too."""
    through, direct = make_cache(name, backend), make_cache(name, backend)
    for cache in (through, direct):
        fill(cache)
    format = through.format
    view, (q, k, v) = step_of_one_sequence(backend)
    kivi = {} if format.window is None else {"window": format.window}
    slots, tables = {"slot_mapping": view.slot_mapping}, {"block_table": view.block_table}
    if kivi:
        slots["window_slot_mapping"] = view.window_slot_mapping
        tables["window_block_table"] = view.window_block_table
    options = {
        "scale": 0.3,
        "sliding_window": 3,
        "sinks": backend.from_host(np.linspace(-1, 1, 6, dtype=np.float32)),
        "logit_cap": 5.0,
    }
    arrays = direct.arrays(1)

    through.write(1, k, v, view)
    getattr(backend, format.write_op)(k=k, v=v, **arrays, **slots)
    for got, want in zip(pool_bytes(through), pool_bytes(direct)):
        assert np.array_equal(got, want), "written otherwise, or elsewhere"

    out = backend.from_host(np.full((6, 6, 8), np.nan, np.float32))
    got = through.attend(1, q, view, out=out, **options)
    lengths = {"seq_lens": view.seq_lens, "cu_seqlens_q": view.cu_seqlens_q}
    want = getattr(backend, format.attend_op)(q=q, **arrays, **tables, **lengths, **kivi, **options)
    assert np.array_equal(backend.to_host(got), backend.to_host(want)), "attended to otherwise"
    assert np.array_equal(backend.to_host(out), backend.to_host(want)), "out was not written"


@over_backends
@over_formats
@pytest.mark.parametrize("norms", [(), ("q_norm",), ("q_norm", "k_norm")], ids=["plain", "q_norm", "qk_norm"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_rotating_and_writing_is_norm_then_rotary_then_write(name, backend, norms, interleaved):
    """Fused or in parts: the same q, and the same attention over what was written."""
    rng = np.random.default_rng(3)
    place, half = backend.from_host, MODEL["head_dim"] // 2
    angles = rng.uniform(0, 6, (9, half)).astype(np.float32)
    cos, sin, positions = place(np.cos(angles)), place(np.sin(angles)), place(np.array([8, 1, 2, 3, 4, 7]))
    weights = {norm: place(rng.uniform(0.5, 2, 2 * half).astype(np.float32)) for norm in norms}
    view, (q, k, v) = step_of_one_sequence(backend)

    whole, parts = make_cache(name, backend), make_cache(name, backend)
    got = whole.rotate_and_write(0, q, k, v, cos, sin, positions, view, eps=1e-3, interleaved=interleaved, **weights)
    q = backend.rms_norm(q, weights["q_norm"], eps=1e-3) if "q_norm" in weights else q
    k = backend.rms_norm(k, weights["k_norm"], eps=1e-3) if "k_norm" in weights else k
    q, k = backend.rotary(q, k, cos, sin, positions, interleaved=interleaved)
    parts.write(0, k, v, view)

    # A norm and a rotation in float32, whichever way: a few roundings of numbers below 8. Storing is one more.
    arithmetic = 32 * 8 * rounding_unit("float32")
    np.testing.assert_allclose(backend.to_host(got), backend.to_host(q), rtol=0, atol=arithmetic, err_msg="q")
    if whole.format.fused_op:
        gathered = [backend.gather_kv(*cache.arrays(0).values(), view.slot_mapping) for cache in (whole, parts)]
        for array, a, b in zip(("k", "v"), *gathered):
            a, b = (np.asarray(backend.to_host(x)).astype(np.float32) for x in (a, b))
            stored = 0 if whole.format.name == "float32" or name == "auto" else 2 * rounding_unit(name)
            np.testing.assert_allclose(a, b, rtol=stored, atol=arithmetic, err_msg=f"{array}, as written")
    else:
        a, b = (backend.to_host(cache.attend(0, q, view)) for cache in (whole, parts))
        assert np.array_equal(a, b), "something else was written"


# ---- what it costs ----------------------------------------------------------------------------------------------


@given(format=formats(), dtype=st.sampled_from(["float32", "bfloat16"]), block_size=st.sampled_from([1, 4, 16, 24]))
def test_the_cost_that_is_printed_is_the_cost(format, dtype, block_size):
    """Bytes a token, from sizes alone, are what the pools take."""
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 20, "block_size": block_size, "dtype": dtype}
    cache = KVCache(format, num_blocks=7, num_window_blocks=3, backend=reference, **sizes)
    assert bytes_per_token(format, **sizes) == cache.bytes_per_token == cache.pools[0].nbytes / (7 * block_size)
    assert block_bytes(format, **sizes) == cache.block_bytes == tuple(pool.shape[1] for pool in cache.pools)


@given(format=formats(), budget=st.integers(0, 10**6), num_window_blocks=st.integers(0, 20))
def test_the_blocks_for_a_budget_fit_and_one_more_would_not(format, budget, num_window_blocks):
    sizes = {"num_layers": 2, **MODEL}
    of_pool = block_bytes(format, **sizes)
    window = sum(of_pool[1:]) * num_window_blocks
    if budget < window + of_pool[0]:
        with pytest.raises(ValueError, match=f"a block of {of_pool[0]} bytes"):
            blocks_for(budget, format, num_window_blocks=num_window_blocks, **sizes)
        return
    num_blocks = blocks_for(budget, format, num_window_blocks=num_window_blocks, **sizes)
    assert num_blocks * of_pool[0] + window <= budget < (num_blocks + 1) * of_pool[0] + window


@st.composite
def chunk_schedules(draw):
    """Steps of at most ``max_tokens`` new tokens over ``max_seqs`` sequences, as greedy as they may be."""
    max_seqs, max_tokens = draw(st.integers(1, 4), label="max_seqs"), draw(st.integers(1, 40), label="max_tokens")
    steps = []
    for _ in range(draw(st.integers(1, 8), label="num_steps")):
        cuts = sorted(draw(st.lists(st.integers(0, max_tokens), min_size=max_seqs - 1, max_size=max_seqs - 1)))
        steps.append(np.diff([0, *cuts, max_tokens]).tolist())
    return max_seqs, max_tokens, steps


@given(chunk_schedules(), st.sampled_from([1, 2, 5, 32, 0]), st.sampled_from([1, 4, 16]), st.integers(0, 1))
@settings(max_examples=200)
def test_window_blocks_cannot_run_out(schedule, window, block_size, lookahead):
    """However the budget is spent; with a step in flight, what a step gave up is free only after the next began."""
    max_seqs, max_tokens, steps = schedule
    format = replace(KV_FORMATS["kivi4"], window=window)
    pool = BlockPool(
        format.window_blocks(
            block_size=block_size, max_num_seqs=max_seqs, max_num_batched_tokens=max_tokens, lookahead=lookahead
        )
    )
    tables, in_flight = [BlockTable(pool, block_size) for _ in range(max_seqs)], []
    for counts in steps:
        dropped = [b for t in tables for b in t.release_before(format.window_start(t.num_tokens))]
        in_flight.append(dropped)
        if len(in_flight) > lookahead:
            pool.release(in_flight.pop(0))
        for table, count in zip(tables, counts):
            table.append(count)  # raises OutOfBlocks if the promise is broken


def test_a_format_without_a_window_needs_no_window_blocks():
    sizes = {"block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    assert {f.window_blocks(**sizes) > 0 for f in KV_FORMATS.values() if f.window is not None} == {True}
    assert {f.window_blocks(**sizes) for f in KV_FORMATS.values() if f.window is None} == {0}


# ---- what cannot be ---------------------------------------------------------------------------------------------


def test_auto_is_the_models_dtype():
    """Whatever it is; and a format that is named stays what it is."""
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        cache = make_cache("auto", reference, dtype=dtype)
        assert (cache.format.name, cache.arrays(0)["k_cache"].dtype) == (dtype, dtype_named(dtype))
        assert resolve_format("int8", dtype) is KV_FORMATS["int8"]


def test_every_format_says_what_it_is_in_a_sentence():
    """The table that commands show has no empty cell."""
    for name, format in KV_FORMATS.items():
        assert format.name == name
        assert format.summary.endswith(".")
        assert len(format.summary) < 100
        assert (format.bits > 0) == (name != "auto")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "int3"}, "format: expected one of auto, float32"),
        ({"dtype": "int8"}, "dtype: expected one of float64"),
        ({"name": "int4", "head_dim": 7}, "int4: head_dim: expected a multiple of 2, got 7"),
        ({"name": "kivi2", "head_dim": 6}, "kivi2: head_dim: expected a multiple of 4, got 6"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_blocks": -1}, "num_blocks"),
        (
            {"name": KV_FORMATS["kivi2"].with_window(-1)},
            "window: expected at least 0",
        ),
    ],
)
def test_what_no_cache_can_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        make_cache(changed.pop("name", "auto"), reference, **changed)


def test_a_window_is_chosen_where_there_is_one():
    """None leaves the format's own; the other formats say that they have none, in a sentence."""
    assert KV_FORMATS["kivi2"].with_window(0).window == 0
    assert KV_FORMATS["kivi2"].with_window(None) is KV_FORMATS["kivi2"]
    assert KV_FORMATS["int8"].with_window(None) is KV_FORMATS["int8"]
    with pytest.raises(ValueError, match=r"KV format int8 has no window \(got 32\); those that have one: kivi4, kivi2"):
        KV_FORMATS["int8"].with_window(32)


def test_a_backend_without_an_op_is_named_at_once():
    """When the cache is made, not in the middle of a step."""
    without = SimpleNamespace(**{op: getattr(reference, op) for op in reference.__all__ if op != "write_kv_int8"})
    with pytest.raises(NotImplementedError, match="no write_kv_int8, which the KV format int8 needs"):
        make_cache("int8", without)


def test_an_empty_cache_is_valid():
    """No layer, no block."""
    for sizes in ({"num_layers": 0}, {"num_blocks": 0, "num_window_blocks": 0}):
        cache = make_cache("kivi4", reference, **sizes)
        cache.copy_blocks([])
        assert cache.swap_out([]).shape == (0, cache.block_bytes[0])
