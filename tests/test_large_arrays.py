"""Arrays of more than 2^31 elements: an offset that does not fit 32 bits would read or write somewhere else.

What lies at the far end of a large array must come out as it does from a small array of its own, bit for bit.
"""

from collections.abc import Callable

import pytest
import torch

import fast
from fast import invariant

pytestmark = pytest.mark.needs("gpu")

PAST = 2**31  # elements
BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM = 16, 8, 128
BFLOAT16 = {"dtype": torch.bfloat16, "device": "cuda"}


def far_end(width: int, rows: int = 4) -> torch.Tensor:
    """[num_rows, width]: zeros, and random numbers in the last few rows."""
    x = torch.zeros(PAST // width + 128, width, **BFLOAT16)
    x[-rows:] = torch.randn(rows, width, **BFLOAT16)
    return x


@pytest.mark.parametrize(
    "op",
    [
        lambda x: fast.rms_norm(x, torch.ones(x.shape[1], **BFLOAT16), eps=1e-5),
        fast.swiglu,
        lambda x: invariant.linear(x, torch.ones(16, x.shape[1], **BFLOAT16)),
    ],
    ids=["rms_norm", "swiglu", "linear"],
)
def test_many_tokens(op: Callable):
    """Each op works token by token."""
    x = far_end(4096)
    assert torch.equal(op(x)[-4:], op(x[-8:])[-4:])


def test_a_large_vocabulary():
    """Its embedding, its head, and the sampling of its logits."""
    table = far_end(4096)
    ids = torch.arange(len(table) - 4, len(table), device="cuda")
    assert torch.equal(fast.embedding(ids, table), table[-4:])
    x = torch.randn(3, 4096, **BFLOAT16)
    assert torch.equal(invariant.linear(x, table)[:, -4:], invariant.linear(x, table[-4:]))


def test_many_logits():
    """A row of logits draws what it draws alone."""
    vocab_size = 131072
    logits = torch.zeros(PAST // vocab_size + 4, vocab_size, device="cuda")
    logits[-4:] = torch.randn(4, vocab_size, device="cuda")

    def draw(logits: torch.Tensor) -> torch.Tensor:
        def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((len(logits),), value, dtype=dtype, device="cuda")

        counters = [column(7, torch.int64), column(3, torch.int32), column(0, torch.int32)]
        return fast.sample(logits, column(1.0), column(50, torch.int32), column(0.9), column(0.0), *counters)

    assert torch.equal(draw(logits)[-4:], draw(logits[-4:]))


def test_long_prompts():
    """Queries of more than half a million tokens, in sequences of 64."""
    num_heads, length = 32, 64
    q = far_end(num_heads * HEAD_DIM, length).view(-1, num_heads, HEAD_DIM)
    q = q[len(q) % length :]
    k, v = (torch.randn(len(q), NUM_KV_HEADS, HEAD_DIM, **BFLOAT16) for _ in range(2))
    offsets = torch.arange(0, len(q) + 1, length, dtype=torch.int32, device="cuda")
    whole, _ = fast.flash_attention(q, k, v, offsets, offsets)
    alone, _ = fast.flash_attention(q[-length:], k[-length:], v[-length:], offsets[:2], offsets[:2])
    torch.testing.assert_close(whole[-length:], alone, rtol=2**-7, atol=2**-7)  # whole tiles differ from partial ones


def test_large_caches():
    """Blocks at the end of a pool: written, copied, attended over."""
    shape = (PAST // (BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM) + 8, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    pool = torch.zeros(shape[0], 2, *shape[1:], **BFLOAT16)
    small = torch.zeros(8, 2, *shape[1:], **BFLOAT16)
    k, v = (torch.randn(40, NUM_KV_HEADS, HEAD_DIM, **BFLOAT16) for _ in range(2))
    q = torch.randn(1, 32, HEAD_DIM, **BFLOAT16)
    lens, cu = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([40], [0, 1]))
    results = []
    for cache in (pool, small):
        first = len(cache) - 8
        fast.write_kv(k, v, cache[:, 0], cache[:, 1], torch.arange(40, device="cuda") + first * BLOCK_SIZE)
        pairs = [torch.tensor([first + i for i in ids], device="cuda") for ids in ((0, 1, 2), (5, 4, 3))]
        fast.copy_blocks(cache.view(len(cache), -1).view(torch.uint8), *pairs)
        table = pairs[1].to(torch.int32)[None]
        results += [cache[-8:], fast.paged_attention(q, cache[:, 0], cache[:, 1], table, lens, cu)]
    assert torch.equal(results[0], results[2]), "the blocks differ"
    assert torch.equal(results[1], results[3]), "what was attended over differs"


def test_a_large_cache_of_codes():
    """The same for a byte an element."""
    shape = (PAST // (BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM) + 8, BLOCK_SIZE, NUM_KV_HEADS)
    k, v = (torch.randn(40, NUM_KV_HEADS, HEAD_DIM, **BFLOAT16) for _ in range(2))
    q = torch.randn(1, 32, HEAD_DIM, **BFLOAT16)
    lens, cu = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([40], [0, 1]))
    results = []
    for num_blocks in (shape[0], 8):
        first = num_blocks - 8
        codes = [torch.zeros(num_blocks, *shape[1:], HEAD_DIM, dtype=torch.int8, device="cuda") for _ in range(2)]
        scales = [torch.zeros(num_blocks, *shape[1:], device="cuda") for _ in range(2)]
        fast.write_kv_int8(k, v, *codes, *scales, torch.arange(40, device="cuda") + first * BLOCK_SIZE)
        table = torch.arange(first, first + 3, dtype=torch.int32, device="cuda")[None]
        results.append(fast.paged_attention_int8(q, *codes, *scales, table, lens, cu))
    assert torch.equal(*results)
    assert results[0].any()
