"""The passing of coded keys and values over a tile of queries: what `fast/attention/_cached_tiles.py` is for floats.

- Nothing is dequantized: a key's scale multiplies its score and a value's scale its weight; the zero of a group enters
  as zero times the sum of the query's numbers there, and zero times the sum of weights.
- Tiles are turned, keys times queries, so that a decode's few queries are the short side of a tile (8), and a warp
  has a KV head to itself and waits for no other.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

from fast._triton import softmax
from fast.kv_cache._planes import dot_parts, exponent_of, in_group, in_parts, numbers_of, plane, power_of_two

HEADROOM = tl.constexpr(14)  # weights times scales are less than 2^15


@triton.constexpr_function
def pages_of(tile_kv, block_size):
    """The blocks that a tile of keys covers; 0 if that depends on the tile."""
    return tile_kv // block_size if tile_kv % block_size == 0 else int(block_size % tile_kv == 0)


@triton.jit
def find_slots(
    tile, oldest, end, row_ptr, stride_table_block, stride_cache_block, stride_scale_block, num_blocks,
    BLOCK_SIZE: tl.constexpr, TILE_KV: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Of each key of a tile: whether it is one, where its block begins in the codes and in the scales, and its offset
    in the block. One before ``oldest`` is none: the window is past it, and its block may be another sequence's by now.

    Codes are numbers whatever they are, and weigh nothing where the mask is. So every key may read some block, and
    loads that need no mask are fewer instructions; only scales can be NaN, and are masked.
    """
    PAGES: tl.constexpr = pages_of(TILE_KV, BLOCK_SIZE)
    column = tl.arange(0, TILE_KV)
    keys = tile * TILE_KV + column
    if PAGES > 0:  # scalars, of which there are few
        valid, block_words = tl.zeros([TILE_KV], tl.int32), tl.zeros([TILE_KV], tl.int64)
        block_scales = block_words
        for page in tl.static_range(PAGES):
            index = (tile * TILE_KV + page * BLOCK_SIZE) // BLOCK_SIZE
            block_id = tl.load(row_ptr + index * stride_table_block, mask=index * BLOCK_SIZE < end, other=-1)
            known = (block_id >= 0) & (block_id < num_blocks)
            block = tl.where(known, block_id, 0).to(tl.int64)
            here = (column >= page * BLOCK_SIZE) & (column < (page + 1) * BLOCK_SIZE)
            block_words = tl.where(here, block * stride_cache_block, block_words)
            block_scales = tl.where(here, block * stride_scale_block, block_scales)
            valid = tl.where(here, known.to(tl.int32), valid)
        owned = (keys < end) & (valid > 0)
        offset = column % BLOCK_SIZE
        if BLOCK_SIZE > TILE_KV:
            offset = offset + tile * TILE_KV % BLOCK_SIZE
    else:
        ids = tl.load(row_ptr + keys // BLOCK_SIZE * stride_table_block, mask=keys < end, other=0).to(tl.int32)
        owned = (keys < end) & (ids.to(tl.uint32) < num_blocks)
        block = tl.where(owned, ids, 0).to(tl.int64)
        block_words, block_scales = block * stride_cache_block, block * stride_scale_block
        offset = keys % BLOCK_SIZE
    if WINDOWED:
        owned = owned & (keys >= oldest)
    return owned, block_words, block_scales, offset


@triton.jit
def load_scales(ptrs, mask, NUM_GROUPS: tl.constexpr, stride_group, PAIRED: tl.constexpr):
    """The scales, or zeros, of each group in float32. PAIRED: two float16s are loaded as one 32-bit number, because
    what is narrower cannot be loaded ahead."""
    scales = ()
    if PAIRED:
        for pair in tl.static_range(NUM_GROUPS // 2):
            both = tl.load(ptrs + pair, mask=mask, other=0)
            for half in tl.static_range(2):
                bits = ((both >> (16 * half)) & 0xFFFF).to(tl.uint16)
                scales = scales + (bits.to(tl.float16, bitcast=True).to(tl.float32),)
    else:
        for g in tl.static_range(NUM_GROUPS):
            scales = scales + (tl.load(ptrs + g * stride_group, mask=mask, other=0.0).to(tl.float32),)
    return scales


@triton.jit
def split_by_groups(
    planes,
    ZERO: tl.constexpr, CODES: tl.constexpr, PARTS: tl.constexpr, NUM_GROUPS: tl.constexpr, BYTES: tl.constexpr,
    NIBBLES: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, TILE_Q: tl.constexpr, TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """The queries of each group and plane, as float16s, and (ZERO) each group's sum of them: what its zero multiplies.

    A plane meets the groups of scales that it has numbers of: for halves of a head in groups of its size, one each.
    """
    HALF: tl.constexpr = HEAD_DIM // NIBBLES
    GROUP_SIZE: tl.constexpr = HEAD_DIM // NUM_GROUPS
    K_UNIT: tl.constexpr = 2.0 ** exponent_of(CODES, NIBBLES - 1)
    queries, sums = (), ()
    for g in tl.static_range(NUM_GROUPS):
        group_sum = tl.zeros([HEADS, TILE_Q], tl.float32)
        for i in tl.static_range(NIBBLES * BYTES):
            if in_group(i // BYTES, g, HALF, GROUP_SIZE, False):
                q = planes[i]
                if not in_group(i // BYTES, g, HALF, GROUP_SIZE, True):
                    number = numbers_of(i // BYTES, i % BYTES, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                    q = tl.where((number // GROUP_SIZE == g)[None, :, None], q, 0.0)
                queries = queries + (in_parts(q, PARTS),)
                if ZERO:  # of the queries as they are multiplied, in units of K_UNIT
                    group_sum += tl.sum(q, 1) * (16.0 ** (i // BYTES - (NIBBLES - 1)) / K_UNIT)
            else:
                queries = queries + (0,)
        sums = sums + (group_sum,)
    return queries, sums


@triton.jit
def hide(scores, keys, query_positions, window, QUERIES: tl.constexpr, WINDOWED: tl.constexpr):
    """-inf for every score of a key that a query does not see: `softmax.hide`, turned."""
    if QUERIES == 1:  # all columns see the same keys
        seen = keys <= query_positions
        if WINDOWED:
            seen = seen & (keys > query_positions - window)
        scores += tl.where(seen, 0.0, float("-inf"))[None, :, None]
    else:
        seen = keys[:, None] <= query_positions[None, :]
        if WINDOWED:
            seen = seen & (keys[:, None] > query_positions[None, :] - window)
        scores = tl.where(seen[None, :, :], scores, float("-inf"))
    return scores


@triton.jit
def scores_of(
    k_words, queries, k_scales,
    CODES: tl.constexpr, PARTS: tl.constexpr, NUM_GROUPS: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """Keys times queries, without the zeros: a group's planes are summed up, and the sum scaled."""
    HALF: tl.constexpr = HEAD_DIM // NIBBLES
    GROUP_SIZE: tl.constexpr = HEAD_DIM // NUM_GROUPS
    PLANES: tl.constexpr = NIBBLES * BYTES
    scores = tl.zeros([HEADS, TILE_KV, TILE_Q], tl.float32)
    for g in tl.static_range(NUM_GROUPS):
        part = tl.zeros([HEADS, TILE_KV, TILE_Q], tl.float32)
        for i in tl.static_range(PLANES):
            if in_group(i // BYTES, g, HALF, GROUP_SIZE, False):
                codes = plane(k_words, CODES, i % BYTES, i // BYTES)
                part = dot_parts(codes, queries[g * PLANES + i], part, PARTS)
        scores += part * k_scales[g][:, :, None]
    return scores


@triton.jit
def add_values(
    accs, v_unit, largest, rescale, weights, v_words, v_scales,
    CODES: tl.constexpr, PARTS: tl.constexpr, NUM_GROUPS: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr,
    HEAD_DIM: tl.constexpr, TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """One more tile of values, times weights, on the planes' sums, which are in units of ``v_unit`` and get another one
    where ``largest``, the largest weight times scale so far, has grown."""
    HALF: tl.constexpr = HEAD_DIM // NIBBLES
    GROUP_SIZE: tl.constexpr = HEAD_DIM // NUM_GROUPS
    PLANES: tl.constexpr = NIBBLES * BYTES
    scaled, parts, new_accs = (), (), ()
    largest = largest * rescale
    for g in tl.static_range(NUM_GROUPS):
        scaled = scaled + (weights * v_scales[g][:, :, None],)
        largest = tl.maximum(largest, tl.max(scaled[g], 1))
    new_unit, bits = power_of_two(largest, -100)
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    rescale = rescale * (v_unit * inverse)
    v_unit = new_unit
    for g in tl.static_range(NUM_GROUPS):
        parts = parts + (in_parts(scaled[g] * (inverse * 2.0**HEADROOM)[:, None, :], PARTS),)
    for i in tl.static_range(PLANES):
        acc = accs[i] * rescale[:, None, :]
        for g in tl.static_range(NUM_GROUPS):
            if in_group(i // BYTES, g, HALF, GROUP_SIZE, True):
                acc = dot_parts(plane(v_words, CODES, i % BYTES, i // BYTES), parts[g], acc, PARTS)
            elif in_group(i // BYTES, g, HALF, GROUP_SIZE, False):
                more = dot_parts(plane(v_words, CODES, i % BYTES, i // BYTES), parts[g], acc, PARTS)
                number = numbers_of(i // BYTES, i % BYTES, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                acc = tl.where((number // GROUP_SIZE == g)[None, :, None], more, acc)
        new_accs = new_accs + (acc,)
    return new_accs, v_unit, largest


@triton.jit
def attend_coded_tiles(
    planes, q_unit, query_positions, start, stop, oldest, end, row_ptr, stride_table_block,
    k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, scale, logit_cap, window,
    stride_cache_block, stride_cache_token, stride_cache_head,
    stride_scale_block, stride_scale_token, stride_scale_head, stride_scale_group,
    num_blocks,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, CODES: tl.constexpr, PARTS: tl.constexpr, NUM_GROUPS: tl.constexpr,
    PAIRED: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """Let tiles ``start`` to ``stop`` of a sequence's keys, only tokens ``oldest`` to ``end`` of them, pass the queries
    of HEADS KV heads; returns the planes' sums, and top and total of each query."""
    PLANES: tl.constexpr = NIBBLES * BYTES
    HALF: tl.constexpr = HEAD_DIM // NIBBLES
    GROUP_SIZE: tl.constexpr = HEAD_DIM // NUM_GROUPS
    K_UNIT: tl.constexpr = 2.0 ** exponent_of(CODES, NIBBLES - 1)
    ZERO: tl.constexpr = k_zero_ptr is not None
    word, column = tl.arange(0, TILE_WORDS), tl.arange(0, TILE_KV)
    in_head = (word < HALF // BYTES)[None, None, :]
    head = tl.arange(0, HEADS).to(tl.int64)
    head_words = head[:, None, None] * stride_cache_head + word[None, None, :]
    head_scales = head[:, None] * stride_scale_head
    top = tl.full([HEADS, TILE_Q], float("-inf"), tl.float32)
    totals = tl.zeros([HEADS, TILE_KV, TILE_Q], tl.float32)  # added up over the keys at the end
    largest = tl.zeros([HEADS, TILE_Q], tl.float32)  # weight times scale so far
    v_unit, _ = power_of_two(largest, -100)
    if CAPPED:
        scale_log2 = tl.full(q_unit.shape, softmax.LOG2E, tl.float32)
    else:
        scale_log2 = q_unit * (scale * softmax.LOG2E * K_UNIT)

    queries, sums = split_by_groups(
        planes, ZERO, CODES, PARTS, NUM_GROUPS, BYTES, NIBBLES, HEAD_DIM, HEADS, TILE_Q, TILE_WORDS
    )
    accs, zeros = (), ()
    for _ in tl.static_range(NUM_GROUPS):
        zeros = zeros + (tl.zeros([HEADS, 16, TILE_Q], tl.float32),)
    for _ in tl.static_range(PLANES):
        accs = accs + (tl.zeros([HEADS, TILE_WORDS, TILE_Q], tl.float32),)

    for tile in range(start, stop):
        keys = tile * TILE_KV + column
        owned, block_words, block_scales, offset = find_slots(
            tile, oldest, end, row_ptr, stride_table_block, stride_cache_block, stride_scale_block, num_blocks,
            BLOCK_SIZE, TILE_KV, WINDOWED,
        )  # fmt: skip
        words = block_words[None, :, None] + (offset.to(tl.int64)[None, :, None] * stride_cache_token + head_words)
        turned = tl.permute(words, (0, 2, 1))
        if TILE_WORDS > HALF // BYTES:
            k_words = tl.load(k_ptr + words, mask=in_head, other=0)
            v_words = tl.load(v_ptr + turned, mask=tl.permute(in_head, (0, 2, 1)), other=0)
        else:
            k_words, v_words = tl.load(k_ptr + words), tl.load(v_ptr + turned)
        scale_row = (block_scales + offset.to(tl.int64) * stride_scale_token)[None, :] + head_scales

        k_scales = load_scales(k_scale_ptr + scale_row, owned[None, :], NUM_GROUPS, stride_scale_group, PAIRED)
        scores = scores_of(
            k_words, queries, k_scales, CODES, PARTS, NUM_GROUPS, BYTES, NIBBLES, HEAD_DIM, HEADS, TILE_Q, TILE_KV
        )
        if ZERO:
            k_zeros = load_scales(k_zero_ptr + scale_row, owned[None, :], NUM_GROUPS, stride_scale_group, PAIRED)
            for g in tl.static_range(NUM_GROUPS):
                scores += sums[g][:, None, :] * k_zeros[g][:, :, None]

        if CAPPED:
            scores = softmax.cap_scores(scores * (q_unit * K_UNIT)[:, None, :], scale, logit_cap)
        scores = hide(scores, keys, query_positions, window, QUERIES, WINDOWED)

        # softmax.update, turned, and the weights added up later
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2[:, None, :] - shift[:, None, :])
        rescale = tl.exp2(top - shift)
        top, totals = new_top, totals * rescale[:, None, :] + weights

        v_scales = load_scales(v_scale_ptr + scale_row, owned[None, :], NUM_GROUPS, stride_scale_group, PAIRED)
        if ZERO:
            v_zeros = load_scales(v_zero_ptr + scale_row, owned[None, :], NUM_GROUPS, stride_scale_group, PAIRED)
            unscaled, new_zeros = in_parts(weights, PARTS), ()
            for g in tl.static_range(NUM_GROUPS):  # by a dot, in every row of a tile, because only its loads run ahead
                rows = tl.broadcast_to(v_zeros[g].to(tl.float16)[:, None, :], [HEADS, 16, TILE_KV])
                new_zeros = new_zeros + (dot_parts(rows, unscaled, zeros[g] * rescale[:, None, :], PARTS),)
            zeros = new_zeros
        accs, v_unit, largest = add_values(
            accs, v_unit, largest, rescale, weights, v_words, v_scales,
            CODES, PARTS, NUM_GROUPS, BYTES, NIBBLES, HEAD_DIM, TILE_WORDS,
        )  # fmt: skip

    whole = ()
    for i in tl.static_range(PLANES):
        # as v_unit may be as small as 2^-100 or as large as 2^121, the powers of two do not meet before the sums
        acc = accs[i] * 2.0 ** (exponent_of(CODES, i // BYTES) - HEADROOM) * v_unit[:, None, :]
        if ZERO:
            for g in tl.static_range(NUM_GROUPS):
                number = numbers_of(i // BYTES, i % BYTES, HEAD_DIM, BYTES, NIBBLES, TILE_WORDS)
                acc += tl.where((number // GROUP_SIZE == g)[None, :, None], tl.max(zeros[g], 1)[:, None, :], 0.0)
        whole = whole + (acc,)
    return whole, top, tl.sum(totals, 1)
