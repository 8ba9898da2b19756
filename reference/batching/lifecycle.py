"""What happens to a request between its arrival and its end, whoever decides when.

It is added (or refused), its sequences gain tokens, fork where the prompt ends or where a beam has two children, lose
their memory and begin anew, and end, one by one or all at once. `Scheduler` decides which of them compute, and when.
"""

from collections import deque

from reference.batching.beams import BeamSearch
from reference.batching.cache_space import CacheSpace
from reference.batching.config import EngineConfig
from reference.batching.request import (
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    Sequence,
    SequenceOutput,
    Status,
    StepOutput,
    TokenLogprobs,
)
from reference.batching.running_rows import RunningRows


class Lifecycle:
    """The unfinished requests, their sequences and their memory.

    Attributes:
        now: Seconds; whoever drives this sets it.
        running: Requests that hold memory, oldest first.
        waiting: Those that do not, oldest first; all younger than the running ones.
        drops: Keys of swapped blocks that nobody will want again, for the next step.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self.now = 0.0
        self.rows = RunningRows(config.max_num_seqs, config.max_model_len, config.block_size, len(config.pool_sizes))
        self.space = CacheSpace(config, self.rows)
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.drops: list[int] = []
        self._num_seqs = 0

    # Beginnings.

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError, changing nothing, if it could never run."""
        self._refuse_hopeless(request)
        params, prompt, max_tokens = request.params, request.prompt_token_ids, request.max_tokens
        asked = self.config.max_model_len if max_tokens is None else len(prompt) + max_tokens
        request.limit = int(min(self.config.max_model_len, self.space.capacity(request), asked))
        request.stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            request.stop_ids |= frozenset(self.config.eos_token_ids)
        request.search = BeamSearch(request) if request.num_beams else None
        request.forked = request.num_sequences == 1
        request.live = [self._new_sequence(request, 0, list(prompt))]
        request.status = Status.WAITING
        self.waiting.append(request)

    def _refuse_hopeless(self, request: Request) -> None:
        config, prompt_len, num_seqs = self.config, len(request.prompt_token_ids), request.num_sequences
        whole_len = prompt_len + len(request.forced_token_ids or ())
        reason = None
        if request.status is not Status.NEW:
            reason = "it has been added before; make a new one"
        elif prompt_len >= config.max_model_len:
            reason = (
                f"the prompt has {prompt_len} tokens, and the context of {config.max_model_len} holds an answer too"
            )
        elif prompt_len >= self.space.capacity(request):
            blocks = f"{config.num_blocks} KV blocks of {config.block_size} tokens"
            reason = (
                f"the prompt has {prompt_len} tokens: {blocks} can never hold it and an answer ({num_seqs} samples)"
            )
        elif whole_len > min(config.max_model_len, self.space.capacity(request)):
            room = (
                f"a context of {config.max_model_len} and {config.num_blocks} KV blocks of {config.block_size} tokens"
            )
            reason = f"prompt and completion have {whole_len} tokens: {room} can never hold them"
        elif num_seqs > config.max_num_seqs:
            reason = f"it has {num_seqs} sequences, and max_num_seqs is {config.max_num_seqs}"
        elif request.num_beams > config.max_num_batched_tokens:
            reason = f"it has {num_seqs} beams for each step, and a step has {config.max_num_batched_tokens} tokens"
        if reason:
            raise ValueError(f"request {request.request_id}: {reason}")

    def _new_sequence(self, request: Request, sample_index: int, token_ids: list[int]) -> Sequence:
        self._num_seqs += 1
        return Sequence(self._num_seqs - 1, request, sample_index, token_ids)

    def fork(self, parent: Sequence, sample_index: int) -> Sequence:
        """A sequence that goes on from where another stands."""
        request = parent.request
        child = self._new_sequence(request, sample_index, list(parent.token_ids))
        child.num_pending = parent.num_pending
        self.space.fork(parent, child)
        request.live.append(child)
        request.forked = bool(parent.tables or parent.host_rows)  # if not, it was preempted: it forks when it is back
        return child

    # Progress.

    def gain(
        self, seq: Sequence, tokens: list[int], output: StepOutput, logprobs: list[TokenLogprobs] | None = None
    ) -> None:
        """Tokens of a sequence were read. It takes them until one ends it."""
        request, token_ids, reason = seq.request, seq.token_ids, None
        num_before = len(token_ids)
        for token in tokens:
            token_ids.append(token)
            if token in request.stop_ids:
                reason = FinishReason.STOP
                break
            if len(token_ids) >= request.limit:
                reason = FinishReason.LENGTH
                break
        gained = len(token_ids) - num_before
        del tokens[gained:]
        self.rows.write_tokens(seq, gained)
        request.metrics.gained(gained, self.now)
        if logprobs:
            logprobs = logprobs[:gained]
            seq.logprobs += logprobs
        output.sequences.append(SequenceOutput(request.request_id, seq.sample_index, tokens, reason, logprobs))
        if reason is not None:
            self._end_sequence(seq, reason)
            if not request.live:
                output.finished.append(self._end_request(request))

    def replace_beams(self, request: Request, successors: list[tuple[Sequence, int]], output: StepOutput) -> None:
        """The next beams of a search, each with the one it goes on from and its token; none: the search is over.

        A beam without children ends; the first child of a beam is the beam itself, and the others fork.
        """
        request.metrics.gained(1, self.now)
        parents = [parent for parent, _ in successors]
        for seq in request.live:
            if seq not in parents:
                seq.finish_reason = FinishReason.LENGTH
                self.space.close(seq)
        beams = [
            parent if parents.index(parent) == place else self.fork(parent, place)
            for place, parent in enumerate(parents)
        ]  # all forks before any token: a child begins where its parent stands
        for seq, (_, token) in zip(beams, successors):
            seq.token_ids.append(token)
            self.rows.write_tokens(seq, 1)
        request.live = beams
        if not beams:
            output.finished.append(self._end_request(request))

    def forget(self, request: Request) -> None:
        """All of it will be computed again: the prompt first, and once for all of its sequences."""
        for seq in request.live:
            self.space.close(seq)
            seq.num_computed, seq.host_rows = 0, []
        request.status = Status.WAITING
        request.forked = request.num_rows == 1

    # Endings.

    def end(self, request: Request, reason: FinishReason, *, index: int | None = None) -> RequestOutput | None:
        """End a request, or one of its parallel samples, before its time. Its result, if no sample is left."""
        for seq in [*request.live]:
            if index in (None, seq.sample_index):
                self._end_sequence(seq, reason)
        return self._end_request(request) if not request.live and request.status is not Status.FINISHED else None

    def fail(self, request: Request, error: str, output: StepOutput) -> None:
        """Something went wrong with this request; the others go on."""
        request.error = request.error or error
        result = self.end(request, FinishReason.ERROR)
        if result:
            output.finished.append(result)

    def _end_sequence(self, seq: Sequence, reason: FinishReason) -> None:
        request = seq.request
        seq.finish_reason = reason
        led = seq is request.live[0]
        request.live.remove(seq)
        if led and request.live and not request.forked:
            self.space.fork(seq, request.live[0])  # who goes on computing the prompt that they share
        request.forked |= len(request.live) == 1  # the last one shares with nobody
        self._vacate(seq)
        tokens = seq.output_token_ids
        stopped = reason is FinishReason.STOP and bool(tokens) and tokens[-1] in request.stop_ids
        wants_logprobs = request.params.logprobs is not None
        request.completed.append(
            CompletionOutput(
                index=seq.sample_index,
                token_ids=tokens,
                finish_reason=reason,
                stop_token_id=tokens[-1] if stopped else None,
                logprobs=seq.logprobs if wants_logprobs else None,
                cumulative_logprob=sum(token.logprob for token in seq.logprobs) if wants_logprobs else None,
            )
        )

    def _vacate(self, seq: Sequence) -> None:
        """A sequence has ended: its memory is free for others, at once."""
        self.space.close(seq)

    def _end_request(self, request: Request) -> RequestOutput:
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        if request.status is Status.SWAPPED:
            self.drops.append(self.space.drop(request))
        request.status = Status.FINISHED
        request.metrics.finished_time = self.now
        completed = request.completed or request.search.outputs()  # a beam search that was cut short has open beams
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            outputs=sorted(completed, key=lambda output: output.index),
            metrics=request.metrics,
            seed=request.seed,
            error=request.error,
        )
