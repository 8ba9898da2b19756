"""`twofold bench engine`: its decks, its limits, and each way of measuring on a small model. Figures need a GPU."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.model.config import ModelConfig
from twofold.bench import engine, report
from twofold.bench.engine import DECKS, LLAMA, QWEN, Bench, Deck, Figure, Target, chosen
from twofold.bench.limits import Limits
from twofold.bench.profiling import summary
from twofold.checkpoints.shapes import SHAPES
from twofold.cli import run as twofold
from twofold.conformance.strategies.model import small_shape
from twofold.errors import TwofoldError

SMALL = small_shape(QWEN, head_dim=16)


@pytest.fixture(autouse=True)
def named_small(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", SMALL)


def figures(**deck) -> dict[str, Figure]:
    pool = {"num_blocks": 8, "page_size": 32, "max_batch_tokens": 64}
    bench = Bench(Deck("small", "small", **deck), backend="plain_torch", rounds=1, peer_pool=pool)
    return {figure.name.removeprefix("small: "): figure for figure in bench.figures()}


def test_latency_is_a_first_token_and_a_step():
    found = figures(latency=[(3, 9, 4)], targets={"3 x 9, step": Target(1.0)})
    host = {f"3 x 9, {work} on the host" for work in ("schedule", "launch", "update")}
    assert set(found) == {"start to first token", "3 x 9, step", "3 x 9, first token", "3 x 9, device idle", *host}
    assert found["start to first token"].value > found["3 x 9, first token"].value / 1e3, "loading is counted"
    assert all(found[name].value > 0 for name in host)
    for name in ("3 x 9, step", "3 x 9, first token"):
        figure = found[name]
        assert 0 < figure.limit < figure.value
        assert figure.of_limit == pytest.approx(figure.limit / figure.value)
    assert found["3 x 9, step"].target == Target(1.0)


def test_throughput_is_compared_and_meets_arrivals():
    found = figures(throughput=(4, 3, 8), arrivals=0.7, compare=("draws", engine.DRAWN))
    assert {name.partition(": ")[2] or name for name in found} == {
        "throughput",
        "throughput, device idle",
        "throughput with draws",
        *(f"{what}, {which}" for what in ("to the first token", "between tokens") for which in ("median", "p99")),
    }
    assert all(figure.value > 0 for figure in found.values())
    assert found["throughput"].of_limit == pytest.approx(found["throughput"].value / found["throughput"].limit)


def test_adapters_are_given_in_turn():
    found = figures(latency=[(4, 5, 3)], adapters=(2, 3))
    assert {"4 x 5, step with 2 of rank 3", "4 x 5, cost of adapters"} <= set(found)


def test_transformers_answers_the_same_requests():
    found = figures(throughput=(4, 3, 8), beside=(3, 9, 5), targets={"transformers' generate, ours": Target(8.0)})
    for name in ("transformers' generate", "transformers' continuous batching"):
        assert (found[name].unit, found[f"{name}, ours"].unit) == ("tokens/s", "times")
        assert found[name].value > 0
        assert found[f"{name}, ours"].value > 0
    assert found["transformers' generate, ours"].target == Target(8.0)


def test_without_transformers_it_is_left_out(monkeypatch):
    monkeypatch.setattr(engine.peer, "is_there", lambda: False)
    assert set(figures(throughput=(4, 3, 8), beside=(3, 9, 5))) == {"throughput", "throughput, device idle"}


def test_what_transformers_cannot_do_says_so_and_is_no_figure(monkeypatch):
    def broken(self, requests):
        raise RuntimeError("not on this device")

    monkeypatch.setattr(engine.peer.Transformers, "generate", broken)
    monkeypatch.setattr(engine.peer.Transformers, "generate_batch", broken)
    with pytest.warns(UserWarning, match="generate is not measured: not on this device"):
        assert set(figures(throughput=(4, 3, 8), beside=(3, 9, 5))) == {"throughput", "throughput, device idle"}


def test_a_request_that_fails_is_no_figure(monkeypatch):
    bench = Bench(Deck("small", "small", latency=[(1, 4, 2)]), backend="plain_torch", rounds=1)

    def broken(batch):
        raise RuntimeError("no")

    monkeypatch.setattr(bench.llm.engine.runner, "launch", broken)
    with pytest.raises(TwofoldError, match="a request failed"):
        list(bench.figures())


def test_the_issue_s_decks_are_there():
    """Every figure of the table, and a target that is above what is possible."""
    assert len({(deck.model, deck.name) for deck in DECKS}) == len(DECKS)
    for model in (QWEN, LLAMA):
        (deck,) = (deck for deck in DECKS if (deck.model, deck.name) == (model, "bfloat16"))
        names = {f"{seqs} x {prompt}, step" for seqs, prompt, _ in deck.latency} | {"throughput"}
        assert names <= set(deck.targets)
        limits = Limits(ModelConfig.from_hf(SHAPES[model]))
        for seqs, prompt, tokens in deck.latency:
            target = deck.targets[f"{seqs} x {prompt}, step"]
            assert limits.step([prompt + tokens / 2] * seqs) * 1e3 < target.reach_for < target.at_least < target.vllm


@pytest.mark.parametrize(
    ("model", "seqs", "prompt", "tokens", "milliseconds"),
    [
        (QWEN, 1, 512, 256, 0.42),
        (QWEN, 32, 1024, 128, 1.72),
        (QWEN, 128, 1024, 128, 5.68),
        (LLAMA, 1, 512, 256, 5.00),
        (LLAMA, 32, 1024, 128, 6.48),
        (LLAMA, 128, 1024, 128, 11.01),
    ],
)
def test_limits_are_those_of_the_issue(model, seqs, prompt, tokens, milliseconds):
    limits = Limits(ModelConfig.from_hf(SHAPES[model]))
    assert limits.step([prompt + tokens / 2] * seqs) * 1e3 == pytest.approx(milliseconds, abs=0.01)


def test_a_run_is_its_prompts_and_its_steps():
    limits = Limits(ModelConfig.from_hf(SMALL))
    steps = [limits.step([5 + 1, 9 + 1]), limits.step([9 + 2])]
    assert limits.run([(5, 2), (9, 3)]) == pytest.approx(limits.prompts([5, 9]) + sum(steps))
    quantized = Limits(ModelConfig.from_hf(SMALL), weights="int8", kv_cache_dtype="int8")
    assert quantized.step([100]) < limits.step([100])


def test_decks_are_chosen_by_words():
    assert [deck.name for deck in chosen(["qwen int8"])] == ["int8 KV"]
    assert [deck.name for deck in chosen(["adapters", "llama int4"])] == ["int4", "adapters"]
    assert chosen([]) == DECKS
    assert all(tokens <= 48 for deck in chosen([], quick=True) for _, _, tokens in deck.latency)
    with pytest.raises(TwofoldError, match="no such deck"):
        chosen(["nothing"])


def test_some_decks_leave_the_figures_of_the_others(monkeypatch, tmp_path, capsys):
    """Each then says which run it is from; a run of all decks, or on another device, keeps nothing."""
    results, device = tmp_path / "engine.json", ["a GPU"]
    monkeypatch.setattr(report, "gpu_name", lambda: device[0])

    def measure(value: float, *only: str) -> dict:
        names = ("step", "first token") if not only else ("step",)
        measured = [Figure(QWEN, f"bfloat16: {name}", "ms", value) for name in names]
        monkeypatch.setattr(engine, "run", lambda decks, **how: iter(measured))
        assert twofold(["bench", "engine", *only, "--results", str(results)]) == 0
        return json.loads(results.read_text())["results"]["figures"][QWEN]

    assert [figure["value"] for figure in measure(1.0).values()] == [1, 1]
    kept = measure(2.0, "--only", "qwen bfloat16")
    assert {name: figure["value"] for name, figure in kept.items()} == {"bfloat16: step": 2, "bfloat16: first token": 1}
    assert "run" not in kept["bfloat16: step"]
    first = kept["bfloat16: first token"]["run"]
    assert first["command"].startswith("twofold bench engine")
    assert "--only" not in first["command"]
    again = measure(3.0, "--only", "qwen bfloat16")
    assert again["bfloat16: first token"]["run"] == first, "a figure is said to be of the run that kept it"
    device[0] = "another"
    assert list(measure(4.0, "--only", "qwen bfloat16")) == ["bfloat16: step"]
    assert all("run" not in figure for figure in measure(5.0).values())
    capsys.readouterr()


def test_without_a_gpu_it_is_a_sentence(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert twofold(["bench", "engine"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.sampled_from("abc")), min_size=1)


@given(RANGES)
def test_what_kernels_add_and_idle_time_make_a_step(drawn):
    """Whatever overlaps; and idle is what no kernel ran in, counted microsecond by microsecond."""
    ranges = [(start, start + length, name) for start, length, name in drawn]
    found = summary(ranges, 1)
    ran = {at for start, end, _ in ranges for at in range(start, end)}
    assert found["span_us"] == max(ran) + 1 - min(ran)
    assert found["idle_us"] == found["span_us"] - len(ran)
    assert found["busy"] == pytest.approx(len(ran) / found["span_us"])
    kernels = found["kernels"].values()
    assert sum(kernel["adds_us"] for kernel in kernels) == len(ran)
    assert all(0 <= kernel["adds_us"] <= kernel["us"] for kernel in kernels)


@pytest.mark.needs("gpu")
def test_a_profile_has_kernels():
    bench = Bench(Deck("small", "small", latency=[(2, 9, 4)]), rounds=1)
    ((name, found),) = bench.profiles()
    assert name == "2 x 9"
    assert found["kernels"]
    assert 0 < found["busy"] <= 1
    assert math.isfinite(found["span_us"])
