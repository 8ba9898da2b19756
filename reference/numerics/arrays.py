"""A backend's arrays: from and to the host, empty, take rows, bytes seen as numbers. All a structure needs to know."""

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from numpy import ndarray as Array


def from_host(array: np.ndarray, *, dtype: str | None = None, device: str | None = None) -> Shaped[Array, "*shape"]:
    """The backend's array holding a copy of (or, where it can, sharing) ``array``; ``dtype`` by name
    ("float32", "bfloat16", "float8_e4m3fn", "int8", ...)."""
    raise NotImplementedError


def to_host(x: Shaped[Array, "*shape"]) -> np.ndarray:
    raise NotImplementedError


def empty(shape: tuple[int, ...], *, dtype: str, device: str | None = None) -> Shaped[Array, "*shape"]:
    raise NotImplementedError


def take_rows(
    x: Shaped[Array, "num_rows *rest"],
    rows: Int[Array, " num_taken"],
    *,
    out: Shaped[Array, "num_taken *rest"] | None = None,
) -> Shaped[Array, "num_taken *rest"]:
    raise NotImplementedError


def bitcast(x: UInt8[Array, "num_rows num_bytes"], dtype: str) -> Shaped[Array, "num_rows num_values"]:
    """A view, never a copy: writing through it writes ``x``. Rows may be strided, bytes of a row lie together."""
    raise NotImplementedError
