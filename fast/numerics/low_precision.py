"""low_precision, in Triton. What the technique is for: `reference/numerics/low_precision.py`."""

from jaxtyping import Float, Shaped
from torch import Tensor as Array


def round_to(
    x: Float[Array, "*shape"], format: str, *, saturate: bool = True, out: Float[Array, "*shape"] | None = None
) -> Float[Array, "*shape"]:
    """Same contract as `reference.numerics.low_precision.round_to`."""
    raise NotImplementedError("round_to")


def cast(x: Float[Array, "*shape"], format: str, *, saturate: bool = True) -> Shaped[Array, "*shape"]:
    """Same contract as `reference.numerics.low_precision.cast`."""
    raise NotImplementedError("cast")
