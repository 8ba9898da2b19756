"""RMSNorm in the prologue of the linear layer that follows, while there are few tokens.

Every program reads all of the tokens anyway. It multiplies them by the norm's weight on the way into the matmul, adds
up their squares at the same time, and divides by the root mean square, one number for each token, in the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast._checks import require, require_float, require_same_device, require_shape
from fast.fusion.rms_norm import rms_norm
from fast.linear._skinny import is_skinny, skinny_linear
from fast.linear.linear import check_linear, into, project


@triton.jit
def read_normed(x_ptr, norm_ptr, offset, k, in_features, mask):
    """Tokens times the norm's weight; and themselves, to be squared."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + k, mask=k < in_features, other=0.0).to(tl.float32)
    return x * norm, x


def is_fused(num_tokens: int, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether the norm goes into the matmul. Not in float16 for the tensor cores: before the division by the root mean
    square, a token times the norm's weight may be beyond 65504, or lose digits near 0."""
    return is_skinny(num_tokens, x_dtype, weight_dtype) and (num_tokens == 1 or x_dtype != torch.float16)


def rms_norm_linear(
    x: Array, norm_weight: Array, weight: Array, bias: Array | None, *, eps: float, out: Array | None
) -> Array:
    """Same contract as `reference.fusion.rms_norm.rms_norm_linear`; few tokens are not rounded between the two.

    Grid: as in `linear`; many tokens: a kernel for the norm before it.
    Moves: the weight once; the tokens, from cache, once for each program.
    """
    check_norm_linear(x, norm_weight, weight, bias, eps, out)
    if not is_fused(len(x), x.dtype, weight.dtype):
        return project(rms_norm(x, norm_weight, eps=eps), weight, bias, None, out)
    norm_weight = norm_weight.contiguous()

    def write(x: Array, weight: Array, residual: Array | None, out: Array) -> None:
        skinny_linear(x, weight, bias, residual, out, read=read_normed, side=norm_weight, eps=eps)

    return into(out, x, weight, None, write)


def check_norm_linear(
    x: Array, norm_weight: Array, weight: Array, bias: Array | None, eps: float, out: Array | None
) -> None:
    check_linear("rms_norm_linear", x, weight, bias, out)
    require_shape("rms_norm_linear", "norm_weight", norm_weight, (x.shape[1],))
    require_float("rms_norm_linear", "norm_weight", norm_weight)
    require_same_device("rms_norm_linear", x=x, norm_weight=norm_weight)
    require(eps > 0, "rms_norm_linear", "eps", "a number above 0", eps)
