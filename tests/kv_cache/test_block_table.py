"""Block tables: what an engine does with them, drawn at random, reads back right; and their edges one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.kv_cache.block_pool import RELEASED, BlockPool, OutOfBlocks
from reference.kv_cache.block_table import BlockTable
from reference.kv_cache.prefix_cache import PrefixCache
from twofold.conformance.strategies.blocks import BlocksMachine


class OnePool(BlocksMachine):
    """Every block of a sequence stays."""

    windows = (None,)


class TwoPools(BlocksMachine):
    """As with KIVI: one pool keeps every block, the other those of a window."""

    windows = (None, 3)


class Window(BlocksMachine):
    """As with a model of sliding layers: only the blocks of a window are kept."""

    windows = (5,)


TestOnePool, TestTwoPools, TestWindow = OnePool.TestCase, TwoPools.TestCase, Window.TestCase
TestOnePool.settings = TestTwoPools.settings = TestWindow.settings = settings(max_examples=300, stateful_step_count=50)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True), st.sampled_from([1, 2, 3, 16]), st.data())
def test_a_slot_is_its_block_times_the_block_size_plus_the_offset(block_ids, block_size, data):
    num_tokens = len(block_ids) * block_size - data.draw(st.integers(0, block_size - 1), label="free slots")
    start = data.draw(st.integers(0, num_tokens), label="start")
    stop = data.draw(st.integers(start, num_tokens), label="stop")
    table = BlockTable(BlockPool(100), block_size, block_ids=block_ids, num_tokens=num_tokens)
    slots = table.slots(start, stop)
    assert slots.dtype == np.int64
    assert slots.tolist() == [block_ids[p // block_size] * block_size + p % block_size for p in range(start, stop)]


def test_a_published_block_is_not_written_even_by_its_only_owner():
    """Truncated into a block that others can find: writing there again takes its key away first."""
    pool = BlockPool(4)
    cache = PrefixCache(pool)
    table = BlockTable(pool, 2)
    table.append(4)
    cache.publish(table.block_ids[1], b"key")
    table.truncate(3)
    assert cache.match([b"key"]) == [1], "truncated, and still whole: it can be found"
    pool.release([1])
    assert table.append_one() is None, "the short way must not write it"
    slots, copies = table.append(1)
    assert (slots.tolist(), copies, cache.match([b"key"])) == ([3], [], [])


def test_a_published_block_that_is_shared_is_copied_and_stays_published():
    pool = BlockPool(4)
    cache = PrefixCache(pool)
    table = BlockTable(pool, 2)
    table.append(4)
    cache.publish(table.block_ids[1], b"key")
    other = BlockTable(pool, 2, block_ids=[*pool.allocate(1), *cache.match([b"key"])], num_tokens=4)
    other.truncate(3)
    assert other.append(1)[1] == [(1, 3)]
    assert cache.match([b"key"]) == [1]


def test_the_last_of_two_that_share_a_block_keeps_it():
    """Copy-on-write copies for all owners but one: the last writes in place."""
    pool = BlockPool(3)
    a = BlockTable(pool, 4)
    a.append(2)
    b, c = a.fork(), a.fork()
    copied = [table.append(1)[1] for table in (b, a, c)]
    assert copied == [[(0, 1)], [(0, 2)], []]
    assert pool.num_free == 0


def test_an_append_that_finds_no_blocks_changes_nothing():
    """Neither the table nor the pool; a fork that only needs its copy is refused as well."""
    pool = BlockPool(2)
    table = BlockTable(pool, 2)
    table.append(3)
    fork = table.fork()
    for refused, num_new in ((fork, 1), (table, 2)):
        with pytest.raises(OutOfBlocks):
            refused.append(num_new)
        assert (refused.block_ids, refused.num_tokens, pool.ref_counts) == ([0, 1], 3, [2, 2])
    assert fork.append_one() is None


def test_released_blocks_keep_their_places():
    """Past a window: -1 stays in a block's place, in a fork too, and nothing is released twice."""
    pool = BlockPool(8)
    table = BlockTable(pool, 2)
    table.append(7)
    dropped = table.release_before(4)
    assert (dropped, table.block_ids) == ([0, 1], [RELEASED, RELEASED, 2, 3])
    fork = table.fork()
    assert fork.block_ids == table.block_ids
    assert (table.release_before(5), fork.release_before(7)) == ([], [2])
    assert (table.free(), fork.free(), table.num_tokens, table.block_ids) == ([2, 3], [3], 0, [])


def test_nothing_is_appended_where_nothing_is_asked():
    pool = BlockPool(0)
    slots, copies = BlockTable(pool, 16).append(0)
    assert (slots.tolist(), slots.dtype, copies) == ([], np.int64, [])


def test_what_cannot_be_is_refused():
    """Lengths that do not match blocks, negative counts, and tokens that would go into a released block."""
    pool = BlockPool(8)
    table = BlockTable(pool, 4)
    table.append(10)
    table.release_before(8)
    for call, message in (
        (lambda: BlockTable(pool, 0), "BlockTable"),
        (lambda: BlockTable(pool, 4, block_ids=[1, 2], num_tokens=4), "block_ids"),
        (lambda: table.append(-1), "num_new_tokens"),
        (lambda: table.truncate(11), "expected 0 to 10"),
        (lambda: table.truncate(-1), "expected 0 to 10"),
        (lambda: table.truncate(7), "block of position 7 was released"),
        (lambda: table.release_before(11), "expected <= 10"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert (table.block_ids, table.num_tokens) == ([RELEASED, RELEASED, 2], 10), "a refusal changed something"
    assert table.truncate(8) == [2], "up to the end of a released block is possible: the next token opens a new one"
