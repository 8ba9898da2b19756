"""flash_attention, in Triton. What the technique is for: `reference/attention/flash_attention.py`.

A program owns a tile of queries of one head and lets the keys of its sequence pass, as ``attend_query_tile`` of the
reference does. Only the tiles that the mask cuts are masked.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor as Array
from triton.tools.tensor_descriptor import TensorDescriptor

from fast._checks import require_same_device, require_shape
from fast._triton import softmax
from fast._triton.platform import INTERPRETING, is_hopper
from fast._triton.rounding import dot, store, to_dtype
from fast.attention._checks import require_attention, require_cu_seqlens

# Numbers that differ from batch to batch: no kernel of its own for one that is 1 or a multiple of 16.
COUNTS = ("window", "num_tokens", "total_keys", "num_seqs", "num_heads", "num_slots", "group")
SEARCH = 128  # sequences that a program looks through at a time for its own


class Tiles(NamedTuple):
    """How a launch cuts its work."""

    tile_q: int
    tile_kv: int
    num_warps: int
    num_stages: int


def choose_tiles(head_dim: int, itemsize: int, tokens_per_seq: float) -> Tiles:
    """Tiles by the shape of the work: small where sequences have few queries, and where the head is wide.

    64x64 leaves room for two programs a processor, the softmax of one beside the products of the other: faster than one
    with tiles of 128. float32 runs without tensor cores, a thread holding whole rows of its operands in registers. In
    the interpreter a program costs milliseconds whatever its size, so there are few.
    """
    if INTERPRETING:
        return Tiles(128, 64, 4, 1)
    if itemsize == 4:
        return Tiles(32, 32, 8, 1) if head_dim <= 64 else Tiles(16, 16, 8, 1)
    if tokens_per_seq <= 16:
        return Tiles(16, 32, 4, 3)
    if head_dim > 128:
        return Tiles(64, 64, 8, 2)
    return Tiles(64, 64, 4, 3)


def choose_kernel(q: Array, k: Array, v: Array, tokens_per_seq: float, plain: bool) -> str:
    """Which kernel: "hopper", or the portable one, which fetches K and V by "descriptors" or by "pointers".

    Descriptors are for the copy engine (TMA), which takes aligned rows of a power of two. ``plain``: no window, no cap.
    """
    head_dim, itemsize = q.shape[2], q.element_size()
    if head_dim < 16 or head_dim & (head_dim - 1) or not len(k) or not rows_are_aligned(k) or not rows_are_aligned(v):
        return "pointers"
    hopper = plain and head_dim == 128 and itemsize == 2 and tokens_per_seq > 64
    return "hopper" if hopper and rows_are_aligned(q) and is_hopper(q) else "descriptors"


def rows_are_aligned(x: Array) -> bool:
    """Whether a token's heads lie end to end, and tokens at multiples of 16 bytes."""
    return x.stride(1) == x.shape[2] and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


