"""Speculation changes the number of steps, and nothing else."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference.batching.config import EngineConfig
from reference.batching.drafting import ModelDrafter, NgramDrafter
from reference.batching.request import Request, SamplingParams
from reference.model.decoder import Decoder
from twofold.conformance import plain_torch
from twofold.conformance.strategies.batching import engine_for, nothing_is_left, preemptions, run_all
from twofold.conformance.strategies.model import random_model

BACKENDS = {"reference": reference, "plain_torch": plain_torch}


@cache
def decoder(seed: int = 0, backend: str = "reference", vocab_size: int = 61) -> Decoder:
    config, tensors = random_model("llama", seed, num_layers=1, vocab_size=vocab_size, eos_token_ids=(2,))
    return Decoder(config, tensors, backend=BACKENDS[backend])


def model_drafter(model: Decoder, num_drafts: int, vocab_size: int = 61, **cache_settings) -> ModelDrafter:
    """Another model, or the same, as the drafter."""
    engine = engine_for(model, **cache_settings)
    return ModelDrafter(engine.runner, engine.config, num_drafts=num_drafts, vocab_size=vocab_size)


@st.composite
def speculations(draw):
    """Prompts that repeat themselves, drafters good and bad, pools big and small."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16), label="seed of the prompts"))
    prompts = []
    for _ in range(draw(st.integers(1, 3), label="num_requests")):
        piece = rng.integers(4, 61, rng.integers(2, 6)).tolist()
        prompts.append(piece * int(rng.integers(1, 4)))
    drafter = draw(st.sampled_from(["ngram", "itself", "another", "another, little memory"]), label="drafter")
    return (
        prompts,
        drafter,
        draw(st.integers(1, 4), label="num_drafts"),
        {
            "num_blocks": draw(st.sampled_from([14, 60]), label="num_blocks"),
            "max_num_batched_tokens": draw(st.sampled_from([3, 12, 200]), label="max_num_batched_tokens"),
            **draw(preemptions(), label="preemption"),
            "lookahead": draw(st.integers(0, 1), label="lookahead"),
        },
    )


def make_drafter(kind: str, num_drafts: int, backend: str):
    if kind == "ngram":
        return NgramDrafter(num_drafts, backend=BACKENDS[backend], min_ngram=1)
    model = decoder(0 if kind == "itself" else 1, backend)
    small = {"num_blocks": 9, "max_num_seqs": 2, "max_num_batched_tokens": 5} if "little" in kind else {}
    return model_drafter(model, num_drafts, **small)


def check_greedy(speculation, backend: str) -> None:
    prompts, kind, num_drafts, engine_settings = speculation
    model = decoder(0, backend)
    params = SamplingParams(temperature=0, max_tokens=14, logprobs=1)
    drafter = make_drafter(kind, num_drafts, backend)
    engine = engine_for(model, drafter=drafter, max_model_len=48, **engine_settings)
    results = run_all(engine, [Request(f"{i}", prompt, params) for i, prompt in enumerate(prompts)])
    nothing_is_left(engine)
    for i, prompt in enumerate(prompts):
        [expected] = run_all(engine_for(model, max_model_len=48), [Request("r", prompt, params)])["r"].outputs
        [got] = results[f"{i}"].outputs
        assert results[f"{i}"].error is None
        if got.token_ids != expected.token_ids:  # only where the two best are as good as equal
            first = next(j for j, (a, b) in enumerate(zip(got.token_ids, expected.token_ids)) if a != b)
            best, other = expected.logprobs[first].top, got.logprobs[first]
            assert max(best.values()) - other.logprob < 1e-4, f"request {i}: {got.token_ids}, not {expected.token_ids}"
            continue
        np.testing.assert_allclose(
            [t.logprob for t in got.logprobs], [t.logprob for t in expected.logprobs], atol=2e-4, err_msg=f"request {i}"
        )


@given(speculations())
@settings(max_examples=200)
def test_greedy_with_speculation_is_greedy_without(speculation):
    """Whatever is drafted, and whatever befalls the request meanwhile, the tokens are the model's own."""
    check_greedy(speculation, "reference")


@given(speculations())
@settings(max_examples=15)
def test_so_it_is_in_plain_torch(speculation):
    """The same on another backend."""
    check_greedy(speculation, "plain_torch")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_model_itself_drafts_without_a_miss(temperature):
    """Drafts from the model that verifies are accepted, drawn or greedy: five tokens a step, and the drafter computes
    every token once."""
    drafter = model_drafter(decoder(), 4)
    engine = engine_for(decoder(), drafter=drafter)
    params = SamplingParams(temperature=temperature, seed=4, max_tokens=41, ignore_eos=True)
    run_all(engine, [Request("r", list(range(4, 24)), params)])
    assert engine.metrics.num_steps == 1 + 40 / 5, "a draft was rejected"
    computed = sum(shadow.num_computed for shadow in drafter.shadows.values())
    assert computed == 20 + 41 - 2, "its cache is not in step with the tokens"


