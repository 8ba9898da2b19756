"""Requests and sampling parameters: what is out of range is one sentence, what is not given has its default."""

import re

import pytest

from reference.batching.request import Request, SamplingParams

OUT_OF_RANGE = [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "warm"),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("n", 0),
    ("n", True),
    ("max_tokens", 0),
    ("max_tokens", 1.0),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop_token_ids", [-1]),
    ("seed", -1),
    ("seed", 2**63),
    ("logprobs", -1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {1: float("inf")}),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_out_of_range_is_a_sentence(name, value):
    """The sentence names the parameter, what was expected, and what came."""
    with pytest.raises(ValueError, match=f"^SamplingParams: {name}: expected .*, got {re.escape(repr(value))}$"):
        SamplingParams(**{name: value})


def test_samples_that_would_all_be_the_same_are_refused():
    """Greedy decoding has one answer: n of them are a mistake."""
    with pytest.raises(ValueError, match="n: expected 1 when greedy"):
        SamplingParams(temperature=0, n=2)


def test_defaults_are_those_that_users_know():
    """vLLM's names and defaults."""
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.n) == (1.0, 1.0, 0, 0.0, 1)
    assert (params.max_tokens, params.stop, params.seed, params.logprobs, params.logit_bias) == (
        16,
        None,
        None,
        None,
        None,
    )
    assert not params.has_penalties
    assert SamplingParams(top_k=-1, logit_bias={3: -1.0}).has_penalties


def test_a_seed_not_given_is_drawn_and_reported():
    """Two requests without a seed have two seeds; one that is given is kept, 0 too."""
    seeds = {Request(f"{i}", [1]).seed for i in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert Request("r", [1], SamplingParams(seed=0)).seed == 0
