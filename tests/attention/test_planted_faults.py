"""The properties are tested: an attention with a known fault is caught by them, and the same one without it is not."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings

import reference
from reference.attention.dense_attention import attend, visible_keys
from twofold.conformance.properties import attention as properties
from twofold.conformance.strategies.attention import paged_cases
from twofold.conformance.tolerance import OutsideBound


class PagedAttention:
    """A paged attention of its own, one overridable step at a time."""

    def keys(self, cache, block_ids, seq_len):
        return cache[block_ids].reshape(-1, *cache.shape[2:])[:seq_len]

    def seen(self, queries, keys, window, block_size):
        return visible_keys(queries, keys, sliding_window=window)

    def row(self, block_table, seq):
        return block_table[seq]

    def heads(self, k, num_heads):
        return np.repeat(k, num_heads // k.shape[1], axis=1)

    def options(self, options, head_dim):
        return {"scale": head_dim**-0.5} | options

    def attend(self, q, k, v, seen, options):
        return attend(q, k, v, seen=seen, **options)[0]

    def __call__(self, q, k_cache, v_cache, block_table, seq_lens, offsets, *, sliding_window=None, **options):
        out = np.zeros_like(q)
        for seq, seq_len in enumerate(seq_lens):
            rows, num_queries = slice(offsets[seq], offsets[seq + 1]), offsets[seq + 1] - offsets[seq]
            if seq_len and num_queries:
                block_size = k_cache.shape[1]
                ids = self.row(block_table, seq)[: -(-seq_len // block_size)]
                k, v = (self.keys(cache, ids, seq_len).astype(np.float32) for cache in (k_cache, v_cache))
                keys = np.arange(len(k))
                oldest = 0 if sliding_window is None else max(0, seq_len - num_queries + 1 - sliding_window)
                kept = (keys >= oldest // block_size * block_size)[:, None, None]  # blocks before may be another's
                k, v = (np.where(kept, x, 0) for x in (k, v))
                seen = self.seen(np.arange(seq_len - num_queries, seq_len), keys, sliding_window, block_size)
                k, v = (self.heads(x, q.shape[1]) for x in (k, v))
                out[rows] = self.attend(q[rows], k, v, seen, self.options(options, q.shape[2]))
        return out


class ReturnsZeros(PagedAttention):
    def attend(self, q, k, v, seen, options):
        return np.zeros_like(q)


class DropsTheLastToken(PagedAttention):
    def seen(self, queries, keys, window, block_size):
        return super().seen(queries, keys, window, block_size) & (keys < max(1, keys[-1]))


class DropsTheLastBlock(PagedAttention):
    def seen(self, queries, keys, window, block_size):
        return super().seen(queries, keys, window, block_size) & (keys < max(1, keys[-1] // block_size * block_size))


class DropsTheFirstToken(PagedAttention):
    def seen(self, queries, keys, window, block_size):
        return super().seen(queries, keys, window, block_size) & (keys > 0)


class SeesOneTokenAhead(PagedAttention):
    def seen(self, queries, keys, window, block_size):
        return super().seen(queries + 1, keys, None if window is None else window + 1, block_size)


class DoesNotSeeItself(PagedAttention):
    def seen(self, queries, keys, window, block_size):
        return super().seen(queries - 1, keys, None if window is None else max(1, window - 1), block_size)


class WindowOneTooWide(PagedAttention):
    def seen(self, queries, keys, window, block_size):
        return super().seen(queries, keys, None if window is None else window + 1, block_size)


class WindowOneTooNarrow(PagedAttention):
    def seen(self, queries, keys, window, block_size):
        return super().seen(queries, keys, None if window is None else max(1, window - 1), block_size)


class IgnoresTheWindow(PagedAttention):
    def seen(self, queries, keys, window, block_size):
        return super().seen(queries, keys, None, block_size)


class MultipliesWhatIsNotItsOwn(PagedAttention):
    """Reads its last block to the end and gives those slots the weight 0: 0 times NaN is NaN."""

    def keys(self, cache, block_ids, seq_len):
        return cache[block_ids].reshape(-1, *cache.shape[2:])

    @np.errstate(invalid="ignore")
    def attend(self, q, k, v, seen, options):
        return super().attend(q, k, v, seen, options)


class ReadsTheFirstRowOfTheTable(PagedAttention):
    def row(self, block_table, seq):
        return np.where(block_table[0] >= 0, block_table[0], block_table[seq])


class SwapsTwoBlocks(PagedAttention):
    def row(self, block_table, seq):
        row = block_table[seq].copy()
        if len(row) > 2 and row[1] >= 0:
            row[:2] = row[1::-1]
        return row


class GroupsHeadsTheOtherWay(PagedAttention):
    def heads(self, k, num_heads):
        return np.tile(k, (1, num_heads // k.shape[1], 1))


class IgnoresTheScale(PagedAttention):
    def options(self, options, head_dim):
        return super().options({**options, "scale": head_dim**-0.5}, head_dim)


class IgnoresTheSinks(PagedAttention):
    def options(self, options, head_dim):
        return super().options({**options, "sinks": None}, head_dim)


class IgnoresTheCap(PagedAttention):
    def options(self, options, head_dim):
        return super().options({**options, "logit_cap": None}, head_dim)


class RoundsTheQueriesTooMuch(PagedAttention):
    """To float16, whatever the dtype: invisible in a test with atol=1e-2."""

    def attend(self, q, k, v, seen, options):
        return super().attend(q.astype(np.float16).astype(q.dtype), k, v, seen, options)


class RemembersItsOutput(PagedAttention):
    last = None

    def attend(self, q, k, v, seen, options):
        if self.last is None or self.last.shape != q.shape:
            self.last = super().attend(q, k, v, seen, options)
        return self.last


FAULTS = PagedAttention.__subclasses__()


def run(op: PagedAttention) -> None:
    """The property on the dtypes that this implementation serves, without shrinking."""

    @settings(phases=[Phase.generate], max_examples=100, derandomize=True)
    @given(case=paged_cases(dtypes=["float32", "bfloat16"]))
    def search(case):
        properties.paged_matches_oracle(SimpleNamespace(**vars(reference) | {"paged_attention": op}), case)

    search()


def test_without_a_fault_it_passes():
    """What the faults are planted in is right."""
    run(PagedAttention())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_is_caught(fault):
    """Each fault leaves the bound somewhere."""
    with pytest.raises(OutsideBound):
        run(fault())
