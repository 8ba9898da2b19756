"""What the rotary kernels do with some heads, of one token or several: find, load, norm, turn and store them.

A *row* is a head of a token. Rows go to programs as they come, whichever token they are of, so that programs are full
with any number of heads.
"""

import triton
import triton.language as tl

from fast._triton.platform import next_power_of_2
from fast._triton.rounding import to_dtype, to_dtype_saturating

# Numbers a program turns at once, and those a thread holds of them: a load of 16 bytes of each half of a head.
TILE_SIZE = 2048
PER_THREAD = 16


def choose_tile(head_dim: int) -> tuple[int, int]:
    """(rows, warps) of a program; a row is a head of a token, so a program may end in the middle of a token. By the
    width of a head alone: then it is summed in the same order, and has the same bits, in any batch."""
    width = next_power_of_2(head_dim)
    rows = max(TILE_SIZE // width, 1)
    return rows, min(max(rows * width // (32 * PER_THREAD), 1), 16)


@triton.jit
def token_and_head(program, num_heads, TILE_ROWS: tl.constexpr):
    """Of each row of a program. Tokens past the last are rows that do not exist."""
    row = program * TILE_ROWS + tl.arange(0, TILE_ROWS)
    return (row // num_heads).to(tl.int64), (row % num_heads).to(tl.int64)


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, positions_ptr,
    stride_cos_row, stride_cos_pair, stride_sin_row, stride_sin_pair, stride_positions,
    token, num_tokens, max_positions, half_dim,
    HALF: tl.constexpr,
):  # fmt: skip
    """The angles of each row's token, [rows, HALF]; zeros for a position that has none.

    A token's heads read the same row of a table, but from the nearest cache: no layout has to change to share it.
    """
    position = tl.load(positions_ptr + token * stride_positions, mask=token < num_tokens).to(tl.int64)
    pair = tl.arange(0, HALF)
    mask = ((position >= 0) & (position < max_positions))[:, None] & (pair < half_dim)[None, :]
    cos_ptrs = cos_ptr + (position * stride_cos_row)[:, None] + (pair * stride_cos_pair)[None, :]
    sin_ptrs = sin_ptr + (position * stride_sin_row)[:, None] + (pair * stride_sin_pair)[None, :]
    return tl.load(cos_ptrs, mask=mask, other=0.0), tl.load(sin_ptrs, mask=mask, other=0.0)


@triton.jit
def turn_heads(
    first, second,  # of each pair, [rows, HALF]; loaded before the angles, which wait for the positions
    in_ptrs, out_ptrs,  # the first number of each head, [rows]
    stride_in_dim, stride_out_dim,
    exist, written,  # which heads do, and which are, [rows]
    cos, sin,  # [rows, HALF]
    norm_ptr, stride_norm, eps,  # [head_dim]; or None
    half_dim, head_dim,
    HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Norm, turn and store. HALF and REST hold the pairs and the features past them; REST is 0 if there are none."""
    if REST:
        dim = 2 * half_dim + tl.arange(0, REST)
        rest = load_heads(in_ptrs, dim, stride_in_dim, exist, dim < head_dim)
    if norm_ptr is not None:
        pair = tl.arange(0, HALF)
        at_first, at_second = _place(pair, half_dim, 0, INTERLEAVED), _place(pair, half_dim, 1, INTERLEAVED)
        first_norm = _load_norm(norm_ptr, at_first, stride_norm, pair < half_dim)
        second_norm = _load_norm(norm_ptr, at_second, stride_norm, pair < half_dim)
        square = tl.sum(first * first + second * second, axis=1)
        if REST:
            square += tl.sum(rest * rest, axis=1)
        inverse_rms = tl.rsqrt(square / head_dim + eps)[:, None]
        first *= inverse_rms * first_norm
        second *= inverse_rms * second_norm
        if REST:
            rest *= inverse_rms * _load_norm(norm_ptr, dim, stride_norm, dim < head_dim)

    first, second = first * cos - second * sin, second * cos + first * sin
    COMPUTED: tl.constexpr = in_ptrs.dtype.element_ty
    first, second = as_stored(first, out_ptrs, COMPUTED), as_stored(second, out_ptrs, COMPUTED)
    _store_pairs(out_ptrs, stride_out_dim, first, second, written, half_dim, HALF, INTERLEAVED)
    if REST:
        store_heads(out_ptrs, dim, stride_out_dim, as_stored(rest, out_ptrs, COMPUTED), written, dim < head_dim)


@triton.jit
def as_stored(x, ptrs, COMPUTED: tl.constexpr):
    """Rounded to the dtype of what was computed; saturating, where a cache has another."""
    rounded = to_dtype(x, COMPUTED)
    if ptrs.dtype.element_ty != COMPUTED:
        rounded = to_dtype_saturating(rounded.to(tl.float32), ptrs.dtype.element_ty)
    return rounded


@triton.jit
def _place(pair, half_dim, WHICH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where in a head the first (0) or the second (1) number of each pair lies."""
    return 2 * pair + WHICH if INTERLEAVED else pair + WHICH * half_dim


@triton.jit
def load_pairs(ptrs, stride_dim, exist, half_dim, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(first, second) of each pair, [rows, HALF] each."""
    if INTERLEAVED:  # read as they lie, then parted: loads of every other number would be half as wide
        dim = tl.arange(0, 2 * HALF)
        pairs = load_heads(ptrs, dim, stride_dim, exist, dim < 2 * half_dim)
        first, second = tl.split(tl.reshape(pairs, [pairs.shape[0], HALF, 2]))
    else:
        pair = tl.arange(0, HALF)
        first = load_heads(ptrs, pair, stride_dim, exist, pair < half_dim)
        second = load_heads(ptrs, pair + half_dim, stride_dim, exist, pair < half_dim)
    return first, second


@triton.jit
def _store_pairs(ptrs, stride_dim, first, second, written, half_dim, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        dim = tl.arange(0, 2 * HALF)
        pairs = tl.reshape(tl.join(first, second), [first.shape[0], 2 * HALF])
        store_heads(ptrs, dim, stride_dim, pairs, written, dim < 2 * half_dim)
    else:
        pair = tl.arange(0, HALF)
        store_heads(ptrs, pair, stride_dim, first, written, pair < half_dim)
        store_heads(ptrs, pair + half_dim, stride_dim, second, written, pair < half_dim)


@triton.jit
def load_heads(ptrs, dim, stride_dim, exist, in_head):
    mask = exist[:, None] & in_head[None, :]
    offset = (dim.to(tl.int64) * stride_dim)[None, :]
    return tl.load(ptrs[:, None] + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_heads(ptrs, dim, stride_dim, values, written, in_head):
    mask = written[:, None] & in_head[None, :]
    tl.store(ptrs[:, None] + (dim.to(tl.int64) * stride_dim)[None, :], values, mask=mask)


@triton.jit
def _load_norm(norm_ptr, dim, stride_norm, in_head):
    return tl.load(norm_ptr + dim * stride_norm, mask=in_head).to(tl.float32)[None, :]
