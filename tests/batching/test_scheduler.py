"""The scheduler under all that can happen to it: every request's tokens are those it gets alone, and memory adds up."""

from collections import Counter
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reference.batching.config import EngineConfig
from reference.batching.engine import Engine, StepOutput
from reference.batching.packing import Batch
from reference.batching.request import FinishReason, Request, RequestOutput, SamplingParams, SequenceOutput, Status
from reference.kv_cache.block_pool import RELEASED
from twofold.conformance.strategies.batching import (
    FakeDrafter,
    FakeModel,
    FakeRunner,
    engine_configs,
    prompts,
    sampling_params,
)

ADAPTERS = {"fr": (0, "digest of fr"), "de": (1, "digest of de")}


class Scheduling(RuleBasedStateMachine):
    """Requests come, are stopped and aborted, in any order, on an engine that is too small for them."""

    @initialize(config=engine_configs(), num_drafts=st.sampled_from([0, 0, 1, 3]), error_every=st.integers(2, 5))
    def start(self, config, num_drafts, error_every):
        group_size = 2 if config.block_size > 1 else 1
        self.model = FakeModel(config.sliding_window, config.kv_window, group_size)
        self.runner = FakeRunner(self.model, config, on_launch=self.check_launch)
        drafter = FakeDrafter(self.model, num_drafts, error_every) if num_drafts else None
        self.engine = Engine(config, self.runner, drafter=drafter, adapters=ADAPTERS, clock=lambda: 0.0)
        self.requests: dict[str, Request] = {}
        self.gained: dict[tuple[str, int], list[int]] = {}
        self.in_flight: list[Batch] = []
        self.failure: Exception | None = None

    @rule(
        asked=st.lists(
            st.tuples(
                prompts(),
                sampling_params(),
                st.sampled_from([0, 0, 0, 0, 0, 1, 2, 3]),  # beams
                st.sampled_from([None, None, None, "fr", "de"]),
                st.sampled_from(["", "", "", "x"]),
            ),
            min_size=1,
            max_size=4,
        )
    )
    def add(self, asked):
        for prompt, params, num_beams, adapter, salt in asked:
            params = replace(params, n=1) if num_beams else params
            self.add_one(Request(f"r{len(self.requests)}", prompt, params, adapter, salt, num_beams))

    def add_one(self, request: Request):
        before = self.owners(0)
        try:
            self.engine.add(request)
            self.requests[request.request_id] = request
        except ValueError:
            assert self.owners(0) == before, "a refused request holds memory"

    @precondition(lambda self: self.gained)
    @rule(data=st.data(), n=st.integers(1, 2))
    def go_on(self, data, n):
        """A conversation: somebody's prompt and what one of its samples has said so far, as a new prompt."""
        request_id, index = data.draw(st.sampled_from(sorted(self.gained)), label="sample")
        first = self.requests[request_id]
        prompt = first.prompt_token_ids + self.gained[request_id, index] + [9]
        params = SamplingParams(n=n, max_tokens=3, seed=1)
        self.add_one(Request(f"r{len(self.requests)}", prompt, params, first.adapter, first.cache_salt))

    @rule(prompt=prompts(), forced=prompts(), params=sampling_params(), adapter=st.sampled_from([None, None, "fr"]))
    def force(self, prompt, forced, params, adapter):
        """What somebody else has said is to be judged."""
        params = replace(params, n=1, logprobs=0)
        self.add_one(Request(f"r{len(self.requests)}", prompt, params, adapter, forced_token_ids=forced))

    @precondition(lambda self: self.engine.has_unfinished())
    @rule(count=st.integers(1, 8))
    def step(self, count):
        for _ in range(count):
            self.read(self.engine.step())
            self.memory_adds_up()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), whole=st.booleans())
    def end_early(self, data, whole):
        """Abort a request, or stop one of its samples from outside."""
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)), label="request")]
        indices = [seq.sample_index for seq in request.live]
        if whole or request.num_beams or not indices:
            result = self.engine.abort(request.request_id)
            assert (result is None) == (not indices), "an abort ends what is unfinished, and nothing else"
        else:
            index = data.draw(st.sampled_from(indices), label="sample")
            result = self.engine.finish(request.request_id, FinishReason.STOP, index=index)
            assert index not in [seq.sample_index for seq in request.live], "the sample goes on"
        if result:
            self.check_result(result)

    @precondition(lambda self: self.engine.has_unfinished())
    @rule(what=st.sampled_from(["nothing", "nothing", "nothing", "a row", "the device"]), data=st.data())
    def go_wrong(self, what, data):
        """A row comes out broken, or the device fails: some end with an error, the others never notice."""
        running = [seq.seq_id for request in self.engine.scheduler.running for seq in request.live]
        if what == "a row" and running:
            self.runner.broken.add(data.draw(st.sampled_from(running), label="sequence"))
        elif what == "the device":
            self.runner.fail_next = True

    def read(self, output: StepOutput):
        if self.engine.failure is not self.failure:  # the steps in flight are gone
            self.failure, self.in_flight = self.engine.failure, []
        self.in_flight = [batch for batch in self.in_flight if batch.step > output.step]
        for gained in output.sequences:
            assert isinstance(gained, SequenceOutput)
            self.gained.setdefault((gained.request_id, gained.index), []).extend(gained.new_token_ids)
        for result in output.finished:
            self.check_result(result)

    def check_result(self, result: RequestOutput):
        """What a request got is what it gets alone; what it got in pieces is what it got in all."""
        request = self.requests[result.request_id]
        assert result.error in (None, "not finite") or "on fire" in result.error, result.error
        assert request.status is Status.FINISHED
        if request.num_beams:
            self.check_beams(request, result)
            return
        for output in result.outputs:
            alone = self.model.tokens_alone(request, output.index, request.stop_ids, request.limit)
            if output.token_ids != alone:
                early = output.stop_token_id is None and output.finish_reason is not FinishReason.LENGTH
                assert early, f"{result.request_id}: {output.token_ids} instead of {alone}"
                assert output.token_ids == alone[: len(output.token_ids)], f"{output.token_ids} does not begin {alone}"
            assert self.gained.get((result.request_id, output.index), []) == output.token_ids, "pieces and whole differ"
            if request.params.logprobs is not None:
                assert [-token.logprob for token in output.logprobs] == output.token_ids, "others' log-probabilities"

    def check_beams(self, request: Request, result: RequestOutput):
        if any(output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR) for output in result.outputs):
            return
        config = replace(self.engine.config, num_blocks=400, lookahead=0, max_num_seqs=8, max_num_batched_tokens=64,
                         max_model_len=request.limit, num_window_blocks=400, enable_prefix_caching=False)  # fmt: skip
        alone = Engine(config, FakeRunner(self.model, config), adapters=ADAPTERS)
        params = replace(request.params, max_tokens=None)
        alone.add(Request("alone", request.prompt_token_ids, params, request.adapter, num_beams=request.num_beams))
        finished = []
        while not finished:
            finished = alone.step().finished
        assert [o.token_ids for o in result.outputs] == [o.token_ids for o in finished[0].outputs], "other beams"
        assert [o.score for o in result.outputs] == [o.score for o in finished[0].outputs], "other scores"

    def check_launch(self, batch: Batch):
        """What may be asked of a step, at the moment it is launched."""
        config, space = self.engine.config, self.engine.scheduler.space
        assert batch.num_tokens <= config.max_num_batched_tokens, "over the token budget"
        assert len(batch.seq_ids) == len(set(batch.seq_ids)) <= config.max_num_seqs, "over the sequence budget"
        for pool, slots, copies in zip(space.pools, batch.slot_mappings, batch.copies):
            written = [int(slot) // config.block_size for slot in slots]
            assert all(pool.ref_counts[block] == 1 for block in written), "a shared block is written"
            assert not any(pool.published[block] for block in written), "a published block is written"
            targets = [target for _, target in copies]
            assert len(set(targets)) == len(targets), "two copies to one block"
            assert not set(targets) & {source for source, _ in copies}, "a copy of a copy"
        self.in_flight.append(batch)

    def owners(self, pool: int) -> Counter:
        """Of each block, how many tables own it or hold it for a step in flight."""
        scheduler = self.engine.scheduler
        owners = Counter()
        for request in scheduler.running:
            for seq in request.live:
                if seq.tables:
                    owners.update(b for b in seq.tables[pool].block_ids if b != RELEASED)
        for _, of_pool, block_ids in scheduler.space._held:
            if of_pool == pool:
                owners.update(b for b in block_ids if b != RELEASED)
        return owners

    @invariant()
    def memory_adds_up(self):
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        for index, pool in enumerate(scheduler.space.pools):
            owners = self.owners(index)
            counted = {block: count for block, count in enumerate(pool.ref_counts) if count}
            assert counted == dict(owners), "a block's count is not its owners"
            assert pool.num_free + len(owners) == pool.num_blocks, "free and live blocks are not all there are"
            for batch in self.in_flight:
                named = {int(block) for block in batch.block_tables[index].reshape(-1) if block >= 0}
                named |= {block for copy in batch.copies[index] for block in copy}
                named |= {b for s in [*batch.swaps_out, *batch.swaps_in] if s.pool == index for b in s.block_ids}
                assert named <= owners.keys(), f"step {batch.step} is in flight, and a block it names is free"
        for request in scheduler.waiting:
            assert not any(seq.tables or seq.row >= 0 for seq in request.live), "a waiting request holds memory"
        for seq in (seq for request in scheduler.running for seq in request.live):
            claimed = {table.num_tokens for table in seq.tables}
            assert claimed <= {seq.num_computed}, "a table's tokens are not those that are computed"
        rows = [seq.row for request in scheduler.running for seq in request.live if seq.tables]
        assert len(rows) == len(set(rows)) <= self.engine.config.max_num_seqs, "two sequences share a row"
        assert len(rows) + len(scheduler.rows._free) == self.engine.config.max_num_seqs, "rows were lost"

    def teardown(self):
        """Let everything finish: it does, and nothing is left behind."""
        if not hasattr(self, "engine"):
            return
        for _ in range(4000):
            if not self.engine.has_unfinished():
                break
            self.step(1)
        assert not self.engine.has_unfinished(), "requests that never finish"
        assert all(request.status is Status.FINISHED for request in self.requests.values())
        scheduler = self.engine.scheduler
        for pool in scheduler.space.pools:
            assert pool.num_free == pool.num_blocks, "blocks did not return"
        assert not scheduler.space.swapped
        assert {key for key, _ in self.runner.host} <= set(scheduler.drops), "the host keeps blocks nobody wants"


def test_what_only_an_ended_sample_had_on_the_host_goes():
    """Two samples are swapped out; one turns out to have ended, and only it had a block in the window's pool."""
    config = EngineConfig(
        num_blocks=6, max_model_len=24, block_size=4, num_window_blocks=4, max_num_seqs=6, max_num_batched_tokens=64,
        preemption="swap", enable_prefix_caching=False, lookahead=1, watermark=0.0, kv_window=1,
    )  # fmt: skip
    machine = Scheduling()
    machine.start(config=config, num_drafts=0, error_every=2)
    machine.add_one(Request("r0", [0], SamplingParams(temperature=1.0, max_tokens=None, seed=0)))
    machine.step(1)
    machine.add_one(Request("r1", [0, 17, 9], SamplingParams(n=2, max_tokens=3, seed=1)))
    machine.add_one(Request("r2", [0], SamplingParams(temperature=1.0, max_tokens=None, seed=0)))
    machine.teardown()
    assert any(batch.swaps_in for batch in machine.runner.steps), "nothing was swapped"


Scheduling.TestCase.settings = settings(max_examples=200, stateful_step_count=12)
TestScheduling = Scheduling.TestCase
