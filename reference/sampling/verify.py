"""Speculative verification: exact rejection sampling, so that drafting changes the speed and never the distribution."""

import numpy as np
from jaxtyping import Float, Int32, Int64
from numpy import ndarray as Array


def verify(
    target_probs: Float[Array, "num_rows vocab_size"],
    draft_probs: Float[Array, "num_drafts vocab_size"] | None,
    draft_tokens: Int64[Array, " num_drafts"],
    cu_drafts: Int32[Array, " num_seqs_plus_1"],
    seeds: Int64[Array, " num_seqs"],
    positions: Int32[Array, " num_seqs"],
    sample_indices: Int32[Array, " num_seqs"],
) -> tuple[Int32[Array, " num_seqs"], Int64[Array, " num_seqs"]]:
    """(how many of each sequence's drafts are accepted, the token after the last accepted one).

    A sequence with d drafts owns d + 1 rows of target_probs (num_rows = num_drafts + num_seqs, in order): row i is the
    target's distribution after i drafts. positions: of the first drafted token. draft_probs None: drafts are certain
    (prompt look-up). Accept with u < target / draft (PURPOSE_ACCEPT at that token's position); at the first rejection
    draw from max(target - draft, 0) (PURPOSE_RESAMPLE, by Gumbel-max); after the last acceptance draw from the last
    row with PURPOSE_DRAW, the same draw that ``sample`` would make there. One-hot target rows are greedy."""
    raise NotImplementedError
