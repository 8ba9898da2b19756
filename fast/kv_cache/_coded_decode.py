"""Decodes over a cache of small codes in float16 and bfloat16: a warp a KV head, lane by lane.

A decode over codes is bound by memory only if few instructions touch a code: nothing moves from lane to lane but the
weights, nothing waits for another warp, and nothing is dequantized. How a page of 16 keys is read and multiplied:
`_coded_page.py`. Here: the passing of pages, how parts of a cut segment are put together, and the kernel. The schedule
is `fast/_triton/paging.py`'s.

Queries are divided by a power of two near their largest number, so that they are float16s. Weights are relative not to
the largest weight but to the largest weight times its value's scale, so that the products are float16s as well: a score
and the logarithm of a scale have a common top.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton import merging, paging, softmax
from fast._triton.lanes import from_lane, from_other, largest_of, load_number, rescaled, some, store_number, sum_of
from fast._triton.platform import INTERPRETED
from fast.attention._cached_tiles import PER_BATCH
from fast.kv_cache._coded_page import (
    COLUMNS,
    PAGE,
    add_values,
    channel_of,
    exponent_of,
    load_keys,
    load_queries,
    load_values,
    scales_of,
    scores_of,
)

LOWEST = tl.constexpr(-3.0e38)  # a top before any key: finite, as its difference to a score must be a number
HEADROOM = tl.constexpr(14.0)  # weights times scales are at most 2^14
SMALLEST_LOG2 = tl.constexpr(-64.0)  # of a value's scale: smaller ones, and 0, count as that in the top
FEW_PARTS = tl.constexpr(2)  # of a cut segment, loaded at a time

# ---- softmax ----------------------------------------------------------------------------------------------------


@triton.jit
def key_of(page, row, THREADS: tl.constexpr):
    """The key that a lane has the scores of, in row g (0) or g + 8 (8)."""
    return page * PAGE + row + tl.arange(0, THREADS) % 32 // 4


@triton.jit
def hide(scores, page, position, sliding_window, WINDOWED: tl.constexpr):
    """-inf for the scores, of both rows, of keys that the query of a column does not see."""
    hidden = ()
    for i in tl.static_range(2):
        key = key_of(page, 8 * i, position.shape[0])
        seen = key <= position
        if WINDOWED:
            seen = seen & (key > position - sliding_window)
        hidden = hidden + (tl.where(seen, scores[i], float("-inf")),)
    return hidden


@triton.jit
def zero_scales(scales, page, lowest, end, NUM_GROUPS: tl.constexpr):
    """0 for the scales and zeros of values that are none."""
    new = ()
    for i in tl.static_range(len(scales)):
        key = key_of(page, i // NUM_GROUPS % 2 * 8, scales[i].shape[0])
        new = new + (tl.where((key >= lowest) & (key < end), scales[i], 0.0),)
    return new


@triton.jit
def zero_codes(codes, page, lowest, end):
    """0 for the codes, words of four tokens by turns, of values that are none."""
    new = ()
    for i in tl.static_range(len(codes)):
        key = page * PAGE + i % 2 + i % 4 // 2 * 8 + tl.arange(0, codes[i].shape[0]) % 4 * 2
        new = new + (tl.where((key >= lowest) & (key < end), codes[i], 0),)
    return new


@triton.jit
def log2_of(scales, FIRST: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """Of the largest scale of a row, from the FIRST on. (NaN, of a negative scale, counts as the smallest.)"""
    largest = scales[FIRST]
    for group in tl.static_range(1, NUM_GROUPS):
        largest = tl.maximum(largest, scales[FIRST + group])
    if INTERPRETED:
        log2 = tl.log2(tl.maximum(largest, 1e-38))
    else:
        asm: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        log2 = tl.inline_asm_elementwise(asm, "=f,f", [largest], tl.float32, is_pure=True, pack=1)
    return tl.maximum(log2, SMALLEST_LOG2)


@triton.jit
def update(upper, lower, log_upper, log_lower, top, total, scale_log2):
    """`softmax.update` for one column, whose two scores a lane has and the logarithms of their values' scales; the
    total is that of this lane's rows."""
    largest = tl.maximum(upper * scale_log2 + log_upper, lower * scale_log2 + log_lower)
    new_top = tl.maximum(top, largest_of(largest) - HEADROOM)
    rescale = tl.exp2(top - new_top)
    upper, lower = tl.exp2(upper * scale_log2 - new_top), tl.exp2(lower * scale_log2 - new_top)
    return upper, lower, new_top, total * rescale + upper + lower, rescale


# ---- pages ------------------------------------------------------------------------------------------------------


