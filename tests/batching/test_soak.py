"""The soak in small: what the long run asserts, and that it would notice."""

import json
from dataclasses import replace

import pytest

from reference.batching.engine import Engine
from reference.kv_cache.block_table import BlockTable
from twofold.conformance import soak


def test_every_request_ends_and_leaves_nothing(tmp_path, capsys):
    """Of every kind, on every engine; and what became of them is kept."""
    file = tmp_path / "soak.json"
    assert soak.main(["--requests", "480", "--json", str(file)]) == 0
    assert capsys.readouterr().out.count("preemptions") == len(soak.TURNS)
    results = json.loads(file.read_text())["results"]
    assert results["requests"] == 480 == results["refused"] + sum(results["ended"].values())
    assert results["refused"] == results["kinds"]["hopeless"]
    assert set(results["kinds"]) == {"plain", "samples", "beams", "judged", "hopeless"}
    assert {"abort", "length", "stop"} == set(results["ended"])
    assert results["preemptions"] > 0
    assert sum(turn["samples_ended"] for turn in results["turns"]) > 0
    for turn in results["turns"]:
        assert turn["num_blocks"] <= 0.15 * turn["wanted_blocks"]
        assert turn["most_blocks"] <= turn["num_blocks"]


def test_turns_shared_out_are_those_of_one_run():
    """Whoever runs some of them has the requests that they have in a run of all."""
    everything = [turn.kinds for turn in soak.soak("reference", 100, seed=3)]
    assert [turn.kinds for turn in soak.soak("reference", 100, seed=3, only=[2, 5])] == [everything[2], everything[5]]


def test_a_block_that_does_not_come_back_is_noticed(monkeypatch, capsys):
    free = BlockTable.free
    monkeypatch.setattr(BlockTable, "free", lambda table: free(table)[1:])
    assert soak.main(["--requests", "80"]) == 1
    assert "blocks did not come back" in capsys.readouterr().err


def test_a_request_that_ends_unheard_is_noticed(monkeypatch, capsys):
    """Whoever asked would wait for ever."""
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: replace(step(engine), finished=[]))
    assert soak.main(["--requests", "80"]) == 1
    assert "end" in capsys.readouterr().err


@pytest.mark.parametrize("device_bytes", [[9, 9, 9, 10], [9, 9, 10, 9]])
def test_memory_of_the_device_that_nobody_asked_for_is_noticed(device_bytes):
    with pytest.raises(AssertionError, match="memory of the device"):
        soak.unchanged(device_bytes, [1, 1, 1, 1])
    assert soak.unchanged(device_bytes, [1, 1, 1, 2]) == 0


@pytest.mark.needs("gpu")
def test_memory_of_the_device_is_flat(monkeypatch):
    """Over kernels, from graphs."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    assert all(turn.unchanged for turn in soak.soak("fast", 8 * 12 * soak.SEGMENT))
