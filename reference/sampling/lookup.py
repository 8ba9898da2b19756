"""Drafting by prompt look-up: what followed the last time these tokens occurred."""

import numpy as np
from jaxtyping import Int32
from numpy import ndarray as Array


def lookup(
    history: Int32[Array, "num_seqs max_history"],
    history_lens: Int32[Array, " num_seqs"],
    *,
    max_ngram: int,
    min_ngram: int = 1,
    num_draft: int,
) -> Int32[Array, "num_seqs num_draft"]:
    """The continuation of the latest earlier occurrence of the longest suffix (max_ngram down to min_ngram tokens); -1
    where there is none."""
    raise NotImplementedError
