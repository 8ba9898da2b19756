"""Thresholds without a sort: bisection over the bits of a float, each step one count (or one sum) of a row.

Seen as an integer, with the sign bit turned into two's complement, a float keeps its order. So the k-th largest of any
number of values is found in at most 32 steps, exactly, and in 16 where the values came as bfloat16: the low half of
their bits says nothing, and SHIFT drops it.

No filter needs more: "top-k", "top-p" and "min-p" each keep what reaches some key.
"""

import torch
import triton
import triton.language as tl

# Bits that a value of this dtype leaves at zero once it is float32.
IDLE_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}

FIRST_STEP = tl.constexpr(1 << 20)  # an eighth of a power of two


@triton.jit
def sort_key(x, SHIFT: tl.constexpr):
    """int32 in the order of the floats; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def from_key(key, SHIFT: tl.constexpr):
    """The float with this key."""
    key = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def lowest_key(SHIFT: tl.constexpr):
    """Of what is more than -inf."""
    return tl.full([], (-2139095041 >> SHIFT) + 1, tl.int32)  # the key of -inf is ~0x7F800000


@triton.jit
def highest_key():
    return tl.full([], 2147483647, tl.int32)


@triton.jit
def midpoint(low, high):
    """Between two int32, without overflow, rounded down."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def first_guess(low, high, step):
    """Where to look next: what is sought is usually near the top, so from there on in steps eightfold, then halves."""
    return tl.maximum(midpoint(low, high).to(tl.int64), high.to(tl.int64) - step).to(tl.int32)


@triton.jit
def count_from(values_ptr, stride, num_values, bound, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """How many values have a key of at least ``bound`` (which is above that of -inf)."""
    count = tl.zeros([TILE], tl.int32)
    for start in range(0, num_values, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(values_ptr + i.to(tl.int64) * stride, mask=i < num_values, other=float("-inf")).to(tl.float32)
        count += (sort_key(x, SHIFT) >= bound).to(tl.int32)
    return tl.sum(count)


@triton.jit
def mass_from(values_ptr, stride, num_values, bound, top, inverse_temperature, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """The mass of the logits with a key of at least ``bound``, where ``top`` weighs 1."""
    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, num_values, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(values_ptr + i.to(tl.int64) * stride, mask=i < num_values, other=float("-inf")).to(tl.float32)
        mass += tl.where(sort_key(x, SHIFT) >= bound, tl.exp((x - top) * inverse_temperature), 0.0)
    return tl.sum(mass)


@triton.jit
def kth_key(values_ptr, stride, num_values, k, slack, low, high, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """A key in [``low``, ``high``) that at least k values reach, and no more than k + ``slack``.

    Where values tie there may be none: then the largest that at least k values reach; ``low`` if fewer than k reach it.
    """
    low, high, step = low.to(tl.int32), high.to(tl.int32), tl.full([], FIRST_STEP >> SHIFT, tl.int64)
    while low + 1 < high:
        middle, step = first_guess(low, high, step), tl.minimum(step * 8, 1 << 32)
        count = count_from(values_ptr, stride, num_values, middle, SHIFT, TILE)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, tl.where(count <= k + slack, middle + 1, high), middle)
    return low


@triton.jit
def kth_of(x, k, slack, low, high, SHIFT: tl.constexpr):
    """`kth_key` of values that are in registers."""
    low, high, step = low.to(tl.int32), high.to(tl.int32), tl.full([], FIRST_STEP >> SHIFT, tl.int64)
    while low + 1 < high:
        middle, step = first_guess(low, high, step), tl.minimum(step * 8, 1 << 32)
        count = tl.sum((x >= from_key(middle, SHIFT)).to(tl.int32))
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, tl.where(count <= k + slack, middle + 1, high), middle)
    return low


@triton.jit
def nucleus_key(
    values_ptr, stride, num_values, target, low, high, top, inverse_temperature, SHIFT: tl.constexpr, TILE: tl.constexpr
):
    """The largest key in [``low``, ``high``) above which, itself included, there is a mass of at least ``target``."""
    low, high, step = low.to(tl.int32), high.to(tl.int32), tl.full([], FIRST_STEP >> SHIFT, tl.int64)
    while low + 1 < high:
        middle, step = first_guess(low, high, step), tl.minimum(step * 8, 1 << 32)
        mass = mass_from(values_ptr, stride, num_values, middle, top, inverse_temperature, SHIFT, TILE)
        enough = mass >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def min_p_key(min_p, top, inverse_temperature, SHIFT: tl.constexpr):
    """The smallest key that passes min-p, for a row whose best logit is ``top``: no data is needed."""
    # Times 2**64, since a subnormal min_p would count as 0.
    least = tl.log(min_p * 18446744073709551616.0) - 44.3614195558365
    low, high = lowest_key(SHIFT) - 1, sort_key(top, SHIFT)
    low = tl.where(min_p > 0, low, high - 1)
    while low + 1 < high:
        middle = midpoint(low, high)
        passes = (from_key(middle, SHIFT) - top) * inverse_temperature >= least
        high = tl.where(passes, middle, high)
        low = tl.where(passes, low, middle)
    return tl.where(min_p > 0, high, lowest_key(SHIFT))
