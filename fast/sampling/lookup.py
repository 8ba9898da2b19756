"""Prompt look-up, in Triton. What the technique is for: `reference/sampling/lookup.py`."""

import torch
import triton
import triton.language as tl
from jaxtyping import Int32
from torch import Tensor as Array

from fast._checks import require, require_dtype, require_range, require_same_device, require_shape
from fast._triton.platform import INTERPRETING, cdiv, next_power_of_2, require_runnable
from fast.sampling._values import require_per_row

TILE_ENDS = 16 if INTERPRETING else 1024  # places of a history that a program tries


@triton.jit
def _match_kernel(
    history_ptr,  # [num_seqs, max_history]
    history_lens_ptr,  # [num_seqs]
    best_ptr,  # [num_seqs, num_tiles]: length of the match (0: there is none) * 2**32 + where it ends
    stride_history_seq,
    stride_history_token,
    max_history,
    max_ngram,
    num_tiles,
    TILE: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64) // num_tiles
    tile = (tl.program_id(0) % num_tiles).to(tl.int32)
    history_ptr += seq * stride_history_seq
    length = tl.minimum(tl.load(history_lens_ptr + seq), max_history)
    end = tile * TILE + tl.arange(0, TILE)  # an occurrence that ends before it is followed by its token
    matches = (end > 0) & (end < length)
    matched = tl.zeros([TILE], tl.int32)
    n = 0
    while (n < max_ngram) & (tl.max(matches.to(tl.int32), axis=0) > 0):
        matches = matches & (end > n)
        pointers = history_ptr + (end - n - 1).to(tl.int64) * stride_history_token
        token = tl.load(pointers, mask=matches)
        last = tl.load(history_ptr + (length - n - 1).to(tl.int64) * stride_history_token)  # n <= end < length
        matches = matches & (token == last)
        matched += matches.to(tl.int32)
        n += 1
    best = tl.max((matched.to(tl.int64) << 32) + end.to(tl.int64), axis=0)
    tl.store(best_ptr + seq * num_tiles + tile, best)


@triton.jit
def _follow_kernel(
    history_ptr,  # [num_seqs, max_history]
    history_lens_ptr,  # [num_seqs]
    best_ptr,  # [num_seqs, num_tiles]
    drafts_ptr,  # [num_seqs, num_draft]
    stride_history_seq,
    stride_history_token,
    max_history,
    min_ngram,
    num_draft,
    num_tiles,
    TILES: tl.constexpr,
    TILE_DRAFT: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    history_ptr += seq * stride_history_seq
    length = tl.minimum(tl.load(history_lens_ptr + seq), max_history)
    tile = tl.arange(0, TILES)
    best = tl.max(tl.load(best_ptr + seq * num_tiles + tile, mask=tile < num_tiles, other=0), axis=0)
    end = tl.where((best >> 32) >= min_ngram, best & 0xFFFFFFFF, length.to(tl.int64))
    i = tl.arange(0, TILE_DRAFT)
    token = tl.load(history_ptr + (end + i) * stride_history_token, mask=end + i < length, other=-1)
    tl.store(drafts_ptr + seq * num_draft + i, token, mask=i < num_draft)


def lookup(
    history: Int32[Array, "num_seqs max_history"],
    history_lens: Int32[Array, " num_seqs"],
    *,
    max_ngram: int,
    min_ngram: int = 1,
    num_draft: int,
) -> Int32[Array, "num_seqs num_draft"]:
    """Same contract as `reference.sampling.lookup.lookup`.

    Grid: one program per ``TILE_ENDS`` places of a sequence, where it follows all matches backwards at once and stops
    when none is left; then one a sequence, for the longest and latest. Moves: a history once for each token of the
    match, from cache after the first.
    """
    op = "lookup"
    require_shape(op, "history", history, (None, None))  # type: ignore[reportArgumentType]
    require_dtype(op, "history", history, torch.int32)
    num_seqs, max_history = history.shape
    require_per_row(op, num_seqs, torch.int32, history_lens=history_lens)
    require_range(op, "history_lens", history_lens, 0, max_history + 1)
    require(1 <= min_ngram <= max_ngram, op, "min_ngram", f"1 to max_ngram = {max_ngram}", min_ngram)
    require(num_draft >= 0, op, "num_draft", "at least 0", num_draft)
    require_same_device(op, history=history, history_lens=history_lens)
    require_runnable(op, "history", history)
    drafts = torch.empty(num_seqs, num_draft, dtype=torch.int32, device=history.device)
    if max_history == 0:
        return drafts.fill_(-1)
    if drafts.numel():
        num_tiles = cdiv(max_history, TILE_ENDS)
        best = torch.empty(num_seqs, num_tiles, dtype=torch.int64, device=history.device)
        history_lens, strides = history_lens.contiguous(), history.stride()
        _match_kernel[(num_seqs * num_tiles,)](
            history, history_lens, best, *strides, max_history, max_ngram, num_tiles, TILE=TILE_ENDS
        )
        _follow_kernel[(num_seqs,)](
            history, history_lens, best, drafts, *strides, max_history, min_ngram, num_draft, num_tiles,
            TILES=next_power_of_2(num_tiles), TILE_DRAFT=next_power_of_2(num_draft), num_warps=1,
        )  # fmt: skip
    return drafts
