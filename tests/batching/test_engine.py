"""The engine on a real (small, random) decoder: laws, failures, streams."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast.runner import GraphRunner
from reference.batching.drafting import NgramDrafter
from reference.batching.request import FinishReason, Request, SamplingParams, SequenceOutput
from reference.batching.runner import ModelRunner, StepResult
from reference.kv_cache.cache import KV_FORMATS, CacheView, KVCache
from reference.model.adapters import AdapterBank
from reference.model.decoder import Decoder
from twofold.conformance import plain_torch
from twofold.conformance.strategies.batching import engine_for, nothing_is_left, preemptions, run_all
from twofold.conformance.strategies.model import random_model

FORMATS = ("float32", "float32", "int8", "kivi4")


@cache
def decoder(family: str = "llama", backend: Any = reference) -> Decoder:
    """A decoder of one layer, made once."""
    config, tensors = random_model(family, num_layers=1, vocab_size=61, eos_token_ids=(2, 3))
    return Decoder(config, tensors, backend=backend)


def whole(model: Decoder, kv_format: str, token_ids: list[int]) -> np.ndarray:
    """Log-probabilities of the next token after every position, all computed in one step and from a fresh cache."""
    config, length = model.config, len(token_ids)
    kv = KVCache(
        kv_format, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        block_size=4, num_blocks=-(-length // 4), num_window_blocks=-(-length // 4), backend=model.backend,
    )  # fmt: skip
    put = model.backend.from_host
    table, slots = np.arange(-(-length // 4), dtype=np.int32)[None], np.arange(length)
    ends = np.array([0, length], np.int32), np.array([length], np.int32)
    view = CacheView(*map(put, (*ends, table, slots, table, slots)))
    logits = model.forward(put(np.array(token_ids, np.int32)), put(np.arange(length, dtype=np.int32)), view, kv)
    logits = model.backend.to_host(logits).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@st.composite
def workloads(draw):
    """Requests with beginnings in common, and settings under which they get into each other's way."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="seed of the prompts"))
    shared = rng.integers(4, 61, draw(st.sampled_from([0, 8, 13]), label="shared prefix")).tolist()
    requests = [
        (
            shared + rng.integers(4, 61, rng.integers(1, 12)).tolist(),
            SamplingParams(
                temperature=draw(st.sampled_from([0.0, 0.7, 1.3]), label="temperature"),
                top_p=draw(st.sampled_from([1.0, 0.8]), label="top_p"),
                top_k=draw(st.sampled_from([0, 5]), label="top_k"),
                max_tokens=draw(st.integers(1, 14), label="max_tokens"),
                frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.6]), label="frequency_penalty"),
                logit_bias=draw(st.sampled_from([None, None, {7: 2.0}]), label="logit_bias"),
                seed=draw(st.integers(0, 9), label="seed"),
                logprobs=0,
            ),
        )
        for _ in range(draw(st.integers(1, 4), label="num_requests"))
    ]
    return requests, {
        "num_blocks": draw(st.sampled_from([10, 14, 60]), label="num_blocks"),
        "max_num_batched_tokens": draw(st.sampled_from([5, 16, 200]), label="max_num_batched_tokens"),
        **draw(preemptions(), label="preemption"),
        "enable_prefix_caching": draw(st.booleans(), label="enable_prefix_caching"),
        "lookahead": draw(st.integers(0, 1), label="lookahead"),
        "watermark": 0.0,
    }


def check_workload(model: Decoder, kv_format: str, workload, runner=ModelRunner) -> None:
    """In company and out of memory: the log-probabilities are those of one whole pass, and the tokens those of a
    request alone."""
    requests, engine_settings = workload
    engine = engine_for(model, kv_format=kv_format, runner=runner, max_model_len=48, **engine_settings)
    results = run_all(engine, [Request(f"{i}", prompt, params) for i, (prompt, params) in enumerate(requests)])
    nothing_is_left(engine)
    for i, (prompt, params) in enumerate(requests):
        assert results[f"{i}"].error is None
        [output] = results[f"{i}"].outputs
        length = len(output.token_ids)
        expected = whole(model, kv_format, prompt + output.token_ids)[len(prompt) - 1 : -1]
        got = [token.logprob for token in output.logprobs]
        np.testing.assert_allclose(
            got, expected[np.arange(length), output.token_ids], atol=2e-4, err_msg=f"request {i}: log-probabilities"
        )
        alone = engine_for(model, kv_format=kv_format, max_model_len=48, enable_prefix_caching=False)
        [other] = run_all(alone, [Request("alone", prompt, params)])["alone"].outputs
        if other.token_ids != output.token_ids:  # only where the two best are as good as equal
            assert params.temperature == 0, f"request {i}: {output.token_ids}, alone {other.token_ids}"
            first = next(j for j, (a, b) in enumerate(zip(output.token_ids, other.token_ids)) if a != b)
            best, second = np.sort(expected[first])[:-3:-1]
            assert best - second < 1e-4, f"request {i}: {output.token_ids}, alone {other.token_ids}"


