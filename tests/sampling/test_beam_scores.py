"""Beam search, one step: the best continuations, and no better one left out."""

import numpy as np
import pytest
from hypothesis import given, settings

import fast
from twofold.conformance.properties import sampling as properties
from twofold.conformance.properties.numerics import call, refuses
from twofold.conformance.strategies import sampling as inputs


@given(case=inputs.beams())
@settings(max_examples=100)
def test_beams_are_the_best(backend, case):
    properties.beams_are_the_best(backend, case)


@given(case=inputs.beams())
def test_groups_do_not_depend_on_company(backend, case):
    properties.groups_do_not_depend_on_company(backend, case)


@pytest.mark.parametrize("order", [1, -1])
def test_more_beams_than_are_merged_at_once(backend, order):
    """The best may be in the first beams of a group as well as in the last."""
    scores = np.linspace(0, -8, 37)[::order].astype(np.float32)
    logits = np.random.default_rng(0).normal(size=(37, 7)).astype(np.float32)
    cu_beams = np.array([0, 1, 37], np.int32)
    properties.beams_are_the_best(backend, inputs.Beams(logits, scores, cu_beams, num_candidates=8))


def test_offsets_beyond_the_rows_end_with_them_where_nobody_looks(monkeypatch):
    """As an engine runs: `fast` does not look at offsets, and reads no row that is not there."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    logits, scores = np.random.default_rng(0).normal(size=(3, 70)).astype(np.float32), np.zeros(3, np.float32)
    results = []
    for offsets in ([0, 1, 3], [-4, 1, 3], [0, 1, 300], [-(2**31), 1, 2**31 - 1]):
        parts = call(fast, "beam_scores", logits, scores, np.array(offsets, np.int32), num_candidates=3)
        results.append([part.tolist() for part in parts])
    assert all(result == results[0] for result in results), f"expected the same four times, got {results}"


def test_refuses_bad_beams(backend):
    logits, scores, cu_beams = np.zeros((3, 4), np.float32), np.zeros(3, np.float32), np.array([0, 1, 3], np.int32)
    nan, inf = scores + np.nan, scores + np.inf
    for bad in (nan, inf, scores[:2], scores.astype(np.float64)):
        refuses(backend, "beam_scores", "scores", logits, bad, cu_beams, num_candidates=2)
    for offsets in ([0, 1, 2], [1, 2, 3], [0, 2, 1, 3], [0, 4], [], [[0, 3]]):
        bad = np.array(offsets, np.int32)
        refuses(backend, "beam_scores", "cu_beams", logits, scores, bad, num_candidates=2)
    refuses(backend, "beam_scores", "cu_beams", logits, scores, cu_beams.astype(np.int64), num_candidates=2)
    refuses(backend, "beam_scores", "num_candidates", logits, scores, cu_beams, num_candidates=0)
    refuses(backend, "beam_scores", "row 2", logits + np.array([[0], [0], [-np.inf]], np.float32), scores, cu_beams,
            num_candidates=2)  # fmt: skip
