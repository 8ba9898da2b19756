"""A backend in plain torch, without kernels: it keeps NumPy habits out of the decoder, and is the tolerance's baseline.

The same names, signatures and contracts as `reference`, written again in another formulation where torch has one.
Low precision is a matter of storage here too: everything computes in float32 (float64 for float64) and rounds once.
"""

from twofold.conformance.plain_torch.fusion import (
    add_rms_norm,
    embedding,
    linear_add,
    rms_norm,
    rms_norm_linear,
    rotary,
    rotary_write_kv,
    swiglu,
    swiglu_linear_add,
)

__all__ = [
    "add_rms_norm",
    "embedding",
    "linear_add",
    "rms_norm",
    "rms_norm_linear",
    "rotary",
    "rotary_write_kv",
    "swiglu",
    "swiglu_linear_add",
]
