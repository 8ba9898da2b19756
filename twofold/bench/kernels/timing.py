"""Device time of calls: the median over replays of a CUDA graph that runs them on buffers no cache holds."""

import math
import statistics
import time
from collections.abc import Sequence

import torch

from twofold.bench.kernels.rows import Call

COLD_BYTES = 300e6  # several times the largest cache
MOST_SETS = 48
WARM_UP_SECONDS = 0.02


def num_sets(num_bytes: int) -> int:
    """How many sets of buffers make sure that a call finds its own out of the cache."""
    return max(1, min(MOST_SETS, math.ceil(COLD_BYTES / max(num_bytes, 1))))


def seconds(calls: Sequence[Call], replays: int) -> float:
    """Of one call, when they run one after another."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:  # compiles, allocates
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    _warm_up(graph)
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def _warm_up(graph: torch.cuda.CUDAGraph) -> None:
    """A GPU that was idle takes a while to reach its clocks."""
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        graph.replay()
        torch.cuda.synchronize()


def copy_bandwidth(replays: int) -> float:
    """Bytes a second, read and written, of a plain copy of 512 MB: by the driver, or by a kernel that does no more.

    In a graph the driver's copy is the slower one (H100: 2.4 TB/s, the kernel 3.0): the better of both is the ceiling.
    """
    arrays = [torch.randn(2**28, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    pairs = [(arrays[0], arrays[1]), (arrays[2], arrays[3])]
    by_driver = seconds([lambda a=a, b=b: a.copy_(b) for a, b in pairs], replays)
    by_kernel = seconds([lambda a=a, b=b: torch.abs(b, out=a) for a, b in pairs], replays)
    return 4 * arrays[0].numel() / min(by_driver, by_kernel)


def matmul_rate(replays: int) -> float:
    """Operations a second of a large bfloat16 product of random numbers, by cuBLAS."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / seconds([lambda: torch.matmul(a, b, out=out)] * 2, replays)
