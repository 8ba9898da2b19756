"""The trace says what happened, the same for every runner, and can be read back; metrics add up."""

import io
import json

import pytest

from reference.batching.config import EngineConfig
from reference.batching.engine import Engine
from reference.batching.metrics import PoolUsage, pool_usage
from reference.batching.request import Request, SamplingParams
from reference.batching.trace import TraceWriter, read_trace
from reference.kv_cache.block_pool import BlockPool
from reference.kv_cache.block_table import BlockTable
from twofold.conformance.strategies.batching import FakeModel, FakeRunner, run_all

TIMES = {"time", "schedule_time", "launch_time", "wait_time", "update_time", "device_time", "metrics"}


class Eager(FakeRunner):
    """A runner that executes at once."""

    def launch(self, batch):
        pending = super().launch(batch)
        self.results[batch.step] = self.execute(self.queue.popleft())
        return pending


def traced(runner_type, **settings):
    """A run with preemption, forks, hits and copies: its records, and its engine."""
    config = EngineConfig(**({"num_blocks": 12, "max_model_len": 30, "block_size": 4, "watermark": 0.0} | settings))
    file = io.StringIO()
    engine = Engine(config, runner_type(FakeModel(), config), trace=TraceWriter(file))
    prompt = list(range(9))
    run_all(
        engine,
        [
            Request("a", prompt, SamplingParams(max_tokens=12, seed=0)),
            Request("b", prompt, SamplingParams(max_tokens=12, seed=1, n=2)),
            Request("c", [5] * 6, SamplingParams(temperature=0, max_tokens=9), num_beams=2),
        ],
    )
    file.seek(0)
    return read_trace(file), engine


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_trace_does_not_depend_on_the_runner(lookahead, preemption):
    """A runner that works at once and one that works as late as it may give the same trace, but for the times."""
    late, engine = traced(FakeRunner, lookahead=lookahead, preemption=preemption)
    eager, _ = traced(Eager, lookahead=lookahead, preemption=preemption)
    assert engine.metrics.num_preemptions > 0, "nothing was preempted: the test shows little"

    def timeless(records):
        return [{key: value for key, value in record.items() if key not in TIMES} for record in records]

    assert timeless(late) == timeless(eager)


def test_the_trace_adds_up():
    """Every token that came out is in a step's output, every step in its order, every request has a beginning and an
    end; and what a step computes lies within the blocks it names."""
    records, engine = traced(FakeRunner, preemption="swap", lookahead=1)
    kinds = [record["kind"] for record in records]
    assert kinds[:4] == ["start", "add", "add", "add"]
    steps = [record for record in records if record["kind"] == "step"]
    ends = {record["request"]: record for record in records if record["kind"] == "end"}
    assert [step["step"] for step in steps] == list(range(len(steps)))
    assert len(steps) == engine.metrics.num_steps
    assert sum(step["num_tokens"] for step in steps) == engine.metrics.num_tokens
    assert set(ends) == {"a", "b", "c"}
    gained = {}
    for step in steps:
        assert step["num_tokens"] == sum(seq["tokens"] for seq in step["sequences"])
        for seq in step["sequences"]:
            assert len(seq["blocks"][0]) * 4 >= seq["start"] + seq["tokens"]
        for output in step["output"]:
            gained[output["request"]] = gained.get(output["request"], 0) + len(output["tokens"])
        for usage in step["pools"]:
            assert 0 <= usage["empty_slots"] <= usage["slots"] <= 12 * 4
    assert gained == {name: sum(o["tokens"] for o in ends[name]["outputs"]) for name in ("a", "b")}
    assert sum(len(step["preempted"]) for step in steps) == engine.metrics.num_preemptions
    out = [swap["key"] for step in steps for swap in step["swaps_out"]]
    back = [swap["key"] for step in steps for swap in step["swaps_in"]]
    assert sorted(out) == sorted(back), "not everything that was swapped out came back"
    assert out
    assert any(step["copies"] != [[]] for step in steps)


def test_what_is_no_trace_is_refused():
    """Another file, or a version from the future: one sentence."""
    with pytest.raises(ValueError, match="schema"):
        read_trace(io.StringIO('{"kind": "other"}\n'))
    with pytest.raises(ValueError, match="schema"):
        read_trace(io.StringIO(""))
    with pytest.raises(ValueError, match="version"):
        read_trace(io.StringIO(json.dumps({"schema": "twofold.trace", "version": 99})))


def test_request_metrics():
    """Waiting, first token, tokens after it, end: on the engine's clock."""
    time = 10.0
    config = EngineConfig(num_blocks=20, max_model_len=30, block_size=4, max_num_seqs=1)
    engine = Engine(config, FakeRunner(FakeModel(), config), clock=lambda: time)
    for name in "ab":
        engine.add(Request(name, [1, 2, 3], SamplingParams(max_tokens=3), arrival_time=time))
    finished = {}
    while engine.has_unfinished():
        time += 1.0
        finished |= {output.request_id: output.metrics for output in engine.step().finished}
    a, b = finished["a"], finished["b"]
    assert (a.queue_time, a.time_to_first_token, a.time_between_tokens, a.end_to_end_time) == (1.0, 1.0, 1.0, 3.0)
    assert (b.queue_time, b.time_to_first_token, b.time_between_tokens, b.end_to_end_time) == (4.0, 4.0, 1.0, 6.0)
    assert engine.metrics.num_output_tokens == a.num_output_tokens + b.num_output_tokens == 6
    new = Request("c", [1], arrival_time=0.0).metrics
    assert (new.queue_time, new.time_to_first_token, new.time_between_tokens, new.end_to_end_time) == (None,) * 4


def test_used_shared_and_wasted():
    """A shared block counts once; the waste is at the end of last blocks, by whoever fills a shared one most."""
    pool = BlockPool(10)
    a = BlockTable(pool, 4)
    a.append(6)
    b = a.fork()
    assert pool_usage(pool, [a, b], 4) == PoolUsage(used=2, shared=2, slots=8, empty_slots=2)
    b.append(3)  # a copy of the last block, and one more
    assert pool_usage(pool, [a, b], 4) == PoolUsage(used=4, shared=1, slots=16, empty_slots=2 + 3)


def test_the_peak_is_remembered():
    """The most blocks in use at once, and how much of them was empty then."""
    config = EngineConfig(num_blocks=20, max_model_len=30, block_size=4)
    engine = Engine(config, FakeRunner(FakeModel(), config))
    run_all(engine, [Request("a", [1] * 5, SamplingParams(max_tokens=5))])
    assert engine.metrics.peak_blocks == 3  # 5 + 4 tokens: the last one is never computed
    assert engine.metrics.empty_share == pytest.approx(3 / 12)
    assert engine.metrics.host_time_per_step > 0
