"""Contiguous memory: what a request reserves, and where it is put.

Before paging, keys and values of a sequence lay in one piece, as arrays do, and a piece cannot grow: all that a request
may need is *reserved* when it is admitted. How much that is, is the reservation:

- ``reserve_max``: the longest sequence there may be; what a system does that knows nothing of the answer;
- ``reserve_pow2``: room for twice the answer at most, the next power of two;
- ``reserve_true_length``: exactly what will be used; what only an oracle knows.

Where the piece lies is the allocator's choice. Both of these merge neighbours that are free, or the memory would soon
be crumbs:

- `BestFitAllocator`: the smallest gap that is large enough; sizes are kept as they are;
- `BuddyAllocator`: sizes rounded up to powers of two, halves that find each other again by their address.

Paging needs neither: blocks of one size, taken when a token needs one, are `reference.kv_cache.block_pool`.

Source: Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention* (2023), section
3.1 for the kinds of waste and 6.1 for the baselines, Orca (Max), (Pow2) and (Oracle), which it puts on a buddy
allocator. Knuth, *The Art of Computer Programming*, volume 1, section 2.5, for both allocators.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Reserve = Callable[[int, int, int], int]
"""Slots to reserve for ``(prompt_len, output_len, max_model_len)``."""


def reserve_max(prompt_len: int, output_len: int, max_model_len: int) -> int:
    """The longest sequence there may be."""
    return max_model_len


def reserve_pow2(prompt_len: int, output_len: int, max_model_len: int) -> int:
    """The prompt, and for the answer the next power of two; never more than the longest sequence."""
    return min(prompt_len + next_power_of_two(output_len), max_model_len)


def reserve_true_length(prompt_len: int, output_len: int, max_model_len: int) -> int:
    """What will be used, and no more."""
    return prompt_len + output_len


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True, order=True, slots=True)
class Extent:
    """A piece of memory: slots ``start`` to ``start + size``."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """The first slot after it."""
        return self.start + self.size


class Allocator(Protocol):
    """Hands out pieces of one memory.

    Attributes:
        num_slots: All there are.
        num_free: Slots in no piece.
    """

    num_slots: int
    num_free: int

    def allocate(self, size: int) -> Extent | None:
        """A piece of at least ``size`` slots; None, changing nothing, if no gap is large enough."""
        ...

    def free(self, extent: Extent) -> None:
        """Take a piece back. Raises ValueError if it was not handed out."""
        ...

    def gaps(self) -> list[Extent]:
        """The free memory in order."""
        ...


class BestFitAllocator:
    """The smallest gap that is large enough, the first of those; a piece that is freed merges with the gaps beside it.

    Example:
        >>> allocator = BestFitAllocator(100)
        >>> a, b, c = (allocator.allocate(size) for size in (30, 20, 40))
        >>> allocator.free(a); allocator.free(c)            # c merges with what was never used behind it
        >>> allocator.gaps()
        [Extent(start=0, size=30), Extent(start=50, size=50)]
        >>> allocator.allocate(60) is None                  # 80 slots are free, in no one piece
        True
        >>> allocator.allocate(25)                          # the smaller gap of the two
        Extent(start=0, size=25)
    """

    def __init__(self, num_slots: int):
        self.num_slots = self.num_free = _checked(num_slots)
        self._gaps = [Extent(0, num_slots)]  # by address; no two of them touch
        self._taken: dict[int, int] = {}  # start: size

    def allocate(self, size: int) -> Extent | None:
        """See `Allocator`."""
        _checked(size)
        gap = min((gap for gap in self._gaps if gap.size >= size), key=lambda gap: gap.size, default=None)
        if gap is None:
            return None
        place = self._gaps.index(gap)
        rest = Extent(gap.start + size, gap.size - size)
        self._gaps[place : place + 1] = [rest] if rest.size else []
        self._taken[gap.start] = size
        self.num_free -= size
        return Extent(gap.start, size)

    def free(self, extent: Extent) -> None:
        """See `Allocator`."""
        if self._taken.get(extent.start) != extent.size:
            raise ValueError(f"BestFitAllocator.free: {extent} was not handed out")
        del self._taken[extent.start]
        self.num_free += extent.size
        start, stop = extent.start, extent.stop
        for gap in [gap for gap in self._gaps if gap.stop == start or gap.start == stop]:
            self._gaps.remove(gap)
            start, stop = min(start, gap.start), max(stop, gap.stop)
        insort(self._gaps, Extent(start, stop - start))

    def gaps(self) -> list[Extent]:
        """See `Allocator`."""
        return list(self._gaps)


class BuddyAllocator:
    """Powers of two. A gap that is too large is halved until it fits; two free halves of one are one again.

    A piece's buddy differs from it in one bit of the address: no list has to be searched for neighbours. The price is
    the rounding, a quarter of the memory on average, and that neighbours which are no buddies never merge.

    A memory whose size is no power of two is one gap for each bit of its size, the largest first.

    Example:
        >>> allocator = BuddyAllocator(96)
        >>> a, b = allocator.allocate(20), allocator.allocate(30)
        >>> a, b                                            # 20 takes 32; the other half is its buddy
        (Extent(start=64, size=32), Extent(start=0, size=32))
        >>> allocator.free(b)
        >>> allocator.gaps()                                # merged into 64 again
        [Extent(start=0, size=64)]
    """

    def __init__(self, num_slots: int):
        self.num_slots = self.num_free = _checked(num_slots)
        self._free: dict[int, set[int]] = {1 << bit: set() for bit in range(num_slots.bit_length())}  # size: starts
        self._taken: dict[int, int] = {}
        start = 0
        for size in sorted(self._free, reverse=True):
            if num_slots & size:
                self._free[size].add(start)
                start += size

    def allocate(self, size: int) -> Extent | None:
        """See `Allocator`. Of the gaps of the smallest size that will do, the one with the lowest address."""
        size = next_power_of_two(_checked(size))
        gap_size = size
        while gap_size in self._free and not self._free[gap_size]:
            gap_size *= 2
        if gap_size not in self._free:
            return None
        start = min(self._free[gap_size])
        self._free[gap_size].remove(start)
        while gap_size > size:  # keep the lower half
            gap_size //= 2
            self._free[gap_size].add(start + gap_size)
        self._taken[start] = size
        self.num_free -= size
        return Extent(start, size)

    def free(self, extent: Extent) -> None:
        """See `Allocator`."""
        if self._taken.get(extent.start) != extent.size:
            raise ValueError(f"BuddyAllocator.free: {extent} was not handed out")
        start, size = extent.start, extent.size
        del self._taken[start]
        self.num_free += size
        while (buddy := start ^ size) in self._free[size]:
            self._free[size].remove(buddy)
            start, size = min(start, buddy), 2 * size
        self._free[size].add(start)

    def gaps(self) -> list[Extent]:
        """See `Allocator`."""
        return sorted(Extent(start, size) for size, starts in self._free.items() for start in starts)


def _checked(size: int) -> int:
    if size < 1:
        raise ValueError(f"allocator: size: expected at least 1 slot, got {size}")
    return size
