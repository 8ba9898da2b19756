"""The quickened interpreter computes what Triton's own does."""

import pytest
import torch
import triton
import triton.language as tl

from fast._triton import interpreter

pytestmark = [pytest.mark.needs("interpreter"), pytest.mark.unwatched]

TILE = tl.constexpr(16)


@triton.jit
def _helper(x, y):
    return tl.where(x > y, x, y) * 2


@triton.jit
def _mixed_kernel(x_ptr, ids_ptr, out_ptr, words_ptr, size, factor, TILE: tl.constexpr):
    """Scalars with blocks, blocks of one shape and of several, every kind of dtype, reductions, a loop, a helper."""
    i = tl.arange(0, TILE)
    x = tl.load(x_ptr + i, mask=i < size, other=-1.0).to(tl.float32)
    ids = tl.load(ids_ptr + i, mask=i < size, other=0)
    square = _helper(x[:, None], x[None, :]) + ids[None, :] * factor
    total = tl.zeros([TILE], tl.float32)
    for j in range(0, size, 3):
        total += tl.sum(tl.where(ids[None, :] == j, square, 0.0), 1)
    best = tl.max(square, 1).to(tl.float16).to(tl.float32)
    tl.store(out_ptr + i, tl.where(best > 0, total / best, total), mask=i < size)
    word = (ids.to(tl.uint32) * 0x9E3779B9) ^ (i.to(tl.uint32) << 7)
    tl.store(words_ptr + i, (word >> 3).to(tl.int64) % 1000 - 1, mask=i < size)


def run(dtype):
    x = (torch.arange(TILE.value) * 7 % 11 - 4).to(dtype)
    ids = (torch.arange(TILE.value) * 5 % 13).to(torch.int32)
    out, words = torch.zeros(TILE.value), torch.zeros(TILE.value, dtype=torch.int64)
    _mixed_kernel[(1,)](x, ids, out, words, 13, 0.5, TILE=TILE)
    return out.tolist() + words.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_computes_the_same_as_tritons_own(dtype, monkeypatch):
    quick = run(dtype)
    for name, own in interpreter.OWN.items():
        monkeypatch.setattr(*interpreter.find(name), own)
    assert run(dtype) == quick, "the quickened interpreter computes something else"


@pytest.mark.parametrize("name", interpreter.REPLACED)
def test_replaces_what_this_triton_has(name):
    """In a Triton without it the interpreter would silently be slow again."""
    assert name in interpreter.OWN, f"this Triton has no {name}"


def test_overflow_is_seen_by_those_who_ask():
    @triton.jit
    def square_kernel(x_ptr):
        tl.store(x_ptr, tl.load(x_ptr) * tl.load(x_ptr))

    def square(number):
        x = torch.tensor([number], dtype=torch.int32)
        square_kernel[(1,)](x)
        return x.item()

    assert square(1 << 20) == 0, "does not wrap"
    with interpreter.overflow_checks(True), pytest.raises(Exception, match="overflow"):
        square(1 << 20)
