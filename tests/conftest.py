"""Backends and Hypothesis profiles.

A test that takes ``backend`` runs on every backend: the reference, plain torch, and `fast`, natively where there is a
GPU and in Triton's interpreter elsewhere. ``TWOFOLD_BACKENDS=fast`` leaves only some of them. What interpreted
kernels read, write and add up is watched (bounds, races, overflow), unless ``TWOFOLD_SANITIZE=0``.

`ci` repeats the same examples on every run; `explore` looks for new ones and remembers them; `judge` only asks whether
there is a failure, not which is the smallest (mutants are judged so).
"""

import contextlib
import os
import sys
from collections.abc import Iterator

# One thread for each of pytest's processes (`-n logical` starts one a core); before anything imports NumPy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TWOFOLD_CHECK", "1")  # look at values in device memory too

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports fast

import fast
import reference  # first: pytest, importing reference/linear/*.py for doctests, would put it over the op
from twofold.conformance import plain_torch
from twofold.conformance.backends import float_dtypes, is_interpreted
from twofold.conformance.sanitizer import sanitized

BACKENDS = {"reference": reference, "plain_torch": plain_torch, "fast": fast}
CHOSEN = os.environ.get("TWOFOLD_BACKENDS", ",".join(BACKENDS)).split(",")
SANITIZE = os.environ.get("TWOFOLD_SANITIZE", "1") == "1"

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, print_blob=True, **_common)
settings.register_profile(
    "explore", max_examples=int(os.environ.get("TWOFOLD_EXAMPLES", "500")), print_blob=True, **_common
)
settings.register_profile(
    "judge", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate], print_blob=False
)
settings.load_profile(os.environ.get("TWOFOLD_PROFILE", "ci"))

# The interpreter takes milliseconds for one program of a kernel, so there a property gets this many examples at most.
INTERPRETED_EXAMPLES = 25


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``backend``, and does not say which, takes all of them."""
    chosen_itself = any("backend" in str(mark.args[:1]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not chosen_itself:
        needs = {name for mark in metafunc.definition.iter_markers("needs") for name in mark.args}
        needs -= {"gpu", "interpreter"}
        able = [name for name in CHOSEN if needs <= set(float_dtypes(BACKENDS[name]))]
        metafunc.parametrize("backend", [BACKENDS[name] for name in able], ids=able)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What only a GPU can run, or only the interpreter, is left out on the other; and what no chosen backend can."""
    absent = "interpreter" if HAS_GPU else "gpu"
    out = [item for item in items if any(absent in mark.args for mark in item.iter_markers("needs"))]
    out += [item for item in items if "NOTSET" in item.name]  # so pytest names a test of no backends
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fewer examples where a kernel is interpreted. (Hypothesis keeps a test's settings on its function.)"""
    test, name = getattr(item, "obj", None), "_hypothesis_internal_use_settings"
    asked = getattr(test, name, None)
    params = getattr(getattr(item, "callspec", None), "params", {})
    interpreted = is_interpreted(params.get("backend"))
    with contextlib.ExitStack() as around:
        if interpreted:
            around.enter_context(untraced())
        watched = SANITIZE and item.get_closest_marker("unwatched") is None
        if watched and is_interpreted(params.get("backend", fast)):  # a test that takes no backend may use `fast`
            around.enter_context(sanitized())
        if asked is None or not interpreted:
            return (yield)
        mark = item.get_closest_marker("interpreted")
        most = mark.args[0] if mark else INTERPRETED_EXAMPLES
        setattr(test, name, settings(asked, max_examples=min(asked.max_examples, most)))
        try:
            return (yield)
        finally:
            setattr(test, name, asked)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """No coverage of what runs here: the reference has tests of its own, and tracing slows interpreted kernels."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF, fetched once into the user's cache."""
    from twofold.checkpoints import fetch_default_model

    return fetch_default_model()
