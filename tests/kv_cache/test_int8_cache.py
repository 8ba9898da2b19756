"""The int8 cache."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast.kv_cache._attention import choose_decode, choose_tiles, lie_in_words
from twofold.conformance.properties import kv_cache as properties
from twofold.conformance.strategies.kv_cache import batches, cuts, decode_batch, decodes, tokens, valid_calls

CALLS = valid_calls("int8")


@settings(max_examples=100)
@given(tokens=tokens("int8"))
def test_codes_are_the_nearest(backend, tokens):
    properties.codes_are_nearest(backend, tokens)


@given(tokens=tokens("int8", dtypes=("float64",)))
def test_codes_of_float64_are_the_nearest(tokens):
    properties.codes_are_nearest(reference, tokens)


@given(tokens=tokens("int8"))
def test_only_the_named_slots_change(backend, tokens):
    properties.only_named_slots_change(backend, tokens)


@settings(max_examples=100)
@given(batch=batches("int8"))
def test_attends_over_what_is_stored(backend, batch):
    properties.attends_over_what_is_stored(backend, batch)


@pytest.mark.interpreted(6)
@given(batch=batches("int8"))
def test_unowned_slots_do_not_matter(backend, batch):
    properties.unowned_slots_do_not_matter(backend, batch)


@pytest.mark.interpreted(6)
@settings(max_examples=100)
@given(batch=batches("int8"))
def test_padding_of_the_table_does_not_matter(backend, batch):
    properties.padding_of_the_table_does_not_matter(backend, batch)


@pytest.mark.interpreted(6)
@settings(max_examples=200)
@given(data=st.data())
def test_chunked_is_whole(backend, data):
    batch = data.draw(batches("int8", share=False, whole=True))
    properties.chunked_is_whole(backend, batch, [data.draw(cuts(int(n))) for n in batch.seq_lens])


@pytest.mark.interpreted(6)
@settings(max_examples=60)
@given(batch=decodes("int8"))
def test_decodes_attend_over_what_is_stored(backend, batch):
    properties.attends_over_what_is_stored(backend, batch)


@pytest.mark.interpreted(4)
@settings(max_examples=20)
@given(batch=decodes("int8"))
def test_unowned_slots_do_not_matter_to_decodes(backend, batch):
    properties.unowned_slots_do_not_matter(backend, batch)


@pytest.mark.interpreted(4)
@settings(max_examples=20)
@given(batch=decodes("int8"))
def test_released_blocks_do_not_matter_to_decodes(backend, batch):
    properties.padding_of_the_table_does_not_matter(backend, batch)


def test_the_smallest_scale_is_a_normal_number(backend):
    """What would have a smaller one is 0, and so is its scale."""
    call, tiny = valid_calls("int8")["write_kv_int8"], np.finfo(np.float32).tiny
    call["k"][0], call["k"][1] = 127 * tiny, 126 * tiny  # in slots 4 and 5, of block 1
    placed = properties.placed(backend, call)
    backend.write_kv_int8(**placed)
    codes, scales = (backend.to_host(placed[name])[1, :2] for name in ("k_cache", "k_scale"))
    assert scales.tolist() == [[tiny] * 2, [0] * 2], f"scales {scales}"
    assert codes.tolist() == [[[127] * 8] * 2, [[0] * 8] * 2], f"codes {codes}"


@pytest.mark.parametrize("head_dim", [16, 64])  # the general kernel's, and the one for decodes
def test_heads_of_a_cut_sequence_are_merged(backend, head_dim):
    batch = decode_batch("int8", (230, 1, 40), num_kv_heads=4, group=3, head_dim=head_dim)
    properties.attends_over_what_is_stored(backend, batch)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_blocks_out_of_range_are_none_where_nobody_looks(monkeypatch, format):
    monkeypatch.setenv("TWOFOLD_CHECK", "0")  # as an engine runs
    batch = decode_batch(format, (70, 1, 40), num_kv_heads=2, group=3, head_dim=16)
    properties.blocks_out_of_range_are_none(fast, batch)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_decodes_read_a_block_that_exists_where_nobody_looks(monkeypatch, format):
    """The kernel for decodes takes the nearest block there is: a number, and nothing is read beside the cache."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    batch = decode_batch(format, (33, 20), num_kv_heads=1, group=3, head_dim=64)
    cache, last = properties.written_cache(fast, batch), batch.layout.num_blocks - 1
    for block_id, nearest in ((last + 1, last), (-(2**31), 0)):
        results = []
        for each in (block_id, nearest):
            table = batch.block_table.copy()
            table[0, 0] = table[-1, 1] = each
            results.append(cache.attend(batch, block_table=table))
        assert properties.same_bits(*results), f"block {block_id} is not as good as {nearest}"