def test_looking_up_what_repeats_saves_steps():
    """On a text that goes in circles what comes next has been seen: fewer steps, the same tokens. (In a circle of one
    token the latest occurrence is followed by one token only.)"""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logit_bias={5: 30.0})  # says only 5
    prompt = [9, 5, 5, 5, 5]
    plain = engine_for(decoder())
    quick = engine_for(decoder(), drafter=NgramDrafter(4, backend=reference))
    expected = run_all(plain, [Request("r", prompt, params)])["r"].outputs[0].token_ids
    assert run_all(quick, [Request("r", prompt, params)])["r"].outputs[0].token_ids == expected
    assert plain.metrics.num_steps == 40
    assert quick.metrics.num_steps <= 21


def test_what_followed_is_drafted_as_far_as_there_is_room():
    """The drafts are what followed the last time; no more than the request may still have, less the one after them."""
    drafter = NgramDrafter(4, backend=reference)
    prompt, seqs = [11, 12, 13, 14, 15, 16, 17, 18, 11, 12], []
    for max_tokens, tail in ((20, [13]), (4, [13]), (20, [30]), (2, [13])):
        request = Request("r", [*prompt, *tail], SamplingParams(max_tokens=max_tokens))
        engine_for(decoder()).add(request)
        seqs += request.live
    drafter.propose(seqs)
    assert [seq.drafts for seq in seqs] == [[14, 15, 16, 17], [14, 15, 16], [], [14]]
    drafter.propose([])


def test_drawn_tokens_have_the_models_distribution():
    """Tokens drawn with another model's drafts are distributed as the model's own: chi-square over 700 requests."""
    target, other = decoder(5, vocab_size=12), decoder(6, vocab_size=12)
    engine = engine_for(
        target, drafter=model_drafter(other, 2, vocab_size=12, num_blocks=800), num_blocks=800, max_num_seqs=64
    )
    for seed in range(700):
        params = SamplingParams(seed=seed, max_tokens=3, ignore_eos=True, temperature=0.8, top_k=9)
        engine.add(Request(f"{seed}", [5, 8, 7], params))
    seconds, gained = np.zeros(12), []
    while engine.has_unfinished():
        step = engine.step()
        gained += [len(output.new_token_ids) for output in step.sequences]
        for result in step.finished:
            seconds[result.outputs[0].token_ids[1]] += 1

    probs = np.zeros(12)  # of the second token, summed over the first
    first = distribution(target, [5, 8, 7])
    for token in np.flatnonzero(first):
        probs += first[token] * distribution(target, [5, 8, 7, int(token)])
    possible = probs > 0
    assert seconds[~possible].sum() == 0, "a token that the filters exclude"
    expected = 700 * probs[possible]
    statistic = ((seconds[possible] - expected) ** 2 / expected).sum()
    assert statistic < 33, f"chi-square {statistic:.1f} with {possible.sum() - 1} degrees of freedom"  # p > 0.0005
    assert gained.count(2) > 70, "hardly a draft was accepted: the test shows little"
    assert 700 - gained.count(2) > 70, "hardly a draft was rejected: the test shows little"


def distribution(model: Decoder, token_ids: list[int]) -> np.ndarray:
    """What the next token is drawn from, at temperature 0.8 and top-k 9."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=12)
    [output] = run_all(engine_for(model), [Request("r", token_ids, params)])["r"].outputs
    logits = np.full(12, -np.inf)
    logits[list(output.logprobs[0].top)] = [*output.logprobs[0].top.values()]
    logits[np.argsort(-logits)[9:]] = -np.inf
    weights = np.exp(logits / 0.8)
    return weights / weights.sum()


def test_a_drafter_that_fails_is_a_step_that_fails():
    """The error is named; the engine lives on."""

    class Broken:
        def propose(self, seqs):
            if seqs:
                raise RuntimeError("no ideas")

    engine = engine_for(decoder(), drafter=Broken())
    result = run_all(engine, [Request("r", [5, 6], SamplingParams(max_tokens=5, ignore_eos=True))])["r"]
    assert result.error == "drafting failed: RuntimeError: no ideas"
    assert isinstance(engine.failure.__cause__, RuntimeError)
    engine.drafter = None
    assert run_all(engine, [Request("s", [5, 6], SamplingParams(max_tokens=2, ignore_eos=True))])["s"].error is None
    nothing_is_left(engine)


def test_what_cannot_draft_is_refused():
    """Another vocabulary, no drafts, n-grams of nothing: a sentence each."""
    engine = engine_for(decoder())
    config = EngineConfig(num_blocks=8, max_model_len=8)
    with pytest.raises(ValueError, match="same vocabulary, 99 tokens; it has 61"):
        ModelDrafter(engine.runner, config, num_drafts=2, vocab_size=99)
    with pytest.raises(ValueError, match="num_drafts"):
        ModelDrafter(engine.runner, config, num_drafts=0, vocab_size=61)
    for settings_ in ({"num_drafts": 0}, {"num_drafts": 1, "min_ngram": 0}, {"num_drafts": 1, "max_ngram": 1}):
        with pytest.raises(ValueError, match="NgramDrafter"):
            NgramDrafter(backend=reference, **settings_)
