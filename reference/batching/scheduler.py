"""The scheduler: which sequences compute how many tokens in the next step, and who gets the memory.

Continuous batching: requests join and leave at any step. The policy, all of it:

1. Who came first is served first; ``running`` and then ``waiting`` are in that order.
2. The sequences that are decoding come first, a token each. What the step's budget has left goes to prompts: a long one
   is computed in chunks, and no decoding sequence waits for it.
3. Memory is taken a block at a time, when a token needs it. A chunk shrinks to the room there is. When there is none
   for a single token, the newest request is preempted, whole: it goes back to the head of the queue, and is computed
   again later, or swapped to the host and back. Its tokens are the same as if nothing had happened. (Not if it is
   in this step already: then a prompt waits.)
4. A waiting request is admitted when all that is known of it fits.

**Steps in flight.** With a lookahead of 1 a step is scheduled before the tokens of the last one are read. Most
sequences do not mind: their next token is named by where it will be found. At worst one has ended with the token that
nobody has read, and a token is discarded. A sequence whose next step *depends* on the values waits for them: beams,
drafts that must be verified first, parallel samples that are about to fork.
"""

from reference.batching.cache_space import Work
from reference.batching.config import EngineConfig
from reference.batching.metrics import PoolUsage, pool_usage
from reference.batching.packing import Batch, pack
from reference.batching.plan import StepPlan
from reference.batching.request import Request, Sequence, Status
from reference.batching.results import ResultReader


