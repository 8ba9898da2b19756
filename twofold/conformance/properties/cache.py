"""Properties of a whole KV cache over any backend: `KVCache`, its format's ops, and the block tables on top.

A `Loop` is the engine's inner loop and nothing else: tables, a view, write and attend in every layer. Every block that
nobody owns is full of NaN (0xFF bytes), before the run and again when it is freed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reference.kv_cache.block_pool import RELEASED, BlockPool
from reference.kv_cache.block_table import BlockTable
from reference.kv_cache.cache import CacheView, KVCache, resolve_format
from reference.kv_cache.prefix_cache import PrefixCache, block_keys, match_pools
from twofold.conformance.strategies.cache import CacheRun
from twofold.conformance.tolerance import assert_within, attention_baseline_bound, attention_oracle


@dataclass(eq=False)
class Stream:
    """A sequence in the cache; ``outputs`` are [num_layers, tokens, num_heads, head_dim], one for each step."""

    tables: list[BlockTable]
    outputs: list[np.ndarray] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.tables[0].num_tokens

    @property
    def output(self) -> np.ndarray:
        return np.concatenate(self.outputs, axis=1)


class Loop:
    """A cache, its pools with their blocks in shuffled order, and steps over streams."""

    def __init__(self, backend: Any, run: CacheRun, *, num_blocks: int | None = None, slide: bool = False):
        self.backend, self.run, self.slide = backend, run, slide
        self.num_blocks = num_blocks or 2 + sum(-(-n // run.block_size) for n in run.lengths)
        self.cache = KVCache(
            run.format,
            num_layers=run.num_layers,
            num_kv_heads=run.num_kv_heads,
            head_dim=run.head_dim,
            block_size=run.block_size,
            num_blocks=self.num_blocks,
            num_window_blocks=self.num_blocks,
            backend=backend,
        )
        self.pools = [BlockPool(self.num_blocks) for _ in self.cache.pools]
        for index, pool in enumerate(self.pools):
            pool.allocate(self.num_blocks)
            order = np.random.default_rng([run.seed, index]).permutation(self.num_blocks)
            self.release(index, order.tolist())

    def release(self, pool: int, block_ids: Sequence[int]) -> None:
        self.pools[pool].release(block_ids)
        counts, published = self.pools[pool].ref_counts, self.pools[pool].published
        garbage = [b for b in block_ids if b != RELEASED and counts[b] == 0 and not published[b]]
        self.cache.swap_in(np.full((len(garbage), self.cache.block_bytes[pool]), 0xFF, np.uint8), garbage, pool=pool)

    def open(self) -> Stream:
        return Stream([BlockTable(pool, self.run.block_size) for pool in self.pools])

    def step(self, streams: Sequence[Stream], tensors: Sequence[Sequence[np.ndarray]]) -> None:
        """The next tokens of each stream: append, copy, then in every layer write and attend."""
        appended = [[table.append(k.shape[1]) for table in s.tables] for s, (_, k, _) in zip(streams, tensors)]
        for pool in range(len(self.pools)):
            self.cache.copy_blocks([pair for tables in appended for pair in tables[pool][1]], pool=pool)
        slots = [np.concatenate([tables[pool][0] for tables in appended]) for pool in range(len(self.pools))]
        ends = np.cumsum([0, *(k.shape[1] for _, k, _ in tensors)])
        view = self._view(streams, ends, slots)
        outputs = []
        for layer in range(self.run.num_layers):
            q, k, v = (self.backend.from_host(np.concatenate([t[i][layer] for t in tensors])) for i in range(3))
            self.cache.write(layer, k, v, view)
            outputs.append(self.backend.to_host(self.cache.attend(layer, q, view)))
        for stream, start, end in zip(streams, ends, ends[1:]):
            stream.outputs.append(np.stack(outputs)[:, start:end])
        if self.slide and len(self.pools) > 1:
            for stream in streams:
                window_start = self.run.format.window_start(stream.length)
                self.release(1, stream.tables[1].release_before(window_start))

    def _view(self, streams: Sequence[Stream], ends: np.ndarray, slots: list[np.ndarray]) -> CacheView:
        place = self.backend.from_host
        width = max(len(stream.tables[0].block_ids) for stream in streams)
        tables = [
            np.array([s.tables[pool].block_ids + [-1] * (width - len(s.tables[pool].block_ids)) for s in streams])
            for pool in range(len(self.pools))
        ]
        placed = [(place(table.astype(np.int32)), place(slot)) for table, slot in zip(tables, slots)]
        window_table, window_slots = placed[1] if len(placed) > 1 else (None, None)
        return CacheView(
            cu_seqlens_q=place(ends.astype(np.int32)),
            seq_lens=place(np.array([stream.length for stream in streams], np.int32)),
            block_table=placed[0][0],
            slot_mapping=placed[0][1],
            window_block_table=window_table,
            window_slot_mapping=window_slots,
        )

    def swap(self, stream: Stream, *, coded: bool) -> None:
        """To the host and back, into other blocks."""
        for index, (pool, table) in enumerate(zip(self.pools, stream.tables)):
            held = [block_id for block_id in table.block_ids if block_id != RELEASED]
            places = [block_id != RELEASED for block_id in table.block_ids]
            length = table.num_tokens
            rows = self.cache.swap_out(held, pool=index, coded=coded)
            self.release(index, table.free())
            moved_past = pool.allocate(min(1, pool.num_free - len(held)))  # so that it cannot come back to the same
            fresh = pool.allocate(len(held))
            self.cache.swap_in(rows, fresh, pool=index)
            self.release(index, moved_past)
            ids = iter(fresh)
            block_ids = [next(ids) if is_held else RELEASED for is_held in places]
            stream.tables[index] = BlockTable(pool, self.run.block_size, block_ids=block_ids, num_tokens=length)


def run_through(loop: Loop, *, swap_after: int | None = None, coded: bool = False) -> list[Stream]:
    """All steps of a run, its sequences together. After one of them all go to the host and back."""
    streams = [loop.open() for _ in loop.run.lengths]
    tensors = [loop.run.tensors(sequence) for sequence in range(len(streams))]
    for number, counts in enumerate(loop.run.steps):
        work = [
            (stream, [x[:, stream.length : stream.length + count] for x in of_sequence])
            for stream, of_sequence, count in zip(streams, tensors, counts)
            if count or stream.length  # a sequence that is here may have nothing to do
        ]
        if work:
            loop.step(*zip(*work))
        if number == swap_after:
            for stream in streams:
                loop.swap(stream, coded=coded)
    return streams


# ---- the truth, and how far a format may be from it -------------------------------------------------------------

ROUNDING = {
    "float32": 0.0,
    "float16": 2**-11,
    "bfloat16": 2**-8,
    "int8": 0.5 / 127,
    "fp8": 2**-4,
    "int4": 1.01 / 15,  # half a step of a range of at most 2 max|x|; 1 %: scale and zero are float16, rounded outwards
    "kivi4": 1.01 / 15,
    "kivi2": 1.01 / 3,
}
"""The largest error of a stored value, relative to the largest magnitude that shares its scale."""

Tensors = Sequence[np.ndarray]  # q, k, v of a sequence, [num_layers, length, heads, head_dim]


def format_error(run: CacheRun, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    r"""How far attention in one layer may be from the truth because of what the format rounds, for each token and head.

    Keys off by at most :math:`e_k` move a score by :math:`\delta = e_k \, scale \sum |q|`, and so a probability by a
    factor of at most :math:`e^{2 \delta}`; values are off by at most :math:`e_v`. Together:
    :math:`e_v + (e^{2 \delta} - 1) (\max |v| + e_v)`.
    """
    rounding = ROUNDING[resolve_format(run.format, "float32").name]
    k_error, v_error = rounding * np.abs(k).max(initial=0), rounding * np.abs(v).max(initial=0)
    delta = k_error * run.head_dim**-0.5 * np.abs(q.astype(np.float64)).sum(axis=-1)
    return v_error + np.expm1(2 * delta) * (np.abs(v).max(initial=0) + v_error)


def arithmetic_error(run: CacheRun, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How far it may be from the attention over what is stored, in float32, in whatever order sums are made."""
    stored = 1 + ROUNDING[resolve_format(run.format, "float32").name]
    values, keys = stored * np.abs(v).max(initial=0), stored * np.abs(k).max(initial=0)
    scores = keys * run.head_dim**-0.5 * np.abs(q.astype(np.float64)).sum(axis=-1)
    return attention_baseline_bound(np.full(q.shape, values), np.full(q.shape, values), scores, len(k), "float32")


