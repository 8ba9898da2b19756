"""The tiles of flash_attention on a Hopper GPU, in Gluon: loads, tensor cores and softmax at the same time.

The portable kernel leaves the tensor cores idle while it exponentiates. Here a program has three parts that run side by
side (after FlashAttention-3, Shah et al., 2024): a *producer* warp asks the copy engine (TMA) for tiles of q, K and V,
and two *consumers*, four warps each, own 64 queries each. A consumer starts the scores of the next tile and the values
of the last one together, and does the softmax of the next tile while the tensor cores work on the values; and where it
waits, the other consumer fills in. Keys pass from the last to the first: the tiles that the mask cuts come first.

Programs are as many as the GPU has processors. Each takes one item after another, a tile of queries of one head: which,
its producer draws from a counter, so that a program whose items are short takes more of them. It looks the item up and
writes to the consumers what they need to know. They start the scores of the next item before they store this one.

What it does not do: windows, caps, float32, head sizes other than 128; the portable kernel does, and with 64, where the
softmax weighs twice as much, it was the faster one.
"""

from torch import Tensor as Array
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fast._triton.merging import zero_counters
from fast._triton.platform import num_processors
from fast.attention._hopper import (
    LN2,
    LOG2E,
    NUM_STAGES,
    TILE_KV,
    TILE_Q,
    add_sink,
    ask_for_scores,
    ask_for_values,
    attend,
    await_scores,
    await_values,
    barriers,
    store_rows,
)

