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

import fast
import reference
from fast.fusion._heads import choose_tile
from reference.fusion.rotary import rotary_tables
from twofold.conformance.properties import fusion as properties
from twofold.conformance.strategies.fusion import Call, rotary_calls

turns = rotary_calls("rotary")


each_op = pytest.mark.parametrize("op", ["rotary", "rotary_write_kv"])


@each_op
@given(data=st.data())
def test_matches_the_oracle(backend, op, data):
    properties.matches_the_oracle(backend, data.draw(rotary_calls(op)))


@settings(max_examples=200)
@given(rotary_calls("rotary_write_kv"))
def test_fused_is_its_parts(call):
    properties.fused_is_its_parts(reference, call)


@pytest.mark.interpreted(6)
@each_op
@given(data=st.data())
def test_writes_only_where_it_says(backend, op, data):
    call = data.draw(rotary_calls(op))
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


@pytest.mark.parametrize("backend", [reference, fast])
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
def test_the_door_says_what_is_wrong(backend, argument, bad):
    arguments = GOOD | {argument: bad}
    if argument == "cos":
        arguments["sin"] = bad
    properties.refuses(backend, "rotary", argument, arguments)


CACHE = np.ones((2, 3, 3, 4), np.float32)
GOOD_WRITE = GOOD | {"v": HEADS, "k_cache": CACHE, "v_cache": CACHE, "slot_mapping": np.array([0, 5])}


@pytest.mark.parametrize("backend", [fast])
@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("v", HEADS[:1]),
        ("v_cache", CACHE[:1]),
        ("k_cache", CACHE[..., :2]),
        ("slot_mapping", np.array([0])),
        ("slot_mapping", np.array([0.0, 1.0])),
        ("slot_mapping", np.array([0, 6])),
        ("slot_mapping", np.array([-2, 0])),
        ("slot_mapping", np.array([4, 4])),
        ("q_norm", np.ones(3, np.float32)),
        ("out", HEADS[:1]),
        ("out", HEADS.astype(np.float16)),
    ],
)
def test_the_door_of_the_write_says_what_is_wrong(backend, argument, bad):
    properties.refuses(backend, "rotary_write_kv", argument, GOOD_WRITE | {argument: bad})


# ---- how the kernels are cut, and what they do where nobody looks -----------------------------------------------


@given(call=rotary_calls())
def test_a_token_keeps_no_company(call):
    properties.rows_keep_no_company(fast, call)


@pytest.mark.parametrize(("num_heads", "head_dim", "num_rows"), [(40, 128, 16), (3, 600, 2), (2, 8, 256)])
def test_a_program_takes_some_heads_of_a_token_or_several_tokens(num_heads, head_dim, num_rows):
    assert choose_tile(head_dim)[0] == num_rows, "not what the case says"
    num_kv_heads = num_heads // 2 or 1
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, h, head_dim), np.float32) for h in (num_heads, num_kv_heads, num_kv_heads))
    cos, sin = rotary_tables(head_dim, 16, base=100.0)
    arrays = {"q": q, "k": k, "cos": cos, "sin": sin, "positions": np.array([15, 3])}
    properties.matches_the_oracle(fast, Call("rotary", arrays, {"interleaved": False}))
    caches = {f"{n}_cache": np.full((2, 2, num_kv_heads, head_dim), np.nan, np.float32) for n in "kv"}
    norms = {f"{n}_norm": rng.uniform(0.5, 1.5, head_dim).astype(np.float32) for n in "qk"}
    arrays = {"q": q, "k": k, "v": v} | arrays | caches | {"slot_mapping": np.array([3, 0])} | norms
    options = {"interleaved": True, "eps": 1e-6}
    properties.matches_the_oracle(fast, Call("rotary_write_kv", arrays, options, mutates=("k_cache", "v_cache")))


def test_slots_and_positions_out_of_range_touch_nothing(monkeypatch):
    """As an engine runs: a slot that does not exist is skipped like -1, a position without a row gives zeros."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    cos, sin = rotary_tables(4, 5, base=100.0)
    heads, caches = np.ones((4, 1, 4), np.float32), np.full((2, 2, 3, 1, 4), np.nan, np.float32)
    slots, positions = np.array([6, -2, 2**40, 4]), np.array([5, -1, 2**40, 0])
    placed = [fast.from_host(a) for a in (heads, heads, heads, cos, sin, positions, *caches, slots)]
    turned = fast.to_host(fast.rotary_write_kv(*placed))
    assert not turned[:3].any(), "positions without a row"
    np.testing.assert_array_equal(turned[3], heads[3], err_msg="position 0")
    for cache in placed[6:8]:
        written = ~np.isnan(fast.to_host(cache)).all(axis=(2, 3))
        assert written.ravel().tolist() == [False] * 4 + [True, False], "slots written"


def test_a_cache_of_another_dtype_saturates(backend):
    """What float16 cannot hold becomes its largest number, as in `write_kv`."""
    v, k = np.array([[[1e5, 2.0]], [[-1e5, np.inf]]], np.float32), np.array([[[1e5, 2.0]], [[3.0, -7e4]]], np.float32)
    cos, sin = rotary_tables(2, 1, base=100.0)
    caches = [np.zeros((1, 2, 1, 2), np.float16) for _ in "kv"]
    placed = [backend.from_host(a) for a in (k, k, v, cos, sin, np.zeros(2, np.int64), *caches, np.arange(2))]
    backend.rotary_write_kv(*placed)
    assert backend.to_host(placed[6]).reshape(2, 2).tolist() == [[65504, 2], [3, -65504]], "keys"
    assert backend.to_host(placed[7]).reshape(2, 2).tolist() == [[65504, 2], [-65504, 65504]], "values"


@pytest.mark.parametrize("interleaved", [False, True])
def test_numbers_may_lie_apart(interleaved):
    """Each array with other gaps between its numbers: nobody takes the stride of another. Some features do not turn."""
    rng = np.random.default_rng(0)
    cos, sin = rotary_tables(6, 9, base=100.0)
    heads = {"q": (3, 2, 10), "k": (3, 1, 10), "v": (3, 1, 10)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in heads.items()}
    arrays |= {"cos": cos, "sin": sin, "positions": np.array([8, 0, 5]), "slot_mapping": np.array([3, -1, 4])}
    arrays |= {f"{name}_cache": np.full((2, 3, 1, 10), np.nan, np.float32) for name in "kv"}
    arrays |= {f"{name}_norm": rng.uniform(0.5, 1.5, 10).astype(np.float32) for name in "qk"}
    results = []
    for gap in (0, 1):
        placed = {
            name: fast.from_host(np.repeat(array, 1 + gap * (1 + i), axis=-1))[..., :: 1 + gap * (1 + i)]
            for i, (name, array) in enumerate((arrays | {"out": np.zeros_like(arrays["q"])}).items())
        }
        fast.rotary_write_kv(**placed, interleaved=interleaved)
        results.append([fast.to_host(placed[name]) for name in ("out", "k_cache", "v_cache")])
    for dense, apart in zip(*results):  # numbers that lie apart are added up by other threads: not the same bits
        np.testing.assert_allclose(apart, dense, rtol=1e-6, atol=1e-6)
