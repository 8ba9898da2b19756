"""`twofold bench swap`: what a preemption by swapping takes on a GPU, with blocks as they are and coded.

The blocks have a well-known shape and are filled with normally distributed numbers: lossless coding finds in them what
it finds in real keys and values, exponents that say the same thing again and again (`twofold bench lossless` counts
real ones). Out and back are timed from the first byte to the last, with nothing else to do for host or device.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

import fast
from fast._runner.blocks import BlockMover
from reference.batching.plan import Swap
from reference.kv_cache.cache import KVCache
from reference.model.config import ModelConfig
from twofold.checkpoints.dummy import dummy_checkpoint
from twofold.errors import TwofoldError

SHAPE, SEED, BLOCK_SIZE = "meta-llama/Llama-3.1-8B", 0, 16
NUM_BLOCKS = (4, 16, 64, 256)  # 64 are 1024 tokens

Figures = dict[str, float]


def run(rounds: int = 10) -> Iterator[tuple[int, Figures]]:
    """Of each number of blocks: see `times`."""
    yield from times(dummy_checkpoint(SHAPE).config, NUM_BLOCKS, rounds)


def times(config: ModelConfig, num_blocks: Sequence[int], rounds: int) -> Iterator[tuple[int, Figures]]:
    """``bytes`` of so many blocks and ``coded_bytes``; milliseconds ``out`` and ``back`` of both, the medians of
    ``rounds``; and how many ``times`` as fast coded ones have gone both ways.

    Raises:
        TwofoldError: If a block came back as another.
    """
    most = max(num_blocks)
    cache = KVCache(
        "bfloat16",
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=BLOCK_SIZE,
        num_blocks=2 * most,
        dtype="bfloat16",
        backend=fast,
    )
    pool = cache.pools[0]
    torch.manual_seed(SEED)
    for row in pool:
        row.view(torch.bfloat16).normal_()
    for count in num_blocks:
        figures: Figures = {}
        for coded in (False, True):
            mover, name = BlockMover(cache), "coded" if coded else "plain"
            sources, targets = [*range(count)], [*range(most, most + count)]
            out = _moves(swaps_out=[Swap(0, 0, sources, [], coded)])
            back = _moves(swaps_in=[Swap(0, 0, targets, sources)])
            seconds: dict[str, list[float]] = {"out": [], "back": []}
            for _ in range(rounds + 1):
                seconds["out"].append(_timed(partial(mover.move, out), pool.is_cuda))
                figures["coded_bytes" if coded else "bytes"] = mover.host[0, 0].nbytes
                seconds["back"].append(_timed(partial(mover.move, back), pool.is_cuda))
                if not torch.equal(pool[sources], pool[targets]):
                    raise TwofoldError(f"bench swap: {count} blocks came back as others ({name})")
                pool[targets] = 0
            for way, found in seconds.items():
                figures[f"{name}_{way}_ms"] = statistics.median(found[1:]) * 1e3
        ways = ("out", "back")
        plain, as_coded = (sum(figures[f"{name}_{way}_ms"] for way in ways) for name in ("plain", "coded"))
        yield count, figures | {"times": plain / as_coded}


def _moves(**moves: Any) -> Any:
    """A batch that moves blocks, and does nothing else."""
    return SimpleNamespace(**{"swaps_out": [], "swaps_in": [], "drops": [], "copies": ([],)} | moves)


def _timed(move: Callable[[], object], on_gpu: bool) -> float:
    start = time.perf_counter()
    move()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
