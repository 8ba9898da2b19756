"""The runner of `fast`: what it gives is what the plain runner gives, recorded or not.

It needs tensors, not kernels: most of these tests run on plain torch, which is quick on a CPU. There a recorded step is
computed again instead of replayed, so that what pads it is tested too; on a GPU they are graphs. The runners cut their
batches in different ways, and so may round differently, except on batch-invariant kernels: there all is equal.
"""

import gc
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
from fast._runner.staging import Layout, host_buffer, to_device
from fast._runner.step import StepShape, bucket
from fast.runner import GraphRunner
from reference.batching.drafting import NgramDrafter
from reference.batching.request import FinishReason, Request, SamplingParams
from reference.batching.runner import ModelRunner
from reference.memory.arena import PlannedBackend
from reference.model.decoder import Decoder
from twofold.conformance import plain_torch
from twofold.conformance.strategies.batching import engine_for, nothing_is_left, preemptions, run_all
from twofold.conformance.strategies.model import random_model

FORMATS = ("float32", "int8", "kivi4")


@pytest.fixture(autouse=True, scope="module")
def graphs():
    """On a GPU, values are not looked at here: a step in which they are cannot be recorded."""
    with pytest.MonkeyPatch.context() as patched:
        if torch.cuda.is_available():
            patched.setenv("TWOFOLD_CHECK", "0")
        yield


@cache
def decoder(backend: Any = plain_torch, family: str = "qwen3") -> Decoder:
    config, tensors = random_model(family, num_layers=1, vocab_size=61, eos_token_ids=(2, 3))
    return Decoder(config, tensors, backend=backend)


