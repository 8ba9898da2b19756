"""KIVI's attention for decodes, in float16 and bfloat16: a warp a KV head, lane by lane. The schedule is `paging.py`'s.

A decode over codes of 2 bits is bound by instructions and by waiting, long before it is bound by memory. What costs
most is not arithmetic but moving numbers between the layouts that products want. So here nothing is ever moved: `lanes`
says what a lane holds of a product's operands, and a lane takes the channels, and the tokens, whose codes lie side by
side.

- A product takes a page of 16 keys of one group. Keys times queries: the keys are rows, and 8 queries are columns.
  `_kivi_products.py` has the products with codes.
- Weights are the transpose of scores; that is one instruction, ``movmatrix``.
- Tiles of two pages pass through the memory of the warp, `_kivi_tile.py`: a register that waits for memory is one less
  for another warp, and only other warps hide how long everything here waits for everything else.

A program is a few warps, with neighbouring KV heads: none waits for another, but what lies side by side in memory is
read at about the same time.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton import merging, paging, softmax
from fast._triton.lanes import (
    commit_copies,
    from_lane,
    from_other,
    largest_of,
    load_words,
    packed,
    pair,
    product,
    product_at,
    rescaled,
    some,
    store_number,
    sum_of,
    transposed,
    wait_for_copies,
    warp_memory,
)
from fast.kv_cache._kivi_products import COLUMNS, add_values, below_one, code_scores, scaled_by, zero_scores
from fast.kv_cache._kivi_tile import (
    PAGE,
    PAGES,
    TILE,
    TOKEN,
    copy_tile,
    load_ids,
    places_of_lanes,
    read_channels,
    tile_groups,
    tile_words,
)

FEW_PARTS = tl.constexpr(4)  # of a cut sequence, loaded at a time
LOWEST = tl.constexpr(-3.0e38)  # a top before any key: finite, as its difference to a score must be a number


# ---- keys ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_queries(q_rows, there, PIECES: tl.constexpr):
    """The words of a lane's channels, of its column's query; zeros where there is none."""
    c = tl.arange(0, there.shape[0]) % 4
    words = ()
    for j in tl.static_range(PIECES):
        four = load_words(q_rows + (16 * j + 4 * c), 4)
        for i in tl.static_range(4):
            words = words + (tl.where(there, four[i], 0),)
    return words


@triton.jit
def update(scores, top, total, scale_log2):
    """`softmax.update` for one column: scores of several rows, as a tuple; the total is that of this lane's rows."""
    largest = scores[0]
    for i in tl.static_range(1, len(scores)):
        largest = tl.maximum(largest, scores[i])
    new_top = tl.maximum(top, largest_of(largest) * scale_log2)
    rescale = tl.exp2(top - new_top)
    total = total * rescale
    weights = ()
    for i in tl.static_range(len(scores)):
        weight = tl.exp2(scores[i] * scale_log2 - new_top)
        total += weight
        weights = weights + (weight,)
    return weights, new_top, total, rescale


