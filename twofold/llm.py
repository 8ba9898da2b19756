"""`LLM`: a model, an engine, and text in and out.

from twofold import LLM, SamplingParams
llm = LLM()
print(llm.generate("Why is the sky blue?", SamplingParams(temperature=0, max_tokens=64))[0].outputs[0].text)
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from reference.batching.engine import Engine
from reference.batching.request import SamplingParams
from reference.batching.trace import Record
from reference.memory.arena import PlannedBackend
from reference.model.decoder import AdapterBank, Decoder
from twofold.backends import execution, resolve_backend
from twofold.checkpoints import Checkpoint, RandomTensors, dummy_checkpoint, load_checkpoint
from twofold.errors import TwofoldError
from twofold.generation import Generation, Prompt
from twofold.lora import read_adapter
from twofold.outputs import Chunk, RequestOutput, RunMetrics
from twofold.sizing import fill_room, pool_sizes, require_room
from twofold.speculation import make_drafter

__all__ = ["LLM", "SamplingParams"]

PromptLike = str | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
CompletionLike = str | Sequence[int]


class LLM:
    """A model ready to generate.

    Args:
        model: "SmolLM2-135M-Instruct" (the default, fetched once), a Hugging Face folder, a .gguf file, a hub name, or
            a `Checkpoint`.
        backend: Who computes: "reference", "fast", "plain_torch", the name of an importable module with some of the
            interface's ops, or a module or object.
        device: Where the arrays live, as the backend names it.
        dtype: Of activations: "float32", "bfloat16", "float16"; "auto": float32.
        weights: Format of the linear layers' weights: "auto" (as ``dtype``), "as-is" (a GGUF's own blocks), or a name
            of the weight formats' table. `twofold models` prints both tables.
        kv_cache_dtype: Format of the KV cache, by name.
        kv_window: Of a KIVI format: the newest tokens that are read in full precision; by default the format's own.
        block_size: Tokens in a KV block.
        num_blocks: In the pool. By default, on a GPU, as many as there is room for, measured when the weights are
            there; elsewhere as many as fit in 256 MiB, and enough for one sequence of full length where that takes no
            more than 1 GiB.
        gpu_memory_utilization: Share of a GPU's memory that weights, cache and steps may take together.
        max_num_seqs: Sequences that run at once; by default 64, on a GPU 256.
        max_num_batched_tokens: Token budget of a step, by default 512, on a GPU 16384; longer prompts are computed in
            chunks.
        max_model_len: Longest prompt plus answer; by default the model's context, or what the pool holds if less.
        preemption: "recompute" or "swap".
        swap_coding: "none", or "lossless": swapped blocks travel and wait in fewer bytes.
        enable_prefix_caching: Share the blocks of equal prompt beginnings.
        lookahead: Steps scheduled ahead of the tokens read: 0 or 1. By default 1 where steps run in the background
            (``backend="fast"`` on a GPU), else 0.
        deterministic: Use the backend's batch-invariant ops.
        lora_modules: Adapters by name: folders as `peft` saves them.
        speculate: "ngram:K": draft K tokens by look-up in the text so far; or a model's name or path, with ":K" or not.
        trace: Called with a record of every step, such as a `reference.batching.trace.TraceWriter`.
        load: "auto", or "dummy": random weights from a config alone (a folder with a ``config.json``, or a name of
            `twofold.checkpoints.shapes.SHAPES`).
        on_progress: Called with (what, bytes done, bytes in all or None) while fetching and loading.

    Raises:
        TwofoldError: For anything wrong with the model or the settings: one sentence.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint | None = None,
        *,
        backend: str | ModuleType | Any = "reference",
        device: str | None = None,
        dtype: str = "auto",
        weights: str = "auto",
        kv_cache_dtype: str = "auto",
        kv_window: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        preemption: str = "recompute",
        swap_coding: str = "none",
        enable_prefix_caching: bool = True,
        lookahead: int | None = None,
        deterministic: bool = False,
        lora_modules: Mapping[str, str | Path] | None = None,
        speculate: str | None = None,
        trace: Callable[[Record], None] | None = None,
        load: str = "auto",
        on_progress: Callable[[str, int, int | None], None] | None = None,
    ):
        self.backend = resolve_backend(backend, deterministic=deterministic)
        self.checkpoint = _checkpoint(model, load, on_progress)
        self.tokenizer = self.checkpoint.tokenizer
        config = self.checkpoint.config
        dtype = "float32" if dtype == "auto" else dtype
        how = execution(self.backend, device)
        if how.plans_memory:
            self.backend = PlannedBackend(self.backend)
        lookahead = how.lookahead if lookahead is None else lookahead
        max_num_seqs = how.max_num_seqs if max_num_seqs is None else max_num_seqs
        max_num_batched_tokens = (
            how.max_num_batched_tokens if max_num_batched_tokens is None else max_num_batched_tokens
        )
        if not 0 < gpu_memory_utilization <= 1:
            raise TwofoldError(f"--gpu-memory-utilization {gpu_memory_utilization}: expected a share in (0, 1]")
        room = None if how.room is None else partial(how.room, gpu_memory_utilization)
        make_runner = how.runner if room is None else partial(how.runner, most_seqs=max_num_seqs)
        fewest_blocks = None if room is None else -(-(max_model_len or 1) // max(block_size, 1))
        sizes = pool_sizes(
            config,
            kv_cache_dtype,
            dtype,
            block_size=block_size,
            num_blocks=fewest_blocks if num_blocks is None else num_blocks,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            lookahead=lookahead,
            kv_window=kv_window,
        )
        try:
            if room is not None:
                as_they_come = self.checkpoint.nbytes if weights == "as-is" else None
                require_room(config, weights, sizes, free=room(), weights_take=as_they_come)
            self.adapters = AdapterBank(config, backend=self.backend, dtype=dtype, device=device)
            for name, path in (lora_modules or {}).items():
                self.adapters.add(name, *read_adapter(path))
            self.decoder = Decoder(
                config,
                RandomTensors(config, backend=self.backend, dtype=dtype, format=weights, device=device)
                if load == "dummy"
                else self.checkpoint.tensors(as_is=weights == "as-is", on_progress=on_progress),
                backend=self.backend,
                dtype=dtype,
                weight_format=weights,
                device=device,
                max_positions=sizes.max_model_len if room is None else sizes.longest,
            )
            if room is not None and num_blocks is None:
                parts = (self.decoder, self.adapters, make_runner, room)
                sizes = fill_room(sizes, weights, *parts, num_tokens=max_num_batched_tokens)
            self.cache = sizes.cache(config, backend=self.backend, device=device)
            engine_config = sizes.engine_config(
                config,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                preemption=preemption,
                swap_coding=swap_coding,
                enable_prefix_caching=enable_prefix_caching,
                lookahead=lookahead,
                eos_token_ids=self.checkpoint.eos_token_ids,
                model_fingerprint=self.decoder.fingerprint,
            )
            self.engine = Engine(
                engine_config,
                make_runner(self.decoder, self.cache, adapters=self.adapters),
                drafter=make_drafter(speculate, self.decoder, engine_config) if speculate else None,
                adapters={name: (i, self.adapters.digests[name]) for i, name in enumerate(self.adapters.names)},
                trace=trace,
            )
        except (ValueError, NotImplementedError) as error:
            raise TwofoldError(str(error)) from None
        self._runs = itertools.count()
        self._run: Generation | None = None

    # --- text in -------------------------------------------------------------------------------------------------

    def render(self, prompt: str | Messages, *, chat: bool | None = None, system: str | None = None) -> dict[str, Any]:
        """A prompt as tokens: through the chat template where there is one, or as the text stands.

        Args:
            prompt: Text (one user message), or messages with "role" and "content".
            chat: True asks for the template, False for the text as it stands; None: the template if there is one.
            system: A system message to begin with.
        """
        tokenizer = self.checkpoint.require_tokenizer()
        template = tokenizer.chat_template
        if not prompt:
            return {"prompt": "", "prompt_token_ids": []}
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if chat is None:
            chat = template is not None
        if chat and template is None:
            raise TwofoldError(
                f"{self.checkpoint.name} has no chat template; use --raw to give it the text as it stands"
            )
        if not chat:
            if system is not None or not isinstance(prompt, str):
                raise TwofoldError("a system message and a conversation need the chat template")
            return {"prompt": prompt, "prompt_token_ids": tokenizer.encode(prompt)}
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        text = tokenizer.apply_chat_template(messages)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def _prompt(self, prompt: PromptLike, params: SamplingParams, lora: str | None, **more: Any) -> Prompt:
        text, ids, salt = (prompt, None, "") if isinstance(prompt, str) else (
            prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt", "")
        )  # fmt: skip
        if ids is None and text is None:
            raise TwofoldError('a prompt is a string, {"prompt": "..."} or {"prompt_token_ids": [...]}')
        if ids is None:
            ids = self.checkpoint.require_tokenizer().encode(text) if text else []
        if lora is not None and lora not in self.adapters.digests:
            raise TwofoldError(
                f"no LoRA adapter is called {lora!r}; there is {', '.join(self.adapters.names) or 'none'}"
            )
        if params.stop and self.tokenizer is None:
            raise TwofoldError(f"stop strings need text: {self.checkpoint.no_tokenizer}; use stop_token_ids")
        return Prompt([int(id) for id in ids], params, text, lora, cache_salt=salt, **more)

    # --- text out ------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
        num_beams: int = 0,
        length_penalty: float = 1.0,
    ) -> Iterator[Chunk]:
        """What each answer gains, as it gains it; afterwards ``outputs`` has the whole of each.

        Closing the iterator early ends what is unfinished. One run at a time.

        Args:
            prompts: One or many: strings, ``{"prompt": ...}`` or ``{"prompt_token_ids": [...]}``.
            params: For all of them, or one each.
            lora: The adapter, by its name in ``lora_modules``: for all of them, or one each.
            num_beams: Beam search with so many beams, instead of sampling; its answers come when they are whole.
            length_penalty: Of the beam search.
        """
        several = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        wanted = [
            self._prompt(prompt, p, name, num_beams=num_beams, length_penalty=length_penalty)
            for prompt, p, name in zip(
                several, _one_each(params or SamplingParams(), several, "params"), _one_each(lora, several, "lora")
            )
        ]
        return self._start(wanted)

    def _start(self, prompts: Sequence[Prompt]) -> Iterator[Chunk]:
        """A run, instead of the one before it."""
        if self._run is not None:
            self._run.close()
        self._run = Generation(self.engine, prompts, tokenizer=self.tokenizer, prefix=f"{next(self._runs)}-")
        return iter(self._run)

    def stop(self) -> None:
        """End the run at its next step, keeping what it has. Safe to call from a signal handler."""
        if self._run is not None:
            self._run.stopped = True

    @property
    def outputs(self) -> list[RequestOutput]:
        """The outputs of the last run, in the order of its prompts."""
        return self._run.outputs if self._run is not None else []

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answers to all prompts, in their order. One that cannot run has an ``error``; the others are answered."""
        for _ in self.stream(prompts, params, lora=lora):
            pass
        return self.outputs

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """The next message of one conversation, or of each of many."""
        many: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([self.render(conversation, chat=True) for conversation in many], params, lora=lora)

    def beam_search(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        beam_width: int = 4,
        max_tokens: int = 16,
        length_penalty: float = 1.0,
        ignore_eos: bool = False,
        lora: str | None = None,
    ) -> list[RequestOutput]:
        """The best continuations that beam search finds, best first, with their ``cumulative_logprob``."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos)
        stream = self.stream(prompts, params, lora=lora, num_beams=beam_width, length_penalty=length_penalty)
        for _ in stream:
            pass
        return self.outputs

    def score(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        completions: CompletionLike | Sequence[CompletionLike],
        *,
        logprobs: int = 0,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """How likely the model finds given completions: what `generate` would have reported had it drawn them.

        Log-probabilities are of the model's own distribution, as `generate` reports them, whatever parameters a
        completion was drawn with. With ``deterministic=True`` they are the same bits, in every KV format, in any
        company, with a prefix hit or cold, preempted or not; otherwise the same up to rounding. A step judges as many
        tokens as sequences may run (``max_num_seqs``); completions of one prompt share its blocks.

        Args:
            prompts: One or many, as `generate` takes them. One with many completions: for all of them.
            completions: One for each prompt: token ids, or text. Text is encoded by itself, without special tokens:
                that need not be how the model would have written it, so pass the ``token_ids`` of what was generated.
            logprobs: How many of the likeliest tokens to report at each place, beside the completion's own.
            lora: The adapter, by its name in ``lora_modules``: for all of them, or one each.

        Returns:
            As of `generate`: one output each, with ``logprobs`` of every token of the completion and their sum,
            ``cumulative_logprob``. One that cannot be computed (empty, too long for the context) has an ``error``.

        Raises:
            TwofoldError: If the numbers of prompts and completions differ, or one is neither text nor token ids.
        """
        is_one = isinstance(prompts, str | Mapping)
        given: Any = (
            [completions] if isinstance(completions, str) or (is_one and _are_ids(completions)) else completions
        )
        several = [prompts] * len(given) if is_one else list(prompts)
        if len(several) != len(given):
            raise TwofoldError(f"{len(given)} completions for {len(several)} prompts: give one each")
        try:
            params = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=logprobs)
        except ValueError as error:
            raise TwofoldError(str(error)) from None
        wanted = [
            self._prompt(prompt, params, name, completion=self._completion(completion))
            for prompt, completion, name in zip(several, given, _one_each(lora, several, "lora"))
        ]
        for _ in self._start(wanted):
            pass
        return self.outputs

    def _completion(self, completion: Any) -> list[int]:
        if isinstance(completion, str):
            return self.checkpoint.require_tokenizer().encode(completion, add_special_tokens=False)
        if not _are_ids(completion):
            raise TwofoldError("a completion is a string or a list of token ids")
        return [int(id) for id in completion]

    # --- what it took --------------------------------------------------------------------------------------------

    def metrics(self) -> RunMetrics:
        """The last run in figures."""
        if self._run is None:
            raise TwofoldError("nothing has been run yet")
        return self._run.metrics()


def _checkpoint(model: str | Path | Checkpoint | None, load: str, on_progress: Any) -> Checkpoint:
    if load not in ("auto", "dummy"):
        raise TwofoldError(f"--load {load}: expected auto or dummy")
    if isinstance(model, Checkpoint):
        return model
    return dummy_checkpoint(model) if load == "dummy" else load_checkpoint(model, on_progress=on_progress)


def _are_ids(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and all(isinstance(token, int | np.integer) for token in value)


def _one_each(value: Any, prompts: Sequence[Any], name: str) -> list[Any]:
    """``value`` for every prompt, or, if it is a sequence, one for each."""
    if value is None or isinstance(value, str | SamplingParams):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise TwofoldError(f"{len(value)} {name} for {len(prompts)} prompts: give one, or one each")
    return list(value)
