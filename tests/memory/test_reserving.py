"""Requests that reserve: in pieces of their own, in the order of their arrival, until they end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.batching.config import EngineConfig
from reference.batching.request import Request, SamplingParams
from reference.memory.allocators import (
    BestFitAllocator,
    BuddyAllocator,
    reserve_max,
    reserve_pow2,
    reserve_true_length,
)
from reference.memory.reserving import ReservingScheduler
from reference.memory.simulator import LinearStepTime, Simulation

CONFIG = EngineConfig(num_blocks=1, max_model_len=32, block_size=4, max_num_batched_tokens=16, max_num_seqs=8)
SECOND = LinearStepTime(1.0)


def ask(name, prompt_len, output_len, arrival_time=0.0):
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    return Request(name, [1] * prompt_len, params, arrival_time=arrival_time)


@given(
    st.sampled_from([BestFitAllocator, BuddyAllocator]),
    st.sampled_from([reserve_max, reserve_pow2, reserve_true_length]),
    st.integers(32, 90),
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=12),
)
def test_every_slot_is_one_thing_on_every_step(make, reserve, num_slots, lengths):
    """Tokens, room for later, room for nothing, nobody's: counted from the requests they are all there is."""
    scheduler = ReservingScheduler(CONFIG, make(num_slots), reserve)
    simulation = Simulation(CONFIG, SECOND, scheduler=scheduler)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i][2])
    requests = [ask(str(i), *lengths[i]) for i in order]
    admitted: list[str] = []
    for step in simulation.run(requests):
        slots = step.memory.slots
        assert slots.tokens + slots.reserved + slots.internal + slots.external == num_slots
        assert min(slots.tokens, slots.reserved, slots.internal, slots.external) >= 0
        assert scheduler.allocator.num_free == num_slots - sum(e.size for e in scheduler.extents.values())
        assert set(scheduler.extents) == set(scheduler.running), "who runs has a piece, and nobody else"
        admitted += [request.request_id for request in scheduler.running if request.request_id not in admitted]
    assert all(request.metrics.num_preemptions == 0 for request in requests), "what is reserved is not taken away"
    assert scheduler.allocator.num_free == num_slots, "a piece was lost"
    started = [request.metrics.first_scheduled_time for request in requests]
    assert started == sorted(started), "first come is not first served"


def test_what_is_reserved_is_what_the_reservation_says():
    """By hand: 5 tokens in and 3 out, of a context of 32, in 64 slots."""
    for reserve, reserved, internal in ((reserve_max, 3, 24), (reserve_pow2, 3, 1), (reserve_true_length, 3, 0)):
        scheduler = ReservingScheduler(CONFIG, BestFitAllocator(64), reserve)
        first = next(iter(Simulation(CONFIG, SECOND, scheduler=scheduler).run([ask("a", 5, 3)])))
        slots = first.memory.slots
        assert (slots.tokens, slots.reserved, slots.internal) == (5, reserved, internal)
        assert slots.external == 64 - 5 - reserved - internal


def test_one_that_finds_no_gap_keeps_all_behind_it_waiting():
    """First come, first served: the small one behind it would have fitted."""
    scheduler = ReservingScheduler(CONFIG, BestFitAllocator(32), reserve_true_length)
    simulation = Simulation(CONFIG, SECOND, scheduler=scheduler)
    steps = simulation.run([ask("a", 16, 4), ask("b", 16, 4), ask("c", 1, 1)])
    next(steps)
    assert [request.request_id for request in scheduler.extents] == ["a"]
    assert [request.request_id for request in scheduler.waiting] == ["b", "c"]


def test_what_can_never_fit_is_refused():
    """A memory smaller than what is reserved; several sequences, of which each would want a piece."""
    scheduler = ReservingScheduler(CONFIG, BestFitAllocator(20), reserve_max)
    with pytest.raises(ValueError, match="reserves 32 slots of a memory of 20"):
        scheduler.add(ask("a", 5, 3))
    scheduler = ReservingScheduler(CONFIG, BestFitAllocator(64), reserve_max)
    with pytest.raises(ValueError, match="2 sequences"):
        scheduler.add(Request("a", [1], SamplingParams(n=2)))
    assert not scheduler.waiting
