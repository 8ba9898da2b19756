"""Attention over a cache of small codes: int8, fp8, int4. The schedule is `fast/_triton/paging.py`'s.

A decode over codes is bound by instructions before it is bound by memory, so as few as possible touch a code. Decodes
of ordinary shapes have a kernel of their own, `_coded_decode.py`. Here: the general one, and the launches. How that one
multiplies codes as they are: `_planes.py`. How tiles of them pass: `_coded_tiles.py`.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast._triton import merging, paging, softmax
from fast._triton.platform import INTERPRETING, num_processors
from fast.attention._cached_tiles import LONGEST_WINDOW
from fast.attention._checks import require_attention, require_tables
from fast.kv_cache._coded_decode import coded_decode_kernel
from fast.kv_cache._coded_page import COLUMNS, PAGE
from fast.kv_cache._coded_tiles import attend_coded_tiles
from fast.kv_cache._planes import joined, joined_numbers, load_planes

PARTS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2}  # float16s that add up to one number


class Tiles(NamedTuple):
    """How a launch cuts its work."""

    heads: int  # KV heads that a program takes together
    queries: int  # of a sequence that it takes together
    tile_q: int  # rows of each KV head: at least the queries times the heads of a group
    tile_kv: int
    num_warps: int
    num_stages: int
    programs_per_processor: int


def choose_tiles(num_tokens: int, num_seqs: int, group: int, num_kv_heads: int, head_dim: int, parts: int) -> Tiles:
    """By the mean number of rows of a sequence, known from shapes alone: few for decodes, many for chunks.

    A decode takes up to four KV heads together, a warp each: a warp that has a head to itself never waits for another
    one's maximum or weights, and the scales of neighbouring heads share sectors.
    """
    rows = triton.next_power_of_2(-(-num_tokens // max(num_seqs, 1)) * group)
    tile_q = max(min(max(rows, 8), 16), triton.next_power_of_2(group))
    heads = heads_together(num_kv_heads)
    queries = 1 if num_tokens <= num_seqs else tile_q // group
    tile_kv = 16 if head_dim > 128 or parts == 2 else 32
    return Tiles(heads, queries, tile_q, tile_kv, heads, 5, 8 // heads)


class DecodeTiles(NamedTuple):
    """How a launch of the kernel for decodes cuts its work."""

    queries: int  # of a sequence that a warp takes together
    columns: int  # for them and the heads of a group
    heads: int  # KV heads of a program, a warp each
    k_vector: int  # words of codes that a lane loads at a time
    v_vector: int
    warps_per_processor: int = 12
    max_registers: int = 168  # of a thread


def choose_decode(
    num_tokens: int,
    num_seqs: int,
    group: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    codes: str,
    num_groups: int,
) -> DecodeTiles | None:
    """How the kernel for decodes takes a batch; None if it does not.

    It takes two-byte floats, blocks of whole pages, heads whose groups of scales fill loads of all lanes, and batches
    in which the mean sequence has no more rows than a product has columns. (Where a zero may cancel most of a value,
    and queries are float16, half of the columns hold what weights lose to rounding.)
    """
    columns = COLUMNS.value // 2 if codes == "int4" and dtype == torch.float16 else COLUMNS.value
    group_bytes = min(head_dim // num_groups, head_dim // 2 if codes == "int4" else head_dim)
    k_vector, v_vector = min(4, group_bytes // 16), min(4, group_bytes // 32)
    whole = block_size % PAGE.value == 0 and head_dim in (64, 128) and num_groups in (1, 2, 4) and v_vector > 0
    if not whole or PARTS[dtype] > 1 or num_tokens * group > columns * num_seqs:
        return None
    queries = 1 if num_tokens <= num_seqs else columns // group
    return DecodeTiles(queries, columns, heads_together(num_kv_heads), k_vector, v_vector)


def heads_together(num_kv_heads: int) -> int:
    """KV heads that a program takes together, a warp each."""
    return 4 if num_kv_heads % 4 == 0 else 2 if num_kv_heads % 2 == 0 else 1


@triton.jit
def rows_of(tile, kv_head, row, first_row, num_queries, GROUP: tl.constexpr, QUERIES: tl.constexpr):
    """(query, row of q, head, whether there is such a row) of rows of several KV heads' tiles; both broadcast."""
    query = tile * QUERIES + row // GROUP + 0 * kv_head
    there = (row < QUERIES * GROUP) & (query < num_queries)
    return query, (first_row + query).to(tl.int64), kv_head * GROUP + row % GROUP, there