CACHED_BYTES = 20 * 2**20  # of K and V side by side, of 50 MB of L2 cache: several sequences may be on their way
COUNTS = ("num_seqs", "num_tokens", "total_keys", "num_heads", "group", "section", "num_slots", "num_halvings")


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

    sound = (tile >= 0) & (tile < num_slots)  # the offsets are what they should be
    rows_left = gl.where(sound, num_queries - tile * TILE_Q, 0)
    position = tile * TILE_Q + num_keys - num_queries  # of the first query
    seen_tiles = num_keys // TILE_KV  # those that every query sees whole
    num_tiles = (num_keys + TILE_KV - 1) // TILE_KV
    if CAUSAL:
        last_position = position + gl.minimum(rows_left, TILE_Q) - 1
        num_tiles = gl.minimum(num_tiles, (gl.maximum(last_position + 1, 0) + TILE_KV - 1) // TILE_KV)
        seen_tiles = gl.minimum(seen_tiles, gl.maximum(position + 1, 0) // TILE_KV)
    num_tiles = gl.maximum(num_tiles, 1)  # one, all hidden, where there are no keys
    return head, first_query + tile * TILE_Q, rows_left, position, first_key, num_keys, num_tiles, seen_tiles


@gluon.jit
def fetch_item(
    q_desc, k_desc, v_desc, tiles, head, token, first_key, num_tiles, group, items, passed,
    TILE_Q: gl.constexpr, TILE_KV: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ask for the queries of an item once, and for its keys and values from the last tile to the first."""
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = tiles
    kv_column = head // group * HEAD_DIM
    for which in gl.static_range(2):
        half = items % 2 * 2 + which
        mbarrier.wait(q_empty.index(half), (items // 2 & 1) ^ 1)
        mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc, [token + which * (TILE_Q // 2), head * HEAD_DIM], q_full.index(half), q_smem.index(half)
        )
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
    return passed


@gluon.jit
def draw(counter_ptr):
    """The counter before one is added, in lane 0: it may still be under way when this returns."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.atomic_add(counter_ptr + lane * 0, gl.full_like(lane, 1), mask=lane == 0, sem="relaxed")


@gluon.jit
def post(mail, letters, head, token, rows_left, position, num_keys, num_tiles, seen_tiles, more):
    """Write the consumers what comes next, as soon as they have read the letter before the last one."""
    boxes, full, empty = mail
    box = letters % 2
    mbarrier.wait(empty.index(box), (letters // 2 & 1) ^ 1)
    index = gl.arange(0, 8, gl.BlockedLayout([1], [32], [1], [0]))
    letter = gl.where(index == 0, head, 0) + gl.where(index == 1, token, 0) + gl.where(index == 2, rows_left, 0)
    letter += gl.where(index == 3, position, 0) + gl.where(index == 4, num_keys, 0)
    letter += gl.where(index == 5, num_tiles, 0) + gl.where(index == 6, seen_tiles, 0) + gl.where(index == 7, more, 0)
    boxes.index(box).store(letter)
    mbarrier.arrive(full.index(box), count=1)


@gluon.jit
def read_field(letter, INDEX: gl.constexpr):
    index = gl.arange(0, 8, letter.type.layout)
    return gl.sum(gl.where(index == INDEX, letter, 0), 0)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, tiles, mail, counter_ptr, batch, group, num_items,
    CAUSAL: gl.constexpr, TILE_Q: gl.constexpr, TILE_KV: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer that draws its items, but for the first, and tells the consumers of those that have a row.

    There are as many draws as items. Whoever draws last leaves the counter at 0, for the next launch.
    """
    passed = 0  # tiles of keys, of all items
    items = 0
    item = gl.program_id(0)
    while item < num_items:
        drawn = draw(counter_ptr)
        head, token, rows_left, position, first_key, num_keys, num_tiles, seen_tiles = find_item(
            item, *batch, CAUSAL, TILE_Q, TILE_KV
        )
        if rows_left > 0:
            post(mail, items, head, token, rows_left, position, num_keys, num_tiles, seen_tiles, 1)
            passed = fetch_item(
                q_desc, k_desc, v_desc, tiles, head, token, first_key, num_tiles, group, items, passed,
                TILE_Q, TILE_KV, HEAD_DIM, STAGES,
            )  # fmt: skip
            items += 1
        lane = gl.arange(0, 32, drawn.type.layout)
        before = gl.sum(gl.where(lane == 0, drawn, 0), 0)
        gl.store(counter_ptr, 0, mask=before == num_items - 1)
        item = gl.num_programs(0) + before
    post(mail, items, 0, 0, 0, 0, 0, 0, 0, 0)


@gluon.jit
def finish_item(acc, top, total, results, head, token, rows_left, SINKS: gl.constexpr, dtype: gl.constexpr):
    """Store a consumer's rows and their log-sum-exp."""
    out_ptr, lse_ptr, sinks_ptr, num_heads, _scale, stride_out_token, stride_out_head = results
    if SINKS:
        acc, top, total = add_sink(acc, top, total, sinks_ptr, head)
    total = gl.where(total > 0, total, 1.0)
    lse = (top + gl.log2(total)) * LN2
    row = gl.arange(0, total.shape[0], total.type.layout)
    gl.store(lse_ptr + (token + row).to(gl.int64) * num_heads + head, lse, mask=row < rows_left)
    store_rows(acc, total, out_ptr, token, head, rows_left, stride_out_token, stride_out_head, acc.shape[0], dtype)


@gluon.jit
def read_letter(mail, letters, FIRST_ROW: gl.constexpr):
    """What ``post`` wrote, of a consumer whose rows begin at ``FIRST_ROW`` of the tile."""
    boxes, full, empty = mail
    box = letters % 2
    mbarrier.wait(full.index(box), letters // 2 & 1)
    letter = boxes.index(box).load(gl.BlockedLayout([8], [32], [4], [0]))
    mbarrier.arrive(empty.index(box), count=1)
    return (
        read_field(letter, 0), read_field(letter, 1) + FIRST_ROW, read_field(letter, 2) - FIRST_ROW,
        read_field(letter, 3) + FIRST_ROW, read_field(letter, 4), read_field(letter, 5), read_field(letter, 6),
        read_field(letter, 7) != 0,
    )  # fmt: skip


@gluon.jit
def consume(
    tiles, mail, results, WHICH: gl.constexpr, SINKS: gl.constexpr, CAUSAL: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    """A consumer of items that the producer writes of: 64 of an item's queries, through all its tiles of keys.

    The first scores of an item are computed while the one before it is stored.
    """
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = tiles
    keys = (k_smem, v_smem, k_full, k_empty, v_full, v_empty)
    TILE_KV: gl.constexpr = k_smem.shape[1]
    scores_of = gl.zeros([ROWS, TILE_KV], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_KV, 16]))

    passed = 0
    items = 0
    head, token, rows_left, position, num_keys, num_tiles, seen_tiles, there = read_letter(mail, 0, WHICH * ROWS)
    mbarrier.wait(q_full.index(WHICH), 0, pred=there)
    scores = ask_for_scores(scores_of, q_smem.index(WHICH), keys, passed, there)
    scores = await_scores(scores, keys, passed, there)
    while there:
        half = items % 2 * 2 + WHICH
        acc, weights, top, total, passed, _turns = attend(
            scores_of, scores, passed, 0, position, num_keys, 0, num_tiles, seen_tiles, results[4],
            q_smem.index(half), keys, None, False, WHICH, CAUSAL, ROWS,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(half), count=1)
        old_head, old_token, old_rows = head, token, rows_left
        items += 1
        head, token, rows_left, position, num_keys, num_tiles, seen_tiles, there = read_letter(
            mail, items, WHICH * ROWS
        )
        half = items % 2 * 2 + WHICH
        acc = ask_for_values(acc, weights, keys, passed)
        mbarrier.wait(q_full.index(half), items // 2 & 1, pred=there)
        scores = ask_for_scores(scores_of, q_smem.index(half), keys, passed, there)
        acc = await_values(acc, keys, passed, 1)
        finish_item(acc, top, total, results, old_head, old_token, old_rows, SINKS, k_smem.dtype)
        scores = await_scores(scores, keys, passed, there)


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
    counter_ptr,  # [1], 0 between launches
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
    boxes = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mail = (boxes, barriers(2, 1), barriers(2, 2))
    fence_async_shared()

    tiles = (q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    batch = (
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_seqs, num_tokens, total_keys, num_heads, section, num_slots,
        num_halvings,
    )  # fmt: skip
    results = (out_ptr, lse_ptr, sinks_ptr, num_heads, scale_log2, stride_out_token, stride_out_head)
    gl.warp_specialize(
        [
            (consume, (tiles, mail, results, 0, SINKS, CAUSAL, TILE_Q // 2)),
            (consume, (tiles, mail, results, 1, SINKS, CAUSAL, TILE_Q // 2)),
            (produce, (
                q_desc, k_desc, v_desc, tiles, mail, counter_ptr, batch, group, num_slots * num_heads,
                CAUSAL, TILE_Q, TILE_KV, HEAD_DIM, STAGES,
            )),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # registers of a thread of theirs; the first consumer gets what is left, 240
    )  # fmt: skip


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
        zero_counters(q, 1),
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
