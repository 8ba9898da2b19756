"""Counter-based random numbers: Philox 4x32-10, and the draws made from it."""

import numpy as np
from jaxtyping import Float32, Int, Int64, UInt32
from numpy import ndarray as Array

# The third counter word: what a draw is for. Draws for different purposes never share a word.
PURPOSE_DRAW, PURPOSE_DRAFT, PURPOSE_ACCEPT, PURPOSE_RESAMPLE = range(4)


def philox_4x32(
    counter: UInt32[Array, "num_draws 4"], key: UInt32[Array, "num_draws 2"]
) -> UInt32[Array, "num_draws 4"]:
    raise NotImplementedError


def random_uniform(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    """Strictly inside (0, 1): ((word >> 9) + 0.5) * 2**-23. Column j uses word j % 4 of counter block j // 4;
    counter = (position, sample index, purpose, j // 4), key = (low, high) 32 bits of the seed."""
    raise NotImplementedError


def random_gumbel(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    raise NotImplementedError


def random_normal(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    raise NotImplementedError
