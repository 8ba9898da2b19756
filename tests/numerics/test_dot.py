"""Dot products of kernels: what is right on a GPU is right in the interpreter, too."""

# pyright: reportArgumentType=false
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fast._triton.platform import default_device
from fast._triton.rounding import dot, dot_in_order

SIZES = {"M": 16, "K": 32, "N": 16}


@triton.jit
def _places(ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """Of a contiguous matrix, or of PARTS of them, if that is not 0."""
    place = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    if PARTS:
        place = tl.arange(0, PARTS)[:, None, None] * (ROWS * COLS) + place[None, :, :]
    return place


@triton.jit
def _dot_kernel(
    a_ptr, b_ptr, acc_ptr, out_ptr,
    M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    a, b = tl.load(a_ptr + _places(M, K, PARTS)), tl.load(b_ptr + _places(K, N, PARTS))
    acc = tl.load(acc_ptr + _places(M, N, PARTS))
    acc = dot_in_order(a, b, acc) if IN_ORDER else dot(a, b, acc)
    tl.store(out_ptr + _places(M, N, PARTS), acc)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numbers = np.random.default_rng(len(shape)).standard_normal(shape)
    return torch.from_numpy(numbers).to(default_device(), dtype)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [0, 2])
def test_adds_a_product_to_what_is_there(in_order, dtype, parts):
    """Sums are in float32, and float32 operands are not cut to tf32."""
    lead = (parts,) if parts else ()
    a, b, acc = draw(*lead, 16, 32, dtype=dtype), draw(*lead, 32, 16, dtype=dtype), draw(*lead, 16, 16)
    out = torch.full_like(acc, torch.nan)
    _dot_kernel[(1,)](a, b, acc, out, **SIZES, PARTS=parts, IN_ORDER=in_order)
    expected = acc.double() + a.double() @ b.double()
    size = acc.double().abs() + a.double().abs() @ b.double().abs()
    assert ((out.double() - expected).abs() <= 33 * 2.0**-24 * size).all(), "not the product"


@pytest.mark.parametrize("parts", [0, 2])
def test_in_order_an_element_does_not_depend_on_the_shape(parts):
    """More columns beside it leave the bits of one as they are."""
    lead = (parts,) if parts else ()
    a, b, acc = draw(*lead, 16, 32), draw(*lead, 32, 32), draw(*lead, 16, 32)
    outs = []
    for columns in (16, 32):
        beside = b[..., :columns].contiguous(), acc[..., :columns].contiguous()
        out = torch.full_like(beside[1], torch.nan)
        _dot_kernel[(1,)](a, *beside, out, **SIZES | {"N": columns}, PARTS=parts, IN_ORDER=True)
        outs.append(out[..., :16])
    assert torch.equal(*outs)
