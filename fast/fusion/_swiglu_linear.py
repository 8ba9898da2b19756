"""SwiGLU in the prologue of the projection that follows, for a single token and a large weight.

Every program gates all of the token for itself: twice the reading, from cache, and an exponential for each number. That
is hidden behind a large weight's trip from memory. For several tokens, or a small weight (measured: 8 tokens; 3072 to
1024 features), a kernel of its own is faster.
"""

import triton
import triton.language as tl
from torch import Tensor as Array

from fast._checks import require, require_float, require_shape
from fast._triton.platform import INTERPRETING
from fast.fusion.linear_add import check_residual
from fast.fusion.swiglu import silu_times, swiglu
from fast.linear._skinny import skinny_linear
from fast.linear.linear import check_linear, into, project

LARGE = 2**24  # weights


def is_fused(num_tokens: int, num_weights: int) -> bool:
    """Whether SwiGLU goes into the matmul; always in the interpreter, where it is to be tested."""
    return num_tokens == 1 and num_weights > 0 and (num_weights >= LARGE or INTERPRETING)


@triton.jit
def read_gated(gate_up_ptr, side_ptr, k, in_features, mask):
    """silu(gate) * up, twice."""
    gate = tl.load(gate_up_ptr + k, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + in_features + k, mask=mask, other=0.0).to(tl.float32)
    gated = silu_times(gate, up, gate_up_ptr.dtype.element_ty == tl.float32)
    return gated, gated


def swiglu_linear_add(
    gate_up: Array, weight: Array, residual: Array, bias: Array | None, *, out: Array | None
) -> Array:
    """Same contract as `reference.fusion.swiglu.swiglu_linear_add`, but the sum is rounded once.

    Grid: as in `linear`; a kernel for SwiGLU before it, unless it is a single token and a large weight.
    Moves: the weight, the residual and the result once; ``gate_up``, from cache, once for each program.
    """
    check_swiglu_linear(gate_up, weight, residual, bias, out)
    if not is_fused(len(gate_up), weight.numel()):
        return project(swiglu(gate_up), weight, bias, residual, out)

    def write(x: Array, weight: Array, residual: Array | None, out: Array) -> None:
        skinny_linear(x, weight, bias, residual, out, read=read_gated)

    return into(out, gate_up, weight, residual, write)


def check_swiglu_linear(gate_up: Array, weight: Array, residual: Array, bias: Array | None, out: Array | None) -> None:
    op = "swiglu_linear_add"
    require_shape(op, "gate_up", gate_up, (None, None))
    require_float(op, "gate_up", gate_up)
    require(gate_up.shape[1] % 2 == 0, op, "gate_up", "rows of even length", gate_up.shape[1])
    check_linear(op, gate_up[:, : gate_up.shape[1] // 2], weight, bias, out)
    check_residual(op, gate_up, weight, residual)
