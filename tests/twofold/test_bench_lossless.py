"""`twofold bench lossless`, on a small model."""

import json

import pytest

from twofold.cli import run
from twofold.conformance.strategies.small_checkpoint import small_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small_checkpoint(tmp_path_factory.mktemp("small")))


def test_it_prints_and_keeps_the_ratios(model, tmp_path, capsys):
    """Of blocks that were swapped, and of each kind of weights; twice the same."""
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        assert run(["bench", "lossless", "-m", model, "--results", str(file)]) == 0
        assert "ratio" in capsys.readouterr().out
    first, second = (json.loads(file.read_text())["results"] for file in files)
    assert first == second
    ratios = {name: figures["ratio"] for name, figures in first.items()}
    assert [name.split(",")[0] for name in ratios] == ["KV blocks"] * 3 + ["weights"] * 3
    assert all(0.5 < ratio < 1 for ratio in ratios.values())
    assert all(figures["blocks"] > 0 for name, figures in first.items() if "KV" in name), "nothing was swapped"


def test_quick_is_less_of_it(model, tmp_path):
    file = tmp_path / "quick.json"
    assert run(["bench", "lossless", "-m", model, "--quick", "--results", str(file)]) == 0
    assert len(json.loads(file.read_text())["results"]) == 4


def test_a_model_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert run(["bench", "lossless", "-m", str(tmp_path / "none.gguf"), "--results", str(tmp_path / "x.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
