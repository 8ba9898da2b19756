"""Prompt look-up drafts what the slow search finds."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings

from twofold.conformance.properties import sampling as properties
from twofold.conformance.properties.numerics import refuses
from twofold.conformance.strategies import sampling as inputs


@given(case=inputs.histories())
@settings(max_examples=200)
def test_is_the_obvious_search(backend, case):
    history, lengths, options = case
    properties.lookup_is_the_obvious_search(backend, history, lengths, **options)


@pytest.mark.parametrize(("min_ngram", "max_ngram"), [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4)])
def test_every_short_history(backend, min_ngram, max_ngram):
    """All histories of two tokens, up to six of them long."""
    rows = [row for length in range(7) for row in product((0, 1), repeat=length)]
    history = np.full((len(rows), 6), -7, np.int32)
    for i, row in enumerate(rows):
        history[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    options = {"max_ngram": max_ngram, "min_ngram": min_ngram, "num_draft": 4}
    properties.lookup_is_the_obvious_search(backend, history, lengths, **options)


def test_refuses_bad_histories(backend):
    history, lengths = np.zeros((2, 5), np.int32), np.array([5, 0], np.int32)
    good = {"max_ngram": 3, "num_draft": 2}
    refuses(backend, "lookup", "history", history[0], lengths, **good)
    refuses(backend, "lookup", "history", history.astype(np.int64), lengths, **good)
    for bad in (lengths + 1, lengths - 1, lengths[:1], lengths.astype(np.int64)):
        refuses(backend, "lookup", "history_lens", history, bad, **good)
    refuses(backend, "lookup", "min_ngram", history, lengths, min_ngram=0, **good)
    refuses(backend, "lookup", "min_ngram", history, lengths, min_ngram=4, **good)
    refuses(backend, "lookup", "num_draft", history, lengths, max_ngram=3, num_draft=-1)
