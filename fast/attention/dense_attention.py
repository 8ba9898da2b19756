"""dense_attention, in Triton. What the technique is for: `reference/attention/dense_attention.py`.

The score matrix that the reference writes down is what `flash_attention` avoids, so this is that kernel over a batch of
one sequence.
"""

import torch
from jaxtyping import Float
from torch import Tensor as Array

from fast._checks import require_shape
from fast.attention._checks import require_attention
from fast.attention.flash_attention import attend


def dense_attention(
    q: Float[Array, "num_queries num_heads head_dim"],
    k: Float[Array, "num_keys num_kv_heads head_dim"],
    v: Float[Array, "num_keys num_kv_heads head_dim"],
    *,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_queries num_heads head_dim"] | None = None,
) -> Float[Array, "num_queries num_heads head_dim"]:
    """Same contract as `reference.attention.dense_attention.dense_attention`.

    Grid, moves and limits: those of `fast.attention.flash_attention.flash_attention`.
    """
    op = "dense_attention"
    require_shape(op, "k", k, (None, None, None))  # type: ignore[reportArgumentType]
    scale = require_attention(
        op, q, k, v, scale=scale, sliding_window=sliding_window, sinks=sinks, logit_cap=logit_cap, out=out
    )
    # Offsets made by kernels, not copied from the host: a copy would stall, and could not be captured in a graph.
    ends_q, ends_k = (torch.arange(2, dtype=torch.int32, device=q.device) * len(x) for x in (q, k))
    return attend(q, k, v, ends_q, ends_k, causal, scale, sliding_window, sinks, logit_cap, out)[0]
