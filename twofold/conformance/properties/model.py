"""What a decoder must do on any backend: the same function however its tokens are cut, batched, placed and stored."""

from collections.abc import Sequence

import numpy as np

from reference.kv_cache.cache import CacheView, KVCache
from reference.model.decoder import AdapterBank, Decoder

# Of a row's largest logit, float32. Two layers of small matrices lose 5e-7; whatever is left out shows at 1e-3 and up.
LOGIT_TOLERANCE = 1e-5

Steps = Sequence[Sequence[int]]  # for each step, how many tokens of each sequence it computes


def whole(sequences: Sequence[Sequence[int]]) -> Steps:
    """Everything in one step."""
    return [[len(tokens) for tokens in sequences]]


def paged_logits(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    steps: Steps,
    *,
    block_size: int = 4,
    seed: int = 0,
    kv_format: str = "auto",
    adapters: AdapterBank | None = None,
    adapter_of: Sequence[int] | None = None,
    last_only: bool = False,
) -> list[np.ndarray]:
    """Run known sequences through a decoder, step by step, and return the logits of each sequence's tokens.

    The cache's blocks are dealt out in a shuffled order, from a pool that is full of NaN.

    Args:
        steps: How many tokens of each sequence each step computes; together, all of them.
        seed: Of the order of blocks.
        adapter_of: An adapter's number for each sequence; -1 for none.
        last_only: Ask for the logits of each step's last tokens only, as an engine does.
    """
    config, backend = decoder.config, decoder.backend
    blocks_per_seq = [-(-len(tokens) // block_size) for tokens in sequences]
    num_blocks = sum(blocks_per_seq) + 2
    order = np.random.default_rng(seed).permutation(num_blocks)
    cache = KVCache(
        kv_format,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=block_size,
        num_blocks=num_blocks,
        dtype=decoder.dtype,
        backend=backend,
    )
    cache.swap_in(np.full((num_blocks, cache.block_bytes[0]), 0xFF, np.uint8), range(num_blocks))
    block_table = np.full((len(sequences), max(blocks_per_seq, default=0)), -1, np.int32)
    for row, count, start in zip(block_table, blocks_per_seq, np.cumsum([0, *blocks_per_seq])):
        row[:count] = order[start : start + count]

    place = backend.from_host
    done = [0] * len(sequences)
    logits: list[list[np.ndarray]] = [[] for _ in sequences]
    for counts in steps:
        spans = [range(start, start + count) for start, count in zip(done, counts)]
        tokens = [sequences[s][p] for s, span in enumerate(spans) for p in span]
        slots = [
            block_table[s, p // block_size] * block_size + p % block_size for s, span in enumerate(spans) for p in span
        ]
        done = [span.stop for span in spans]
        ends = np.cumsum([0, *counts]).astype(np.int32)
        view = CacheView(
            cu_seqlens_q=place(ends),
            seq_lens=place(np.array(done, np.int32)),
            block_table=place(block_table),
            slot_mapping=place(np.array(slots, np.int64)),
        )
        rows = (
            [int(end) - 1 for end, count in zip(ends[1:], counts) if count] if last_only else list(range(len(tokens)))
        )
        ids = None if adapter_of is None else np.repeat(np.array(adapter_of, np.int32), counts)
        got = decoder.forward(
            place(np.array(tokens, np.int64)),
            place(np.array([p for span in spans for p in span], np.int64)),
            view,
            cache,
            logit_rows=place(np.array(rows, np.int64)) if last_only else None,
            adapters=adapters,
            adapter_ids=None if ids is None else place(ids),
        )
        got = backend.to_host(got)
        assert got.dtype == np.float32, f"logits: expected float32, got {got.dtype}"
        assert got.shape == (len(rows), config.vocab_size), f"logits: {len(rows)} rows asked for, got {got.shape}"
        for s in range(len(sequences)):
            mine = [i for i, row in enumerate(rows) if ends[s] <= row < ends[s + 1]]
            logits[s].append(got[mine])
    assert done == [len(tokens) for tokens in sequences], "steps must compute every token once"
    return [np.concatenate(parts) for parts in logits]


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a logit, relative to the largest logit of its row; the worst row's. NaN is the worst."""
    assert got.shape == expected.shape, f"logits: expected shape {expected.shape}, got {got.shape}"
    if got.size == 0:
        return 0.0
    error = np.abs(got.astype(np.float64) - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
    return float(np.nan_to_num(error, nan=np.inf).max())


def assert_same_logits(
    got: Sequence[np.ndarray], expected: Sequence[np.ndarray], what: str, tolerance: float = LOGIT_TOLERANCE
) -> None:
    for s, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        error = relative_error(mine, theirs)
        assert error <= tolerance, f"{what}: sequence {s}: relative error of logits {error:.2g} > {tolerance:g}"
