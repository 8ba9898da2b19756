r"""The tolerance rule: how far from the float64 oracle an op may land, element by element.

A tolerance over a whole tensor lets a dropped last page hide behind one row of large values; a bare ``atol`` fails
correct kernels now and then and passes wrong ones always. So every element has its own bound, made of three things:

.. math::
    |out - ref_{64}| \le 2 \, e_{row} + u_{out} (|ref| + stored) + c \, u_{32} \, magnitude

- :math:`e_{row}`, what the plain torch backend got wrong in that row (the largest error in it). It adapts the bound
  to inputs on which everyone loses digits. A baseline that is not finite counts as 0, and the baseline is itself held
  to an a-priori bound (``attention_baseline_bound``, ``matmul_baseline_bound``), or a sloppy one would license sloppy
  kernels.
- :math:`u_{out}`, one rounding to the result's dtype, of the result and of what a kernel may store in that dtype on
  the way (attention: the probabilities, hence :math:`\sum p|v|`).
- :math:`c \, u_{32}`, arithmetic in float32, times the magnitude of what was added up *before* anything cancelled
  (:math:`\sum p|v|`, :math:`\sum |x||w|`): a sum that cancels to nothing still has the rounding of its terms.

Here :math:`u` is the unit roundoff, half the distance from 1 to the next number. float64 inputs are computed in
float64, so for them :math:`u_{64}` takes the place of :math:`u_{32}`. Results below the smallest normal number may be
flushed to zero; that is the one absolute term, and it is tiny.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import ml_dtypes
import numpy as np

from reference.attention.dense_attention import attend, attention_scores, group_heads, ungroup_heads, visible_keys

Real = np.ndarray | float


# ---- units ------------------------------------------------------------------------------------------------------


def rounding_unit(dtype: str | np.dtype) -> float:
    """The unit roundoff of a dtype: the largest relative error of rounding to nearest.

    Example:
        >>> rounding_unit("bfloat16") == 2**-8, rounding_unit("float32") == 2**-24
        (True, True)
    """
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2


def compute_unit(out_dtype: str | np.dtype) -> float:
    """The unit roundoff of the arithmetic behind a result: float64's for float64, float32's for everything else."""
    return rounding_unit("float64" if np.dtype(out_dtype) == np.float64 else "float32")


def underflow(out_dtype: str | np.dtype) -> float:
    """What may be lost near zero: rounding to a subnormal of ``out_dtype``, and float32's own subnormals flushed."""
    compute = np.float64 if np.dtype(out_dtype) == np.float64 else np.float32
    smallest = float(ml_dtypes.finfo(np.dtype(out_dtype)).smallest_subnormal)
    return smallest / 2 + float(np.finfo(compute).tiny)


def baseline_error(baseline: np.ndarray, ref64: np.ndarray) -> np.ndarray:
    """The largest error of each row (last axis, kept) of the plain torch backend; 0 where it is not finite."""
    with np.errstate(invalid="ignore"):
        error = np.abs(np.asarray(baseline, np.float64) - ref64)
    return np.where(np.isfinite(error), error, 0.0).max(axis=-1, keepdims=True, initial=0.0)


# ---- the rule, for each kind of op ------------------------------------------------------------------------------


def attention_bound(
    ref64: np.ndarray,
    magnitude: np.ndarray,
    score_magnitude: np.ndarray,
    out_dtype: str | np.dtype,
    baseline_error: Real = 0.0,
    value_sum: Real = 0.0,
) -> np.ndarray:
    r"""The rule for attention outputs.

    .. math::
        2 e_{row} + u_{out} (|ref| + \sum p|v|) + 8 u_{32} (1 + \max \sum |q||k| \cdot scale) \sum p|v|

    An error :math:`\delta` in a score multiplies its probability by :math:`e^\delta`, which is why the size of the
    scores stands in front of :math:`\sum p|v|`.

    Args:
        ref64: The oracle's output, [..., head_dim].
        magnitude: :math:`\sum p|v|`, the oracle with |v| for v; the shape of ``ref64``.
        score_magnitude: :math:`\max \sum |q||k| \cdot scale` over the keys a row sees, [...]; at least |sink|.
        out_dtype: The dtype of the result that is judged.
        baseline_error: ``baseline_error(plain torch's output, ref64)``.
        value_sum: :math:`\sum |v|` over the keys a row sees, the shape of ``ref64``: any of their probabilities may
            be so small that it is flushed to zero. It matters only where a huge sink leaves nothing but such ones.
    """
    unit = compute_unit(out_dtype)
    arithmetic = 8 * unit * (1 + np.asarray(score_magnitude)[..., None]) * magnitude
    rounding = rounding_unit(out_dtype) * (np.abs(ref64) + magnitude)
    return 2 * baseline_error + rounding + arithmetic + underflow(out_dtype) * (1 + value_sum)


