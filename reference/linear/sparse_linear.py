"""2:4 sparsity: two of every four weights are kept, compressed, with two bits each that say which."""

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array


def sparse_linear(
    x: Float[Array, "num_tokens in_features"],
    values: Float[Array, "out_features half_features"],
    indices: UInt8[Array, "out_features index_bytes"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """in_features = 2 * half_features. A group of four features keeps two values, in order; its nibble holds their
    places (low two bits the first); index byte j holds groups 2j (low nibble) and 2j + 1."""
    raise NotImplementedError
