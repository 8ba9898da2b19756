"""A state machine for the block structures: an engine without a model, whose every read is checked.

`BlocksMachine` does to `BlockPool`, `BlockTable` and `PrefixCache` all that an engine does, in an order that Hypothesis
draws: admit, append, fork, truncate, slide past a window, publish, preempt, swap, finish, finish a step late. Beside it
runs a model that cannot be wrong, because it shares nothing: for each stream the list of its tokens; and a *memory*
with a cell for every slot, in which copies and writes are really performed. What is written for a token is a chained
hash of all tokens up to it, as keys and values depend on all tokens up to theirs: so a block in the wrong place, of
another stream, stale or never written cannot read back right.

Scheduling and launching are two things, as in the engine: appends only note their copies and writes, and ``launch``
performs those of a step, copies first. What is nobody's after a launch is overwritten with garbage.

The types under test are attributes of the class, so that a planted fault is a subclass.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reference.kv_cache.block_pool import RELEASED, BlockPool, OutOfBlocks
from reference.kv_cache.block_table import BlockTable
from reference.kv_cache.formats import KV_FORMATS
from reference.kv_cache.prefix_cache import PrefixCache, block_keys, match_pools

INDEX = st.integers(0, 11)  # of a stream: taken modulo how many there are
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=7)  # few tokens, so that prefixes coincide
LATE = st.booleans()
GARBAGE = "garbage"


@dataclass(eq=False)
class Stream:
    """A sequence: its tokens, and a table in each pool."""

    tokens: list[int]
    tables: list[BlockTable]
    settled: int = 0  # no truncation goes below it: the window was released up to here
    scheduled: bool = False  # in the step that is being put together


@dataclass
class Swapped:
    """A stream on the host: its tokens, and for each pool its rows, None where the block was released."""

    tokens: list[int]
    rows: list[list[list[Any] | None]]
    settled: int


def chain(tokens: Iterable[int]) -> list[int]:
    """What the cache holds for each token: it depends on all tokens up to it."""
    values, value = [], 0
    for token in tokens:
        value = hash((value, token))
        values.append(value)
    return values


class BlocksMachine(RuleBasedStateMachine):
    """One pool, or two, or one with a window; see the module."""

    windows: tuple[int | None, ...] | None = None  # for each pool: None keeps every block. None: draw them
    pool_type: type[BlockPool] = BlockPool
    table_type: type[BlockTable] = BlockTable
    cache_type: type[PrefixCache] = PrefixCache
    block_keys = staticmethod(block_keys)

    @initialize(
        block_size=st.sampled_from([3, 4, 2, 1]),
        num_blocks=st.sampled_from([32, 16, 64, 8]),
        windows=st.sampled_from([(None,), (None, 3), (5,)]),
        publish_always=st.booleans(),
    )
    def start(self, block_size, num_blocks, windows, publish_always):
        self.block_size, self.num_blocks, self.publish_always = block_size, num_blocks, publish_always
        kinds = self.windows or windows
        self.formats = [None if w is None else replace(KV_FORMATS["kivi4"], window=w) for w in kinds]
        self.pools = [self.pool_type(num_blocks) for _ in kinds]
        self.caches = [self.cache_type(pool) for pool in self.pools]
        self.memory = [[[GARBAGE] * block_size for _ in range(num_blocks)] for _ in kinds]
        self.streams: list[Stream] = []
        self.waiting: list[list[int]] = []  # preempted, to be recomputed
        self.swapped: list[Swapped] = []
        self.late: list[list[list[int]]] = []  # per late release, per pool: block ids that a launched step still names
        self.history: list[list[int]] = [[]]
        self.copies: list[tuple[int, int, int]] = []  # (pool, source, target) of the open step
        self.swaps_in: list[tuple[int, int, list[Any]]] = []
        self.writes: list[tuple[int, int, int]] = []  # (pool, slot, value)
        self.key_of: list[dict[int, bytes]] = [{} for _ in kinds]  # last key under which a block was published

    # What an engine does.

    @rule(base=INDEX, keep=st.integers(0, 12), more=TOKENS)
    def admit(self, base, keep, more):
        """A new prompt, which often begins like an earlier one."""
        self._admit(self.history[base % len(self.history)][:keep] + more)

    @precondition(lambda self: self.streams)
    @rule(index=INDEX, tokens=TOKENS)
    def append(self, index, tokens):
        """A chunk; if there is no room, the newest stream makes some."""
        if not self._append(self._pick(index), tokens):
            self.leave(len(self.streams) - 1, how="preempt")

    @precondition(lambda self: self.streams)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def decode(self, tokens):
        """A token for every stream, a few steps long: the usual thing."""
        for token, index in product(tokens, range(len(self.streams))):
            if not self.streams:
                return
            self.append(index, [token])

    @precondition(lambda self: self.writes or self.swaps_in)
    @rule()
    def launch(self):
        """Perform the step: copies, swaps in, writes. Then what is nobody's is overwritten."""
        for pool, source, target in self.copies:
            self.memory[pool][target] = list(self.memory[pool][source])
        for pool, block_id, row in self.swaps_in:
            self.memory[pool][block_id] = list(row)
        for pool, slot, value in self.writes:
            block_id, offset = divmod(slot, self.block_size)
            self._check_writable(pool, block_id)
            self.memory[pool][block_id][offset] = value
        self.copies, self.swaps_in, self.writes = [], [], []
        for stream in self.streams:
            stream.scheduled = False
        for pool, memory in zip(self.pools, self.memory):
            for block_id in range(self.num_blocks):
                if pool.ref_counts[block_id] == 0 and not pool.published[block_id]:
                    memory[block_id] = [GARBAGE] * self.block_size
        if self.publish_always:
            self.publish()

    @precondition(lambda self: self.streams)
    @rule(index=INDEX, tokens=st.lists(st.integers(0, 1), max_size=2), more=TOKENS)
    def fork(self, index, tokens, more):
        """Part ways: the fork goes on with some tokens, its parent perhaps with others."""
        stream = self._pick(index)
        forked = Stream(list(stream.tokens), [table.fork() for table in stream.tables], stream.settled)
        self.streams.append(forked)
        self._append(forked, more)
        self._append(stream, tokens)

    @precondition(lambda self: self.streams)
    @rule(index=INDEX, dropped=st.integers(1, 5), tokens=st.lists(st.integers(0, 1), max_size=2), late=LATE)
    def truncate(self, index, dropped, tokens, late):
        """Tokens are rejected, and others come in their place."""
        stream = self._pick(index)
        length = max(stream.settled, len(stream.tokens) - dropped)
        self._release([table.truncate(length) for table in stream.tables], late)
        stream.tokens = stream.tokens[:length]
        self._append(stream, tokens)

    @precondition(lambda self: self.streams)
    @rule(index=INDEX, late=LATE)
    def slide(self, index, late):
        """Give back what no later query sees."""
        stream = self._pick(index)
        stream.settled = len(stream.tokens)
        starts = [0 if f is None else f.window_start(stream.settled) for f in self.formats]
        self._release([table.release_before(start) for table, start in zip(stream.tables, starts)], late)

    @precondition(lambda self: self.streams)
    @rule(index=INDEX, how=st.sampled_from(["finish", "finish late", "preempt", "swap out"]))
    def leave(self, index, how):
        """A stream finishes, or is preempted: to be recomputed, or with its blocks on the host."""
        stream = self._pick(index)
        self.streams.remove(stream)
        if how == "preempt":
            self.waiting.append(stream.tokens)
        if how == "swap out":
            self.swapped.append(self._swap_out(stream))
        self._release([table.free() for table in stream.tables], late=how == "finish late")
        assert all(table.block_ids == [] and table.num_tokens == 0 for table in stream.tables), (
            "free: something is left"
        )

    @precondition(lambda self: self.waiting or self.swapped)
    @rule()
    def come_back(self):
        """The stream that was preempted first."""
        if self.swapped:
            self._swap_in(self.swapped.pop(0))
        else:
            self._admit(self.waiting.pop(0))

    @precondition(lambda self: any(self._to_publish(stream) for stream in self.streams))
    @rule()
    def publish(self):
        """Every full block of every stream: a step has resulted, and all tokens are known."""
        for index in range(len(self.streams)):
            for pool_index, block_id, key in self._to_publish(self._pick(index)):
                known = self._is_known(key, pool_index)
                self.caches[pool_index].publish(block_id, key)
                if not known:
                    self.key_of[pool_index][block_id] = key
                is_published = self.pools[pool_index].published[block_id]
                assert is_published != known, "publish: a key goes to its first block, and only to it"

    @precondition(lambda self: any(len(cache) for cache in self.caches))
    @rule(count=st.integers(0, 64))
    def press(self, count):
        """Somebody else needs blocks for a moment, and what they held is gone. 0: the cache is cleared."""
        if count == 0:
            for cache in self.caches:
                cache.clear()
        self.launch()
        taken = [pool.allocate(min(count, pool.num_free)) for pool in self.pools]
        for memory, block_ids in zip(self.memory, taken):
            for block_id in block_ids:
                memory[block_id] = [GARBAGE] * self.block_size
        self._release(taken, late=False)

    @precondition(lambda self: self.late)
    @rule()
    def result(self):
        """The oldest launched step has resulted: what it named is free to go."""
        self._release(self.late.pop(0), late=False)

    # What must hold, always.

    @invariant()
    def a_count_is_its_owners(self):
        for index, pool in enumerate(self.pools):
            owners = [0] * self.num_blocks
            held = [stream.tables[index].block_ids for stream in self.streams] + [late[index] for late in self.late]
            for block_ids in held:
                for block_id in block_ids:
                    if block_id != RELEASED:
                        owners[block_id] += 1
            assert pool.ref_counts == owners, f"pool {index}: counts {pool.ref_counts}, owners {owners}"
            live = sum(count > 0 for count in owners)
            assert pool.num_free + live == self.num_blocks, f"pool {index}: {pool.num_free} free and {live} live"
            assert pool.num_used == live <= pool.peak_used, "num_used is not the live blocks, or above the peak"
            assert pool.num_shared == sum(count > 1 for count in owners), "num_shared"

    @invariant()
    def every_table_reads_its_own_tokens(self):
        for stream in self.streams:
            if stream.scheduled:
                continue
            values = chain(stream.tokens)
            for table, memory, format in zip(stream.tables, self.memory, self.formats):
                assert table.num_tokens == len(values), (
                    f"{table.num_tokens} tokens in the table, {len(values)} appended"
                )
                needed_from = 0 if format is None else format.window_start(len(values))
                for position, value in enumerate(values):
                    block_id = table.block_ids[position // self.block_size]
                    if block_id == RELEASED:
                        assert position < needed_from, f"position {position} was released, and may still be read"
                    else:
                        read = memory[block_id][position % self.block_size]
                        assert read == value, f"position {position}, block {block_id}: read {read}, wrote {value}"

    @invariant()
    def the_cache_knows_the_published_blocks(self):
        for pool, cache in zip(self.pools, self.caches):
            assert len(cache) == sum(pool.published), f"{len(cache)} keys for {sum(pool.published)} published blocks"

    def teardown(self):
        if not hasattr(self, "pools"):
            return
        self.launch()
        while self.streams:
            self.leave(0, how="finish")
        while self.late:
            self.result()
        for pool, cache in zip(self.pools, self.caches):
            everything = pool.allocate(self.num_blocks)
            assert sorted(everything) == list(range(self.num_blocks)), f"handed out {everything} of {self.num_blocks}"
            assert len(cache) == 0, "a key survived the eviction of its block"

    # How it is done.

    def _pick(self, index: int) -> Stream:
        """A stream in no open step: one that is in it waits until it was launched."""
        stream = self.streams[index % len(self.streams)]
        if stream.scheduled:
            self.launch()
        return stream

    def _admit(self, prompt: list[int]) -> None:
        """Match all but the last token at most; compute the rest, or give the hit back if there is no room."""
        self.history = [[], *self.history[-6:], prompt]
        keys = self.block_keys(prompt[: len(prompt) - 1], self.block_size, root=b"root")
        tails = [None if f is None else f.tail_blocks(self.block_size) for f in self.formats]
        expected = self._longest_hit(keys, tails)
        hits = match_pools(self.caches, keys, tails)
        assert {len(hit) for hit in hits} == {expected}, f"expected a hit of {expected} blocks, got {hits}"
        cached = expected * self.block_size
        tables = [
            self.table_type(pool, self.block_size, block_ids=hit, num_tokens=cached)
            for pool, hit in zip(self.pools, hits)
        ]
        stream = Stream(prompt[:cached], tables, settled=cached)
        self.streams.append(stream)
        self.every_table_reads_its_own_tokens()  # a hit holds what was asked for
        if not self._append(stream, prompt[cached:]):
            self.streams.remove(stream)
            self._release([table.free() for table in tables], late=False)

    def _longest_hit(self, keys: list[bytes], tails: list[int | None]) -> int:
        def served(length: int) -> bool:
            return all(
                self._is_known(key, pool_index)
                for pool_index, tail in enumerate(tails)
                for key in keys[0 if tail is None else max(0, length - tail) : length]
            )

        return max(length for length in range(len(keys) + 1) if served(length))

    def _is_known(self, key: bytes, pool_index: int) -> bool:
        published = self.pools[pool_index].published
        return any(known == key and published[block_id] for block_id, known in self.key_of[pool_index].items())

    def _to_publish(self, stream: Stream) -> list[tuple[int, int, bytes]]:
        """(pool, block, key) of the full blocks that cannot be found yet, or lost to an equal one."""
        keys = self.block_keys(stream.tokens, self.block_size, root=b"root")
        return [
            (pool_index, block_id, key)
            for pool_index, (pool, table) in enumerate(zip(self.pools, stream.tables))
            for block_id, key in zip(table.block_ids, keys)
            if block_id != RELEASED and not pool.published[block_id]
        ]

    def _swap_out(self, stream: Stream) -> Swapped:
        rows = [
            [None if block_id == RELEASED else list(memory[block_id]) for block_id in table.block_ids]
            for memory, table in zip(self.memory, stream.tables)
        ]
        return Swapped(stream.tokens, rows, stream.settled)

    def _swap_in(self, swapped: Swapped) -> None:
        """Into other blocks than it left, if there is room."""
        needed = [sum(row is not None for row in rows) for rows in swapped.rows]
        if any(count > pool.num_free for count, pool in zip(needed, self.pools)):
            self.swapped.append(swapped)
            return
        tables = []
        for pool_index, (pool, rows, count) in enumerate(zip(self.pools, swapped.rows, needed)):
            fresh = pool.allocate(count)
            block_ids = [RELEASED if row is None else fresh.pop(0) for row in rows]
            self.swaps_in += [(pool_index, block_id, row) for block_id, row in zip(block_ids, rows) if row is not None]
            table = self.table_type(pool, self.block_size, block_ids=block_ids, num_tokens=len(swapped.tokens))
            tables.append(table)
        self.streams.append(Stream(swapped.tokens, tables, swapped.settled, scheduled=True))

    def _append(self, stream: Stream, tokens: list[int]) -> bool:
        """Append to every table, or, if one of the pools has too few blocks, to none."""
        if any(t.blocks_needed(len(tokens)) > pool.num_free for t, pool in zip(stream.tables, self.pools)):
            self._expect_out_of_blocks(stream, len(tokens))
            return False
        slots, copies = [], []
        for table, pool in zip(stream.tables, self.pools):
            free, needed = pool.num_free, table.blocks_needed(len(tokens))
            found, pairs = self._append_to(table, len(tokens))
            assert free - pool.num_free == needed, f"append took {free - pool.num_free} blocks, blocks_needed: {needed}"
            slots.append(found)
            copies.append(pairs)
        self._note(stream, tokens, slots, copies)
        return True

    def _append_to(self, table: BlockTable, num_tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
        """One token by the short way, where there is room in a last block that is nobody else's."""
        if num_tokens == 1:
            partial = table.num_tokens % self.block_size != 0
            last = table.block_ids[-1] if partial else RELEASED
            in_place = partial and table.pool.ref_counts[last] == 1 and not table.pool.published[last]
            slot = table.append_one()
            assert (slot is not None) == in_place, (
                f"append_one gave {slot}; the last block was ours to write: {in_place}"
            )
            if slot is not None:
                return [slot], []
        slots, copies = table.append(num_tokens)
        return slots.tolist(), copies

    def _note(self, stream: Stream, tokens: list[int], slots: list[list[Any]], copies: list[list]) -> None:
        """What the open step will copy and write."""
        start = len(stream.tokens)
        stream.tokens = stream.tokens + tokens
        stream.scheduled = True
        values = chain(stream.tokens)[start:]
        for pool_index, (table, found, pairs) in enumerate(zip(stream.tables, slots, copies)):
            positions = range(start, len(stream.tokens))
            at = [table.block_ids[p // self.block_size] * self.block_size + p % self.block_size for p in positions]
            assert found == at, f"slots {found} for positions {positions} of {table.block_ids}"
            for slot in found:
                self._check_writable(pool_index, slot // self.block_size)
            self.copies += [(pool_index, source, target) for source, target in pairs]
            self.writes += [(pool_index, slot, value) for slot, value in zip(found, values)]

    def _check_writable(self, pool_index: int, block_id: int) -> None:
        pool = self.pools[pool_index]
        assert pool.ref_counts[block_id] == 1, f"block {block_id}, written, has {pool.ref_counts[block_id]} owners"
        assert not pool.published[block_id], f"block {block_id} is written while it can be found by a key"

    def _expect_out_of_blocks(self, stream: Stream, num_tokens: int) -> None:
        for table, pool in zip(stream.tables, self.pools):
            if table.blocks_needed(num_tokens) <= pool.num_free:
                continue
            before = (list(table.block_ids), table.num_tokens, list(pool.ref_counts), pool.num_free, pool.published[:])
            try:
                table.append(num_tokens)
            except OutOfBlocks:
                after = (table.block_ids, table.num_tokens, pool.ref_counts, pool.num_free, pool.published)
                assert after == before, "append raised OutOfBlocks and changed something"
            else:
                raise AssertionError("append found blocks where blocks_needed saw none")

    def _release(self, block_ids: list[list[int]], late: bool) -> None:
        if late:
            self.late.append(block_ids)
        else:
            for pool, ids in zip(self.pools, block_ids):
                findable = list(pool.published)
                pool.release(ids)
                assert pool.published == findable, "release: a published block can be found until it is handed out"
