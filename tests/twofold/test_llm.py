"""`LLM`: text in and out, and every prompt answered or refused by itself."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from twofold import LLM, SamplingParams
from twofold.conformance.strategies.model import random_adapter
from twofold.conformance.strategies.small_checkpoint import small_checkpoint
from twofold.errors import TwofoldError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, num_blocks=24, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)


def blocks_in_use(llm):
    return llm.engine.scheduler.space.pools[0].num_used


words = st.text(alphabet="hello world 123é€", min_size=1, max_size=24)


@given(st.lists(words, min_size=1, max_size=5))
@settings(max_examples=25)
def test_a_prompt_is_answered_as_if_it_were_alone(llm, prompts):
    """Greedy answers do not depend on what they are batched with, and no block is left behind."""
    together = llm.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, together):
        (alone,) = llm.generate(prompt, GREEDY)
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids, prompt
    assert blocks_in_use(llm) == 0


@given(st.lists(words, min_size=1, max_size=4), st.integers(0, 2**31))
@settings(max_examples=25)
def test_what_is_streamed_is_what_is_returned(llm, prompts, seed):
    """The chunks of an answer, put together, are its text and its tokens."""
    params = SamplingParams(temperature=1.0, seed=seed, n=2, max_tokens=10, stop=["l", "12"])
    texts, tokens = {}, {}
    for chunk in llm.stream(prompts, params):
        key = (chunk.prompt_index, chunk.output_index)
        texts[key] = texts.get(key, "") + chunk.text
        tokens[key] = tokens.get(key, []) + chunk.token_ids
    for i, output in enumerate(llm.outputs):
        assert output.finished
        assert output.error is None
        for sample in output.outputs:
            assert sample.text == texts[i, sample.index]
            assert sample.token_ids == tokens[i, sample.index][: len(sample.token_ids)]
            assert not any(stop in sample.text for stop in params.stop)
            assert sample.finish_reason in ("stop", "length")
    assert blocks_in_use(llm) == 0


def test_a_prompt_that_cannot_run_takes_no_other_with_it(llm):
    """Empty, longer than the context, longer than the pool: each has its sentence, the others their answers."""
    long = {"prompt_token_ids": [5] * 300}
    bad_id = {"prompt_token_ids": [5, 10**6]}
    outputs = llm.generate(["hello", "", long, bad_id, "world"], GREEDY)
    assert [bool(output.error) for output in outputs] == [False, True, True, True, False]
    assert len(outputs[0].outputs[0].token_ids) == len(outputs[4].outputs[0].token_ids) == 12
    assert all("\n" not in (output.error or "") for output in outputs)
    assert blocks_in_use(llm) == 0


def test_a_seed_gives_the_same_answer_again_and_is_reported_if_drawn(llm):
    """The seed that a run drew repeats it."""
    (first,) = llm.generate("hello", SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True))
    again = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True, seed=first.seed)
    assert llm.generate("hello", again)[0].outputs[0].token_ids == first.outputs[0].token_ids
    other = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True, seed=first.seed + 1)
    assert llm.generate("hello", other)[0].outputs[0].token_ids != first.outputs[0].token_ids


def test_log_probabilities_are_those_of_the_tokens(llm):
    """One entry a token: the chosen one first, best ones in order, and their sum is the cumulative one."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3)
    sample = llm.generate("hello", params)[0].outputs[0]
    assert len(sample.logprobs) == len(sample.token_ids) == 8
    for token, entries in zip(sample.token_ids, sample.logprobs):
        assert next(iter(entries)) == token
        assert entries[token].rank == 1, "greedy takes the best"
        best = [entry.logprob for entry in entries.values()]
        assert best == sorted(best, reverse=True)
        assert len(best) == 3
    total = sum(entries[token].logprob for token, entries in zip(sample.token_ids, sample.logprobs))
    assert np.isclose(sample.cumulative_logprob, total)


