"""One run: prompts through an engine, tokens into text, and an output for every prompt whatever happens to the others.

The engine knows tokens only. Here text is made of them, stop strings are found, and the engine is told to finish what
they end.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import reference.batching.request as engine_side
from reference.batching.engine import Engine
from reference.batching.metrics import EngineMetrics
from reference.batching.request import FinishReason, Request, SamplingParams, SequenceOutput, TokenLogprobs
from twofold.outputs import Chunk, CompletionOutput, Logprob, RequestOutput, RunMetrics
from twofold.text import TextStream

if TYPE_CHECKING:
    from twofold.tokenizer import Tokenizer


@dataclass
class Prompt:
    """A prompt and how to go on from it."""

    token_ids: list[int]
    params: SamplingParams
    text: str | None = None
    lora: str | None = None
    num_beams: int = 0
    length_penalty: float = 1.0
    cache_salt: str = ""
    completion: list[int] | None = None  # how it does go on: only the log-probabilities are wanted


@dataclass
class Answer:
    """One sample as it grows."""

    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None


class Generation:
    """A run of prompts. Iterate it for chunks; ``outputs`` holds, at any time, what every prompt has so far.

    A prompt that cannot run, or fails on its way, has an output with an ``error``; the others never notice.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], *, tokenizer: "Tokenizer | None", prefix: str):
        self.engine, self.tokenizer, self.prompts = engine, tokenizer, prompts
        engine.metrics = EngineMetrics()
        self.start = time.monotonic()
        self.first_token: float | None = None
        self.end = self.start
        self.stopped = False
        self.answers: list[dict[int, Answer]] = [{} for _ in prompts]
        self.requests: list[Request | None] = [None] * len(prompts)
        self.outputs = [
            RequestOutput(f"{prefix}{i}", p.text, p.token_ids, finished=False) for i, p in enumerate(prompts)
        ]
        self._index = {output.request_id: i for i, output in enumerate(self.outputs)}
        for i, prompt in enumerate(prompts):
            self._add(i, prompt)

    def _add(self, i: int, prompt: Prompt) -> None:
        output = self.outputs[i]
        try:
            if not prompt.token_ids:
                raise ValueError("the prompt is empty: give at least one token of text")
            request = Request(
                output.request_id,
                list(prompt.token_ids),
                prompt.params,
                adapter=prompt.lora,
                cache_salt=prompt.cache_salt,
                num_beams=prompt.num_beams,
                length_penalty=prompt.length_penalty,
                forced_token_ids=prompt.completion,
            )
            self.engine.add(request)
        except ValueError as error:
            output.finished, output.error = True, str(error)
            return
        self.requests[i], output.seed = request, request.seed

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while not self.stopped and any(not output.finished for output in self.outputs):
                step = self.engine.step()
                for gained in step.sequences:
                    if (i := self._index.get(gained.request_id)) is not None:
                        yield from self._take(i, gained)
                for done in step.finished:
                    if (i := self._index.get(done.request_id)) is not None:
                        self._finish(i, done)
        finally:
            self.close()

    def close(self) -> None:
        """End what is unfinished, keeping what it has."""
        for i, output in enumerate(self.outputs):
            if not output.finished:
                done = self.engine.abort(output.request_id)
                for answer in self.answers[i].values():
                    answer.stream.push([], last=True)
                if done is not None:
                    self._finish(i, done)
        self.end = time.monotonic()

    def metrics(self) -> RunMetrics:
        """The run in figures."""
        num_generated = sum(len(sample.token_ids) for output in self.outputs for sample in output.outputs)
        drawn = [p.params.temperature > 0 and p.params.seed is None and not p.num_beams for p in self.prompts]
        seeds = [output.seed for output, was_drawn in zip(self.outputs, drawn) if was_drawn]
        steps = self.engine.metrics
        return RunMetrics(
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            num_generated_tokens=num_generated,
            time_to_first_token=None if self.first_token is None else self.first_token - self.start,
            tokens_per_second=num_generated / max(self.end - self.start, 1e-9),
            num_blocks=self.engine.config.num_blocks,
            peak_blocks=steps.peak_blocks,
            empty_slots=steps.empty_share,
            seed=seeds[0] if len(seeds) == 1 else None,
        )

    def _answer(self, i: int, index: int) -> Answer:
        if index not in self.answers[i]:
            stop = self.prompts[i].params.stop or ()
            detokenizer = self.tokenizer.detokenizer(continues=True) if self.tokenizer else None
            stream = TextStream(detokenizer, (stop,) if isinstance(stop, str) else stop)
            self.answers[i][index] = Answer(stream)
        return self.answers[i][index]

    def _take(self, i: int, gained: SequenceOutput) -> Iterator[Chunk]:
        """Tokens of one sample: into text, and an end if they complete a stop string."""
        if self.first_token is None and gained.new_token_ids:
            self.first_token = time.monotonic()
        answer = self._answer(i, gained.index)
        if answer.finish_reason is not None:
            return
        reason = gained.finish_reason
        shown = ""
        for token, place in zip(gained.new_token_ids, range(len(gained.new_token_ids))):
            answer.token_ids.append(token)
            if gained.new_logprobs:
                answer.logprobs.append(gained.new_logprobs[place])
            is_end = reason is FinishReason.STOP and place == len(gained.new_token_ids) - 1
            shown += answer.stream.push([] if is_end else [token])  # the token that ended it is no text
            if answer.stream.stopped_by is not None:
                reason = FinishReason.STOP
                break
        if reason is not None:
            shown += answer.stream.push([], last=True)
            answer.finish_reason = str(reason)
        if answer.stream.stopped_by is not None and gained.finish_reason is None:
            done = self.engine.finish(gained.request_id, FinishReason.STOP, index=gained.index)
            if done is not None:
                self._finish(i, done)
        yield Chunk(i, gained.index, shown, gained.new_token_ids, answer.finish_reason)

    def _finish(self, i: int, done: engine_side.RequestOutput) -> None:
        output = self.outputs[i]
        output.outputs = [self._completion(i, sample) for sample in done.outputs]
        output.metrics, output.seed, output.error, output.finished = done.metrics, done.seed, done.error, True

    def _completion(self, i: int, sample: engine_side.CompletionOutput) -> CompletionOutput:
        """The engine's account of a sample, in text. A beam was never streamed: its text is made here."""
        if self.prompts[i].num_beams:
            token_ids, text, reason = sample.token_ids, self._decode(sample), str(sample.finish_reason)
            stopped_by, logprobs = None, sample.logprobs
        else:
            answer = self._answer(i, sample.index)
            token_ids, text, logprobs = answer.token_ids, answer.stream.text, answer.logprobs
            reason, stopped_by = answer.finish_reason or str(sample.finish_reason), answer.stream.stopped_by
        asked = self.prompts[i].params.logprobs is not None
        return CompletionOutput(
            sample.index,
            text,
            token_ids,
            sum(place.logprob for place in logprobs) if asked and logprobs else sample.cumulative_logprob,
            [self._places(token, place) for token, place in zip(token_ids, logprobs)] if asked and logprobs else None,
            reason,
            stopped_by if stopped_by is not None else self._stop_token(i, sample),
        )

    def _stop_token(self, i: int, sample: engine_side.CompletionOutput) -> int | None:
        """The stop token, if the caller named it; the model's own end of text is no news."""
        return sample.stop_token_id if sample.stop_token_id in self.prompts[i].params.stop_token_ids else None

    def _decode(self, sample: engine_side.CompletionOutput) -> str:
        tokens = sample.token_ids[:-1] if sample.finish_reason is FinishReason.STOP else sample.token_ids
        if self.tokenizer is None:
            return ""
        detokenizer = self.tokenizer.detokenizer(continues=True)
        return detokenizer.push(tokens) + detokenizer.flush()

    def _places(self, token: int, place: TokenLogprobs) -> dict[int, Logprob]:
        entries: dict[int, tuple[float, Any]] = {token: (place.logprob, place.rank)}
        for rank, (other, logprob) in enumerate(place.top.items(), start=1):
            entries.setdefault(other, (logprob, rank))
        text = self.tokenizer.decode if self.tokenizer else (lambda ids: "")
        return {id: Logprob(float(logprob), rank, text([id])) for id, (logprob, rank) in entries.items()}
