"""The paged cache's data movement, in Triton. What the ops are for: `reference/kv_cache/slots.py`.

Two kernels: one puts tokens into slots or takes them out, one moves rows of the pool. Both are nothing but loads and
stores; what matters is that these are wide, and that enough of them are in flight.
"""

# pyright: reportCallIssue=false
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor as Array

from fast._checks import (
    checking_values,
    require,
    require_dtype,
    require_float,
    require_integers,
    require_range,
    require_same_device,
    require_shape,
    require_values,
)
from fast._triton.platform import cdiv, next_power_of_2, require_runnable
from fast._triton.rounding import to_dtype_saturating

TILE_WORDS = 4096  # of a row that one program moves: 16 KiB, 4 loads of 16 bytes for each of its threads
NUM_WARPS = 8
TILE_VALUES = 2048  # of a token that one program writes; the rows of most models fit at once


# ---- tokens -----------------------------------------------------------------------------------------------------


@triton.jit
def as_stored(x, dtype: tl.constexpr):
    """``x`` in a cache's dtype: exact where that is wider, otherwise rounded to nearest, saturating."""
    if x.dtype == dtype:
        y = x
    elif dtype == tl.float32:
        y = x.to(tl.float32)
    else:
        y = to_dtype_saturating(x.to(tl.float32), dtype)
    return y


@triton.jit
def _write_kv_kernel(
    k_ptr,  # [num_tokens, num_kv_heads, head_dim]
    v_ptr,  # [num_tokens, num_kv_heads, head_dim]
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    slot_mapping_ptr,  # [num_tokens]
    stride_slot_mapping,
    stride_k_token, stride_k_head, stride_k_dim,
    stride_v_token, stride_v_head, stride_v_dim,
    stride_k_cache_block, stride_k_cache_offset, stride_k_cache_head, stride_k_cache_dim,
    stride_v_cache_block, stride_v_cache_offset, stride_v_cache_head, stride_v_cache_dim,
    num_slots,
    block_size,
    num_values,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token * stride_slot_mapping).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        block, offset = slot // block_size, slot % block_size
        value = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = value < num_values
        head, dim = value // HEAD_DIM, value % HEAD_DIM

        k = tl.load(k_ptr + token * stride_k_token + head * stride_k_head + dim * stride_k_dim, mask=inside)
        v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + dim * stride_v_dim, mask=inside)
        k_row = k_cache_ptr + block * stride_k_cache_block + offset * stride_k_cache_offset
        v_row = v_cache_ptr + block * stride_v_cache_block + offset * stride_v_cache_offset
        k_cells = k_row + head * stride_k_cache_head + dim * stride_k_cache_dim
        v_cells = v_row + head * stride_v_cache_head + dim * stride_v_cache_dim
        tl.store(k_cells, as_stored(k, k_cache_ptr.dtype.element_ty), mask=inside)
        tl.store(v_cells, as_stored(v, v_cache_ptr.dtype.element_ty), mask=inside)