@given(st.lists(words, min_size=1, max_size=4), st.integers(0, 2**31), st.sampled_from([0, 2]))
@settings(max_examples=25)
def test_a_score_is_what_generating_reported(llm, prompts, seed, num_top):
    """Of answers drawn with any parameters: the tokens, the text and the log-probabilities, at every place."""
    params = SamplingParams(
        temperature=1.2, top_p=0.9, frequency_penalty=0.3, seed=seed, max_tokens=9, logprobs=num_top
    )
    answers = llm.generate(prompts, params)
    scores = llm.score(prompts, [answer.outputs[0].token_ids for answer in answers], logprobs=num_top)
    for answer, score in zip(answers, scores, strict=True):
        (drawn,), (scored,) = answer.outputs, score.outputs
        assert score.error is None
        assert scored.token_ids == drawn.token_ids
        assert np.isclose(scored.cumulative_logprob, drawn.cumulative_logprob, atol=1e-4)
        for token, ours, theirs in zip(drawn.token_ids, scored.logprobs, drawn.logprobs, strict=True):
            assert np.isclose(ours[token].logprob, theirs[token].logprob, atol=1e-4)
            assert len(ours) >= max(1, num_top)
    assert blocks_in_use(llm) == 0


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8", "int4", "kivi4"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_score_is_bit_for_bit_what_the_deterministic_mode_reported(path, kv_cache_dtype, preemption, monkeypatch):
    """In chunks and out of memory, answers drawn and then judged in another order and other company."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")  # a step in which values are looked at is not recorded
    sizes = {"block_size": 32, "num_blocks": 8, "max_num_seqs": 8, "max_num_batched_tokens": 48, "max_model_len": 128}
    how = {"kv_cache_dtype": kv_cache_dtype, "preemption": preemption, "deterministic": True, "dtype": "bfloat16"}
    llm = LLM(path, backend="fast", **sizes, **how)
    check_scores_bit_for_bit(llm, ["hello world 123 " * n for n in (1, 5, 3, 4, 2, 5)], max_tokens=40)
    assert llm.engine.metrics.num_preemptions > 0


def check_scores_bit_for_bit(llm, prompts, max_tokens):
    params = SamplingParams(temperature=1.1, seed=5, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    answers = [output.outputs[0] for output in llm.generate(prompts, params)]
    scores = llm.score(prompts[::-1], [answer.token_ids for answer in answers[::-1]], logprobs=1)[::-1]
    for answer, score in zip(answers, scores, strict=True):
        assert score.error is None
        assert len(answer.token_ids) == max_tokens
        for token, ours, reported in zip(answer.token_ids, score.outputs[0].logprobs, answer.logprobs, strict=True):
            assert ours[token] == reported[token]
    assert blocks_in_use(llm) == 0


def test_a_prompt_is_scored_with_several_completions(llm):
    """Text or token ids; the likeliest first token is the greedy one."""
    greedy = llm.generate("hello", GREEDY)[0].outputs[0]
    scores = llm.score("hello", [" world", greedy.token_ids, [greedy.token_ids[0]]], logprobs=1)
    text, whole, first = (score.outputs[0] for score in scores)
    assert text.token_ids == llm.tokenizer.encode(" world", add_special_tokens=False)
    assert text.text == " world"
    assert all(entries[token].rank == 1 for token, entries in zip(whole.token_ids, whole.logprobs, strict=True))
    assert first.logprobs[0] == whole.logprobs[0]
    assert all(text.cumulative_logprob < 0 for text in (text, whole))
    (one,) = llm.score("hello", " world")
    assert np.isclose(one.outputs[0].cumulative_logprob, text.cumulative_logprob, atol=1e-4)


def test_a_completion_that_cannot_be_scored_takes_no_other_with_it(llm):
    """Empty, too long, or of tokens that there are not: each has its sentence."""
    scores = llm.score("hello", [[5], [], [5] * 96, [10**6]])
    assert [bool(score.error) for score in scores] == [False, True, True, True]
    assert "at least one" in scores[1].error
    assert "can never hold them" in scores[2].error
    assert "completion: token 1000000" in scores[3].error
    (no_prompt,) = llm.score("", [5])
    assert "the prompt is empty" in no_prompt.error


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "sentence"),
    [
        (["a", "b"], ["c"], {}, "1 completions for 2 prompts"),
        (["a", "b"], "cd", {}, "1 completions for 2 prompts"),
        ("a", [5, "c"], {}, "a completion is a string or a list of token ids"),
        ("a", [None], {}, "a completion is a string or a list of token ids"),
        ("a", [5], {"logprobs": -1}, "logprobs"),
        ("a", [5], {"lora": "other"}, "no LoRA adapter is called 'other'"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(llm, prompts, completions, options, sentence):
    with pytest.raises(TwofoldError, match=sentence) as caught:
        llm.score(prompts, completions, **options)
    assert "\n" not in str(caught.value)


def test_stop_tokens_end_an_answer_and_say_so(llm):
    """The stop token is among the tokens, not in the text, and is the reason."""
    whole = llm.generate("hello", GREEDY)[0].outputs[0]
    stop = whole.token_ids[4]
    first = whole.token_ids.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    sample = llm.generate("hello", params)[0].outputs[0]
    assert sample.token_ids == whole.token_ids[: first + 1]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.text == llm.tokenizer.decode(whole.token_ids[:first])


def test_beam_search_finds_what_greedy_misses_or_the_same(llm):
    """Beams come best first, and one beam is greedy."""
    (one,) = llm.beam_search("hello", beam_width=1, max_tokens=8, ignore_eos=True)
    greedy = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))[0].outputs[0]
    assert one.outputs[0].token_ids == greedy.token_ids
    (four,) = llm.beam_search("hello", beam_width=4, max_tokens=8, ignore_eos=True)
    scores = [beam.cumulative_logprob for beam in four.outputs]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] >= one.outputs[0].cumulative_logprob - 1e-5
    assert len({tuple(beam.token_ids) for beam in four.outputs}) == 4
    assert four.outputs[0].text == llm.tokenizer.decode(four.outputs[0].token_ids)


def test_a_stopped_run_keeps_what_it_has(llm):
    """`stop` from another thread, as from a signal: answers end as aborted, blocks come back, the next run works."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    timer = threading.Timer(0, llm.stop)
    for count, _ in enumerate(llm.stream("hello", params), start=1):
        if count == 3:
            timer.start()
            timer.join()
    (output,) = llm.outputs
    assert 3 <= len(output.outputs[0].token_ids) < 60
    assert output.outputs[0].finish_reason == "abort"
    assert blocks_in_use(llm) == 0
    assert llm.generate("hello", GREEDY)[0].error is None


