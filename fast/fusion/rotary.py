"""Rotary position embedding, alone and with norms and the KV write, in Triton. What it is for:
`reference/fusion/rotary.py`."""

import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor as Array

from fast._checks import (
    checking_values,
    require,
    require_dtype,
    require_float,
    require_integers,
    require_out,
    require_range,
    require_same_device,
    require_shape,
    require_values,
)
from fast._triton.overlap import overlapped, wait_for_predecessor
from fast._triton.platform import cdiv, next_power_of_2
from fast.fusion._heads import (
    as_stored,
    choose_tile,
    load_angles,
    load_heads,
    load_pairs,
    store_heads,
    token_and_head,
    turn_heads,
)

# ---- the rotation alone -----------------------------------------------------------------------------------------


@triton.jit
def _rotary_kernel(
    x_ptr,  # [num_tokens, num_heads, head_dim]
    cos_ptr,  # [max_positions, half_dim]
    sin_ptr,  # [max_positions, half_dim]
    positions_ptr,  # [num_tokens]
    out_ptr,  # like x
    stride_x_token,
    stride_x_head,
    stride_x_dim,
    stride_cos_row,
    stride_cos_pair,
    stride_sin_row,
    stride_sin_pair,
    stride_positions,
    stride_out_token,
    stride_out_head,
    stride_out_dim,
    num_tokens,
    num_heads,
    max_positions,
    half_dim,
    head_dim,
    TILE_ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_predecessor(OVERLAP)
    token, head = token_and_head(tl.program_id(0), num_heads, TILE_ROWS)
    exist = token < num_tokens
    in_ptrs = x_ptr + token * stride_x_token + head * stride_x_head
    first, second = load_pairs(in_ptrs, stride_x_dim, exist, half_dim, HALF, INTERLEAVED)
    cos, sin = load_angles(
        cos_ptr, sin_ptr, positions_ptr,
        stride_cos_row, stride_cos_pair, stride_sin_row, stride_sin_pair, stride_positions,
        token, num_tokens, max_positions, half_dim, HALF,
    )  # fmt: skip
    out_ptrs = out_ptr + token * stride_out_token + head * stride_out_head
    turn_heads(
        first, second, in_ptrs, out_ptrs, stride_x_dim, stride_out_dim, exist, exist, cos, sin, None, 0, 0.0,
        half_dim, head_dim, HALF, REST, INTERLEAVED,
    )  # fmt: skip


def rotary(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    cos: Float32[Array, "max_positions half_dim"],
    sin: Float32[Array, "max_positions half_dim"],
    positions: Int[Array, " num_tokens"],
    *,
    interleaved: bool = False,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]]:
    """Same contract as `reference.fusion.rotary.rotary`.

    Grid: one program per some heads, of one token or several; one launch for q, one for k. (A step of the engine takes
    ``rotary_write_kv``, where all is one launch.)
    Moves: every head once in and once out; a token's rows of the tables.
    Limits: a position that has no row (an error when values are checked) gives zeros.
    """
    half_dim, head_dim = _check("rotary", q, k, cos, sin, positions)
    turned = q.new_empty(q.shape), k.new_empty(k.shape)
    for x, out in zip((q, k), turned):
        if out.numel():
            num_tokens, num_heads, _ = x.shape
            tile_rows, num_warps = choose_tile(head_dim)
            _rotary_kernel[(cdiv(num_tokens * num_heads, tile_rows),)](
                x, cos, sin, positions, out,
                *x.stride(), *cos.stride(), *sin.stride(), positions.stride(0), *out.stride(),
                num_tokens, num_heads, cos.shape[0], half_dim, head_dim,
                TILE_ROWS=tile_rows, **_tile_dims(half_dim, head_dim),
                INTERLEAVED=interleaved, num_warps=num_warps, **overlapped(x),
            )  # fmt: skip
    return turned


def _tile_dims(half_dim: int, head_dim: int) -> dict[str, int]:
    rest = head_dim - 2 * half_dim
    return {"HALF": next_power_of_2(max(half_dim, 1)), "REST": next_power_of_2(rest) if rest else 0}


