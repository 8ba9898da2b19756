"""What a backend says of itself, beside having the interface's names."""

from typing import Any

from hypothesis import assume

FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")


def float_dtypes(backend: Any) -> tuple[str, ...]:
    """The dtypes of activations that a backend computes with: its ``FLOAT_DTYPES``; all of them if it has none."""
    return tuple(getattr(backend, "FLOAT_DTYPES", FLOAT_DTYPES))


def assume_supported(backend: Any, *dtypes: Any) -> None:
    """In a property: discard the example if it is about floats that the backend does not compute with."""
    names = {str(getattr(dtype, "name", dtype)) for dtype in dtypes}
    if (names & set(FLOAT_DTYPES)) - set(float_dtypes(backend)):
        assume(False)  # only then: outside a property a word of Hypothesis is a warning


def is_interpreted(backend: Any) -> bool:
    """Whether the backend's kernels run in Triton's interpreter, which takes milliseconds for what takes a GPU none."""
    return bool(getattr(backend, "INTERPRETING", False))
