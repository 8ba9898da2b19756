"""Token embedding."""

import numpy as np
import pytest
from hypothesis import given

import fast
import reference
from fast.fusion.embedding import TILE_D
from twofold.conformance.properties import fusion as properties
from twofold.conformance.strategies.fusion import Call, embedding_calls


@given(call=embedding_calls())
def test_matches_the_oracle(backend, call):
    properties.matches_the_oracle(backend, call)


@given(call=embedding_calls())
def test_writes_only_where_it_says(backend, call):
    properties.writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


@given(embedding_calls())
def test_a_row_is_the_row(call):
    """Token by token, the row of the table, bit for bit."""
    rows = properties.run(reference, call)["out"]
    for token, row in zip(call.arrays["token_ids"], rows, strict=True):
        assert row.tobytes() == call.arrays["weight"][token].tobytes(), f"token {token}"


@pytest.mark.parametrize("backend", [reference, fast])
@pytest.mark.parametrize("bad", [[-1], [5], [0.5]])
def test_ids_out_of_range_are_refused(backend, bad):
    arguments = {"token_ids": np.array(bad), "weight": np.ones((5, 2), np.float32)}
    properties.refuses(backend, "embedding", "token_ids", arguments)


def test_ids_out_of_range_read_nothing_where_nobody_looks(monkeypatch):
    """As an engine runs: `fast` does not look at ids, and gives zeros for those that have no row."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    ids, table = fast.from_host(np.array([1, -1, 5, 2**40])), fast.from_host(np.ones((5, 3), np.float32))
    assert fast.to_host(fast.embedding(ids, table)).tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_wide_rows_are_copied_in_parts():
    """More columns than one program takes."""
    width = TILE_D + 5
    call = Call(
        "embedding", {"token_ids": np.array([1, 0]), "weight": np.arange(2.0 * width, dtype="f").reshape(2, -1)}
    )
    properties.matches_the_oracle(fast, call)
