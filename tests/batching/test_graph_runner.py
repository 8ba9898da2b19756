"""The runner of `fast`: what it gives is what the plain runner gives, recorded or not.

It needs tensors, not kernels: most of these tests run on plain torch, which is quick on a CPU. There a recorded step is
computed again instead of replayed, so that what pads it is tested too; on a GPU they are graphs.
"""

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
from fast._runner.staging import Layout, host_buffer, to_device
from fast._runner.step import StepShape, bucket
from fast.runner import GraphRunner
from reference.batching.drafting import NgramDrafter
from reference.batching.request import FinishReason, Request, SamplingParams
from reference.batching.runner import ModelRunner
from reference.model.decoder import Decoder
from twofold.conformance import plain_torch
from twofold.conformance.strategies.batching import engine_for, nothing_is_left, run_all
from twofold.conformance.strategies.model import random_model

FORMATS = ("float32", "int8", "kivi4")


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
        "preemption": draw(st.sampled_from(["recompute", "swap"]), label="preemption"),
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
    times = {"time", "schedule_time", "launch_time", "wait_time", "update_time", "metrics"}
    return outputs, [{key: value for key, value in record.items() if key not in times} for record in records]


def agree(model: Decoder, job, recorded: int, kv_format: str, drafter: bool = False) -> None:
    requests, engine_settings = job
    engine_settings = engine_settings | {"kv_format": kv_format, "drafter": drafter}
    ours, trace = run(model, partial(GraphRunner, recorded=recorded), requests, **engine_settings)
    plain, expected = run(model, ModelRunner, requests, **engine_settings)
    for name, output in plain.items():
        assert ours[name].error is None, f"request {name}: {ours[name].error}"
        for got, wanted in zip(ours[name].outputs, output.outputs, strict=True):
            assert got.token_ids == wanted.token_ids, f"request {name}"
            assert got.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, abs=1e-4)
            for mine, its in zip(got.logprobs or (), wanted.logprobs or (), strict=True):
                assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)
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


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("backend", [fast])
@given(job=jobs(), kv_format=st.sampled_from(FORMATS))
@settings(max_examples=300)
def test_on_kernels(backend, job, kv_format):
    """The same over kernels; on a GPU from graphs."""
    agree(decoder(backend), job, 512, kv_format)


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
        shape = StepShape(num_seqs, num_seqs, num_seqs, 5, False, False, False).padded(256)
        assert num_seqs <= shape.num_seqs == shape.num_tokens == shape.num_rows <= max(2 * num_seqs - 1, num_seqs + 15)
    for num_tokens in range(2, 513):
        shape = StepShape(num_tokens, 1, 0, 70, False, False, False).padded(256)
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
