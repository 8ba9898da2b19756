"""lossless, in Triton. What the technique is for: `reference/kv_cache/lossless.py`."""

from jaxtyping import Int64, UInt8, UInt16
from torch import Tensor as Array


def encode_lossless(
    words: UInt16[Array, "num_blocks num_values"], *, format: str
) -> tuple[UInt8[Array, "num_blocks capacity"], Int64[Array, " num_blocks"]]:
    """Same contract as `reference.kv_cache.lossless.encode_lossless`."""
    raise NotImplementedError("encode_lossless")


def decode_lossless(
    codes: UInt8[Array, "num_blocks capacity"], sizes: Int64[Array, " num_blocks"], *, num_values: int, format: str
) -> UInt16[Array, "num_blocks num_values"]:
    """Same contract as `reference.kv_cache.lossless.decode_lossless`."""
    raise NotImplementedError("decode_lossless")
