"""The batch-invariant choice: a backend in which a token's bits do not depend on its company.

A row's result is the same alone and in any batch, at any position in it, for any chunking of its prompt; so a request's
tokens can be reproduced, whatever else the server was doing. `fast` itself may add up in another order for another
number of tokens, since that is faster.

It has every name of the interface. What is not named here is taken from `fast`, whose own kernels do each row in an
order that only the row decides: norms, SwiGLU, rotary, embedding, cache writes, sampling. Packed and dense attention
have no part in a decoding step and are `fast`'s too.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor as Array

import fast
from fast import FLOAT_DTYPES, INTERPRETING, __all__  # noqa: F401  (a backend says these of itself)
from fast.attention.invariant_attention import paged_attention_invariant
from fast.fusion._norm_linear import check_norm_linear
from fast.fusion._swiglu_linear import check_swiglu_linear
from fast.fusion.linear_add import check_residual
from fast.kv_cache.invariant_attention import (
    paged_attention_fp8_invariant,
    paged_attention_int4_invariant,
    paged_attention_int8_invariant,
    paged_attention_kivi_invariant,
)
from fast.linear._descriptors import matmul_described
from fast.linear._matmul import matmul
from fast.linear._split import describable, split_linear, unsplit
from fast.linear.linear import check_linear, into
from fast.linear.lora import lora_invariant
from fast.linear.quantized_linear import (
    linear_fp8_fp8_invariant,
    linear_fp8_invariant,
    linear_int4_invariant,
    linear_int8_int8_invariant,
    linear_int8_invariant,
)
from fast.linear.sparse_linear import sparse_linear_invariant

FEW_TOKENS = 64  # up to here the tokens are one tile, and the weight is the first operand


def __getattr__(name: str) -> Any:
    """Every op that is invariant as it is."""
    if name in __all__:
        return getattr(fast, name)
    raise AttributeError(f"module 'fast.invariant' has no attribute {name!r}")


def _as(op: Callable) -> Callable[[Callable], Callable]:
    """The name, the signature and the docstring of ``fast``'s op, for an invariant way to compute it."""
    return lambda way: wraps(op)(lambda *args, **kwargs: way(*args, **kwargs))


paged_attention = _as(fast.paged_attention)(paged_attention_invariant)
paged_attention_fp8 = _as(fast.paged_attention_fp8)(paged_attention_fp8_invariant)
paged_attention_int4 = _as(fast.paged_attention_int4)(paged_attention_int4_invariant)
paged_attention_int8 = _as(fast.paged_attention_int8)(paged_attention_int8_invariant)
paged_attention_kivi = _as(fast.paged_attention_kivi)(paged_attention_kivi_invariant)
lora = _as(fast.lora)(lora_invariant)
linear_fp8 = _as(fast.linear_fp8)(linear_fp8_invariant)
linear_fp8_fp8 = _as(fast.linear_fp8_fp8)(linear_fp8_fp8_invariant)
linear_int4 = _as(fast.linear_int4)(linear_int4_invariant)
linear_int8 = _as(fast.linear_int8)(linear_int8_invariant)
linear_int8_int8 = _as(fast.linear_int8_int8)(linear_int8_int8_invariant)
sparse_linear = _as(fast.sparse_linear)(sparse_linear_invariant)


# ---- dense layers ---------------------------------------------------------------------------------------------------


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


def choose_way(num_tokens: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, aligned: bool) -> str:
    """Which kernel: all of them add up in the same order, to the same bits."""
    if x_dtype != weight_dtype or x_dtype == torch.float32 or not aligned:
        return "pointers"
    return "few" if num_tokens <= FEW_TOKENS else "many"


def _project(x: Array, weight: Array, bias: Array | None, residual: Array | None, out: Array | None) -> Array:
    def write(x: Array, weight: Array, residual: Array | None, out: Array) -> None:
        aligned = x.numel() > 0 and describable(x, weight, out)
        way = choose_way(len(x), x.dtype, weight.dtype, aligned)
        if way == "few":
            split_linear(x, weight, bias, residual, out, unsplit(len(x)))
        elif way == "many":
            matmul_described(x, weight, bias, residual, out)
        else:
            matmul(x, weight, bias, residual, out)

    return into(out, x, weight, residual, write)
