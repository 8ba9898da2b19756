"""Dense attention: the oracle against what nobody here wrote, and every backend against the oracle."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from torch.nn.attention.bias import causal_lower_right

from twofold.conformance.properties import attention as properties
from twofold.conformance.strategies.attention import PackedCase, packed_cases
from twofold.conformance.tolerance import assert_within, attention_bound

one_sequence = packed_cases(min_seqs=1, max_seqs=1)


def as_torch(case: PackedCase) -> tuple[torch.Tensor, ...]:
    """The case's one sequence as PyTorch lays it out, [1, heads, tokens, head_dim], in float64."""
    s = case.sequences[0]
    return tuple(torch.from_numpy(x.astype(np.float64)).transpose(0, 1)[None] for x in (s.q, s.k, s.v))


def sdpa(case: PackedCase, mask=None) -> np.ndarray:
    out = F.scaled_dot_product_attention(*as_torch(case), attn_mask=mask, scale=case.scale, enable_gqa=True)
    return out[0].transpose(0, 1).numpy()


def assert_oracle(case: PackedCase, expected: np.ndarray, dtype: str = "float64") -> None:
    oracle = case.oracle
    bound = attention_bound(oracle.out, oracle.magnitude, oracle.score_magnitude, dtype)
    assert_within(expected, oracle.out, bound, "an implementation that is not ours, against the oracle")


def by_definition(case: PackedCase) -> torch.Tensor:
    """The mask, a key at a time, from what the words say."""
    num_queries, num_keys, window = len(case.sequences[0].q), len(case.sequences[0].k), case.sliding_window

    def sees(query: int, key: int) -> bool:
        before = query + num_keys - num_queries - key  # how many positions the key lies before the query
        return (before >= 0 or not case.causal) and (window is None or -window < before < window)

    rows = [[sees(query, key) for key in range(num_keys)] for query in range(num_queries)]
    return torch.tensor(rows, dtype=torch.bool).reshape(num_queries, num_keys)


@given(one_sequence)
def test_oracle_is_torch_causal(case):
    """Causal, bottom-right aligned, in every head ratio, the oracle is PyTorch's function."""
    s = case.sequences[0]
    assume(0 < len(s.q) <= len(s.k))
    case = replace(case, sinks=None, logit_cap=None, sliding_window=None, causal=True)
    assert_oracle(case, sdpa(case, causal_lower_right(len(s.q), len(s.k))))


@given(one_sequence)
def test_oracle_is_torch_with_any_mask(case):
    """Windowed or not, causal or not, the oracle is PyTorch's function under the mask the definition spells out."""
    case = replace(case, sinks=None, logit_cap=None)
    mask = by_definition(case)
    assume(mask.any())
    expected = sdpa(case, mask)
    expected[~mask.any(dim=1).numpy()] = 0  # a row without keys, on which versions of PyTorch disagree
    assert_oracle(case, expected)


@given(one_sequence)
def test_oracle_is_transformers_with_sinks(case):
    """With sinks the oracle is the attention of gpt-oss in `transformers`."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    sinks = np.linspace(-3, 3, case.num_heads) if case.sinks is None else case.sinks.astype(np.float64)
    case = replace(case, sinks=sinks, logit_cap=None)
    group = case.num_heads // case.num_kv_heads
    module = SimpleNamespace(num_key_value_groups=group, sinks=torch.from_numpy(sinks), training=False)
    bias = torch.where(by_definition(case), 0.0, -torch.inf).double()[None, None]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out, _ = eager_attention_forward(module, *as_torch(case), bias, scaling=scale)
    assert_oracle(case, out[0].numpy())


@given(one_sequence)
def test_oracle_is_transformers_with_a_cap(case):
    """With capped scores the oracle is the attention of Gemma 2 in `transformers` (whose softmax is in float32)."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    case = replace(case, sinks=None, logit_cap=case.logit_cap or 5.0)
    mask = by_definition(case)
    assume(mask.any(dim=1).all() and len(mask))
    module = SimpleNamespace(num_key_value_groups=case.num_heads // case.num_kv_heads, training=False)
    bias = torch.where(mask, 0.0, -torch.inf).double()[None, None]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out, _ = eager_attention_forward(module, *as_torch(case), bias, scaling=scale, softcap=case.logit_cap)
    assert_oracle(case, out[0].numpy(), "float32")


@given(case=packed_cases())
def test_matches_the_oracle(backend, case):
    """Every element is within the rule, over ragged lengths, head ratios, options, dtypes and strides."""
    properties.dense_matches_oracle(backend, case)


@pytest.mark.interpreted(6)
@given(case=one_sequence)
def test_arguments_are_unchanged(backend, case):
    """No argument is written to."""
    s = case.sequences[0]
    arguments = case.q(backend), backend.from_host(s.k), backend.from_host(s.v)
    options = case.options(backend) | {"causal": case.causal}
    properties.arguments_are_unchanged(backend, "dense_attention", arguments, options)


@pytest.mark.interpreted(6)
@given(case=one_sequence)
def test_out_is_honoured(backend, case):
    """The result goes to ``out``, all of it and nothing beside it."""
    properties.dense_honours_out(backend, case)


def test_refuses_bad_shapes(backend):
    """A wrong shape, dtype or option raises a ValueError that names the argument."""
    properties.refuses_bad_shapes(backend, "dense_attention")
