"""RMSNorm in the prologue of the linear layer that follows, for a single token.

Every program reads all of the token anyway. It multiplies it by the norm's weight on the way into the sums, adds up its
squares at the same time, and divides by the root mean square, one number, in the end. For more tokens every program
would do the norm of all of them again, and a kernel of its own is faster (measured from 8 tokens on).
"""

import triton
import triton.language as tl
from torch import Tensor as Array

from fast._checks import require, require_float, require_same_device, require_shape
from fast.fusion.rms_norm import rms_norm
from fast.linear._skinny import skinny_linear
from fast.linear.linear import check_linear, into, project


@triton.jit
def read_normed(x_ptr, norm_ptr, k, in_features, mask):
    """The token times the norm's weight; and itself, to be squared."""
    x = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    return x * norm, x


def rms_norm_linear(
    x: Array, norm_weight: Array, weight: Array, bias: Array | None, *, eps: float, out: Array | None
) -> Array:
    """Same contract as `reference.fusion.rms_norm.rms_norm_linear`; a single token is not rounded between the two.

    Grid: as in `linear`; for several tokens, a kernel for the norm before it.
    Moves: the weight once; the tokens, from cache, once for each program.
    """
    check_norm_linear(x, norm_weight, weight, bias, eps, out)
    if len(x) != 1 or not x.numel():
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
