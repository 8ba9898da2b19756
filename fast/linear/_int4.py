"""Weights of 4 bits times activations: which kernel is for which sizes.

The kernels: `_int4_few.py`, `_int4_many.py`, `_int4_any.py`; how codes become numbers: `_int4_codes.py`.
"""

from fast.linear._int4_any import any_groups, dense
from fast.linear._int4_few import FEW_TOKENS, few_tokens
from fast.linear._int4_many import many_tokens, sums

SUMS_TOKENS = 128  # up to here, sums of groups are scaled, in tiles that are not too large for so few tokens
DENSE_TOKENS = 1024  # from here on, to write the weight out as floats for cuBLAS costs less than cuBLAS is faster
GROUPS = (32, 64, 128)  # sizes of groups of which a step takes several, whole

KERNELS = {
    "few": few_tokens,
    "many": many_tokens,
    "sums": sums,
    "any": any_groups,
    "dense": dense,
}


def choose(num_tokens: int, whole: bool, fits: bool, has_bias: bool = False, invariant: bool = False) -> str:
    """Which kernel: for "few" tokens, for "many", "sums" of groups, "dense" for cuBLAS, or for "any" groups.

    Args:
        num_tokens: Of them.
        whole: 16-bit activations, and nothing but whole groups of one of the sizes ``GROUPS``.
        fits: The copy engine can read rows of both arrays: they begin at multiples of 16 bytes.
        has_bias: There is one; cuBLAS would round before it is added.
        invariant: A token's sums are to be the same in any batch.

    Example:
        >>> [choose(n, True, True) for n in (1, 50, 512, 4096)], choose(1, False, True)
        (['few', 'sums', 'many', 'dense'], 'any')
    """
    if not whole:
        return "any"
    if num_tokens <= FEW_TOKENS and not invariant:
        return "few"
    if num_tokens >= DENSE_TOKENS and not has_bias and not invariant:
        return "dense"
    return "many" if num_tokens > SUMS_TOKENS and fits and not invariant else "sums"
