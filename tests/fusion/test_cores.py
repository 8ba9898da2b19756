"""Rows done in tiles, on every core, are the rows done one by one."""

import os
import threading

import numpy as np
import pytest

import reference
from reference import _cores
from reference._cores import num_cores, on_every_core, row_tiles


def test_swiglu_of_many_rows_is_that_of_each():
    """Bit for bit, also into rows that lie apart, and in 16 bits."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16):
        gate_up = rng.standard_normal((301, 2000)).astype(dtype)
        out = np.full((301, 1005), np.nan, dtype)[:, :1000]
        assert len(row_tiles(301, 1000)) > 2
        assert reference.swiglu(gate_up, out=out) is out
        for row, alone in zip(out, gate_up):
            assert np.array_equal(row, reference.swiglu(alone[None])[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_many_tokens_is_that_of_each(interleaved):
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((300, 10, 70), np.float32), rng.standard_normal((300, 5, 70), np.float32)
    cos, sin = reference.fusion.rotary.rotary_tables(64, 300, base=100.0)
    positions = rng.permutation(300)
    assert len(row_tiles(300, 700)) > 2
    whole = reference.rotary(q, k, cos, sin, positions, interleaved=interleaved)
    for t in range(300):
        one = slice(t, t + 1)
        alone = reference.rotary(q[one], k[one], cos, sin, positions[one], interleaved=interleaved)
        for got, expected in zip(whole, alone):
            assert np.array_equal(got[one], expected), f"token {t}"


def test_tiles_are_all_rows_once():
    for num_rows in (0, 1, 7, 1000):
        for row_size in (0, 1, 300, 10**7):
            rows = [i for tile in row_tiles(num_rows, row_size) for i in range(num_rows)[tile]]
            assert rows == list(range(num_rows)), (num_rows, row_size)


def test_every_item_is_done_once_and_errors_come_back(monkeypatch):
    """On three cores, whatever this machine has."""
    monkeypatch.setattr(_cores, "num_cores", lambda: 3)
    monkeypatch.setattr(_cores, "_pools", [])
    done, threads = [], set()
    everyone = threading.Barrier(3, timeout=30)

    def work(item):
        if item < 3:
            everyone.wait()  # three must be at work at once
        done.append(item)
        threads.add(threading.get_ident())

    on_every_core(work, range(100))
    assert sorted(done) == list(range(100))
    assert len(threads) == 3
    with pytest.raises(ZeroDivisionError):
        on_every_core(lambda item: 1 / item, [1, 2, 0, 3])


def test_as_many_cores_as_blas_takes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for asked, cores in (("2", 2), ("9", 4), ("", 4), ("0", 4), ("many", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert num_cores() == cores, asked