@given(workloads(), st.sampled_from(["llama", "mistral", "qwen2"]), st.sampled_from(FORMATS))
@settings(max_examples=200)
def test_company_chunks_hits_and_preemption_change_nothing(workload, family, kv_format):
    """A request's tokens and log-probabilities are its own, whatever it is batched with and whatever befalls it."""
    check_workload(decoder(family), kv_format, workload)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("runner", [ModelRunner, GraphRunner])
@pytest.mark.parametrize("backend", [plain_torch, fast], ids=["plain_torch", "fast"])
@given(workload=workloads(), kv_format=st.sampled_from(FORMATS))
@settings(max_examples=25)
def test_so_it_is_on_other_backends(backend, runner, workload, kv_format):
    """The same on other backends and runners: nothing in the engine knows whose arrays they are."""
    with pytest.MonkeyPatch.context() as patched:
        if torch.cuda.is_available() and runner is GraphRunner:  # a step in which values are looked at is not recorded
            patched.setenv("TWOFOLD_CHECK", "0")
        check_workload(decoder("qwen3", backend), kv_format, workload, runner)


def check_scores(model: Decoder, kv_format: str, workload, runner: Any, *, rounding: float, drafts: bool) -> None:
    """The log-probabilities of tokens that are forced are those that were reported when they were drawn. Both times in
    company and out of memory, but never with the same luck."""
    requests, engine_settings = workload
    engine = engine_for(
        model,
        kv_format=kv_format,
        runner=runner,
        max_model_len=48,
        drafter=NgramDrafter(3, backend=model.backend) if drafts else None,
        **engine_settings,
    )
    drawn = run_all(engine, [Request(f"{i}", prompt, params) for i, (prompt, params) in enumerate(requests)])
    forced = []
    for i, (prompt, params) in enumerate(requests):
        [output] = drawn[f"{i}"].outputs
        params = SamplingParams(temperature=params.temperature, ignore_eos=True, logprobs=1)
        forced.append(Request(f"{i}", prompt, params, forced_token_ids=output.token_ids))
    scores = run_all(engine, forced)
    nothing_is_left(engine)
    for i in range(len(requests)):
        assert scores[f"{i}"].error is None
        [output], [score] = drawn[f"{i}"].outputs, scores[f"{i}"].outputs
        assert score.token_ids == output.token_ids, f"request {i}: others than those that were forced"
        for ours, reported in zip(score.logprobs, output.logprobs, strict=True):
            difference = abs(ours.logprob - reported.logprob)
            assert difference <= rounding, f"request {i}: {ours.logprob}, but {reported.logprob} was reported"
            assert ours.rank == reported.rank or rounding


SCORES = {"workload": workloads(), "kv_format": st.sampled_from(FORMATS), "drafts": st.booleans()}


@given(**SCORES)
@settings(max_examples=100)
def test_a_score_is_what_was_reported(workload, kv_format, drafts):
    check_scores(decoder("qwen2"), kv_format, workload, ModelRunner, rounding=2e-4, drafts=drafts)


@given(**SCORES)
@settings(max_examples=50)
def test_a_score_is_what_was_reported_by_the_runner_of_the_device(workload, kv_format, drafts):
    check_scores(decoder("qwen3", plain_torch), kv_format, workload, GraphRunner, rounding=2e-4, drafts=drafts)


def test_scores_take_few_steps_of_no_more_logits_than_others():
    """Prompt and completion go in the same steps; and no more rows of logits than sequences may run, but for those of
    requests that are admitted behind."""
    engine = engine_for(decoder(), max_num_seqs=8, max_num_batched_tokens=32)
    steps, launch = [], engine.runner.launch
    engine.runner.launch = lambda batch: (steps.append(len(batch.logit_rows)), launch(batch))[1]
    params = SamplingParams(logprobs=0)
    run_all(engine, [Request("a", [5] * 10, params, forced_token_ids=[6] * 20)])
    assert steps == [8, 8, 4]
    steps.clear()
    run_all(engine, [Request(name, [5, 6, 7], params, forced_token_ids=[8] * 9) for name in "abc"])
    assert max(steps) <= 8 + 2
    assert len(steps) < 9


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("backend", [fast.invariant])
@given(**SCORES)
@settings(max_examples=150)
def test_a_score_is_bit_for_bit_what_was_reported(backend, workload, kv_format, drafts):
    """On batch-invariant kernels, whatever the format of the cache."""
    with pytest.MonkeyPatch.context() as patched:
        if torch.cuda.is_available():  # a step in which values are looked at is not recorded
            patched.setenv("TWOFOLD_CHECK", "0")
        check_scores(decoder("qwen3", backend), kv_format, workload, GraphRunner, rounding=0.0, drafts=drafts)


