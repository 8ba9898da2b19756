"""Token embedding: a row of the table for each token."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray as Array


def embedding(
    token_ids: Int[Array, " num_tokens"],
    weight: Float[Array, "vocab_size hidden_size"],
    *,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> Float[Array, "num_tokens hidden_size"]:
    raise NotImplementedError
