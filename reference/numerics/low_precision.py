"""Rounding to fp16, bf16 and fp8, by arithmetic one can follow."""

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray as Array


def round_to(
    x: Float[Array, "*shape"], format: str, *, saturate: bool = True, out: Float[Array, "*shape"] | None = None
) -> Float[Array, "*shape"]:
    """The values of ``x`` rounded to ``format`` (nearest, ties to even, subnormals kept), in the dtype of ``x``.

    format: "float16", "bfloat16", "float8_e4m3fn" or "float8_e5m2". saturate: beyond the largest finite value give
    that value; otherwise what ml_dtypes gives (inf, or NaN for e4m3fn).
    """
    raise NotImplementedError


def cast(x: Float[Array, "*shape"], format: str, *, saturate: bool = True) -> Shaped[Array, "*shape"]:
    """``round_to``, stored in the dtype named ``format`` (also "float32")."""
    raise NotImplementedError