@triton.jit
def find_tile(slot, cu_seqlens_q_ptr, num_seqs, TILE_Q: tl.constexpr, SEARCH: tl.constexpr):
    """The sequence that owns this slot, and which of its tiles of queries the slot is.

    Sequence s has the slots from ``cu_seqlens_q[s] // TILE_Q + s``: enough for its tiles wherever it begins, so nothing
    has to be counted on the host. The last of them may be one too many.
    """
    before = 0
    for first in range(0, num_seqs, SEARCH):
        seq = first + tl.arange(0, SEARCH)
        start = tl.load(cu_seqlens_q_ptr + seq, mask=seq < num_seqs, other=0)
        owned = (start // TILE_Q + seq <= slot) & (seq < num_seqs)
        before += tl.sum(owned.to(tl.int32), 0)
    seq = tl.maximum(before - 1, 0)
    return seq, slot - (tl.load(cu_seqlens_q_ptr + seq) // TILE_Q + seq).to(tl.int32)


@triton.jit
def rows_of(cu_seqlens_ptr, seq, num_rows):
    """First row and number of rows of a sequence; inside the array, whatever the offsets say."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + seq), 0), num_rows).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + seq + 1), first), num_rows).to(tl.int32)
    return first, end - first


@triton.jit
def load_tile(
    x, first_row, kv_head, num_rows, stride_token, stride_head,
    HEAD_DIM: tl.constexpr, TILE_KV: tl.constexpr, TILE_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[TILE_KV, TILE_D] of K or V, from row ``first_row`` of the packed array; 0 from row ``num_rows`` on.

    A descriptor knows only where the array ends: rows before that may be another sequence's.
    """
    if DESCRIPTORS:
        tile = x.load([first_row, kv_head * TILE_D])
    else:
        row = first_row + tl.arange(0, TILE_KV)
        dim = tl.arange(0, TILE_D)
        pointers = x + row.to(tl.int64)[:, None] * stride_token + kv_head.to(tl.int64) * stride_head + dim[None, :]
        tile = tl.load(pointers, mask=(row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def attend_tiles(
    q, acc, top, total, k, v, first_key, kv_head, num_keys, start, stop, seen_first, seen_end, queries, window,
    scale, scale_log2, logit_cap, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    RAGGED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr, TILE_KV: tl.constexpr, TILE_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Let the keys from ``start`` to ``stop`` pass, a tile at a time; every query sees ``seen_first`` to ``seen_end``.

    RAGGED: the sequence may end in the tile.
    """
    for first in range(start, stop, TILE_KV):
        k_tile = load_tile(
            k, first_key + first, kv_head, first_key + num_keys, stride_k_token, stride_k_head,
            HEAD_DIM, TILE_KV, TILE_D, DESCRIPTORS,
        )  # fmt: skip
        scores = dot(q, tl.trans(k_tile), tl.zeros([q.shape[0], TILE_KV], tl.float32))
        if CAPPED:
            scores = softmax.cap_scores(scores, scale, logit_cap)
        if RAGGED or CAUSAL or WINDOWED:  # noqa: SIM102 (known when compiled, unlike the next)
            if RAGGED or (first < seen_first) or (first + TILE_KV > seen_end):
                keys = first + tl.arange(0, TILE_KV)
                scores = softmax.hide(scores, queries, keys, num_keys, window, CAUSAL, WINDOWED)
        top, total, rescale, weights = softmax.update(scores, top, total, scale_log2)
        acc = acc * rescale[:, None]
        v_tile = load_tile(
            v, first_key + first, kv_head, first_key + num_keys, stride_v_token, stride_v_head,
            HEAD_DIM, TILE_KV, TILE_D, DESCRIPTORS,
        )  # fmt: skip
        if RAGGED:  # a weight of 0 times another sequence's NaN would be NaN
            v_tile = tl.where((first + tl.arange(0, TILE_KV) < num_keys)[:, None], v_tile, 0.0)
        acc = dot(to_dtype(weights, v_tile.dtype), v_tile, acc)
    return acc, top, total


@triton.jit(do_not_specialize=COUNTS)
def flash_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k,  # [num_keys, num_kv_heads, head_dim], a pointer or a descriptor
    v,
    out_ptr,  # [num_tokens, num_heads, head_dim]
    lse_ptr,  # [num_tokens, num_heads]
    sinks_ptr,  # [num_heads]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    cu_seqlens_k_ptr,  # [num_seqs + 1]
    scale,
    logit_cap,
    window,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    num_tokens,
    total_keys,
    num_seqs,
    num_heads,
    num_slots,
    group,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TILE_D: tl.constexpr,
    SEARCH: tl.constexpr,
):
    # Heads first, because those of a group share their keys in the L2 cache; the last tile of a sequence, which sees
    # the most keys, before its others, so that the launch ends with short programs.
    program = tl.program_id(0)
    head = program % num_heads
    seq, tile = find_tile(num_slots - 1 - program // num_heads, cu_seqlens_q_ptr, num_seqs, TILE_Q, SEARCH)
    first_query, num_queries = rows_of(cu_seqlens_q_ptr, seq, num_tokens)
    first_key, num_keys = rows_of(cu_seqlens_k_ptr, seq, total_keys)
    if (tile < 0) | (tile >= num_slots) | (tile * TILE_Q >= num_queries):  # the first two: the offsets are none
        return
    kv_head = head // group
    row = tile * TILE_Q + tl.arange(0, TILE_Q)
    dim = tl.arange(0, TILE_D)
    in_rows, in_dims = row < num_queries, dim < HEAD_DIM
    token = (first_query + row).to(tl.int64)
    q_offset = token[:, None] * stride_q_token + head.to(tl.int64) * stride_q_head + dim[None, :]
    q = tl.load(q_ptr + q_offset, mask=in_rows[:, None] & in_dims[None, :], other=0.0)

    queries = row + num_keys - num_queries  # positions: the last query stands at the last key
    first_position = tile * TILE_Q + num_keys - num_queries
    last_position = tl.minimum(tile * TILE_Q + TILE_Q, num_queries) - 1 + num_keys - num_queries

    # Keys seen by any query, from ``start`` to ``stop``, and those seen by every query, from ``seen_first`` to
    # ``seen_end``. The whole tiles of the sequence pass first, then its ragged end.
    start, stop, seen_first, seen_end = 0, num_keys, 0, num_keys
    if CAUSAL:
        stop, seen_end = last_position + 1, first_position + 1
    if WINDOWED:
        start = tl.maximum(first_position - window + 1, 0) // TILE_KV * TILE_KV
        seen_first = last_position - window + 1
        if not CAUSAL:
            stop, seen_end = tl.minimum(stop, last_position + window), first_position + window
    whole = num_keys // TILE_KV * TILE_KV
    whole_stop = tl.minimum(stop, whole)

    scale_log2 = scale * softmax.LOG2E
    if CAPPED:
        scale_log2 = softmax.LOG2E * 1.0
    top, total = softmax.empty(TILE_Q)
    if SINKS:
        top, total = softmax.empty_with_sink(tl.load(sinks_ptr + head), TILE_Q)
    acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
    for RAGGED in tl.static_range(2):
        acc, top, total = attend_tiles(
            q, acc, top, total, k, v, first_key, kv_head, num_keys, whole if RAGGED else start,
            stop if RAGGED else whole_stop, seen_first, seen_end, queries, window,
            scale, scale_log2, logit_cap, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
            RAGGED, CAUSAL, WINDOWED, CAPPED, HEAD_DIM, TILE_KV, TILE_D, DESCRIPTORS,
        )  # fmt: skip

    factor, lse = softmax.finish(top, total)
    out_offset = token[:, None] * stride_out_token + head.to(tl.int64) * stride_out_head + dim[None, :]
    store(out_ptr + out_offset, acc * factor[:, None], in_rows[:, None] & in_dims[None, :])
    tl.store(lse_ptr + token * num_heads + head, lse, mask=in_rows)


def flash_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_keys num_kv_heads head_dim"],
    v: Float[Array, "num_keys num_kv_heads head_dim"],
    cu_seqlens_q: Int32[Array, " num_seqs_plus_1"],
    cu_seqlens_k: Int32[Array, " num_seqs_plus_1"],
    *,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    logit_cap: float | None = None,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_heads"]]:
    """Same contract as `reference.attention.flash_attention.flash_attention`.

    Grid: one program per head and tile of ``TILE_Q`` queries of a sequence, and at most one idle one per head and
    sequence; it owns those rows of the output and of ``lse``.
    Moves: q and the output once; a sequence's K and V once a tile of queries, from the L2 cache for all but the first
    of the programs that pass them at the same time.
    Limits: q, k and v in one dtype and contiguous along ``head_dim``, or they are copied first.
    """
    op = "flash_attention"
    require_shape(op, "k", k, (None, None, None))  # type: ignore[reportArgumentType]
    scale = require_attention(
        op, q, k, v, scale=scale, sliding_window=sliding_window, sinks=sinks, logit_cap=logit_cap, out=out
    )
    require_same_device(op, q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    require_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, len(q))
    require_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, len(k))
    require_shape(op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))  # type: ignore[reportArgumentType]
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, sliding_window, sinks, logit_cap, out)


def attend(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    causal: bool,
    scale: float,
    sliding_window: int | None,
    sinks: Array | None,
    logit_cap: float | None,
    out: Array | None,
) -> tuple[Array, Array]:
    """`flash_attention` of arguments that have been checked."""
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None or out.stride(2) != 1 else out
    num_seqs = len(cu_seqlens_q) - 1
    if len(q) and num_seqs:
        if not q.dtype == k.dtype == v.dtype:
            wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
        q, scale = softmax.positive_scale(q, scale)
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        offsets = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        tokens_per_seq = len(q) / num_seqs
        kernel = choose_kernel(q, k, v, tokens_per_seq, plain=sliding_window is None and logit_cap is None)
        if kernel == "hopper":
            from fast.attention.flash_attention_hopper import attend_on_hopper

            attend_on_hopper(q, k, v, *offsets, causal, scale, sinks, result, lse)
        else:
            tiles = choose_tiles(q.shape[2], q.element_size(), tokens_per_seq)
            descriptors = kernel == "descriptors"
            _attend(q, k, v, *offsets, causal, scale, sliding_window, sinks, logit_cap, result, lse, tiles, descriptors)
    if out is not None and result is not out:
        return out.copy_(result), lse
    return result, lse


def _attend(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    causal: bool,
    scale: float,
    sliding_window: int | None,
    sinks: Array | None,
    logit_cap: float | None,
    out: Array,
    lse: Array,
    tiles: Tiles,
    descriptors: bool,
) -> None:
    """Fill ``out`` and ``lse``, with the portable kernel."""
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = len(cu_seqlens_q) - 1
    num_slots = num_tokens // tiles.tile_q + num_seqs
    TILE_D = max(16, triton.next_power_of_2(head_dim))
    k_tiles, v_tiles = k, v
    if descriptors:
        k_tiles, v_tiles = (
            TensorDescriptor(x, [len(x), x.shape[1] * head_dim], [x.stride(0), 1], [tiles.tile_kv, TILE_D])
            for x in (k, v)
        )
    flash_attention_kernel[(num_slots * num_heads,)](
        q,
        k_tiles,
        v_tiles,
        out,
        lse,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        scale,
        logit_cap or 0.0,
        min(sliding_window or 0, 2**30),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1)),
        *(num_tokens, len(k), num_seqs, num_heads, num_slots, num_heads // k.shape[1]),
        CAUSAL=causal,
        WINDOWED=sliding_window is not None,
        CAPPED=logit_cap is not None,
        SINKS=sinks is not None,
        DESCRIPTORS=descriptors,
        HEAD_DIM=head_dim,
        TILE_Q=tiles.tile_q,
        TILE_KV=tiles.tile_kv,
        TILE_D=TILE_D,
        SEARCH=SEARCH,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
