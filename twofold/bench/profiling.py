"""What the device did in some steps of an engine, kernel by kernel, and what it waited for."""

import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

LARGEST_NAME = 80
KERNEL = re.compile(r"^def (\w*_kernel)\(", re.MULTILINE)
FOREIGN = {"linear": re.compile(r"gemm|nvjet|cutlass|cublas", re.IGNORECASE), "copies": re.compile(r"^Mem(cpy|set)")}


def profile(step: Callable[[], Any], num_steps: int) -> dict[str, Any]:
    """Profile calls of ``step``.

    Returns:
        `summary` of what ran on the device, and of each kernel the ``room`` that it belongs to.
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
    found = summary(ranges, num_steps)
    rooms = kernel_rooms()
    for name, kernel in found["kernels"].items():
        kernel["room"] = room_of(name, rooms)
    return found


def kernel_rooms() -> dict[str, str]:
    """Of the kernels of `fast`, by name: the folder that they come from. Attention over codes is attention too.

    Example:
        >>> rooms = kernel_rooms()
        >>> rooms["_rotary_kernel"], rooms["coded_attention_kernel"], rooms["_write_kv_kernel"]
        ('fusion', 'attention', 'kv_cache')
    """
    rooms = {}
    root = Path(__file__).parents[2] / "fast"
    for file in sorted(root.glob("*/*.py")):
        if file.stem != "lossless":  # it runs when blocks are swapped, and one of its kernels is called as another
            for name in KERNEL.findall(file.read_text()):
                attends = "attention" in name or "decode" in name
                rooms[name] = "attention" if attends else file.parent.name
    return rooms


def room_of(name: str, rooms: Mapping[str, str]) -> str:
    """Where a kernel's work belongs, by its name as the device has it; "other" if nobody knows.

    Example:
        >>> names = "_rotary_kernel", "nvjet_tst_64x8", "Memcpy HtoD (Pinned -> Device)", "void at::native::fill"
        >>> [room_of(name, {"_rotary_kernel": "fusion"}) for name in names]
        ['fusion', 'linear', 'copies', 'other']
    """
    if name in rooms:
        return rooms[name]
    return next((room for room, known in FOREIGN.items() if known.search(name)), "other")


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
