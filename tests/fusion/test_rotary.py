"""Rotary position embedding: its tables, the rotation, and the op that writes to the cache."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import reference
from reference.fusion.rotary import rotary_tables
from twofold.conformance.properties import fusion as properties
from twofold.conformance.strategies.fusion import rotary_calls

turns = rotary_calls("rotary")


@given(call=rotary_calls())
def test_matches_the_oracle(backend, call):
    properties.matches_the_oracle(backend, call)


@settings(max_examples=200)
@given(rotary_calls("rotary_write_kv"))
def test_fused_is_its_parts(call):
    properties.fused_is_its_parts(reference, call)


@given(call=rotary_calls())
def test_writes_only_where_it_says(backend, call):
    properties.writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


@settings(max_examples=200)
@given(call=turns)
def test_rotation_keeps_lengths(backend, call):
    properties.rotation_keeps_lengths(backend, call)


@settings(max_examples=200)
@given(call=turns.filter(lambda call: call.arrays["q"].shape[1] == call.arrays["k"].shape[1]), shift=st.integers(0, 99))
def test_scores_depend_on_distance(backend, call, shift):
    properties.scores_depend_on_distance(backend, call, shift)


# ---- the tables -------------------------------------------------------------------------------------------------

factors = st.sampled_from([0.5, 1.0, 1.5, 4.0, 32.0])
originals = st.sampled_from([16, 2048, 8192])
linear = st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factors})
llama3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "factor": factors,
        "low_freq_factor": st.sampled_from([0.5, 1.0]),
        "high_freq_factor": st.sampled_from([4.0, 9.0]),
        "original_max_position_embeddings": originals,
    }
)
yarn = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": factors, "original_max_position_embeddings": originals},
    optional={
        "beta_fast": st.sampled_from([2.0, 16.0, 32.0]),
        "beta_slow": st.sampled_from([1.0, 2.0]),
        "truncate": st.booleans(),
        "attention_factor": st.sampled_from([0.8, 1.3]),
        "mscale": st.sampled_from([0.7, 1.0]),
        "mscale_all_dim": st.sampled_from([0.5, 1.0]),
    },
)


EDGE = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False}


@example(scaling=EDGE | {"original_max_position_embeddings": 2048}, base=10000.0, head_dim=64)
@given(
    scaling=st.none() | linear | llama3 | yarn,
    base=st.sampled_from([100.0, 10000.0, 500000.0]),
    head_dim=st.sampled_from([2, 8, 64, 96]),
)
def test_tables_are_those_of_transformers(scaling, base, head_dim):
    """Frequencies and magnitude of every scaling agree with transformers' to float32."""
    parameters = {"rope_theta": base, "rope_type": "default"} | (scaling or {})
    config = LlamaConfig(head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1, rope_parameters=parameters)
    make = ROPE_INIT_FUNCTIONS.get(parameters["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    frequencies, magnitude = make(config)
    cos, sin = rotary_tables(head_dim, 3, base=base, scaling=scaling)
    angles = np.arange(3)[:, None] * frequencies.numpy().astype(np.float64)
    # transformers has its frequencies in float32: theirs is the error, a few roundings of an angle of at most 2
    np.testing.assert_allclose(cos, magnitude * np.cos(angles), rtol=0, atol=4e-6, err_msg="cos")
    np.testing.assert_allclose(sin, magnitude * np.sin(angles), rtol=0, atol=4e-6, err_msg="sin")


def test_half_split_rotation_is_that_of_transformers():
    """The pairs are i and i + half, turned counter-clockwise: not an op of our own making."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rng, positions = np.random.default_rng(0), np.array([0, 3, 200, 17])
    q, k = rng.standard_normal((4, 6, 16), np.float32), rng.standard_normal((4, 2, 16), np.float32)
    cos, sin = rotary_tables(16, 256, base=10000.0)
    whole_cos, whole_sin = (torch.from_numpy(np.tile(table[positions], 2))[None] for table in (cos, sin))
    heads_first = [torch.from_numpy(x.transpose(1, 0, 2))[None] for x in (q, k)]
    expected = apply_rotary_pos_emb(*heads_first, whole_cos, whole_sin)
    for got, theirs in zip(reference.rotary(q, k, cos, sin, positions), expected, strict=True):
        np.testing.assert_allclose(got, theirs[0].numpy().transpose(1, 0, 2), rtol=1e-6, atol=1e-6)


@settings(max_examples=200)
@given(rotary_calls("rotary"))
def test_interleaved_is_half_split_of_reordered_features(call):
    """The two layouts differ in where a pair's numbers lie, in nothing else."""
    width = 2 * call.arrays["cos"].shape[1]
    order = np.arange(call.arrays["q"].shape[2])
    order[:width] = np.arange(width).reshape(-1, 2).T.ravel()  # 0 2 4 ... 1 3 5 ...
    reordered = call.with_arrays(q=call.arrays["q"][..., order], k=call.arrays["k"][..., order])
    call.options["interleaved"], reordered.options = True, {"interleaved": False}
    got, expected = properties.run(reference, call), properties.run(reference, reordered)
    for name in got:
        assert np.array_equal(got[name][..., order], expected[name]), name


@pytest.mark.parametrize(
    ("message", "scaling"),
    [
        ("default, linear, llama3, yarn, got 'dynamic'", {"rope_type": "dynamic", "factor": 2.0}),
        ("default, linear, llama3, yarn, got 'longrope'", {"type": "longrope"}),
        (r"\['factor'\]: expected a positive number, got None", {"rope_type": "linear"}),
        (r"\['factor'\]: expected a positive number, got 0", {"rope_type": "linear", "factor": 0}),
        (r"\['factor'\]: expected a positive number, got inf", {"rope_type": "linear", "factor": math.inf}),
        (r"\['factor'\]: expected a positive number, got '2'", {"rope_type": "linear", "factor": "2"}),
        (r"\['original_max_position_embeddings'\]", {"rope_type": "yarn", "factor": 2.0}),
        (
            r"\['beta_fast'\]",
            {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8, "beta_fast": -1},
        ),
        (
            r"\['low_freq_factor'\]: expected a number below",
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
        ),
    ],
)
def test_a_scaling_that_makes_no_sense_is_named(message, scaling):
    with pytest.raises(ValueError, match=message):
        rotary_tables(8, 4, base=10000.0, scaling=scaling)


@pytest.mark.parametrize(("argument", "bad"), [("head_dim", 7), ("head_dim", 0), ("base", 1.0), ("base", math.nan)])
def test_tables_of_nothing_are_refused(argument, bad):
    with pytest.raises(ValueError, match=f"rotary_tables: {argument}"):
        rotary_tables(**{"head_dim": 8, "max_positions": 4, "base": 100.0} | {argument: bad})


HEADS = np.ones((2, 3, 4), np.float32)
TABLE = np.ones((5, 2), np.float32)
GOOD = {"q": HEADS, "k": HEADS, "cos": TABLE, "sin": TABLE, "positions": np.array([0, 4])}


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("q", HEADS[0]),
        ("k", HEADS[:1]),
        ("k", HEADS[..., :2]),
        ("k", HEADS.astype(np.float16)),
        ("q", HEADS.astype(np.int8)),
        ("sin", TABLE[:4]),
        ("cos", np.ones((5, 3), np.float32)),
        ("positions", np.array([0, 5])),
        ("positions", np.array([-1, 0])),
    ],
)
def test_the_door_says_what_is_wrong(argument, bad):
    arguments = GOOD | {argument: bad}
    if argument == "cos":
        arguments["sin"] = bad
    with pytest.raises(ValueError, match=f"rotary: {argument}"):
        reference.rotary(**arguments)
