"""What the device did in some steps of an engine, kernel by kernel, and what it waited for."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

LARGEST_NAME = 80


def profile(step: Callable[[], Any], num_steps: int) -> dict[str, Any]:
    """Profile calls of ``step``.

    Returns:
        `summary` of what ran on the device.
    """
    import torch
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    ranges = [
        (event.time_range.start, event.time_range.end, event.name[:LARGEST_NAME])
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
    ]
    return summary(ranges, num_steps)


def summary(ranges: Sequence[tuple[float, float, str]], num_steps: int) -> dict[str, Any]:
    """What a step is made of, from (start, end, name) in microseconds of everything that ran.

    Kernels overlap: one may begin to load its weights while the one before still computes. So a kernel's duration is
    not what it costs. Each moment is counted once, for the kernel that of those running is the first to end: what it
    *adds* to the step. Of kernels in a row, that is from the end of the one before to its own end. Moments in which
    none runs are idle; they and what all add make the span.

    Returns:
        ``span_us`` and ``idle_us`` of a step, ``busy`` (the share of the span that is not idle), and ``kernels``: of
        each name the microseconds that it ran (``us``), that it added (``adds_us``) and the launches of a step; what
        adds most first.

    Example:
        >>> found = summary([(0, 4, "a"), (3, 5, "b"), (8, 10, "a")], 1)
        >>> found["span_us"], found["idle_us"], found["busy"]
        (10.0, 3.0, 0.7)
        >>> found["kernels"]["a"], found["kernels"]["b"]
        ({'us': 6.0, 'adds_us': 6.0, 'launches': 2.0}, {'us': 2.0, 'adds_us': 1.0, 'launches': 1.0})
    """
    if not ranges:
        return {"span_us": 0.0, "idle_us": 0.0, "busy": 0.0, "kernels": {}}
    kernels: dict[str, dict[str, float]] = {}
    counted: list[tuple[float, float]] = []  # apart from each other, one after the other
    for start, end, name in sorted(ranges, key=itemgetter(1)):
        duration = adds = end - start
        while counted and counted[-1][1] >= start:
            first, last = counted.pop()
            adds -= last - max(first, start)
            start = min(first, start)
        counted.append((start, end))
        of_name = kernels.setdefault(name, {"us": 0.0, "adds_us": 0.0, "launches": 0.0})
        for what, value in (("us", duration), ("adds_us", adds), ("launches", 1)):
            of_name[what] += value / num_steps
    span = counted[-1][1] - counted[0][0]
    busy = sum(end - start for start, end in counted)
    return {
        "span_us": span / num_steps,
        "idle_us": (span - busy) / num_steps,
        "busy": busy / span,
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1]["adds_us"])),
    }
