"""Where kernels run: natively on a GPU, or one program after another in Triton's interpreter on a CPU.

Set ``TRITON_INTERPRET=1`` before `fast` is imported to have the interpreter: `triton.jit` looks when it decorates.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import triton
import triton.language as tl

from reference._checks import require

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRETED = tl.constexpr(INTERPRETING)  # for kernels: what only the interpreter gets wrong is mended under it

# Compiling for a GPU that is not here (kernels are inspected, never launched) needs tensors on the CPU to pass.
COMPILE_ONLY = os.environ.get("TWOFOLD_COMPILE_ONLY", "0") == "1"


def default_device() -> str:
    """Where ``from_host`` and ``empty`` put an array by default: the current GPU, or the CPU when interpreting."""
    return "cpu" if INTERPRETING or not torch.cuda.is_available() else "cuda"


def unavailable() -> str | None:
    """Why no kernel can run here, in one sentence; None where they can."""
    if INTERPRETING or COMPILE_ONLY or torch.cuda.is_available():
        return None
    return "there is no GPU (on a CPU, TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, very slowly)"


def runs_kernels(array: torch.Tensor) -> bool:
    """Whether kernels can run where this array is."""
    return array.device.type == "cuda" or INTERPRETING or COMPILE_ONLY


def require_runnable(op: str, argument: str, array: torch.Tensor) -> None:
    """Raise ``ValueError`` if no kernel can run where this array is."""
    where = "a tensor on a GPU (on a CPU, set TRITON_INTERPRET=1)"
    require(runs_kernels(array), op, argument, where, f"one on {array.device}")
    if array.is_cuda and array.dtype == torch.bfloat16:
        capable = device_properties(array.device.index).major >= 8
        require(capable, op, argument, "a GPU with bfloat16 (compute capability 8.0 or above)", _name(array.device))


@cache
def device_properties(index: int | None = None):
    """Of the GPU with this index (None: the current one): ``multi_processor_count``, ``L2_cache_size``, ``major``..."""
    return torch.cuda.get_device_properties(index)


def num_processors(array: torch.Tensor) -> int:
    """Streaming multiprocessors of the GPU the array is on; two in the interpreter, so that grids stay small there."""
    if COMPILE_ONLY:
        return 132
    return 2 if array.device.type != "cuda" else device_properties(array.device.index).multi_processor_count


_PORTABLE_ONLY: ContextVar[bool] = ContextVar("portable_only", default=False)


@contextmanager
def portable_kernels() -> Iterator[None]:
    """Within it the kernels of one generation of GPUs are not chosen: on a Hopper GPU too, one sees what others run."""
    token = _PORTABLE_ONLY.set(True)
    try:
        yield
    finally:
        _PORTABLE_ONLY.reset(token)


def is_hopper(array: torch.Tensor) -> bool:
    """Whether the array is on a GPU of the Hopper generation, whose own instructions a kernel may use."""
    if _PORTABLE_ONLY.get():
        return False
    return COMPILE_ONLY or (array.is_cuda and device_properties(array.device.index).major == 9)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


if INTERPRETING:
    from fast._triton.interpreter import quicken

    quicken()

cdiv = triton.cdiv
next_power_of_2 = triton.next_power_of_2
