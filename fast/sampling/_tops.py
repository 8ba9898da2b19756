"""The kernels of `log_probs`, and the n best of each row, which `beam_scores` needs too.

A tile gives up its n best one by one (n maxima over numbers that stay in registers), and a row's n best are among its
tiles' n best. Equals come out in the order of their tokens, the padding of a tile never.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor as Array

from fast._triton.platform import cdiv, next_power_of_2
from fast.sampling._keys import from_key, sort_key
from fast.sampling._scan import CHUNK, COLS, load_tile

MAX_TOP = 64  # beyond, a sort of the row costs less than that many maxima
TAKEN = tl.constexpr(-2147483648)  # a key below that of -inf


@triton.jit
def _tile_tops_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    token_ids_ptr,  # [num_rows]
    tile_max_ptr,  # [num_rows, num_tiles]
    tile_mass_ptr,  # [num_rows, num_tiles], relative to it
    tile_better_ptr,  # [num_rows, num_tiles], how many logits are greater than the token's
    tile_top_keys_ptr,  # [num_rows, num_tiles, num_top]
    tile_top_ids_ptr,  # [num_rows, num_tiles, num_top]
    stride_logits_row,
    stride_logits_vocab,
    vocab_size,
    num_tiles,
    num_top,
    RANKED: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
):
    here = tl.program_id(0).to(tl.int64)
    row = here // num_tiles
    tile = (tl.program_id(0) % num_tiles).to(tl.int32)
    logits_row_ptr = logits_ptr + row * stride_logits_row
    x, token = load_tile(logits_row_ptr, stride_logits_vocab, tile, vocab_size, CHUNK, COLS)

    top = tl.max(tl.max(x, axis=0), axis=0)
    mass = tl.exp(x - top)  # of a tile without a finite logit this is no number, and `row_log_sum` does not ask for it
    tl.store(tile_max_ptr + here, top)
    tl.store(tile_mass_ptr + here, tl.sum(tl.sum(mass, axis=0), axis=0))
    if RANKED:
        asked = tl.load(token_ids_ptr + row)
        exists = (asked >= 0) & (asked < vocab_size)
        logit = tl.load(logits_row_ptr + asked * stride_logits_vocab, mask=exists, other=float("-inf")).to(tl.float32)
        better = (x > logit).to(tl.int32)
        tl.store(tile_better_ptr + here, tl.sum(tl.sum(better, axis=0), axis=0))

    key = tl.where(token < vocab_size, sort_key(x, 0), TAKEN)
    for j in range(num_top):
        best = tl.max(tl.max(key, axis=0), axis=0)
        first = tl.where(key == best, token, 2147483647)
        chosen = tl.min(tl.min(first, axis=0), axis=0)
        tl.store(tile_top_keys_ptr + here * num_top + j, best)
        tl.store(tile_top_ids_ptr + here * num_top + j, chosen)
        key = tl.where(token == chosen, TAKEN, key)


@triton.jit
def row_log_sum(tile_max_ptr, tile_mass_ptr, row, num_tiles, TILES: tl.constexpr):
    """The best logit of a row, and the logarithm of its mass relative to it."""
    tile = tl.arange(0, TILES)
    inside = tile < num_tiles
    tops = tl.load(tile_max_ptr + row * num_tiles + tile, mask=inside, other=float("-inf"))
    masses = tl.load(tile_mass_ptr + row * num_tiles + tile, mask=inside)
    top = tl.max(tops, axis=0)
    return top, tl.log(tl.sum(tl.where(tops > float("-inf"), masses * tl.exp(tops - top), 0.0), axis=0))


@triton.jit
def load_tops(keys_ptr, ids_ptr, row, num_tiles, num_top, ENTRIES: tl.constexpr):
    """The best of all of a row's tiles: keys and tokens."""
    i = tl.arange(0, ENTRIES)
    inside = i < num_tiles * num_top
    key = tl.load(keys_ptr + row * (num_tiles * num_top) + i, mask=inside, other=-2147483648)
    token = tl.load(ids_ptr + row * (num_tiles * num_top) + i, mask=inside)
    return key, token