class Scheduler(ResultReader):
    """Chooses steps. Knows no model, no arrays but its own, and no clock.

    Args:
        speculative: Drafts are proposed between the steps (`drafting`): sequences wait for their results.

    Example:
        >>> import numpy as np
        >>> from reference.batching.runner import StepResult
        >>> config = EngineConfig(num_blocks=8, max_model_len=16, block_size=4, max_num_batched_tokens=4)
        >>> scheduler = Scheduler(config)
        >>> scheduler.add(Request("a", [5, 6, 7, 8, 9, 10]))
        >>> batch = scheduler.schedule()                         # a chunk of the prompt: nothing is drawn yet
        >>> batch.token_ids, batch.slot_mappings[0], batch.logit_rows
        (array([5, 6, 7, 8], dtype=int32), array([0, 1, 2, 3]), array([], dtype=int32))
        >>> scheduler.update(StepResult(token_ids=np.array([], np.int64))).sequences
        []
        >>> batch = scheduler.schedule()                         # the rest of it
        >>> batch.positions, batch.block_tables[0], batch.logit_rows
        (array([4, 5], dtype=int32), array([[0, 1]], dtype=int32), array([1], dtype=int32))
        >>> scheduler.update(StepResult(token_ids=np.array([42]))).sequences[0].new_token_ids
        [42]
    """

    may_idle = False
    """May it have nothing to do although requests wait?"""

    def __init__(self, config: EngineConfig, *, speculative: bool = False):
        super().__init__(config)
        self.speculative = speculative
        self._unlaunched: StepPlan | None = None

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError, changing nothing, if it could never run."""
        super().add(request)
        request.is_plain = request.forked and not self._needs_values(request)

    def schedule(self) -> Batch | None:
        """The next step; None if there is nothing to do before a result is read."""
        plan = StepPlan(self.num_steps)
        self.space.begin_step(plan.step)
        self._go_on(plan)
        if self.waiting:
            self._admit(plan)
        plan.inherit(self._unlaunched)
        self._unlaunched = plan
        if not (plan.seqs or plan.swaps_out or plan.swaps_in):
            return None
        self._unlaunched = None
        plan.copies = self.space.copies
        plan.drops, self.drops = self.drops, []
        self.num_steps += 1
        self.in_flight.append(plan)
        return pack(plan, self.rows)

    def _go_on(self, plan: StepPlan) -> None:
        """The running requests: who is decoding, then whose prompt is being computed; both oldest first."""
        prompts = []
        for request in tuple(self.running):
            if request.status is not Status.RUNNING:
                continue  # preempted just now, for an older one
            if request.is_plain and self._decode_one(plan, request.live[0]):
                continue
            seqs = self._ready(request)
            if request.forked and not self._needs_values(request):
                seqs = [seq for seq in seqs if not self._decode_one(plan, seq)]
            if any(seq.num_uncomputed > 1 for seq in seqs):
                prompts.append((request, seqs))
            elif seqs:
                self._schedule(plan, request, seqs)
        for request, seqs in prompts:
            if request.status is Status.RUNNING:
                self._schedule(plan, request, seqs)

    def _decode_one(self, plan: StepPlan, seq: Sequence) -> bool:
        """The common case, in short: a sequence decodes one token, and there is room for it."""
        num_tokens = len(seq.token_ids) + seq.num_pending
        if (
            num_tokens - seq.num_computed != 1
            or num_tokens >= seq.request.limit
            or plan.num_tokens >= self.config.max_num_batched_tokens
            or not self.space.append_one(seq)
        ):
            return False
        plan.add_drawn(seq)
        return True

    def _ready(self, request: Request) -> list[Sequence]:
        """The sequences of a running request that the next step may compute."""
        if not request.forked:
            return self._ready_to_fork(request)
        if self._needs_values(request) and any(seq.num_pending for seq in request.live):
            return []
        limit = request.limit
        return [seq for seq in request.live if len(seq.token_ids) + seq.num_pending < limit]

    def _needs_values(self, request: Request) -> bool:
        """Does its next step depend on what the last one gave? (Forced tokens are known, but go the way of drafts.)"""
        return bool(request.search or self.speculative or request.forced_token_ids)

    def _ready_to_fork(self, request: Request) -> list[Sequence]:
        """Before the fork: the first sequence, which computes the prompt for all."""
        leader = request.live[0]
        if leader.num_pending:
            return []  # it forks when the first tokens are read
        if len(request.live) == 1 or leader.num_computed < len(request.prompt_token_ids):
            return [leader]
        for seq in request.live[1:]:  # their tokens are known, from before a preemption
            self.space.fork(leader, seq)
        request.forked = True
        return self._ready(request)

    def _schedule(self, plan: StepPlan, request: Request, seqs: list[Sequence]) -> None:
        """Give a running request what the budget and the memory allow."""
        if self.space.has_windows:
            for seq in seqs:
                self.space.release_past_window(seq)
        catching_up = request.search is not None and len(seqs) > 1 and any(seq.num_uncomputed > 1 for seq in seqs)
        work = self._wanted(plan, request, seqs, but=1 if catching_up else 0)
        if request.search and not catching_up and len(work) < len(seqs):
            return  # beams are compared with each other: their last tokens go in one step, or none does
        for seq, num_new in self._fit(plan, request, work):
            self.space.append(seq, num_new)
            self._take(plan, seq, num_new)

    def _wanted(self, plan: StepPlan, request: Request, seqs: list[Sequence], *, but: int = 0) -> Work:
        """Tokens of each sequence that the budget allows: all that are uncomputed, ``but`` so many; and the drafts."""
        work = []
        left = self.config.max_num_batched_tokens - plan.num_tokens
        others = self.rows.num_used - len(plan.seqs) - len(seqs)  # at most so many have yet to get a token
        for seq in seqs:
            wanted = seq.num_uncomputed - but
            if not request.forked:  # only what all of them share
                wanted = len(request.prompt_token_ids) - seq.num_computed
            num_new = min(wanted, left)
            if request.forced_token_ids and num_new == wanted:
                self._draft_forced(plan, seq, request.forced_token_ids)
            if num_new == wanted and seq.drafts:
                num_new += max(0, min(len(seq.drafts), left - num_new - others))
            if num_new > 0:
                work.append((seq, num_new))
                left -= num_new
        return work

    def _draft_forced(self, plan: StepPlan, seq: Sequence, forced: list[int]) -> None:
        """The next of the forced tokens, as drafts that cannot be rejected. All drafts of a step have as many rows of
        logits as there are sequences that do not run: so it has no more than any other step may have."""
        num_rows = self.config.max_num_seqs - self.rows.num_used - sum(map(len, plan.drafts.values()))
        num_drafts = max(0, min(num_rows, seq.request.limit - len(seq.token_ids) - 1))
        start = len(seq.token_ids) - len(seq.request.prompt_token_ids)
        seq.drafts = forced[start : start + num_drafts]

    def _fit(self, plan: StepPlan, request: Request, work: Work) -> Work:
        """The same work if there is memory for it, or a smaller chunk, or a token of each, preempting for it."""
        if not work or self.space.has_room(work):
            return work
        if len(work) == 1 and (num_new := self.space.room(*work[0])):
            return [(work[0][0], num_new)]
        work = [(seq, 1) for seq, _ in work]
        while not self.space.has_room(work):
            newest = self.running[-1]
            if self.space.will_have_room(work) or any(seq.last_step == plan.step for seq in newest.live):
                return []  # it waits: for blocks that a step in flight still names, or for one that is decoding
            self._preempt(plan, newest)
            if newest is request:
                return []
        return work

    def _take(self, plan: StepPlan, seq: Sequence, num_new: int) -> None:
        """The sequence is in the step, and its blocks are there: what are its logits for?"""
        place, request = plan.add(seq, num_new), seq.request
        num_drafts = seq.num_computed - len(seq.token_ids) - seq.num_pending
        if num_drafts < 0:
            return  # a chunk, with more to come
        seq.source = len(plan.drawn)
        seq.num_pending += 1
        if seq.drafts:
            seq.drafts = seq.drafts[:num_drafts]
        if request.search:
            plan.add_beam(request, place)
        elif num_drafts:
            plan.verified.append(place)
            plan.drafts[place] = seq.drafts
            self.rows.write_drafts(seq)
        elif request.forked:
            plan.drawn.append(place)
            plan.samples.append(seq.sample_index)
        else:
            plan.drawn += [place] * request.num_sequences
            plan.samples += range(request.num_sequences)

    def _admit(self, plan: StepPlan) -> None:
        """Let waiting requests in, oldest first, until one does not fit."""
        budget = self.config.max_num_batched_tokens
        free_rows = self.config.max_num_seqs - sum(request.num_rows for request in self.running)
        while self.waiting and not plan.preempted and plan.num_tokens < budget:
            request = self.waiting[0]
            free_rows -= request.num_rows
            if free_rows < 0 or any(seq.num_pending for seq in request.live) or not self._may_admit(request):
                return
            if not self._resume(plan, request):
                return
            self.running.append(self.waiting.popleft())
            request.status = Status.RUNNING
            plan.admitted.append(request.request_id)
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = self.now
                request.metrics.num_cached_tokens = request.live[0].num_computed
            self._schedule(plan, request, self._ready(request))

    def _may_admit(self, request: Request) -> bool:
        """Is it this request's turn? Always, here; see `StaticScheduler`."""
        return True

    def _resume(self, plan: StepPlan, request: Request) -> bool:
        """Give a waiting request its tables, if there is room for it."""
        alone, leader = not self.running, request.live[0]
        if request.status is Status.SWAPPED:
            if not self.space.admits(request, alone=alone):
                return False
            key, swaps = self.space.swap_in(request)
            plan.swaps_in += swaps
            self.drops.append(key)  # a sample that has ended since may have been the only one with blocks in some pool
            return True
        self.space.open(leader, len(leader.token_ids if request.forked else request.prompt_token_ids))
        if not self.space.admits(request, alone=alone):
            self.space.close(leader)
            return False
        self.space.take_row(leader)
        return True

    def _preempt(self, plan: StepPlan, request: Request) -> None:
        """Take the memory of a running request; it waits, before all who came later."""
        self.running.remove(request)
        self.waiting.appendleft(request)
        plan.preempted.append(request.request_id)
        request.metrics.num_preemptions += 1
        for seq in request.live:
            seq.drafts = []
        if self.config.preemption == "swap":
            plan.swaps_out += self.space.swap_out(request)
            request.status = Status.SWAPPED
        else:
            self.forget(request)

    def draftable(self) -> list[Sequence]:
        """The sequences that would verify drafts in the next step: those that are decoding, all their tokens known."""
        return [
            seq
            for request in self.running
            if request.forked and not request.search and not request.forced_token_ids
            for seq in request.live
            if seq.num_pending == 0 and seq.num_uncomputed == 1
        ]

    def usage(self) -> list[PoolUsage]:
        """How the running sequences use each pool."""
        tables = [seq.tables for request in self.running for seq in request.live if seq.tables]
        block_size = self.config.block_size
        return [pool_usage(pool, [t[i] for t in tables], block_size) for i, pool in enumerate(self.space.pools)]