@st.composite
def jobs(draw):
    """Requests of every kind, and settings under which they get into each other's way."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="seed of the prompts"))
    requests = []
    for i in range(draw(st.integers(1, 4), label="num_requests")):
        prompt = rng.integers(4, 61, rng.integers(1, 20)).tolist()
        kind = draw(st.sampled_from(["draw", "samples", "beams", "penalized", "reported"]), label="kind")
        params = SamplingParams(
            temperature=0.0
            if kind == "beams"
            else 0.9
            if kind == "samples"
            else draw(st.sampled_from([0.0, 0.8]), label="temperature"),
            n=3 if kind == "samples" else 1,
            seed=draw(st.integers(0, 9), label="seed"),
            top_p=draw(st.sampled_from([1.0, 0.8]), label="top_p"),
            max_tokens=draw(st.integers(1, 10), label="max_tokens"),
            frequency_penalty=0.7 if kind == "penalized" else 0.0,
            logit_bias={7: 2.0} if kind == "penalized" else None,
            logprobs=2 if kind == "reported" else None,
        )
        requests.append((f"{i}", prompt, params, {"num_beams": 3} if kind == "beams" else {}))
    return requests, {
        "num_blocks": draw(st.sampled_from([16, 60]), label="num_blocks"),
        "max_num_batched_tokens": draw(st.sampled_from([7, 64]), label="max_num_batched_tokens"),
        **draw(preemptions(), label="preemption"),
        "enable_prefix_caching": draw(st.booleans(), label="enable_prefix_caching"),
        "lookahead": draw(st.integers(0, 1), label="lookahead"),
        "watermark": 0.0,
    }


def run(model: Decoder, runner, requests, drafter: bool = False, **engine_settings):
    """The outputs of an engine with this runner, and the records of its trace without their times."""
    records: list[dict[str, Any]] = []
    more = {"drafter": NgramDrafter(3, backend=model.backend)} if drafter else {}
    engine = engine_for(model, runner=runner, max_model_len=48, trace=records.append, **more, **engine_settings)
    outputs = run_all(engine, [Request(name, prompt, params, **kind) for name, prompt, params, kind in requests])
    nothing_is_left(engine)
    times = {"time", "schedule_time", "launch_time", "wait_time", "update_time", "device_time", "metrics"}
    return outputs, [{key: value for key, value in record.items() if key not in times} for record in records]


def agree(model: Decoder, job, recorded: int, kv_format: str, *, drafter: bool = False, rounding: float = 1e-4) -> None:
    """Two runners on the same requests. ``rounding``: how far log-probabilities may be apart."""
    requests, engine_settings = job
    engine_settings = engine_settings | {"kv_format": kv_format, "drafter": drafter}
    ours, trace = run(model, partial(GraphRunner, recorded=recorded), requests, **engine_settings)
    plain, expected = run(model, ModelRunner, requests, **engine_settings)
    for name, output in plain.items():
        assert ours[name].error is None, f"request {name}: {ours[name].error}"
        for got, wanted in zip(ours[name].outputs, output.outputs, strict=True):
            assert got.token_ids == wanted.token_ids, f"request {name}"
            if wanted.cumulative_logprob is not None:
                assert abs(got.cumulative_logprob - wanted.cumulative_logprob) <= len(got.token_ids) * rounding
            for mine, its in zip(got.logprobs or (), wanted.logprobs or (), strict=True):
                assert abs(mine.logprob - its.logprob) <= rounding
                assert mine.rank == its.rank
    assert trace == expected, "scheduled otherwise"


@given(jobs(), st.sampled_from([0, 512]), st.sampled_from(FORMATS))
@settings(max_examples=100)
def test_gives_what_the_plain_runner_gives(job, recorded, kv_format):
    """Tokens, log-probabilities and the whole trace of requests of every kind, in company and out of memory."""
    agree(decoder(), job, recorded, kv_format)


@given(jobs(), st.sampled_from([0, 512]))
@settings(max_examples=50)
def test_speculates_as_the_plain_runner_does(job, recorded):
    """Drafts looked up in the text are verified on the device."""
    agree(decoder(), job, recorded, "float32", drafter=True)


PLANNED = PlannedBackend(plain_torch)


@given(jobs(), st.sampled_from(FORMATS))
@settings(max_examples=50)
def test_an_arena_changes_nothing(job, kv_format):
    """Recorded steps of all shapes compute in the same bytes: everything that they give is the same, bit for bit."""
    requests, engine_settings = job
    found = []
    for backend in (plain_torch, PLANNED):
        outputs, trace = run(decoder(backend), GraphRunner, requests, kv_format=kv_format, **engine_settings)
        answers = {name: (output.outputs, output.error) for name, output in outputs.items()}
        found.append((answers, trace))
    assert found[0] == found[1]


def test_recorded_steps_share_an_arena(monkeypatch):
    """Steps of a shape that was met before compute in one arena, whatever their shape, and it is as large as the plan
    of the largest: no larger than what one op wants at once."""
    plans, arenas, in_arena = [], [], PLANNED.run

    def spy(step, plan, arena):
        plans.append(plan.memory)
        arenas.append(arena)
        return in_arena(step, plan, arena)

    monkeypatch.setattr(PLANNED, "run", spy)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    requests = [(name, [5] * 40, params, {}) for name in "ab"]
    run(decoder(PLANNED), GraphRunner, requests, max_num_seqs=1, enable_prefix_caching=False, kv_format="float32")
    assert len({plan.num_bytes for plan in plans}) == 2, "a step of the prompt, and one of a token"
    assert all(plan.num_bytes == plan.bound for plan in plans)
    assert {len(arena) for arena in arenas} == {max(plan.num_bytes for plan in plans)}


@pytest.mark.needs("interpreter")
@pytest.mark.interpreted(2)
@pytest.mark.parametrize("backend", [fast])
@given(job=jobs(), kv_format=st.sampled_from(FORMATS))
def test_on_interpreted_kernels(backend, job, kv_format):
    """The same over kernels."""
    agree(decoder(backend), job, 512, kv_format)


PLANNED_INVARIANT = PlannedBackend(fast.invariant)


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("invariant", [fast.invariant, PLANNED_INVARIANT], ids=["", "in an arena"])
@given(job=jobs(), kv_format=st.sampled_from(FORMATS))
@settings(max_examples=150)
def test_from_graphs_bit_for_bit(invariant, job, kv_format):
    """On a GPU the runner replays graphs, a step ahead, and pads: batch-invariant kernels give the same bits."""
    agree(decoder(invariant), job, 512, kv_format, rounding=0)


class Failing:
    """A backend whose draws fail while they are told to."""

    def __init__(self, backend: Any, error: Callable[[], Any]):
        self.backend, self.error, self.fails = backend, error, False

    def __getattr__(self, name: str) -> Any:
        return self._sample if name == "sample" else getattr(self.backend, name)

    def _sample(self, *args: Any) -> Any:
        if self.fails:
            self.error()
        return self.backend.sample(*args)


def check_failure(model: Decoder, error: Callable[[], Any], says: str) -> None:
    """A step fails, and with it the requests in flight, by name; those after them, and another engine, do not."""
    failing = Failing(model.backend, error)
    engine = engine_for(model, lookahead=1)
    engine.runner = GraphRunner(model, engine.runner.cache)
    engine.runner.backend = failing
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    alone = run_all(engine_for(model), [Request("alone", [5, 6, 7], params)])["alone"].outputs[0].token_ids

    engine.add(Request("first", [5, 6, 7], params))
    engine.step()
    failing.fails = True
    engine.add(Request("second", [5, 6, 7, 8, 9], params))  # another shape: it has to be computed, not replayed
    failed: dict[str, Any] = {}
    while engine.has_unfinished():
        failed |= {output.request_id: output for output in engine.step().finished}
    assert set(failed) == {"first", "second"}
    assert all(says in output.error and output.outputs[0].finish_reason == "error" for output in failed.values())
    assert says in str(engine.failure)
    nothing_is_left(engine)

    failing.fails = False
    for other in (engine, engine_for(model, runner=GraphRunner)):
        again = run_all(other, [Request("again", [5, 6, 7], params)])["again"]
        assert again.error is None
        assert again.outputs[0].token_ids == alone


def test_a_step_that_fails_takes_nobody_with_it_who_comes_later():
    def fail():
        raise RuntimeError("the device has had enough")

    check_failure(decoder(), fail, "the device has had enough")


@pytest.mark.needs("gpu")
def test_memory_that_runs_out_in_a_step_is_such_a_failure():
    check_failure(
        decoder(fast.invariant), lambda: torch.empty(1 << 45, dtype=torch.uint8, device="cuda"), "OutOfMemory"
    )


@pytest.mark.needs("gpu")
def test_a_step_that_cannot_be_recorded_is_such_a_failure():
    def look_at_a_value():
        if torch.cuda.is_current_stream_capturing():
            torch.zeros(1, device="cuda").item()

    stream = torch.cuda.current_stream()
    check_failure(decoder(fast.invariant), look_at_a_value, "CUDA error")
    assert torch.cuda.current_stream() == stream


@pytest.mark.needs("gpu")
def test_an_engine_thrown_away_does_not_end_a_recording(monkeypatch):
    """Its graphs are garbage that may be collected at any time, but not between the kernels of another's recording."""
    model, params = decoder(fast.invariant), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    engine = engine_for(model, runner=GraphRunner)
    run_all(engine, [Request("old", [5, 6, 7], params)])
    cycle: list[Any] = [engine]
    cycle.append(cycle)
    sample, collected = fast.invariant.sample, []

    def collecting(*args: Any) -> Any:
        if torch.cuda.is_current_stream_capturing() and gc.isenabled():
            collected.append(gc.collect())
        return sample(*args)

    del engine, cycle
    monkeypatch.setattr(fast.invariant, "sample", collecting)
    new = engine_for(model, runner=GraphRunner)
    assert run_all(new, [Request("new", [5, 6, 7], params)])["new"].error is None
    assert not collected, "a collection was possible"


