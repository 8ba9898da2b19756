"""The tiles of flash_attention on a Hopper GPU, in Gluon: loads, tensor cores and softmax at the same time.

The portable kernel leaves the tensor cores idle while it exponentiates. Here a program has three parts that run side by
side (after FlashAttention-3, Shah et al., 2024): a *producer* warp asks the copy engine (TMA) for tiles of q, K and V,
and two *consumers*, four warps each, own 64 queries each. A consumer starts the scores of the next tile and the values
of the last one together, and does the softmax of the next tile while the tensor cores work on the values; and where it
waits, the other consumer fills in. Keys pass from the last to the first: the tiles that the mask cuts come first.

Programs are as many as the GPU has processors. Each takes one item after another, a tile of queries of one head.

What it does not do: windows, caps, float32, head sizes other than 128; the portable kernel does, and with 64, where the
softmax weighs twice as much, it was the faster one.
"""

from torch import Tensor as Array
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fast._triton.platform import num_processors

TILE_Q = 128  # of a program: 64 for each consumer
TILE_KV = 128
NUM_STAGES = 2  # tiles of K, and as many of V, in shared memory; q has two as well, one for the next item
CACHED_BYTES = 20 * 2**20  # of K and V side by side, of 50 MB of L2 cache: several sequences may be on their way
COUNTS = ("num_seqs", "num_tokens", "total_keys", "num_heads", "group", "section", "num_slots", "num_halvings")
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


def heads_at_a_time(k: Array, num_heads: int, num_seqs: int) -> int:
    """How many heads pass side by side, before the rest.

    All of them where four heads or more share their keys. Otherwise as many as keep the keys of a sequence of mean
    length in the L2 cache, because each tile of queries reads them again.
    """
    num_keys, num_kv_heads, head_dim = k.shape
    group = num_heads // num_kv_heads
    if group >= 4:
        return num_heads
    most = CACHED_BYTES * num_seqs // (2 * num_keys * head_dim * k.element_size())
    return group * next(n for n in range(num_kv_heads, 0, -1) if num_kv_heads % n == 0 and (n <= most or n == 1))


@gluon.jit
def item_of(turn):
    """The item a program takes in its ``turn``: to and fro, because items get shorter and the first is the longest."""
    place = gl.where(turn % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))
    return turn * gl.num_programs(0) + place