@pytest.mark.parametrize(
    ("num_tokens", "num_seqs", "group", "num_kv_heads", "expected"),
    [
        (8, 8, 4, 8, (4, 1, 8)),  # decodes: four heads a program, one query each, in a tile of 8
        (8, 8, 16, 2, (2, 1, 16)),  # a group that needs a larger tile; only two heads
        (24, 8, 4, 3, (1, 4, 16)),  # a few queries each, as speculation has: together in a tile
        (512, 1, 4, 8, (4, 4, 16)),  # a chunk
    ],
)
def test_tiles_follow_the_shape(num_tokens, num_seqs, group, num_kv_heads, expected):
    tiles = choose_tiles(num_tokens, num_seqs, group, num_kv_heads, head_dim=128, parts=1)
    assert (tiles.heads, tiles.queries, tiles.tile_q) == expected


@pytest.mark.parametrize(
    ("num_tokens", "group", "changed", "expected"),
    [
        (32, 4, {}, (1, 8, 4)),  # one query of a sequence, four heads of the eight columns
        (32, 8, {"num_kv_heads": 6}, (1, 8, 2)),
        (32, 1, {"num_kv_heads": 1}, (1, 8, 1)),
        (64, 4, {}, (2, 8, 4)),  # two queries of four heads fill them
        (65, 4, {}, None),
        (32, 9, {}, None),
        (32, 4, {"dtype": torch.float16}, (1, 8, 4)),
        (32, 4, {"codes": "int4", "num_groups": 2}, (1, 8, 4)),
        (32, 4, {"codes": "int4", "num_groups": 2, "dtype": torch.float16}, (1, 4, 4)),  # and what weights lose
        (32, 5, {"codes": "int4", "num_groups": 2, "dtype": torch.float16}, None),
        (32, 4, {"codes": "int4", "num_groups": 4}, (1, 8, 4)),
        (32, 4, {"codes": "int4", "num_groups": 8}, None),  # 16 numbers are fewer than eight lanes load
        (32, 4, {"codes": "int4", "num_groups": 4, "head_dim": 64}, None),
        (32, 4, {"dtype": torch.float32}, None),
        (32, 4, {"head_dim": 80}, None),
        (32, 4, {"block_size": 8}, None),
    ],
)
def test_which_batches_are_decodes(num_tokens, group, changed, expected):
    sizes = {"num_kv_heads": 8, "dtype": torch.bfloat16, "head_dim": 128, "block_size": 16}
    sizes |= {"codes": "int8", "num_groups": 1, **changed}
    tiles = choose_decode(num_tokens, 32, group, **sizes)
    assert (None if tiles is None else (tiles.queries, tiles.columns, tiles.heads)) == expected


def test_codes_lie_in_words():
    codes, scales = torch.empty(3, 16, 2, 128, dtype=torch.int8), torch.empty(3, 16, 2)
    assert lie_in_words((codes, codes), (scales, None, scales, None))
    pairs = torch.empty(3, 16, 2, 4, dtype=torch.float16)
    assert lie_in_words((codes, codes), (pairs,) * 4)
    assert lie_in_words((codes, codes), (pairs[..., :2],) * 4)
    apart = torch.empty(3, 16, 2, 100, dtype=torch.int8)[..., :64]  # rows of 100 bytes
    assert not lie_in_words((apart, apart), (scales, None, scales, None))
    assert not lie_in_words((codes, codes), (pairs[..., ::2],) * 4)
    assert not lie_in_words((codes, codes), (pairs[..., 1:3],) * 4)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_the_drawn_decodes_are_decodes(format):
    """The kernel for decodes takes what is drawn for it, and the general one what is drawn for that."""
    taken = Counter()

    def take(batch, drawn):
        if len(batch.q) and batch.q.dtype.itemsize == 2:
            layout, dtype = batch.layout, getattr(torch, batch.q.dtype.name)
            shape = len(batch.q), batch.num_sequences, batch.q.shape[1] // layout.num_kv_heads, layout.num_kv_heads
            tiles = choose_decode(*shape, dtype, layout.head_dim, layout.block_size, format, layout.num_groups)
            taken[drawn, tiles is None] += 1

    @settings(max_examples=100)
    @given(special=decodes(format), general=batches(format))
    def draw(special, general):
        take(special, "special")
        take(general, "general")

    draw()
    assert taken["special", False] >= 3 * taken["special", True], f"taken by the general kernel: {taken}"
    assert not taken["general", False], f"taken by the kernel for decodes: {taken}"


# ---- the door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CALLS)
def test_the_door_names_what_is_wrong(backend, op):
    properties.refuses_wrong_arrays(backend, op, CALLS[op])


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        ("write_kv_int8", {"slot_mapping": np.array([4, 8, 0])}),
        ("write_kv_int8", {"slot_mapping": np.array([4, 4, 0])}),
        ("write_kv_int8", {"k": np.full_like(CALLS["write_kv_int8"]["k"], np.nan)}),
        ("write_kv_int8", {"v": np.full_like(CALLS["write_kv_int8"]["v"], np.inf)}),
        ("paged_attention_int8", {"block_table": np.array([[2], [0]], np.int32)}),
        ("paged_attention_int8", {"block_table": np.array([[-1], [0]], np.int32)}),
        ("paged_attention_int8", {"seq_lens": np.array([5, 2], np.int32)}),
        ("paged_attention_int8", {"cu_seqlens_q": np.array([0, 2, 4])}),
    ],
)
def test_the_reference_checks_values_too(op, changed):
    properties.refuses(reference, op, CALLS[op], **changed)
