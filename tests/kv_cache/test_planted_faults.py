"""The properties are tested: a cache with a known fault is caught by them, and without it is not."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import reference
from reference.numerics.arrays import dtype_named
from twofold.conformance.properties import kv_cache as properties
from twofold.conformance.strategies.kv_cache import batches, pools, tokens

# ---- faults: each takes the right op and its arguments --------------------------------------------------------------


def writes_one_slot_on(op, k, v, *arrays):
    slots = arrays[-1]
    num_slots = arrays[0].shape[0] * arrays[0].shape[1]
    op(k, v, *arrays[:-1], np.where(slots >= 0, (slots + 1) % num_slots, slots))


def skips_the_last_token(op, k, v, *arrays):
    op(k[:-1], v[:-1], *arrays[:-1], arrays[-1][:-1])


def writes_padding_to_the_last_slot(op, k, v, *arrays):
    slots, last = arrays[-1].copy(), arrays[0].shape[0] * arrays[0].shape[1] - 1
    if -1 in slots and last not in slots:
        slots[slots.argmin()] = last
    op(k, v, *arrays[:-1], slots)


def swaps_keys_and_values(op, k, v, *arrays):
    op(v, k, *arrays)


def rounds_the_keys_too_much(op, k, v, *arrays):
    op(k.astype(dtype_named("bfloat16")).astype(k.dtype) * k.dtype.type(1 + 2**-6), v, *arrays)


def scales_of_the_first_head(op, k, v, *arrays):
    """One scale for all heads of a token."""
    op(k, v, *arrays)
    for scale in arrays[2:4]:
        scale[...] = scale[:, :, :1]


def ignores_the_scales_of_values(op, q, k_cache, v_cache, k_scale, v_scale, *rest, **options):
    return op(q, k_cache, v_cache, k_scale, np.ones_like(v_scale), *rest, **options)


def takes_the_next_tokens_scale(op, q, k_cache, v_cache, k_scale, v_scale, *rest, **options):
    return op(q, k_cache, v_cache, np.roll(k_scale, 1, axis=1), v_scale, *rest, **options)


def forgets_the_zeros(op, q, k_cache, v_cache, k_scale, k_zero, *rest, **options):
    return op(q, k_cache, v_cache, k_scale, np.zeros_like(k_zero), *rest, **options)


def swaps_the_nibbles(op, q, k_cache, v_cache, *rest, **options):
    return op(q, k_cache >> 4 | k_cache << 4, v_cache, *rest, **options)


def sees_one_token_less(op, *arguments, **options):
    *arrays, seq_lens, cu_seqlens_q = arguments
    new = np.diff(cu_seqlens_q)
    return op(*arrays, np.where(seq_lens > new, seq_lens - 1, seq_lens), cu_seqlens_q, **options)


WRITES = [writes_one_slot_on, skips_the_last_token, swaps_keys_and_values]
FORMATS = {"plain": "", "int8": "_int8", "fp8": "_fp8", "int4": "_int4"}
WRITE_FAULTS = {f"write_kv{suffix}": (format, WRITES) for format, suffix in FORMATS.items()}
READ_FAULTS = {
    "int8": [ignores_the_scales_of_values, takes_the_next_tokens_scale, sees_one_token_less],
    "fp8": [ignores_the_scales_of_values, takes_the_next_tokens_scale, sees_one_token_less],
    "int4": [forgets_the_zeros, swaps_the_nibbles, sees_one_token_less],
}


def with_fault(op: str, fault) -> SimpleNamespace:
    """The reference, but for one op."""
    names = {name: getattr(reference, name) for name in reference.__all__}
    return SimpleNamespace(**names | {op: lambda *a, **options: fault(names[op], *a, **options)})


def is_caught(inputs: st.SearchStrategy, check) -> bool:
    """Whether some drawn input fails the property."""

    @settings(max_examples=200, phases=[Phase.generate], report_multiple_bugs=False, derandomize=True)
    @given(inputs)
    def judge(value):
        check(value)

    try:
        judge()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(("op", "fault"), [(op, fault) for op, (_, faults) in WRITE_FAULTS.items() for fault in faults])
def test_a_wrong_write_is_caught(op, fault):
    """By what is read back, or by the codes that are there."""
    format, backend = WRITE_FAULTS[op][0], with_fault(op, fault)
    check = properties.written_is_gathered if format == "plain" else properties.codes_are_nearest
    assert is_caught(tokens(format, dtypes=("float32",)), lambda drawn: check(backend, drawn))


@pytest.mark.parametrize("fault", [rounds_the_keys_too_much, scales_of_the_first_head])
def test_codes_that_are_not_the_nearest_are_caught(fault):
    """A code or a scale a little off is no code of this cache."""
    backend = with_fault("write_kv_int8", fault)
    drawn = tokens("int8", dtypes=("float32",))
    assert is_caught(drawn, lambda drawn: properties.codes_are_nearest(backend, drawn))


def test_padding_that_is_written_is_caught():
    """A slot of -1 is nobody's, and the last slot of the cache is somebody's."""
    backend = with_fault("write_kv", writes_padding_to_the_last_slot)
    assert is_caught(tokens("plain"), lambda drawn: properties.only_named_slots_change(backend, drawn))


@pytest.mark.parametrize(("format", "fault"), [(f, fault) for f, faults in READ_FAULTS.items() for fault in faults])
def test_a_wrong_attention_is_caught(format, fault):
    """Attention over what is stored, and over nothing else."""
    backend = with_fault(f"paged_attention_{format}", fault)
    assert is_caught(batches(format), lambda batch: properties.attends_over_what_is_stored(backend, batch))


def copies_backwards(op, pool, source_ids, target_ids):
    pool[source_ids] = pool[target_ids]


def copies_all_but_the_last(op, pool, source_ids, target_ids):
    op(pool, source_ids[:-1], target_ids[:-1])


def copies_half_of_a_block(op, pool, source_ids, target_ids):
    op(pool[:, : pool.shape[1] // 2], source_ids, target_ids)


@pytest.mark.parametrize("fault", [copies_backwards, copies_all_but_the_last, copies_half_of_a_block])
def test_a_wrong_copy_is_caught(fault):
    """Targets hold their sources, and nothing else moved."""
    backend = with_fault("copy_blocks", fault)
    assert is_caught(pools(), lambda copy: properties.copies_move_only_their_targets(backend, *copy))


def test_without_a_fault_nothing_is_caught():
    """What the faults are planted in is right."""
    for op, (format, _) in WRITE_FAULTS.items():
        same = with_fault(op, lambda op, *a: op(*a))
        check = properties.written_is_gathered if format == "plain" else properties.codes_are_nearest
        assert not is_caught(tokens(format, dtypes=("float32",)), lambda drawn, check=check, b=same: check(b, drawn)), (
            op
        )
