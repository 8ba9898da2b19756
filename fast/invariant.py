"""The batch-invariant choice: a backend in which a token's bits do not depend on its company.

A row's result is the same alone and in any batch, at any position in it, for any chunking of its prompt; so a request's
tokens can be reproduced, whatever else the server was doing. `fast` itself may add up in another order for another
number of tokens, since that is faster.

It has every name of the interface. What is not defined here is taken from `fast`, whose own kernels do each row in an
order that only the row decides: norms, SwiGLU, rotary, embedding, cache writes, sampling.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor as Array

import fast
from fast import FLOAT_DTYPES, __all__  # noqa: F401  (a backend says these of itself)
from fast.fusion._norm_linear import check_norm_linear
from fast.fusion._swiglu_linear import check_swiglu_linear
from fast.fusion.linear_add import check_residual
from fast.linear._matmul import matmul
from fast.linear.linear import check_linear, into


def __getattr__(name: str) -> Any:
    """Every op that is invariant as it is."""
    if name in __all__:
        return getattr(fast, name)
    raise AttributeError(f"module 'fast.invariant' has no attribute {name!r}")


def linear(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.linear.linear`; the same bits for a token in any batch.

    Grid: one program per tile of the result, whole sums in each (`fast.linear._matmul`).
    """
    check_linear("linear", x, weight, bias, out)
    return _project(x, weight, bias, None, out)


def linear_add(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.fusion.linear_add.linear_add`; the residual is added where the sums are."""
    check_linear("linear_add", x, weight, bias, out)
    check_residual("linear_add", x, weight, residual)
    return _project(x, weight, bias, residual, out)


def rms_norm_linear(
    x: Float[Array, "num_tokens hidden_size"],
    norm_weight: Float[Array, " hidden_size"],
    weight: Float[Array, "out_features hidden_size"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    eps: float,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.fusion.rms_norm.rms_norm_linear`: its two parts, for any number of tokens."""
    check_norm_linear(x, norm_weight, weight, bias, eps, out)
    return _project(fast.rms_norm(x, norm_weight, eps=eps), weight, bias, None, out)


def swiglu_linear_add(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    weight: Float[Array, "out_features intermediate_size"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.fusion.swiglu.swiglu_linear_add`: SwiGLU, then `linear_add`."""
    check_swiglu_linear(gate_up, weight, residual, bias, out)
    return _project(fast.swiglu(gate_up), weight, bias, residual, out)


def _project(
    x: torch.Tensor, weight: Array, bias: Array | None, residual: Array | None, out: Array | None
) -> torch.Tensor:
    return into(out, x, weight, residual, lambda x, w, r, o: matmul(x, w, bias, r, o))
