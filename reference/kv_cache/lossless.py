"""Lossless coding of bf16 and fp16 blocks: exponents in a fixed few bits, with exceptions; exactly invertible."""

import numpy as np
from jaxtyping import Int64, UInt8, UInt16
from numpy import ndarray as Array


def encode_lossless(
    words: UInt16[Array, "num_blocks num_values"], *, format: str
) -> tuple[UInt8[Array, "num_blocks capacity"], Int64[Array, " num_blocks"]]:
    """Each block coded by itself into the first ``size`` bytes of its row; never larger than the block plus a header
    (``capacity`` is that bound). format: "bfloat16" or "float16" (where the exponent lies in a word)."""
    raise NotImplementedError


def decode_lossless(
    codes: UInt8[Array, "num_blocks capacity"], sizes: Int64[Array, " num_blocks"], *, num_values: int, format: str
) -> UInt16[Array, "num_blocks num_values"]:
    raise NotImplementedError