@pytest.mark.parametrize(
    ("kv_format", "backend"),
    [
        *(pytest.param(kv_format, reference, id=kv_format) for kv_format in ("float32", "bfloat16", "kivi4")),
        pytest.param("kivi4", plain_torch, id="kivi4-plain_torch"),
        pytest.param("float32", fast, id="float32-fast"),
    ],
)
def test_coded_swaps_are_plain_swaps(kv_format, backend):
    """Blocks that travel coded come back bit for bit: all log-probabilities are the same bits. And they are smaller."""
    num_requests, num_tokens, num_blocks = (2, 6, 7) if backend is fast else (5, 18, 14)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=2)
    found, swapped = [], []
    for coding in ("none", "lossless"):
        requests = [Request(f"{i}", [5 + i] * 9, params) for i in range(num_requests)]
        engine = engine_for(
            decoder("qwen3", backend), kv_format=kv_format, num_blocks=num_blocks, watermark=0.0,
            preemption="swap", swap_coding=coding, enable_prefix_caching=False,
        )  # fmt: skip
        runner: Any = engine.runner
        swap_out, sizes = runner.cache.swap_out, []

        def counted(*args, swap_out=swap_out, sizes=sizes, **kwargs):
            rows = swap_out(*args, **kwargs)
            sizes.append(rows.nbytes)
            return rows

        runner.cache.swap_out = counted
        results = run_all(engine, requests)
        nothing_is_left(engine)
        assert not runner.host, "the host keeps what nobody wants"
        found.append([(o.token_ids, o.logprobs) for name in sorted(results) for o in results[name].outputs])
        swapped.append(sum(sizes))
    assert found[0] == found[1]
    assert 0 < swapped[1] < swapped[0], f"{swapped[0]} bytes were swapped, {swapped[1]} coded"


def test_the_window_of_kivi_comes_back_with_a_prefix():
    """A hit brings the window's blocks too: with KIVI, what a query reads in full it also reads so after a hit."""
    model, short = decoder(), KV_FORMATS["kivi2"]
    engine = engine_for(model, kv_format=short, max_model_len=240, num_blocks=128, num_window_blocks=80)
    prompt = np.random.default_rng(1).integers(4, 61, 200).tolist()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    cold = run_all(engine, [Request("cold", prompt, params)])["cold"]
    hit = run_all(engine, [Request("hit", prompt, params)])["hit"]
    assert hit.metrics.num_cached_tokens == 196, "the prefix was not found"
    assert hit.outputs[0].token_ids == cold.outputs[0].token_ids
    nothing_is_left(engine)


def test_parallel_samples_share_the_prompt_and_differ():
    """n samples are n draws, the first as alone; together they hold the prompt's full blocks once."""
    prompt = list(range(4, 44))
    params = SamplingParams(n=4, seed=1, max_tokens=8, ignore_eos=True)
    engine = engine_for(decoder(), enable_prefix_caching=False)
    outputs = run_all(engine, [Request("r", prompt, params)])["r"].outputs
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in outputs}) == 4, "samples are the same"
    alone = run_all(
        engine_for(decoder()), [Request("r", prompt, SamplingParams(seed=1, max_tokens=8, ignore_eos=True))]
    )
    assert alone["r"].outputs[0].token_ids == outputs[0].token_ids
    assert engine.metrics.peak_blocks == 40 // 4 + 4 * 2, "the prompt's blocks are not shared"


