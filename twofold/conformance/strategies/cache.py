"""Drawn runs of a whole KV cache: a format, a model's sizes, sequences, and how they are cut into steps."""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from reference.kv_cache.formats import KV_FORMATS, KVFormat


@dataclass(frozen=True)
class CacheRun:
    """Sequences to be written and attended to, a few tokens of each in every step."""

    format: KVFormat
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    lengths: list[int]  # of the sequences
    steps: list[list[int]]  # tokens of each sequence in each step; they add up to the lengths
    seed: int

    def tensors(self, sequence: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k and v of a sequence, [num_layers, length, heads, head_dim]. v is much larger than k, and off zero:
        taking one for the other, or a scale of one for the other, shows."""
        rng = np.random.default_rng([self.seed, sequence])
        shape = (self.num_layers, self.lengths[sequence], self.num_kv_heads, self.head_dim)
        q_shape = (*shape[:2], self.num_heads, self.head_dim)
        q, k, v = rng.uniform(-1, 1, q_shape), rng.uniform(-1, 1, shape), 20 + 10 * rng.uniform(-1, 1, shape)
        return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def formats(names: tuple[str, ...] = tuple(KV_FORMATS)) -> st.SearchStrategy[KVFormat]:
    """Rows of the table; KIVI's with windows that end within a group, within a block, or past every sequence."""
    windowed = st.sampled_from([1, 3, 8, 128, 0])
    return st.sampled_from(names).flatmap(
        lambda name: (
            st.just(KV_FORMATS[name])
            if KV_FORMATS[name].window is None
            else windowed.map(lambda window: replace(KV_FORMATS[name], window=window, group_size=4))
        )
    )


@st.composite
def cache_runs(draw, names: tuple[str, ...] = tuple(KV_FORMATS), min_sequences: int = 1) -> CacheRun:
    """Up to three sequences of a few blocks, in up to four steps; some have no token in a step, some many."""
    num_kv_heads = draw(st.sampled_from([1, 2, 3]), label="num_kv_heads")
    lengths = draw(st.lists(st.integers(1, 24), min_size=min_sequences, max_size=3), label="lengths")
    cuts = [sorted(draw(st.lists(st.integers(0, n), max_size=3), label="cuts")) for n in lengths]
    num_steps = 1 + max(len(of_sequence) for of_sequence in cuts)
    ends = [[0] * (num_steps - len(c)) + c + [n] for c, n in zip(cuts, lengths)]  # some begin later than others
    return CacheRun(
        format=draw(formats(names), label="format"),
        num_layers=draw(st.integers(1, 2), label="num_layers"),
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3]), label="queries a head"),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 12, 32]), label="head_dim"),
        block_size=draw(st.sampled_from([1, 2, 4, 6, 16]), label="block_size"),
        lengths=lengths,
        steps=[[of[step + 1] - of[step] for of in ends] for step in range(num_steps)],
        seed=draw(st.integers(0, 2**32 - 1), label="seed"),
    )
