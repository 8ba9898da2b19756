"""The int4 cache."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from twofold.conformance.properties import kv_cache as properties
from twofold.conformance.strategies.kv_cache import batches, cuts, decode_batch, decodes, tokens, valid_calls

CALLS = valid_calls("int4")


@settings(max_examples=100)
@given(tokens=tokens("int4"))
def test_codes_are_the_nearest(backend, tokens):
    properties.codes_are_nearest(backend, tokens)


@given(tokens=tokens("int4", dtypes=("float64",)))
def test_codes_of_float64_are_the_nearest(tokens):
    properties.codes_are_nearest(reference, tokens)


@given(tokens=tokens("int4"))
def test_only_the_named_slots_change(backend, tokens):
    properties.only_named_slots_change(backend, tokens)


@settings(max_examples=100)
@given(batch=batches("int4"))
def test_attends_over_what_is_stored(backend, batch):
    properties.attends_over_what_is_stored(backend, batch)


@pytest.mark.interpreted(6)
@given(batch=batches("int4"))
def test_unowned_slots_do_not_matter(backend, batch):
    properties.unowned_slots_do_not_matter(backend, batch)


@pytest.mark.interpreted(6)
@settings(max_examples=100)
@given(batch=batches("int4"))
def test_padding_of_the_table_does_not_matter(backend, batch):
    properties.padding_of_the_table_does_not_matter(backend, batch)


@pytest.mark.interpreted(6)
@settings(max_examples=200)
@given(data=st.data())
def test_chunked_is_whole(backend, data):
    batch = data.draw(batches("int4", share=False, whole=True))
    properties.chunked_is_whole(backend, batch, [data.draw(cuts(int(n))) for n in batch.seq_lens])


@pytest.mark.interpreted(6)
@settings(max_examples=60)
@given(batch=decodes("int4"))
def test_decodes_attend_over_what_is_stored(backend, batch):
    properties.attends_over_what_is_stored(backend, batch)


@pytest.mark.interpreted(4)
@settings(max_examples=20)
@given(batch=decodes("int4"))
def test_unowned_slots_do_not_matter_to_decodes(backend, batch):
    properties.unowned_slots_do_not_matter(backend, batch)


@pytest.mark.interpreted(4)
@settings(max_examples=20)
@given(batch=decodes("int4"))
def test_released_blocks_do_not_matter_to_decodes(backend, batch):
    properties.padding_of_the_table_does_not_matter(backend, batch)


@pytest.mark.parametrize("head_dim", [16, 64])  # the general kernel's, and the one for decodes
def test_heads_of_a_cut_sequence_are_merged(backend, head_dim):
    batch = decode_batch("int4", (230, 1, 40), num_kv_heads=4, group=3, head_dim=head_dim)
    properties.attends_over_what_is_stored(backend, batch)


# ---- the door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CALLS)
def test_the_door_names_what_is_wrong(backend, op):
    properties.refuses_wrong_arrays(backend, op, CALLS[op])


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        ("write_kv_int4", {"slot_mapping": np.array([4, 8, 0])}),
        ("write_kv_int4", {"slot_mapping": np.array([4, 4, 0])}),
        ("write_kv_int4", {"k": np.full_like(CALLS["write_kv_int4"]["k"], np.nan)}),
        ("write_kv_int4", {"v": np.full_like(CALLS["write_kv_int4"]["v"], np.inf)}),
        ("paged_attention_int4", {"block_table": np.array([[2], [0]], np.int32)}),
        ("paged_attention_int4", {"block_table": np.array([[-1], [0]], np.int32)}),
        ("paged_attention_int4", {"seq_lens": np.array([5, 2], np.int32)}),
        ("paged_attention_int4", {"cu_seqlens_q": np.array([0, 2, 4])}),
    ],
)
def test_the_reference_checks_values_too(op, changed):
    properties.refuses(reference, op, CALLS[op], **changed)
