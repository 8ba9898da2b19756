"""Fewer KV heads by averaging groups of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.model.config import FAMILIES
from reference.model.gqa_conversion import convert_to_gqa
from twofold.conformance.properties import model as properties
from twofold.conformance.strategies.model import random_model

heads = st.sampled_from([(8, 4), (8, 2), (8, 1), (4, 2), (6, 3), (2, 2)])


@pytest.mark.interpreted(3)
@given(family=st.sampled_from(FAMILIES), heads=heads, bias=st.booleans())
def test_alike_heads_pool_to_the_same_function(backend, family, heads, bias):
    model = random_model(family, num_heads=24, num_kv_heads=heads[0], head_dim=4, attention_bias=bias)
    properties.alike_heads_pool_to_the_same_function(backend, model, heads[1], [3, 1, 90, 90, 5, 12, 60])


@settings(max_examples=200)
@given(seed=st.integers(0, 2**16), heads=heads, dtype=st.sampled_from(["float32", "float16"]))
def test_each_new_head_is_the_mean_of_its_group(seed, heads, dtype):
    """Rows and biases, head by head; nothing else is touched, and dtypes stay."""
    config, tensors = random_model("qwen2", seed, num_heads=24, num_kv_heads=heads[0], head_dim=4, num_layers=1)
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    converted, pooled = convert_to_gqa(config, tensors, heads[1])
    assert converted == replace(config, num_kv_heads=heads[1])
    group = heads[0] // heads[1]
    for name, array in tensors.items():
        assert pooled[name].dtype == dtype
        if ".k_proj." not in name and ".v_proj." not in name:
            assert pooled[name] is array
            continue
        for g in range(heads[1]):
            rows = [array[4 * h : 4 * h + 4] for h in range(g * group, (g + 1) * group)]
            expected = np.mean(np.stack(rows).astype(np.float64), axis=0)
            np.testing.assert_allclose(
                pooled[name][4 * g : 4 * g + 4], expected, rtol=0, atol=4 * np.finfo(dtype).eps, err_msg=f"{name}, {g}"
            )


def test_what_does_not_divide_is_refused():
    config, tensors = random_model("llama", num_heads=4, num_kv_heads=4)
    for wrong in (3, 0, -1, 8):
        with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of 4"):
            convert_to_gqa(config, tensors, wrong)
    del tensors["model.layers.0.self_attn.v_proj.weight"]
    with pytest.raises(ValueError, match="v_proj"):
        convert_to_gqa(config, tensors, 2)
