"""Packing: what the scheduler chose, as the arrays of one step, end to end and without padding.

A step computes some tokens of some sequences: one token of those that are decoding, a chunk of those whose prompt is
being computed. Their tokens stand one sequence after the other, and ``cu_seqlens_q`` says where each begins.

A running sequence owns a *row* of `RunningRows`: its tokens, its block tables and its sampling parameters as NumPy
arrays, changed where they change. So packing a step is a dozen gathers, whatever the number of sequences: nothing is
rebuilt, and no loop runs over tokens.
"""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32, Int64
from numpy import ndarray as Array

from reference.batching.request import Request, Sequence


@dataclass(frozen=True)
class Swap:
    """Blocks of one pool on their way to the host or back.

    Attributes:
        key: Names what the host keeps, from the way out until it is dropped.
        block_ids: In the pool.
        host_rows: Which of the rows kept under ``key`` they are, as many as ``block_ids``.
    """

    key: int
    pool: int
    block_ids: list[int]
    host_rows: list[int]


@dataclass
class Penalties:
    """For each logit row what `penalize` takes. Rows without penalties have neutral values."""

    history: Int32[Array, "num_rows max_history"]
    prompt_lens: Int32[Array, " num_rows"]
    repetition_penalty: Float32[Array, " num_rows"]
    presence_penalty: Float32[Array, " num_rows"]
    frequency_penalty: Float32[Array, " num_rows"]
    bias_ids: Int32[Array, "num_rows max_biases"]
    bias_values: Float32[Array, "num_rows max_biases"]


@dataclass
class SamplingBatch:
    """What happens to each logit row. The rows stand in three stretches, any of which may be empty:

    1. *drawn*: a token is sampled from each;
    2. *verified*: a sequence with d drafts owns d + 1 rows, see `verify`;
    3. *beams*: a beam search owns one row a beam, see `beam_scores`.

    Attributes:
        positions: Of the token that the row decides.
        penalties: None if no row has any.
        num_top: Best tokens to report beside the log-probabilities; -1 if no row wants log-probabilities.
        logprob_rows: Drawn and verified rows that want them.
        draft_probs: The drafts' distributions, a row a draft; None: they are certain.
        beam_scores: Log-probability of each beam so far.
        for_drafts: The drawn tokens are drafts for another model: they are drawn with `PURPOSE_DRAFT`, and the
            distributions are wanted too.
    """

    num_drawn: int
    temperature: Float32[Array, " num_rows"]
    top_k: Int32[Array, " num_rows"]
    top_p: Float32[Array, " num_rows"]
    min_p: Float32[Array, " num_rows"]
    seeds: Int64[Array, " num_rows"]
    positions: Int32[Array, " num_rows"]
    sample_indices: Int32[Array, " num_rows"]
    penalties: Penalties | None = None
    num_top: int = -1
    logprob_rows: Int32[Array, " num_reported"] | None = None
    draft_tokens: Int64[Array, " num_drafts"] | None = None
    cu_drafts: Int32[Array, " num_verified_plus_1"] | None = None
    draft_probs: Float32[Array, "num_drafts vocab_size"] | None = None
    beam_scores: Float32[Array, " num_beam_rows"] | None = None
    cu_beams: Int32[Array, " num_groups_plus_1"] | None = None
    num_candidates: int = 0
    for_drafts: bool = False

    @property
    def num_verified_rows(self) -> int:
        """Rows of the second stretch: of every sequence its drafts and one more."""
        return 0 if self.cu_drafts is None else int(self.cu_drafts[-1]) + len(self.cu_drafts) - 1


