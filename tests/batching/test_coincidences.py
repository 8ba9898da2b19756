"""What the state machine meets now and then, each by itself: two things that happen at the wrong moment."""

from dataclasses import replace

import pytest

from reference.batching.config import EngineConfig
from reference.batching.engine import Engine
from reference.batching.request import FinishReason, Request, SamplingParams, Status
from reference.kv_cache.coded_rows import CodedRows
from twofold.conformance.strategies.batching import FakeModel, FakeRunner, nothing_is_left, run_all

CONFIG = EngineConfig(num_blocks=40, max_model_len=30, block_size=2, enable_prefix_caching=False, watermark=0.0)


def make_engine(**settings) -> Engine:
    config = replace(CONFIG, **settings)
    return Engine(config, FakeRunner(FakeModel(), config), clock=lambda: 0.0)


def drain(engine: Engine) -> dict:
    results = {}
    while engine.has_unfinished():
        results |= {result.request_id: result for result in engine.step().finished}
    nothing_is_left(engine)
    return results


def tokens_alone(request: Request, index: int = 0) -> list[int]:
    return FakeModel().tokens_alone(request, index, frozenset(), request.limit)


@pytest.mark.parametrize("swap_coding", ["none", "lossless"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_aborted_on_the_host(lookahead, swap_coding):
    """A request that is aborted while its blocks are on the host: the host forgets them with the next step."""
    engine = make_engine(num_blocks=8, preemption="swap", swap_coding=swap_coding, lookahead=lookahead)
    requests = [Request(name, [1, 2, 3, 4], SamplingParams(max_tokens=9, seed=1)) for name in "ab"]
    for request in requests:
        engine.add(request)
    while requests[1].status is not Status.SWAPPED:
        engine.step()
    engine.step()
    assert engine.runner.host, "nothing is on the host: the test shows nothing"
    coded = {isinstance(rows, CodedRows) for rows in engine.runner.host.values()}
    assert coded == {swap_coding == "lossless"}
    result = engine.abort("b")
    assert result.outputs[0].token_ids == tokens_alone(requests[1])[: len(result.outputs[0].token_ids)]
    assert drain(engine)["a"].outputs[0].token_ids == tokens_alone(requests[0])
    assert not engine.runner.host, "the host keeps what nobody wants"


@pytest.mark.parametrize("which", [0, 1])
def test_a_sample_ends_while_the_prompt_is_computed_anew(which):
    """Parallel samples lost their memory, and compute their prompt again in small chunks, the first for both. One of
    them is stopped: the other goes on where the prompt stands."""
    engine = make_engine(num_blocks=12, max_num_batched_tokens=3)
    old = Request("old", [5] * 9, SamplingParams(max_tokens=13, seed=0))
    pair = Request("pair", list(range(8)), SamplingParams(max_tokens=6, seed=2, n=2))
    for request in (old, pair):
        engine.add(request)
    while not (pair.metrics.num_preemptions and pair.status is Status.RUNNING and not pair.forked):
        engine.step()
    assert len(pair.live) == 2
    num_computed = pair.live[0].num_computed
    assert 0 < num_computed < 8, "the prompt is not half computed: the test shows nothing"
    stopped, other = pair.live[which].sample_index, pair.live[1 - which].sample_index
    assert engine.finish("pair", FinishReason.STOP, index=stopped) is None
    (goes_on,) = pair.live
    assert (goes_on.num_computed, goes_on.tables[0].num_tokens) == (num_computed, num_computed)
    outputs = {output.index: output for output in drain(engine)["pair"].outputs}
    assert outputs[other].token_ids == tokens_alone(pair, other)
    assert outputs[stopped].token_ids == tokens_alone(pair, stopped)[: len(outputs[stopped].token_ids)]


def test_a_search_is_aborted_in_flight():
    """A beam search ends while a step that compares its beams is in flight: what comes of it goes nowhere."""
    engine = make_engine(lookahead=1)
    other = Request("other", [3], SamplingParams(max_tokens=12, seed=1))
    search = Request("search", [1, 2], SamplingParams(max_tokens=12), num_beams=2)
    engine.add(other)
    engine.add(search)
    while not any(plan.beams for plan in engine.scheduler.in_flight):
        engine.step()
    result = engine.abort("search")
    assert {output.finish_reason for output in result.outputs} == {FinishReason.ABORT}
    assert drain(engine)["other"].outputs[0].token_ids == tokens_alone(other)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("budget", [3, 4, 64])
def test_beams_are_compared_in_one_step(budget, preemption):
    """A step has fewer tokens left than a search has beams, or the search begins anew in uneven chunks: it waits until
    all its beams stand alike, and finds what it finds alone."""

    def search():
        return Request("search", [1, 2, 3], SamplingParams(max_tokens=6), num_beams=3)

    [alone] = run_all(make_engine(num_blocks=200), [search()]).values()
    engine = make_engine(num_blocks=12, max_num_batched_tokens=budget, preemption=preemption)
    old = [Request(f"old {i}", [5 + i] * 3, SamplingParams(max_tokens=12 + 6 * i, seed=i)) for i in range(2)]
    results = run_all(engine, [*old, search()])
    nothing_is_left(engine)
    assert engine.metrics.num_preemptions > 0, "the search never begins anew: the test shows little"
    assert [o.token_ids for o in results["search"].outputs] == [o.token_ids for o in alone.outputs]
    assert [results[request.request_id].outputs[0].token_ids for request in old] == [tokens_alone(r) for r in old]


def test_a_scheduler_with_nothing_to_do_says_so():
    """If requests are unfinished and no step can be made, that is an error, not a loop."""
    engine = make_engine()
    engine.add(Request("r", [1], SamplingParams(max_tokens=3)))
    engine.scheduler.waiting.clear()
    with pytest.raises(RuntimeError, match="stuck: 1 unfinished"):
        engine.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_blocks", 0),
        ("max_model_len", 0),
        ("lookahead", 2),
        ("preemption", "never"),
        ("swap_coding", "zip"),
        ("swap_coding", "lossless"),
        ("watermark", 1.0),
        ("sliding_window", 0),
        ("kv_window", -1),
        ("kv_window", 9),
    ],
)
def test_an_engine_that_could_not_run_is_refused(name, value):
    """One sentence for each setting that is out of its range, the pool of a window included."""
    with pytest.raises(ValueError, match=r"^EngineConfig: \w+: expected .*, got"):
        replace(CONFIG, **{name: value})
