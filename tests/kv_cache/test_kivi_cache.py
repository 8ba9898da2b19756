"""KIVI: sealed groups, positional age, and the window."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast._triton.platform import INTERPRETING
from fast.kv_cache.kivi_cache import choose_tiles
from twofold.conformance.properties import kv_cache as properties
from twofold.conformance.strategies.attention import COUNTED_FEATURES
from twofold.conformance.strategies.kv_cache import EXTREME, ORDINARY, batches, cuts, valid_calls, values

CALLS = valid_calls("kivi")


@pytest.mark.interpreted(6)
@settings(max_examples=100)
@given(batch=batches("kivi", share=False), kind=st.sampled_from(ORDINARY + EXTREME))
def test_sealed_codes_are_the_nearest(backend, batch, kind):
    rng = np.random.default_rng(0)
    packed = [values(rng, x.shape, kind, batch.q.dtype.name) for x in batch.packed]
    properties.sealed_codes_are_nearest(backend, replace(batch, packed=packed))


@pytest.mark.interpreted(6)
@given(batch=batches("kivi"))
def test_only_sealed_groups_change(backend, batch):
    properties.only_sealed_groups_change(backend, batch)


@settings(max_examples=100)
@given(batch=batches("kivi"))
def test_attends_over_what_is_stored(backend, batch):
    properties.attends_over_what_is_stored(backend, batch)


@pytest.mark.interpreted(6)
@given(batch=batches("kivi"))
def test_unowned_slots_do_not_matter(backend, batch):
    properties.unowned_slots_do_not_matter(backend, batch)


@pytest.mark.interpreted(6)
@settings(max_examples=100)
@given(batch=batches("kivi"))
def test_released_blocks_do_not_matter(backend, batch):
    properties.padding_of_the_table_does_not_matter(backend, batch)


@pytest.mark.interpreted(6)
@settings(max_examples=200)
@given(data=st.data())
def test_chunked_is_whole(backend, data):
    batch = data.draw(batches("kivi", share=False, whole=True))
    places = [data.draw(cuts(int(n))) for n in batch.seq_lens]
    if backend is fast and INTERPRETING:  # at most three chunks: a launch takes a second
        places = [sorted({cut[0], *cut[1:-1][:2], cut[-1]}) if cut[-1] else cut for cut in places]
    properties.chunked_is_whole(backend, batch, places)


@pytest.mark.interpreted(6)
@settings(max_examples=200)
@given(batch=batches("kivi"))
def test_a_window_as_long_as_the_sequence_is_plain_attention(backend, batch):
    properties.wide_window_is_plain(backend, batch)


@pytest.mark.interpreted(6)
@settings(max_examples=200)
@given(data=st.data())
def test_what_is_written_again_is_sealed_again(backend, data):
    batch = data.draw(batches("kivi", share=False))
    kept = [data.draw(st.integers(0, int(n)), label="kept") for n in batch.seq_lens]
    properties.rewriting_seals_again(backend, batch, kept)


def test_the_batches_have_what_matters():
    """What a result file counts is in at least a fifth of the drawn batches, as is a query that reads both kinds."""
    counts, drawn = Counter(), []

    @settings(max_examples=200)
    @given(batch=batches("kivi"))
    def draw(batch):
        drawn.append(batch)
        counts.update(batch.features)

    draw()
    rare = {name: counts[name] for name in (*COUNTED_FEATURES, "keys of both kinds") if 5 * counts[name] < len(drawn)}
    assert not rare, f"of {len(drawn)} batches, too few had: {rare}"


def test_the_batches_reach_every_tile():
    """Those that attention takes for decodes, and those for chunks."""
    chosen = Counter()

    @settings(max_examples=200)
    @given(batch=batches("kivi"))
    def draw(batch):
        num_tokens, num_heads, head_dim = batch.q.shape
        if num_tokens:
            group = num_heads // batch.layout.num_kv_heads
            chosen[choose_tiles(num_tokens, batch.num_sequences, group, head_dim).tile_q] += 1

    draw()
    assert set(chosen) == {16, 32}, f"tiles chosen: {chosen}"
    assert min(chosen.values()) >= 5, f"tiles chosen: {chosen}"


# ---- the door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CALLS)
def test_the_door_names_what_is_wrong(backend, op):
    properties.refuses_wrong_arrays(backend, op, CALLS[op])


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        ("write_kv_kivi", {"slot_mapping": np.array([4, 8, 0])}),
        ("write_kv_kivi", {"slot_mapping": np.array([4, 4, 0])}),
        ("write_kv_kivi", {"k": np.full_like(CALLS["write_kv_kivi"]["k"], np.nan)}),
        ("write_kv_kivi", {"v": np.full_like(CALLS["write_kv_kivi"]["v"], np.inf)}),
        ("write_kv_kivi", {"window_slot_mapping": np.array([4, 8, 0])}),
        ("write_kv_kivi", {"window_slot_mapping": np.array([4, 6, 0])}),  # another offset than its quantized slot
        ("write_kv_kivi", {"window_slot_mapping": np.array([4, -1, 0])}),  # skipped in one mapping only
        ("paged_attention_kivi", {"window": -1}),
        ("paged_attention_kivi", {"window_block_table": np.array([[2], [0]], np.int32)}),
        ("paged_attention_kivi", {"window_block_table": np.array([[-1], [0]], np.int32)}),  # released too early
        ("paged_attention_kivi", {"block_table": np.array([[2], [0]], np.int32)}),
        ("paged_attention_kivi", {"block_table": np.array([[-1], [0]], np.int32)}),
        ("paged_attention_kivi", {"seq_lens": np.array([5, 2], np.int32)}),
        ("paged_attention_kivi", {"cu_seqlens_q": np.array([0, 2, 4])}),
    ],
)
@pytest.mark.parametrize("checking", [reference, fast], ids=["reference", "fast"])
def test_values_are_checked_too(checking, op, changed):
    properties.refuses(checking, op, CALLS[op], **changed)
