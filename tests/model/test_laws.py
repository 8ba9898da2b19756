"""The decoder is one function of a sequence, however it is cut, batched, placed and stored; on every backend."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from reference.linear.weight import WEIGHT_FORMATS
from reference.model.config import FAMILIES
from reference.model.decoder import Decoder, overlay
from twofold.conformance.properties import model as properties
from twofold.conformance.strategies.model import models, random_adapter, random_model, token_steps

pytestmark = pytest.mark.interpreted(3)

TOKENS = [5, 9, 96, 0, 33, 33, 7, 61, 2, 18, 44, 90, 12]


@settings(max_examples=200)
@given(models(), token_steps(), st.sampled_from([1, 4, 16]), st.integers(0, 99))
def test_steps_do_not_matter(backend, model, plan, block_size, seed):
    properties.steps_do_not_matter(backend, model, *plan, block_size=block_size, seed=seed)


@given(models(), token_steps())
def test_only_the_rows_asked_for(backend, model, plan):
    properties.only_the_rows_asked_for(backend, model, *plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_interleaved_is_half_split_of_reordered_rows(backend, family):
    properties.interleaved_is_half_split_of_reordered_rows(backend, random_model(family, seed=3), TOKENS)


@pytest.mark.parametrize("format", [name for name, format in WEIGHT_FORMATS.items() if "a8" not in name])
def test_rounded_weights_are_their_values(backend, format):
    """Every format whose activations stay as they are."""
    model = random_model("qwen2", seed=4, hidden_size=64, intermediate_size=128, num_heads=8)
    properties.rounded_weights_are_their_values(backend, model, format, TOKENS)


@pytest.mark.parametrize(
    ("format", "op", "codes"), [("w8a8", "linear_int8_int8", "int8"), ("fp8a8", "linear_fp8_fp8", "float8_e4m3fn")]
)
def test_rounded_activations_are_their_values(format, op, codes):
    """Formats that round activations per token give what a float layer makes of the rounded numbers."""

    def by_values(x, weight, weight_scale, bias=None, *, residual=None, out=None):
        rounded, scale = reference.quantize_rows(x, format=codes)
        values, matrix = (a.astype(np.float32) * s[:, None] for a, s in ((rounded, scale), (weight, weight_scale)))
        if residual is None:
            return reference.linear(values, matrix, bias, out=out)
        return reference.linear_add(values, matrix, residual, bias, out=out)

    model = random_model("qwen2", seed=4, hidden_size=64, num_heads=8)
    backends = (reference, overlay(SimpleNamespace(**{op: by_values}), reference))
    got, expected = (
        properties.paged_logits(Decoder(*model, backend=backend, weight_format=format), [TOKENS], [[13]])
        for backend in backends
    )
    properties.assert_same_logits(got, expected, format)
    floats = properties.paged_logits(Decoder(*model, backend=reference), [TOKENS], [[13]])
    assert properties.relative_error(got[0], floats[0]) > 1e-3, f"{format} was not used"


@pytest.mark.parametrize("kv_format", ["int8", "fp8", "int4"])
def test_chunked_is_whole_in_a_quantized_cache(backend, kv_format):
    """A chunk's own keys are read back from the cache like those before it, so cuts do not show."""
    decoder = Decoder(*random_model("qwen3", seed=7, head_dim=16), backend=backend)
    got, expected = (
        properties.paged_logits(decoder, [TOKENS, TOKENS[4:]], steps, kv_format=kv_format, block_size=8)
        for steps in ([[5, 2], [7, 0], [1, 7]], [[13, 9]])
    )
    properties.assert_same_logits(got, expected, kv_format)
    floats = properties.paged_logits(decoder, [TOKENS], [[13]])
    assert properties.relative_error(got[0], floats[0]) > 1e-4, f"{kv_format} was not used"


@pytest.mark.parametrize(
    "formats",
    [
        {"_proj.weight": "q4_1", "embed_tokens.weight": "q8_0"},
        {"v_proj.weight": "q8_0", "down_proj.weight": "int8", "_proj.weight": "q4_0", "lm_head.weight": "float32"},
        {"up_proj.weight": "bfloat16"},
        {"embed_tokens.weight": "bfloat16", "lm_head.weight": "q4_1"},
    ],
    ids=str,
)
def test_kept_weights_are_their_values(backend, formats):
    tied = "lm_head.weight" not in formats
    model = random_model("qwen2", seed=5, hidden_size=64, intermediate_size=64, num_heads=8, tie_word_embeddings=tied)
    properties.kept_weights_are_their_values(backend, model, formats, TOKENS)


@settings(max_examples=200)
@given(
    models(max_position_embeddings=64),
    token_steps(),
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=3),
    st.data(),
)
def test_adapters_are_merged_weights(backend, model, plan, kinds, data):
    """Ranks, scalings and targets differ between the adapters of one batch."""
    adapters = [random_adapter(model[0], rank, seed=i, use_rslora=rs) for i, (rank, rs) in enumerate(kinds)]
    sequences, steps = plan
    adapter_of = [data.draw(st.integers(-1, len(kinds) - 1), label="adapter") for _ in sequences]
    properties.adapters_are_merged_weights(backend, model, adapters, sequences, adapter_of, steps)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_a_matter_of_storage(backend, dtype):
    """In 16 bits the logits are those of float32, as far as 16 bits reach: the model's weights are rounded alike for
    both, so what differs is activations, rounded about ten times a layer."""
    config, tensors = random_model("qwen3", seed=6)
    rounded = {name: reference.round_to(array, dtype) for name, array in tensors.items()}
    expected = properties.paged_logits(Decoder(config, rounded, backend=backend), [TOKENS], [[13]])
    decoder = Decoder(config, tensors, backend=backend, dtype=dtype)
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    got = properties.paged_logits(decoder, [TOKENS], [[7], [6]])
    properties.assert_same_logits(got, expected, dtype, tolerance=10 * config.num_layers * unit)
    assert properties.relative_error(got[0], expected[0]) > unit / 100, f"{dtype} was not used"