@dataclass
class Batch:
    """One step, as host arrays of its own: nothing that happens later changes them.

    It names sequences, not values still in flight: where ``token_ids`` is -1 the token is the one drawn in row
    ``token_sources`` of the step before.

    The order within a step, which is also what makes it safe to hand out memory early: ``swaps_out``, ``swaps_in``,
    ``drops``, ``copies``, then the model. A block may be the target of a swap in and the source of a copy at once (a
    sequence that comes back shares its last block with a fork), never the other way round.

    Attributes:
        step: Counts the launched steps.
        copies: (source, target) blocks, one list a pool.
        drops: Keys of swapped blocks that nobody will want again; one that is not there is no error.
        adapter_ids: None if no sequence of the step has an adapter.
        logit_rows: Token rows whose logits are wanted; one may be named several times.
    """

    step: int
    seq_ids: list[int]
    token_ids: Int32[Array, " num_tokens"]
    token_sources: Int32[Array, " num_tokens"]
    positions: Int32[Array, " num_tokens"]
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"]
    seq_lens: Int32[Array, " num_seqs"]
    block_tables: tuple[Int32[Array, "num_seqs max_blocks_per_seq"], ...]
    slot_mappings: tuple[Int64[Array, " num_tokens"], ...]
    copies: tuple[list[tuple[int, int]], ...]
    logit_rows: Int32[Array, " num_rows"]
    sampling: SamplingBatch
    swaps_out: list[Swap] = field(default_factory=list)
    swaps_in: list[Swap] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    adapter_ids: Int32[Array, " num_tokens"] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes in this step; 0 for a step that only moves blocks."""
        return len(self.token_ids)


@dataclass
class StepPlan:
    """What the scheduler chose for one step: which sequences, how many tokens of each, and what their logits are for.

    Attributes:
        num_new: Tokens of each sequence.
        sources: Of each sequence, where the step before draws the token that is still in flight.
        drawn, samples: Of each drawn row the sequence's place in ``seqs``, and the sample index.
        verified: Places of the sequences whose drafts are verified.
        drafts: Their drafts, by place.
        beams: Beam searches, each with the places of its beams.
        admitted, preempted: Ids of the requests.
        seq_lens, logit_owner: Tokens of each sequence after the step; of each logit row the place. Filled by `pack`.
    """

    step: int
    seqs: list[Sequence] = field(default_factory=list)
    num_new: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    num_tokens: int = 0
    drawn: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    drafts: dict[int, list[int]] = field(default_factory=dict)
    beams: list[tuple[Request, list[int]]] = field(default_factory=list)
    swaps_out: list[Swap] = field(default_factory=list)
    swaps_in: list[Swap] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    copies: tuple[list[tuple[int, int]], ...] = ()
    admitted: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    seq_lens: Int32[Array, " num_seqs"] = field(default_factory=lambda: np.zeros(0, np.int32))
    logit_owner: Int64[Array, " num_rows"] = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, seq: Sequence, num_new: int) -> int:
        """Put a sequence into the step; its place."""
        place = len(self.seqs)
        self.seqs.append(seq)
        self.num_new.append(num_new)
        self.sources.append(seq.source)
        self.num_tokens += num_new
        return place

    def inherit(self, unlaunched: "StepPlan | None") -> None:
        """What a plan that came to nothing did nevertheless."""
        if unlaunched is not None:
            self.admitted = unlaunched.admitted + self.admitted
            self.preempted = unlaunched.preempted + self.preempted

    def add_beam(self, request: Request, place: int) -> None:
        """One more beam of the search that is being scheduled."""
        if not self.beams or self.beams[-1][0] is not request:
            self.beams.append((request, []))
        self.beams[-1][1].append(place)

    def filled_a_block(self, block_size: int) -> list[int]:
        """Places of the sequences that completed a block in this step."""
        before = self.seq_lens - np.array(self.num_new, np.int32)
        return np.flatnonzero(self.seq_lens // block_size > before // block_size).tolist()


class RunningRows:
    """A row of arrays for each running sequence.

    Attributes:
        token_ids: By position; drafts stand after the known tokens. What is past them is left over from before.
        block_tables: One array a pool; -1 where there is no block.
    """

    def __init__(self, max_rows: int, max_model_len: int, block_size: int, num_pools: int):
        self.block_size = block_size
        # zeros, not empty or full: pages of memory that nobody touches are never made real
        self.token_ids = np.zeros((max_rows, max_model_len), np.int32)
        blocks = -(-max_model_len // block_size)
        self.block_tables = [np.full((max_rows, blocks), -1, np.int32) for _ in range(num_pools)]
        self.prompt_lens = np.zeros(max_rows, np.int32)
        self.temperature = np.zeros(max_rows, np.float32)
        self.top_k = np.zeros(max_rows, np.int32)
        self.top_p = np.ones(max_rows, np.float32)
        self.min_p = np.zeros(max_rows, np.float32)
        self.seeds = np.zeros(max_rows, np.int64)
        self.adapter_ids = np.full(max_rows, -1, np.int32)
        self.penalized = np.zeros(max_rows, bool)
        self.repetition_penalty = np.ones(max_rows, np.float32)
        self.presence_penalty = np.zeros(max_rows, np.float32)
        self.frequency_penalty = np.zeros(max_rows, np.float32)
        self.logit_bias: list[Mapping[int, float]] = [{}] * max_rows
        self.num_top = np.full(max_rows, -1, np.int32)
        self._free = list(range(max_rows - 1, -1, -1))

    @property
    def num_used(self) -> int:
        """Sequences that run."""
        return len(self.prompt_lens) - len(self._free)

    def claim(self, seq: Sequence) -> None:
        """Give a sequence a row, with its tokens and parameters; its block tables are empty."""
        row = seq.row = self._free.pop()
        params = seq.request.params
        self.token_ids[row, : len(seq.token_ids)] = seq.token_ids
        self.prompt_lens[row] = len(seq.request.prompt_token_ids)
        self.temperature[row] = params.temperature
        self.top_k[row] = max(params.top_k, 0)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seeds[row] = seq.request.seed
        self.adapter_ids[row] = seq.request.adapter_id
        self.penalized[row] = params.has_penalties
        self.repetition_penalty[row] = params.repetition_penalty
        self.presence_penalty[row] = params.presence_penalty
        self.frequency_penalty[row] = params.frequency_penalty
        self.logit_bias[row] = params.logit_bias or {}
        self.num_top[row] = -1 if params.logprobs is None else params.logprobs

    def give_up(self, seq: Sequence) -> None:
        """The sequence stops running: its row is anybody's."""
        for table in self.block_tables:
            table[seq.row] = -1
        self._free.append(seq.row)
        seq.row = -1

    def write_blocks(self, seq: Sequence, pool: int, first: int = 0) -> None:
        """The sequence's block table changed from its ``first`` block on."""
        block_ids = seq.tables[pool].block_ids
        row = self.block_tables[pool][seq.row]
        row[first : len(block_ids)] = block_ids[first:]
        row[len(block_ids) :] = -1

    def write_tokens(self, seq: Sequence, count: int) -> None:
        """The sequence's last ``count`` tokens are new; nothing to do if it does not run."""
        if seq.row >= 0:
            end = len(seq.token_ids)
            for position in range(end - count, end):
                self.token_ids[seq.row, position] = seq.token_ids[position]

    def write_drafts(self, seq: Sequence) -> None:
        """The sequence's drafts, behind its tokens."""
        end = len(seq.token_ids)
        self.token_ids[seq.row, end : end + len(seq.drafts)] = seq.drafts


