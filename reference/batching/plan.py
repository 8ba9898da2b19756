"""The plan of a step: what the scheduler chose, in its own words. `pack` makes arrays of it."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32, Int64
from numpy import ndarray as Array

from reference.batching.request import Request, Sequence


@dataclass(frozen=True)
class Swap:
    """Blocks of one pool on their way to the host or back.

    Attributes:
        key: Names what the host keeps, from the way out until it is dropped.
        block_ids: In the pool.
        host_rows: Which of the rows kept under ``key`` they are, as many as ``block_ids``.
        coded: On the way out: whether they are to travel, and to be kept, coded (`CodedRows`).
    """

    key: int
    pool: int
    block_ids: list[int]
    host_rows: list[int]
    coded: bool = False


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

    def add_drawn(self, seq: Sequence) -> None:
        """Put a sequence into the step that computes one token, its last, and draws the next."""
        self.drawn.append(len(self.seqs))
        self.samples.append(seq.sample_index)
        self.seqs.append(seq)
        self.num_new.append(1)
        self.sources.append(seq.source)
        self.num_tokens += 1
        seq.source = len(self.drawn) - 1
        seq.num_pending += 1

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
