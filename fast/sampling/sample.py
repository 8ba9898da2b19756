"""Penalties, filters, the draw, log-probabilities, in Triton. What they are for: `reference/sampling/sample.py`.

Nothing sorts the vocabulary. `_scan` reads it once, `_threshold` finds what is kept among what the scan left, and
`_filter` and `_draw` apply it; `_penalize` and `_tops` hold the kernels of the other two.
"""

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor as Array

from fast._checks import (
    checking_values,
    require,
    require_dtype,
    require_float,
    require_out,
    require_same_device,
    require_shape,
)
from fast.sampling import _draw, _filter, _penalize, _tops
from fast.sampling._values import (
    require_draw,
    require_each,
    require_filters,
    require_ids,
    require_logits,
    require_per_row,
    rows_together,
)


def penalize(
    logits: Float[Array, "num_rows vocab_size"],
    history: Int32[Array, "num_rows max_history"],
    prompt_lens: Int32[Array, " num_rows"],
    repetition_penalty: Float32[Array, " num_rows"],
    presence_penalty: Float32[Array, " num_rows"],
    frequency_penalty: Float32[Array, " num_rows"],
    bias_ids: Int32[Array, "num_rows max_biases"],
    bias_values: Float32[Array, "num_rows max_biases"],
    *,
    out: Float[Array, "num_rows vocab_size"] | None = None,
) -> Float[Array, "num_rows vocab_size"]:
    """Same contract as `reference.sampling.sample.penalize`.

    Grid: a copy, one program a tile of a row; then one program a row, which counts its history and changes the logits
    of the tokens in it. Moves: the logits once in and once out (nothing where ``out`` is ``logits``), and for each
    token of the history a few words at random places. Takes int32 scratch of the shape of the logits, most of which is
    never touched.
    """
    op, (num_rows, vocab_size) = "penalize", _two_axes("penalize", "logits", logits)
    require_float(op, "logits", logits)
    penalties = {
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    require_per_row(op, num_rows, torch.float32, **penalties)
    require_per_row(op, num_rows, torch.int32, prompt_lens=prompt_lens)
    require_shape(op, "history", history, (num_rows, None))  # type: ignore[reportArgumentType]
    require_ids(op, "history", history, vocab_size, torch.int32)
    require_shape(op, "bias_ids", bias_ids, (num_rows, None))  # type: ignore[reportArgumentType]
    require_shape(op, "bias_values", bias_values, tuple(bias_ids.shape))
    require_dtype(op, "bias_values", bias_values, torch.float32)
    require_ids(op, "bias_ids", bias_ids, vocab_size, torch.int32)
    require_same_device(op, logits=logits, history=history, prompt_lens=prompt_lens, bias_ids=bias_ids, out=out)
    require_out(op, out, tuple(logits.shape), torch.float32)
    if checking_values():
        inside = (prompt_lens >= 0) & (prompt_lens <= history.shape[1])
        require_each(op, "prompt_lens", inside, f"0 to {history.shape[1]}", prompt_lens)
        require_each(op, "repetition_penalty", repetition_penalty > 0, "more than 0", repetition_penalty)
        for name, values in penalties.items():
            require_each(op, name, values.isfinite(), "a finite number", values)
        require_each(op, "bias_values", (bias_ids < 0) | (bias_values < torch.inf), "finite or -inf", bias_values)
        ids = bias_ids.sort(1).values
        repeated = (ids.diff(dim=1) == 0) & (ids[:, 1:] >= 0)
        require_each(op, "bias_ids", ~repeated, "each token once in a row", bias_ids)

    result = torch.empty(logits.shape, dtype=torch.float32, device=logits.device) if out is None else out
    per_row = rows_together(prompt_lens, *penalties.values())
    biases = rows_together(bias_ids, bias_values)
    _penalize.penalize_into(result, logits, history.contiguous(), per_row, *biases)
    return result


def filter_logits(
    logits: Float[Array, "num_rows vocab_size"],
    temperature: Float32[Array, " num_rows"],
    top_k: Int32[Array, " num_rows"],
    top_p: Float32[Array, " num_rows"],
    min_p: Float32[Array, " num_rows"],
    *,
    out: Float[Array, "num_rows vocab_size"] | None = None,
) -> Float[Array, "num_rows vocab_size"]:
    """Same contract as `reference.sampling.sample.filter_logits`.

    Grid: the scan's, one program a tile; one program a row for its threshold; one a tile again to apply it.
    Moves: the logits twice in and once out, while the threshold is found among the row's best chunks. Where top-p keeps
    more than some hundred tokens, or top-k more than some thousand, a row's own program reads it some 30 times.
    """
    op, filters = "filter_logits", (temperature, top_k, top_p, min_p)
    require_filters(op, logits, *filters)
    require_out(op, out, tuple(logits.shape), torch.float32)
    result = torch.empty(logits.shape, dtype=torch.float32, device=logits.device) if out is None else out
    if len(logits):
        _filter.filter_into(result, logits, rows_together(*filters))
    return result


def sample(
    logits: Float[Array, "num_rows vocab_size"],
    temperature: Float32[Array, " num_rows"],
    top_k: Int32[Array, " num_rows"],
    top_p: Float32[Array, " num_rows"],
    min_p: Float32[Array, " num_rows"],
    seeds: Int64[Array, " num_rows"],
    positions: Int32[Array, " num_rows"],
    sample_indices: Int32[Array, " num_rows"],
) -> Int64[Array, " num_rows"]:
    """Same contract as `reference.sampling.sample.sample`.

    Grid: the scan's, one program a tile; one program a row to choose; then, for rows in which top-p or min-p keeps too
    many tokens to list, one a tile to weigh what lies above the few that can have won, and one a row to finish.
    Moves: the logits once; twice for the rows that are weighed. (A row that defeats both ways is read some 30 times.)
    Numerics: noise is within 1e-6 of ``random_gumbel``'s where many tokens compete.
    """
    filters, draws = (temperature, top_k, top_p, min_p), (seeds, positions, sample_indices)
    require_filters("sample", logits, *filters)
    require_draw("sample", len(logits), *draws)
    require_same_device("sample", logits=logits, seeds=seeds, positions=positions, sample_indices=sample_indices)
    if len(logits) == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    return _draw.draw(logits, rows_together(*filters), rows_together(*draws))


def log_probs(
    logits: Float[Array, "num_rows vocab_size"], token_ids: Int64[Array, " num_rows"], *, num_top: int
) -> tuple[
    Float[Array, " num_rows"], Int32[Array, " num_rows"], Int64[Array, "num_rows num_top"],
    Float[Array, "num_rows num_top"],
]:  # fmt: skip
    """Same contract as `reference.sampling.sample.log_probs`.

    Grid: one program a tile of a row, which takes out its ``num_top`` best one by one; then one a row, which merges.
    Moves: the logits once. Limits: past ``_tops.MAX_TOP`` best tokens the row is sorted, by torch.
    """
    op = "log_probs"
    require_logits(op, logits)
    num_rows, vocab_size = logits.shape
    require_per_row(op, num_rows, torch.int64, token_ids=token_ids)
    require_ids(op, "token_ids", token_ids, vocab_size, torch.int64, lowest=0)
    require(0 <= num_top <= vocab_size, op, "num_top", f"0 to {vocab_size}", num_top)
    require_same_device(op, logits=logits, token_ids=token_ids)
    return _tops.log_probs(logits, token_ids.contiguous(), num_top)


def _two_axes(op: str, argument: str, array: Array) -> tuple[int, int]:
    require_shape(op, argument, array, (None, None))  # type: ignore[reportArgumentType]
    return array.shape[0], array.shape[1]
