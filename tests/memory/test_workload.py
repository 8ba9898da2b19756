"""Requests to study memory with have the means that were published, and are the same for the same seed."""

import itertools

import numpy as np
import pytest

from reference.memory.workload import Workload, requests


@pytest.mark.parametrize("shape", ["geometric", "log-normal", "constant"])
@pytest.mark.parametrize(("prompt_len", "output_len"), [(161.31, 337.99), (19.31, 58.45)])
def test_the_means_are_those_asked_for(shape, prompt_len, output_len):
    """Of those pairs that fit the context: within five standard errors."""
    workload = Workload("w", prompt_len, output_len, shape=shape)
    lengths = workload.lengths(40_000, np.random.default_rng(1))
    error = lengths.std(axis=0) / len(lengths) ** 0.5
    assert np.all(np.abs(lengths.mean(axis=0) - [prompt_len, output_len]) < 5 * error)
    assert lengths.min() >= 1
    assert lengths.sum(axis=1).max() <= workload.max_model_len


def test_geometric_lengths_forget_what_they_were():
    """Of those longer than 100, what is beyond 100 is as long on average as all are: each token may be the last."""
    lengths = Workload("w", 50, 80, max_model_len=10_000).lengths(100_000, np.random.default_rng(2))[:, 1]
    assert (lengths[lengths > 100] - 100).mean() == pytest.approx(lengths.mean(), rel=0.03)


def test_arrivals_come_at_their_rate_and_the_same_for_a_seed():
    """Poisson: gaps with the mean and the deviation of 1 / rate. All at once: at time 0."""
    workload = Workload("w", 3, 2)
    arrivals = [
        [r.arrival_time for r in itertools.islice(requests(workload, rate=4.0, seed=s), 4000)] for s in (0, 0, 1)
    ]
    assert arrivals[0] == arrivals[1] != arrivals[2]
    gaps = np.diff(arrivals[0])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.06)
    assert gaps.std() == pytest.approx(0.25, rel=0.06)
    assert {r.arrival_time for r in itertools.islice(requests(workload, rate=float("inf"), seed=0), 10)} == {0.0}


def test_prompts_begin_alike_as_far_as_asked_for():
    """The prefix, and then none like another."""
    first, second = itertools.islice(requests(Workload("w", 3, 2), rate=1.0, seed=0, prefix_len=5), 2)
    assert first.prompt_token_ids[:5] == second.prompt_token_ids[:5]
    assert first.prompt_token_ids[5] != second.prompt_token_ids[5]
