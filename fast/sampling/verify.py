"""verify, in Triton. What the technique is for: `reference/sampling/verify.py`."""

from jaxtyping import Float, Int32, Int64
from torch import Tensor as Array


def verify(
    target_probs: Float[Array, "num_rows vocab_size"],
    draft_probs: Float[Array, "num_drafts vocab_size"] | None,
    draft_tokens: Int64[Array, " num_drafts"],
    cu_drafts: Int32[Array, " num_seqs_plus_1"],
    seeds: Int64[Array, " num_seqs"],
    positions: Int32[Array, " num_seqs"],
    sample_indices: Int32[Array, " num_seqs"],
) -> tuple[Int32[Array, " num_seqs"], Int64[Array, " num_seqs"]]:
    """Same contract as `reference.sampling.verify.verify`."""
    raise NotImplementedError("verify")
