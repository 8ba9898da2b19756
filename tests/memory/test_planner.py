"""A plan of memory, on lifetimes as such."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.memory.planner import Lifetime, largest_live_set, plan_memory
from twofold.conformance.properties import planner as properties
from twofold.conformance.strategies.planner import chains, graphs

alignments = st.sampled_from([1, 1, 8])


@settings(max_examples=200)
@given(graphs(), alignments)
def test_no_two_that_are_wanted_at_once_share_a_byte(lifetimes, alignment):
    plan = plan_memory(lifetimes, alignment=alignment)
    properties.every_tensor_keeps_its_bytes(lifetimes, plan)
    assert not any(offset % alignment for offset in plan.offsets)


@settings(max_examples=200)
@given(graphs())
def test_never_worse_than_the_sum(lifetimes):
    properties.a_plan_is_between_the_bound_and_the_total(lifetimes, plan_memory(lifetimes, alignment=1))


@settings(max_examples=200)
@given(chains(), alignments)
def test_a_chain_takes_what_its_largest_neighbours_take(lifetimes, alignment):
    plan = plan_memory(lifetimes, alignment=alignment)
    properties.every_tensor_keeps_its_bytes(lifetimes, plan)
    assert plan.num_bytes == plan.bound


@given(st.integers(1, 9), st.integers(1, 9))
def test_what_is_written_over_costs_nothing(length, size):
    """Ops that write over their arguments: all in the bytes of the first."""
    chain = [Lifetime(size, op, op + 1, op - 1 if op else None) for op in range(length)]
    plan = plan_memory(chain, alignment=1)
    assert plan.num_bytes == plan.bound == size
    assert set(plan.offsets) == {0}
    properties.every_tensor_keeps_its_bytes(chain, plan)


def test_what_is_wanted_later_is_not_written_over():
    """Nor is what is of another size, nor anything by two results of one op."""
    wanted = [Lifetime(4, 0, 2), Lifetime(4, 1, 2, over=0)]
    small = [Lifetime(4, 0, 1), Lifetime(5, 1, 2, over=0)]
    twice = [Lifetime(4, 0, 1), Lifetime(4, 1, 2, over=0), Lifetime(4, 1, 2, over=0)]
    assert [plan_memory(case, alignment=1).num_bytes for case in (wanted, small, twice)] == [8, 9, 8]


@pytest.mark.parametrize(
    "graph",
    [
        [(1, 1, 2), (8, 1, 3), (4, 2, 5), (9, 4, 4)],
        [(6, 1, 3), (8, 1, 1), (7, 3, 6), (9, 5, 8)],
        [(1, 0, 1), (7, 0, 0), (4, 1, 3), (7, 2, 5)],
        [(7, 0, 2), (7, 1, 3), (3, 2, 2), (1, 2, 3), (9, 3, 5)],
        [(2, 0, 2), (2, 2, 2), (4, 2, 5), (5, 5, 8)],
        [(6, 1, 2), (3, 1, 2), (6, 2, 5), (4, 2, 2), (4, 2, 4), (8, 2, 4), (3, 3, 4), (3, 3, 4), (2, 3, 4), (4, 4, 5),
         (3, 4, 4), (6, 8, 11)],
    ],
)  # fmt: skip
def test_gaps_are_used(graph):
    """Graphs of which each is planned within the bound, and would not be if a gap were missed, a larger one taken, or
    another order."""
    plan = plan_memory([Lifetime(*tensor) for tensor in graph], alignment=1)
    assert plan.num_bytes == plan.bound


@given(graphs())
def test_sizes_count_rounded_up(lifetimes):
    """A plan in multiples of 8 is the plan of tensors that are as large."""
    rounded = [tensor._replace(num_bytes=(tensor.num_bytes + 7) // 8 * 8) for tensor in lifetimes]
    plan = plan_memory(lifetimes, alignment=8)
    assert plan.total == sum(tensor.num_bytes for tensor in rounded)
    assert plan == plan_memory(rounded, alignment=8)


def test_no_tensor_takes_no_memory():
    assert plan_memory([]).num_bytes == largest_live_set([]) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        [Lifetime(-1, 0, 1)],
        [Lifetime(1, 2, 1)],
        [Lifetime(1, 0, 1, over=0)],
        [Lifetime(1, 0, 1, over=1), Lifetime(1, 1, 2)],
        [Lifetime(1, 0, 1), Lifetime(1, 2, 3, over=0)],
        [Lifetime(1, 0, 1), Lifetime(1, 0, 3, over=0)],
    ],
)
def test_lifetimes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^plan_memory: lifetimes: expected "):
        plan_memory(wrong)
