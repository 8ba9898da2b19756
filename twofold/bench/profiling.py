"""What the device did in some steps of an engine, kernel by kernel, and what it waited for."""

from collections.abc import Callable
from typing import Any

LARGEST_NAME = 80


def profile(step: Callable[[], Any], num_steps: int) -> dict[str, Any]:
    """Profile calls of ``step``.

    Returns:
        ``span_us`` of a step, ``busy`` (the share of it in which some kernel or copy ran), and ``kernels``: of each
        name the microseconds and the launches a step, the longest first.
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


def summary(ranges: list[tuple[float, float, str]], num_steps: int) -> dict[str, Any]:
    """Of (start, end, name) in microseconds; they may overlap.

    Example:
        >>> found = summary([(0, 4, "a"), (3, 5, "b"), (8, 10, "a")], 1)
        >>> found["span_us"], found["busy"], found["kernels"]["a"]
        (10.0, 0.7, {'us': 6.0, 'launches': 2.0})
    """
    if not ranges:
        return {"span_us": 0.0, "busy": 0.0, "kernels": {}}
    kernels: dict[str, list[float]] = {}
    busy, reached = 0.0, -float("inf")
    for start, end, name in sorted(ranges):
        kernels.setdefault(name, []).append(end - start)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - min(start for start, _, _ in ranges)
    return {
        "span_us": span / num_steps,
        "busy": busy / span,
        "kernels": {
            name: {"us": sum(times) / num_steps, "launches": len(times) / num_steps}
            for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))
        },
    }
