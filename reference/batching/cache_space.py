"""The memory side of scheduling: which blocks the running sequences hold, and when blocks come and go.

The scheduler asks whether there is room, takes it, and gives it back; everything it need not know happens here:

- a sequence lies in one pool, or in two when the KV format keeps a window in full precision: all tables move together;
- forks share blocks, and the copies that copy-on-write asks for are gathered for the head of the step;
- blocks past a window are given back, full blocks whose tokens are known are published for other requests to find;
- *nothing returns to a pool while a launched step that names it has not resulted*. With a step in flight while the
  next one is scheduled, a block given back is *held* until then.
"""

import math
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from reference.batching.config import EngineConfig
from reference.batching.plan import Swap
from reference.batching.request import Request, Sequence, Status
from reference.batching.running_rows import RunningRows
from reference.kv_cache.block_pool import RELEASED, BlockPool
from reference.kv_cache.block_table import BlockTable
from reference.kv_cache.prefix_cache import PrefixCache, block_keys, match_pools

Work = list[tuple[Sequence, int]]
"""Sequences, and how many tokens of each are to be computed."""


class CacheSpace:
    """Block tables over the pools of a KV cache.

    Attributes:
        pools: One, or two: the window's comes second.
        copies: (source, target) blocks of the step being scheduled, a list a pool.
        swapped: Of requests on the host: the key under which their blocks are kept, and how many there are.
    """

    def __init__(self, config: EngineConfig, rows: RunningRows):
        self.block_size = config.block_size
        self.max_chunk = config.max_num_batched_tokens
        self.pools = [BlockPool(num_blocks) for num_blocks in config.pool_sizes]
        self.windows = config.windows
        self.codes_swaps = config.swap_coding == "lossless"
        self.reserve = [int(config.watermark * num_blocks) for num_blocks in config.pool_sizes]
        self.caches = [PrefixCache(pool) for pool in self.pools] if config.enable_prefix_caching else []
        self.rows = rows
        self.copies: tuple[list[tuple[int, int]], ...] = tuple([] for _ in self.pools)
        self.swapped: dict[Request, tuple[int, int]] = {}
        self.has_windows = any(window is not None for window in self.windows)
        self._num_swaps = 0
        self._step = self._resulted = -1
        self._held: list[tuple[int, int, list[int]]] = []  # (until which step, pool, blocks)
        self._copied_by: list[dict[int, int]] = [{} for _ in self.pools]  # source block: the step that copies it

    # Steps begin and result.

    def begin_step(self, step: int) -> None:
        """What happens from here on belongs to this step."""
        self._step = step
        self.copies = tuple([] for _ in self.pools)

    def step_resulted(self, step: int) -> None:
        """The step, and all before it, are over: blocks that were held for them return to their pools."""
        self._resulted = step
        still_held = []
        for until, pool, block_ids in self._held:
            if until <= step:
                self.pools[pool].release(block_ids)
            else:
                still_held.append((until, pool, block_ids))
        self._held = still_held
        for copied_by in self._copied_by:
            for block_id in [block_id for block_id, by in copied_by.items() if by <= step]:
                del copied_by[block_id]

    # Room.

    def append_one(self, seq: Sequence) -> bool:
        """Blocks for one more token, if there is room; False: nothing done. Most of the time it goes into the last
        block as it is."""
        for table in seq.tables:
            if table.append_one() is None:
                break
        else:
            seq.num_computed += 1
            seq.last_step = self._step
            return True
        for earlier in seq.tables[: seq.tables.index(table)]:
            earlier.num_tokens -= 1
        if self.has_windows:
            self.release_past_window(seq)
        if any(table.blocks_needed(1) > table.pool.num_free for table in seq.tables):
            return False
        self.append(seq, 1)
        return True

    def has_room(self, work: Work) -> bool:
        """Do the free blocks suffice for all of it?"""
        return all(self._blocks_needed(work, pool) <= self.pools[pool].num_free for pool in range(len(self.pools)))

    def will_have_room(self, work: Work) -> bool:
        """Will they, once the blocks that are held have returned?"""
        return all(
            self._blocks_needed(work, pool) <= self.pools[pool].num_free + self._num_held(pool)
            for pool in range(len(self.pools))
        )

    def room(self, seq: Sequence, wanted: int) -> int:
        """How many of ``wanted`` tokens of a sequence the free blocks suffice for."""
        for table in seq.tables:
            if table.blocks_needed(wanted) > table.pool.num_free:
                offset = table.num_tokens % self.block_size
                copies = table.blocks_needed(1) if offset else 0
                num_blocks = len(table.block_ids) + table.pool.num_free - copies
                wanted = max(0, num_blocks * self.block_size - table.num_tokens)
        return wanted

    def _blocks_needed(self, work: Work, pool: int) -> int:
        needed = sum(seq.tables[pool].blocks_needed(num_new) for seq, num_new in work)
        if len(work) > 1:  # of those that share a last block among themselves alone, one need not copy it
            tables = [seq.tables[pool] for seq, _ in work]
            tails = Counter(table.block_ids[-1] for table in tables if table.num_tokens % self.block_size)
            needed -= sum(1 < count == self.pools[pool].ref_counts[block_id] for block_id, count in tails.items())
        return needed

    def _num_held(self, pool: int) -> int:
        """Held blocks that nobody else owns."""
        owned = Counter(block_id for _, of_pool, ids in self._held if of_pool == pool for block_id in ids)
        return sum(count == self.pools[pool].ref_counts[block_id] for block_id, count in owned.items())

    def admits(self, request: Request, *, alone: bool) -> bool:
        """May a waiting request begin, or come back? Only if all that is known of it fits, and the reserve stays free.

        One that finds nothing else running may begin with what there is.
        """
        for pool in range(len(self.pools)):
            free = self.pools[pool].num_free - (0 if alone else self.reserve[pool])
            if request.status is Status.SWAPPED:
                host_rows = _distinct(seq.host_rows[pool] for seq in request.live if seq.host_rows)
                needed = len(host_rows) + (0 if alone else len(request.live))
            else:
                needed = 0 if alone else self._blocks_to_begin(request, pool)
            if needed > free:
                return False
        return True

    def _blocks_to_begin(self, request: Request, pool: int) -> int:
        """For the known tokens of all its sequences, which share the prompt's; less what the first one has already."""
        lengths = [len(seq.token_ids) for seq in request.live]
        shared = len(request.prompt_token_ids) // self.block_size if len(lengths) > 1 else 0
        needed = shared + sum(-(-length // self.block_size) - shared for length in lengths)
        window = self.windows[pool]
        if window is not None:
            needed = min(needed, len(lengths) * self._kept_blocks(window) + -(-self.max_chunk // self.block_size))
        had = sum(block_id != RELEASED for block_id in request.live[0].tables[pool].block_ids)
        return needed - had

    def _kept_blocks(self, window: int) -> int:
        """Blocks that a decoding sequence needs at most: the window may begin within one and end within another."""
        return -(-(window - 1) // self.block_size) + 2

    def capacity(self, request: Request) -> float:
        """How many tokens each of a request's sequences may grow to if nothing else is in the pools."""
        shared = len(request.prompt_token_ids) // self.block_size if request.num_sequences > 1 else 0
        limit = math.inf
        for pool, window in zip(self.pools, self.windows):
            if window is None or pool.num_blocks < request.num_sequences * self._kept_blocks(window):
                own = max(0, pool.num_blocks - shared) // request.num_sequences
                limit = min(limit, (min(shared, pool.num_blocks) + own) * self.block_size)
        return limit + 1  # the last token is never computed

    def append(self, seq: Sequence, num_new: int) -> None:
        """Blocks for the next tokens of a running sequence. There must be room."""
        for index, table in enumerate(seq.tables):
            first = table.num_tokens // self.block_size
            copies = table.extend(num_new)
            self.copies[index].extend(copies)
            self._copied_by[index].update((source, self._step) for source, _ in copies)
            self.rows.write_blocks(seq, index, first)
        seq.num_computed += num_new
        seq.last_step = self._step

    # Sequences begin, fork and end.

    def open(self, seq: Sequence, num_tokens: int) -> None:
        """Tables for a sequence that has none, with as much of its first ``num_tokens`` as the prefix cache knows.

        The last of them is never taken from the cache: the next token is drawn from what it computes.
        """
        blocks: SequenceOf[list[int]] = [[] for _ in self.pools]
        if self.caches:
            keys = self._keys(seq, (num_tokens - 1) // self.block_size)
            blocks = match_pools(self.caches, keys, [self._tail_blocks(window) for window in self.windows])
        seq.num_published = len(blocks[0])
        seq.num_computed = seq.num_published * self.block_size
        seq.tables = tuple(
            BlockTable(pool, self.block_size, block_ids=block_ids, num_tokens=seq.num_computed)
            for pool, block_ids in zip(self.pools, blocks)
        )

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child stands where the parent stands; running or swapped out, it shares the parent's blocks."""
        child.num_computed = parent.num_computed
        child.keys, child.num_published = child.keys or list(parent.keys), parent.num_published
        child.host_rows = [list(host_rows) for host_rows in parent.host_rows]
        child.last_step = parent.last_step
        if parent.tables:
            child.tables = tuple(table.fork() for table in parent.tables)
            self.take_row(child)

    def take_row(self, seq: Sequence) -> None:
        """A row of the running for a sequence with tables."""
        self.rows.claim(seq)
        for index in range(len(self.pools)):
            self.rows.write_blocks(seq, index)

    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        """Forget the tokens past ``num_tokens``: drafts that were rejected."""
        seq.num_computed = num_tokens
        for index, table in enumerate(seq.tables):
            self._release(index, table.truncate(num_tokens), seq.last_step)
            self.rows.write_blocks(seq, index, len(table.block_ids))
        for host_rows in seq.host_rows:
            del host_rows[-(-num_tokens // self.block_size) :]

    def release_past_window(self, seq: Sequence) -> None:
        """Give back the blocks that its next query, and so any later one, does not see."""
        for index, window in enumerate(self.windows):
            if window is not None and seq.num_computed + 1 - window >= self.block_size:
                start = seq.num_computed + 1 - window
                self._release(index, seq.tables[index].release_before(start), seq.last_step)
                self.rows.block_tables[index][seq.row, : start // self.block_size] = RELEASED

    def close(self, seq: Sequence) -> None:
        """A sequence stops running: its blocks and its row are given back."""
        for index, table in enumerate(seq.tables):
            self._release(index, table.free(), seq.last_step)
        seq.tables = ()
        if seq.row >= 0:
            self.rows.give_up(seq)

    def _release(self, pool: int, block_ids: list[int], last_step: int) -> None:
        """Return blocks to the pool, or hold them until the last launched step that names one of them has resulted."""
        copied_by = self._copied_by[pool]
        until = max(last_step, max((copied_by.get(block_id, -1) for block_id in block_ids), default=-1))
        if until <= self._resulted:
            self.pools[pool].release(block_ids)
        elif block_ids:
            self._held.append((until, pool, block_ids))

    # Prefix sharing.

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """The sequence's first ``num_tokens`` are known and computed: others may find its full blocks from now on."""
        num_blocks = num_tokens // self.block_size
        if not self.caches or num_blocks <= seq.num_published:
            return
        keys = self._keys(seq, num_blocks)
        for index in range(seq.num_published, num_blocks):
            for cache, table in zip(self.caches, seq.tables):
                if table.block_ids[index] != RELEASED:
                    cache.publish(table.block_ids[index], keys[index])
        seq.num_published = num_blocks

    def forget_prefixes(self) -> None:
        """What is in the cache cannot be trusted any more (a step failed)."""
        for cache in self.caches:
            cache.clear()

    def _keys(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Keys of the first blocks, computed once for a sequence."""
        if len(seq.keys) < num_blocks:
            tokens = seq.token_ids[len(seq.keys) * self.block_size : num_blocks * self.block_size]
            parent = seq.keys[-1] if seq.keys else None
            seq.keys += block_keys(tokens, self.block_size, root=seq.request.prefix_root, parent=parent)
        return seq.keys[:num_blocks]

    def _tail_blocks(self, window: int | None) -> int | None:
        """Of a prefix, the last blocks that the query after it sees; None: all."""
        return None if window is None else -(-(window - 1) // self.block_size)

    # Swapping.

    def swap_out(self, request: Request) -> list[Swap]:
        """Take the blocks of a request's sequences, each once however many share it, to the host."""
        swaps = []
        key, self._num_swaps = self._num_swaps, self._num_swaps + 1
        for pool in range(len(self.pools)):
            places: dict[int, int] = {}  # block: its row on the host
            for seq in request.live:
                if seq.tables:
                    ids = seq.tables[pool].block_ids
                    seq.host_rows.append([b if b == RELEASED else places.setdefault(b, len(places)) for b in ids])
            if places:
                swaps.append(Swap(key, pool, [*places], [*places.values()], coded=self.codes_swaps))
        for seq in request.live:
            seq.last_step = self._step  # which reads the blocks: until then they are held
            self.close(seq)
        self.swapped[request] = key, sum(len(swap.block_ids) for swap in swaps)
        return swaps

    def swap_in(self, request: Request) -> tuple[int, list[Swap]]:
        """Bring them back, to any blocks; and their key on the host. There must be room (``admits``)."""
        key, swaps = self.drop(request), []
        tables: list[list[BlockTable]] = [[] for _ in request.live]
        for index, pool in enumerate(self.pools):
            host_rows = _distinct(seq.host_rows[index] for seq in request.live if seq.host_rows)
            block_of = dict(zip(host_rows, pool.allocate(len(host_rows)), strict=True))
            owners: Counter[int] = Counter()
            for seq, of_seq in zip(request.live, tables):
                if seq.host_rows:
                    ids = [RELEASED if r == RELEASED else block_of[r] for r in seq.host_rows[index]]
                    pool.share([block_id for block_id in ids if block_id != RELEASED and owners[block_id]])
                    owners.update(ids)
                    of_seq.append(BlockTable(pool, self.block_size, block_ids=ids, num_tokens=seq.num_computed))
            if host_rows:
                swaps.append(Swap(key, index, [*block_of.values()], host_rows))
        for seq, of_seq in zip(request.live, tables):
            seq.tables, seq.host_rows = tuple(of_seq), []
            seq.last_step = self._step  # which fills the blocks, whether it computes a token or not
            if seq.tables:
                self.take_row(seq)
        return key, swaps

    def drop(self, request: Request) -> int:
        """What the request has on the host is not wanted any more; the key of it."""
        return self.swapped.pop(request)[0]


def _distinct(lists: Iterable[list[int]]) -> list[int]:
    return [*dict.fromkeys(x for one in lists for x in one if x != RELEASED)]
