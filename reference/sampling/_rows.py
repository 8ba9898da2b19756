"""What the sampling ops share: the checks at their doors, and three small functions of one row."""

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_float, require_shape


def check_each(op: str, argument: str, valid: Array, expected: str, values: Array) -> None:
    """``valid`` must hold for every row; otherwise the first row where it does not is named."""
    if not valid.all():
        row = int(np.argmin(valid.reshape(len(valid), -1).all(axis=1)))
        require(False, op, argument, expected, f"{values[row]} in row {row}")


def check_per_row(op: str, num_rows: int, dtype: type, **arguments: Array) -> None:
    """Each argument has one value of ``dtype`` for each row."""
    for name, values in arguments.items():
        require_shape(op, name, values, (num_rows,))
        require(values.dtype == dtype, op, name, np.dtype(dtype).name, values.dtype)


def check_ids(op: str, argument: str, ids: Array, vocab_size: int, *, dtype: type, lowest: int = -1) -> None:
    """Token ids; ``lowest`` -1 allows the padding."""
    require(ids.dtype == dtype, op, argument, np.dtype(dtype).name, ids.dtype)
    check_each(op, argument, (ids >= lowest) & (ids < vocab_size), f"{lowest} <= id < {vocab_size}", ids)


def check_draw(op: str, num_rows: int, seeds: Array, positions: Array, sample_indices: Array) -> None:
    """What names a random draw: see `random_uniform`."""
    check_per_row(op, num_rows, np.int64, seeds=seeds)
    check_per_row(op, num_rows, np.int32, positions=positions, sample_indices=sample_indices)
    check_each(op, "positions", positions >= 0, "at least 0", positions)
    check_each(op, "sample_indices", sample_indices >= 0, "at least 0", sample_indices)


def check_boundaries(op: str, argument: str, cumulative: Array, end: int) -> None:
    """``cu_...``: int32 offsets from 0, never falling, to ``end``."""
    require_shape(op, argument, cumulative, (None,))
    require(cumulative.dtype == np.int32, op, argument, "int32", cumulative.dtype)
    valid = len(cumulative) > 0 and cumulative[0] == 0 and cumulative[-1] == end and (np.diff(cumulative) >= 0).all()
    require(valid, op, argument, f"offsets from 0 to {end} that never fall", cumulative)


def best_tokens(op: str, logits: Float[Array, "num_rows vocab_size"]) -> Int64[Array, " num_rows"]:
    """The first best token of each row. Its logit tells whether the row is sound: argmax stops at NaN and at +inf."""
    require(logits.ndim == 2 and logits.shape[1] > 0, op, "logits", "[num_rows, vocab_size >= 1]", logits.shape)
    require_float(op, "logits", logits)
    best = logits.astype(compute_dtype(logits.dtype), copy=False).argmax(axis=1)
    tops = logits[np.arange(len(logits)), best]
    check_each(op, "logits", np.isfinite(tops), "a finite logit in every row, and none NaN or +inf", tops)
    return best


def log_softmax(scores: Float[Array, " vocab_size"]) -> Float[Array, " vocab_size"]:
    """Of one row that has a finite maximum."""
    with np.errstate(over="ignore"):  # -3e38 - 3e38 is -inf, and its probability 0
        shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def largest(scores: Float[Array, " num_scores"], count: int) -> Int64[Array, " count"]:
    """Where the ``count`` largest scores are, largest first, the lowest index first among equals."""
    if count == 0:
        return np.empty(0, np.int64)
    kth = np.partition(scores, -count)[-count]
    candidates = np.flatnonzero(scores >= kth)  # more than count if others tie with the last
    return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]
