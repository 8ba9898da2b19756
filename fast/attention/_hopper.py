"""What the attention kernels for Hopper GPUs share, in Gluon: the way of a consumer through an item.

An item is a tile of queries of one head. A producer warp fills tiles of K and V in shared memory from the last to the
first; two consumers, four warps each, own 64 of the queries each. How a producer finds and fetches its tiles is the
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
def item_of(turn):
    """The item a program takes in its ``turn``: to and fro, because items get shorter and the first is the longest."""
    place = gl.where(turn % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))
    return turn * gl.num_programs(0) + place


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers in shared memory, each of which opens after as many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def hide(scores, first, position, num_keys, CAUSAL: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf for every score of a key that its query does not see."""
    rows: gl.constexpr = scores.shape[0]
    columns: gl.constexpr = scores.shape[1]
    key = first + gl.arange(0, columns, gl.SliceLayout(0, LAYOUT))[None, :]
    seen = key < num_keys
    if CAUSAL:
        query = position + gl.arange(0, rows, gl.SliceLayout(1, LAYOUT))[:, None]
        seen = seen & (key <= query)
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def weigh(scores, top, total, scale_log2):
    """``softmax.update`` of `fast._triton.softmax`."""
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
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
def empty_state(ROWS: gl.constexpr, TILE_KV: gl.constexpr, HEAD_DIM: gl.constexpr):
    """top, total and acc of rows that no key has met yet."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    return top, total, gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)


@gluon.jit
def pass_tiles(
    scores_of, acc, weights, top, total, rescale, passed, turns, start, stop, position, num_keys, scale_log2, q_tile,
    tiles, turn, IN_TURN: gl.constexpr, WHICH: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
    TILE_KV: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tiles of keys from ``start`` down to ``stop``; the values of a tile are added while the next one is scored."""
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
            scores = hide(scores, tile * TILE_KV, position, num_keys, CAUSAL, S_LAYOUT)
        top, total, rescale, new_weights = weigh(scores, top, total, scale_log2)
        # The next keys are waited for here because the assembler moves no arithmetic over the loop of a wait: without
        # one it would put the wait for the values before the softmax that is to hide it.
        mbarrier.wait(k_full.index((passed + 1) % STAGES), (passed + 1) // STAGES & 1, pred=tile > 0)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(before), count=1)
        weights = gl.convert_layout(new_weights.to(q_tile.dtype), P_LAYOUT)
        passed += 1
    return acc, weights, top, total, rescale, passed, turns


@gluon.jit
def attend(
    scores_of, acc, top, total, passed, turns, position, num_keys, num_tiles, seen_tiles, scale_log2, q_tile, q_empty,
    half, tiles, turn, IN_TURN: gl.constexpr, WHICH: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A consumer's queries, which have arrived, through all tiles of keys that one of them sees; at least one.

    ``passed`` counts the tiles of all items, ``turns`` those that were begun in turn (``IN_TURN``: the consumers start
    their products one after the other, so that one's softmax falls beside the other's products).
    """
    k_smem, v_smem, k_full, k_empty, v_full, v_empty = tiles
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE_KV: gl.constexpr = k_smem.shape[1]
    HEAD_DIM: gl.constexpr = k_smem.shape[2]
    S_LAYOUT: gl.constexpr = scores_of.type.layout
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    stage = passed % STAGES
    mbarrier.wait(k_full.index(stage), passed // STAGES & 1)
    scores = warpgroup_mma(q_tile, k_smem.index(stage).permute((1, 0)), scores_of, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    first = (num_tiles - 1) * TILE_KV
    scores = hide(scores, first, position, num_keys, CAUSAL, S_LAYOUT)
    top, total, rescale, new_weights = weigh(scores, top, total, scale_log2)
    weights = gl.convert_layout(new_weights.to(q_tile.dtype), P_LAYOUT)
    if num_keys - first < TILE_KV:
        mbarrier.wait(v_full.index(stage), passed // STAGES & 1)
        clean(v_smem.index(stage), num_keys - first, TILE_KV, HEAD_DIM)
    passed += 1
    mbarrier.wait(k_full.index(passed % STAGES), passed // STAGES & 1, pred=num_tiles > 1)

    middle = gl.minimum(seen_tiles, num_tiles - 1)
    acc, weights, top, total, rescale, passed, turns = pass_tiles(
        scores_of, acc, weights, top, total, rescale, passed, turns, num_tiles - 1, middle, position, num_keys,
        scale_log2, q_tile, tiles, turn, IN_TURN, WHICH, True, CAUSAL, TILE_KV, STAGES, S_LAYOUT, P_LAYOUT,
    )  # fmt: skip
    acc, weights, top, total, rescale, passed, turns = pass_tiles(
        scores_of, acc, weights, top, total, rescale, passed, turns, middle, 0, position, num_keys,
        scale_log2, q_tile, tiles, turn, IN_TURN, WHICH, False, CAUSAL, TILE_KV, STAGES, S_LAYOUT, P_LAYOUT,
    )  # fmt: skip
    mbarrier.arrive(q_empty.index(half), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    stage = (passed - 1) % STAGES
    mbarrier.wait(v_full.index(stage), (passed - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, v_smem.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(stage), count=1)
    return acc, top, total, passed, turns


@gluon.jit
def add_sink(acc, top, total, sinks_ptr, head):
    """A key that brings no value."""
    sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2E
    new_top = gl.maximum(top, sink)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    rescale = gl.exp2(top - shift)
    total = total * rescale + gl.exp2(sink - shift)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, new_top, total


@gluon.jit
def store_rows(acc, total, out_ptr, token, head, rows_left, stride_out_token, stride_out_head, dtype: gl.constexpr):
    """The weighted means of the first ``rows_left`` rows, from row ``token`` of the result on."""
    ROWS: gl.constexpr = acc.shape[0]
    HEAD_DIM: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, acc.type.layout))[:, None]
    result = gl.convert_layout(acc.to(dtype), layout)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))[None, :]
    offset = (token + row).to(gl.int64) * stride_out_token + head.to(gl.int64) * stride_out_head + dim
    gl.store(out_ptr + offset, result, mask=row < rows_left)
