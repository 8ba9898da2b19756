"""The memory side of scheduling, where it takes a rare coincidence to see that it is needed."""

import pytest

from reference.batching.cache_space import CacheSpace
from reference.batching.config import EngineConfig
from reference.batching.request import Request, SamplingParams, Sequence
from reference.batching.running_rows import RunningRows


def make_space(**settings) -> CacheSpace:
    config = EngineConfig(**({"num_blocks": 8, "max_model_len": 32, "block_size": 4} | settings))
    return CacheSpace(config, RunningRows(4, 32, 4, len(config.pool_sizes)))


def opened(space: CacheSpace, num_tokens: int) -> Sequence:
    """A running sequence with so many tokens in the cache."""
    request = Request("r", list(range(num_tokens + 1)), SamplingParams(n=2))
    seq = Sequence(0, request, 0, list(request.prompt_token_ids))
    request.live = [seq]
    space.open(seq, 1)
    space.take_row(seq)
    space.append(seq, num_tokens)
    return seq


def forked(space: CacheSpace, parent: Sequence) -> Sequence:
    child = Sequence(1, parent.request, 1, list(parent.token_ids))
    parent.request.live.append(child)
    space.fork(parent, child)
    return child


def test_a_block_that_is_being_copied_is_held():
    """One of two forks copies the block they share; the other ends before that step has resulted. The block is free
    only after it, though the one that ended was not in the step."""
    space = make_space()
    space.begin_step(0)
    parent = opened(space, 6)
    space.step_resulted(0)
    child = forked(space, parent)
    space.begin_step(1)
    space.append(parent, 1)
    [(source, target)] = space.copies[0]
    space.close(child)
    assert space.pools[0].ref_counts[source] == 1, "a block that step 1 copies is free before step 1 has resulted"
    space.step_resulted(1)
    assert space.pools[0].ref_counts[source] == 0
    assert parent.tables[0].block_ids[-1] == target


def test_a_token_has_room_in_both_pools_or_in_none():
    """Where only the second pool needs a block, the first one's table is as before; then both take the token."""
    space = make_space(kv_window=8, num_window_blocks=6)
    space.begin_step(0)
    seq = opened(space, 5)
    space.pools[1].share([seq.tables[1].block_ids[-1]])  # somebody shares the window's block only
    taken = space.pools[1].allocate(space.pools[1].num_free)
    assert not space.append_one(seq)
    assert [table.num_tokens for table in seq.tables] == [5, 5]
    assert seq.num_computed == 5
    space.pools[1].release(taken)
    assert space.append_one(seq)
    assert [table.num_tokens for table in seq.tables] == [6, 6]
    assert [len(copies) for copies in space.copies] == [0, 1]


def test_shared_blocks_travel_once():
    """A request's forks are swapped out as one: a block that both own goes to the host once, and comes back shared."""
    space = make_space()
    space.begin_step(0)
    parent = opened(space, 10)
    child = forked(space, parent)
    space.append(child, 1)
    space.step_resulted(0)
    space.begin_step(1)
    [out] = space.swap_out(parent.request)
    assert len(out.block_ids) == len(set(out.block_ids)) == 4, "2 shared blocks and a last one of each"
    assert space.pools[0].num_free == 4, "they are held until the step that reads them has resulted"
    space.step_resulted(1)
    assert space.pools[0].num_free == 8
    space.begin_step(2)
    _, [back] = space.swap_in(parent.request)
    assert (back.key, back.host_rows) == (out.key, [0, 1, 2, 3])
    assert parent.tables[0].block_ids[:2] == child.tables[0].block_ids[:2]
    assert [space.pools[0].ref_counts[block] for block in parent.tables[0].block_ids] == [2, 2, 1]
    assert [table.num_tokens for seq in (parent, child) for table in seq.tables] == [10, 11]


@pytest.mark.parametrize(("num_tokens", "wanted", "room"), [(0, 99, 32), (6, 99, 26), (8, 3, 3), (31, 99, 1)])
def test_room_is_what_the_free_blocks_hold(num_tokens, wanted, room):
    """Of a long chunk as much as the rest of the last block and the free blocks hold."""
    space = make_space()
    space.begin_step(0)
    seq = opened(space, num_tokens)
    assert space.room(seq, wanted) == room
    assert space.has_room([(seq, room)])
    assert room == wanted or not space.has_room([(seq, room + 1)])
    space.append(seq, room)
    assert space.pools[0].num_free >= 0


def test_room_beside_a_shared_block():
    """A shared last block is copied before it is written: the copy takes a block, and without one there is no room."""
    space = make_space(num_blocks=3)
    space.begin_step(0)
    parent = opened(space, 6)
    child = forked(space, parent)
    assert space.room(child, 99) == 2, "the copy takes the last free block, and has room for two"
    assert space.has_room([(parent, 1), (child, 1)]), "one of the two need not copy"
    assert not space.has_room([(parent, 1), (child, 3)])
    space.pools[0].allocate(1)
    assert space.room(child, 99) == 0
    assert not space.has_room([(child, 1)])
