"""What the sampling ops ask at the door: shapes and dtypes always, values only when they are checked."""

import torch

from fast._checks import (
    checking_values,
    require,
    require_dtype,
    require_float,
    require_range,
    require_same_device,
    require_shape,
)


def require_each(op: str, argument: str, valid: torch.Tensor, expected: str, values: torch.Tensor) -> None:
    """``valid`` must hold for every row; otherwise the first row where it does not is named."""
    if not bool(valid.all()):
        row = int(valid.reshape(len(valid), -1).all(1).int().argmin())
        require(False, op, argument, expected, f"{values[row].tolist()} in row {row}")


def require_per_row(op: str, num_rows: int, dtype: torch.dtype, **arguments: torch.Tensor) -> None:
    """Each argument has one value of ``dtype`` for each row, one after another."""
    for name, values in arguments.items():
        require_shape(op, name, values, (num_rows,))  # type: ignore[reportArgumentType]
        require_dtype(op, name, values, dtype)


def require_logits(op: str, logits: torch.Tensor) -> None:
    require(logits.ndim == 2 and logits.shape[1] > 0, op, "logits", "[num_rows, vocab_size >= 1]", list(logits.shape))
    require_float(op, "logits", logits)
    if checking_values():
        tops = logits.float().amax(1)  # NaN passes through a maximum
        require_each(op, "logits", tops.isfinite(), "a finite logit in every row, and none NaN or +inf", tops)


def require_filters(op: str, logits: torch.Tensor, *filters: torch.Tensor) -> None:
    require_logits(op, logits)
    temperature, top_k, top_p, min_p = filters
    require_per_row(op, len(logits), torch.float32, temperature=temperature, top_p=top_p, min_p=min_p)
    require_per_row(op, len(logits), torch.int32, top_k=top_k)
    require_same_device(op, logits=logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if checking_values():
        valid = (temperature >= 0) & (temperature < torch.inf)
        require_each(op, "temperature", valid, "finite and at least 0", temperature)
        require_each(op, "top_k", top_k >= 0, "at least 0", top_k)
        require_each(op, "top_p", (top_p > 0) & (top_p <= 1), "more than 0 and at most 1", top_p)
        require_each(op, "min_p", (min_p >= 0) & (min_p <= 1), "from 0 to 1", min_p)


def require_draw(
    op: str, num_rows: int, seeds: torch.Tensor, positions: torch.Tensor, sample_indices: torch.Tensor
) -> None:
    """What names a random draw."""
    require_per_row(op, num_rows, torch.int64, seeds=seeds)
    require_per_row(op, num_rows, torch.int32, positions=positions, sample_indices=sample_indices)
    require_range(op, "positions", positions, 0, 2**31)
    require_range(op, "sample_indices", sample_indices, 0, 2**31)


def require_ids(
    op: str, argument: str, ids: torch.Tensor, vocab_size: int, dtype: torch.dtype, *, lowest: int = -1
) -> None:
    """Token ids; ``lowest`` -1 allows the padding."""
    require_dtype(op, argument, ids, dtype)
    if checking_values() and ids.numel():
        require_each(op, argument, (ids >= lowest) & (ids < vocab_size), f"{lowest} <= id < {vocab_size}", ids)


def require_boundaries(op: str, argument: str, cumulative: torch.Tensor, end: int) -> None:
    """``cu_...``: int32 offsets from 0, never falling, to ``end``."""
    require_shape(op, argument, cumulative, (None,))  # type: ignore[reportArgumentType]
    require_dtype(op, argument, cumulative, torch.int32)
    require(len(cumulative) > 0, op, argument, "at least one offset", list(cumulative.shape))
    if checking_values():
        fits = int(cumulative[0]) == 0 and int(cumulative[-1]) == end and bool((cumulative.diff() >= 0).all())
        require(fits, op, argument, f"offsets from 0 to {end} that never fall", cumulative.tolist())


def require_distributions(op: str, argument: str, probs: torch.Tensor) -> None:
    require_float(op, argument, probs)
    if checking_values():
        valid = (probs >= 0).all(1) & ((probs.float().sum(1) - 1).abs() <= 0.01)
        require_each(op, argument, valid, "values of at least 0 that sum to 1", probs)


def rows_together(*arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One value a row, side by side: kernels index them without strides. (A copy of a few bytes, if one at all.)"""
    return tuple(array.contiguous() for array in arrays)
