"""Token embedding."""

import numpy as np
import pytest
from hypothesis import given

import reference
from twofold.conformance.properties import fusion as properties
from twofold.conformance.strategies.fusion import embedding_calls


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


@pytest.mark.parametrize("bad", [[-1], [5], [0.5]])
def test_ids_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="embedding: token_ids"):
        reference.embedding(np.array(bad), np.ones((5, 2), np.float32))