def test_adapters_and_salts_do_not_share_prefixes():
    """The same prompt under another adapter, or another salt, finds nothing of the first; under the same, all of it."""
    config, tensors = random_model(num_layers=1, eos_token_ids=())
    model = Decoder(config, tensors, backend=reference)
    bank = AdapterBank(config, backend=reference)
    name = "base_model.model.model.layers.0.self_attn.v_proj"
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, config.hidden_size)), rng.normal(size=(config.num_kv_heads * config.head_dim, 2))
    bank.add("lora", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, {"lora_alpha": 4})
    engine = engine_for(model, adapters={"lora": (0, bank.digests["lora"])})
    engine.runner.adapters = bank
    params, prompt = SamplingParams(temperature=0, max_tokens=6), list(range(20, 50))
    wanted = [
        ("plain", None, ""),
        ("again", None, ""),
        ("lora", "lora", ""),
        ("salted", None, "x"),
        ("lora2", "lora", ""),
    ]
    results = {
        name: run_all(engine, [Request(name, prompt, params, adapter, salt)])[name] for name, adapter, salt in wanted
    }
    cached = {name: result.metrics.num_cached_tokens for name, result in results.items()}
    assert cached == {"plain": 0, "again": 28, "lora": 0, "salted": 0, "lora2": 28}
    tokens = {name: result.outputs[0].token_ids for name, result in results.items()}
    assert tokens["plain"] == tokens["again"] == tokens["salted"]
    assert tokens["lora"] == tokens["lora2"] != tokens["plain"], "the adapter does nothing"


# ---- refusals and failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request("r", [5] * 60, SamplingParams()), "context"),
        (Request("r", [5] * 45, SamplingParams()), "never hold"),
        (Request("r", [5], SamplingParams(n=9)), "max_num_seqs"),
        (Request("r", [5], num_beams=7), "beams"),
        (Request("r", [5], SamplingParams(stop_token_ids=list(range(20))), num_beams=3), "too many for a vocabulary"),
        (Request("r", [5, 61], SamplingParams()), "vocabulary"),
        (Request("r", [5], SamplingParams(logit_bias={99: 1.0})), "vocabulary"),
        (Request("r", [5], SamplingParams(logprobs=62)), "logprobs"),
        (Request("r", [5], adapter="fr"), "unknown adapter"),
        (Request("busy", [5]), "unfinished"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_never_run_is_refused_with_a_reason(request_, reason):
    """A hopeless request is one sentence, which names it; who was there before goes on."""
    engine = engine_for(decoder(), max_model_len=60, num_blocks=10, max_num_seqs=8, max_num_batched_tokens=6)
    engine.add(Request("busy", [7, 8, 9], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)))
    with pytest.raises(ValueError, match=reason) as refusal:
        engine.add(request_)
    assert f"request {request_.request_id}" in str(refusal.value)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step().finished
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4]
    nothing_is_left(engine)


def test_an_empty_prompt_and_a_second_use_are_refused():
    """No token to begin with, or a request that has run already: a sentence."""
    with pytest.raises(ValueError, match="at least one token"):
        Request("r", [])
    with pytest.raises(ValueError, match="num_beams"):
        Request("r", [1], SamplingParams(n=2), num_beams=2)
    engine, request = engine_for(decoder()), Request("r", [5], SamplingParams(max_tokens=1))
    run_all(engine, [request])
    with pytest.raises(ValueError, match="added before"):
        engine.add(request)


