"""The sanitizer catches what plain interpretation lets pass, and nothing else."""

import pytest
import torch
import triton
import triton.language as tl

import fast
from twofold.conformance.sanitizer import SanitizerError, sanitized

pytestmark = [pytest.mark.needs("interpreter"), pytest.mark.unwatched]  # it watches Triton's interpreter

TILE = tl.constexpr(16)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, num_written, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < size, other=0.0), mask=i < num_written)


@triton.jit
def _shifted_kernel(x_ptr, out_ptr, size, shift, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i + shift * tl.program_id(0), x, mask=i < size)


@triton.jit
def _neighbour_kernel(x_ptr, size, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    next_x = tl.load(x_ptr + i + TILE, mask=i + TILE < size, other=0.0)
    tl.store(x_ptr + i, next_x, mask=i < size)


@triton.jit
def _last_sums_kernel(x_ptr, parts_ptr, count_ptr, out_ptr, size, num_parts, SEM: tl.constexpr, TILE: tl.constexpr):
    part = tl.program_id(0)
    i = part * TILE + tl.arange(0, TILE)
    tl.store(parts_ptr + part, tl.sum(tl.load(x_ptr + i, mask=i < size, other=0.0)))
    arrived = tl.atomic_add(count_ptr, 1, sem=SEM)
    if arrived == num_parts - 1:
        j = tl.arange(0, TILE)
        tl.store(out_ptr, tl.sum(tl.load(parts_ptr + j, mask=j < num_parts, other=0.0)))


@triton.jit
def _histogram_kernel(x_ptr, counts_ptr, size, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = i < size
    tl.atomic_add(counts_ptr + tl.load(x_ptr + i, mask=inside, other=0), 1, mask=inside)


def copy(x, size=None, num_written=None):
    out = torch.empty_like(x)
    n = len(x)
    _copy_kernel[(3,)](x, out, n if size is None else size, n if num_written is None else num_written, TILE=TILE)
    return out


@pytest.fixture
def x():
    return torch.arange(40, dtype=torch.float32)


def test_a_sound_kernel_passes(x):
    with sanitized(keep_stores=True) as sanitizer:
        out = copy(x)
        sanitizer.assert_written_once(out)
    assert sanitizer.num_launches == 1, "the launch was not seen"
    assert out.tolist() == x.tolist(), "the copy is wrong"


def test_a_read_out_of_bounds_is_caught(x):
    pool = torch.cat([x, torch.zeros(20)])  # memory that can be read, but belongs to no argument
    with sanitized(), pytest.raises(SanitizerError, match=r"_copy_kernel, program \(2, 0, 0\): load .* x_ptr"):
        copy(pool[:40], size=48, num_written=40)
    assert copy(pool[:40], size=48, num_written=40).tolist() == x.tolist(), "plain interpretation lets it pass"


def test_a_write_out_of_bounds_is_caught(x):
    out = torch.zeros(60)
    with sanitized(), pytest.raises(SanitizerError, match="store of element 40 of out_ptr"):
        _copy_kernel[(3,)](x, out[:40], 40, 41, TILE=TILE)
    assert out[40] == 0, "the store was carried out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_what_a_masked_load_leaves_open_is_garbage(dtype):
    """Plain interpretation makes it 0, which a GPU does not promise."""

    @triton.jit
    def sum_kernel(x_ptr, out_ptr, size, TILE: tl.constexpr):
        i = tl.arange(0, TILE)
        tl.store(out_ptr, tl.sum(tl.load(x_ptr + i, mask=i < size).to(tl.float32)))

    x, out = torch.ones(16).to(dtype), torch.zeros(1)
    for size, sums in ((16, True), (15, False)):
        with sanitized():
            sum_kernel[(1,)](x, out, size, TILE=TILE)
        assert (out.item() == size) == sums, f"{size} of 16 elements: {out.item()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64])
def test_what_nobody_has_filled_is_garbage(dtype):
    """Fresh memory often holds zeros, or the right numbers of the launch before."""
    with sanitized():
        fresh = [torch.empty(5, dtype=dtype), torch.empty_like(torch.zeros(5, dtype=dtype))]
    for x in fresh:
        assert (x.float().isnan() if dtype.is_floating_point else x == torch.iinfo(dtype).max).all(), f"holds {x}"
    assert not torch.are_deterministic_algorithms_enabled(), "the setting outlives its use"


def test_two_programs_that_write_one_element_are_caught(x):
    out = torch.zeros(60)
    with (
        sanitized(),
        pytest.raises(SanitizerError, match="writes what program 0 wrote in out_ptr"),
    ):
        _shifted_kernel[(3,)](x, out, 40, -1, TILE=TILE)
    with sanitized():
        _shifted_kernel[(3,)](x, out, 40, 1, TILE=TILE)


def test_a_program_that_writes_what_another_read_is_caught(x):
    """In the interpreter's order the result is even right: each program reads before its neighbour writes."""
    with sanitized(), pytest.raises(SanitizerError, match=r"program \(1, 0, 0\) writes what program 0 read in x_ptr"):
        _neighbour_kernel[(3,)](x, 40, TILE=TILE)


def test_a_program_that_reads_what_another_wrote_is_caught(x):
    parts, count, out = torch.zeros(3), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with sanitized(), pytest.raises(SanitizerError, match="reads what program 0 wrote in parts_ptr"):
        _last_sums_kernel[(3,)](x, parts, count, out, 40, 3, SEM=tl.constexpr("relaxed"), TILE=TILE)


def test_atomics_order_what_they_release_and_acquire(x):
    parts, count, out = torch.zeros(3), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with sanitized():
        _last_sums_kernel[(3,)](x, parts, count, out, 40, 3, SEM=tl.constexpr("acq_rel"), TILE=TILE)
    assert out.item() == x.sum().item(), "the sum is wrong"


def test_atomics_may_share_an_element():
    ids, counts = torch.arange(40, dtype=torch.int32) % 3, torch.zeros(3, dtype=torch.int32)
    with sanitized():
        _histogram_kernel[(3,)](ids, counts, 40, TILE=TILE)
    assert counts.tolist() == [14, 13, 13], "the counts are wrong"


def test_an_element_that_is_not_written_is_caught(x):
    with sanitized(keep_stores=True) as sanitizer:
        out = copy(x, num_written=39)
        with pytest.raises(SanitizerError, match=r"1 of 40 elements never written, the first at \(39,\)"):
            sanitizer.assert_written_once(out)


def test_an_element_that_is_written_twice_is_caught(x):
    out = torch.empty_like(x)
    with sanitized(keep_stores=True) as sanitizer:
        for _ in range(2):
            _copy_kernel[(3,)](x, out, 40, 40, TILE=TILE)
        with pytest.raises(SanitizerError, match="40 of 40 elements written more than once"):
            sanitizer.assert_written_once(out)


def test_launches_do_not_race_with_each_other(x):
    with sanitized():
        copy(copy(x))


def test_the_hooks_are_gone_afterwards(x):
    with sanitized() as sanitizer:
        pass
    copy(x)
    assert sanitizer.num_launches == 0, "a launch was watched outside"


def test_ops_write_each_element_of_their_result_once():
    rows = torch.arange(3)
    with sanitized(keep_stores=True) as sanitizer:
        gumbel = fast.random_gumbel(rows, rows, rows, purpose=0, num_draws=77)
        sanitizer.assert_written_once(gumbel)
