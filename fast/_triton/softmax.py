"""The steps of an online softmax, for every attention kernel.

The state of a row is (top, total, acc): the largest score so far, the sum of weights relative to it, and the weighted
sum of values. Scores come from a dot as they are; ``scale_log2`` = scale * log2 e turns them into base-2 logits in the
same multiply-add that subtracts ``top``, so ``top`` is in base 2 as well and a weight costs one FMA and one exp2.
``scale_log2`` must be positive: ``positive_scale`` moves a sign or a zero into q.

The order of a kernel: ``scores = dot(q, k)``, ``cap_scores`` if there is a cap (then ``scale_log2`` is ``LOG2E``),
``hide`` in tiles that the mask cuts, ``update``, ``acc = acc * rescale[:, None]``, ``acc = dot(weights, v, acc)``;
in the end ``finish``. It begins with ``empty`` or ``empty_with_sink``.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SMALLEST_SCALE = 1e-30  # times log2 e still a normal float32: 0 * -inf would be NaN


def positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Queries and a positive scale with the same scores; q is copied only if the scale was not positive (never)."""
    if scale > SMALLEST_SCALE:
        return q, scale
    return q * (scale > 0) - q * (scale < 0), max(abs(scale), SMALLEST_SCALE)


@triton.jit
def tanh(x):
    """To float32's precision, small x included; libdevice's does not run in the interpreter."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    quotient = (1 - e) / (1 + e)  # cancels for small x, hence the series
    return tl.where(square < 1 / 16, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def cap_scores(scores, scale, logit_cap):
    """cap * tanh(scale * scores / cap): scaled already, so the softmax's own ``scale_log2`` is ``LOG2E`` after it."""
    return logit_cap * tanh(scores * (scale / logit_cap))


@triton.jit
def hide(scores, queries, keys, num_keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """-inf for every score of a key that a query does not see.

    ``queries`` and ``keys`` are positions in the sequence, of rows and columns; keys from ``num_keys`` on are none.
    """
    seen = (keys < num_keys)[None, :]
    if CAUSAL:
        seen = seen & (keys[None, :] <= queries[:, None])
    if WINDOWED:
        seen = seen & (keys[None, :] > queries[:, None] - window)
        if not CAUSAL:
            seen = seen & (keys[None, :] < queries[:, None] + window)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def empty(TILE_Q: tl.constexpr):
    """(top, total) before any key."""
    return tl.full([TILE_Q], float("-inf"), tl.float32), tl.zeros([TILE_Q], tl.float32)


@triton.jit
def empty_with_sink(sink, TILE_Q: tl.constexpr):
    """(top, total) before any key but the sink, one that brings no value; ``sink`` is a scalar, or one a row."""
    top = tl.zeros([TILE_Q], tl.float32) + sink.to(tl.float32) * LOG2E
    return top, tl.where(top == float("-inf"), 0.0, 1.0)


@triton.jit
def update(scores, top, total, scale_log2):
    """One more tile of keys: the new top and total, what older sums are worth under them, and the tile's weights."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key so far: -inf - -inf would be NaN
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    rescale = tl.exp2(top - shift)
    return new_top, total * rescale + tl.sum(weights, 1), rescale, weights


@triton.jit
def finish(top, total):
    """What to multiply ``acc`` with, and the natural lse; 0 / 1 and -inf for a row without keys."""
    total = tl.where(total > 0, total, 1.0)
    return 1.0 / total, (top + tl.log2(total)) * LN2