def agree(run: CacheRun, got: np.ndarray, expected: np.ndarray, tensors: Tensors, what: str) -> None:
    """The same values were read, if perhaps in another order: both are as near to the attention over them."""
    for layer, of_layer in enumerate(zip(*tensors)):
        bound = 2 * arithmetic_error(run, *of_layer)
        assert_within(got[layer], expected[layer], bound, f"{what}, layer {layer}")


# ---- the properties ---------------------------------------------------------------------------------------------


def reads_what_was_written(backend: Any, run: CacheRun) -> None:
    """Attention through the cache, cut into steps in any way, is attention over the sequence's own keys and values,
    to within what the format rounds; and nothing that nobody owns is read."""
    for sequence, stream in enumerate(run_through(Loop(backend, run))):
        for layer, (q, k, v) in enumerate(zip(*run.tensors(sequence))):
            truth = attention_oracle(q, k, v).out
            bound = format_error(run, q, k, v)[..., None] + arithmetic_error(run, q, k, v)
            assert_within(stream.output[layer], truth, bound, f"sequence {sequence}, layer {layer}")


def chunked_is_whole(backend: Any, run: CacheRun) -> None:
    """Of a quantized cache too a query reads the same values, whatever step it comes in."""
    for sequence, stream in enumerate(run_through(Loop(backend, run))):
        loop = Loop(backend, run)
        whole, tensors = loop.open(), run.tensors(sequence)
        loop.step([whole], [tensors])
        agree(run, stream.output, whole.output, tensors, f"sequence {sequence} in steps and at once")


