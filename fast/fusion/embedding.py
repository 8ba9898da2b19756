"""Token embedding, in Triton. What the technique is for: `reference/fusion/embedding.py`."""

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor as Array

from fast._checks import require_integers, require_out, require_range, require_same_device, require_shape
from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import cdiv, next_power_of_2, require_runnable

# Columns a program copies. Two rows of 4096 in bf16 are in flight on a processor for each program it holds.
TILE_D = 4096


@triton.jit
def _embedding_kernel(
    token_ids_ptr,  # [num_tokens]
    weight_ptr,  # [vocab_size, hidden_size]
    out_ptr,  # [num_tokens, hidden_size]
    stride_ids,
    stride_weight_row,
    stride_weight_dim,
    stride_out_token,
    stride_out_dim,
    vocab_size,
    hidden_size,
    TILE_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_predecessor(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    row = tl.load(token_ids_ptr + token * stride_ids).to(tl.int64)
    num_read = tl.where((row >= 0) & (row < vocab_size), hidden_size, 0)
    weight_ptrs = weight_ptr + row * stride_weight_row + dim.to(tl.int64) * stride_weight_dim
    values = tl.load(weight_ptrs, mask=dim < num_read, other=0.0)
    tl.store(out_ptr + token * stride_out_token + dim.to(tl.int64) * stride_out_dim, values, mask=dim < hidden_size)


def embedding(
    token_ids: Int[Array, " num_tokens"],
    weight: Float[Array, "vocab_size hidden_size"],
    *,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> Float[Array, "num_tokens hidden_size"]:
    """Same contract as `reference.fusion.embedding.embedding`.

    Grid: one program per token and ``TILE_D`` columns of its row.
    Moves: the rows named, once in and once out.
    Limits: an id out of range (an error when values are checked) gives a row of zeros.
    """
    require_shape("embedding", "weight", weight, (None, None))
    require_integers("embedding", "token_ids", token_ids, (None,))
    require_runnable("embedding", "weight", weight)
    require_same_device("embedding", weight=weight, token_ids=token_ids, out=out)
    (num_tokens,), (vocab_size, hidden_size) = token_ids.shape, weight.shape
    require_range("embedding", "token_ids", token_ids, 0, vocab_size)
    require_out("embedding", out, (num_tokens, hidden_size), weight.dtype)
    out = weight.new_empty((num_tokens, hidden_size)) if out is None else out
    if out.numel():
        tile = min(TILE_D, next_power_of_2(hidden_size))
        _embedding_kernel[num_tokens, cdiv(hidden_size, tile)](
            token_ids, weight, out,
            token_ids.stride(0), *weight.stride(), *out.stride(),
            vocab_size, hidden_size,
            TILE_D=tile, **overlapped(out),
        )  # fmt: skip
    return out