@triton.jit
def copy_first_tiles(
    memory, start, stop, lowest, last, row_ptr, stride_table_block, num_blocks, sources, targets, block_strides,
    stride_cache_token: tl.constexpr, stride_k_scale_group: tl.constexpr, stride_v_scale_token: tl.constexpr,
    BITS: tl.constexpr, PIECES: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Let the tiles be copied that `attend_old_tiles` begins with; (the memory, the blocks of the tile after them)."""
    wait_for_copies(0)  # whatever was read before is read
    ids = load_ids(row_ptr, stride_table_block, start, lowest, last, BLOCK_SIZE)
    for stage in tl.static_range(STAGES - 1):
        next_ids = load_ids(row_ptr, stride_table_block, start + stage + 1, lowest, last, BLOCK_SIZE)
        if start + stage < stop:
            memory = copy_tile(
                memory, stage * tile_words(BITS, PIECES, GROUP_SIZE), ids, start + stage, lowest, last, num_blocks,
                sources, targets, block_strides, stride_cache_token, stride_k_scale_group, stride_v_scale_token,
                BITS, PIECES, NUM_GROUPS, BLOCK_SIZE, GROUP_SIZE,
            )  # fmt: skip
        commit_copies()
        ids = next_ids
    return memory, ids


@triton.jit
def attend_old_tiles(
    q, accs, top0, top1, total0, total1, memory, ids, unit0, unit1, boundary0, boundary1, position0, position1,
    start, stop, lowest, last, row_ptr, stride_table_block, num_blocks, sources, targets, block_strides,
    scale, logit_cap, sliding_window,
    stride_cache_token: tl.constexpr, stride_k_scale_group: tl.constexpr, stride_v_scale_token: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr, NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr, QUERIES: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Let tiles ``start`` to ``stop`` pass; what is read of them are the pages ``lowest`` to ``last``.

    Pages that are not, at the end of a tile or before a sliding window, are another page with weights 0: whatever is
    read was written. ``accs`` are sums of values; until the end each piece's are in the unit of its codes.
    """
    PARTS: tl.constexpr = 8 // BITS
    ROW: tl.constexpr = PIECES * BITS
    WORDS: tl.constexpr = tile_words(BITS, PIECES, GROUP_SIZE)
    GROUPS: tl.constexpr = (2 * ROW + TOKEN) * TILE  # where their scales and zeros begin
    lane = tl.arange(0, unit0.shape[0]) % 32
    g, c = lane // 4, lane % 4
    if CAPPED:
        scale0 = tl.full(unit0.shape, softmax.LOG2E, tl.float32)
        scale1 = scale0
    else:
        scale0, scale1 = unit0 * (2.0**24 * scale * softmax.LOG2E), unit1 * (2.0**24 * scale * softmax.LOG2E)
    in_codes = ()
    for i in tl.static_range(8 * PIECES):
        acc = accs[i] * 2.0 ** (BITS * (i // 8 // (PIECES // PARTS)) - 24)
        if COLS < COLUMNS:
            acc = tl.where(c < 2, acc, 0.0)  # not in the columns that will be added to these
        in_codes = in_codes + (acc,)
    accs = in_codes + (tl.zeros(unit0.shape, tl.float32), tl.zeros(unit0.shape, tl.float32))

    at, into = start * 0, start * 0 + (STAGES - 1) * WORDS
    for tile in tl.range(start, stop, num_stages=1):
        wait_for_copies(STAGES - 2)
        ahead = tile + (STAGES - 1)
        next_ids = load_ids(row_ptr, stride_table_block, ahead + 1, lowest, last, BLOCK_SIZE)
        if ahead < stop:
            memory = copy_tile(
                memory, into, ids, ahead, lowest, last, num_blocks, sources, targets, block_strides,
                stride_cache_token, stride_k_scale_group, stride_v_scale_token, BITS, PIECES, NUM_GROUPS, BLOCK_SIZE,
                GROUP_SIZE,
            )  # fmt: skip
        commit_copies()
        ids = next_ids

        at_channels, at_keys, at_values, at_tokens, at_rows = (
            at + 4 * c, at + (g * ROW + 2 * c), at + (c * ROW + g), at + 2 * c * TOKEN, at + lane % 16 * TOKEN
        )  # fmt: skip
        scores0, scores1 = (), ()
        for i in tl.static_range(PAGES):
            if i < tile_groups(GROUP_SIZE):
                scaled = scaled_by(q, read_channels(memory, at_channels, GROUPS + i * 32 * PIECES, PIECES), COLS)
                zeros = read_channels(memory, at_channels, GROUPS + i * 32 * PIECES + 16 * PIECES, PIECES)
                zero0, zero1 = zero_scores(q, zeros)
            s0, s1, s2, s3 = code_scores(memory, at_keys, i * PAGE * ROW, scaled, BITS, PIECES, COLS)
            s0, s1, s2, s3 = s0 + zero0, s1 + zero1, s2 + zero0, s3 + zero1
            if CAPPED:
                s0 = softmax.cap_scores(s0 * (unit0 * 2.0**24), scale, logit_cap)
                s1 = softmax.cap_scores(s1 * (unit1 * 2.0**24), scale, logit_cap)
                s2 = softmax.cap_scores(s2 * (unit0 * 2.0**24), scale, logit_cap)
                s3 = softmax.cap_scores(s3 * (unit1 * 2.0**24), scale, logit_cap)
            if QUERIES > 1 or WINDOWED:
                upper = g + (tile * PAGES + i) * PAGE
                lower = upper + 8
                see0, see1, see2, see3 = upper < boundary0, upper < boundary1, lower < boundary0, lower < boundary1
                if WINDOWED:
                    first0, first1 = position0 - sliding_window, position1 - sliding_window
                    see0, see1 = see0 & (upper > first0), see1 & (upper > first1)
                    see2, see3 = see2 & (lower > first0), see3 & (lower > first1)
                s0, s1 = tl.where(see0, s0, float("-inf")), tl.where(see1, s1, float("-inf"))
                s2, s3 = tl.where(see2, s2, float("-inf")), tl.where(see3, s3, float("-inf"))
            elif i > 0 and tile_groups(GROUP_SIZE) > 1:
                hidden = tl.where(last >= tile * PAGES + i, 0.0, float("-inf"))
                s0, s1, s2, s3 = s0 + hidden, s1 + hidden, s2 + hidden, s3 + hidden
            scores0, scores1 = scores0 + (s0, s2), scores1 + (s1, s3)

        weights0, top0, total0, rescale0 = update(scores0, top0, total0, scale0)
        weights1, top1, total1, rescale1 = update(scores1, top1, total1, scale1)
        accs = rescaled(accs, rescale0, rescale1)
        for i in tl.static_range(PAGES):
            b0 = transposed(packed(weights0[2 * i], weights1[2 * i], tl.float16))
            b1 = transposed(packed(weights0[2 * i + 1], weights1[2 * i + 1], tl.float16))
            accs = add_values(
                accs, b0, b1, memory, at_values, at_tokens, at_rows, i * PAGE, BITS, PIECES, NUM_GROUPS, COLS
            )  # fmt: skip
        at = tl.where(at < (STAGES - 1) * WORDS, at + WORDS, 0)
        into = tl.where(into < (STAGES - 1) * WORDS, into + WORDS, 0)

    whole = ()
    for j in tl.static_range(PIECES):
        of_group = (4 + j * NUM_GROUPS // PIECES) * 4 + c  # the lane that has the zeros' sums
        zero0, zero1 = from_lane(accs[8 * PIECES], of_group), from_lane(accs[8 * PIECES + 1], of_group)
        for i in tl.static_range(4):
            acc0, acc1 = accs[8 * j + 2 * i], accs[8 * j + 2 * i + 1]
            if COLS < COLUMNS:
                acc0, acc1 = acc0 + from_other(acc0, 2), acc1 + from_other(acc1, 2)
            unit = 2.0 ** (24 - BITS * (j // (PIECES // PARTS)))
            whole = whole + (acc0 * unit + zero0, acc1 * unit + zero1)
    return memory, whole, top0, top1, total0, total1


@triton.jit
def load_young_page(
    block, page, lowest, end, k_ptr, v_ptr, stride_block, stride_token, num_blocks, PIECES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """(keys, values): rows g and g + 8 of keys, and the four tokens 2 c, 2 c + 1 and those plus 8 of values."""
    lane = tl.arange(0, k_ptr.shape[0]) % 32
    g, c = lane // 4, lane % 4
    in_block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64) * stride_block
    keys, values = (), ()
    for half in tl.static_range(2):
        key = tl.minimum(tl.maximum(page * PAGE + 8 * half + g, lowest), end - 1)
        row = k_ptr + in_block + (key % BLOCK_SIZE * stride_token + 4 * c)
        for j in tl.static_range(PIECES):
            keys = keys + load_words(row + 16 * j, 4)
    for i in tl.static_range(4):
        key = tl.minimum(tl.maximum(page * PAGE + 2 * c + (i % 2 + i // 2 * 8), lowest), end - 1)
        row = v_ptr + in_block + (key % BLOCK_SIZE * stride_token + 2 * g)
        for j in tl.static_range(PIECES):
            values = values + load_words(row + 16 * j, 2)
    return keys, values


@triton.jit
def attend_young_pages(
    q, boundary0, boundary1, position0, position1, start, stop, lowest, end,
    row_ptr, stride_table_block, k_ptr, v_ptr, scale, logit_cap, sliding_window,
    stride_window_block, stride_window_token, num_blocks,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PIECES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Let pages ``start`` to ``stop`` pass from the window; what is read of them are the keys ``lowest`` to ``end``.

    Returns the sums of values, and (top, total) of both columns.
    """
    g = tl.arange(0, boundary0.shape[0]) % 32 // 4
    scale_log2 = scale * softmax.LOG2E
    if CAPPED:
        scale_log2 = softmax.LOG2E
    none = tl.zeros(boundary0.shape, tl.float32)
    top0, total0 = tl.full(boundary0.shape, LOWEST, tl.float32), none
    top1, total1 = top0, none
    accs = ()
    for _ in tl.static_range(8 * PIECES):
        accs = accs + (none,)
    last_block = tl.maximum(end - 1, 0) // BLOCK_SIZE
    block = tl.load(row_ptr + tl.minimum(start * PAGE // BLOCK_SIZE, last_block) * stride_table_block)
    for page in tl.range(start, stop, num_stages=1):
        keys, values = load_young_page(
            block, page, lowest, end, k_ptr, v_ptr, stride_window_block, stride_window_token, num_blocks, PIECES,
            BLOCK_SIZE,
        )  # fmt: skip
        block = tl.load(row_ptr + tl.minimum((page + 1) * PAGE // BLOCK_SIZE, last_block) * stride_table_block)
        s0, s1, s2, s3 = none, none, none, none
        for i in tl.static_range(2 * PIECES):
            upper, lower = some(keys, 2 * i, 2), some(keys, 4 * PIECES + 2 * i, 2)
            s0, s1, s2, s3 = product(
                upper[0], lower[0], upper[1], lower[1], q[2 * i], q[2 * i + 1], s0, s1, s2, s3, DTYPE
            )
        if CAPPED:
            s0, s1 = softmax.cap_scores(s0, scale, logit_cap), softmax.cap_scores(s1, scale, logit_cap)
            s2, s3 = softmax.cap_scores(s2, scale, logit_cap), softmax.cap_scores(s3, scale, logit_cap)
        upper = g + page * PAGE
        lower = upper + 8
        see0, see1 = (upper >= boundary0) & (upper <= position0), (upper >= boundary1) & (upper <= position1)
        see2, see3 = (lower >= boundary0) & (lower <= position0), (lower >= boundary1) & (lower <= position1)
        if WINDOWED:
            first0, first1 = position0 - sliding_window, position1 - sliding_window
            see0, see1 = see0 & (upper > first0), see1 & (upper > first1)
            see2, see3 = see2 & (lower > first0), see3 & (lower > first1)
        s0, s1 = tl.where(see0, s0, float("-inf")), tl.where(see1, s1, float("-inf"))
        s2, s3 = tl.where(see2, s2, float("-inf")), tl.where(see3, s3, float("-inf"))
        weights0, top0, total0, rescale0 = update((s0, s2), top0, total0, scale_log2)
        weights1, top1, total1, rescale1 = update((s1, s3), top1, total1, scale_log2)
        accs = rescaled(accs, rescale0, rescale1)
        b0 = transposed(packed(weights0[0], weights1[0], DTYPE))
        b1 = transposed(packed(weights0[1], weights1[1], DTYPE))
        new = ()
        for u in tl.static_range(2 * PIECES):
            w0, w1, w2, w3 = values[u], values[2 * PIECES + u], values[4 * PIECES + u], values[6 * PIECES + u]
            new = new + product_at(
                accs, 4 * u, pair(w0, w1, 0), pair(w0, w1, 1), pair(w2, w3, 0), pair(w2, w3, 1), b0, b1, DTYPE
            )
        accs = new
    return accs, top0, top1, total0, total1


# ---- the kernel -------------------------------------------------------------------------------------------------


@triton.jit
def quantized_before(position, window, GROUP_SIZE: tl.constexpr):
    """The position before which a query reads keys and values quantized: the end of the last group old enough."""
    return tl.maximum(position + 1 - window, 0) // GROUP_SIZE * GROUP_SIZE


@triton.jit
def store_part(
    accs, top0, top1, total0, total1, place, parts_ptr, stats_ptr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Leave a part at its place in the scratch: the first ROWS columns of each warp, as rows."""
    lane = tl.arange(0, 32 * HEADS) % 32
    g, c = lane // 4, lane % 4
    of_part = parts_ptr + place.to(tl.int64) * (HEADS * COLUMNS * PIECES * 32)
    of_stats = stats_ptr + place.to(tl.int64) * (2 * HEADS * COLUMNS)
    warp = tl.arange(0, 32 * HEADS) // 32
    for e in tl.static_range(2):
        column = 2 * c + e
        row = warp * COLUMNS + column
        at = row * (PIECES * 32) + 4 * g
        for j in tl.static_range(PIECES):
            for i in tl.static_range(4):
                store_number(of_part + at, 32 * j + i, accs[8 * j + 2 * i + e], column < ROWS)
        first = (column < ROWS) & (g == 0)
        store_number(of_stats + row, 0, top0 if e == 0 else top1, first)
        store_number(of_stats + row, HEADS * COLUMNS, total0 if e == 0 else total1, first)


@triton.jit
def merge_parts(
    first, last, parts_ptr, stats_ptr, row, out_ptr, sinks_ptr, token, head, there,
    stride_out_token, stride_out_head, stride_out_dim, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """`merging.merge_parts`, for rows anywhere, without shared memory: a few parts at a time, in registers."""
    dim = tl.arange(0, HEAD_DIM)
    top, total = softmax.empty(row.shape[0])
    acc = tl.zeros([row.shape[0], HEAD_DIM], tl.float32)
    for step in tl.range(first, last + 1, FEW_PARTS, num_stages=1):
        parts = ()
        for i in tl.static_range(FEW_PARTS):
            part = step + i
            loaded = row * 0 + part <= last
            place = (part * 2 + tl.where(part == first, 1, 0)).to(tl.int64)
            stats = stats_ptr + place * (2 * HEADS * COLUMNS) + row
            part_top = tl.load(stats, mask=loaded, other=float("-inf"), cache_modifier=".cg")
            part_total = tl.load(stats + HEADS * COLUMNS, mask=loaded, other=0.0, cache_modifier=".cg")
            at = parts_ptr + place * (HEADS * COLUMNS * HEAD_DIM) + row[:, None] * HEAD_DIM + dim[None, :]
            values = tl.load(at, mask=loaded[:, None], other=0.0, cache_modifier=".cg")
            parts = parts + ((values, part_top, part_total),)
        for i in tl.static_range(FEW_PARTS):
            acc, top, total = merging.merge(acc, top, total, parts[i][0], parts[i][1], parts[i][2])
    merging.store_rows(
        acc, top, total, out_ptr, sinks_ptr, token, head, there, dim, stride_out_token, stride_out_head,
        stride_out_dim, HEAD_DIM,
    )  # fmt: skip


# One compiled kernel for all batches of a model.
PER_BATCH = [
    "window", "sliding_window", "stride_window_table_seq", "stride_table_seq", "num_tokens", "num_seqs",
    "num_window_blocks", "num_blocks", "max_blocks_per_seq",
]  # fmt: skip


@triton.jit(do_not_specialize=PER_BATCH)
def decode_attention_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim / 2], words of two numbers
    k_window_ptr,  # [num_window_blocks, block_size, num_kv_heads, head_dim / 2], likewise
    v_window_ptr,
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, packed_head_dim / 4], words of four bytes
    v_cache_ptr,
    k_scale_ptr,  # [num_blocks, groups_per_block, num_kv_heads, head_dim / 2], words of two numbers
    k_zero_ptr,
    v_scale_ptr,  # [num_blocks, block_size, num_kv_heads, num_groups / 2], likewise
    v_zero_ptr,
    window_block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    block_table_ptr,
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [num_tokens, num_heads, head_dim]
    parts_ptr, stats_ptr, counters_ptr,  # the scratch of merging.py
    window,
    scale,
    logit_cap,
    sliding_window,
    stride_q_token, stride_q_head,  # in words, as all but the result's
    stride_window_block, stride_window_token, stride_window_head,
    stride_cache_block, stride_cache_token: tl.constexpr, stride_cache_head,
    stride_k_scale_block, stride_k_scale_group: tl.constexpr, stride_k_scale_head,
    stride_v_scale_block, stride_v_scale_token: tl.constexpr, stride_v_scale_head,
    stride_window_table_seq, stride_window_table_block,
    stride_table_seq, stride_table_block,
    stride_out_token, stride_out_head, stride_out_dim,
    num_tokens,
    num_seqs,
    num_bundles,  # of HEADS KV heads
    num_window_blocks,
    num_blocks,
    max_blocks_per_seq,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    lane, warp = tl.arange(0, 32 * HEADS) % 32, tl.arange(0, 32 * HEADS) // 32
    c = lane % 4
    # Programs side by side have the same tiles of keys of neighbouring heads, whose bytes lie side by side.
    bundle, worker = tl.program_id(0) % num_bundles, tl.program_id(0) // num_bundles
    most_workers = tl.num_programs(0) // num_bundles
    parts_ptr += bundle * most_workers * (2 * HEADS * COLUMNS * PIECES * 32)
    stats_ptr += bundle * most_workers * (4 * HEADS * COLUMNS)
    counters_ptr += bundle * most_workers
    line, num_workers, begin, end, seq, seq_begin = paging.find_share(
        worker, most_workers, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens,
        max_blocks_per_seq * BLOCK_SIZE, 1, sliding_window, QUERIES, TILE, WINDOWED,
    )  # fmt: skip
    merging.store_rows_without_keys(
        tl.program_id(0), tl.num_programs(0), seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens,
        max_blocks_per_seq * BLOCK_SIZE, num_bundles * HEADS * GROUP, tl.arange(0, PIECES * 32), out_ptr,
        stride_out_token, stride_out_head, stride_out_dim, PIECES * 32, QUERIES,
    )  # fmt: skip
    kv_head = bundle * HEADS + warp
    head64 = kv_head.to(tl.int64)
    in_cache, in_window = head64 * stride_cache_head, head64 * stride_window_head
    in_k_scales, in_v_scales = head64 * stride_k_scale_head, head64 * stride_v_scale_head
    sources, targets = places_of_lanes(
        lane, k_cache_ptr + in_cache, v_cache_ptr + in_cache, k_scale_ptr + in_k_scales, k_zero_ptr + in_k_scales,
        v_scale_ptr + in_v_scales, v_zero_ptr + in_v_scales, stride_cache_token, stride_v_scale_token, PIECES * BITS,
        PIECES,
    )  # fmt: skip
    block_strides = (stride_cache_block, stride_k_scale_block, stride_v_scale_block)
    memory = warp_memory(STAGES * tile_words(BITS, PIECES, GROUP_SIZE), HEADS)
    unit = begin
    while unit < end:
        first_row, num_queries, seq_len = paging.sequence(
            seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, num_tokens, max_blocks_per_seq * BLOCK_SIZE
        )
        per_head, width = paging.units_per_head(num_queries, seq_len, sliding_window, QUERIES, TILE, WINDOWED)
        if unit >= seq_begin + per_head:
            seq_begin += per_head
            seq += 1
        else:
            _head, tile, first_tile, seg_begin, seg_end, following = paging.find_segment(
                unit, seq_begin, per_head, width, num_queries, seq_len, sliding_window, QUERIES, TILE, WINDOWED
            )
            if unit < seg_end:
                context = seq_len - num_queries
                last_key = context + tl.minimum((tile + 1) * QUERIES, num_queries)
                first_young = quantized_before(context + tile * QUERIES, window, GROUP_SIZE)
                end_old = quantized_before(last_key - 1, window, GROUP_SIZE)
                lowest = paging.oldest_key(context + tile * QUERIES, sliding_window, WINDOWED)
                start = first_tile + unit - seg_begin
                stop = first_tile + tl.minimum(end, seg_end) - seg_begin
                stop_old = tl.minimum(stop, (end_old + TILE - 1) // TILE)
                stop_old = tl.where(lowest < end_old, stop_old, 0)
                lowest_page, last_page = lowest // PAGE, tl.maximum(end_old // PAGE - 1, 0)
                table_row = block_table_ptr + seq.to(tl.int64) * stride_table_seq
                # While the first tiles are on their way, queries are loaded, and young keys attended.
                memory, ids = copy_first_tiles(
                    memory, start, stop_old, lowest_page, last_page, table_row, stride_table_block, num_blocks,
                    sources, targets, block_strides, stride_cache_token, stride_k_scale_group, stride_v_scale_token,
                    BITS, PIECES, NUM_GROUPS, BLOCK_SIZE, GROUP_SIZE, STAGES,
                )  # fmt: skip

                query, head, there = paging.query_of(lane // 4, tile, QUERIES, GROUP, COLS)
                there = there & (query < num_queries)
                in_q = (first_row + query).to(tl.int64) * stride_q_token + (kv_head * GROUP + head) * stride_q_head
                q = load_queries(q_ptr + tl.where(there, in_q, 0), there, PIECES)
                query0, _, _ = paging.query_of(2 * c, tile, QUERIES, GROUP, COLS)
                query1, _, _ = paging.query_of(2 * c + 1, tile, QUERIES, GROUP, COLS)
                position0, position1 = context + query0, context + query1
                boundary0 = tl.minimum(quantized_before(position0, window, GROUP_SIZE), end_old)
                boundary1 = tl.minimum(quantized_before(position1, window, GROUP_SIZE), end_old)
                accs, top0, top1, total0, total1 = attend_young_pages(
                    q, boundary0, boundary1, position0, position1,
                    tl.maximum(start * PAGES, tl.maximum(first_young, lowest) // PAGE),
                    tl.minimum(stop * PAGES, (last_key + PAGE - 1) // PAGE), tl.maximum(first_young, lowest), last_key,
                    window_block_table_ptr + seq.to(tl.int64) * stride_window_table_seq, stride_window_table_block,
                    k_window_ptr + in_window, v_window_ptr + in_window,
                    scale, logit_cap, sliding_window, stride_window_block, stride_window_token, num_window_blocks,
                    WINDOWED, CAPPED, PIECES, BLOCK_SIZE, DTYPE,
                )  # fmt: skip
                small, column_unit = below_one(q, DTYPE)
                unit0, unit1 = from_lane(column_unit, 8 * c), from_lane(column_unit, 8 * c + 4)
                memory, accs, top0, top1, total0, total1 = attend_old_tiles(
                    small, accs, top0, top1, total0, total1, memory, ids, unit0, unit1, boundary0, boundary1,
                    position0, position1, start, stop_old, lowest_page, last_page, table_row, stride_table_block,
                    num_blocks, sources, targets, block_strides, scale, logit_cap, sliding_window,
                    stride_cache_token, stride_k_scale_group, stride_v_scale_token,
                    WINDOWED, CAPPED, BITS, PIECES, NUM_GROUPS, BLOCK_SIZE, GROUP_SIZE, QUERIES, COLS, STAGES,
                )  # fmt: skip

                tl.debug_barrier()  # the part of a segment before this one may still be read
                store_part(
                    accs, top0, top1, sum_of(total0), sum_of(total1), worker * 2 + (seg_begin >= begin).to(tl.int32),
                    parts_ptr, stats_ptr, ROWS, HEADS, PIECES,
                )  # fmt: skip
                first, last = worker, worker
                complete = (seg_begin >= begin) & (seg_end <= end)
                if complete:
                    tl.debug_barrier()  # other lanes read what a lane has stored
                else:
                    first = paging.worker_of(seg_begin, num_workers, line)
                    last = paging.worker_of(seg_end - 1, num_workers, line)
                    complete = merging.is_last(seg_begin, seg_end, line, num_workers, counters_ptr)
                if complete:
                    row = tl.arange(0, ROWS * HEADS)
                    of_row, head_of_row, is_row = paging.query_of(row // HEADS, tile, QUERIES, GROUP, COLS)
                    merge_parts(
                        first, last, parts_ptr, stats_ptr, row % HEADS * COLUMNS + row // HEADS, out_ptr, sinks_ptr,
                        (first_row + of_row).to(tl.int64), (bundle * HEADS + row % HEADS) * GROUP + head_of_row,
                        is_row & (of_row < num_queries), stride_out_token, stride_out_head, stride_out_dim,
                        HEADS, PIECES * 32,
                    )  # fmt: skip
            unit = tl.minimum(following, end)
