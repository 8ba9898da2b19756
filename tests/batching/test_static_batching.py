"""Static and dynamic batches: the tokens of continuous batching, in a number of steps that is known beforehand."""

import numpy as np
import pytest

from reference.batching.config import EngineConfig
from reference.batching.engine import Engine
from reference.batching.request import Request, SamplingParams
from reference.batching.static_batching import StaticScheduler
from twofold.conformance.strategies.batching import FakeModel, FakeRunner, nothing_is_left, run_all

LENGTHS = [int(n) for n in np.exp(np.random.default_rng(0).uniform(np.log(2), np.log(40), 20))]


def make_engine(*, static: bool, max_wait: float = 0.0, clock=lambda: 0.0, slots: int = 4) -> Engine:
    config = EngineConfig(
        num_blocks=200, max_model_len=64, block_size=4, max_num_seqs=slots, enable_prefix_caching=False
    )
    scheduler = StaticScheduler(config, max_wait=max_wait) if static else None
    return Engine(config, FakeRunner(FakeModel(), config), scheduler=scheduler, clock=clock)


def requests(lengths=LENGTHS, arrivals=None) -> list[Request]:
    return [
        Request(
            f"{i}", [i % 31, 3], SamplingParams(max_tokens=n, seed=i), arrival_time=arrivals[i] if arrivals else 0.0
        )
        for i, n in enumerate(lengths)
    ]


def test_steps_are_the_longest_of_each_batch():
    """A static batch takes as many steps as its longest sequence has tokens; every step computes all of its rows."""
    engine = make_engine(static=True)
    run_all(engine, requests())
    batches = [LENGTHS[i : i + 4] for i in range(0, len(LENGTHS), 4)]
    assert engine.metrics.num_steps == sum(map(max, batches))
    sizes = [len(batch.seq_ids) for batch in engine.runner.steps]
    assert sizes == [len(batch) for batch in batches for _ in range(max(batch))], "rows that ended left the batch"
    nothing_is_left(engine)


def test_continuous_batching_needs_fewer_steps_for_the_same_tokens():
    """The same requests, the same tokens; as soon as a sequence ends another takes its place."""
    static, continuous = make_engine(static=True), make_engine(static=False)
    expected, got = run_all(static, requests()), run_all(continuous, requests())
    assert {i: r.outputs[0].token_ids for i, r in got.items()} == {
        i: r.outputs[0].token_ids for i, r in expected.items()
    }
    assert continuous.metrics.num_steps >= sum(LENGTHS) / 4
    assert continuous.metrics.num_steps < 0.75 * static.metrics.num_steps
    nothing_is_left(continuous)


def test_a_dynamic_batch_is_closed_when_full_or_when_the_oldest_has_waited():
    """Nothing runs before the window has passed, unless the batch is full."""
    time = 0.0
    engine = make_engine(static=True, max_wait=1.0, clock=lambda: time)
    few = requests([2, 2], arrivals=[0.0, 0.5])
    for request in few:
        engine.add(request)
    time = 0.9
    assert engine.step().step == -1, "the batch was closed too early"
    time = 1.0
    assert len(engine.step().sequences) == 2, "the batch was not closed in time"
    while engine.has_unfinished():
        engine.step()
    time = 5.0
    for i in range(4):
        engine.add(Request(f"now {i}", [i], SamplingParams(max_tokens=2), arrival_time=5.0))
    assert len(engine.step().sequences) == 4, "a full batch waited"
    engine.add(Request("late", [1], SamplingParams(max_tokens=1), arrival_time=5.0))
    assert len(engine.step().sequences) == 4
    assert engine.step().step == -1, "who comes late joins the next batch"
    time = 6.0
    assert [output.request_id for output in engine.step().finished] == ["late"]
    nothing_is_left(engine)


def test_aborting_a_member_leaves_its_row_to_the_batch():
    """An aborted sequence's row is computed on; when all have ended the memory comes back."""
    engine = make_engine(static=True)
    for request in requests([5, 9, 3]):
        engine.add(request)
    engine.step()
    engine.abort("1")
    assert len(engine.step().sequences) == 2
    while engine.has_unfinished():
        engine.step()
    assert {len(batch.seq_ids) for batch in engine.runner.steps} == {3}
    assert engine.metrics.num_steps == 5
    nothing_is_left(engine)


def test_a_wait_without_end_is_refused():
    """A window that never closes is a mistake."""
    config = EngineConfig(num_blocks=8, max_model_len=8)
    for max_wait in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_wait"):
            StaticScheduler(config, max_wait=max_wait)