def lse_bound(
    ref64: np.ndarray,
    score_magnitude: np.ndarray,
    num_keys: int,
    dtype: str | np.dtype = "float32",
    baseline_error: Real = 0.0,
) -> np.ndarray:
    r"""The rule for a log-sum-exp over at most ``num_keys`` = n keys.

    .. math:: 2 e + 4 u_{out} |lse| + \max(8, \sqrt n) \, u_{32} (1 + \max \sum |q||k| \cdot scale)

    A relative error of the sum is an absolute error of its logarithm. The logarithm itself is good to a unit in the
    last place, 2 u, and is multiplied or added to once or twice: hence 4.
    """
    size = np.where(np.isfinite(ref64), np.abs(ref64), 0.0)
    arithmetic = max(8.0, num_keys**0.5) * compute_unit(dtype) * (1 + score_magnitude)
    return 2 * baseline_error + 4 * rounding_unit(dtype) * size + arithmetic


def matmul_bound(
    ref64: np.ndarray,
    magnitude: np.ndarray,
    num_terms: int,
    out_dtype: str | np.dtype,
    *,
    baseline_error: Real = 0.0,
    stored: Real = 0.0,
) -> np.ndarray:
    r"""The rule for sums of products, of ``num_terms`` = n terms.

    .. math:: 2 e_{row} + u_{out} (|ref| + stored) + \max(8, \sqrt n) \, u_{32} \sum |x||w|

    Rounding errors are as good as independent, so n of them add up like :math:`\sqrt n` (Higham and Mary, 2019), in
    any order of summation.

    Args:
        ref64: The oracle's output.
        magnitude: :math:`\sum |x||w|` (plus |bias|, |residual|, whatever is added), the shape of ``ref64``.
        num_terms: How many products one element sums.
        out_dtype: The dtype of the result that is judged.
        baseline_error: ``baseline_error(plain torch's output, ref64)``.
        stored: The part of ``magnitude`` that goes through a value which the op may store in ``out_dtype`` on the
            way (a dequantized weight, a norm before its linear layer); 0 if it stores none.
    """
    arithmetic = max(8.0, num_terms**0.5) * compute_unit(out_dtype) * magnitude
    return 2 * baseline_error + rounding_unit(out_dtype) * (np.abs(ref64) + stored) + arithmetic + underflow(out_dtype)


def norm_bound(
    ref64: np.ndarray,
    num_terms: int,
    out_dtype: str | np.dtype,
    *,
    magnitude: np.ndarray | None = None,
    baseline_error: Real = 0.0,
    stored: Real = 0.0,
) -> np.ndarray:
    r"""The rule for a normalization over ``num_terms`` = n values, and for other elementwise functions (n = 1).

    .. math:: 2 e_{row} + u_{out} (|ref| + stored) + \max(8, \sqrt n) \, u_{32} \, magnitude

    ``magnitude`` is |ref| unless something cancelled before: for a norm of x + residual it is the same norm's
    factor times (|x| + |residual|). ``stored`` is as in ``matmul_bound``.
    """
    magnitude = np.abs(ref64) if magnitude is None else magnitude
    return matmul_bound(ref64, magnitude, num_terms, out_dtype, baseline_error=baseline_error, stored=stored)


# ---- what the plain torch backend is held to --------------------------------------------------------------------


def matmul_baseline_bound(
    ref64: np.ndarray, magnitude: np.ndarray, num_terms: int, out_dtype: str | np.dtype
) -> np.ndarray:
    r"""What the baseline may get wrong: one rounding, and :math:`(n + 2) u_{32} \sum |x||w|`, true in any order."""
    arithmetic = (num_terms + 2) * compute_unit(out_dtype) * magnitude
    return rounding_unit(out_dtype) * np.abs(ref64) + arithmetic + underflow(out_dtype)


def attention_baseline_bound(
    ref64: np.ndarray,
    magnitude: np.ndarray,
    score_magnitude: np.ndarray,
    num_keys: int,
    out_dtype: str | np.dtype,
    value_sum: Real = 0.0,
) -> np.ndarray:
    r"""What the baseline may get wrong, from the textbook's error analysis; nothing is stored in low precision.

    .. math:: u_{out} |ref| + u_{32} (2 num\_keys + 16 + 2 (head\_dim + 4) \max \sum |q||k| \cdot scale) \sum p|v|

    The two sums over keys (numerator, denominator) lose :math:`num\_keys \, u` each; a score loses
    :math:`(head\_dim + 4) u` of its magnitude (product, scale, cap, the maximum subtracted), and enters twice.
    """
    head_dim = ref64.shape[-1]
    steps = 2 * num_keys + 16 + 2 * (head_dim + 4) * np.asarray(score_magnitude)[..., None]
    arithmetic = steps * compute_unit(out_dtype) * magnitude
    return rounding_unit(out_dtype) * np.abs(ref64) + arithmetic + underflow(out_dtype) * (1 + value_sum)


# ---- the oracle, with its magnitudes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionOracle:
    """One sequence's attention in float64, and the magnitudes that the rule asks for."""

    out: np.ndarray  # [num_queries, num_heads, head_dim]
    lse: np.ndarray  # [num_queries, num_heads]
    magnitude: np.ndarray  # sum p|v|, like out
    score_magnitude: np.ndarray  # max sum |q||k| * scale over the keys seen (and |sink|), like lse
    value_sum: np.ndarray  # sum |v| over the keys seen, like out


