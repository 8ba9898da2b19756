"""Coded swaps of the runner of `fast`: in pieces, from where blocks lie in the pool to where they are wanted."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
from fast._runner import coded_blocks
from fast._runner.blocks import BlockMover
from fast._runner.coded_blocks import CodedBlocks
from reference.batching.plan import Swap
from reference.kv_cache.cache import KVCache
from reference.kv_cache.coded_rows import CodedRows
from reference.model.overlay import overlay
from twofold.conformance.strategies.kv_cache import every_word, words

NUM_BLOCKS, GARBAGE = 7, 0xFF


def cache_of(dtype: str, *, num_blocks: int = NUM_BLOCKS, head_dim: int = 32, backend: Any = fast) -> KVCache:
    return KVCache(
        dtype, num_layers=2, num_kv_heads=1, head_dim=head_dim, block_size=2, num_blocks=num_blocks,
        dtype=dtype, backend=backend,
    )  # fmt: skip


def moves(**asked: list[Any]) -> Any:
    """A batch that moves blocks, and does nothing else."""
    return SimpleNamespace(**{"swaps_out": [], "swaps_in": [], "drops": [], "copies": ([],)} | asked)


def out(mover: BlockMover, block_ids: list[int], key: int = 0) -> None:
    """Queued at once behind it is what overwrites the blocks."""
    mover.move(moves(swaps_out=[Swap(key, 0, block_ids, [], coded=True)]))
    mover.cache.pools[0][block_ids] = GARBAGE


@st.composite
def swaps(draw) -> tuple[list[int], list[int], list[int]]:
    """Blocks that leave, the rows of them that come back, and the blocks that they come back to: in any order."""
    leaving = draw(st.permutations(range(NUM_BLOCKS)))[: draw(st.integers(1, NUM_BLOCKS), label="num_out")]
    back = draw(st.permutations(range(len(leaving))))[: draw(st.integers(0, len(leaving)), label="num_back")]
    return leaving, back, draw(st.permutations(range(NUM_BLOCKS)))[: len(back)]


@settings(max_examples=60)
@given(
    case=words(),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    swap=swaps(),
    piece=st.integers(1, 4),
)
def test_any_rows_come_back_in_any_order(case, dtype, swap, piece):
    """Across pieces, and beside blocks that stay as they are."""
    (leaving, host_rows, targets), cache = swap, cache_of(dtype)
    pool, blocks = cache.pools[0], case[0]
    for block in range(NUM_BLOCKS):
        pattern = blocks[block % len(blocks)] if blocks.size else np.zeros(1, np.uint16)
        pool[block] = fast.from_host(np.resize(pattern, pool.shape[1] // 2).view(np.uint8))
    expected = fast.to_host(pool).copy()
    mover = BlockMover(cache)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(coded_blocks, "PIECE_BYTES", piece * pool.shape[1])
        out(mover, leaving)
        came = expected[leaving][host_rows]
        expected[leaving] = GARBAGE
        expected[targets] = came
        mover.move(moves(swaps_in=[Swap(0, 0, targets, host_rows)]))
    assert np.array_equal(fast.to_host(pool), expected)
    assert not mover.host, "the host keeps what nobody wants"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_every_pattern_comes_back(dtype, order, monkeypatch):
    """All 65536 words, in blocks that share an exponent and in blocks that nothing makes smaller."""
    patterns = every_word(order).reshape(16, -1).view(np.uint8)
    cache = cache_of(dtype, num_blocks=16, head_dim=patterns.shape[1] // (32 if dtype == "float32" else 16))
    pool = cache.pools[0]
    assert pool.shape == patterns.shape
    pool.copy_(fast.from_host(patterns))
    monkeypatch.setattr(coded_blocks, "PIECE_BYTES", 5 * pool.shape[1])
    mover, blocks = BlockMover(cache), [*range(16)]
    out(mover, blocks)
    mover.move(moves(swaps_in=[Swap(0, 0, blocks, blocks)]))
    assert np.array_equal(fast.to_host(pool), patterns)


def filled(cache: KVCache) -> np.ndarray:
    """Blocks of normally distributed numbers."""
    pool = cache.pools[0]
    rng = np.random.default_rng(0)
    numbers = torch.from_numpy(rng.normal(size=(len(pool), pool.shape[1] // 2)))
    pool.copy_(numbers.to(torch.bfloat16).view(torch.uint8))
    return fast.to_host(pool).copy()


def test_several_swaps_of_one_step():
    """All leave before any comes back; what is dropped is forgotten."""
    cache = cache_of("bfloat16")
    before, mover = filled(cache), BlockMover(cache)
    mover.move(moves(swaps_out=[Swap(key, 0, [key, key + 1], [], coded=key != 2) for key in (0, 2, 4)]))
    kinds = [isinstance(rows, CodedBlocks) for _, rows in sorted(mover.host.items())]
    assert kinds == [True, False, True]
    assert mover.host[0, 0].nbytes < 0.85 * mover.host[2, 0].nbytes
    mover.move(moves(swaps_in=[Swap(4, 0, [0, 1], [1, 0]), Swap(2, 0, [4, 5], [0, 1])], drops=[0]))
    assert np.array_equal(fast.to_host(cache.pools[0]), before[[5, 4, 2, 3, 2, 3, 6]])
    assert not mover.host


def test_a_coder_laid_over_this_one_is_called():
    """A stranger's op is asked for blocks as it is for anything else."""
    called = []

    def encode_lossless(*args, **kwargs):
        called.append("encode_lossless")
        return fast.encode_lossless(*args, **kwargs)

    cache = cache_of("bfloat16", backend=overlay(SimpleNamespace(encode_lossless=encode_lossless), fast))
    before, mover = filled(cache), BlockMover(cache)
    out(mover, [1, 2])
    assert called
    assert isinstance(mover.host[0, 0], CodedRows)
    mover.move(moves(swaps_in=[Swap(0, 0, [2, 1], [1, 0])]))
    assert np.array_equal(fast.to_host(cache.pools[0]), before)


@pytest.mark.needs("gpu")
def test_nothing_is_read_or_let_go_while_the_bus_carries_it(monkeypatch):
    """Many pieces, and no one waits: memory is taken again at once, on both sides, for the next of three swaps."""
    cache = cache_of("bfloat16", num_blocks=96, head_dim=1 << 14)
    before, mover = filled(cache), BlockMover(cache)
    monkeypatch.setattr(coded_blocks, "PIECE_BYTES", 4 * cache.pools[0].shape[1])
    order = np.random.default_rng(1).permutation(96)
    for _ in range(3):
        for key in range(3):
            out(mover, order[32 * key : 32 * key + 32].tolist(), key)
        for key in range(3):
            rows = [*range(20), *range(31, 19, -1)]
            mover.move(moves(swaps_in=[Swap(key, 0, order[32 * key : 32 * key + 32][rows].tolist(), rows)]))
        cache.pools[0].add_(0)  # reads what has just come
    assert np.array_equal(fast.to_host(cache.pools[0]), before)
