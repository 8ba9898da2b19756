"""The kernels of `penalize`: a copy, then each row's own few tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.platform import INTERPRETING, cdiv

TILE_COPY = 128 if INTERPRETING else 8192
TILE_HISTORY = 8 if INTERPRETING else 1024  # tokens of a history at once


@triton.jit
def _copy_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    out_ptr,  # [num_rows, vocab_size]
    stride_logits_row,
    stride_logits_vocab,
    stride_out_row,
    stride_out_vocab,
    vocab_size,
    num_tiles,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // num_tiles
    token = (tl.program_id(0) % num_tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = token < vocab_size
    x = tl.load(logits_ptr + row * stride_logits_row + token * stride_logits_vocab, mask=inside)
    tl.store(out_ptr + row * stride_out_row + token * stride_out_vocab, x.to(tl.float32), mask=inside)


@triton.jit
def _penalize_kernel(
    out_ptr,  # [num_rows, vocab_size], holds the logits
    history_ptr,  # [num_rows, max_history]
    prompt_lens_ptr,  # [num_rows], as are the next three
    repetition_penalty_ptr,
    presence_penalty_ptr,
    frequency_penalty_ptr,
    bias_ids_ptr,  # [num_rows, max_biases]
    bias_values_ptr,  # [num_rows, max_biases]
    place_ptr,  # [num_rows, vocab_size]: scratch, a column of the history that holds the token
    count_ptr,  # [num_rows, max_history]: scratch, at that column the token's occurrences in the output
    stride_out_row,
    stride_out_vocab,
    vocab_size,
    max_history,
    max_biases,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * stride_out_row
    history_ptr += row * max_history
    place_ptr += row * vocab_size
    count_ptr += row * max_history
    bias_ids_ptr += row * max_biases
    bias_values_ptr += row * max_biases

    for start in range(0, max_biases, TILE):
        i = start + tl.arange(0, TILE)
        token = tl.load(bias_ids_ptr + i, mask=i < max_biases, other=-1)
        valid = (token >= 0) & (token < vocab_size)
        bias = tl.load(bias_values_ptr + i, mask=valid)
        pointers = out_ptr + token.to(tl.int64) * stride_out_vocab
        tl.store(pointers, tl.load(pointers, mask=valid) + bias, mask=valid)

    # Whichever column writes its number last stands for the token. Nothing need be cleared: only what has been written
    # is read.
    for start in range(0, max_history, TILE):
        i = start + tl.arange(0, TILE)
        token = tl.load(history_ptr + i, mask=i < max_history, other=-1)
        valid = (token >= 0) & (token < vocab_size)
        tl.store(place_ptr + token, i, mask=valid)
        tl.store(count_ptr + i, tl.zeros([TILE], tl.int32), mask=i < max_history)
    tl.debug_barrier()

    prompt_len = tl.load(prompt_lens_ptr + row)
    for start in range(0, max_history, TILE):
        i = start + tl.arange(0, TILE)
        token = tl.load(history_ptr + i, mask=i < max_history, other=-1)
        counts = (token >= 0) & (token < vocab_size) & (i >= prompt_len)
        place = tl.load(place_ptr + token, mask=counts)
        tl.atomic_add(count_ptr + place, 1, mask=counts)
    tl.debug_barrier()

    repetition = tl.load(repetition_penalty_ptr + row)
    presence = tl.load(presence_penalty_ptr + row)
    frequency = tl.load(frequency_penalty_ptr + row)
    for start in range(0, max_history, TILE):
        i = start + tl.arange(0, TILE)
        token = tl.load(history_ptr + i, mask=i < max_history, other=-1)
        valid = (token >= 0) & (token < vocab_size)
        stands = valid & (tl.load(place_ptr + token, mask=valid) == i)
        count = tl.load(count_ptr + i, mask=stands).to(tl.float32)
        pointers = out_ptr + token.to(tl.int64) * stride_out_vocab
        score = tl.load(pointers, mask=stands)
        score = tl.where(score > 0, tl.div_rn(score, repetition + 0.0 * score), score * repetition)
        score -= tl.where(count > 0, frequency * count + presence, 0.0)
        tl.store(pointers, score, mask=stands)


def penalize_into(
    out: Array, logits: Array, history: Array, per_row: tuple[Array, ...], bias_ids: Array, bias_values: Array
) -> None:
    """``per_row``: prompt lengths, then the penalties in the op's order."""
    num_rows, vocab_size = logits.shape
    if logits.numel() == 0:
        return
    if out.data_ptr() != logits.data_ptr() or out.stride() != logits.stride():
        num_tiles = cdiv(vocab_size, TILE_COPY)
        _copy_kernel[(num_rows * num_tiles,)](
            logits, out, *logits.stride(), *out.stride(), vocab_size, num_tiles, TILE=TILE_COPY, num_warps=8
        )
    max_history, max_biases = history.shape[1], bias_ids.shape[1]
    if max_history or max_biases:
        scratch = {"dtype": torch.int32, "device": logits.device}
        place = torch.empty((num_rows, vocab_size), **scratch)
        count = torch.empty((num_rows, max_history), **scratch)
        _penalize_kernel[(num_rows,)](
            out, history, *per_row, bias_ids, bias_values, place, count, *out.stride(),
            vocab_size, max_history, max_biases, TILE=TILE_HISTORY, num_warps=8,
        )  # fmt: skip