@triton.jit
def _log_probs_kernel(
    logits_ptr,  # [num_rows, vocab_size]
    token_ids_ptr,  # [num_rows]
    tile_max_ptr,  # [num_rows, num_tiles]
    tile_mass_ptr,  # [num_rows, num_tiles]
    tile_better_ptr,  # [num_rows, num_tiles]
    tile_top_keys_ptr,  # [num_rows, num_tiles, num_top]
    tile_top_ids_ptr,  # [num_rows, num_tiles, num_top]
    logprob_ptr,  # [num_rows]
    rank_ptr,  # [num_rows]
    top_ids_ptr,  # [num_rows, num_top]
    top_logprobs_ptr,  # [num_rows, num_top]
    log_sum_ptr,  # [num_rows], of the whole row
    stride_logits_row,
    stride_logits_vocab,
    vocab_size,
    num_tiles,
    num_top,
    TILES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top, log_sum = row_log_sum(tile_max_ptr, tile_mass_ptr, row, num_tiles, TILES)
    asked = tl.load(token_ids_ptr + row)
    exists = (asked >= 0) & (asked < vocab_size)
    pointer = logits_ptr + row * stride_logits_row + asked * stride_logits_vocab
    logit = tl.load(pointer, mask=exists, other=float("-inf")).to(tl.float32)
    tl.store(logprob_ptr + row, (logit - top) - log_sum)
    tl.store(log_sum_ptr + row, top + log_sum)
    tile = tl.arange(0, TILES)
    better = tl.load(tile_better_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=0)
    tl.store(rank_ptr + row, 1 + tl.sum(better, axis=0))

    key, token = load_tops(tile_top_keys_ptr, tile_top_ids_ptr, row, num_tiles, num_top, ENTRIES)
    for j in range(num_top):
        best = tl.max(key, axis=0)
        chosen = tl.min(tl.where(key == best, token, 2147483647), axis=0)
        tl.store(top_ids_ptr + row * num_top + j, chosen.to(tl.int64))
        tl.store(top_logprobs_ptr + row * num_top + j, (from_key(best, 0) - top) - log_sum)
        key = tl.where(token == chosen, TAKEN, key)


def tile_tops(logits: Array, token_ids: Array | None, num_top: int) -> tuple[Array, ...]:
    """Of each tile: best logit, mass, how many are better than the token, keys and tokens of the ``num_top`` best."""
    num_rows, vocab_size = logits.shape
    num_tiles = cdiv(vocab_size, CHUNK * COLS)
    shape, floats = (num_rows, num_tiles), {"dtype": torch.float32, "device": logits.device}
    ints = {"dtype": torch.int32, "device": logits.device}
    tops = (
        *(torch.empty(shape, **floats) for _ in range(2)),
        torch.empty(shape, **ints),
        *(torch.empty((*shape, num_top), **ints) for _ in range(2)),
    )
    if num_rows:
        _tile_tops_kernel[(num_rows * num_tiles,)](
            logits, logits if token_ids is None else token_ids, *tops, *logits.stride(), vocab_size, num_tiles, num_top,
            RANKED=token_ids is not None, CHUNK=CHUNK, COLS=COLS, num_warps=4,
        )  # fmt: skip
    return tops


def log_probs(logits: Array, token_ids: Array, num_top: int) -> tuple[Array, Array, Array, Array]:
    num_rows, vocab_size = logits.shape
    num_maxima = num_top if num_top <= MAX_TOP else 0
    tops = tile_tops(logits, token_ids, num_maxima)
    num_tiles, device = tops[0].shape[1], logits.device
    logprob, log_sum = torch.empty(num_rows, device=device), torch.empty(num_rows, device=device)
    rank = torch.empty(num_rows, dtype=torch.int32, device=device)
    top_ids = torch.empty(num_rows, num_maxima, dtype=torch.int64, device=device)
    top_logprobs = torch.empty(num_rows, num_maxima, device=device)
    if num_rows:
        _log_probs_kernel[(num_rows,)](
            logits, token_ids, *tops, logprob, rank, top_ids, top_logprobs, log_sum, *logits.stride(),
            vocab_size, num_tiles, num_maxima, TILES=next_power_of_2(num_tiles),
            ENTRIES=next_power_of_2(max(num_tiles * num_maxima, 1)),
        )  # fmt: skip
    if num_maxima < num_top:
        values, ids = logits.float().sort(dim=1, descending=True, stable=True)
        top_ids = ids[:, :num_top].contiguous()
        top_logprobs = values[:, :num_top] - log_sum[:, None]
    return logprob, rank, top_ids, top_logprobs
