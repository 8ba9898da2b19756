"""The kernels of `filter_logits`: a threshold for each row, and what reaches it."""

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast.sampling._keys import IDLE_BITS, lowest_key, sort_key
from fast.sampling._scan import CHUNK, COLS, load_filters, load_tile, scan
from fast.sampling._threshold import (
    SIZES,
    TILE_ALL,
    choose_warps,
    full_threshold,
    head_threshold,
    make_scratch,
    row_mass,
    row_top,
)


@triton.jit
def _threshold_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    temperature_ptr,  # [num_rows], as are the next three
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    tile_max_ptr,  # [num_rows, num_tiles]
    tile_mass_ptr,  # [num_rows, num_tiles]
    tile_best_ptr,  # [num_rows, num_tiles]
    chunk_max_ptr,  # [num_rows, num_tiles * COLS]
    listed_ptr,  # [num_rows, MAX_CHUNKS]
    candidates_ptr,  # [num_rows, MAX_CANDIDATES]
    values_ptr,  # [num_rows, MAX_CANDIDATES]
    threshold_ptr,  # [num_rows], the least key kept; the token of a greedy row
    stride_logits_row,
    stride_logits_vocab,
    vocab_size,
    num_tiles,
    TILES: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEAD: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    MAX_PAIRS: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILE_GATHER: tl.constexpr,
    TILE_CANDIDATES: tl.constexpr,
    TILE_ALL: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inverse_temperature, top_k, top_p, min_p, greedy = load_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab_size
    )
    top, first_tile = row_top(tile_max_ptr, row, num_tiles, TILES)
    if greedy:
        tl.store(threshold_ptr + row, tl.load(tile_best_ptr + row * num_tiles + first_tile))
    elif (top_k == 0) & (top_p >= 1) & (min_p <= 0):
        tl.store(threshold_ptr + row, lowest_key(SHIFT))
    else:
        row_total = 0.0
        if (top_k == 0) & (top_p < 1):
            row_total = row_mass(tile_max_ptr, tile_mass_ptr, row, num_tiles, top, inverse_temperature, TILES)
        logits_row_ptr = logits_ptr + row * stride_logits_row
        holds, key, _ = head_threshold(
            logits_row_ptr, stride_logits_vocab, vocab_size, chunk_max_ptr + row * num_tiles * COLS, num_tiles * COLS,
            listed_ptr + row * MAX_CHUNKS, candidates_ptr + row * MAX_CANDIDATES, values_ptr + row * MAX_CANDIDATES,
            top, inverse_temperature, top_k, top_p, min_p, row_total,
            SHIFT, CHUNKS, HEAD, MAX_CHUNKS, MAX_CANDIDATES, MAX_PAIRS, TILE_PAIRS, TILE_GATHER, TILE_CANDIDATES,
            CHUNK, COLS,
        )  # fmt: skip
        if holds == 0:
            key = full_threshold(
                logits_row_ptr, stride_logits_vocab, vocab_size, top, inverse_temperature, top_k, top_p, min_p,
                SHIFT, TILE_ALL,
            )  # fmt: skip
        tl.store(threshold_ptr + row, key)


@triton.jit
def _apply_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    temperature_ptr,  # [num_rows]
    tile_max_ptr,  # [num_rows, num_tiles]
    threshold_ptr,  # [num_rows]
    out_ptr,  # [num_rows, vocab_size]
    stride_logits_row,
    stride_logits_vocab,
    stride_out_row,
    stride_out_vocab,
    vocab_size,
    num_tiles,
    TILES: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // num_tiles
    tile = (tl.program_id(0) % num_tiles).to(tl.int32)
    temperature = tl.load(temperature_ptr + row)
    threshold = tl.load(threshold_ptr + row)
    top, _ = row_top(tile_max_ptr, row, num_tiles, TILES)
    x, token = load_tile(logits_ptr + row * stride_logits_row, stride_logits_vocab, tile, vocab_size, CHUNK, COLS)
    if temperature <= 0:
        filtered = tl.where(token == threshold, 0.0, float("-inf"))
    else:
        inverse = tl.minimum(tl.div_rn(1.0, temperature), 3e38)
        filtered = tl.where(sort_key(x, SHIFT) >= threshold, (x - top) * inverse, float("-inf"))
    pointers = out_ptr + row * stride_out_row + token.to(tl.int64) * stride_out_vocab
    tl.store(pointers, filtered, mask=token < vocab_size)


def filter_into(out: Array, logits: Array, filters: tuple[Array, ...]) -> None:
    """``filters``: temperature, top-k, top-p and min-p of each row, contiguous."""
    num_rows, vocab_size = logits.shape
    found = scan(logits, filters, None)
    threshold = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    common = {"TILES": found.padded_tiles, "SHIFT": IDLE_BITS[logits.dtype], "CHUNK": CHUNK, "COLS": COLS}
    _threshold_kernel[(num_rows,)](
        logits, *filters, *found[:4], *make_scratch(logits), threshold, *logits.stride(), vocab_size, found.num_tiles,
        **common, **SIZES, CHUNKS=found.padded_chunks, TILE_ALL=TILE_ALL, num_warps=choose_warps(found.padded_chunks),
    )  # fmt: skip
    _apply_kernel[(num_rows * found.num_tiles,)](
        logits, filters[0], found.tile_max, threshold, out, *logits.stride(), *out.stride(),
        vocab_size, found.num_tiles, **common, num_warps=4,
    )  # fmt: skip
