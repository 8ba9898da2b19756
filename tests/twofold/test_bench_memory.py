"""`twofold bench memory`: the published figures are met or their gaps explained, and what is interrupted goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import twofold.bench.memory as bench
from twofold.bench.memory import Sweep, forks, plots, show
from twofold.bench.memory.cases import ALPACA, OPT_13B, PUBLISHED_STEP_TIME, SHAREGPT, Case, measure
from twofold.bench.memory.forks import NUM_BEAMS, load_forks
from twofold.bench.memory.published import WITHIN, all_cases, changed_cases, claims, gap
from twofold.bench.report import markdown
from twofold.cli import run
from twofold.conformance.strategies.small_checkpoint import small_checkpoint
from twofold.llm import LLM

RESULTS = Path(__file__).parents[2] / "benchmarks/results/memory.json"
FORKS = load_forks()


@pytest.fixture(scope="module")
def results():
    """What the repository has."""
    return json.loads(RESULTS.read_text())["results"]


def test_every_published_figure_is_met_or_its_gap_explained(results):
    """Within a tenth; or with one named thing changed (in one case two) it is. What is met neither way is on a list."""
    unexplained = {
        row["figure"]
        for row in results["claims"]
        if abs(row["gap"]) > WITHIN and abs(row.get("changed_gap", 1.0)) > WITHIN
    }
    fails = {"taken and empty, in last blocks, Alpaca"}  # «under 4 %» does not hold there, whatever is changed
    assert unexplained == fails


def test_all_claims_are_in_the_results(results):
    """Each with the simulations it is made of, and, where it is not met, with those that change one thing."""
    assert [row["figure"] for row in results["claims"]] == [claim.figure for claim in claims()]
    simulations = results["simulations"]
    runs = {case: simulations[case.name] for case in all_cases()}
    assert {case.name for case in [*runs, *changed_cases(runs)]} == set(simulations)


def test_under_4_percent_holds_for_long_sequences_only(results):
    """Half a block a sequence: little of a conversation, much of a short answer."""
    lost = {name: run["last_blocks"] for name, run in results["simulations"].items()}
    assert lost["ShareGPT, paged"] < 0.04
    assert lost["Alpaca, paged"] > 0.08
    assert lost["Alpaca, paged, constant lengths"] > 0.12


def test_a_simulation_of_today_gives_what_the_results_say(results):
    """Few requests, so within their noise: the share of slots that hold tokens."""
    for strategy in ("max", "paged"):
        case = Case(SHAREGPT, strategy)
        ours = measure(case, seed=3, num_finished=20, num_answers=2, forks=FORKS)["tokens"]
        assert ours == pytest.approx(results["simulations"][case.name]["tokens"], rel=0.35)


def test_a_gap_is_measured_to_the_nearest_end_of_a_range():
    assert gap(11.0, (10.0,)) == pytest.approx(0.1)
    assert gap(2.0, (1.7, 2.7)) == 0
    assert gap(5.4, (1.7, 2.7)) == pytest.approx(1.0)


def test_the_published_step_time_goes_through_the_two_published_batches():
    """Little's law, backwards."""
    for batched, rate, output_len in ((30.42, 2, 337.99), (132.44, 30, 58.45)):
        seconds = PUBLISHED_STEP_TIME.seconds + PUBLISHED_STEP_TIME.seconds_per_seq * batched
        assert rate * output_len * seconds == pytest.approx(batched)


def test_the_served_models_have_the_published_cache():
    """OPT-13B: 12 GB of 800 KiB a token."""
    assert 2 * 2 * OPT_13B.num_layers * OPT_13B.hidden_size == 819_200
    assert OPT_13B.num_slots == 12 * 2**30 // 819_200


def test_forks_come_with_the_package_for_every_number_of_beams():
    """Of short answers and of long ones, every step naming beams that are there."""
    assert set(FORKS) == {"short", "long", "divergent"}
    for recorded in FORKS.values():
        assert set(recorded.searches) == set(NUM_BEAMS)
        for num_beams, searches in recorded.searches.items():
            assert all(len(step) == num_beams and max(step) < num_beams for steps in searches for step in steps)


