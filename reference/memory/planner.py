"""A plan of memory: many tensors, one arena, each at an offset of its own for as long as it is wanted.

A tensor is wanted from the op that makes it to the last op that reads it. Two that are never wanted during the same op
may have the same bytes. Of a decoder's layer::

    offset                                             x: wanted all the way through
      ^  [   qkv   ][attended][     gate_up     ]      q: made from qkv, read by attention
      |           [ q ]
      |  [ x ................................. ]
      +------------------------------------------> ops

What there must be room for is the *bound*: the bytes wanted during the op that wants most. To find a plan that reaches
it is as hard as packing a knapsack. Two simple orders come close, each where the other may not; the better is taken:

- *by size*: the largest first, each in the smallest gap that those around it in time leave. Large tensors then share
  their bytes exactly, and small ones fit between. (Of a chain of 10, 5, 8 and 9 bytes, each read by the op that makes
  the next, 10 and 9 go to the bottom and 8 on top of 9; then no gap of 5 is left within the bound of 17.)
- *from both ends*: in the order in which they are made, at the bottom of the bound, or at its top if the bottom is
  taken. Of a chain every other tensor lies at the bottom, and the bound is reached. (Where more than two are wanted at
  a time this leaves holes.)

*In place*: an op that may write its result over an argument that nobody reads later lets it inherit the bytes.

Not here: how lifetimes are found, and how a step comes to use the plan; see `arena`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reference._checks import require

ALIGNMENT = 256
"""Bytes. Offsets are multiples of it, as are addresses that a GPU's driver gives; no kernel's loads ask for more."""


class Lifetime(NamedTuple):
    """A tensor's size, and from when to when it is wanted.

    Attributes:
        first: The op that makes it, by its number in the order of the step.
        last: The last op that reads it; ``first`` if none does.
        over: An earlier tensor, by its place among the lifetimes, that the op may write this one over. The plan lets it
            do so if the two are of one size, and that one is not wanted any more afterwards.
    """

    num_bytes: int
    first: int
    last: int
    over: int | None = None

    def meets(self, other: "Lifetime") -> bool:
        """Is there an op during which both are wanted?"""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class MemoryPlan:
    """Where each tensor lies in the arena.

    Attributes:
        offsets: Bytes, for each tensor; one that inherits another's bytes has the other's.
        num_bytes: Of the arena.
        bound: The bytes wanted during the op that wants most: no plan takes less.
        total: What the tensors would take with none sharing any.
    """

    offsets: tuple[int, ...]
    num_bytes: int
    bound: int
    total: int


def plan_memory(lifetimes: Sequence[Lifetime], *, alignment: int = ALIGNMENT) -> MemoryPlan:
    """An offset for each tensor: no two that are wanted during the same op share a byte.

    Args:
        lifetimes: In the order in which the tensors are made.
        alignment: Offsets are multiples of it, and sizes count as if they were.

    Returns:
        The plan. Never larger than ``total``; for a chain, where each tensor is wanted beside the one before it and the
        one after it only, exactly the bound.

    Raises:
        ValueError: If a size is negative, a tensor's last op comes before its first, or ``over`` is no earlier tensor
            that the op can read.

    Source:
        Pisarchyk and Lee, *Efficient Memory Management for Deep Neural Net Inference*, 2020, section 5.2: by size.

    Example:
        >>> chain = [Lifetime(10, 0, 1), Lifetime(5, 1, 2), Lifetime(8, 2, 3), Lifetime(9, 3, 4)]
        >>> plan_memory(chain, alignment=1)
        MemoryPlan(offsets=(0, 12, 0, 8), num_bytes=17, bound=17, total=32)
    """
    _check(lifetimes)
    lifetimes = [tensor._replace(num_bytes=-(-tensor.num_bytes // alignment) * alignment) for tensor in lifetimes]
    groups, group_of = _inherit(lifetimes)
    bound = largest_live_set(groups)
    num_bytes, offsets = min(_by_size(groups), _from_both_ends(groups, bound))
    return MemoryPlan(
        offsets=tuple(offsets[group] for group in group_of),
        num_bytes=num_bytes,
        bound=bound,
        total=sum(tensor.num_bytes for tensor in lifetimes),
    )


def largest_live_set(lifetimes: Sequence[Lifetime]) -> int:
    """The bytes wanted during the op that wants most: one that makes a tensor."""
    return max((sum(t.num_bytes for t in lifetimes if t.first <= new.first <= t.last) for new in lifetimes), default=0)


def _check(lifetimes: Sequence[Lifetime]) -> None:
    op, argument = "plan_memory", "lifetimes"
    for place, tensor in enumerate(lifetimes):
        sound = tensor.num_bytes >= 0 and tensor.first <= tensor.last
        require(sound, op, argument, "no negative size, and no end before the beginning", tensor)
        over = tensor.over
        readable = over is None or (0 <= over < place and lifetimes[over].first < tensor.first <= lifetimes[over].last)
        require(readable, op, argument, "to write over a tensor that the op can read", tensor)


def _inherit(lifetimes: Sequence[Lifetime]) -> tuple[list[Lifetime], list[int]]:
    """The tensors with those that inherit each other's bytes made one; and of each tensor, which of these it is in."""
    groups: list[Lifetime] = []
    group_of: list[int] = []
    inherited: set[int] = set()
    for tensor in lifetimes:
        over = tensor.over
        free = over is not None and over not in inherited and lifetimes[over].last == tensor.first
        if over is not None and free and tensor.num_bytes == lifetimes[over].num_bytes:
            inherited.add(over)
            group_of.append(group_of[over])
            groups[group_of[over]] = groups[group_of[over]]._replace(last=tensor.last)
        else:
            group_of.append(len(groups))
            groups.append(tensor)
    return groups, group_of


