"""Beam search, one step: the best continuations of each group of beams."""

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64
from numpy import ndarray as Array


def beam_scores(
    logits: Float[Array, "num_rows vocab_size"],
    scores: Float32[Array, " num_rows"],
    cu_beams: Int32[Array, " num_groups_plus_1"],
    *,
    num_candidates: int,
) -> tuple[
    Float32[Array, "num_groups num_candidates"], Int32[Array, "num_groups num_candidates"],
    Int64[Array, "num_groups num_candidates"],
]:  # fmt: skip
    """Over each group's rows: the largest scores + log_softmax(logits), their rows (within the group) and tokens."""
    raise NotImplementedError
