"""Contiguous memory: nothing overlaps, nothing is lost, and what is free and lies together is one gap."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reference.memory.allocators import (
    BestFitAllocator,
    BuddyAllocator,
    Extent,
    next_power_of_two,
    reserve_max,
    reserve_pow2,
    reserve_true_length,
)

SIZES = [1, 2, 7, 16, 64, 100, 255]


class Allocating(RuleBasedStateMachine):
    """Pieces are asked for and given back in any order; a list says of every slot whose it is."""

    make = BestFitAllocator

    @initialize(num_slots=st.sampled_from(SIZES))
    def start(self, num_slots):
        self.allocator = self.make(num_slots)
        self.owners = [None] * num_slots
        self.held: list[Extent] = []
        self.at_first = self.allocator.gaps()

    @rule(size=st.integers(1, 40))
    def allocate(self, size):
        before = self.allocator.gaps()
        extent = self.allocator.allocate(size)
        fitting = [gap.size for gap in before if gap.size >= self.rounded(size)]
        if extent is None:
            assert not fitting, f"refused {size} slots, and there are gaps of {fitting}"
            assert self.allocator.gaps() == before, "a refusal changed something"
            return
        assert extent.size == self.rounded(size)
        assert extent.stop <= len(self.owners), "beyond the end"
        assert self.owners[extent.start : extent.stop] == [None] * extent.size, "slots that somebody has"
        (gap,) = [gap for gap in before if gap.start <= extent.start and extent.stop <= gap.stop]
        assert gap.size == min(fitting), "not the smallest gap that is large enough"
        self.owners[extent.start : extent.stop] = [extent] * extent.size
        self.held.append(extent)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        extent = self.held.pop(data.draw(st.integers(0, len(self.held) - 1), label="which"))
        self.allocator.free(extent)
        self.owners[extent.start : extent.stop] = [None] * extent.size
        with pytest.raises(ValueError, match="was not handed out"):
            self.allocator.free(extent)

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "allocator"):
            return
        gaps = self.allocator.gaps()
        free = [slot for gap in gaps for slot in range(gap.start, gap.stop)]
        assert free == [slot for slot, owner in enumerate(self.owners) if owner is None], "gaps are not what is free"
        assert self.allocator.num_free == len(free)
        self.coalesced(gaps)

    def rounded(self, size):
        return size

    def coalesced(self, gaps):
        for before, after in zip(gaps, gaps[1:]):
            assert before.stop < after.start, f"{before} and {after} touch"

    def teardown(self):
        for extent in getattr(self, "held", ()):
            self.allocator.free(extent)
        if hasattr(self, "allocator"):
            assert self.allocator.gaps() == self.at_first, "with all given back it is not as it was"


class BuddyAllocating(Allocating):
    make = BuddyAllocator

    def rounded(self, size):
        return next_power_of_two(size)

    def coalesced(self, gaps):
        for gap in gaps:
            assert gap.size == next_power_of_two(gap.size)
            assert gap.start % gap.size == 0, "a piece's address is no multiple of its size"
            assert Extent(gap.start ^ gap.size, gap.size) not in gaps, f"{gap} and its buddy are both free"


Allocating.TestCase.settings = settings(max_examples=150, stateful_step_count=25)
BuddyAllocating.TestCase.settings = settings(max_examples=150, stateful_step_count=25)
TestBestFit = Allocating.TestCase
TestBuddy = BuddyAllocating.TestCase


@given(st.integers(1, 100), st.integers(1, 100))
def test_reservations_hold_what_is_used_and_no_more_than_the_context(prompt_len, output_len):
    """None is too small, and the power of two wastes at most as much as the answer is long."""
    used = prompt_len + output_len
    assert reserve_true_length(prompt_len, output_len, 200) == used
    assert used <= reserve_pow2(prompt_len, output_len, 200) <= min(200, used + output_len)
    assert reserve_max(prompt_len, output_len, 200) == 200


@pytest.mark.parametrize("make", [BestFitAllocator, BuddyAllocator])
def test_no_memory_and_no_slots_are_refused(make):
    with pytest.raises(ValueError, match="at least 1 slot"):
        make(0)
    with pytest.raises(ValueError, match="at least 1 slot"):
        make(8).allocate(0)
