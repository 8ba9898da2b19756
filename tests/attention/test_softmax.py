"""The helpers of the online softmax whose precision no attention shows."""

# pyright: reportCallIssue=false, reportArgumentType=false
import numpy as np
import triton
import triton.language as tl

import fast
from fast._triton import softmax


@triton.jit
def _tanh_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + i, softmax.tanh(tl.load(x_ptr + i)))


def test_tanh_is_as_exact_for_small_numbers():
    """Below a quarter it is a series, to two units in the last place; beyond, as exact as the hardware's power."""
    x = np.concatenate([np.geomspace(1e-30, 0.2499999, 200), np.linspace(0.25, 20, 56)]).astype(np.float32)
    x = np.concatenate([x, -x])
    y = fast.from_host(x.copy())
    _tanh_kernel[(1,)](y, N=len(x))
    exact = np.tanh(x.astype(np.float64))
    error = np.abs(fast.to_host(y) / exact - 1)
    right = error <= np.where(np.abs(x) < 0.25, 2.0**-22, 2.0**-20)
    assert right.all(), f"of {x[~right]}: off by {error[~right]}"
