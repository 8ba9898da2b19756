"""A simulation is the engine's own run: the same blocks at every step, and every slot accounted for."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference.batching.config import EngineConfig
from reference.batching.engine import Engine
from reference.batching.request import Request, SamplingParams
from reference.memory.beam_forks import BeamForks, record
from reference.memory.simulator import Clock, LinearStepTime, SimulatedRunner, Simulation, StepTime
from reference.model.decoder import Decoder
from twofold.conformance.strategies.batching import engine_for
from twofold.conformance.strategies.model import random_model

SETTINGS = {"num_blocks": 24, "max_model_len": 40, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 16}
STEP_TIME = LinearStepTime(1.0, 0.25)
OUTCOMES = {"time", "schedule_time", "launch_time", "wait_time", "update_time", "output"}


@cache
def decoder() -> Decoder:
    config, tensors = random_model("llama", num_layers=1, vocab_size=61, eos_token_ids=(2, 3))
    return Decoder(config, tensors, backend=reference)


class Timed:
    """A runner that computes, and lets the simulated time pass."""

    def __init__(self, runner, simulated):
        self.runner, self.simulated = runner, simulated
        self.vocab_size = runner.vocab_size

    def launch(self, batch):
        self.simulated.launch(batch)
        return self.runner.launch(batch)


asked = st.lists(
    st.tuples(
        st.integers(0, 8),  # tokens of a common beginning
        st.integers(1, 9),  # and of its own
        st.integers(1, 20),  # output
        st.sampled_from([1, 1, 2, 3]),  # samples
        st.sampled_from([0.0, 0.0, 1.3, 6.0]),  # seconds after the one before
    ),
    min_size=1,
    max_size=8,
)


def requests(asked):
    made, now = [], 0.0
    for index, (shared, own, output_len, n, after) in enumerate(asked):
        now += after
        params = SamplingParams(n=n, max_tokens=output_len, ignore_eos=True, seed=index)
        prompt = [4 + i for i in range(shared)] + [20 + index] * own
        made.append(Request(str(index), prompt, params, arrival_time=now))
    return made


def block_by_block(trace):
    """What is in a trace but times and the values of tokens."""
    return [{k: v for k, v in r.items() if k not in OUTCOMES} for r in trace if r["kind"] == "step"]


@given(asked, st.sampled_from(["recompute", "swap"]), st.sampled_from([24, 12]))
@settings(max_examples=30)
def test_the_paged_run_is_the_engines_own_trace(asked, preemption, num_blocks):
    """A real model on the same requests: the same sequences in the same blocks at every step.

    Prefixes are shared where no request has several samples: two of a small model often say the same, and would be
    found by each other.
    """
    traces = [], []
    caching = all(n == 1 for _, _, _, n, _ in asked)
    changes = {"preemption": preemption, "num_blocks": num_blocks, "enable_prefix_caching": caching}
    engine = engine_for(decoder(), **(SETTINGS | changes))
    for trace, is_real in zip(traces, (False, True)):
        simulation = Simulation(engine.config, STEP_TIME, trace=trace.append)
        if is_real:
            simulation.engine.runner = Timed(engine.runner, simulation.engine.runner)
        for _ in simulation.run(requests(asked)):
            pass
    assert block_by_block(traces[0]) == block_by_block(traces[1])
    assert len(block_by_block(traces[0])) > 0


@pytest.mark.parametrize("num_beams", [2, 3])
def test_replayed_beams_hold_the_blocks_that_the_models_beams_held(num_beams):
    """Recorded from a model and replayed in place: the same blocks at every step."""
    prompt, num_tokens = [5, 9, 17, 4, 30], 24
    recorder = engine_for(decoder(), **(SETTINGS | {"enable_prefix_caching": False}))
    (steps,) = record(recorder, [prompt], num_beams=num_beams, num_tokens=num_tokens)
    assert len(steps) == num_tokens - 2, "a step for each token but the first, which all fork from, and the last"
    assert any(len(set(parents)) < num_beams for parents in steps), "no beam ever forked"
    start = len(prompt) + 1  # the position that the first recorded step decides
    in_place = [steps[(step - start) % len(steps)] for step in range(len(steps))]
    forks = BeamForks("small", {num_beams: [in_place]})

    traces = [], []
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, seed=0)
    engine = engine_for(decoder(), **(SETTINGS | {"enable_prefix_caching": False}))
    for trace, is_real in zip(traces, (False, True)):
        simulation = Simulation(engine.config, STEP_TIME, forks=forks, trace=trace.append)
        if is_real:
            simulation.engine.runner = Timed(engine.runner, simulation.engine.runner)
        for _ in simulation.run([Request("a", prompt, params, num_beams=num_beams, arrival_time=0.0)]):
            pass
    assert block_by_block(traces[0]) == block_by_block(traces[1])


@given(asked, st.sampled_from([0, 0, 2]), st.sampled_from([1, 4]), st.booleans())
@settings(max_examples=60)
def test_slots_held_are_tokens_and_waste_on_every_step(asked, num_beams, block_size, caching):
    """Counted slot by slot from the tables of all sequences: a shared slot once."""
    config = EngineConfig(**(SETTINGS | {"block_size": block_size, "num_blocks": 96 // block_size}))
    config = replace(config, enable_prefix_caching=caching)
    forks = BeamForks("by hand", {2: [[[0, 1], [0, 0], [1, 0], [1, 1]]]})
    simulation = Simulation(config, STEP_TIME, forks=forks)
    scheduler = simulation.engine.scheduler
    seen = []

    def look(batch, observe=simulation._look):
        observe(batch)
        tables = [seq.tables[0] for request in scheduler.running for seq in request.live if seq.tables]
        tokens = {int(slot) for table in tables for slot in table.slots(0, table.num_tokens)}
        held = {block for table in tables for block in table.block_ids}
        seen.append((len(tokens), len(held), sum(len(table.block_ids) for table in tables)))

    simulation.engine.runner.on_launch = look
    wanted = requests(asked)
    if num_beams:
        wanted = [
            Request(r.request_id, r.prompt_token_ids, replace(r.params, n=1), num_beams=2, arrival_time=r.arrival_time)
            for r in wanted
        ]
    for step in simulation.run(wanted):
        memory, (tokens, held, in_tables) = step.memory, seen[-1]
        slots = memory.slots
        assert (memory.used_blocks, memory.table_blocks) == (held, in_tables)
        assert slots.tokens == tokens
        assert slots.tokens + slots.internal == held * block_size, "slots held are not tokens and waste"
        assert slots.tokens + slots.reserved + slots.internal + slots.external == 96, "slots were lost"
    assert scheduler.space.pools[0].num_free == 96 // block_size


def test_a_step_takes_what_its_bytes_and_operations_take():
    """OPT-13B on an A100, by hand: 26 GB at 1555 GB/s, or two operations a weight and token; then 800 KiB a token."""
    step_time = StepTime(13e9, 819_200, 1555e9, 312e12)
    config = EngineConfig(num_blocks=100, max_model_len=1024, block_size=16, max_num_batched_tokens=512)
    ask = SamplingParams(max_tokens=2, ignore_eos=True)
    prompt_step, decode_step = Simulation(config, step_time).run([Request("a", [1] * 500, ask, arrival_time=0.0)])
    assert prompt_step.time == pytest.approx(2 * 13e9 * 500 / 312e12 + 500 * 819_200 / 1555e9)
    assert decode_step.time - prompt_step.time == pytest.approx(26e9 / 1555e9 + 501 * 819_200 / 1555e9)
    assert (prompt_step.num_output_tokens, prompt_step.num_finished, decode_step.num_finished) == (1, 0, 1)


def test_time_passes_until_somebody_comes():
    """An idle engine waits for the next arrival."""
    config = EngineConfig(**SETTINGS)
    ask = SamplingParams(max_tokens=1, ignore_eos=True)
    steps = [*Simulation(config, LinearStepTime(0.5)).run([Request("a", [1], ask, arrival_time=7.0)])]
    assert [step.time for step in steps] == [7.5]


def test_beams_without_a_recording_are_an_error():
    """It is raised, not reported as a failed request."""
    config = EngineConfig(**SETTINGS)
    beam = Request("a", [1], SamplingParams(max_tokens=3, ignore_eos=True), num_beams=2, arrival_time=0.0)
    with pytest.raises(ValueError, match="expected a recording"):
        list(Simulation(config, STEP_TIME).run([beam]))


def test_requests_without_end_are_taken_as_they_are_wanted():
    """Behind a long queue they wait outside, and are served in their order all the same."""
    taken = []

    def without_end():
        for index in range(10_000):
            taken.append(index)
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            yield Request(str(index), [1, 2], params, arrival_time=0.0)

    engine = Engine(EngineConfig(**SETTINGS), SimulatedRunner(Clock(), STEP_TIME))
    assert engine.runner.vocab_size > 10_000
    steps = Simulation(EngineConfig(**SETTINGS), STEP_TIME).run(without_end())
    running = np.array([next(steps).memory.num_running for _ in range(20)])
    assert len(taken) < 200
    assert running.min() == 8, "somebody is always waiting"
