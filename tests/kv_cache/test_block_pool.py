"""The block pool does what a list of owners, a stack and a queue do; and it refuses what no owner may ask for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.kv_cache.block_pool import RELEASED, BlockPool, OutOfBlocks


class Specification:
    """Every method's effect in its slowest form, order included, on three lists; beside it the pool, asked the same."""

    def __init__(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.owners = [0] * num_blocks
        self.blank = list(range(num_blocks))[::-1]  # the last one is handed out first
        self.kept = []  # free and published, the first one is handed out first
        self.published = set()
        self.evicted, self.expected_evicted = [], []
        self.pool.on_evict = self.evicted.append
        self.peak = 0

    def allocate(self, picks):
        count = len(picks)
        if count > len(self.blank) + len(self.kept):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            return
        expected = [self.blank.pop() for _ in range(min(count, len(self.blank)))]
        evicted, self.kept = self.kept[: count - len(expected)], self.kept[count - len(expected) :]
        self.published -= set(evicted)
        self.expected_evicted += evicted
        for block_id in expected + evicted:
            self.owners[block_id] = 1
        assert self.pool.allocate(count) == expected + evicted, "blank blocks first, then the least recently freed"

    def share(self, picks):
        can_be = [b for b, count in enumerate(self.owners) if count or b in self.published]
        block_ids = [can_be[pick % len(can_be)] for pick in picks if can_be]
        self.pool.share([RELEASED, *block_ids])
        for block_id in block_ids:
            self.owners[block_id] += 1
        self.kept = [b for b in self.kept if b not in block_ids]

    def release(self, picks):
        block_ids = []
        for pick in picks:
            live = [b for b, count in enumerate(self.owners) if count > block_ids.count(b)]
            block_ids += [live[pick % len(live)]] if live else []
        self.pool.release([*block_ids, RELEASED])
        for block_id in block_ids[::-1]:
            self.owners[block_id] -= 1
            if self.owners[block_id] == 0:
                (self.kept if block_id in self.published else self.blank).append(block_id)

    def publish(self, picks):
        live = [b for b, count in enumerate(self.owners) if count]
        for block_id in [live[pick % len(live)] for pick in picks if live]:
            self.pool.publish(block_id)
            self.published.add(block_id)

    def forget(self, picks):
        block_ids = [pick % len(self.owners) for pick in picks[:2] if self.owners]
        self.pool.forget([*block_ids, RELEASED])
        for block_id in block_ids:
            if block_id in self.published:
                self.published.remove(block_id)
                self.expected_evicted.append(block_id)
            if block_id in self.kept:
                self.kept.remove(block_id)
                self.blank.append(block_id)

    def check(self):
        live = sum(count > 0 for count in self.owners)
        self.peak = max(self.peak, live)
        assert self.pool.ref_counts == self.owners
        assert self.pool.published == [b in self.published for b in range(len(self.owners))]
        assert self.evicted == self.expected_evicted, "on_evict hears of every block that stops being published, once"
        assert (self.pool.num_used, self.pool.num_free) == (live, len(self.owners) - live)
        assert self.pool.num_shared == sum(count > 1 for count in self.owners)
        assert self.pool.peak_used == self.peak


OFTEN, SELDOM = ["allocate", "publish", "release"], ["share", "forget"]
CALLS = st.tuples(
    st.sampled_from(4 * OFTEN + SELDOM),
    st.lists(st.integers(0, 30), min_size=2, max_size=6),  # how many, and which: places, modulo how many there are
)


@given(st.sampled_from([8, 12, 5, 1, 0]), st.lists(CALLS, min_size=15, max_size=60))
@settings(max_examples=400)
def test_the_pool_is_its_specification(num_blocks, calls):
    """In whatever order it is asked: the same blocks, the same counts, the same evictions."""
    specification = Specification(num_blocks)
    for name, picks in calls:
        getattr(specification, name)(picks)
        specification.check()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_prefix_loses_its_tail_before_its_head(lengths, data):
    """Of every sequence, in whatever order sequences finish, the blocks still kept are its first ones."""
    pool = BlockPool(sum(lengths))
    sequences = [pool.allocate(length) for length in lengths]
    for block_ids in data.draw(st.permutations(sequences), label="freed in this order"):
        for block_id in block_ids:
            pool.publish(block_id)
        pool.release(block_ids)
    while pool.num_free:
        pool.allocate(1)
        for block_ids in sequences:
            kept = [pool.published[block_id] for block_id in block_ids]
            assert kept == sorted(kept, reverse=True), f"blocks {block_ids} kept: {kept}"


def test_a_failed_allocation_takes_nothing():
    pool = BlockPool(3)
    held = pool.allocate(2)
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 of 3 free"):
        pool.allocate(2)
    assert (pool.num_free, pool.ref_counts) == (1, [1, 1, 0])
    pool.release(held)
    assert sorted(pool.allocate(3)) == [0, 1, 2]


def test_what_no_owner_may_ask_for_is_refused():
    """Giving back what is not held, sharing or publishing what is free, and ids from elsewhere."""
    pool = BlockPool(3)
    (block_id,) = pool.allocate(1)
    pool.release([block_id])
    for call, message in (
        (lambda: pool.release([block_id]), "free already"),
        (lambda: pool.share([block_id]), "nothing to share"),
        (lambda: pool.publish(block_id), "is free"),
        (lambda: pool.release([3]), "not in a pool of 3"),
        (lambda: pool.share([-2]), "not in a pool of 3"),
        (lambda: pool.allocate(-1), "count"),
        (lambda: BlockPool(-1), "num_blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert pool.num_free == 3, "a refusal changed something"
