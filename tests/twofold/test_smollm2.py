"""The real model: SmolLM2-135M-Instruct beside `transformers` on the same file."""

import ast
from pathlib import Path

import numpy as np
import pytest

import reference
from twofold import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "Die Hauptstadt von Deutschland heißt",
    "Three rules of good writing:\n1.",
    "Water boils at 100 degrees Celsius because",
    "Dear Sir or Madam,\n\nI am writing to",
]
NUM_TOKENS = 64
MARGIN = 1e-3  # between transformers' own two best logits: less than this, and either token is right


@pytest.fixture(scope="module")
def llm(smollm2_path):
    return LLM(smollm2_path, max_model_len=1100)


@pytest.fixture(scope="module")
def peer(smollm2_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder, name = smollm2_path.parent, smollm2_path.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


def peer_logits(peer, token_ids):
    """transformers' logits at every place of a text."""
    import torch

    with torch.inference_mode():
        return peer(torch.tensor([token_ids])).logits[0].numpy()


def test_greedy_continuations_are_those_of_transformers(llm, peer, capsys):
    """Along our 8 x 64 tokens, transformers would have said each of them, but where its two best are all but equal."""
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True))
    exceptions = []
    for output in outputs:
        said = output.outputs[0].token_ids
        assert len(said) == NUM_TOKENS
        logits = peer_logits(peer, [*output.prompt_token_ids, *said])[len(output.prompt_token_ids) - 1 : -1]
        for place, (token, row) in enumerate(zip(said, logits)):
            if row.argmax() != token:
                best, second = np.sort(row)[::-1][:2]
                exceptions.append((output.prompt, place, int(token), int(row.argmax()), float(best - second)))
    with capsys.disabled():
        print(f"\nSmolLM2, {len(PROMPTS) * NUM_TOKENS} greedy tokens: {len(exceptions)} differ from transformers'")
        for exception in exceptions:
            print("  prompt {!r}, token {}: ours {}, theirs {}, their margin {:.1e}".format(*exception))
    wrong = [exception for exception in exceptions if exception[-1] >= MARGIN]
    assert not wrong, f"tokens that transformers would not have said: {wrong}"


def test_perplexity_is_that_of_transformers(llm, peer):
    """On 1,024 tokens of running text (the docstrings of `reference`), within 0.1 %."""
    paths = sorted(Path(reference.__file__).parent.rglob("*.py"))
    text = "\n\n".join(filter(None, (ast.get_docstring(ast.parse(path.read_text())) for path in paths)))
    token_ids = llm.tokenizer.encode(text)[:1024]
    assert len(token_ids) == 1024
    ours = perplexity(all_logits(llm, token_ids), token_ids)
    theirs = perplexity(peer_logits(peer, token_ids), token_ids)
    assert abs(ours / theirs - 1) < 1e-3, f"perplexity {ours:.4f}, transformers {theirs:.4f}"


def all_logits(llm, token_ids):
    """Logits at every place, in chunks through the paged cache, its blocks in no particular order."""
    from reference.kv_cache.cache import CacheView

    block_size, chunk = llm.engine.config.block_size, 300
    blocks = np.random.default_rng(0).permutation(llm.engine.config.num_blocks)[: -(-len(token_ids) // block_size)]
    slots = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
    parts = []
    for start in range(0, len(token_ids), chunk):
        end = min(start + chunk, len(token_ids))
        view = CacheView(
            cu_seqlens_q=np.array([0, end - start], np.int32),
            seq_lens=np.array([end], np.int32),
            block_table=blocks[None].astype(np.int32),
            slot_mapping=slots[start:end].astype(np.int64),
        )
        ids = np.array(token_ids[start:end], np.int32)
        parts.append(llm.decoder.forward(ids, np.arange(start, end, dtype=np.int32), view, llm.cache))
    return np.concatenate(parts)


def perplexity(logits, token_ids):
    logits = logits[:-1].astype(np.float64)
    top = logits.max(axis=1)
    log_total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float(np.exp(np.mean(log_total - logits[np.arange(len(logits)), token_ids[1:]])))


def test_a_chat_answer_makes_sense(llm):
    """Asked for the capital of France, it says Paris, and ends by itself."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=64))
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"


def test_the_checkpoint_runs_in_its_own_four_bits(smollm2_path, llm):
    """`--weights as-is` computes with the Q4_1 blocks themselves: the same weights, so the same text."""
    as_is = LLM(smollm2_path, weights="as-is", max_model_len=256)
    assert as_is.decoder.nbytes < 0.3 * llm.decoder.nbytes
    params = SamplingParams(temperature=0.0, max_tokens=12)
    ours, theirs = (model.generate(PROMPTS[0], params)[0].outputs[0].token_ids for model in (as_is, llm))
    assert ours == theirs
