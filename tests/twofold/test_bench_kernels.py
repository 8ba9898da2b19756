"""The decks of `twofold bench kernels`: complete, and each call one that a backend takes. Measuring needs a GPU."""

import math

import pytest
import torch

import fast
import reference
from fast._triton.platform import default_device
from twofold.bench.kernels import (
    Ceilings,
    Measured,
    _rows,
    _why,
    attention,
    fusion,
    geometric_means,
    linear,
    sampling,
    show,
)
from twofold.bench.kernels.rows import Row, Target, size
from twofold.bench.kernels.timing import MOST_SETS, num_sets
from twofold.conformance import plain_torch

ROWS = _rows(())

SMALL = [
    attention._prefill_row([5, 3], 4, 2, 16),
    attention._decode_row([40, 7, 16], 4, 2, None),
    attention._quantized_row(
        "int8", [40, 7], attention._int8_arrays, ("k_cache", "v_cache", "k_scale", "v_scale"), 1, 1
    ),
    attention._quantized_row("fp8", [40, 7], attention._fp8_arrays, ("k_cache", "v_cache", "k_scale", "v_scale"), 1, 1),
    attention._quantized_row(
        "int4", [40], attention._int4_arrays, ("k_cache", "v_cache", "k_scale", "k_zero", "v_scale", "v_zero"), 1, 1
    ),
    attention._kivi_row([200, 33, 1], 2, 1, 1),
    fusion._norm_row(3, 8),
    fusion._add_norm_row(3, 8),
    fusion._swiglu_row(3, 8),
    fusion._rotary_row(5, 4, 2, 8),
    fusion._copy_row(3, 64),
    fusion._embedding_row(3, 10, 8),
    linear._dense_row(2, 16, 8),
    linear._int4_row(2, 256, 8),
    linear._int8_row(2, 16, 8),
    linear._w8a8_row("int8", 2, 16, 8),
    linear._w8a8_row("fp8", 2, 16, 8),
    linear._sparse_row(2, 16, 8),
    linear._lora_row(4, 2, 2, 16),
    sampling._sample_row(2, 64),
]


@pytest.mark.parametrize("backend", [plain_torch, fast], ids=["plain_torch", "fast"])
@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.op)
def test_our_call_is_one_that_a_backend_takes(backend, row):
    """On a small deck, with buffers as the deck makes them: the result is finite, and bytes are counted."""
    with torch.device(default_device() if backend is fast else "cpu"):
        arrays = row.build()
        result = row.ours(backend, arrays)()
    for tensor in result if isinstance(result, tuple) else (result,):
        assert tensor is None or bool(torch.isfinite(tensor.float()).all()), f"{row.op}: {row.deck}"
    assert row.num_bytes(arrays) > 0
    assert row.flops >= 0


def test_the_issue_s_decks_are_there():
    ops = {row.op for row in ROWS}
    assert {op.removeprefix("invariant.") for op in ops} <= set(reference.__all__), "an op that is not in the interface"
    assert len({(row.op, row.deck) for row in ROWS}) == len(ROWS), "a deck twice"
    assert sum(row.deck.startswith("prefill") for row in ROWS) == 6
    assert sum(row.op == "paged_attention" and row.deck.startswith("decode") for row in ROWS) == 9
    assert sum(row.op == "linear" for row in ROWS) == 8 * 6


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op} {row.deck}")
def test_targets_are_over_peers_that_run(row):
    for target in row.targets:
        known = [name for name in target.over if name == "copy" or name in row.peers]
        assert known, f"{row.op} {row.deck}: none of {target.over} is measured"
        assert target.reach_for is None or target.reach_for >= target.at_least


def test_figures_are_ratios_of_one_run():
    targets = [Target(1.3, 2.0, ("slow", "fast")), Target(0.9, None, ("copy",)), Target(1.0, None, ("absent",))]
    row = Row("linear", "deck", lambda: None, lambda b, a: None, lambda a: 0, flops=4.0, targets=targets)
    ceilings = Ceilings(copy=10.0, matmul=100.0)
    found = Measured(row, seconds=2.0, num_bytes=19, peers={"slow": 9.0, "fast": 3.0}, failures={"absent": "not here"})
    assert [found.reached(target, ceilings) for target in targets] == [1.5, 0.95, None]
    assert found.as_json(ceilings)["of_matmul"] == 0.02
    failed = Measured(row, failures={"fast": "an error"})
    assert [failed.reached(target, ceilings) for target in targets] == [None] * 3
    means = geometric_means([found, Measured(row, seconds=1.0, num_bytes=1, peers={"fast": 6.0}), failed], ceilings)
    assert means["linear over slow / fast"] == pytest.approx(math.sqrt(1.5 * 6.0))


def test_buffers_are_cold():
    assert num_sets(10**9) == 1
    assert num_sets(10**8) == 3
    assert num_sets(1) == MOST_SETS
    assert size(torch.empty(3, dtype=torch.bfloat16), torch.empty(2)) == 14


def test_what_went_wrong_names_files_not_folders():
    """Results are kept for everybody, and say nothing of whose machine it was."""
    error = RuntimeError("at '/home/somebody/site/lib.cu:7' of 3/4: no room\nsecond line")
    assert _why(error) == "RuntimeError: at 'lib.cu:7' of 3/4: no room"


def test_the_page_has_every_row_once():
    """Whatever is measured stands in one of its tables, with what it is to reach."""
    ceilings = Ceilings(copy=3e12, matmul=7e14)
    rows = [
        Measured(row, seconds=1e-5, num_bytes=3_000_000, peers=dict.fromkeys(row.peers, 2e-05)).as_json(ceilings)
        for row in ROWS
    ]
    results = {"rows": rows, "measured": {"device": "a GPU", "date": "2026-01-02", "command": "twofold bench kernels"}}
    tables = (show.prefill, show.paged, show.codes, show.linear, show.quantized, show.others, show.invariant)
    lines = [line for table in tables for line in table(results)[2]]
    assert sorted(line[0].partition("`, ")[2] or line[0] for line in lines) == sorted(row.deck for row in ROWS)
    assert all(line[1] == "10" and line[4].count("<br>") == line[5].count("<br>") for line in lines)
    assert sum(bool(line[4]) for line in lines) == sum(any(row["targets"]) for row in rows)
