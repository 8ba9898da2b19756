"""The checks at every op's door: one clear sentence, naming the op, the argument, what was expected and what came."""

from typing import Any

import numpy as np


def require(condition: Any, op: str, argument: str, expected: str, got: Any) -> None:
    """Raise ``ValueError`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def require_shape(op: str, argument: str, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
    """``array`` must have ``shape``; None allows any length on that axis."""
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape))
    require(fits, op, argument, f"shape {tuple('*' if n is None else n for n in shape)}", array.shape)


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """float64 computes in float64; everything else in float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def deliver(result: np.ndarray, dtype: np.dtype, out: np.ndarray | None) -> np.ndarray:
    """``result`` in ``dtype``, written to ``out`` if there is one."""
    if out is None:
        return result.astype(dtype, copy=False)
    out[...] = result
    return out