def released_is_kept(backend: Any, run: CacheRun) -> None:
    """Giving back the window's blocks that no later query reads changes nothing, bit for bit."""
    kept, released = (run_through(Loop(backend, run, slide=slide)) for slide in (False, True))
    for sequence, (a, b) in enumerate(zip(kept, released)):
        assert np.array_equal(a.output, b.output), f"sequence {sequence} needed a block of the window that was released"


def swapped_is_uninterrupted(backend: Any, run: CacheRun, *, coded: bool) -> None:
    """To the host and back, into other blocks, between two steps: bit for bit the same."""
    stayed = run_through(Loop(backend, run, slide=True))
    swapped = run_through(Loop(backend, run, slide=True), swap_after=(len(run.steps) - 1) // 2, coded=coded)
    for sequence, (a, b) in enumerate(zip(stayed, swapped)):
        assert np.array_equal(a.output, b.output), f"sequence {sequence} came back from the host another"


def copied_on_write_is_copied(backend: Any, run: CacheRun) -> None:
    """A fork goes on with the second sequence's tokens, its parent with its own: as if neither knew of the other."""
    cut = min(run.lengths[:2]) // 2 + 1
    first, second = run.tensors(0), run.tensors(1)
    other = [np.concatenate([a[:, :cut], b[:, cut:]], axis=1) for a, b in zip(first, second)]
    loop = Loop(backend, run, num_blocks=2 + 4 * sum(-(-n // run.block_size) for n in run.lengths))

    parent = loop.open()
    loop.step([parent], [[x[:, :cut] for x in first]])
    fork = Stream([table.fork() for table in parent.tables], list(parent.outputs))
    loop.step([parent, fork], [[x[:, cut:] for x in tensors] for tensors in (first, other)])
    for who, stream, tensors in (("the parent", parent, first), ("the fork", fork, other)):
        alone = loop.open()
        loop.step([alone], [tensors])
        agree(run, stream.output, alone.output, tensors, f"{who} and the same sequence alone")


def hit_is_cold(backend: Any, run: CacheRun) -> None:
    """A sequence that finds its prefix computed goes on as if it had computed it, though of the window only the last
    blocks are left."""
    loop = Loop(backend, run, num_blocks=2 + 3 * sum(-(-n // run.block_size) for n in run.lengths), slide=True)
    caches = [PrefixCache(pool) for pool in loop.pools]
    tensors, length, block_size = run.tensors(0), run.lengths[0], run.block_size
    keys = block_keys(range(length), block_size, root=b"root")
    findable = (length - 1) // block_size  # the last token is computed in any case

    cold = loop.open()
    loop.step([cold], [tensors])
    cold_output = cold.output
    for pool, (cache, table) in enumerate(zip(caches, cold.tables)):
        for block_id, key in zip(table.block_ids, keys):
            if block_id != RELEASED:
                cache.publish(block_id, key)
        loop.release(pool, table.free())

    tails = [None, run.format.tail_blocks(block_size)][: len(caches)]
    hits = match_pools(caches, keys[:findable], tails)
    cached = len(hits[0]) * block_size
    assert len(caches) > 1 or len(hits[0]) == findable, f"{findable} blocks are published, {len(hits[0])} were found"
    tables = [BlockTable(p, block_size, block_ids=ids, num_tokens=cached) for p, ids in zip(loop.pools, hits)]
    warm = Stream(tables, [cold_output[:, :cached]])
    loop.step([warm], [[x[:, cached:] for x in tensors]])
    agree(run, warm.output, cold_output, tensors, "after a hit and cold")