def pack(plan: StepPlan, rows: RunningRows) -> Batch:
    """The arrays of the step. Its sequences' ``num_computed`` counts the step's tokens already."""
    seqs = plan.seqs
    row = np.array([seq.row for seq in seqs], np.intp)
    query_lens = np.array(plan.num_new, np.int32)
    seq_lens = np.array([seq.num_computed for seq in seqs], np.int32)
    known = np.array([len(seq.token_ids) + len(seq.drafts) for seq in seqs], np.int32)
    sources = np.array(plan.sources, np.int32)

    cu_seqlens_q = _offsets(query_lens)
    owner = np.repeat(np.arange(len(seqs)), query_lens)  # of each token: which sequence
    positions = np.arange(plan.num_tokens, dtype=np.int32) + (seq_lens - cu_seqlens_q[1:])[owner]
    in_flight = positions >= known[owner]
    token_rows = row[owner]
    adapter_ids = rows.adapter_ids[token_rows]
    width = -(-int(seq_lens.max(initial=0)) // rows.block_size)
    blocks, offsets = np.divmod(positions, rows.block_size)

    logit_owner, logit_rows = _logit_rows(plan, cu_seqlens_q)
    plan.seq_lens, plan.logit_owner = seq_lens, logit_owner
    return Batch(
        step=plan.step,
        seq_ids=[seq.seq_id for seq in seqs],
        token_ids=np.where(in_flight, -1, rows.token_ids[token_rows, positions]),
        token_sources=np.where(in_flight, sources[owner], -1),
        positions=positions,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        block_tables=tuple(table[row, :width] for table in rows.block_tables),
        slot_mappings=tuple(
            table[token_rows, blocks].astype(np.int64) * rows.block_size + offsets for table in rows.block_tables
        ),
        copies=plan.copies,
        logit_rows=logit_rows,
        sampling=_sampling(plan, rows, row[logit_owner], positions[logit_rows]),
        swaps_out=plan.swaps_out,
        swaps_in=plan.swaps_in,
        drops=plan.drops,
        adapter_ids=adapter_ids if (adapter_ids >= 0).any() else None,
    )


def _offsets(lengths: SequenceOf[int] | Array) -> Int32[Array, " num_plus_1"]:
    """0, then the running sum."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _logit_rows(plan: StepPlan, cu_seqlens_q: Array) -> tuple[Array, Array]:
    """Of each logit row: which sequence, and which token row. In the order of `SamplingBatch`'s stretches."""
    owner = np.array(plan.drawn, np.intp)
    if plan.verified:
        drafts = [len(plan.seqs[place].drafts) + 1 for place in plan.verified]
        owner = np.concatenate((owner, np.repeat(np.array(plan.verified, np.intp), drafts)))
    if plan.beams:
        owner = np.concatenate((owner, np.array([place for _, beams in plan.beams for place in beams], np.intp)))
    logit_rows = cu_seqlens_q[owner + 1] - 1
    if plan.verified:  # counted back from the last token, the row after all drafts
        stretch = slice(len(plan.drawn), len(plan.drawn) + sum(drafts))
        logit_rows[stretch] -= np.concatenate([np.arange(count - 1, -1, -1, dtype=np.int32) for count in drafts])
    return owner, logit_rows


def _sampling(plan: StepPlan, rows: RunningRows, row: Array, last_positions: Array) -> SamplingBatch:
    """Sampling parameters of each logit row. ``row``: of `RunningRows`; ``last_positions``: of the token it reads."""
    num_drawn = len(plan.drawn)
    verified = [plan.seqs[place] for place in plan.verified]
    samples = plan.samples + [seq.sample_index for seq in verified for _ in range(len(seq.drafts) + 1)]
    sampling = SamplingBatch(
        num_drawn=num_drawn,
        temperature=rows.temperature[row],
        top_k=rows.top_k[row],
        top_p=rows.top_p[row],
        min_p=rows.min_p[row],
        seeds=rows.seeds[row],
        positions=last_positions + 1,
        sample_indices=np.array(samples + [0] * (len(row) - len(samples)), np.int32),
    )
    num_top = rows.num_top[row[: len(samples)]]
    if (num_top >= 0).any():
        sampling.num_top = int(num_top.max())
        sampling.logprob_rows = np.flatnonzero(num_top >= 0).astype(np.int32)
    if rows.penalized[row].any():
        sampling.penalties = _penalties(rows, row, last_positions)
    if verified:
        sampling.draft_tokens = np.array([token for seq in verified for token in seq.drafts], np.int64)
        sampling.cu_drafts = _offsets([len(seq.drafts) for seq in verified])
        sampling.draft_probs = _draft_probs(verified)
    if plan.beams:
        searches = [(request.search, len(places)) for request, places in plan.beams]
        sampling.beam_scores = np.concatenate([search.scores for search, _ in searches])
        sampling.cu_beams = _offsets([num_beams for _, num_beams in searches])
        sampling.num_candidates = max(search.num_candidates for search, _ in searches)
    return sampling


def _draft_probs(verified: list[Sequence]) -> Float32[Array, "num_drafts vocab_size"] | None:
    """The drafts' distributions, those of certain ones all on one token; None if all are certain."""
    known = [seq.draft_probs for seq in verified if seq.draft_probs is not None]
    if not known:
        return None
    vocab_size = known[0].shape[1]
    return np.concatenate(
        [
            np.arange(vocab_size) == np.array(seq.drafts)[:, None]
            if seq.draft_probs is None
            else seq.draft_probs[: len(seq.drafts)]
            for seq in verified
        ]
    ).astype(np.float32)


def _penalties(rows: RunningRows, row: Array, last_positions: Array) -> Penalties:
    """Histories up to and with the token that each logit row reads. Of rows without penalties: nothing.

    Where that token is still in flight its place in the history holds anything: the runner puts it there.
    """
    penalized = rows.penalized[row]
    width = int(last_positions.max(where=penalized, initial=0)) + 1
    history = rows.token_ids[row, :width]
    history[(np.arange(width) > last_positions[:, None]) | ~penalized[:, None]] = -1
    biases = [rows.logit_bias[r] for r in row]
    max_biases = max(map(len, biases))
    bias_ids = np.full((len(row), max_biases), -1, np.int32)
    bias_values = np.zeros((len(row), max_biases), np.float32)
    for i, bias in enumerate(biases):
        bias_ids[i, : len(bias)] = list(bias)
        bias_values[i, : len(bias)] = list(bias.values())
    return Penalties(
        history=history,
        prompt_lens=np.minimum(rows.prompt_lens[row], width),  # of the rows that have no history here
        repetition_penalty=rows.repetition_penalty[row],
        presence_penalty=rows.presence_penalty[row],
        frequency_penalty=rows.frequency_penalty[row],
        bias_ids=bias_ids,
        bias_values=bias_values,
    )
