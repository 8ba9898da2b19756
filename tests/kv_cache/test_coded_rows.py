"""Blocks outside the pool, coded."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference.kv_cache.cache import KV_FORMATS, KVCache
from reference.kv_cache.coded_rows import WORD_LAYOUTS, CodedRows
from reference.numerics.arrays import dtype_named
from twofold.conformance.properties import kv_cache as properties
from twofold.conformance.strategies.kv_cache import every_word, words

over_layouts = pytest.mark.parametrize("dtype", WORD_LAYOUTS)


@settings(max_examples=100)
@given(case=words(), dtype=st.sampled_from([*WORD_LAYOUTS]))
def test_rows_come_back(backend, case, dtype):
    blocks, layout = case[0], WORD_LAYOUTS[dtype]
    whole = blocks.shape[1] - blocks.shape[1] % layout.words_per_number
    properties.coded_rows_come_back(backend, blocks[:, :whole], layout)


@over_layouts
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_every_pattern_comes_back(backend, dtype, order):
    """All 65536 words, in rows that share an exponent and in rows where nothing helps."""
    properties.coded_rows_come_back(backend, every_word(order), WORD_LAYOUTS[dtype])


@over_layouts
def test_what_is_as_bad_as_can_be_comes_back(backend, dtype):
    """Every exponent in turn, NaN, infinities, subnormals, zeros: each a row of its own, and mixed in one."""
    kind = dtype_named(dtype)
    limits = ml_dtypes.finfo(kind)
    smallest, largest = np.log2(float(limits.smallest_subnormal)), np.log2(float(limits.max))
    powers = np.ldexp(1.0, np.linspace(smallest, largest - 1, 64).astype(int)).astype(kind)
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, limits.smallest_subnormal, -limits.max], kind)
    rows = [powers, *(np.full(64, value, kind) for value in special)]
    rows.append(np.resize(np.concatenate([special, powers[::5]]), 64))
    properties.coded_rows_come_back(backend, np.stack(rows).view(np.uint16), WORD_LAYOUTS[dtype])


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("bfloat16", 0.69, 0.72), ("float16", 0.88, 0.91), ("float32", 0.84, 0.87)]
)
def test_what_is_coded_is_smaller(dtype, low, high):
    """The figure that the documentation may quote, for normally distributed numbers."""
    numbers = np.random.default_rng(0).normal(size=(8, 6144)).astype(dtype_named(dtype))
    rows = CodedRows.encode(numbers.view(np.uint8), WORD_LAYOUTS[dtype], reference)
    assert low < rows.nbytes / numbers.nbytes < high
    assert rows[[0, 3]].nbytes < rows.nbytes / 3, "rows that are not asked for are kept"


@pytest.mark.parametrize("name", KV_FORMATS)
def test_a_cache_codes_the_pools_that_hold_floats(name):
    """Those of codes go to the host and come back as they are: they neither shrink nor grow."""
    cache = KVCache(name, num_layers=2, num_kv_heads=2, head_dim=16, block_size=4, num_blocks=3, num_window_blocks=3,
                    dtype="bfloat16", backend=reference)  # fmt: skip
    for pool, memory in enumerate(cache.pools):
        floats = name in ("auto", "float32", "float16", "bfloat16") or pool == 1
        filled = np.random.default_rng(1).normal(size=memory.nbytes).astype(ml_dtypes.bfloat16).view(np.uint8)
        memory[:] = filled[: memory.nbytes].reshape(memory.shape)
        expected = memory.copy()
        rows = cache.swap_out([2, 0], pool=pool, coded=True)
        assert isinstance(rows, CodedRows) == floats
        assert rows.nbytes < 2 * cache.block_bytes[pool] if floats else rows.nbytes == 2 * cache.block_bytes[pool]
        cache.swap_in(rows[[1, 0]], [1, 2], pool=pool)
        assert np.array_equal(memory, expected[[0, 0, 2]])
