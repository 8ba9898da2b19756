"""KIVI: sealed groups, positional age, and the window."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast._triton.platform import INTERPRETING
from fast.kv_cache.kivi_cache import KiviArrays, choose_decode, choose_tiles
from twofold.conformance.properties import kv_cache as properties
from twofold.conformance.strategies.attention import COUNTED_FEATURES
from twofold.conformance.strategies.kv_cache import EXTREME, ORDINARY, Layout, batches, cuts, valid_calls, values

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


# ---- the kernel for decodes: large heads, groups of 16 keys and more, two-byte floats -----------------------------


@st.composite
def decodes(draw, **options):
    """Batches that `fast` gives to its kernel for decodes."""
    bits, head_dim = draw(st.sampled_from([(2, 128), (4, 128), (2, 128), (4, 64)]), label="bits and head_dim")
    num_groups = draw(st.sampled_from([2, 4] if head_dim == 128 else [2]), label="num_groups")
    block_size, group_size = draw(st.sampled_from([(16, 16), (32, 16), (32, 32), (48, 48)]), label="block and group")
    num_kv_heads = draw(st.sampled_from([1, 2, 3, 4]), label="num_kv_heads")
    dtype = draw(st.sampled_from(["bfloat16", "float16"]), label="dtype")
    layout = Layout("kivi", 0, 0, block_size, num_kv_heads, head_dim, num_groups, group_size, bits, dtype)
    most = draw(st.sampled_from([1, 1, 2]), label="most queries")
    return draw(batches("kivi", layout=layout, most_queries=most, **options))


@pytest.mark.interpreted(5)
@settings(max_examples=40)
@given(batch=decodes())
def test_decodes_attend_over_what_is_stored(backend, batch):
    properties.attends_over_what_is_stored(backend, batch)


@pytest.mark.interpreted(4)
@settings(max_examples=40)
@given(batch=decodes(kind="outlier channels", options=False))
def test_scores_of_large_channels_are_as_good(backend, batch):
    """Large scores, of which the best two may be close: what is lost of a query times a scale shows in the weights."""
    properties.attends_over_what_is_stored(backend, batch)


@pytest.mark.interpreted(4)
@settings(max_examples=20)
@given(batch=decodes())
def test_unowned_slots_do_not_matter_to_decodes(backend, batch):
    properties.unowned_slots_do_not_matter(backend, batch)


@pytest.mark.interpreted(4)
@settings(max_examples=20)
@given(batch=decodes())
def test_released_blocks_do_not_matter_to_decodes(backend, batch):
    properties.padding_of_the_table_does_not_matter(backend, batch)


def kivi_arrays(head_dim=128, bits=2, block_size=16, group_size=16, num_groups=4, num_kv_heads=8, dtype=torch.bfloat16):
    """Empty arrays of a cache without blocks."""
    window = torch.empty(0, block_size, num_kv_heads, head_dim, dtype=dtype)
    codes = torch.empty(0, block_size, num_kv_heads, head_dim * bits // 8, dtype=torch.uint8)
    k_scale = torch.empty(0, block_size // group_size, num_kv_heads, head_dim, dtype=torch.float16)
    v_scale = torch.empty(0, block_size, num_kv_heads, num_groups, dtype=torch.float16)
    return KiviArrays(window, window, codes, codes, k_scale, k_scale, v_scale, v_scale)


@pytest.mark.parametrize(
    ("tokens", "seqs", "group", "dtype", "sizes", "chosen"),
    [
        (32, 32, 4, torch.bfloat16, {}, (1, 4, 4)),
        (32, 32, 4, torch.float16, {"dtype": torch.float16}, (1, 4, 4)),
        (64, 32, 4, torch.bfloat16, {}, (2, 8, 4)),  # two queries of four heads each fill the eight columns
        (65, 32, 4, torch.bfloat16, {}, None),
        (64, 32, 4, torch.float16, {"dtype": torch.float16}, (2, 8, 4)),
        (64, 32, 2, torch.bfloat16, {}, (2, 4, 4)),
        (32, 32, 8, torch.bfloat16, {"num_kv_heads": 6}, (1, 8, 2)),
        (32, 32, 9, torch.float16, {"dtype": torch.float16}, None),
        (32, 32, 1, torch.bfloat16, {"num_kv_heads": 1, "bits": 4, "num_groups": 2}, (1, 4, 1)),
        (32, 32, 4, torch.float32, {"dtype": torch.float32}, None),
        (32, 32, 4, torch.bfloat16, {"dtype": torch.float16}, None),  # a window of other numbers than the queries
        (32, 32, 4, torch.bfloat16, {"group_size": 8}, None),
        (32, 32, 4, torch.bfloat16, {"num_groups": 8}, None),
        (32, 32, 4, torch.bfloat16, {"num_groups": 1}, None),
        (32, 32, 4, torch.bfloat16, {"head_dim": 64, "num_groups": 2}, None),  # 16 bytes of 2 bits
        (32, 32, 4, torch.bfloat16, {"head_dim": 64, "num_groups": 2, "bits": 4}, (1, 4, 4)),
        (32, 32, 4, torch.bfloat16, {"head_dim": 256}, None),
    ],
)
def test_which_batches_are_decodes(tokens, seqs, group, dtype, sizes, chosen):
    tiles = choose_decode(tokens, seqs, group, dtype, 1, kivi_arrays(**sizes))
    assert (None if tiles is None else tiles[:3]) == chosen
    assert choose_decode(tokens, seqs, group, dtype, 2, kivi_arrays(**sizes)) is None  # queries apart from each other


@pytest.mark.parametrize(
    ("sizes", "stages"),
    [
        ({}, 3),
        ({"block_size": 32, "group_size": 32}, 3),
        ({"bits": 4}, 2),  # what four warps need for three tiles is more than a kernel may declare
        ({"bits": 4, "num_kv_heads": 2}, 3),
    ],
)
def test_tiles_in_memory(sizes, stages):
    tiles = choose_decode(32, 32, 4, torch.bfloat16, 1, kivi_arrays(**sizes))
    assert tiles is not None
    assert tiles.stages == stages


def test_the_drawn_decodes_are_decodes():
    """The kernel for decodes takes what is drawn for it, and the general one what is drawn for that."""
    taken = Counter()

    def take(batch, drawn):
        if len(batch.q) and batch.q.dtype.itemsize == 2:
            layout, dtype = batch.layout, getattr(torch, batch.q.dtype.name)
            sizes = {name: getattr(layout, name) for name in ("head_dim", "bits", "block_size", "group_size")}
            sizes |= {"num_groups": layout.num_groups, "num_kv_heads": layout.num_kv_heads}
            arrays = kivi_arrays(**sizes, dtype=getattr(torch, layout.dtype))
            group = batch.q.shape[1] // layout.num_kv_heads
            taken[drawn, choose_decode(len(batch.q), batch.num_sequences, group, dtype, 1, arrays) is None] += 1

    @settings(max_examples=100)
    @given(special=decodes(), general=batches("kivi"))
    def draw(special, general):
        take(special, "special")
        take(general, "general")

    draw()
    assert taken["special", False] >= 3 * taken["special", True], f"taken by the general kernel: {taken}"
    assert not taken["general", False], f"taken by the kernel for decodes: {taken}"


# ---- what is drawn ----------------------------------------------------------------------------------------------


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