def test_chat_uses_the_template(llm):
    """A conversation is what the template makes of it."""
    messages = [{"role": "user", "content": "hello"}]
    output = llm.chat(messages, GREEDY)[0]
    assert output.prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert output.outputs[0].token_ids == llm.generate(output.prompt, GREEDY)[0].outputs[0].token_ids


def test_an_adapter_changes_its_request_only(path, tmp_path, llm):
    """One batch, one request with an adapter and one without: the latter is as ever."""
    tensors, config = random_adapter(llm.checkpoint.config, rank=4, seed=3)
    save_file(
        {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tuned = LLM(path, block_size=4, num_blocks=40, lora_modules={"style": tmp_path})
    with_it, without = tuned.generate(["hello world"] * 2, GREEDY, lora=["style", None])
    plain = llm.generate("hello world", GREEDY)[0]
    assert without.outputs[0].token_ids == plain.outputs[0].token_ids
    assert with_it.outputs[0].token_ids != plain.outputs[0].token_ids
    with pytest.raises(TwofoldError, match="no LoRA adapter is called 'other'"):
        tuned.generate("hello", GREEDY, lora="other")


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8", "int4", "kivi4", "kivi2", "bfloat16"])
def test_every_kv_format_serves_text(path, kv_cache_dtype):
    """Quantized caches answer, batched as alone."""
    llm = LLM(path, kv_cache_dtype=kv_cache_dtype, block_size=32, num_blocks=12, max_num_batched_tokens=16)
    together = llm.generate(["hello world", "hello"], GREEDY)
    alone = llm.generate("hello world", GREEDY)
    assert together[0].outputs[0].token_ids == alone[0].outputs[0].token_ids
    assert blocks_in_use(llm) == 0


@pytest.mark.parametrize("weights", ["int8", "w8a8", "fp8", "int4", "sparse24", "bfloat16"])
def test_every_weight_format_serves_text(path, weights):
    """Weights rounded at load answer."""
    (output,) = LLM(path, weights=weights, num_blocks=12).generate("hello", GREEDY)
    assert len(output.outputs[0].token_ids) == 12


@pytest.mark.parametrize("how", ["ngram:3", "model"])
def test_speculation_changes_no_greedy_token(path, llm, how):
    """Drafts by look-up, or by a model (here itself), give the same text."""
    speculative = LLM(path, block_size=4, num_blocks=40, speculate=how if how != "model" else f"{path}:2")
    prompts = ["hello hello hello hello", "12 12 12"]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    assert [output.outputs[0].token_ids for output in speculative.generate(prompts, GREEDY)] == expected
    assert blocks_in_use(speculative) == 0


def test_plain_torch_gives_the_same_tokens(path, llm):
    """The engine on the plain torch backend answers as on the reference."""
    prompts = ["hello world", "12 3", "é€"]
    on_torch = LLM(path, backend="plain_torch", block_size=4, num_blocks=40).generate(prompts, GREEDY)
    expected = llm.generate(prompts, GREEDY)
    assert [o.outputs[0].token_ids for o in on_torch] == [o.outputs[0].token_ids for o in expected]


def test_a_folder_without_a_tokenizer_serves_token_ids(tmp_path):
    """Token ids in, token ids out; what needs text says that there is none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    bare = LLM(tmp_path)
    (output,) = bare.generate({"prompt_token_ids": [3, 4, 5]}, GREEDY)
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].text == ""
    for attempt in (
        lambda: bare.generate("text", GREEDY),
        lambda: bare.chat([{"role": "user", "content": "text"}]),
        lambda: bare.generate({"prompt_token_ids": [3]}, SamplingParams(stop="x")),
    ):
        with pytest.raises(TwofoldError, match="token"):
            attempt()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kv_cache_dtype": "int5"}, "int5"),
        ({"weights": "int5"}, "int5"),
        ({"dtype": "float8"}, "float8"),
        ({"backend": "no_such_module"}, "no_such_module"),
        ({"preemption": "kill"}, "kill"),
        ({"preemption": "swap", "swap_coding": "zip"}, "none or lossless"),
        ({"swap_coding": "lossless"}, "preemption"),
        ({"block_size": 0}, "block size"),
        ({"num_blocks": 0}, "number of blocks"),
        ({"max_model_len": 10_000}, "10000"),
        ({"num_blocks": 2, "max_model_len": 200}, "num-blocks"),
        ({"lora_modules": {"a": "/no/such/folder"}}, "adapter_config.json"),
        ({"speculate": "ngram:x"}, "ngram"),
        ({"deterministic": True}, "batch-invariant"),
    ],
)
def test_a_wrong_setting_is_one_sentence(path, settings, sentence):
    """Whatever is wrong, the sentence names it."""
    with pytest.raises(TwofoldError, match=sentence) as caught:
        LLM(path, **settings)
    assert "\n" not in str(caught.value)


def test_a_backend_that_cannot_run_here_says_so_at_once(monkeypatch):
    """Before anything is loaded, in one sentence."""
    import fast
    from twofold.errors import TwofoldError

    monkeypatch.setattr(fast, "unavailable", lambda: "there is no GPU")
    with pytest.raises(TwofoldError, match="--backend fast: there is no GPU; --backend reference needs none"):
        LLM("no-such-model", backend="fast")


@pytest.mark.parametrize("kv_window", [0, 5])
def test_kivis_window_is_chosen_and_chunks_do_not_show(path, kv_window):
    """However small the window: a token is written there before its group is sealed."""
    sizes = {"num_blocks": 24, "block_size": 4, "max_num_seqs": 2, "kv_cache_dtype": "kivi4", "kv_window": kv_window}
    prompts = ["hello world, " * 2, "12321"]
    whole, chunked = (LLM(path, max_num_batched_tokens=tokens, **sizes) for tokens in (64, 3))
    assert whole.cache.format.window == kv_window
    answers = [[o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)] for llm in (whole, chunked)]
    assert answers[0] == answers[1]
    assert blocks_in_use(chunked) == 0


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_window_without_kivi_is_one_sentence(path, kv_cache_dtype):
    with pytest.raises(TwofoldError, match=r"KV format \w+ has no window \(got 0\); those that have one: kivi4, kivi2"):
        LLM(path, kv_cache_dtype=kv_cache_dtype, kv_window=0)
