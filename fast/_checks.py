"""What every op asks of its tensors at the door.

Shapes, dtypes, devices and host scalars are always checked. Values in device memory are not: reading them on the host
would stall the GPU in every step. Kernels treat an id out of range like -1, so a wrong one is never an illegal access.
With ``TWOFOLD_CHECK=1`` (the tests set it) values are looked at too, and a wrong one raises ``ValueError``.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch

from fast._triton.platform import require_runnable
from reference._checks import require
from reference._checks import require_shape as _require_shape

__all__ = [
    "checking_values",
    "require",
    "require_added",
    "require_dtype",
    "require_float",
    "require_integers",
    "require_out",
    "require_range",
    "require_same_device",
    "require_shape",
    "require_values",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def require_shape(op: str, argument: str, array: torch.Tensor, shape: Sequence[int | None]) -> None:
    """``array`` must have ``shape``; None allows any length on that axis."""
    _require_shape(op, argument, array, tuple(shape))  # type: ignore[reportArgumentType]


def require_float(op: str, argument: str, array: torch.Tensor) -> None:
    """``array`` must hold float32, float16 or bfloat16, where a kernel can run."""
    require(array.dtype in FLOATS, op, argument, "float32, float16 or bfloat16", dtype_name(array.dtype))
    require_runnable(op, argument, array)


def require_added(op: str, argument: str, array: torch.Tensor | None, shape: tuple[int | None, ...]) -> None:
    """What is added to a result, if it is there: floating, and of this shape."""
    if array is not None:
        require_shape(op, argument, array, shape)
        require_float(op, argument, array)


def require_dtype(op: str, argument: str, array: torch.Tensor, *dtypes: torch.dtype) -> None:
    """``array`` must have one of these dtypes."""
    require(array.dtype in dtypes, op, argument, " or ".join(map(dtype_name, dtypes)), dtype_name(array.dtype))


def require_integers(op: str, argument: str, array: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """``array`` must hold int32 or int64 and have ``shape``."""
    require(array.dtype in INTEGERS, op, argument, "integers (int32 or int64)", dtype_name(array.dtype))
    require_shape(op, argument, array, shape)


def require_out(op: str, out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """``out``, if given, must be able to take the result as it is."""
    if out is not None:
        require_shape(op, "out", out, shape)
        require(out.dtype == dtype, op, "out", f"dtype {dtype_name(dtype)}", dtype_name(out.dtype))


def require_same_device(op: str, **arrays: torch.Tensor | None) -> None:
    """All the arrays given (None: left out) must be on the device of the first."""
    present = [(name, array) for name, array in arrays.items() if array is not None]
    for name, array in present[1:]:
        expected = f"the device of {present[0][0]}, {present[0][1].device}"
        require(array.device == present[0][1].device, op, name, expected, array.device)


def checking_values() -> bool:
    """Whether values in device memory are to be checked."""
    return os.environ.get("TWOFOLD_CHECK", "0") == "1"


def require_values(holds: torch.Tensor | bool, op: str, argument: str, expected: str, got: Any) -> None:
    """Raise ``ValueError`` unless ``holds``; call it only when ``checking_values()``: it waits for the device."""
    require(bool(holds), op, argument, expected, got)


def require_range(op: str, argument: str, array: torch.Tensor, low: int, high: int) -> None:
    """When checking: every element of ``array`` must be in ``low <= x < high``."""
    if checking_values() and array.numel():
        smallest, largest = (int(x) for x in torch.aminmax(array))
        require(low <= smallest and largest < high, op, argument, f"{low} to {high - 1}", (smallest, largest))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
