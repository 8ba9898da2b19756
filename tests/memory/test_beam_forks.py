"""Recorded forks: written as read, replayed as recorded."""

import pytest

from reference.memory.beam_forks import BeamForks


def test_what_is_saved_is_loaded(tmp_path):
    forks = BeamForks("a model", {2: [[[0, 1], [0, 0]], [[1, 0]]], 4: [[[0, 1, 2, 3], [3, 0, 0, 1]]]})
    forks.save(tmp_path / "forks.json")
    assert BeamForks.load(tmp_path / "forks.json") == forks


def test_any_search_and_any_step_can_be_asked_for():
    """Beyond the recorded ones they begin again. No search with so many beams: an error that says what there is."""
    forks = BeamForks("a model", {2: [[[0, 1], [0, 0], [1, 0]], [[1, 1]]]})
    assert forks.parents(2, search=0, step=4) == [0, 0]
    assert forks.parents(2, search=3, step=100) == [1, 1]
    assert forks.parents(2, search=10, step=2) == forks.parents(2, search=10, step=5)
    with pytest.raises(ValueError, match=r"recorded \(2\), got 3"):
        forks.parents(3, search=0, step=0)
