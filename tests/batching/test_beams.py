"""Beam search finds what `transformers` finds: the same sequences, with the same scores."""

import numpy as np
import pytest
import torch
import transformers

import reference
from reference.batching.engine import Engine
from reference.batching.request import FinishReason, Request, SamplingParams
from reference.model.config import ModelConfig
from reference.model.decoder import Decoder
from twofold.conformance import plain_torch
from twofold.conformance.strategies.batching import engine_for, run_all

STOP_IDS = [2, 7, 11, 30]  # many, and the text ends now and then
PROMPTS = ([5, 9, 17], [40, 3, 3, 28, 19, 8, 1], [23], [12, 50, 50, 31, 6, 44, 9, 10, 60, 33, 21])


@pytest.fixture(scope="module")
def model():
    """A small random model, by `transformers` and as its tensors."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=STOP_IDS,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def make_engine(model, backend=reference, **settings) -> Engine:
    """An engine over the model."""
    config = ModelConfig.from_hf(model.config.to_dict())
    decoder = Decoder(config, {name: t.numpy() for name, t in model.state_dict().items()}, backend=backend)
    return engine_for(decoder, **({"num_blocks": 256} | settings))


def generate(model, prompt: list[int], num_beams: int, max_tokens: int, length_penalty: float):
    """`transformers`' beams: (tokens without what stands after the stop token, score)."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=max_tokens,
            do_sample=False,
            early_stopping=False,
            length_penalty=length_penalty,
            return_dict_in_generate=True,
            output_scores=True,
        )
    beams = []
    for tokens, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist()):
        ends = [i for i, token in enumerate(tokens) if token in STOP_IDS]
        beams.append((tokens[: ends[0] + 1] if ends else tokens, score))
    return beams


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "backend"),
    [(4, 1.0, reference), (3, 0.0, reference), (2, 2.0, reference), (3, 1.0, plain_torch)],
)
def test_same_beams_as_transformers(model, num_beams, length_penalty, backend):
    """All prompts in one batch give each the beams, and the scores, that `transformers` gives it."""
    params = SamplingParams(temperature=0, max_tokens=24)
    requests = [
        Request(f"{i}", prompt, params, num_beams=num_beams, length_penalty=length_penalty)
        for i, prompt in enumerate(PROMPTS)
    ]
    results = run_all(make_engine(model, backend), requests)
    reasons = set()
    for i, prompt in enumerate(PROMPTS):
        expected = generate(model, prompt, num_beams, 24, length_penalty)
        got = results[f"{i}"].outputs
        assert [output.token_ids for output in got] == [tokens for tokens, _ in expected], f"other beams for prompt {i}"
        np.testing.assert_allclose([o.score for o in got], [s for _, s in expected], rtol=2e-4, err_msg="scores")
        reasons |= {output.finish_reason for output in got}
    if length_penalty <= 1:  # a higher one favours what goes on to the end
        assert FinishReason.STOP in reasons, "no beam ended with a stop token: the test shows too little"


def test_beams_share_their_past(model):
    """Four beams over a long prompt hold little more memory than one sequence: the prompt is theirs in common."""
    prompt = [int(token) for token in np.random.default_rng(0).integers(12, 60, 64)]
    peaks = []
    for num_beams in (1, 4):
        engine = make_engine(model, enable_prefix_caching=False)
        run_all(engine, [Request("r", prompt, SamplingParams(temperature=0, max_tokens=16), num_beams=num_beams)])
        peaks.append(engine.metrics.peak_blocks)
    alone, beams = peaks
    assert beams <= alone + 3 * (16 // 4 + 1), f"{beams} blocks for four beams, {alone} for one"
    assert alone >= 64 // 4


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preempted_beams_go_on_as_if_nothing_happened(model, preemption):
    """In a pool that holds one search at a time, beams are preempted whole and find the same sequences."""
    params = SamplingParams(temperature=0, max_tokens=20)

    def requests():
        return [Request(f"{i}", prompt, params, num_beams=3) for i, prompt in enumerate(PROMPTS)]

    roomy = run_all(make_engine(model), requests())
    engine = make_engine(model, num_blocks=22, preemption=preemption, watermark=0.0)
    tight = run_all(engine, requests())
    assert engine.metrics.num_preemptions > 0, "nothing was preempted: the test shows nothing"
    for request_id, result in roomy.items():
        got = [output.token_ids for output in tight[request_id].outputs]
        assert got == [output.token_ids for output in result.outputs], f"request {request_id}"