def write_kv(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    """Same contract as `reference.kv_cache.slots.write_kv`.

    Grid: one program per token; it owns the token's slot, in keys and values.
    Moves: every key and value once in and once out, and the slots.
    Limits: fp32, fp16 or bf16 on either side.
    """
    op = "write_kv"
    require_tokens(op, k, v, slot_mapping)
    require_shape(op, "k_cache", k_cache, (None, None, *k.shape[1:]))
    require_shape(op, "v_cache", v_cache, k_cache.shape)
    require_float(op, "k_cache", k_cache)
    require_float(op, "v_cache", v_cache)
    require_same_device(op, k=k, k_cache=k_cache, v_cache=v_cache)
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    require_slots(op, "slot_mapping", slot_mapping, num_slots)
    if k.numel() == 0 or num_slots == 0:
        return
    launch_write_kv(k, v, k_cache, v_cache, slot_mapping)


def launch_write_kv(k: Array, v: Array, k_cache: Array, v_cache: Array, slot_mapping: Array) -> None:
    """The kernel of ``write_kv``, for arguments that were checked and are not empty."""
    num_slots, num_values = k_cache.shape[0] * k_cache.shape[1], k.shape[1] * k.shape[2]
    tile = min(next_power_of_2(num_values), TILE_VALUES)
    _write_kv_kernel[(len(k), cdiv(num_values, tile))](
        k, v, k_cache, v_cache, slot_mapping, slot_mapping.stride(0),
        *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(),
        num_slots, k_cache.shape[1], num_values,
        HEAD_DIM=k.shape[2], TILE=tile,
    )  # fmt: skip


@triton.jit
def _gather_kv_kernel(
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    k_ptr,  # [num_tokens, num_kv_heads, head_dim], contiguous
    v_ptr,  # [num_tokens, num_kv_heads, head_dim], contiguous
    slot_mapping_ptr,  # [num_tokens]
    stride_slot_mapping,
    stride_k_cache_block, stride_k_cache_offset, stride_k_cache_head, stride_k_cache_dim,
    stride_v_cache_block, stride_v_cache_offset, stride_v_cache_head, stride_v_cache_dim,
    num_slots,
    block_size,
    num_values,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token * stride_slot_mapping).to(tl.int64)
    has_slot = (slot >= 0) & (slot < num_slots)
    block, offset = slot // block_size, slot % block_size
    value = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = value < num_values
    read = tl.where(has_slot, inside, False)
    head, dim = value // HEAD_DIM, value % HEAD_DIM

    k_row = k_cache_ptr + block * stride_k_cache_block + offset * stride_k_cache_offset
    v_row = v_cache_ptr + block * stride_v_cache_block + offset * stride_v_cache_offset
    k = tl.load(k_row + head * stride_k_cache_head + dim * stride_k_cache_dim, mask=read, other=0.0)
    v = tl.load(v_row + head * stride_v_cache_head + dim * stride_v_cache_dim, mask=read, other=0.0)
    tl.store(k_ptr + token * num_values + value, k, mask=inside)
    tl.store(v_ptr + token * num_values + value, v, mask=inside)


def gather_kv(
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> tuple[Float[Array, "num_tokens num_kv_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]]:
    """Same contract as `reference.kv_cache.slots.gather_kv`.

    Grid: one program per row of the result; it owns the row, of keys and of values.
    Moves: every row once in and once out, and the slots.
    Limits: fp32, fp16 or bf16.
    """
    op = "gather_kv"
    require_shape(op, "k_cache", k_cache, (None, None, None, None))
    require_shape(op, "v_cache", v_cache, k_cache.shape)
    require_float(op, "k_cache", k_cache)
    require_float(op, "v_cache", v_cache)
    require_integers(op, "slot_mapping", slot_mapping, (None,))
    require_same_device(op, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
    num_blocks, block_size, num_kv_heads, head_dim = k_cache.shape
    require_slots(op, "slot_mapping", slot_mapping, num_blocks * block_size, distinct=False)
    k = k_cache.new_empty(len(slot_mapping), num_kv_heads, head_dim)
    v = v_cache.new_empty(len(slot_mapping), num_kv_heads, head_dim)
    num_values = num_kv_heads * head_dim
    if k.numel():
        tile = min(next_power_of_2(num_values), TILE_VALUES)
        _gather_kv_kernel[(len(k), cdiv(num_values, tile))](
            k_cache, v_cache, k, v, slot_mapping, slot_mapping.stride(0), *k_cache.stride(), *v_cache.stride(),
            num_blocks * block_size, max(block_size, 1), num_values, HEAD_DIM=head_dim, TILE=tile,
        )  # fmt: skip
    return k, v


# ---- blocks -----------------------------------------------------------------------------------------------------


@triton.jit
def _move_rows_kernel(
    source_ptr,  # [num_sources, row_words]
    target_ptr,  # [num_targets, row_words]
    source_ids_ptr,  # [num_moves], or None: row i comes from row i
    target_ids_ptr,  # [num_moves], or None: row i goes to row i
    stride_source_ids, stride_target_ids,
    stride_source_row, stride_source_word,
    stride_target_row, stride_target_word,
    num_sources,
    num_targets,
    row_words,
    TILE: tl.constexpr,
):  # fmt: skip
    """An id out of range moves nothing; where the target is a fresh array, its row becomes 0."""
    move = tl.program_id(0).to(tl.int64)
    source, target = move, move
    if source_ids_ptr is not None:
        source = tl.load(source_ids_ptr + move * stride_source_ids).to(tl.int64)
    if target_ids_ptr is not None:
        target = tl.load(target_ids_ptr + move * stride_target_ids).to(tl.int64)
    readable = (source >= 0) & (source < num_sources)
    writable = (target >= 0) & (target < num_targets)
    if target_ids_ptr is not None:
        writable = writable & readable

    word = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = word < row_words
    source_words = source_ptr + source * stride_source_row + word * stride_source_word
    target_words = target_ptr + target * stride_target_row + word * stride_target_word
    words = tl.load(source_words, mask=tl.where(readable, inside, False), other=0)
    tl.store(target_words, words, mask=tl.where(writable, inside, False))


def copy_blocks(
    pool: Shaped[Array, "num_blocks block_bytes"],
    source_ids: Int[Array, " num_copies"],
    target_ids: Int[Array, " num_copies"],
) -> None:
    """Same contract as `reference.kv_cache.slots.copy_blocks`.

    Grid: one program per 16 KiB of a copy; it owns that part of the target row.
    Moves: every row once in and once out.
    """
    op = "copy_blocks"
    require_shape(op, "pool", pool, (None, None))
    require_integers(op, "source_ids", source_ids, (None,))
    require_integers(op, "target_ids", target_ids, tuple(source_ids.shape))
    require_ids(op, "source_ids", source_ids, len(pool), distinct=False)
    require_ids(op, "target_ids", target_ids, len(pool), distinct=True)
    if checking_values():
        none_is_both = ~torch.isin(target_ids, source_ids).any()
        require_values(none_is_both, op, "target_ids", "blocks that are not sources too", target_ids.tolist())
    _move_rows(op, pool, pool, source_ids, target_ids)


def swap_out(
    pool: Shaped[Array, "num_blocks block_bytes"], block_ids: Int[Array, " num_swapped"]
) -> Shaped[Array, "num_swapped block_bytes"]:
    """Same contract as `reference.kv_cache.slots.swap_out`; the rows are on the device of the pool.

    Grid: one program per 16 KiB of a row; it owns that part of the result.
    Moves: every row once in and once out. (Then `to_host` takes all of them over the bus in one piece.)
    """
    op = "swap_out"
    require_shape(op, "pool", pool, (None, None))
    require_integers(op, "block_ids", block_ids, (None,))
    require_ids(op, "block_ids", block_ids, len(pool), distinct=False)
    rows = pool.new_empty(len(block_ids), pool.shape[1])
    _move_rows(op, pool, rows, block_ids, None)
    return rows


def swap_in(
    rows: Shaped[Array, "num_swapped block_bytes"],
    pool: Shaped[Array, "num_blocks block_bytes"],
    block_ids: Int[Array, " num_swapped"],
) -> None:
    """Same contract as `reference.kv_cache.slots.swap_in`; the rows are on the device of the pool.

    Grid: one program per 16 KiB of a row; it owns that part of the pool's row.
    Moves: every row once in and once out.
    """
    op = "swap_in"
    require_shape(op, "pool", pool, (None, None))
    require_integers(op, "block_ids", block_ids, (None,))
    require_ids(op, "block_ids", block_ids, len(pool), distinct=True)
    require_shape(op, "rows", rows, (len(block_ids), pool.shape[1]))
    require_dtype(op, "rows", rows, pool.dtype)
    _move_rows(op, rows, pool, None, block_ids)


def _move_rows(op: str, source: Array, target: Array, source_ids: Array | None, target_ids: Array | None) -> None:
    require_runnable(op, "pool", target)
    require_same_device(op, pool=target, rows=source, source_ids=source_ids, block_ids=target_ids)
    ids = [x for x in (source_ids, target_ids) if x is not None]
    if len(ids[0]) == 0 or source.numel() == 0 or target.numel() == 0:
        return
    source, target = as_words(source, target)
    row_words = source.shape[1]
    tile = min(next_power_of_2(row_words), TILE_WORDS)
    strides = (0 if x is None else x.stride(0) for x in (source_ids, target_ids))
    _move_rows_kernel[(len(ids[0]), cdiv(row_words, tile))](
        source, target, source_ids, target_ids, *strides, *source.stride(), *target.stride(),
        len(source), len(target), row_words, TILE=tile, num_warps=NUM_WARPS,
    )  # fmt: skip


def as_words(*pools: Array) -> tuple[Array, ...]:
    """Rows of any dtype as integers: of 4 bytes where all rows are made of such, otherwise as large as a value.

    (Of 8 bytes a stride of 64 bytes would be 8 words, and Triton makes wide loads of strides that 16 divides.)
    """
    size = pools[0].element_size()
    whole = size <= 4 and all(
        pool.stride(1) == 1 and all(n * size % 4 == 0 for n in (pool.shape[1], pool.stride(0), pool.storage_offset()))
        for pool in pools
    )
    bits = torch.int32 if whole else getattr(torch, f"int{8 * size}")
    return tuple(pool.view(bits) for pool in pools)


# ---- the door ---------------------------------------------------------------------------------------------------


def require_tokens(op: str, k: Array, v: Array, slot_mapping: Array, argument: str = "slot_mapping") -> None:
    """Keys and values of the same tokens, and a slot for each."""
    require_shape(op, "k", k, (None, None, None))
    require_shape(op, "v", v, k.shape)
    require_float(op, "k", k)
    require_float(op, "v", v)
    require_integers(op, argument, slot_mapping, (len(k),))
    require_same_device(op, k=k, v=v, **{argument: slot_mapping})


def require_slots(op: str, argument: str, slots: Array, num_slots: int, *, distinct: bool = True) -> None:
    """When checking: slots that exist, or -1; if ``distinct``, none of them twice."""
    if checking_values():
        require_range(op, argument, slots, -1, num_slots)
        slots = slots[slots >= 0]
        once = not distinct or len(slots.unique()) == len(slots)
        require_values(once, op, argument, "every slot at most once", slots.tolist())


def require_ids(op: str, argument: str, ids: Array, num_blocks: int, *, distinct: bool) -> None:
    """When checking: blocks that exist; if ``distinct``, none of them twice."""
    if checking_values():
        require_range(op, argument, ids, 0, num_blocks)
        once = not distinct or len(ids.unique()) == len(ids)
        require(once, op, argument, "every block at most once", ids.tolist())
