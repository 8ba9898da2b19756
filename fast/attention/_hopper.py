"""What the attention kernels for Hopper GPUs share, in Gluon: the way of a consumer through an item.

An item is a tile of queries of one head, or of fewer queries of several heads that share their keys. A producer warp
fills tiles of K and V in shared memory from the last to the first; two consumers, four warps each, own 64 of the rows
each. How a producer finds and fetches its tiles is the
kernels' own affair: `flash_attention_hopper.py`, `paged_attention_hopper.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TILE_Q = 128  # of a program: 64 for each consumer
TILE_KV = 128
NUM_STAGES = 2  # tiles of K, and as many of V, in shared memory
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers in shared memory, each of which opens after as many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def hide(
    scores, first, position, num_keys, CAUSAL: gl.constexpr, QUERIES: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """-inf for every score of a key that its query does not see. The rows are so many queries, of one head or more."""
    rows: gl.constexpr = scores.shape[0]
    columns: gl.constexpr = scores.shape[1]
    key = first + gl.arange(0, columns, gl.SliceLayout(0, LAYOUT))[None, :]
    seen = key < num_keys
    if CAUSAL:
        query = position + gl.arange(0, rows, gl.SliceLayout(1, LAYOUT))[:, None] % QUERIES
        seen = seen & (key <= query)
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def largest_of(scores):
    """The largest score of each row; of pairs first, both in one thread: half as many comparisons wait for another."""
    left, right = gl.split(scores.reshape([scores.shape[0], scores.shape[1] // 2, 2]))
    largest = gl.max(gl.maximum(left, right), 1)
    return gl.convert_layout(largest, gl.SliceLayout(1, scores.type.layout), assert_trivial=True)


@gluon.jit
def weigh(scores, top, total, scale_log2):
    """``softmax.update`` of `fast._triton.softmax`."""
    new_top = gl.maximum(top, largest_of(scores) * scale_log2)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    weights = gl.exp2(scores * scale_log2 - shift[:, None])
    rescale = gl.exp2(top - shift)
    return new_top, total * rescale + gl.sum(weights, 1), rescale, weights


@gluon.jit
def clean(v_tile, num_rows, TILE_KV: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Zero the rows of a tile of V that are another sequence's: a weight of 0 times its NaN would be NaN.

    Both consumers do it, with the same zeros, each before it reads the tile.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    for part in gl.static_range(TILE_KV // 32):
        rows = v_tile.slice(part * 32, 32)
        row = part * 32 + gl.arange(0, 32, gl.SliceLayout(1, layout))
        values = rows.load(layout)
        rows.store(gl.where((row < num_rows)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def pass_tiles(
    scores_of, acc, weights, top, total, rescale, passed, turns, start, stop, position, num_keys, scale_log2, q_tile,
    first_tile, tiles, turn, IN_TURN: gl.constexpr, WHICH: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
    QUERIES: gl.constexpr, TILE_KV: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tiles of keys from ``start`` down to ``stop``; the values of a tile are added while the next one is scored.

    The last of the item's, of which there may be more than these, is ``first_tile``.
    """
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = tiles
    for step in range(start - stop):
        tile = start - 1 - step
        stage = passed % STAGES
        if IN_TURN:
            mbarrier.wait(turn.index(WHICH), (turns & 1) ^ (1 - WHICH))
        scores = warpgroup_mma(q_tile, k_smem.index(stage).permute((1, 0)), scores_of, use_acc=False, is_async=True)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, P_LAYOUT.parent))[:, None]
        before = (passed - 1) % STAGES
        mbarrier.wait(v_full.index(before), (passed - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
        if IN_TURN:
            mbarrier.arrive(turn.index(1 - WHICH), count=1)
            turns += 1
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if MASKED:
            scores = hide(scores, tile * TILE_KV, position, num_keys, CAUSAL, QUERIES, S_LAYOUT)
        top, total, rescale, new_weights = weigh(scores, top, total, scale_log2)
        # The next keys are waited for here because the assembler moves no arithmetic over the loop of a wait: without
        # one it would put the wait for the values before the softmax that is to hide it.
        mbarrier.wait(k_full.index((passed + 1) % STAGES), (passed + 1) // STAGES & 1, pred=tile > first_tile)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(before), count=1)
        weights = gl.convert_layout(new_weights.to(q_tile.dtype), P_LAYOUT)
        passed += 1
    return acc, weights, top, total, rescale, passed, turns


@gluon.jit
def ask_for_scores(scores_of, q_tile, tiles, passed, there):
    """Start the scores of an item's first tile of keys; of no item (``there`` is false), scores that mean nothing."""
    k_smem, _v_smem, k_full, _k_empty, _v_full, _v_empty = tiles
    stage = passed % k_smem.shape[0]
    mbarrier.wait(k_full.index(stage), passed // k_smem.shape[0] & 1, pred=there)
    return warpgroup_mma(q_tile, k_smem.index(stage).permute((1, 0)), scores_of, use_acc=False, is_async=True)


@gluon.jit
def await_scores(scores, tiles, passed, there):
    """The scores that were asked for; their keys may be overwritten."""
    k_smem, _v_smem, _k_full, k_empty, _v_full, _v_empty = tiles
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(passed % k_smem.shape[0]), count=1, pred=there)
    return scores


@gluon.jit
def attend(
    scores_of, scores, passed, turns, position, num_keys, first_tile, num_tiles, seen_tiles, scale_log2,
    q_tile, tiles, turn, IN_TURN: gl.constexpr, WHICH: gl.constexpr, CAUSAL: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """A consumer's queries through the tiles of keys, at least one, down to ``first_tile``; the first is scored.

    Its rows are ``QUERIES`` queries of each of its heads, from ``position`` on. Whole tiles of which every query sees
    every key are ``seen_tiles``.
    ``passed`` counts the tiles of all items, ``turns`` those that were begun in turn (``IN_TURN``: the consumers start
    their products one after the other, so that one's softmax falls beside the other's products).
    The values of the last tile are still to be added: ``ask_for_values`` of the weights returned.
    """
    k_smem, v_smem, k_full, _k_empty, v_full, _v_empty = tiles
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE_KV: gl.constexpr = k_smem.shape[1]
    HEAD_DIM: gl.constexpr = k_smem.shape[2]
    S_LAYOUT: gl.constexpr = scores_of.type.layout
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    top = gl.full([scores.shape[0]], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    total = gl.zeros([scores.shape[0]], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros([scores.shape[0], HEAD_DIM], gl.float32, O_LAYOUT)
    first = (num_tiles - 1) * TILE_KV
    scores = hide(scores, first, position, num_keys, CAUSAL, QUERIES, S_LAYOUT)
    top, total, rescale, new_weights = weigh(scores, top, total, scale_log2)
    weights = gl.convert_layout(new_weights.to(q_tile.dtype), P_LAYOUT)
    if num_keys - first < TILE_KV:
        stage = passed % STAGES
        mbarrier.wait(v_full.index(stage), passed // STAGES & 1)
        clean(v_smem.index(stage), num_keys - first, TILE_KV, HEAD_DIM)
    passed += 1
    mbarrier.wait(k_full.index(passed % STAGES), passed // STAGES & 1, pred=num_tiles - 1 > first_tile)

    middle = gl.maximum(gl.minimum(seen_tiles, num_tiles - 1), first_tile)
    acc, weights, top, total, rescale, passed, turns = pass_tiles(
        scores_of, acc, weights, top, total, rescale, passed, turns, num_tiles - 1, middle, position, num_keys,
        scale_log2, q_tile, first_tile, tiles, turn, IN_TURN, WHICH, True, CAUSAL, QUERIES, TILE_KV, STAGES, S_LAYOUT,
        P_LAYOUT,
    )  # fmt: skip
    acc, weights, top, total, rescale, passed, turns = pass_tiles(
        scores_of, acc, weights, top, total, rescale, passed, turns, middle, first_tile, position, num_keys,
        scale_log2, q_tile, first_tile, tiles, turn, IN_TURN, WHICH, False, CAUSAL, QUERIES, TILE_KV, STAGES, S_LAYOUT,
        P_LAYOUT,
    )  # fmt: skip
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, weights, top, total, passed, turns


@gluon.jit
def ask_for_values(acc, weights, tiles, passed):
    """Start to add the values of an item's last tile."""
    _k_smem, v_smem, _k_full, _k_empty, v_full, _v_empty = tiles
    stage = (passed - 1) % v_smem.shape[0]
    mbarrier.wait(v_full.index(stage), (passed - 1) // v_smem.shape[0] & 1)
    return warpgroup_mma(weights, v_smem.index(stage), acc, is_async=True)


@gluon.jit
def await_values(acc, tiles, passed, STARTED: gl.constexpr):
    """The sums of an item, its values added, beside so many products that were started after them."""
    _k_smem, v_smem, _k_full, _k_empty, _v_full, v_empty = tiles
    acc = warpgroup_mma_wait(STARTED, deps=[acc])
    mbarrier.arrive(v_empty.index((passed - 1) % v_smem.shape[0]), count=1)
    return acc


@gluon.jit
def add_sink(acc, top, total, sinks_ptr, head):
    """A key that brings no value; ``head`` is one for all rows, or one for each."""
    sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2E
    new_top = gl.maximum(top, sink)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    rescale = gl.exp2(top - shift)
    total = total * rescale + gl.exp2(sink - shift)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, new_top, total


@gluon.jit
def store_rows(
    acc, total, out_ptr, token, head, queries_left, stride_out_token, stride_out_head,
    QUERIES: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """The weighted means of the first ``queries_left`` queries of each head, from row ``token`` of the result on."""
    ROWS: gl.constexpr = acc.shape[0]
    HEAD_DIM: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc.type.layout))[:, None]
    result = gl.convert_layout(acc.to(dtype), layout)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))[None, :]
    query, head = row % QUERIES, head + row // QUERIES
    offset = (token + query).to(gl.int64) * stride_out_token + head.to(gl.int64) * stride_out_head + dim
    gl.store(out_ptr + offset, result, mask=query < queries_left)
