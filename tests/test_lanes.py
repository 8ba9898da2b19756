"""Each instruction of `lanes` computes its definition: natively on a GPU, and in the interpreter by its stand-in."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fast._triton import lanes
from fast._triton.platform import default_device

WARPS = 2
SIZE = 32 * WARPS


@triton.jit
def _words_kernel(words_ptr, floats_ptr, out_ptr, N: tl.constexpr):
    """What yields words."""
    i = tl.arange(0, N)
    a, b, c = tl.load(words_ptr + i), tl.load(words_ptr + N + i), tl.load(words_ptr + 2 * N + i)
    x, y = tl.load(floats_ptr + i), tl.load(floats_ptr + N + i)
    tl.store(out_ptr + i, lanes.bytes_0213(a))
    tl.store(out_ptr + N + i, lanes.pair(a, b, 0))
    tl.store(out_ptr + 2 * N + i, lanes.pair(a, b, 1))
    tl.store(out_ptr + 3 * N + i, lanes.transposed(a))
    tl.store(out_ptr + 4 * N + i, lanes.packed(x, y, tl.float16))
    tl.store(out_ptr + 5 * N + i, lanes.packed(x, y, tl.bfloat16))
    tl.store(out_ptr + 6 * N + i, lanes.multiply(a, b))
    tl.store(out_ptr + 7 * N + i, lanes.multiply_add(a, b, c))
    for n in tl.static_range(4):
        tl.store(out_ptr + (8 + n) * N + i, lanes.load_words(words_ptr + 4 * i, 4)[n])
    for n in tl.static_range(2):
        tl.store(out_ptr + (12 + n) * N + i, lanes.load_words(words_ptr + 2 * i, 2)[n])
    tl.store(out_ptr + 14 * N + i, lanes.load_words(words_ptr + i, 1)[0])


@triton.jit
def _floats_kernel(words_ptr, floats_ptr, out_ptr, N: tl.constexpr, DTYPE: tl.constexpr):
    """What yields floats."""
    i = tl.arange(0, N)
    w = tl.load(words_ptr + i)
    x = tl.load(floats_ptr + i)
    low, high = lanes.halves_of(w, DTYPE)
    tl.store(out_ptr + i, low)
    tl.store(out_ptr + N + i, high)
    tl.store(out_ptr + 2 * N + i, lanes.from_lane(x, (i * 5 + 3) % 32))
    tl.store(out_ptr + 3 * N + i, lanes.from_other(x, 2))
    tl.store(out_ptr + 4 * N + i, lanes.largest_of(x))
    tl.store(out_ptr + 5 * N + i, lanes.sum_of(x))
    accs = (x, x, tl.load(floats_ptr + i), tl.load(floats_ptr + N + i))
    accs = accs + (tl.load(floats_ptr + 2 * N + i), tl.load(floats_ptr + 3 * N + i))
    a0, a1, a2 = tl.load(words_ptr + i), tl.load(words_ptr + N + i), tl.load(words_ptr + 2 * N + i)
    a3, b0, b1 = tl.load(words_ptr + 3 * N + i), tl.load(words_ptr + 4 * N + i), tl.load(words_ptr + 5 * N + i)
    sums = lanes.product_at(accs, 2, a0, a1, a2, a3, b0, b1, DTYPE)
    for n in tl.static_range(4):
        tl.store(out_ptr + (6 + n) * N + i, sums[n])


@triton.jit
def _memory_kernel(words_ptr, out_ptr, N: tl.constexpr):
    """Two groups of copies: 64 words of each warp reversed by fours; then the first eight once more, by twos."""
    i = tl.arange(0, N)
    lane, warp = i % 32, i // 32
    memory = lanes.warp_memory(160, N // 32)
    own = words_ptr + 64 * warp
    memory = lanes.copy_words(memory, 4 * (15 - lane % 16), 0, own + lane % 16 * 4, 4)  # two lanes each
    lanes.commit_copies()
    memory = lanes.copy_words(memory, lane % 4 * 2, 64, own + lane % 4 * 2, 2)
    memory = lanes.copy_words(memory, lane % 8, 72, own + lane % 8, 1)
    lanes.commit_copies()
    lanes.wait_for_copies(1)
    for n in tl.static_range(4):
        tl.store(out_ptr + n * N + i, lanes.read_words(memory, lane % 15 * 4, 4, 4)[n])
    for n in tl.static_range(2):
        tl.store(out_ptr + (4 + n) * N + i, lanes.read_transposed(memory, lane * 4 % 60, 4)[n])
    lanes.wait_for_copies(0)
    for n in tl.static_range(2):
        tl.store(out_ptr + (6 + n) * N + i, lanes.read_words(memory, lane % 4 * 2, 64, 2)[n])
    tl.store(out_ptr + 8 * N + i, lanes.read_words(memory, lane % 8, 72, 1)[0])


@triton.jit
def _bytes_kernel(words_ptr, out_ptr, N: tl.constexpr):
    """What takes a word for four bytes."""
    i = tl.arange(0, N)
    a, b = tl.load(words_ptr + i), tl.load(words_ptr + N - 1 - i)
    for half in tl.static_range(2):
        tl.store(out_ptr + half * N + i, lanes.interleaved(a, b, half))
        tl.store(out_ptr + (2 + half) * N + i, lanes.float8s(a, half))


@pytest.fixture
def registers():
    """(six words of two halves each, four floats) a lane; the halves of the first word are subnormal float16s too."""
    generator = torch.Generator().manual_seed(1)
    halves = torch.randn(6, SIZE, 2, generator=generator).half()
    halves[0] = torch.randint(0, 1024, (SIZE, 2), generator=generator).to(torch.int16).view(torch.float16)
    return halves, torch.randn(4, SIZE, generator=generator)


def words_of(halves: torch.Tensor) -> torch.Tensor:
    """Numbers of two bytes, or of one, in words: the last axis goes."""
    return halves.contiguous().view(torch.int32).reshape(halves.shape[:-1])


def warps_of(x: torch.Tensor) -> torch.Tensor:
    """[warps, 8, 4]: lane 4 g + c at (g, c)."""
    return x.reshape(WARPS, 8, 4, *x.shape[1:])


def test_words(registers):
    halves, floats = registers
    device = default_device()
    out = torch.zeros(15, SIZE, dtype=torch.int32, device=device)
    _words_kernel[(1,)](words_of(halves).to(device), floats.to(device), out, N=SIZE, num_warps=WARPS)
    a, b, c = halves[:3]
    bytes_of_a = a.contiguous().view(torch.uint8)
    tables = a.reshape(WARPS, 8, 8)
    flat = words_of(halves).reshape(-1)
    pairs = torch.stack([floats[0], floats[1]], 1)
    fused = (a.double() * b.double() + c.double()).numpy().astype(np.float16)  # torch rounds to float32 in between
    want = {
        "bytes_0213": words_of(bytes_of_a[:, [0, 2, 1, 3]]),
        "the lower halves": words_of(torch.stack([a[:, 0], b[:, 0]], 1)),
        "the upper halves": words_of(torch.stack([a[:, 1], b[:, 1]], 1)),
        "transposed": words_of(tables.transpose(1, 2).reshape(SIZE, 2)),
        "packed in float16": words_of(pairs.half()),
        "packed in bfloat16": words_of(pairs.bfloat16()),
        "multiply": words_of((a.double() * b.double()).half()),
        "multiply_add": words_of(torch.from_numpy(fused)),
        **{f"word {n} of four": flat[n : 4 * SIZE : 4] for n in range(4)},
        **{f"word {n} of two": flat[n : 2 * SIZE : 2] for n in range(2)},
        "one word": flat[:SIZE],
    }
    for (name, words), got in zip(want.items(), out.cpu(), strict=True):
        assert torch.equal(got, words), f"{name}: {got.tolist()} instead of {words.tolist()}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats(registers, dtype):
    halves, floats = registers
    halves = halves.view(dtype) if dtype == torch.float16 else halves.to(dtype)
    device = default_device()
    out = torch.zeros(10, SIZE, device=device)
    kind = tl.float16 if dtype == torch.float16 else tl.bfloat16
    _floats_kernel[(1,)](words_of(halves).to(device), floats.to(device), out, N=SIZE, DTYPE=kind, num_warps=WARPS)
    lane = torch.arange(SIZE)
    columns = warps_of(floats[0])
    rows = [warps_of(x.double()).reshape(WARPS, 8, 8) for x in halves]  # of the table of a register
    left = torch.cat([torch.cat(rows[0:3:2], 2), torch.cat(rows[1:4:2], 2)], 1)
    right = torch.cat(rows[4:6], 2).transpose(1, 2)
    upper, lower = (torch.stack([floats[n], floats[n + 1]], 1).double().reshape(WARPS, 8, 8) for n in (0, 2))
    sums = left @ right + torch.cat([upper, lower], 1)
    parts = [sums[:, :8].reshape(SIZE, 2), sums[:, 8:].reshape(SIZE, 2)]
    want = {
        "the lower half": halves[0, :, 0].float(),
        "the upper half": halves[0, :, 1].float(),
        "from_lane": floats[0].reshape(WARPS, 32)[:, (torch.arange(32) * 5 + 3) % 32].reshape(-1),
        "from_other": floats[0][lane ^ 2],
        "largest_of": columns.amax(1, keepdim=True).expand(columns.shape).reshape(-1),
        "sum_of": columns.double().sum(1, keepdim=True).expand(columns.shape).reshape(-1),
        **{f"product {n}": parts[n // 2][:, n % 2] for n in range(4)},
    }
    for (name, numbers), got in zip(want.items(), out.cpu(), strict=True):
        tolerance = 1e-4 * numbers.abs().max() if name == "sum_of" or name.startswith("product") else 0.0
        error = (got.double() - numbers.double()).abs().max()
        assert error <= tolerance, f"{name}: {got.tolist()} instead of {numbers.tolist()}"


def test_memory(registers):
    words = words_of(registers[0]).reshape(-1)[: 64 * WARPS]
    device = default_device()
    out = torch.zeros(9, SIZE, dtype=torch.int32, device=device)
    _memory_kernel[(1,)](words.to(device), out, N=SIZE, num_warps=WARPS)
    own = words.reshape(WARPS, 16, 4)
    memory = own.flip(1)
    lane, c = torch.arange(32), torch.arange(32) % 4
    of_lanes = memory[:, lane % 15 + 1].reshape(SIZE, 4)
    halves = memory.contiguous().view(torch.int16).reshape(WARPS, 16, 8)
    tables = [halves[:, (torch.arange(8) + 8 * n) * 4 % 60 // 4 + 1].transpose(1, 2) for n in range(2)]
    flat = own.reshape(WARPS, 64)
    want = {
        **{f"word {n} of four": of_lanes[:, n] for n in range(4)},
        **{f"table {n}": words_of(t.reshape(SIZE, 2)) for n, t in enumerate(tables)},
        **{f"word {n} of two": flat[:, c * 2 + n] for n in range(2)},
        "one word": flat[:, lane % 8],
    }
    for (name, expected), got in zip(want.items(), out.cpu(), strict=True):
        assert torch.equal(got, expected.reshape(-1)), f"{name}: {got.tolist()} instead of {expected.tolist()}"


def test_bytes():
    """Every byte once: every float8 too."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)[torch.randperm(256)].view(SIZE, 4)
    words = words_of(codes)
    device = default_device()
    out = torch.zeros(4, SIZE, dtype=torch.int32, device=device)
    _bytes_kernel[(1,)](words.to(device), out, N=SIZE, num_warps=WARPS)
    out = out.cpu()
    by_turns = torch.stack([codes, codes.flip(0)], 2)  # [lane, byte, which]
    for half, (first, last) in enumerate([(0, 2), (2, 4)]):
        assert torch.equal(out[half], words_of(by_turns[:, first:last].reshape(SIZE, 4)))
        got = out[2 + half].contiguous().view(torch.float16).reshape(SIZE, 2)
        want = codes[:, first:last].contiguous().view(torch.float8_e4m3fn).half()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _numbers_kernel(numbers_ptr, out_ptr, N: tl.constexpr):
    """Numbers from behind pointers to behind pointers; every second lane loads -7, and at first stores nothing."""
    i = tl.arange(0, N)
    there = i % 2 == 0
    for n in tl.static_range(3):
        loaded = lanes.load_number(numbers_ptr + i, n * N, there, -7.0)
        lanes.store_number(out_ptr + i, n * N, loaded, there)
        lanes.store_number(out_ptr + i, (3 + n) * N, loaded, i >= 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers(dtype):
    """Rounded to the dtype behind the pointer; where nothing is stored, what was there stays."""
    numbers = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0)).to(default_device())
    out = torch.full((6, SIZE), 5.0, dtype=dtype, device=default_device())
    _numbers_kernel[(1,)](numbers, out, N=SIZE, num_warps=WARPS)
    there = torch.arange(SIZE, device=default_device()) % 2 == 0
    assert torch.equal(out[:3], torch.where(there, numbers, 5.0).to(dtype))
    assert torch.equal(out[3:], torch.where(there, numbers, -7.0).to(dtype))
