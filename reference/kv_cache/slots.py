"""The paged cache's data movement: write and gather tokens by slot, copy blocks, swap them out and in.

A *slot* is the place of one token, ``block * block_size + offset``; the layer above (`block_table`) decides which
token gets which slot, these ops only move data. The pool is one allocation of bytes, a row for each block: everything
a block holds, all layers, scales included, lies in its row. So copying and swapping move rows and know no format, and
a layer's ``k_cache`` is a strided view into the rows (nothing here may assume that a cache is contiguous).
"""

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped
from numpy import ndarray as Array

from reference._checks import require, require_float, require_shape
from reference.kv_cache._paging import as_stored, check_tokens, locate


def write_kv(
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> None:
    r"""Put the keys and values of new tokens into their slots.

    .. math::
        k\_cache[\lfloor slot_t / block\_size \rfloor,\ slot_t \bmod block\_size] = k_t

    Args:
        k: Keys of the new tokens, already rotated.
        v: Their values.
        k_cache: Written: only the named slots, every other byte stays as it is.
        v_cache: Written, likewise.
        slot_mapping: Where each token goes, in [0, num_blocks * block_size), no slot twice; -1 skips the token, whose
            ``k`` and ``v`` may then hold anything.

    Numerics: where the cache's dtype differs from that of ``k``, values are rounded to nearest even, and those beyond
    its range become its largest finite value: one infinite key would turn the whole sequence into NaN.

    Raises:
        ValueError: If shapes disagree, or a slot is out of range or named twice.

    Source:
        PagedAttention (Kwon et al., 2023), section 4.3; its kernel is called ``reshape_and_cache``.

    Example:
        >>> k_cache, v_cache = np.zeros((2, 2, 2, 1, 1))     # two blocks of two tokens, one head of one channel
        >>> k = np.array([5.0, 6.0, 7.0]).reshape(3, 1, 1)
        >>> write_kv(k, -k, k_cache, v_cache, np.array([3, 0, -1]))
        >>> k_cache[:, :, 0, 0].tolist()                     # token 0 in block 1, offset 1; token 2 nowhere
        [[6.0, 0.0], [0.0, 5.0]]
    """
    check_tokens("write_kv", k, v, slot_mapping)
    require_shape("write_kv", "k_cache", k_cache, (None, None, *k.shape[1:]))
    require_shape("write_kv", "v_cache", v_cache, k_cache.shape)
    require_float("write_kv", "k_cache", k_cache)
    require_float("write_kv", "v_cache", v_cache)
    rows, slots = locate("write_kv", "slot_mapping", slot_mapping, k_cache.shape[:2])
    k_cache[slots] = as_stored(k[rows], k_cache.dtype)
    v_cache[slots] = as_stored(v[rows], v_cache.dtype)


def gather_kv(
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
) -> tuple[Float[Array, "num_tokens num_kv_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]]:
    r"""Read keys and values back from their slots: the inverse of ``write_kv``.

    .. math::
        k_t = k\_cache[\lfloor slot_t / block\_size \rfloor,\ slot_t \bmod block\_size]

    Args:
        k_cache: The paged keys.
        v_cache: The paged values.
        slot_mapping: Which slot each row is read from, in [0, num_blocks * block_size); a slot may be read any number
            of times. -1 gives a row of zeros.

    Returns:
        Keys and values in the caches' dtypes, freshly allocated.

    Raises:
        ValueError: If the caches' shapes disagree or a slot is out of range.

    Example:
        >>> cache = np.arange(4.0).reshape(2, 2, 1, 1)
        >>> k, v = gather_kv(cache, -cache, np.array([3, -1, 3]))
        >>> k.ravel().tolist(), v.ravel().tolist()
        ([3.0, 0.0, 3.0], [-3.0, 0.0, -3.0])
    """
    require_shape("gather_kv", "k_cache", k_cache, (None, None, None, None))
    require_shape("gather_kv", "v_cache", v_cache, k_cache.shape)
    require_float("gather_kv", "k_cache", k_cache)
    require_float("gather_kv", "v_cache", v_cache)
    require_shape("gather_kv", "slot_mapping", slot_mapping, (None,))
    rows, slots = locate("gather_kv", "slot_mapping", slot_mapping, k_cache.shape[:2], distinct=False)
    k = np.zeros((len(slot_mapping), *k_cache.shape[2:]), k_cache.dtype)
    v = np.zeros((len(slot_mapping), *v_cache.shape[2:]), v_cache.dtype)
    k[rows], v[rows] = k_cache[slots], v_cache[slots]
    return k, v


def copy_blocks(
    pool: Shaped[Array, "num_blocks block_bytes"],
    source_ids: Int[Array, " num_copies"],
    target_ids: Int[Array, " num_copies"],
) -> None:
    r"""Copy whole blocks inside the pool: the data half of copy-on-write.

    .. math::
        pool[target_c] = pool[source_c]

    Args:
        pool: Written: the rows of ``target_ids``. Any dtype, rows may be strided.
        source_ids: Blocks to copy from; one may be copied to many targets.
        target_ids: Blocks to overwrite, all different, none of them a source: the copies then happen in any order,
            or all at once, with the same result.

    Raises:
        ValueError: If lengths disagree, an id is out of range, a target is named twice or is a source too.

    Example:
        >>> pool = np.arange(6, dtype=np.uint8).reshape(3, 2)
        >>> copy_blocks(pool, np.array([0]), np.array([2]))
        >>> pool.tolist()
        [[0, 1], [2, 3], [0, 1]]
    """
    require_shape("copy_blocks", "pool", pool, (None, None))
    require_shape("copy_blocks", "target_ids", target_ids, source_ids.shape)
    _check_ids("copy_blocks", "source_ids", source_ids, len(pool), distinct=False)
    _check_ids("copy_blocks", "target_ids", target_ids, len(pool), distinct=True)
    both = np.intersect1d(source_ids, target_ids)
    require(not len(both), "copy_blocks", "target_ids", "blocks that are not sources too", both.tolist())
    pool[target_ids] = pool[source_ids]


def swap_out(
    pool: Shaped[Array, "num_blocks block_bytes"], block_ids: Int[Array, " num_swapped"]
) -> Shaped[Array, "num_swapped block_bytes"]:
    r"""Copy blocks out of the pool, so that it can hand them to somebody else.

    .. math::
        rows_c = pool[block\_ids_c]

    Args:
        pool: Any dtype, rows may be strided; not changed.
        block_ids: Blocks to read, in any order.

    Returns:
        Their rows, contiguous and independent of the pool.

    Raises:
        ValueError: If an id is out of range.

    Source:
        PagedAttention (Kwon et al., 2023), section 4.5: preemption by swapping.

    Example:
        >>> pool = np.arange(6, dtype=np.uint8).reshape(3, 2)
        >>> rows = swap_out(pool, np.array([2, 0]))
        >>> pool[:] = 0
        >>> rows.tolist()
        [[4, 5], [0, 1]]
    """
    require_shape("swap_out", "pool", pool, (None, None))
    _check_ids("swap_out", "block_ids", block_ids, len(pool), distinct=False)
    return pool[block_ids]


def swap_in(
    rows: Shaped[Array, "num_swapped block_bytes"],
    pool: Shaped[Array, "num_blocks block_bytes"],
    block_ids: Int[Array, " num_swapped"],
) -> None:
    r"""Put blocks that were swapped out back into the pool, seldom where they came from.

    .. math::
        pool[block\_ids_c] = rows_c

    Args:
        rows: What ``swap_out`` gave.
        pool: Written: the rows of ``block_ids``. The dtype of ``rows``.
        block_ids: Where each row goes, all different.

    Raises:
        ValueError: If shapes or dtypes disagree, or an id is out of range or named twice.

    Example:
        >>> pool = np.zeros((3, 2), np.uint8)
        >>> swap_in(np.array([[4, 5]], np.uint8), pool, np.array([1]))
        >>> pool.tolist()
        [[0, 0], [4, 5], [0, 0]]
    """
    require_shape("swap_in", "pool", pool, (None, None))
    _check_ids("swap_in", "block_ids", block_ids, len(pool), distinct=True)
    require_shape("swap_in", "rows", rows, (len(block_ids), pool.shape[1]))
    require(rows.dtype == pool.dtype, "swap_in", "rows", f"the pool's dtype {pool.dtype}", rows.dtype)
    pool[block_ids] = rows


def _check_ids(op: str, argument: str, ids: np.ndarray, num_blocks: int, *, distinct: bool) -> None:
    require(ids.ndim == 1 and ids.dtype.kind in "iu", op, argument, "a row of block ids", (ids.shape, ids.dtype))
    in_range = ids.min(initial=0) >= 0 and ids.max(initial=-1) < num_blocks
    require(in_range, op, argument, f"block ids in [0, {num_blocks})", ids.tolist())
    if distinct:
        require(len(np.unique(ids)) == len(ids), op, argument, "every block at most once", ids.tolist())