@triton.jit
def load_id(row_ptr, stride_table_block, page, last, BLOCK_SIZE: tl.constexpr):
    """The block of a page, as the table has it; of the last page for those after it, which are only loaded ahead."""
    return tl.load(row_ptr + tl.minimum(page, last) * PAGE // BLOCK_SIZE * stride_table_block)


@triton.jit
def find_page(
    block_id, page, last, num_blocks, stride_block, stride_scale_block, stride_token: tl.constexpr,
    stride_scale_token: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Where a page begins in the codes, and in the scales: in a block that exists, whatever the table says."""
    block = tl.minimum(tl.maximum(block_id, 0), num_blocks - 1)
    offset = tl.minimum(page, last) * PAGE % BLOCK_SIZE
    in_scales = paging.times_stride(block, stride_scale_block) + offset * stride_scale_token
    return paging.times_stride(block, stride_block) + offset * stride_token, in_scales


@triton.jit
def attend_pages(
    q, sums0, sums1, unit0, unit1, position0, position1, start, stop, lowest, whole_from, whole_to, end,
    row_ptr, stride_table_block, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr,
    scale, logit_cap, sliding_window, stride_cache_block, stride_scale_block, num_blocks,
    stride_cache_token: tl.constexpr, stride_scale_token: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    CODES: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, K_VECTOR: tl.constexpr, V_VECTOR: tl.constexpr,
    NUM_GROUPS: tl.constexpr, SCALE_WORDS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Let pages ``start`` to ``stop`` pass; there are the keys ``lowest`` to ``end``, and every query sees those from
    ``whole_from`` to ``whole_to``.

    A page may hold keys that are none, of which scales may be NaN, and float8s. Returns the sums of values, all in one
    unit, and (top, total) of both columns.
    """
    WORDS: tl.constexpr = BYTES // 8  # of codes
    FACTORS: tl.constexpr = (2 if k_zero_ptr is None else 4) * SCALE_WORDS  # words of scales and zeros
    UNIT: tl.constexpr = 2.0 ** exponent_of(CODES, NIBBLES - 1)
    SUMS: tl.constexpr = NIBBLES * BYTES // 4  # of values; weights times zeros come after them
    lane = tl.arange(0, unit0.shape[0]) % 32
    g, c = lane // 4, lane % 4
    k_rows = k_ptr + (g * stride_cache_token + K_VECTOR * c)
    v_rows = v_ptr + (2 * c * stride_cache_token + V_VECTOR * g)
    k_scales, v_scales = k_scale_ptr + g * stride_scale_token, v_scale_ptr + g * stride_scale_token
    k_zeros = None if k_zero_ptr is None else k_zero_ptr + g * stride_scale_token
    v_zeros = None if v_zero_ptr is None else v_zero_ptr + g * stride_scale_token
    last = tl.maximum(end - 1, 0) // PAGE
    top0, total0 = tl.full(unit0.shape, LOWEST, tl.float32), tl.zeros(unit0.shape, tl.float32)
    top1, total1 = top0, total0
    accs = ()
    for _ in tl.static_range(SUMS + (0 if k_zero_ptr is None else 2 * NUM_GROUPS)):
        accs = accs + (tl.zeros(unit0.shape, tl.float32),)
    if CAPPED:
        scale0 = tl.full(unit0.shape, softmax.LOG2E, tl.float32)
        scale1 = scale0
    else:
        scale0, scale1 = unit0 * (UNIT * scale * softmax.LOG2E), unit1 * (UNIT * scale * softmax.LOG2E)

    # Each is loaded as soon as what it replaces has been used, half a page and more before it is used itself.
    block_id = load_id(row_ptr, stride_table_block, start, last, BLOCK_SIZE)
    in_codes, in_scales = find_page(
        block_id, start, last, num_blocks, stride_cache_block, stride_scale_block, stride_cache_token,
        stride_scale_token, BLOCK_SIZE,
    )  # fmt: skip
    keys = load_keys(
        k_rows + in_codes, k_scales + in_scales, None if k_zeros is None else k_zeros + in_scales,
        stride_cache_token, stride_scale_token, BYTES, K_VECTOR, SCALE_WORDS,
    )  # fmt: skip
    values = load_values(
        v_rows + in_codes, v_scales + in_scales, None if v_zeros is None else v_zeros + in_scales,
        stride_cache_token, stride_scale_token, BYTES, V_VECTOR, SCALE_WORDS,
    )  # fmt: skip
    block_id = load_id(row_ptr, stride_table_block, start + 1, last, BLOCK_SIZE)
    for page in tl.range(start, stop, num_stages=1):
        next_id = load_id(row_ptr, stride_table_block, page + 2, last, BLOCK_SIZE)
        s0, s1, s2, s3 = scores_of(
            q, sums0, sums1, some(keys, 0, WORDS), scales_of(some(keys, WORDS, FACTORS)),
            CODES, BYTES, NIBBLES, K_VECTOR, NUM_GROUPS,
        )  # fmt: skip
        if CAPPED:
            s0 = softmax.cap_scores(s0 * (unit0 * UNIT), scale, logit_cap)
            s1 = softmax.cap_scores(s1 * (unit1 * UNIT), scale, logit_cap)
            s2 = softmax.cap_scores(s2 * (unit0 * UNIT), scale, logit_cap)
            s3 = softmax.cap_scores(s3 * (unit1 * UNIT), scale, logit_cap)
        codes, factors = some(values, 0, WORDS), scales_of(some(values, WORDS, FACTORS))
        if (page * PAGE < whole_from) | ((page + 1) * PAGE > whole_to):
            s0, s2 = hide((s0, s2), page, position0, sliding_window, WINDOWED)
            s1, s3 = hide((s1, s3), page, position1, sliding_window, WINDOWED)
            factors = zero_scales(factors, page, lowest, end, NUM_GROUPS)
            if CODES == "fp8":
                codes = zero_codes(codes, page, lowest, end)
        if page + 1 < stop:
            in_codes, in_scales = find_page(
                block_id, page + 1, last, num_blocks, stride_cache_block, stride_scale_block, stride_cache_token,
                stride_scale_token, BLOCK_SIZE,
            )  # fmt: skip
            keys = load_keys(
                k_rows + in_codes, k_scales + in_scales, None if k_zeros is None else k_zeros + in_scales,
                stride_cache_token, stride_scale_token, BYTES, K_VECTOR, SCALE_WORDS,
            )  # fmt: skip

        log_upper, log_lower = log2_of(factors, 0, NUM_GROUPS), log2_of(factors, NUM_GROUPS, NUM_GROUPS)
        w0, w2, top0, total0, rescale0 = update(s0, s2, log_upper, log_lower, top0, total0, scale0)
        w1, w3, top1, total1, rescale1 = update(s1, s3, log_upper, log_lower, top1, total1, scale1)
        accs = rescaled(accs, rescale0, rescale1)
        accs = add_values(accs, w0, w1, w2, w3, codes, factors, CODES, BYTES, NIBBLES, NUM_GROUPS, SPLIT)
        if page + 1 < stop:
            in_codes, in_scales = find_page(
                block_id, page + 1, last, num_blocks, stride_cache_block, stride_scale_block, stride_cache_token,
                stride_scale_token, BLOCK_SIZE,
            )  # fmt: skip
            values = load_values(
                v_rows + in_codes, v_scales + in_scales, None if v_zeros is None else v_zeros + in_scales,
                stride_cache_token, stride_scale_token, BYTES, V_VECTOR, SCALE_WORDS,
            )  # fmt: skip
        block_id = next_id

    sums = ()
    for i in tl.static_range(SUMS):
        acc = accs[i]
        if SPLIT:
            acc = acc + from_other(acc, 2)
        acc = acc * 2.0 ** exponent_of(CODES, i * NIBBLES // SUMS)
        if k_zero_ptr is not None:
            acc += sum_of(accs[SUMS + 2 * (i * NUM_GROUPS // SUMS) + i % 2])
        sums = sums + (acc,)
    return sums, top0, top1, sum_of(total0), sum_of(total1)


# ---- parts of a cut segment -------------------------------------------------------------------------------------


@triton.jit
def store_part(sums, top0, top1, total0, total1, place, parts_ptr, stats_ptr):
    """Leave a part at its place in the scratch, a register of all lanes after another."""
    THREADS: tl.constexpr = top0.shape[0]
    thread = tl.arange(0, THREADS)
    of_part = parts_ptr + place.to(tl.int64) * (len(sums) * THREADS) + thread
    for i in tl.static_range(len(sums)):
        store_number(of_part, i * THREADS, sums[i], thread >= 0)
    of_stats = stats_ptr + place.to(tl.int64) * (THREADS // 2) + (thread // 32 * 4 + thread % 4)
    first = thread % 32 < 4  # whose columns other lanes have too
    for i in tl.static_range(4):
        store_number(of_stats, i * (THREADS // 8), (top0, top1, total0, total1)[i], first)


@triton.jit
def merge_parts(first, last, parts_ptr, stats_ptr, sums, top0, top1, total0, total1):
    """What the programs from ``first`` to ``last`` left of a segment, merged in order, in the place of one's own."""
    THREADS: tl.constexpr = top0.shape[0]
    COUNT: tl.constexpr = len(sums)
    thread = tl.arange(0, THREADS)
    top0, total0 = tl.full(top0.shape, LOWEST, tl.float32), tl.zeros(top0.shape, tl.float32)
    top1, total1 = top0, total0
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros(top0.shape, tl.float32),)
    for step in tl.range(first, last + 1, FEW_PARTS, num_stages=1):
        parts = ()
        for i in tl.static_range(FEW_PARTS):
            there = thread * 0 + (step + i) <= last
            place = ((step + i) * 2 + tl.where(step + i == first, 1, 0)).to(tl.int64)
            of_stats = stats_ptr + place * (THREADS // 2) + (thread // 32 * 4 + thread % 4)
            for k in tl.static_range(4):
                empty = LOWEST if k < 2 else 0.0
                parts = parts + (load_number(of_stats, k * (THREADS // 8), there, empty),)
            of_part = parts_ptr + place * (COUNT * THREADS) + thread
            for k in tl.static_range(COUNT):
                parts = parts + (load_number(of_part, k * THREADS, there, 0.0),)
        for i in tl.static_range(FEW_PARTS):
            stats = some(parts, (4 + COUNT) * i, 4)
            new_top0, new_top1 = tl.maximum(top0, stats[0]), tl.maximum(top1, stats[1])
            old0, old1 = tl.exp2(top0 - new_top0), tl.exp2(top1 - new_top1)
            new0, new1 = tl.exp2(stats[0] - new_top0), tl.exp2(stats[1] - new_top1)
            top0, top1, total0, total1 = (
                new_top0,
                new_top1,
                total0 * old0 + stats[2] * new0,
                total1 * old1 + stats[3] * new1,
            )
            added = rescaled(some(parts, (4 + COUNT) * i + 4, COUNT), new0, new1)
            sums, merged = rescaled(sums, old0, old1), ()
            for k in tl.static_range(COUNT):
                merged = merged + (sums[k] + added[k],)
            sums = merged
    return sums, top0, top1, total0, total1


@triton.jit
def store_column(sums, COLUMN: tl.constexpr, top, total, out_row, there, sink, stride_out_dim, VECTOR: tl.constexpr):
    """Divide one of a lane's two columns by its total, a sink counted in, and store it."""
    if sink is not None:
        new_top = tl.maximum(top, sink.to(tl.float32) * softmax.LOG2E)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.exp2(sink.to(tl.float32) * softmax.LOG2E - new_top)
    else:
        rescale = 1.0
    factor = rescale / tl.where(total > 0, total, 1.0)  # a query without keys: 0 / 1
    for i in tl.static_range(len(sums) // 2):
        channel = channel_of(i, VECTOR, top.shape[0])
        store_number(out_row + channel * stride_out_dim, 0, sums[2 * i + COLUMN] * factor, there)


# ---- the kernel -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=PER_BATCH)
def coded_decode_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim / 2], words of two numbers
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, words], of four bytes
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups], or words of two numbers
    k_zero_ptr,  # likewise, or None
    v_scale_ptr,
    v_zero_ptr,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr, stats_ptr, counters_ptr,  # the scratch of merging.py
    scale,
    logit_cap,
    sliding_window,
    stride_q_token, stride_q_head,  # in words
    stride_cache_block, stride_cache_token: tl.constexpr, stride_cache_head,  # of both caches, in words
    stride_scale_block, stride_scale_token: tl.constexpr, stride_scale_head,  # of all scales and zeros
    stride_table_seq, stride_table_block,
    stride_out_token, stride_out_head, stride_out_dim,
    num_tokens,
    num_seqs,
    num_bundles,  # of HEADS KV heads
    num_blocks,
    max_blocks_per_seq,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    DTYPE: tl.constexpr,
    CODES: tl.constexpr,
    BYTES: tl.constexpr,
    NIBBLES: tl.constexpr,
    K_VECTOR: tl.constexpr,
    V_VECTOR: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    lane, warp = tl.arange(0, 32 * HEADS) % 32, tl.arange(0, 32 * HEADS) // 32
    c = lane % 4
    program = tl.program_id(0)
    capacity = max_blocks_per_seq * BLOCK_SIZE
    line, num_workers, begin, end, seq, seq_begin = paging.find_share(
        program, tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity, num_bundles,
        sliding_window, QUERIES, PAGE, WINDOWED,
    )  # fmt: skip
    merging.store_rows_without_keys(
        program, tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity,
        num_bundles * HEADS * GROUP, tl.arange(0, BYTES * NIBBLES), out_ptr, stride_out_token, stride_out_head,
        stride_out_dim, BYTES * NIBBLES, QUERIES,
    )  # fmt: skip
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, capacity
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, sliding_window, QUERIES, PAGE, WINDOWED)
        if unit >= seq_begin + per_head * num_bundles:
            seq_begin += per_head * num_bundles
            seq += 1
        else:
            bundle, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, sliding_window, QUERIES, PAGE, WINDOWED
            )
            if unit < seg_end:
                kv_head = bundle * HEADS + warp
                query, head, there = paging.query_of(lane // 4, tile, QUERIES, GROUP, COLS)
                there = there & (query < num_queries)
                in_q = (first_row + query).to(tl.int64) * stride_q_token + (kv_head * GROUP + head) * stride_q_head
                q, sums, column_unit = load_queries(
                    q_ptr + tl.where(there, in_q, 0), there, DTYPE, CODES, BYTES, NIBBLES, K_VECTOR, NUM_GROUPS
                )
                sums0, sums1 = (), ()
                for group in tl.static_range(NUM_GROUPS):
                    sums0 = sums0 + (from_lane(sums[group], 8 * c),)
                    sums1 = sums1 + (from_lane(sums[group], 8 * c + 4),)
                context = seq_len - num_queries
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                query0, _, _ = paging.query_of(2 * c, tile, QUERIES, GROUP, COLS)
                query1, _, _ = paging.query_of(2 * c + 1, tile, QUERIES, GROUP, COLS)
                lowest = paging.oldest_key(context + tile * QUERIES, sliding_window, WINDOWED)
                whole_from = paging.oldest_key(last_key - 1, sliding_window, WINDOWED)
                head64 = kv_head.to(tl.int64)
                in_cache, in_scales = head64 * stride_cache_head, head64 * stride_scale_head
                sums, top0, top1, total0, total1 = attend_pages(
                    q, sums0, sums1, from_lane(column_unit, 8 * c), from_lane(column_unit, 8 * c + 4),
                    context + query0, context + query1, first_tile + unit - seg_begin,
                    first_tile + tl.minimum(end, seg_end) - seg_begin,
                    lowest, whole_from, context + tile * QUERIES + 1, last_key,
                    block_table_ptr + seq.to(tl.int64) * stride_table_seq, stride_table_block,
                    k_cache_ptr + in_cache, v_cache_ptr + in_cache,
                    k_scale_ptr + in_scales, None if k_zero_ptr is None else k_zero_ptr + in_scales,
                    v_scale_ptr + in_scales, None if v_zero_ptr is None else v_zero_ptr + in_scales,
                    scale, logit_cap, sliding_window, stride_cache_block, stride_scale_block, num_blocks,
                    stride_cache_token, stride_scale_token,
                    WINDOWED, CAPPED, CODES, BYTES, NIBBLES, K_VECTOR, V_VECTOR, NUM_GROUPS, SCALE_WORDS, BLOCK_SIZE,
                    COLS < COLUMNS,
                )  # fmt: skip

                complete = (seg_begin >= begin) & (seg_end <= end)
                if (seg_begin < begin) | (seg_end > end):
                    store_part(
                        sums, top0, top1, total0, total1, program * 2 + (seg_begin >= begin).to(tl.int32), parts_ptr,
                        stats_ptr,
                    )  # fmt: skip
                    complete = merging.is_last(seg_begin, seg_end, line, num_workers, counters_ptr)
                    if complete:
                        sums, top0, top1, total0, total1 = merge_parts(
                            paging.worker_of(seg_begin, num_workers, line),
                            paging.worker_of(seg_end - 1, num_workers, line),
                            parts_ptr, stats_ptr, sums, top0, top1, total0, total1,
                        )  # fmt: skip
                if complete:
                    for e in tl.static_range(2):
                        query, head, there = paging.query_of(2 * c + e, tile, QUERIES, GROUP, COLS)
                        there = there & (2 * c + e < COLS) & (query < num_queries)
                        head = kv_head * GROUP + head
                        sink = None if sinks_ptr is None else tl.load(sinks_ptr + head, mask=there, other=0.0)
                        in_out = (first_row + query).to(tl.int64) * stride_out_token + head * stride_out_head
                        store_column(
                            sums, e, top0 if e == 0 else top1, total0 if e == 0 else total1, out_ptr + in_out, there,
                            sink, stride_out_dim, V_VECTOR,
                        )  # fmt: skip
            unit = tl.minimum(following, end)
