"""Programmatic dependent launch: a kernel gets onto the GPU while the one before it is still ending.

What a chain of small kernels spends between two of them, then, is not the launch but the wait for memory. A kernel
launched so may read nothing that an earlier one wrote, and write nothing at all, before ``wait_for_predecessor``.
Lengths and block tables may be read before: no kernel here writes any, and one that lets nobody come early has ended.
They are then loaded past the L1 cache, which may hold what was there in an earlier step.
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
def wait_for_predecessor(OVERLAP: tl.constexpr, EARLY: tl.constexpr = True):
    """Until the kernels before this one have ended and what they wrote is seen; ``EARLY`` lets the next one come now.

    The next kernel's programs take whatever room there is: where a processor holds several programs, one gets three of
    them and another a single one. A kernel that streams a weight is a third slower for that (measured: 4-bit weights,
    few tokens) and calls ``let_successor_come`` when its loop is done. Small kernels gain more by an early successor.
    """
    if OVERLAP:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_successor_come(OVERLAP: tl.constexpr):
    """The next kernel gets onto the GPU as soon as all programs of this one have come here, or have ended."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
