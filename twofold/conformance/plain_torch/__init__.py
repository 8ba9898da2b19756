"""A backend in plain torch, without kernels: it keeps NumPy habits out of the decoder, and is the tolerance's baseline.

The same names, signatures and contracts as `reference`, written again in another formulation where torch has one.
Low precision is a matter of storage here too: everything computes in float32 (float64 for float64) and rounds once.
"""

from twofold.conformance.plain_torch.attention import (
    dense_attention,
    flash_attention,
    merge_states,
    paged_attention,
    split_paged_attention,
)
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
from twofold.conformance.plain_torch.numerics import (
    bitcast,
    cast,
    empty,
    from_host,
    philox_4x32,
    random_gumbel,
    random_normal,
    random_uniform,
    round_to,
    take_rows,
    to_host,
)
from twofold.conformance.plain_torch.sampling import (
    beam_scores,
    filter_logits,
    log_probs,
    lookup,
    penalize,
    sample,
    verify,
)

__all__ = [
    "add_rms_norm",
    "beam_scores",
    "bitcast",
    "cast",
    "dense_attention",
    "embedding",
    "empty",
    "filter_logits",
    "flash_attention",
    "from_host",
    "linear_add",
    "log_probs",
    "lookup",
    "merge_states",
    "paged_attention",
    "penalize",
    "philox_4x32",
    "random_gumbel",
    "random_normal",
    "random_uniform",
    "rms_norm",
    "rms_norm_linear",
    "rotary",
    "rotary_write_kv",
    "round_to",
    "sample",
    "split_paged_attention",
    "swiglu",
    "swiglu_linear_add",
    "take_rows",
    "to_host",
    "verify",
]
