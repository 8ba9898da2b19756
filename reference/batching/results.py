"""Reading results: what a step that has been executed gave to its sequences.

Steps are read in the order in which they were launched. What was true when a step was scheduled need not be true when
its result is read: a sequence may have ended, or lost its memory. Then its token is discarded, or kept for when it is
back.
"""

from collections import deque

from reference.batching.config import EngineConfig
from reference.batching.lifecycle import Lifecycle
from reference.batching.plan import StepPlan
from reference.batching.request import RequestOutput, Status, StepOutput, TokenLogprobs
from reference.batching.runner import StepResult


class ResultReader(Lifecycle):
    """The unfinished requests, and the steps whose results they wait for.

    Attributes:
        in_flight: Launched steps whose results have not been read, oldest first.
        num_steps: Launched so far.
    """

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.in_flight: deque[StepPlan] = deque()
        self.num_steps = 0

    def update(self, result: StepResult) -> StepOutput:
        """Read the oldest step in flight: blocks are returned and published, sequences gain tokens, some end."""
        plan = self.in_flight.popleft()
        output = StepOutput(plan.step)
        self.space.step_resulted(plan.step)
        for row, error in result.errors.items():
            self.fail(plan.seqs[plan.logit_owner[row]].request, error, output)
        for place in plan.filled_a_block(self.config.block_size):
            seq = plan.seqs[place]
            if seq.tables:
                self.space.publish(seq, min(int(plan.seq_lens[place]), len(seq.token_ids)))
        logprobs = _by_row(plan, result)
        self._read_drawn(plan, result, logprobs, output)
        if plan.verified:
            self._read_verified(plan, result, logprobs, output)
        if plan.beams:
            self._read_beams(plan, result, output)
        return output

    def _read_drawn(
        self, plan: StepPlan, result: StepResult, logprobs: dict[int, TokenLogprobs], output: StepOutput
    ) -> None:
        seqs = [plan.seqs[place] for place in plan.drawn]
        for row, sample_index in enumerate(plan.samples):
            if sample_index != seqs[row].sample_index and seqs[row].finish_reason is None:
                seqs[row] = self.fork(seqs[row], sample_index)  # a prompt's first tokens: one for each sample
        for row, (seq, token) in enumerate(zip(seqs, result.token_ids.tolist())):
            if seq.finish_reason is None:  # it may have ended while the step was in flight
                seq.num_pending -= 1
                self.gain(seq, [token], output, [logprobs[row]] if row in logprobs else None)

    def _read_verified(
        self, plan: StepPlan, result: StepResult, logprobs: dict[int, TokenLogprobs], output: StepOutput
    ) -> None:
        assert result.num_accepted is not None
        assert result.next_token_ids is not None
        row = len(plan.drawn)
        for place, accepted, token in zip(plan.verified, result.num_accepted.tolist(), result.next_token_ids.tolist()):
            seq, drafts = plan.seqs[place], plan.drafts[place]
            if seq.finish_reason is None:
                seq.num_pending -= 1
                seq.drafts, seq.draft_probs = [], None
                if seq.num_computed:  # it was not preempted since
                    self.space.truncate(seq, len(seq.token_ids) + accepted)
                reported = [logprobs[r] for r in range(row, row + accepted + 1) if r in logprobs]
                self.gain(seq, [*drafts[:accepted], token], output, reported or None)
            row += len(drafts) + 1

    def _read_beams(self, plan: StepPlan, result: StepResult, output: StepOutput) -> None:
        candidates = zip(result.beam_scores, result.beam_rows, result.beam_tokens)  # type: ignore[arg-type]
        for (request, places), best in zip(plan.beams, candidates):
            if request.status is Status.FINISHED:
                continue
            beams = [plan.seqs[place] for place in places]
            for seq in beams:
                seq.num_pending -= 1
            scores, rows, tokens = (array[: request.search.num_candidates] for array in best)
            self.replace_beams(request, request.search.advance(beams, scores, rows, tokens), output)

    def fail_in_flight(self, error: str) -> list[RequestOutput]:
        """A step failed, and with it whatever is in the cache: running requests end, those that wait begin anew."""
        for plan in self.in_flight:  # nobody knows how far it came: what it was to take from the host goes again
            self.drops += [*plan.drops, *(swap.key for swap in plan.swaps_in)]
        self.in_flight.clear()
        self.space.step_resulted(self.num_steps - 1)
        self.space.forget_prefixes()
        output = StepOutput()
        for request in [*self.running]:
            self.fail(request, error, output)
        for request in self.waiting:
            for seq in request.live:
                seq.num_pending = 0
            if request.status is Status.SWAPPED:
                self.drops.append(self.space.drop(request))
            self.forget(request)
        return output.finished


def _by_row(plan: StepPlan, result: StepResult) -> dict[int, TokenLogprobs]:
    """The log-probabilities that were asked for, by logit row."""
    if result.logprobs is None:
        return {}
    reported = {}
    columns = zip(
        result.logprobs.rows.tolist(),
        result.logprobs.logprobs.tolist(),
        result.logprobs.ranks.tolist(),
        result.logprobs.top_ids.tolist(),
        result.logprobs.top_logprobs.tolist(),
    )
    for row, logprob, rank, top_ids, top_logprobs in columns:
        num_top = plan.seqs[plan.logit_owner[row]].request.params.logprobs
        reported[row] = TokenLogprobs(logprob, rank, dict(zip(top_ids[:num_top], top_logprobs)))
    return reported
