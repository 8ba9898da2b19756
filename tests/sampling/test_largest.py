"""The largest logit of each row, by which the runner knows whether the row is sound."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast
from fast._triton import platform
from fast.sampling import _largest
from fast.sampling._largest import largest

VALUES = [0.0, 1.5, -3.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]


@given(data=st.data())
def test_says_whether_a_row_is_sound(data):
    """Wherever in the row what is unsound stands, and whatever the layout."""
    num_rows, num_columns = data.draw(st.integers(0, 4), "rows"), data.draw(st.integers(1, 40), "columns")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    values = data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=5), "values")
    seed, turned = data.draw(st.integers(0, 99), "seed"), data.draw(st.booleans(), "turned")
    rows = np.random.default_rng(seed).choice(values, (num_rows, num_columns)).astype(np.float32)
    logits = fast.from_host(rows).to(dtype)
    logits = logits.T.contiguous().T if turned else logits
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_largest, "MOST_COLUMNS", 16)
        found = fast.to_host(largest(logits))
        patched.setattr(platform, "INTERPRETING", False)  # then no kernel runs on a CPU
        elsewhere = largest(logits.cpu())
    assert elsewhere.dtype == torch.float32
    assert np.array_equal(fast.to_host(elsewhere), found)
    as_seen = fast.to_host(logits.float())
    expected = np.where(np.isnan(as_seen), np.inf, as_seen).max(axis=1, initial=-np.inf)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected), f"{found}, expected {expected}"
