"""Philox: the published vectors, the layout of the counters, and the laws of the draws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from reference.numerics.philox import gumbel_at
from twofold.conformance.properties import numerics as properties
from twofold.conformance.strategies import numerics as inputs

every_draw = pytest.mark.parametrize("op", ["random_uniform", "random_gumbel", "random_normal"])

# From Random123's known-answer tests (`kat_vectors`, "philox4x32 10"): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def test_gives_the_published_answers(backend):
    counter, key, expected = (
        np.array([[int(word, 16) for word in row.split()] for row in column], np.uint32)
        for column in zip(*KNOWN_ANSWERS)
    )
    assert properties.call(backend, "philox_4x32", counter, key).tolist() == expected.tolist(), "not Philox 4x32-10"


@given(case=inputs.counters())
def test_is_the_cipher_of_the_paper(backend, case):
    properties.philox_is_philox(backend, *case)


@given(named=inputs.draws())
def test_uniform_words_are_the_counters(backend, named):
    properties.uniform_words_are_the_counters(backend, named)


@given(named=inputs.draws())
def test_gumbel_is_its_formula(backend, named):
    properties.gumbel_is_its_formula(backend, named)


@given(named=inputs.draws())
def test_normal_is_its_formula(backend, named):
    properties.normal_is_its_formula(backend, named)


@every_draw
@given(named=inputs.draws(), fewer=st.integers(0, 131))
def test_draws_do_not_depend_on_company(backend, op, named, fewer):
    properties.draws_do_not_depend_on_company(backend, op, named, fewer)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_purposes_never_collide(backend, seed):
    properties.purposes_never_collide(backend, seed, num_positions=40, num_samples=4)


LAWS = {  # distribution function, mean, variance
    "random_uniform": (lambda x: x, 1 / 2, 1 / 12),
    "random_gumbel": (lambda x: np.exp(-np.exp(-x)), np.euler_gamma, np.pi**2 / 6),
    "random_normal": (lambda x: (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2, 0.0, 1.0),
}


@every_draw
@pytest.mark.parametrize("varied", ["seeds", "positions", "sample_indices"])
def test_has_the_law(backend, op, varied):
    """Whichever of seed, position and sample index counts up from row to row, the numbers look independent."""
    rows, still = np.arange(300), np.full(300, 7)
    of = {name: rows if name == varied else still for name in ("seeds", "positions", "sample_indices")}
    named = inputs.Draws(**of, purpose=0, num_draws=100)
    properties.has_the_law(backend, op, named, *LAWS[op])


@given(named=inputs.draws().filter(lambda named: len(named.seeds) > 0 and named.num_draws > 0), data=st.data())
def test_gumbel_at_some_columns_is_those_columns(named, data):
    """Random access: asking for some columns alone, few or many, gives the bits of the whole row."""
    row = properties.draw_numbers(reference, "random_gumbel", named.rows([0]))[0]
    columns = np.array(sorted(data.draw(st.sets(st.integers(0, named.num_draws - 1)), label="columns")), np.int64)
    where = (int(named.seeds[0]), int(named.positions[0]), int(named.sample_indices[0]))
    got = gumbel_at(columns, *where, purpose=named.purpose)
    assert properties.same_bits(got, row[columns]), f"gumbel_at {columns}"


@every_draw
def test_refuses_what_names_no_draw(backend, op):
    rows, float_rows, one = np.arange(2), np.ones(2), np.arange(1)
    good = {"purpose": 0, "num_draws": 3}
    properties.refuses(backend, op, "seeds", rows.astype(np.int32), rows, rows, **good)
    properties.refuses(backend, op, "seeds", rows[None], rows, rows, **good)
    properties.refuses(backend, op, "positions", rows, float_rows, rows, **good)
    properties.refuses(backend, op, "positions", rows, one, rows, **good)
    properties.refuses(backend, op, "positions", rows, rows - 1, rows, **good)
    properties.refuses(backend, op, "sample_indices", rows, rows, rows * 2**32, **good)
    properties.refuses(backend, op, "sample_indices", rows, rows, one, **good)
    properties.refuses(backend, op, "purpose", rows, rows, rows, purpose=4, num_draws=3)
    properties.refuses(backend, op, "num_draws", rows, rows, rows, purpose=0, num_draws=-1)


def test_philox_refuses_other_words(backend):
    counter, key = np.zeros((2, 4), np.uint32), np.zeros((2, 2), np.uint32)
    properties.refuses(backend, "philox_4x32", "counter", counter[:, :3], key)
    properties.refuses(backend, "philox_4x32", "counter", counter.astype(np.int64), key)
    properties.refuses(backend, "philox_4x32", "key", counter, key[:1])
    properties.refuses(backend, "philox_4x32", "key", counter, key.astype(np.int32))