def test_forks_are_recorded_anew_from_any_model(tmp_path, monkeypatch):
    """A few tokens of a small one: a step for each but the first and the last."""
    monkeypatch.setattr(forks, "NUM_TOKENS", {"short": 6, "long": 8})
    told = []
    recorded = forks.record_forks(LLM(small_checkpoint(tmp_path, context=1024)), told.append)
    assert len(told) == 2 * len(NUM_BEAMS)
    for kind, prompts in forks.PROMPTS.items():
        assert {k: [len(steps) for steps in found] for k, found in recorded[kind].searches.items()} == {
            k: [forks.NUM_TOKENS[kind] - 2] * len(prompts) for k in NUM_BEAMS
        }
    assert all(len(found) == 1 for found in recorded["divergent"].searches.values())


@pytest.fixture
def few_cases(monkeypatch):
    """Four short simulations in place of all."""
    cases = [Case(ALPACA, "paged", 30.0), Case(ALPACA, "oracle"), Case(ALPACA, "pow2"), Case(ALPACA, "max")]
    cases = [replace(case, workload=replace(case.workload, mean_output_len=8.0)) for case in cases]
    monkeypatch.setattr(bench, "all_cases", lambda served, quick: cases)
    for name in ("claims", "changed_cases", "allocator_cases"):
        monkeypatch.setattr(bench, name, lambda *args, **settings: [])
    monkeypatch.setattr(bench, "block_size_cases", lambda *args, **settings: {})
    return cases


def test_the_same_seed_gives_the_same_json(few_cases, tmp_path):
    """And another seed another."""
    once, again, other = (
        json.dumps(Sweep(tmp_path / f"{i}.json", FORKS, seed=seed, quick=True).run())
        for i, seed in enumerate((0, 0, 1))
    )
    assert once == again != other


def test_an_interrupted_sweep_goes_on_from_where_it_was(few_cases, tmp_path, monkeypatch):
    """What is done is not done again, and the results are those of a sweep that was not interrupted."""
    whole = Sweep(tmp_path / "whole.json", FORKS, seed=0, quick=True).run()
    measured = []

    def interrupted(case, **settings):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return measure(case, **settings)

    monkeypatch.setattr(bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Sweep(tmp_path / "memory.json", FORKS, seed=0, quick=True).run()
    monkeypatch.setattr(bench, "measure", lambda case, **settings: measured.append(case) or measure(case, **settings))

    other = Sweep(tmp_path / "memory.json", FORKS, seed=1, quick=True)
    assert not other.done, "what was done with other settings"
    sweep = Sweep(tmp_path / "memory.json", FORKS, seed=0, quick=True)
    assert [*sweep.done] == [case.name for case in few_cases[:2]]
    assert sweep.run() == whole
    assert measured == few_cases
    sweep.unfinished.remove()  # by the command, when the results are saved
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["whole.sweep.json"], "the finished sweep leaves nothing behind"


def test_a_broken_file_of_an_interrupted_sweep_is_no_file(few_cases, tmp_path):
    (tmp_path / "memory.sweep.json").write_text('{"settings"')
    assert not Sweep(tmp_path / "memory.json", FORKS, seed=0, quick=True).done


def test_a_memory_smaller_than_one_request_is_one_sentence(tmp_path, capsys):
    """Said before anything is simulated, with exit status 2."""
    assert run(["bench", "memory", "--quick", "--slots", "1000", "--results", str(tmp_path / "m.json")]) == 2
    err = capsys.readouterr().err
    assert "a memory of 1000 tokens is too small: one request of ShareGPT may need 2048" in err
    assert not list(tmp_path.iterdir())


def test_tables_and_plots_are_drawn_from_the_results(results, tmp_path):
    """A row for every claim; the same plot is the same file."""
    title, columns, rows, notes = show.claims(results)
    assert len(rows) == len(results["claims"])
    assert all(len(row) == len(columns) for _, columns, rows, _ in show.tables(results) for row in rows)
    assert "| --- |" in markdown((title, columns, rows, notes))
    once = {path.name: path.read_bytes() for path in plots.draw(results, tmp_path / "a")}
    again = {path.name: path.read_bytes() for path in plots.draw(results, tmp_path / "b")}
    assert once == again
    assert len(once) == 4
