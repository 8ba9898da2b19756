"""Programmatic dependent launch: a kernel gets onto the GPU while the one before it is still ending.

What a chain of small kernels spends between two of them, then, is not the launch but the wait for memory. A kernel
launched so may read nothing that an earlier one wrote, and write nothing at all, before ``wait_for_predecessor``.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from fast._triton.platform import COMPILE_ONLY, INTERPRETING, device_properties


def overlapped(array: torch.Tensor) -> dict[str, Any]:
    """Options for the launch of a kernel with a constexpr ``OVERLAP`` on the device of ``array``."""
    return _options(array.device.index)


@cache
def _options(index: int | None) -> dict[str, Any]:
    able = not INTERPRETING and (COMPILE_ONLY or device_properties(index).major >= 9)
    return {"OVERLAP": True, "launch_pdl": True} if able else {"OVERLAP": False}


@triton.jit
def wait_for_predecessor(OVERLAP: tl.constexpr):
    """Until the kernels before this one have ended and what they wrote is seen; lets the next one begin to wait."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
