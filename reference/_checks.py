"""The checks at every op's door: one clear sentence, naming the op, the argument, what was expected and what came."""

from typing import Any

import ml_dtypes
import numpy as np

_ML_FLOATS = {
    np.dtype(t) for t in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3)
}


def require(condition: Any, op: str, argument: str, expected: str, got: Any) -> None:
    """Raise ``ValueError`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def require_shape(op: str, argument: str, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
    """``array`` must have ``shape``; None allows any length on that axis."""
    fits = array.ndim == len(shape)
    for want, have in zip(shape, array.shape):  # a loop: this runs a thousand times in a step of a model
        if want is not None and want != have:
            fits = False
    if not fits:
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        require(False, op, argument, f"shape [{wanted}]", list(array.shape))


def require_float(op: str, argument: str, array: np.ndarray) -> None:
    """``array`` must hold floating point numbers, NumPy's or ml_dtypes'."""
    is_float = array.dtype.kind == "f" or array.dtype in _ML_FLOATS
    require(is_float, op, argument, "a floating dtype", array.dtype)


def require_out(op: str, out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """``out``, if given, must be able to take the result as it is."""
    if out is not None:
        require_shape(op, "out", out, shape)
        require(out.dtype == dtype, op, "out", f"dtype {dtype}", out.dtype)


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """float64 computes in float64; everything else in float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def deliver(result: np.ndarray, dtype: np.dtype, out: np.ndarray | None) -> np.ndarray:
    """``result`` in ``dtype``, written to ``out`` if there is one."""
    if out is None:
        return result.astype(dtype, copy=False)
    out[...] = result
    return out
