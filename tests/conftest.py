"""Hypothesis profiles: `ci` repeats the same examples on every run; `explore` looks for new ones and remembers them."""

import os

# One thread for each of pytest's processes (`-n logical` starts one a core); before anything imports NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import reference  # noqa: F401  first: pytest, importing reference/linear/*.py for doctests, would put it over the op

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, print_blob=True, **_common)
settings.register_profile("explore", max_examples=500, print_blob=True, **_common)
settings.load_profile(os.environ.get("TWOFOLD_PROFILE", "ci"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF, fetched once into the user's cache."""
    from twofold.checkpoints import fetch_default_model

    return fetch_default_model()