@triton.jit
def coded_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, words]
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups]
    k_zero_ptr,  # likewise, or None
    v_scale_ptr,
    v_zero_ptr,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr,  # the scratch of merging.py
    stats_ptr,
    counters_ptr,
    scale,
    logit_cap,
    window,
    stride_q_token,
    stride_q_head,
    stride_q_dim,
    stride_cache_block,  # of both caches, in words
    stride_cache_token,
    stride_cache_head,
    stride_scale_block,  # of all scales and zeros
    stride_scale_token,
    stride_scale_head,
    stride_scale_group,
    stride_table_seq,
    stride_table_block,
    stride_out_token,
    stride_out_head,
    stride_out_dim,
    num_tokens,
    num_seqs,
    num_bundles,  # of HEADS KV heads
    num_blocks,
    max_blocks_per_seq,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    CODES: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PAIRED: tl.constexpr,
    BYTES: tl.constexpr,
    NIBBLES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):
    PLANES: tl.constexpr = BYTES * NIBBLES
    ROWS: tl.constexpr = HEADS * TILE_Q
    program = tl.program_id(0)
    capacity = max_blocks_per_seq * BLOCK_SIZE
    line, num_workers, begin, end, seq, seq_begin = paging.find_share(
        program, tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_bundles,
        window, QUERIES, TILE_KV, WINDOWED,
    )  # fmt: skip
    dim = joined_numbers(HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
    merging.store_rows_without_keys(
        program, tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity,
        num_bundles * HEADS * GROUP, dim, out_ptr, stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, QUERIES,
    )  # fmt: skip
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED)
        if unit >= seq_begin + per_head * num_bundles:
            seq_begin += per_head * num_bundles
            seq += 1
        else:
            bundle, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, window, QUERIES, TILE_KV, WINDOWED
            )
            if unit < seg_end:
                h, m = tl.arange(0, HEADS)[:, None], tl.arange(0, TILE_Q)[None, :]
                _, token, head, there = rows_of(tile, bundle * HEADS + h, m, first_row, num_queries, GROUP, QUERIES)
                q_rows = q_ptr + token * stride_q_token + head * stride_q_head
                planes, q_unit = load_planes(
                    q_rows, stride_q_dim, there, HEAD_DIM, BYTES, NIBBLES, HEADS, TILE_Q, TILE_WORDS
                )  # fmt: skip
                context = seq_len - num_queries
                positions = context + tile * QUERIES
                if QUERIES > 1:
                    positions = positions + tl.arange(0, TILE_Q) // GROUP
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                first_head = (bundle * HEADS).to(tl.int64)
                in_cache, in_scales = first_head * stride_cache_head, first_head * stride_scale_head
                accs, top, total = attend_coded_tiles(
                    planes, q_unit, positions, first_tile + unit - seg_begin,
                    first_tile + tl.minimum(end, seg_end) - seg_begin,
                    paging.oldest_key(context + tile * QUERIES, window, WINDOWED), last_key,
                    block_table_ptr + seq.to(tl.int64) * stride_table_seq, stride_table_block,
                    k_cache_ptr + in_cache, v_cache_ptr + in_cache,
                    k_scale_ptr + in_scales, None if k_zero_ptr is None else k_zero_ptr + in_scales,
                    v_scale_ptr + in_scales, None if v_zero_ptr is None else v_zero_ptr + in_scales,
                    scale, logit_cap, window, stride_cache_block, stride_cache_token, stride_cache_head,
                    stride_scale_block, stride_scale_token, stride_scale_head, stride_scale_group,
                    num_blocks,
                    WINDOWED, CAPPED, CODES, PARTS, NUM_GROUPS, PAIRED, BYTES, NIBBLES, BLOCK_SIZE, HEAD_DIM,
                    HEADS, QUERIES, TILE_Q, TILE_KV, TILE_WORDS,
                )  # fmt: skip
                row = tl.arange(0, ROWS)
                _, token, head, there = rows_of(
                    tile, bundle * HEADS + row % HEADS, row // HEADS, first_row, num_queries, GROUP, QUERIES
                )
                merging.finish_segment(
                    joined(accs, ROWS, PLANES * TILE_WORDS),
                    tl.permute(top, (1, 0)).reshape(ROWS), tl.permute(total, (1, 0)).reshape(ROWS),
                    seg_begin, seg_end, begin, end, line, num_workers, program, parts_ptr,
                    stats_ptr, counters_ptr, out_ptr, sinks_ptr, token, head, there, dim,
                    stride_out_token, stride_out_head, stride_out_dim, HEAD_DIM, ROWS, PLANES * TILE_WORDS,
                )  # fmt: skip
            unit = tl.minimum(following, end)