@pytest.mark.needs("gpu")
def test_device_memory_does_not_grow():
    """The second time everything that is kept is there already; aborted requests leave nothing."""
    model = decoder(fast.invariant)
    engine = engine_for(model, runner=GraphRunner, lookahead=1, num_blocks=24, preemption="swap", watermark=0.0)

    def soak() -> int:
        rng = np.random.default_rng(0)
        for i in range(200):
            params = SamplingParams(n=1 + i % 2, temperature=0.9, seed=i, max_tokens=1 + i % 9)
            engine.add(Request(f"{i}", rng.integers(4, 61, 1 + i % 17).tolist(), params))
        steps = 0
        while engine.has_unfinished():
            engine.step()
            steps += 1
            if steps % 3 == 0:
                engine.abort(f"{rng.integers(200)}")
        nothing_is_left(engine)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = soak()
    assert soak() == first


def test_more_draws_than_there_is_room_for_are_refused():
    """Tokens in flight are kept in a fixed place."""
    engine = engine_for(decoder(), runner=partial(GraphRunner, most_seqs=1))
    outputs = run_all(engine, [Request(f"{i}", [5, 6], SamplingParams(max_tokens=2)) for i in range(2)])
    assert all("at most 1 draws" in output.error for output in outputs.values())


def test_a_row_that_is_not_finite_fails_alone(monkeypatch):
    """Its request ends with an error that says so; the others do not notice."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")  # as an engine runs: nothing looks at values on the way
    config, tensors = random_model("llama", num_layers=1, vocab_size=61, eos_token_ids=(2, 3))
    tensors = dict(tensors)
    table = tensors["model.embed_tokens.weight"].copy()
    table[9] = np.nan
    tensors["model.embed_tokens.weight"] = table
    model = Decoder(config, tensors | {"lm_head.weight": np.ones_like(table)}, backend=fast)
    engine = engine_for(model, runner=GraphRunner)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    results = run_all(engine, [Request("bad", [5, 9], params), Request("good", [5, 6], params)])
    assert results["bad"].outputs[0].finish_reason == FinishReason.ERROR
    assert "not finite" in results["bad"].error
    assert len(results["good"].outputs[0].token_ids) == 4


def test_buckets_hold_what_they_are_for():
    """A step fits into its bucket, and no bucket is much larger than what falls into it."""
    for num_seqs in range(1, 257):
        shape = StepShape(num_seqs, num_seqs, num_seqs, 5, False, False, False).padded()
        assert num_seqs <= shape.num_seqs == shape.num_tokens == shape.num_rows <= max(2 * num_seqs - 1, num_seqs + 15)
    for num_tokens in range(2, 513):
        shape = StepShape(num_tokens, 1, 0, 70, False, False, False).padded()
        assert num_tokens <= shape.num_tokens <= max(16, 2 * num_tokens - 1)
        assert (shape.num_seqs, shape.num_rows, shape.num_blocks) == (2, 2, 128)
    assert bucket(0) == 1


def test_arrays_lie_where_the_layout_says():
    """What is written on the host is read on the device, each array in its own place."""
    device = decoder().cos.device
    layout = Layout(
        {"a": (np.int32, (3,)), "b": (np.int64, (2, 2)), "none": (np.float32, (0,)), "c": (np.float32, (1,))}
    )
    host = host_buffer(layout.num_bytes, device)
    for i, array in enumerate(layout.arrays(host).values()):
        array[...] = i + 1
    tensors = layout.tensors(host.to(device))
    assert [tensor.unique().tolist() for tensor in tensors.values()] == [[1], [2], [], [4]]
    assert all(column.start % 16 == 0 for column in layout.columns.values())
    assert to_device(np.arange(3), device).tolist() == [0, 1, 2]
