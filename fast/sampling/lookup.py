"""lookup, in Triton. What the technique is for: `reference/sampling/lookup.py`."""

from jaxtyping import Int32
from torch import Tensor as Array


def lookup(
    history: Int32[Array, "num_seqs max_history"],
    history_lens: Int32[Array, " num_seqs"],
    *,
    max_ngram: int,
    min_ngram: int = 1,
    num_draft: int,
) -> Int32[Array, "num_seqs num_draft"]:
    """Same contract as `reference.sampling.lookup.lookup`."""
    raise NotImplementedError("lookup")