@gluon.jit
def find_item(
    item, cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_seqs, num_tokens, total_keys, num_heads, section, num_slots,
    num_halvings, CAUSAL: gl.constexpr, TILE_Q: gl.constexpr, TILE_KV: gl.constexpr,
):  # fmt: skip
    """What a program has to do next: head, tile of queries, where its sequence lies, and which tiles of keys.

    Items run through the heads of a section, and within them through slots of queries, from the last to the first.
    Slots are counted as in the portable kernel's ``find_tile``; here the sequence is found by bisection.
    """
    begun = item // (num_slots * section)  # sections before this one
    within = item - begun * num_slots * section
    head = begun * section + within % section
    slot = num_slots - 1 - within // section
    seq = 0
    end = num_seqs
    for _ in range(num_halvings):
        middle = (seq + end) // 2
        below = gl.load(cu_seqlens_q_ptr + middle) // TILE_Q + middle <= slot
        seq = gl.where(below, middle, seq)
        end = gl.where(below, end, middle)
    begin_q = gl.load(cu_seqlens_q_ptr + seq)
    tile = slot - (begin_q // TILE_Q + seq)
    first_query = gl.minimum(gl.maximum(begin_q, 0), num_tokens)
    num_queries = gl.minimum(gl.maximum(gl.load(cu_seqlens_q_ptr + seq + 1), first_query), num_tokens) - first_query
    first_key = gl.minimum(gl.maximum(gl.load(cu_seqlens_k_ptr + seq), 0), total_keys)
    num_keys = gl.minimum(gl.maximum(gl.load(cu_seqlens_k_ptr + seq + 1), first_key), total_keys) - first_key

    there = (
        (head < num_heads) & (tile >= 0) & (tile < num_slots)
    )  # an item is left, and the offsets are what they should be
    rows_left = gl.where(there, num_queries - tile * TILE_Q, 0)
    position = tile * TILE_Q + num_keys - num_queries  # of the first query
    seen_tiles = num_keys // TILE_KV  # those that every query sees whole
    num_tiles = (num_keys + TILE_KV - 1) // TILE_KV
    if CAUSAL:
        last_position = position + gl.minimum(rows_left, TILE_Q) - 1
        num_tiles = gl.minimum(num_tiles, (gl.maximum(last_position + 1, 0) + TILE_KV - 1) // TILE_KV)
        seen_tiles = gl.minimum(seen_tiles, gl.maximum(position + 1, 0) // TILE_KV)
    num_tiles = gl.where(rows_left > 0, num_tiles, 0)
    return head, first_query + tile * TILE_Q, rows_left, position, first_key, num_keys, num_tiles, seen_tiles


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, tiles, batch, group, num_turns,
    CAUSAL: gl.constexpr, TILE_Q: gl.constexpr, TILE_KV: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: for each item, its queries once and its keys and values from the last tile to the first."""
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = tiles
    passed = 0  # tiles of keys, of all items
    items = 0
    for turn in range(num_turns):
        head, token, _rows, _position, first_key, _keys, num_tiles, _seen = find_item(
            item_of(turn), *batch, CAUSAL, TILE_Q, TILE_KV
        )
        kv_column = head // group * HEAD_DIM
        if num_tiles > 0:
            for which in gl.static_range(2):
                half = items % 2 * 2 + which
                mbarrier.wait(q_empty.index(half), (items // 2 & 1) ^ 1)
                mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    q_desc, [token + which * (TILE_Q // 2), head * HEAD_DIM], q_full.index(half), q_smem.index(half)
                )
            items += 1
            for step in range(num_tiles):
                row = first_key + (num_tiles - 1 - step) * TILE_KV
                stage = passed % STAGES
                phase = (passed // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(k_desc, [row, kv_column], k_full.index(stage), k_smem.index(stage))
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(v_desc, [row, kv_column], v_full.index(stage), v_smem.index(stage))
                passed += 1


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
def pass_tiles(
    scores_of, acc, weights, top, total, rescale, passed, start, stop, position, num_keys, scale_log2, q_tile, tiles,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, TILE_KV: gl.constexpr, STAGES: gl.constexpr,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tiles of keys from ``start`` down to ``stop``; the values of a tile are added while the next one is scored."""
    _q, k_smem, v_smem, _q_full, _q_empty, k_full, k_empty, v_full, v_empty = tiles
    for step in range(start - stop):
        tile = start - 1 - step
        stage = passed % STAGES
        scores = warpgroup_mma(q_tile, k_smem.index(stage).permute((1, 0)), scores_of, use_acc=False, is_async=True)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, P_LAYOUT.parent))[:, None]
        before = (passed - 1) % STAGES
        mbarrier.wait(v_full.index(before), (passed - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
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
    return acc, weights, top, total, rescale, passed


@gluon.jit
def consume(
    tiles, results, batch, num_turns, WHICH: gl.constexpr, SINKS: gl.constexpr, CAUSAL: gl.constexpr,
    TILE_Q: gl.constexpr, TILE_KV: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 of an item's queries, through all its tiles of keys."""
    ROWS: gl.constexpr = TILE_Q // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    STORE_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HEAD_DIM // 8), HEAD_DIM // 8], [4, 1], [1, 0])
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = tiles
    out_ptr, lse_ptr, sinks_ptr, num_heads, scale_log2, stride_out_token, stride_out_head = results
    dtype: gl.constexpr = k_smem.dtype
    scores_of = gl.zeros([ROWS, TILE_KV], gl.float32, S_LAYOUT)

    passed = 0
    items = 0
    next_head, next_token, next_rows, next_position, _key, next_keys, next_tiles, next_seen = find_item(
        item_of(0), *batch, CAUSAL, TILE_Q, TILE_KV
    )
    for turn in range(num_turns):
        head, token, rows_left, position = next_head, next_token, next_rows, next_position
        num_keys, num_tiles, seen_tiles = next_keys, next_tiles, next_seen
        # What comes next is looked up now, while the first keys are on their way.
        next_head, next_token, next_rows, next_position, _key, next_keys, next_tiles, next_seen = find_item(
            item_of(turn + 1), *batch, CAUSAL, TILE_Q, TILE_KV
        )
        token += WHICH * ROWS
        rows_left -= WHICH * ROWS
        position += WHICH * ROWS

        top = gl.full([ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
        total = gl.zeros([ROWS], gl.float32, ROW_LAYOUT)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
        if num_tiles > 0:
            half = items % 2 * 2 + WHICH
            q_tile = q_smem.index(half)
            mbarrier.wait(q_full.index(half), items // 2 & 1)
            items += 1
            stage = passed % STAGES
            mbarrier.wait(k_full.index(stage), passed // STAGES & 1)
            scores = warpgroup_mma(q_tile, k_smem.index(stage).permute((1, 0)), scores_of, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(stage), count=1)
            first = (num_tiles - 1) * TILE_KV
            scores = hide(scores, first, position, num_keys, CAUSAL, S_LAYOUT)
            top, total, rescale, new_weights = weigh(scores, top, total, scale_log2)
            weights = gl.convert_layout(new_weights.to(dtype), P_LAYOUT)
            if num_keys - first < TILE_KV:
                mbarrier.wait(v_full.index(stage), passed // STAGES & 1)
                clean(v_smem.index(stage), num_keys - first, TILE_KV, HEAD_DIM)
            passed += 1
            mbarrier.wait(k_full.index(passed % STAGES), passed // STAGES & 1, pred=num_tiles > 1)

            middle = gl.minimum(seen_tiles, num_tiles - 1)
            acc, weights, top, total, rescale, passed = pass_tiles(
                scores_of, acc, weights, top, total, rescale, passed, num_tiles - 1, middle, position, num_keys,
                scale_log2, q_tile, tiles, True, CAUSAL, TILE_KV, STAGES, S_LAYOUT, P_LAYOUT,
            )  # fmt: skip
            acc, weights, top, total, rescale, passed = pass_tiles(
                scores_of, acc, weights, top, total, rescale, passed, middle, 0, position, num_keys,
                scale_log2, q_tile, tiles, False, CAUSAL, TILE_KV, STAGES, S_LAYOUT, P_LAYOUT,
            )  # fmt: skip
            mbarrier.arrive(q_empty.index(half), count=1)
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT))[:, None]
            stage = (passed - 1) % STAGES
            mbarrier.wait(v_full.index(stage), (passed - 1) // STAGES & 1)
            acc = warpgroup_mma(weights, v_smem.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(stage), count=1)

        if rows_left > 0:
            if SINKS:  # a key that brings no value
                sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2E
                new_top = gl.maximum(top, sink)
                shift = gl.where(new_top == float("-inf"), 0.0, new_top)
                rescale = gl.exp2(top - shift)
                total = total * rescale + gl.exp2(sink - shift)
                acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT))[:, None]
                top = new_top
            total = gl.where(total > 0, total, 1.0)
            lse = (top + gl.log2(total)) * LN2
            row = gl.arange(0, ROWS, ROW_LAYOUT)
            gl.store(lse_ptr + (token + row).to(gl.int64) * num_heads + head, lse, mask=row < rows_left)
            acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
            result = gl.convert_layout(acc.to(dtype), STORE_LAYOUT)
            row = gl.arange(0, ROWS, gl.SliceLayout(1, STORE_LAYOUT))[:, None]
            dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, STORE_LAYOUT))[None, :]
            offset = (token + row).to(gl.int64) * stride_out_token + head.to(gl.int64) * stride_out_head + dim
            gl.store(out_ptr + offset, result, mask=row < rows_left)


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers in shared memory, each of which opens after as many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit(do_not_specialize=COUNTS)
def flash_attention_hopper_kernel(
    q_desc,  # [num_tokens, num_heads * head_dim]
    k_desc,  # [num_keys, num_kv_heads * head_dim]
    v_desc,
    out_ptr,  # [num_tokens, num_heads, head_dim]
    lse_ptr,  # [num_tokens, num_heads]
    sinks_ptr,  # [num_heads]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    cu_seqlens_k_ptr,  # [num_seqs + 1]
    scale_log2,
    stride_out_token,
    stride_out_head,
    num_seqs,
    num_tokens,
    total_keys,
    num_heads,
    group,
    section,
    num_slots,
    num_halvings,
    SINKS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TILE_Q: gl.constexpr,
    TILE_KV: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [4, TILE_Q // 2, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, TILE_KV, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, TILE_KV, HEAD_DIM], v_desc.layout)
    q_full, q_empty = barriers(4, 1), barriers(4, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()

    num_turns = (num_slots * num_heads + gl.num_programs(0) - 1) // gl.num_programs(0)
    tiles = (q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    batch = (
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_seqs, num_tokens, total_keys, num_heads, section, num_slots,
        num_halvings,
    )  # fmt: skip
    results = (out_ptr, lse_ptr, sinks_ptr, num_heads, scale_log2, stride_out_token, stride_out_head)
    gl.warp_specialize(
        [
            (consume, (tiles, results, batch, num_turns, 0, SINKS, CAUSAL, TILE_Q, TILE_KV, HEAD_DIM, STAGES)),
            (consume, (tiles, results, batch, num_turns, 1, SINKS, CAUSAL, TILE_Q, TILE_KV, HEAD_DIM, STAGES)),
            (
                produce,
                (q_desc, k_desc, v_desc, tiles, batch, group, num_turns, CAUSAL, TILE_Q, TILE_KV, HEAD_DIM, STAGES),
            ),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # registers of a thread of theirs; the first consumer gets what is left, 240
    )


def attend_on_hopper(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    causal: bool,
    scale: float,
    sinks: Array | None,
    out: Array,
    lse: Array,
) -> None:
    """Fill ``out`` and ``lse``."""
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = len(cu_seqlens_q) - 1
    layout = gl.NVMMASharedLayout(min(128, 2 * head_dim), 16, 2)
    q_desc, k_desc, v_desc = (
        TensorDescriptor(x, [len(x), x.shape[1] * head_dim], [x.stride(0), 1], [rows, head_dim], layout)
        for x, rows in ((q, TILE_Q // 2), (k, TILE_KV), (v, TILE_KV))
    )
    num_slots = num_tokens // TILE_Q + num_seqs
    flash_attention_hopper_kernel[(min(num_processors(q), num_slots * num_heads),)](
        q_desc,
        k_desc,
        v_desc,
        out,
        lse,
        lse if sinks is None else sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        scale * LOG2E.value,
        out.stride(0),
        out.stride(1),
        num_seqs,
        num_tokens,
        len(k),
        num_heads,
        num_heads // k.shape[1],
        heads_at_a_time(k, num_heads, num_seqs),
        num_slots,
        (num_seqs - 1).bit_length(),
        SINKS=sinks is not None,
        CAUSAL=causal,
        TILE_Q=TILE_Q,
        TILE_KV=TILE_KV,
        HEAD_DIM=head_dim,
        STAGES=NUM_STAGES,
        num_warps=4,
    )
