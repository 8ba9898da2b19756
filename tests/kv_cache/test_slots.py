"""Slots: write and gather by slot; copy and swap blocks, of any format."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast.kv_cache.slots import TILE_VALUES, TILE_WORDS
from twofold.conformance.properties import kv_cache as properties
from twofold.conformance.strategies.kv_cache import (
    FORMATS,
    Layout,
    Tokens,
    batches,
    cuts,
    pools,
    tokens,
    valid_calls,
    values,
)


@given(tokens=tokens("plain"))
def test_what_is_written_is_gathered(backend, tokens):
    properties.written_is_gathered(backend, tokens)


@given(tokens=tokens("plain"))
def test_only_the_named_slots_change(backend, tokens):
    properties.only_named_slots_change(backend, tokens)


@pytest.mark.interpreted(6)
@settings(max_examples=200)
@given(data=st.data())
def test_chunked_is_whole(backend, data):
    batch = data.draw(batches("plain", share=False, whole=True))
    properties.chunked_is_whole(backend, batch, [data.draw(cuts(int(n))) for n in batch.seq_lens])


@pytest.mark.interpreted(6)
@settings(max_examples=200)
@given(batch=st.sampled_from(FORMATS).flatmap(batches))
def test_a_copy_of_a_block_is_a_deep_copy(backend, batch):
    properties.copied_blocks_are_deep_copies(backend, batch)


@pytest.mark.needs("float64")
@given(batch=st.sampled_from(FORMATS).flatmap(batches))
def test_float64_queries_compute_in_float64(backend, batch):
    properties.attends_over_what_is_stored(backend, replace(batch, q=batch.q.astype(np.float64)))


@pytest.mark.parametrize("format", FORMATS)
def test_slots_out_of_range_write_nothing(backend, format, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CHECK", "0")  # as an engine runs: `fast` does not look, and skips them
    op, arguments = next(iter(valid_calls(format).items()))
    properties.slots_out_of_range_write_nothing(backend, op, arguments)


@given(copy=pools())
def test_copies_move_only_their_targets(backend, copy):
    properties.copies_move_only_their_targets(backend, *copy)


@given(copy=pools())
def test_swapped_blocks_come_back_elsewhere(backend, copy):
    properties.swapped_blocks_come_back(backend, *copy)


def test_wide_tokens_take_several_programs(backend):
    """More numbers than one program moves, and than a whole number of programs would."""
    layout = Layout("plain", 3, 0, 4, 5, 3 * TILE_VALUES // 7, num_groups=1, group_size=1, bits=4, dtype="bfloat16")
    width = (3, 2 * layout.num_kv_heads, layout.head_dim)
    packed = values(np.random.default_rng(0), width, "normal", "float32")
    packed[1] = np.nan
    wide = Tokens(layout, "normal", packed, np.array([10, -1, 3]))
    properties.written_is_gathered(backend, wide)
    properties.only_named_slots_change(backend, wide)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_long_rows_take_several_programs(backend, dtype):
    """Of bytes, which are moved as words where their rows are aligned, and of words."""
    words = 2 * TILE_WORDS + 5
    pool = np.random.default_rng(0).integers(0, 100, (5, 2 * words)).astype(dtype)
    properties.copies_move_only_their_targets(backend, pool, np.array([3, 0]), np.array([1, 4]))
    properties.swapped_blocks_come_back(backend, pool, np.array([3, 0]), np.array([1, 4]))


# ---- the door ---------------------------------------------------------------------------------------------------

POOL, IDS = np.zeros((4, 6), np.uint8), np.array([0, 2])
WRITE = valid_calls("plain")["write_kv"]
CALLS = {
    "write_kv": WRITE,
    "gather_kv": {name: WRITE[name] for name in ("k_cache", "v_cache", "slot_mapping")},
    "copy_blocks": {"pool": POOL, "source_ids": IDS, "target_ids": IDS + 1},
    "swap_out": {"pool": POOL, "block_ids": IDS},
    "swap_in": {"rows": POOL[:2], "pool": POOL, "block_ids": IDS},
}
JUST_ANOTHER_CALL = {
    "gather_kv": [("slot_mapping", 0)],
    "copy_blocks": [("pool", 0), ("pool", 1), ("pool", "dtype")],
    "swap_out": [("pool", 0), ("pool", 1), ("pool", "dtype"), ("block_ids", 0)],
    "swap_in": [("pool", 0)],
}


@pytest.mark.parametrize("op", CALLS)
def test_the_door_names_what_is_wrong(backend, op):
    properties.refuses_wrong_arrays(backend, op, CALLS[op], JUST_ANOTHER_CALL.get(op, ()))


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        ("write_kv", {"slot_mapping": np.array([0, 1, 8])}),
        ("write_kv", {"slot_mapping": np.array([0, 1, -2])}),
        ("write_kv", {"slot_mapping": np.array([3, 3, 1])}),
        ("gather_kv", {"slot_mapping": np.array([8])}),
        ("copy_blocks", {"target_ids": np.array([1, 4])}),
        ("copy_blocks", {"target_ids": np.array([1, -1])}),
        ("copy_blocks", {"target_ids": np.array([1, 1])}),
        ("copy_blocks", {"target_ids": np.array([1, 0])}),
        ("swap_out", {"block_ids": np.array([4])}),
        ("swap_in", {"block_ids": np.array([1, 1])}),
        ("swap_in", {"block_ids": np.array([1, -1])}),
    ],
)
@pytest.mark.parametrize("checking", [reference, fast], ids=["reference", "fast"])
def test_ids_are_checked_too(checking, op, changed):
    properties.refuses(checking, op, CALLS[op], **changed)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_ids_out_of_range_move_nothing(bad, monkeypatch):
    """Where values are not looked at, as in an engine; only what came from no block is 0."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    host = np.arange(24, dtype=np.uint8).reshape(4, 6)
    pool, good, ids = (fast.from_host(x) for x in (host.copy(), np.array([1, 3]), np.array([0, bad])))
    fast.copy_blocks(pool, good, ids)
    fast.copy_blocks(pool, ids, good)
    rows = fast.swap_out(pool, ids)
    fast.swap_in(rows + 1, pool, ids)
    host[0] = host[1]
    assert np.array_equal(fast.to_host(rows), [host[0], np.zeros(6)])
    host[0] += 1
    host[1] = host[0] - 1
    assert np.array_equal(fast.to_host(pool), host)