def attend_codes(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scales: tuple[Tensor, Tensor],
    zeros: tuple[Tensor, Tensor] | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    codes: str,
    sliding_window: int | None,
    sinks: Tensor | None,
    logit_cap: float | None,
    out: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention over a cache of codes, arrays of which have been checked against each other.

    Grid: as `paged_attention`, with more programs a processor: what waits is hidden by what computes.
    Moves: each sequence's codes, scales and zeros once for each of its tiles of rows; queries and result once.
    Limits: arrays of keys and values should have the same strides, and codes lie end to end; others are copied, all of
    the cache. Words of 16 bits need heads of an even number of bytes; others are loaded a byte at a time, slowly.
    """
    nibbles = 2 if codes == "int4" else 1
    num_blocks, block_size, num_kv_heads, head_bytes = k_cache.shape
    head_dim = head_bytes * nibbles
    stand_in = q.new_empty(()).expand(num_blocks, block_size, num_kv_heads, head_dim)  # for the checks
    options = {"scale": scale, "sliding_window": sliding_window, "sinks": sinks, "logit_cap": logit_cap, "out": out}
    scale = require_attention(op, q, stand_in, stand_in, names=("k_cache", "v_cache"), **options)
    require_tables(op, len(q), num_blocks, block_size, block_table, seq_lens, cu_seqlens_q, sliding_window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if len(q) == 0 or num_blocks == 0:
        return out.zero_()
    q, scale = softmax.positive_scale(q, scale)
    k_cache, v_cache = _alike(k_cache, v_cache, dense=True)
    k_scale, v_scale, *zeros_alike = _alike(*scales, *(zeros or ()))
    k_zero, v_zero = zeros_alike or (None, None)
    places = head_bytes, k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.stride()[:3]
    bytes_of_word = 2 if all(place % 2 == 0 for place in places) else 1
    word = tl.int16 if bytes_of_word == 2 else tl.int8

    num_tokens, num_heads, _ = q.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    num_groups, group = 1 if k_scale.ndim == 3 else k_scale.shape[3], num_heads // num_kv_heads
    shape = num_tokens, num_seqs, group, num_kv_heads, q.dtype, head_dim, block_size, codes, num_groups
    decode = choose_decode(*shape)
    arrays = (k_cache, v_cache), (k_scale, k_zero, v_scale, v_zero)
    if decode is not None and max_blocks_per_seq > 0 and lie_in_words(*arrays):
        tables = block_table, seq_lens.contiguous(), cu_seqlens_q.contiguous()
        options = {"codes": codes, "num_groups": num_groups, "sliding_window": sliding_window, "logit_cap": logit_cap}
        sinks = None if sinks is None else sinks.contiguous()
        _decode(q, *arrays, *tables, decode, scale=scale, sinks=sinks, out=out, **options)
        return out
    tiles = choose_tiles(num_tokens, num_seqs, group, num_kv_heads, head_dim, PARTS[q.dtype])
    tile_words = max(16, triton.next_power_of_2(head_bytes // bytes_of_word))
    num_programs = 3 if INTERPRETING else num_processors(q) * tiles.programs_per_processor
    rows = tiles.heads * tiles.tile_q
    scratch = merging.make_scratch(q, num_programs, rows, tile_words * bytes_of_word * nibbles)

    cache_strides = [stride // bytes_of_word for stride in k_cache.stride()[:3]]
    arrays, scale_strides = (k_scale, k_zero, v_scale, v_zero), (*k_scale.stride(), 0)[:4]
    paired = k_zero is not None and num_groups % 2 == 0 and scale_strides[3] == 1
    if paired and not any(
        place % 4 for place in (*(x.data_ptr() for x in arrays), *(2 * x for x in scale_strides[:3]))
    ):
        scale_strides = tuple(stride // 2 for stride in scale_strides)
        arrays = tuple(triton.reinterpret(x, tl.int32) for x in arrays)
    else:
        paired = False
    coded_attention_kernel[(num_programs,)](
        q, triton.reinterpret(k_cache, word), triton.reinterpret(v_cache, word), *arrays,
        block_table, seq_lens.contiguous(), cu_seqlens_q.contiguous(),
        None if sinks is None else sinks.contiguous(), out,
        *scratch, scale, logit_cap or 0.0, min(sliding_window or 0, LONGEST_WINDOW),
        *q.stride(), *cache_strides, *scale_strides, *block_table.stride(), *out.stride(),
        num_tokens, num_seqs, num_kv_heads // tiles.heads, num_blocks, max_blocks_per_seq,
        WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None, CODES=codes, PARTS=PARTS[q.dtype],
        NUM_GROUPS=num_groups, PAIRED=paired, BYTES=bytes_of_word, NIBBLES=nibbles, GROUP=group, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, HEADS=tiles.heads, QUERIES=tiles.queries, TILE_Q=tiles.tile_q, TILE_KV=tiles.tile_kv,
        TILE_WORDS=tile_words, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


def in_words(x: Tensor, size: int) -> bool:
    """Whether rows of an array begin where that many bytes can be loaded at once, and no stride is too large."""
    places = x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])
    return all(place % size == 0 for place in places) and all(0 <= stride < 2**31 for stride in x.stride())


def lie_in_words(caches: tuple[Tensor, Tensor], scales: tuple[Tensor | None, ...]) -> bool:
    """Whether codes and scales lie as the kernel for decodes loads them, which is all of a token's scales at once."""
    for x in scales:
        if x is not None:
            num_groups, stride_group = (x.shape[3], x.stride(3)) if x.ndim == 4 else (1, 1)
            if not in_words(x, num_groups * x.element_size()) or (num_groups > 1 and stride_group != 1):
                return False
    return all(in_words(x, 16) for x in caches)


def _decode(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    tiles: DecodeTiles,
    *,
    codes: str,
    num_groups: int,
    scale: float,
    sliding_window: int | None,
    sinks: Tensor | None,
    logit_cap: float | None,
    out: Tensor,
) -> None:
    """Launch the kernel for decodes."""
    if q.stride(2) != 1 or not in_words(q, 16):
        q = q.contiguous()
    cache, scale_strides = caches[0], scales[0].stride()[:3]
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, head_bytes = cache.shape
    num_seqs, max_blocks_per_seq = block_table.shape
    if num_groups > 1:  # float16s by twos
        scales = tuple(None if x is None else triton.reinterpret(x, tl.int32) for x in scales)
        scale_strides = tuple(stride // 2 for stride in scale_strides)
    num_programs = 3 if INTERPRETING else num_processors(q) * (tiles.warps_per_processor // tiles.heads)
    scratch = merging.make_scratch(q, num_programs, tiles.heads * COLUMNS.value, head_dim)
    coded_decode_kernel[(num_programs,)](
        *(triton.reinterpret(x, tl.int32) for x in (q, *caches)), *scales,
        block_table, seq_lens, cu_seqlens_q, sinks, out, *scratch,
        scale, logit_cap or 0.0, min(sliding_window or 0, LONGEST_WINDOW),
        *(stride // 2 for stride in q.stride()[:2]), *(stride // 4 for stride in cache.stride()[:3]), *scale_strides,
        *block_table.stride(), *out.stride(),
        num_tokens, num_seqs, num_kv_heads // tiles.heads, num_blocks, max_blocks_per_seq,
        WINDOWED=sliding_window is not None, CAPPED=logit_cap is not None,
        DTYPE=tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float16, CODES=codes, BYTES=head_bytes,
        NIBBLES=head_dim // head_bytes, K_VECTOR=tiles.k_vector, V_VECTOR=tiles.v_vector, NUM_GROUPS=num_groups,
        SCALE_WORDS=max(1, num_groups // 2), GROUP=num_heads // num_kv_heads, BLOCK_SIZE=block_size,
        QUERIES=tiles.queries, COLS=tiles.columns, HEADS=tiles.heads, num_warps=tiles.heads,
        maxnreg=tiles.max_registers,
    )  # fmt: skip


def _alike(*arrays: Tensor, dense: bool = False) -> tuple[Tensor, ...]:
    """Arrays of one shape with the same strides (dense: the last of them 1): themselves, or contiguous copies."""
    same = all(array.stride() == arrays[0].stride() for array in arrays[1:])
    if same and (not dense or arrays[0].stride(-1) == 1):
        return arrays
    return tuple(array.contiguous() for array in arrays)