def _check(op: str, q: Array, k: Array, cos: Array, sin: Array, positions: Array) -> tuple[int, int]:
    """(half_dim, head_dim) of arguments that fit each other."""
    require_shape(op, "q", q, (len(positions), None, None))
    head_dim = q.shape[2]
    require_shape(op, "k", k, (len(positions), None, head_dim))
    require_shape(op, "cos", cos, (None, None))
    require_shape(op, "sin", sin, tuple(cos.shape))
    require_float(op, "q", q)
    require_dtype(op, "k", k, q.dtype)
    require_float(op, "cos", cos)
    require_float(op, "sin", sin)
    require_integers(op, "positions", positions, (len(q),))
    max_positions, half_dim = cos.shape
    require(2 * half_dim <= head_dim, op, "cos", f"at most {head_dim // 2} columns", half_dim)
    require_same_device(op, q=q, k=k, cos=cos, sin=sin, positions=positions)
    require_range(op, "positions", positions, 0, max_positions)
    return half_dim, head_dim


# ---- with norms and the write to the cache ----------------------------------------------------------------------


@triton.jit
def _rotary_write_kv_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_ptr,  # [num_tokens, num_kv_heads, head_dim]
    v_ptr,  # [num_tokens, num_kv_heads, head_dim]
    cos_ptr,  # [max_positions, half_dim]
    sin_ptr,  # [max_positions, half_dim]
    positions_ptr,  # [num_tokens]
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    slot_mapping_ptr,  # [num_tokens]
    q_norm_ptr,  # [head_dim]; None: no norm
    k_norm_ptr,  # [head_dim]; None: no norm
    out_ptr,  # like q
    stride_q_token,
    stride_q_head,
    stride_q_dim,
    stride_k_token,
    stride_k_head,
    stride_k_dim,
    stride_v_token,
    stride_v_head,
    stride_v_dim,
    stride_cos_row,
    stride_cos_pair,
    stride_sin_row,
    stride_sin_pair,
    stride_positions,
    stride_k_cache_block,
    stride_k_cache_slot,
    stride_k_cache_head,
    stride_k_cache_dim,
    stride_v_cache_block,
    stride_v_cache_slot,
    stride_v_cache_head,
    stride_v_cache_dim,
    stride_slot_mapping,
    stride_q_norm,
    stride_k_norm,
    stride_out_token,
    stride_out_head,
    stride_out_dim,
    num_tokens,
    num_heads,
    num_kv_heads,
    max_positions,
    num_slots,
    block_size,
    half_dim,
    head_dim,
    eps,
    TILE_ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    TILE_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_predecessor(OVERLAP)
    num_q_programs = tl.cdiv(num_tokens * num_heads, TILE_ROWS)
    if tl.program_id(0) < num_q_programs:
        token, head = token_and_head(tl.program_id(0), num_heads, TILE_ROWS)
        exist = token < num_tokens
        q_ptrs = q_ptr + token * stride_q_token + head * stride_q_head
        first, second = load_pairs(q_ptrs, stride_q_dim, exist, half_dim, HALF, INTERLEAVED)
        cos, sin = load_angles(
            cos_ptr, sin_ptr, positions_ptr,
            stride_cos_row, stride_cos_pair, stride_sin_row, stride_sin_pair, stride_positions,
            token, num_tokens, max_positions, half_dim, HALF,
        )  # fmt: skip
        out_ptrs = out_ptr + token * stride_out_token + head * stride_out_head
        turn_heads(
            first, second, q_ptrs, out_ptrs, stride_q_dim, stride_out_dim, exist, exist, cos, sin,
            q_norm_ptr, stride_q_norm, eps, half_dim, head_dim, HALF, REST, INTERLEAVED,
        )  # fmt: skip
    else:
        token, head = token_and_head(tl.program_id(0) - num_q_programs, num_kv_heads, TILE_ROWS)
        exist = token < num_tokens
        k_ptrs = k_ptr + token * stride_k_token + head * stride_k_head
        first, second = load_pairs(k_ptrs, stride_k_dim, exist, half_dim, HALF, INTERLEAVED)
        dim = tl.arange(0, TILE_D)
        v = load_heads(v_ptr + token * stride_v_token + head * stride_v_head, dim, stride_v_dim, exist, dim < head_dim)
        slot = tl.load(slot_mapping_ptr + token * stride_slot_mapping, mask=exist, other=-1)
        cos, sin = load_angles(
            cos_ptr, sin_ptr, positions_ptr,
            stride_cos_row, stride_cos_pair, stride_sin_row, stride_sin_pair, stride_positions,
            token, num_tokens, max_positions, half_dim, HALF,
        )  # fmt: skip
        written = (slot >= 0) & (slot < num_slots)
        place = slot.to(tl.int32)  # of those that exist; dividing 64 bits takes a hundred instructions
        block, offset = (place // block_size).to(tl.int64), (place % block_size).to(tl.int64)
        k_slots = k_cache_ptr + block * stride_k_cache_block + offset * stride_k_cache_slot + head * stride_k_cache_head
        v_slots = v_cache_ptr + block * stride_v_cache_block + offset * stride_v_cache_slot + head * stride_v_cache_head
        turn_heads(
            first, second, k_ptrs, k_slots, stride_k_dim, stride_k_cache_dim, exist, written, cos, sin,
            k_norm_ptr, stride_k_norm, eps, half_dim, head_dim, HALF, REST, INTERLEAVED,
        )  # fmt: skip
        store_heads(
            v_slots, dim, stride_v_cache_dim, as_stored(v, v_slots, v_ptr.dtype.element_ty), written, dim < head_dim
        )


def rotary_write_kv(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    cos: Float32[Array, "max_positions half_dim"],
    sin: Float32[Array, "max_positions half_dim"],
    positions: Int[Array, " num_tokens"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
    *,
    q_norm: Float[Array, " head_dim"] | None = None,
    k_norm: Float[Array, " head_dim"] | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Same contract as `reference.fusion.rotary.rotary_write_kv`.

    Grid: one program per some query heads, of one token or several; then one per so many keys with their values.
    Moves: q, k and v once in and once out, where norms, rotary and a write by themselves move q and k three times.
    Limits: a slot out of range is skipped like -1, a position that has no row of the tables gives zeros (errors when
    values are checked). Nothing is rounded between the norm and the rotation.
    """
    op = "rotary_write_kv"
    half_dim, head_dim = _check(op, q, k, cos, sin, positions)
    num_tokens, num_heads, _ = q.shape
    num_kv_heads = k.shape[1]
    _check_write(op, k, v, k_cache, v_cache, slot_mapping)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            require_shape(op, name, norm, (head_dim,))
            require_float(op, name, norm)
            require(eps > 0, op, "eps", "a number above 0", eps)
    require_same_device(
        op, q=q, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping, q_norm=q_norm, k_norm=k_norm, out=out
    )
    require_out(op, out, tuple(q.shape), q.dtype)
    out = q.new_empty(q.shape) if out is None else out
    if num_tokens and head_dim:
        tile_rows, num_warps = choose_tile(head_dim)
        num_programs = cdiv(num_tokens * num_heads, tile_rows) + cdiv(num_tokens * num_kv_heads, tile_rows)
        _rotary_write_kv_kernel[(num_programs,)](
            q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, q_norm, k_norm, out,
            *q.stride(), *k.stride(), *v.stride(), *cos.stride(), *sin.stride(), positions.stride(0),
            *k_cache.stride(), *v_cache.stride(), slot_mapping.stride(0),
            0 if q_norm is None else q_norm.stride(0), 0 if k_norm is None else k_norm.stride(0), *out.stride(),
            num_tokens, num_heads, num_kv_heads, cos.shape[0], k_cache.shape[0] * k_cache.shape[1], k_cache.shape[1],
            half_dim, head_dim, eps,
            TILE_ROWS=tile_rows, **_tile_dims(half_dim, head_dim), TILE_D=next_power_of_2(head_dim),
            INTERLEAVED=interleaved, num_warps=num_warps, **overlapped(q),
        )  # fmt: skip
    return out


def _check_write(op: str, k: Array, v: Array, k_cache: Array, v_cache: Array, slot_mapping: Array) -> None:
    require_shape(op, "v", v, tuple(k.shape))
    require_float(op, "v", v)
    require_shape(op, "k_cache", k_cache, (None, None, *k.shape[1:]))
    require_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
    require_float(op, "k_cache", k_cache)
    require_float(op, "v_cache", v_cache)
    require_integers(op, "slot_mapping", slot_mapping, (len(k),))
    if checking_values() and slot_mapping.numel():
        require_range(op, "slot_mapping", slot_mapping, -1, k_cache.shape[0] * k_cache.shape[1])
        slots = slot_mapping[slot_mapping >= 0]
        once = len(slots.unique()) == len(slots)
        require_values(once, op, "slot_mapping", "every slot at most once", slot_mapping.tolist())