Placed = tuple[int, list[int]]  # the bytes of the arena, and the offsets


def _by_size(tensors: Sequence[Lifetime]) -> Placed:
    """The largest first, each in the smallest gap that is large enough, or above all that it meets."""
    offsets: dict[int, int] = {}
    for index in sorted(range(len(tensors)), key=lambda i: (-tensors[i].num_bytes, tensors[i].first)):
        size = tensors[index].num_bytes
        gaps, end = _gaps(tensors, offsets, index)
        fitting = [(stop - start, start) for start, stop in gaps if stop - start >= size]
        offsets[index] = min(fitting)[1] if fitting else end
    return _placed(tensors, offsets)


def _from_both_ends(tensors: Sequence[Lifetime], bound: int) -> Placed:
    """In the order in which they are made: at the bottom, else at the top of the bound, else in the lowest gap."""
    offsets: dict[int, int] = {}
    for index in sorted(range(len(tensors)), key=lambda i: tensors[i].first):
        size = tensors[index].num_bytes
        gaps, end = _gaps(tensors, offsets, index)
        lowest = min([*(start for start, stop in gaps if stop - start >= size), end])
        top = bound - size
        offsets[index] = top if lowest > 0 and top >= end else lowest
    return _placed(tensors, offsets)


def _gaps(tensors: Sequence[Lifetime], offsets: dict[int, int], index: int) -> tuple[list[tuple[int, int]], int]:
    """What the tensors that one meets leave free between them, as (start, stop), and where the last of them ends."""
    met = [i for i in offsets if tensors[i].meets(tensors[index])]
    gaps, end = [], 0
    for offset, size in sorted((offsets[i], tensors[i].num_bytes) for i in met):
        if offset > end:
            gaps.append((end, offset))
        end = max(end, offset + size)
    return gaps, end


def _placed(tensors: Sequence[Lifetime], offsets: dict[int, int]) -> Placed:
    ends: Iterable[int] = (offsets[i] + tensor.num_bytes for i, tensor in enumerate(tensors))
    return max(ends, default=0), [offsets[i] for i in range(len(tensors))]
