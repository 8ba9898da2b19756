"""linear, in Triton and by cuBLAS. What the technique is for: `reference/linear/linear.py`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor as Array

from fast._checks import require, require_added, require_float, require_out, require_same_device, require_shape
from fast._triton.platform import num_processors
from fast.linear._matmul import matmul
from fast.linear._skinny import FEW_TOKENS, rows_of, skinny_linear, whole_rows
from fast.linear._split import choose_split, describable, most_tokens, split_linear

Write = Callable[[Array, Array, Array | None, Array], object]  # takes x, weight, residual, out

# How torch may let cuBLAS round on the way: tf32 products, partial sums in 16 bits. None of it is in the contract.
LOOSE = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def linear(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """Same contract as `reference.linear.linear.linear`.

    Grid: for few tokens, one program per few rows of the weight, which it streams once (`_skinny`), or per tile of 64
    rows and share of the columns (`_split`; 32 to 128 tokens, by the size of the weight). More: cuBLAS, which nothing
    here beats. Where ``weight`` has another dtype than ``x``: tiles of a float32 product (`_matmul`).
    Moves: the weight once; the tokens, from cache, once for each program.
    Limits: where the last axis is not contiguous, the argument is copied first.
    """
    check_linear("linear", x, weight, bias, out)
    return project(x, weight, bias, None, out)


def choose_way(
    num_tokens: int, out_features: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, splittable: bool
) -> str:
    """Which kernel: by the number of tokens, and whether the tensor cores and the copy engine take the operands.

    ``splittable``: they are `describable`, and tokens few enough for `most_tokens`.

    Up to eight tokens, narrow tiles are better where wide ones are few, or fill more than half of the processors, but
    not all.
    """
    if num_tokens == 1:
        return "one"
    if x_dtype != weight_dtype:
        return "tiles"
    if x_dtype == torch.float32:
        return "cublas"
    uneven = out_features <= 2048 or 66 < out_features / 64 < 132
    if splittable and not (num_tokens <= 8 and uneven):
        return "split"
    return "few" if num_tokens <= FEW_TOKENS else "cublas"


def project(x: Array, weight: Array, bias: Array | None, residual: Array | None, out: Array | None) -> Array:
    """``residual + x weight^T + bias`` by the way that suits the number of tokens; arguments have been checked."""
    if not x.numel():
        return into(out, x, weight, residual, lambda x, w, r, o: matmul(x, w, bias, r, o))
    num_tokens, sizes = len(x), (*weight.shape, num_processors(x))
    splittable = num_tokens <= most_tokens(*sizes) and describable(x, weight)
    way = choose_way(num_tokens, len(weight), x.dtype, weight.dtype, splittable)
    if way == "split":
        split = choose_split(num_tokens, *sizes)
        return into(out, x, weight, residual, lambda x, w, r, o: split_linear(x, w, bias, r, o, split))
    if way in ("one", "few"):
        return into(out, x, weight, residual, lambda x, w, r, o: skinny_linear(x, w, bias, r, o))
    if way == "tiles":
        return into(out, x, weight, residual, lambda x, w, r, o: matmul(x, w, bias, r, o))
    with exact_products(x):
        return _by_cublas(x, weight, bias, residual, out)


def into(out: Array | None, x: Array, weight: Array, residual: Array | None, write: Write) -> Array:
    """``write(x, weight, residual, out)`` with the last axis of each contiguous, as kernels want it."""
    if out is None or whole_rows(out) is not out:
        target = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    else:
        target = out
    write(whole_rows(x), whole_rows(weight), rows_of(residual), target)
    return target if out is None or target is out else out.copy_(target)


def _by_cublas(x: Array, weight: Array, bias: Array | None, residual: Array | None, out: Array | None) -> Array:
    """The bias, or the residual, is added in the accumulator; both: rounded in between, as the contract has it.

    A residual that is the result's place is added without a trip of its own; one that is not is copied there first.
    """
    out = x.new_empty((len(x), len(weight))) if out is None else out
    if bias is not None and residual is not None:
        return torch.add(torch.addmm(bias.to(x.dtype), x, weight.T), residual, out=out)
    added = residual if bias is None else bias
    if added is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(added.to(x.dtype), x, weight.T, out=out)


@contextmanager
def exact_products(x: Array) -> Iterator[None]:
    """float32 products and sums inside, whatever torch has been told to allow."""
    allowed = torch.backends.cuda.matmul
    loose = [name for name in LOOSE if x.is_cuda and getattr(allowed, name)]
    for name in loose:
        setattr(allowed, name, False)
    try:
        yield
    finally:
        for name in loose:
            setattr(allowed, name, True)


def check_linear(op: str, x: Array, weight: Array, bias: Array | None, out: Array | None) -> None:
    """The door of every dense layer."""
    require_shape(op, "x", x, (None, None))
    require_float(op, "x", x)
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        require(False, op, "weight", f"shape [*, {x.shape[1]}]", list(weight.shape))
    require_float(op, "weight", weight)
    require_added(op, "bias", bias, (weight.shape[0],))
    require_out(op, out, (len(x), weight.shape[0]), x.dtype)
    require_same_device(op, x=x, weight=weight, bias=bias, out=out)
