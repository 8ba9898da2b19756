"""philox, in Triton. What the technique is for: `reference/numerics/philox.py`."""

from jaxtyping import Float32, Int, Int64, UInt32
from torch import Tensor as Array


def philox_4x32(
    counter: UInt32[Array, "num_draws 4"], key: UInt32[Array, "num_draws 2"]
) -> UInt32[Array, "num_draws 4"]:
    """Same contract as `reference.numerics.philox.philox_4x32`."""
    raise NotImplementedError("philox_4x32")


def random_uniform(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    """Same contract as `reference.numerics.philox.random_uniform`."""
    raise NotImplementedError("random_uniform")


def random_gumbel(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    """Same contract as `reference.numerics.philox.random_gumbel`."""
    raise NotImplementedError("random_gumbel")


def random_normal(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    """Same contract as `reference.numerics.philox.random_normal`."""
    raise NotImplementedError("random_normal")
