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
from fast import FLOAT_DTYPES, __all__  # noqa: F401  (a backend says these of itself)
from fast.attention.invariant_attention import paged_attention_invariant
from fast.fusion._norm_linear import check_norm_linear
from fast.fusion._swiglu_linear import check_swiglu_linear
from fast.fusion.linear_add import check_residual
from fast.kv_cache._codes import require_affine, require_symmetric
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


# ---- attention over caches of codes: as floats first ----------------------------------------------------------------


@wraps(fast.paged_attention_int8)
def paged_attention_int8(q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, cu_seqlens_q, **options):
    require_symmetric("paged_attention_int8", k_cache, v_cache, k_scale, v_scale, codes=torch.int8)
    sides = (k_cache, k_scale), (v_cache, v_scale)
    return _attend_floats(q, _symmetric, *sides, block_table, seq_lens, cu_seqlens_q, **options)


@wraps(fast.paged_attention_fp8)
def paged_attention_fp8(q, k_cache, v_cache, k_scale, v_scale, block_table, seq_lens, cu_seqlens_q, **options):
    require_symmetric("paged_attention_fp8", k_cache, v_cache, k_scale, v_scale, codes=torch.float8_e4m3fn)
    sides = (k_cache, k_scale), (v_cache, v_scale)
    return _attend_floats(q, _symmetric, *sides, block_table, seq_lens, cu_seqlens_q, **options)


@wraps(fast.paged_attention_int4)
def paged_attention_int4(
    q, k_cache, v_cache, k_scale, k_zero, v_scale, v_zero, block_table, seq_lens, cu_seqlens_q, **options
):
    require_affine("paged_attention_int4", k_cache, v_cache, k_scale, k_zero, v_scale, v_zero)
    sides = (k_cache, k_scale, k_zero), (v_cache, v_scale, v_zero)
    return _attend_floats(q, _affine, *sides, block_table, seq_lens, cu_seqlens_q, **options)


@wraps(fast.paged_attention_kivi)
def paged_attention_kivi(*args, **kwargs):
    raise NotImplementedError("paged_attention_kivi: there is no batch-invariant version")


def _attend_floats(
    q: Array,
    dequantize: Callable[..., Array],
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    block_table: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    **options: Any,
) -> Array:
    """The blocks that the table names become blocks of float32, and are attended to in the order of their positions.

    Slow, and as much memory as the sequences have tokens in float32; nothing is rounded that the op would not round.
    """
    num_blocks = len(keys[0])
    known = (block_table >= 0) & (block_table < num_blocks)
    own = torch.arange(block_table.numel(), device=q.device).view(block_table.shape)
    table = torch.where(known, own, -1).to(torch.int32)
    blocks = torch.where(known, block_table, 0).flatten() if num_blocks else own.flatten()[:0]
    k, v = (dequantize(*(_take(array, blocks) for array in side)) for side in (keys, values))
    return paged_attention_invariant(q, k, v, table, seq_lens, cu_seqlens_q, **options)


def _take(array: Array, blocks: Array) -> Array:
    """Those blocks; torch moves no float8, but bytes."""
    return array.view(torch.uint8)[blocks].view(array.dtype) if array.itemsize == 1 else array[blocks]


def _symmetric(codes: Array, scale: Array) -> Array:
    return codes.float() * scale.float()[..., None]


def _affine(codes: Array, scale: Array, zero: Array) -> Array:
    """Low nibbles are the first half of a head."""
    numbers = torch.cat([codes & 15, codes >> 4], dim=-1).float()
    groups = numbers.unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.float()[..., None] + zero.float()[..., None]).flatten(-2)
