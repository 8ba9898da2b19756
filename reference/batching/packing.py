"""Packing: what the scheduler chose, as the arrays of one step, end to end and without padding.

A step computes some tokens of some sequences: one token of those that are decoding, a chunk of those whose prompt is
being computed. Their tokens stand one sequence after the other, and ``cu_seqlens_q`` says where each begins.

A running sequence owns a *row* of `RunningRows`: its tokens, its block tables and its sampling parameters as NumPy
arrays, changed where they change. So packing a step is a dozen gathers, whatever the number of sequences: nothing is
rebuilt, and no loop runs over tokens.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from numpy import ndarray as Array

from reference.batching.plan import StepPlan, Swap
from reference.batching.request import Sequence
from reference.batching.running_rows import RunningRows


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

    @property
    def present(self) -> Bool[Array, " num_rows"]:
        """The rows that have any."""
        added = (self.presence_penalty != 0) | (self.frequency_penalty != 0)
        return (self.repetition_penalty != 1) | added | (self.bias_ids >= 0).any(axis=1)


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

    The order within a step: ``swaps_out``, ``swaps_in``, ``drops``, ``copies``, then the model. Swaps in come before
    copies: of two forks that come back from the host and share their last block, one copies it in the same step. Beyond
    that the lists do not touch each other: what a step reads is nobody else's before its result has been read.

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
    if (rows.penalized | rows.forced)[row].any():
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
    biases = [rows.bias(r, position + 1) for r, position in zip(row, last_positions)]
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
