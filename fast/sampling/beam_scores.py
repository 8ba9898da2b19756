"""beam_scores, in Triton. What the technique is for: `reference/sampling/beam_scores.py`."""

from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor as Array


def beam_scores(
    logits: Float[Array, "num_rows vocab_size"],
    scores: Float32[Array, " num_rows"],
    cu_beams: Int32[Array, " num_groups_plus_1"],
    *,
    num_candidates: int,
) -> tuple[
    Float[Array, "num_groups num_candidates"], Int32[Array, "num_groups num_candidates"],
    Int64[Array, "num_groups num_candidates"],
]:  # fmt: skip
    """Same contract as `reference.sampling.beam_scores.beam_scores`."""
    raise NotImplementedError("beam_scores")
