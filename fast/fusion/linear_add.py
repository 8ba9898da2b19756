"""linear_add, in Triton and by cuBLAS. What the technique is for: `reference/fusion/linear_add.py`."""

from jaxtyping import Float
from torch import Tensor as Array

from fast._checks import require_float, require_same_device, require_shape
from fast.linear.linear import check_linear, project


def linear_add(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.fusion.linear_add.linear_add`, but the sum is rounded once.

    Grid: as in `linear`, with the residual added where the sums are.
    Moves: the weight, the residual and the result once.
    Limits: beyond 32 tokens and with a bias, the layer's result is rounded before it is added, as in the reference.
    """
    check_linear("linear_add", x, weight, bias, out)
    check_residual("linear_add", x, weight, residual)
    return project(x, weight, bias, residual, out)


def check_residual(op: str, x: Array, weight: Array, residual: Array) -> None:
    require_shape(op, "residual", residual, (len(x), len(weight)))
    require_float(op, "residual", residual)
    require_same_device(op, x=x, residual=residual)