class Poisoned:
    """A decoder whose logits are NaN wherever a certain token is read."""

    def __init__(self, model: Decoder, token: int):
        self.model, self.token = model, token

    def __getattr__(self, name):
        return getattr(self.model, name)

    def forward(self, token_ids, *args, logit_rows, **kwargs):
        logits = self.model.forward(token_ids, *args, logit_rows=logit_rows, **kwargs)
        logits[token_ids[logit_rows] == self.token] = np.nan
        return logits


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_broken_row_fails_its_own_request(lookahead):
    """NaN in one request's logits ends that request, by name; its neighbours' tokens are as if it were not there."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
    prompts = {"a": [9, 10, 11], "bad": [9, 10, 60], "b": [30, 31]}
    healthy = run_all(engine_for(decoder()), [Request(name, prompt, params) for name, prompt in prompts.items()])
    engine = engine_for(decoder(), lookahead=lookahead)
    engine.runner.decoder = Poisoned(decoder(), 60)
    results = run_all(engine, [Request(name, prompt, params) for name, prompt in prompts.items()])
    assert results["bad"].error == "the model's logits are not finite"
    assert results["bad"].outputs[0].finish_reason is FinishReason.ERROR
    for name in ("a", "b"):
        assert results[name].error is None
        assert results[name].outputs[0].token_ids == healthy[name].outputs[0].token_ids
    nothing_is_left(engine)


class Breaking:
    """A runner whose device fails once, in ``launch`` or in ``result``."""

    def __init__(self, runner, step: int, when: str):
        self.runner, self.step, self.when, self.vocab_size = runner, step, when, runner.vocab_size

    def launch(self, batch):
        pending = self.runner.launch(batch)
        if batch.step == self.step:
            if self.when == "launch":
                raise RuntimeError("device lost")
            return self
        return pending

    def result(self) -> StepResult:
        raise RuntimeError("device lost")


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("when", ["launch", "result"])
@pytest.mark.parametrize("step", [0, 6, 9])
def test_a_device_error_ends_what_was_running(step, when, lookahead, preemption):
    """Those in flight end with the error, none is lost; those that waited, swapped out or not, get all their tokens."""
    params = SamplingParams(temperature=0, max_tokens=18, ignore_eos=True)
    requests = [Request(f"{i}", [5 + i] * 9, params) for i in range(5)]
    settings_ = {"num_blocks": 14, "lookahead": lookahead, "preemption": preemption, "enable_prefix_caching": False}
    alone = {r.request_id: run_all(engine_for(decoder()), [Request("r", r.prompt_token_ids, params)]) for r in requests}
    engine = engine_for(decoder(), watermark=0.0, **settings_)
    engine.runner = Breaking(engine.runner, step, when)
    results = run_all(engine, requests)
    failed = {name for name, result in results.items() if result.error}
    assert failed, "nothing was running: the test shows nothing"
    assert len(failed) < 5, "those that waited failed too"
    for name, result in results.items():
        if name in failed:
            assert "device lost" in result.error
            assert {output.finish_reason for output in result.outputs} == {FinishReason.ERROR}
        else:
            assert result.outputs[0].token_ids == alone[name]["r"].outputs[0].token_ids
    nothing_is_left(engine)


# ---- streams ----------------------------------------------------------------------------------------------------


def test_streams_read_in_turns():
    """Two streams, read in turns, each give their request's tokens and then its result."""
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    engine = engine_for(decoder())
    streams = [engine.stream(Request(name, [7, 8, 9 + i], params)) for i, name in enumerate("ab")]
    gained: list[list[int]] = [[], []]
    results = []
    for _ in range(6):
        for i, stream in enumerate(streams):
            output = next(stream)
            if isinstance(output, SequenceOutput):
                assert output.request_id == "ab"[i]
                gained[i] += output.new_token_ids
            else:
                results.append(output)
    assert [result.outputs[0].token_ids for result in results] == gained
    assert all(next(stream, None) is None for stream in streams)
    assert not engine.has_unfinished() or engine.step().step >= 0
    nothing_is_left(engine)


def test_closing_a_stream_aborts_its_request():
    """Who stops listening stops the work: the request is aborted and its blocks come back."""
    engine = engine_for(decoder(), lookahead=1)
    stream = engine.stream(Request("r", [7, 8, 9], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)))
    next(stream)
    stream.close()
    while engine.has_unfinished():
        engine.step()
    nothing_is_left(engine)


def test_finishing_from_outside():
    """A stop string found outside ends one sample, or all: the last one's end is the request's, reported once."""
    engine = engine_for(decoder())
    engine.add(Request("r", [7, 8, 9], SamplingParams(n=2, seed=3, max_tokens=30, ignore_eos=True)))
    for _ in range(4):
        assert not engine.step().finished
    assert engine.finish("r", FinishReason.STOP, index=1) is None
    step = engine.step()
    assert [output.index for output in step.sequences] == [0]
    result = engine.finish("r", FinishReason.STOP, index=0)
    assert result is not None
    assert [len(output.token_ids) for output in result.outputs] == [5, 4]
    assert engine.finish("r", FinishReason.STOP) is None
    assert not engine.has_unfinished()
    assert engine.step().step == -1
    nothing_is_left(engine)


def test_a_stop_costs_at_most_one_token():
    """With a lookahead of 1 the model computes one token more at most than a sequence needs; none at its limit."""
    tokens = {}
    for lookahead in (0, 1):
        for stops in (False, True):
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            prompt = [7, 8, 9]
            output = run_all(engine_for(decoder()), [Request("r", prompt, params)])["r"].outputs[0]
            if stops:
                params = SamplingParams(
                    temperature=0, max_tokens=30, stop_token_ids=[output.token_ids[4]], ignore_eos=True
                )
            engine = engine_for(decoder(), lookahead=lookahead)
            result = run_all(engine, [Request("r", prompt, params)])["r"].outputs[0]
            tokens[lookahead, stops] = engine.metrics.num_tokens - len(result.token_ids)
    assert tokens[1, False] == tokens[0, False], "a length that is known beforehand costs a token"
    assert tokens[1, True] == tokens[0, True] + 1, "a stop costs more than one token, or nothing is ever in flight"