def attention_oracle(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: np.ndarray | None = None,
    logit_cap: float | None = None,
) -> AttentionOracle:
    """``dense_attention`` of one sequence in float64, with its ``lse`` and magnitudes."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    sinks = None if sinks is None else np.asarray(sinks).astype(np.float64)
    positions = np.arange(len(k) - len(q), len(k))
    seen = visible_keys(positions, np.arange(len(k)), causal=causal, sliding_window=sliding_window)
    values = np.concatenate([v, np.abs(v)], axis=-1)  # one softmax for both
    both, lse = attend(q, k, values, seen=seen, scale=factor, sinks=sinks, logit_cap=logit_cap)
    out, magnitude = np.split(both, 2, axis=-1)

    scores = attention_scores(group_heads(np.abs(q) * abs(factor), k.shape[1]), np.abs(k))
    scores = np.where(np.repeat(seen, q.shape[1] // k.shape[1], axis=0), scores, 0.0)
    score_magnitude = ungroup_heads(scores.max(axis=-1, keepdims=True, initial=0.0), q.shape[1])[..., 0]
    if sinks is not None:
        score_magnitude = np.maximum(score_magnitude, np.abs(sinks))
    value_sum = np.repeat(np.tensordot(seen.astype(float), np.abs(v), axes=1), q.shape[1] // k.shape[1], axis=1)
    return AttentionOracle(out, lse, magnitude, score_magnitude, value_sum)


def concatenate_oracles(oracles: Sequence[AttentionOracle]) -> AttentionOracle:
    """The oracles of several sequences as that of their packed batch; at least one."""
    return AttentionOracle(*(np.concatenate([getattr(o, f.name) for o in oracles]) for f in fields(AttentionOracle)))


# ---- the verdict ------------------------------------------------------------------------------------------------


class OutsideBound(AssertionError):
    """An element further from the oracle than the rule allows; its fields say where and by how much."""

    def __init__(self, what: str, index: tuple[int, ...], got: float, expected: float, bound: float, message: str):
        super().__init__(message)
        self.what, self.index, self.got, self.expected, self.bound = what, index, got, expected, bound
        self.ratio = _ratio(np.array(got), np.array(expected), np.array(bound)).item()


def _ratio(got: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """|got - expected| / bound; 0 where they are equal (infinities too), infinite where just one is a number."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        ratio = np.abs(got - expected) / bound
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    return np.where(same, 0.0, np.where(np.isnan(ratio), np.inf, ratio))


def assert_within(
    got: np.ndarray, ref64: np.ndarray, bound: Real, what: str, axes: tuple[str, ...] | None = None
) -> None:
    """Every element of ``got`` within ``bound`` of ``ref64``; otherwise the worst element, named.

    Args:
        got: The result judged, any float dtype.
        ref64: The oracle's. Where it is infinite or NaN, ``got`` must be the same.
        bound: The largest error allowed, per element (broadcast); 0 asks for equality.
        what: Whose result it is; begins the message.
        axes: A name for each axis, so that the message can say ``token 3, head 0, dim 17``.

    Raises:
        OutsideBound: An ``AssertionError`` that carries ``index``, ``got``, ``expected``, ``bound`` and ``ratio``.

    Example:
        >>> assert_within(np.array([1.0, 2.5]), np.array([1.0, 2.0]), 0.1, "toy", axes=("token",))
        Traceback (most recent call last):
        twofold.conformance.tolerance.OutsideBound: toy: 1 of 2 elements outside the tolerance; the worst:
            at       token 1
            got      2.5
            expected 2.0
            bound    0.1
            ratio    5
    """
    got, ref64 = np.asarray(got).astype(np.float64), np.asarray(ref64, np.float64)
    assert got.shape == ref64.shape, f"{what}: expected shape {ref64.shape}, got {got.shape}"
    bound = np.broadcast_to(np.asarray(bound, np.float64), ref64.shape)
    assert not np.isnan(bound).any(), f"{what}: the bound itself is not a number (overflow in a magnitude?)"
    ratio = _ratio(got, ref64, bound)
    if ratio.size == 0 or ratio.max() <= 1:
        return
    index = tuple(int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
    names = axes or tuple(f"axis {i}:" for i in range(ratio.ndim))
    at = ", ".join(f"{name} {i}" for name, i in zip(names, index)) or "the only element"
    worst = got[index].item(), ref64[index].item(), bound[index].item()
    raise OutsideBound(
        what,
        index,
        *worst,
        f"{what}: {int((ratio > 1).sum())} of {ratio.size} elements outside the tolerance; the worst:\n"
        f"    at       {at}\n    got      {worst[0]!r}\n    expected {worst[1]!r}\n"
        f"    bound    {worst[2]:.3g}\n    ratio    {ratio[index]:.3g}",
    )
