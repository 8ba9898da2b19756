"""What drives a scheduler: a model that shows every error of the block tables, and requests and engines to draw.

`FakeRunner` executes batches without a model. What it writes into a slot is a hash of the token and of what it reads
in the slot before, through the block table; the token it "draws" is a hash of everything that the query may see, read
back the same way. So a wrong block, a missing copy, a stale row, a prefix shared by mistake, a token written too late:
each ends in other tokens than those of `tokens_alone`, which needs no cache. It also checks, as a device cannot, that
nothing is read which nobody wrote.
"""

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

import reference
from reference.batching.config import EngineConfig
from reference.batching.engine import Engine
from reference.batching.packing import Batch, SamplingBatch
from reference.batching.request import Request, RequestOutput, SamplingParams, Sequence
from reference.batching.runner import Logprobs, ModelRunner, Runner, StepResult
from reference.batching.running_rows import FORCE
from reference.kv_cache.cache import KVCache, KVFormat, resolve_format
from reference.kv_cache.coded_rows import WORD_LAYOUTS, CodedRows
from reference.model.decoder import Decoder

VOCAB = 31
POISON = -1


def _hash(*numbers: int) -> int:
    return zlib.crc32(np.array(numbers, np.int64).tobytes())


@dataclass(frozen=True)
class FakeModel:
    """A model without weights. The same windows as the engine it is meant for.

    Attributes:
        sliding_window: Keys that a query sees; None: all.
        kv_window: As KIVI's: what is older is read from the first pool, where whole groups are put once they are full.
    """

    sliding_window: int | None = None
    kv_window: int | None = None
    group_size: int = 1

    def key(self, before: int, token: int, adapter: int) -> int:
        """What a token leaves in the cache."""
        return _hash(before, token, adapter)

    def first_visible(self, query: int) -> int:
        """The first position that a query sees."""
        return 0 if self.sliding_window is None else max(0, query + 1 - self.sliding_window)

    def is_quantized(self, query: int, position: int) -> bool:
        """Does the query read it from the first of two pools?"""
        group_end = (position // self.group_size + 1) * self.group_size
        return group_end <= query + 1 - (self.kv_window or 0)

    def draw(self, visible: list[int], seed: int, position: int, sample_index: int) -> int:
        """The token at ``position``, after the keys that the query before it sees."""
        return _hash(*visible, seed, position, sample_index) % VOCAB

    def logprobs(self, visible: list[int]) -> np.ndarray:
        """For beams: log-probabilities of the next token."""
        logits = np.random.default_rng(_hash(*visible)).normal(size=VOCAB)
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def tokens_alone(self, request: Request, sample_index: int, stop_ids: frozenset[int], limit: int) -> list[int]:
        """A sequence's output, computed with no cache and no company."""
        if request.forced_token_ids is not None:
            ends = [i for i, token in enumerate(request.forced_token_ids, start=1) if token in stop_ids]
            return request.forced_token_ids[: ends[0] if ends else None]
        tokens, keys, before = list(request.prompt_token_ids), [], 0
        while True:
            for token in tokens[len(keys) :]:
                before = self.key(before, token, request.adapter_id)
                keys.append(before)
            visible = keys[self.first_visible(len(keys) - 1) :]
            tokens.append(self.draw(visible, request.seed, len(tokens), sample_index))
            if tokens[-1] in stop_ids or len(tokens) >= limit:
                return tokens[len(request.prompt_token_ids) :]


@dataclass
class FakePending:
    """A launched step, executed no earlier than it must be."""

    runner: "FakeRunner"
    batch: Batch

    def result(self) -> StepResult:
        """Execute all steps up to this one."""
        return self.runner.execute_up_to(self.batch.step)


@dataclass
class FakeRunner:
    """Executes batches in order, as late as possible, on `FakeModel`.

    Attributes:
        on_launch: Called with each batch as it is launched: where a test looks at the scheduler.
        broken: Sequences whose logits come out broken.
        fail_next: Raise at the next result, as a device might.
        host: Swapped blocks, by key and pool.
    """

    model: FakeModel
    config: EngineConfig
    on_launch: Callable[[Batch], None] = lambda batch: None
    broken: set[int] = field(default_factory=set)
    fail_next: bool = False
    vocab_size: int = VOCAB
    host: dict[tuple[int, int], np.ndarray | CodedRows] = field(default_factory=dict)
    steps: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = self.config.pool_sizes
        self.pools = [np.full((num_blocks, self.config.block_size), POISON, np.int64) for num_blocks in sizes]
        self.queue: deque[Batch] = deque()
        self.results: dict[int, StepResult] = {}
        self.drawn: dict[int, np.ndarray] = {}

    def launch(self, batch: Batch) -> FakePending:
        """Queue a step."""
        self.on_launch(batch)
        self.queue.append(batch)
        self.steps.append(batch)
        return FakePending(self, batch)

    def execute_up_to(self, step: int) -> StepResult:
        """Execute what is queued, in order, to this step."""
        if self.fail_next:
            self.fail_next = False
            self.queue.clear()
            raise RuntimeError("the device is on fire")
        while self.queue and self.queue[0].step <= step:
            batch = self.queue.popleft()
            self.results[batch.step] = self.execute(batch)
        return self.results.pop(step)

    def execute(self, batch: Batch) -> StepResult:
        """One step, in the order that `Batch` promises."""
        self.move_blocks(batch)
        tokens = batch.token_ids.copy()
        in_flight = tokens < 0
        if in_flight.any():
            tokens[in_flight] = self.drawn[batch.step - 1][batch.token_sources[in_flight]]
        for seq in range(len(batch.seq_ids)):
            self.write(batch, seq, tokens)
        result = self.sample(batch, tokens)
        self.drawn = {batch.step: result.token_ids}
        return result

    def move_blocks(self, batch: Batch) -> None:
        """Swaps out, swaps in, copies."""
        for swap in batch.swaps_out:
            rows = self.pools[swap.pool][swap.block_ids]
            if swap.coded:
                rows = CodedRows.encode(rows.view(np.uint8), WORD_LAYOUTS["float64"], reference)
            self.host[swap.key, swap.pool] = rows
        for swap in batch.swaps_in:
            rows = self.host.pop((swap.key, swap.pool))[swap.host_rows]
            rows = rows.decode(reference).view(np.int64) if isinstance(rows, CodedRows) else rows
            self.pools[swap.pool][swap.block_ids] = rows
        for key in batch.drops:
            for pool in range(len(self.pools)):
                self.host.pop((key, pool), None)
        for pool, copies in zip(self.pools, batch.copies):
            for source, target in copies:
                pool[target] = pool[source]

    def read(self, batch: Batch, seq: int, query: int, position: int) -> int:
        """What the query of a sequence finds at a position."""
        pool = 0
        if self.config.kv_window is not None and not self.model.is_quantized(query, position):
            pool = 1
        block_size = self.config.block_size
        block_id = batch.block_tables[pool][seq, position // block_size]
        assert block_id >= 0, f"seq {batch.seq_ids[seq]}: query {query} sees position {position}: released"
        key = int(self.pools[pool][block_id, position % block_size])
        assert key != POISON, f"seq {batch.seq_ids[seq]}: query {query} sees position {position}: nobody wrote it"
        return key

    def write(self, batch: Batch, seq: int, tokens: np.ndarray) -> None:
        """Write a sequence's tokens, in order; into the window first where there is one, then whole groups."""
        for t in range(batch.cu_seqlens_q[seq], batch.cu_seqlens_q[seq + 1]):
            position, adapter = int(batch.positions[t]), -1 if batch.adapter_ids is None else int(batch.adapter_ids[t])
            # (With a window of 0 a query reads its own group sealed, which it is not before this token is there.)
            query = position - (self.config.kv_window == 0)
            before = self.read(batch, seq, query, position - 1) if position else 0
            newest = len(self.pools) - 1
            slot = batch.slot_mappings[newest][t]
            assert slot >= 0
            self.pools[newest].reshape(-1)[slot] = self.model.key(before, int(tokens[t]), adapter)
            if newest and (position + 1) % self.model.group_size == 0:
                self.seal(batch, seq, position + 1 - self.model.group_size)

    def seal(self, batch: Batch, seq: int, start: int) -> None:
        """Put a full group from the window into the first pool."""
        block, offset = divmod(start, self.config.block_size)
        source, target = (int(batch.block_tables[pool][seq, block]) for pool in (1, 0))
        assert source >= 0, f"seq {batch.seq_ids[seq]}: the group at {start} is full and gone from the window"
        group = self.pools[1][source, offset : offset + self.model.group_size]
        assert (group != POISON).all(), f"seq {batch.seq_ids[seq]}: the group at {start} has holes"
        self.pools[0][target, offset : offset + self.model.group_size] = group

    def visible(self, batch: Batch, row: int) -> tuple[int, list[int]]:
        """Of a logit row: the sequence's place, and the keys its query sees."""
        t = int(batch.logit_rows[row])
        seq = int(np.searchsorted(batch.cu_seqlens_q, t, side="right")) - 1
        query = int(batch.positions[t])
        return seq, [self.read(batch, seq, query, p) for p in range(self.model.first_visible(query), query + 1)]

    def sample(self, batch: Batch, tokens: np.ndarray) -> StepResult:
        """All three stretches of logit rows."""
        sampling, drawn, errors = batch.sampling, [], {}
        history_is_right(batch, tokens)
        for row in range(sampling.num_drawn + sampling.num_verified_rows):
            seq, visible = self.visible(batch, row)
            if batch.seq_ids[seq] in self.broken:
                errors[row] = "not finite"
            columns = (sampling.seeds, sampling.positions, sampling.sample_indices)
            token = self.model.draw(visible, *(int(column[row]) for column in columns))
            drawn.append(forced_token(sampling, row, default=token))
        result = StepResult(token_ids=np.array(drawn[: sampling.num_drawn], np.int64), errors=errors)
        accepted_rows = set(range(sampling.num_drawn))
        if sampling.draft_tokens is not None and sampling.cu_drafts is not None:
            accepted, following, row = [], [], sampling.num_drawn
            for start, end in zip(sampling.cu_drafts[:-1], sampling.cu_drafts[1:]):
                drafts = sampling.draft_tokens[start:end].tolist()
                agree = [*(a == b for a, b in zip(drafts, drawn[row:])), False].index(False)
                accepted_rows |= set(range(row, row + agree + 1))
                accepted.append(agree)
                following.append(drawn[row + agree])
                row += len(drafts) + 1
            result.num_accepted = np.array(accepted, np.int32)
            result.next_token_ids = np.array(following, np.int64)
        if sampling.cu_beams is not None:
            self.score_beams(batch, result)
        if sampling.logprob_rows is not None:
            rows = np.array([row for row in sampling.logprob_rows if row in accepted_rows], np.int32)
            chosen = np.array([drawn[row] for row in rows], np.float32)  # any number that names the token
            top = np.zeros((len(rows), sampling.num_top))
            result.logprobs = Logprobs(rows, -chosen, np.ones(len(rows), np.int32), top.astype(np.int64), top)
        return result

    def score_beams(self, batch: Batch, result: StepResult) -> None:
        """Candidates of each search."""
        sampling, first = batch.sampling, batch.sampling.num_drawn + batch.sampling.num_verified_rows
        columns = []
        for start, end in zip(sampling.cu_beams[:-1], sampling.cu_beams[1:]):  # type: ignore[index]
            rows = [self.model.logprobs(self.visible(batch, first + beam)[1]) for beam in range(start, end)]
            scores = np.stack(rows) + sampling.beam_scores[start:end, None]  # type: ignore[index]
            best = np.argsort(-scores, axis=None, kind="stable")[: sampling.num_candidates]
            columns.append((scores.reshape(-1)[best], *np.divmod(best, VOCAB)))
        result.beam_scores, result.beam_rows, result.beam_tokens = (np.stack(column) for column in zip(*columns))


def forced_token(sampling: SamplingBatch, row: int, *, default: int) -> int:
    """The token that a logit row has to take, if its biases say so."""
    if sampling.penalties is None:
        return default
    forced = sampling.penalties.bias_ids[row][sampling.penalties.bias_values[row] >= np.float32(FORCE)]
    return int(forced[0]) if len(forced) else default


def history_is_right(batch: Batch, tokens: np.ndarray) -> None:
    """Penalties are given every token up to the one that the row reads, but for one in flight."""
    penalties = batch.sampling.penalties
    if penalties is None:
        return
    for row, t in enumerate(batch.logit_rows):
        history = penalties.history[row]
        if (history >= 0).any():
            length = int((history >= 0).sum())
            assert length == batch.positions[t] + 1, "a history of another length"
            known = batch.token_ids[t] >= 0
            assert not known or history[length - 1] == tokens[t], "a history that ends otherwise"


@dataclass
class FakeDrafter:
    """Proposes what the model alone would say, with errors sown in."""

    model: FakeModel
    num_drafts: int
    error_every: int

    def propose(self, seqs: list[Sequence]) -> None:
        """Set ``drafts``."""
        for seq in seqs:
            request = seq.request
            room = request.limit - len(seq.token_ids) - 1
            known = len(seq.output_token_ids)
            tokens = self.model.tokens_alone(request, seq.sample_index, frozenset(), request.limit)
            seq.drafts = tokens[known : known + min(self.num_drafts, room)]
            for i in range(len(seq.drafts)):
                if _hash(seq.seq_id, known, i) % self.error_every == 0:
                    seq.drafts[i] = (seq.drafts[i] + 1) % VOCAB


def preemptions() -> st.SearchStrategy[dict[str, Any]]:
    """What becomes of the blocks of a request that is preempted."""
    swaps = ({"preemption": "swap", "swap_coding": coding} for coding in ("none", "lossless"))
    return st.sampled_from([{"preemption": "recompute"}, *swaps])


@st.composite
def engine_configs(draw: st.DrawFn) -> EngineConfig:
    """Small engines: pools too small for everyone, budgets smaller than a prompt, every kind of window."""
    block_size = draw(st.sampled_from([2, 1, 4]), label="block_size")
    max_model_len = draw(st.sampled_from([24, 12, 40]), label="max_model_len")
    room = draw(st.sampled_from([1.0, 1.5, 0.6, 3.0]), label="how many of the longest sequences fit")
    kv_window = draw(st.sampled_from([None, None, None, 1, 3, 6, 0]), label="kv_window")
    least = 0 if kv_window is None else -(-(max(1, kv_window) - 1) // block_size) + 2
    return EngineConfig(
        num_blocks=max(1, int(room * max_model_len / block_size)),
        max_model_len=max_model_len,
        block_size=block_size,
        num_window_blocks=draw(st.integers(least, least + 12 * (kv_window is not None)), label="num_window_blocks"),
        max_num_seqs=draw(st.sampled_from([6, 3, 2, 1]), label="max_num_seqs"),
        max_num_batched_tokens=draw(st.sampled_from([64, 16, 7, 3, 1]), label="max_num_batched_tokens"),
        **draw(preemptions(), label="preemption"),
        enable_prefix_caching=draw(st.booleans(), label="enable_prefix_caching"),
        lookahead=draw(st.integers(0, 1), label="lookahead"),
        watermark=draw(st.sampled_from([0.0, 0.01, 0.3]), label="watermark"),
        kv_window=kv_window,
        sliding_window=draw(st.sampled_from([None, None, None, 2, 5]), label="sliding_window"),
        eos_token_ids=draw(st.sampled_from([(), (3,), (3, 4)]), label="eos_token_ids"),
    )


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    """Few tokens, several samples, stop tokens, sometimes penalties and log-probabilities."""
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 2, 3]), label="n"),
        max_tokens=draw(st.sampled_from([None, 9, 5, 2, 1]), label="max_tokens"),
        stop_token_ids=draw(st.sampled_from([(), (), (5,), (6, 7)]), label="stop_token_ids"),
        ignore_eos=draw(st.booleans(), label="ignore_eos"),
        seed=draw(st.integers(0, 3), label="seed"),
        logprobs=draw(st.sampled_from([None, None, None, 0, 2]), label="logprobs"),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.0, 1.5]), label="repetition_penalty"),
    )


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Prompts that often begin alike, and are often a multiple of a block long."""
    shared = draw(st.sampled_from([0, 4, 8, 11]), label="shared prefix")
    own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=0 if shared else 1, max_size=7), label="own tokens")
    return [7 * i % VOCAB for i in range(shared)] + own


def engine_for(
    decoder: Decoder,
    *,
    kv_format: KVFormat | str = "float32",
    runner: Callable[[Decoder, KVCache], Runner] = ModelRunner,
    **settings: Any,
) -> Engine:
    """An engine over a small decoder, roomy unless ``settings`` (of `EngineConfig` and `Engine`) say otherwise."""
    model = decoder.config
    format = resolve_format(kv_format, "float32")
    slides = all(model.layer_window(i) is not None for i in range(model.num_layers))
    more = {name: settings.pop(name) for name in ("drafter", "adapters", "trace", "clock") if name in settings}
    config = EngineConfig(
        **{
            "num_blocks": 128,
            "max_model_len": model.max_position_embeddings,
            "block_size": 4,
            "num_window_blocks": 0 if format.window is None else 128,
            "kv_cache_dtype": format.name,
            "kv_window": format.window,
            "sliding_window": model.sliding_window if slides else None,
            "eos_token_ids": model.eos_token_ids,
            "model_fingerprint": decoder.fingerprint,
        }
        | settings
    )
    cache = KVCache(
        format,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        num_window_blocks=config.num_window_blocks,
        backend=decoder.backend,
    )
    return Engine(config, runner(decoder, cache), **more)


def run_all(engine: Engine, requests: list[Request]) -> dict[str, RequestOutput]:
    """Run requests to their end, all added at once."""
    for request in requests:
        engine.add(request)
    finished: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        finished |= {output.request_id: output for output in engine.step().finished}
    return finished


def nothing_is_left(engine: Engine) -> None:
    """After the last request every block, row and swapped byte has come back."""
    for pool in engine.scheduler.space.pools:
        assert pool.num_free == pool.num_blocks, f"{pool.num_used} blocks did not come back"
    assert engine.scheduler.rows.num_used == 0, "rows did not come back"
    assert not engine.scheduler.space.swapped, "the host keeps blocks nobody wants"
