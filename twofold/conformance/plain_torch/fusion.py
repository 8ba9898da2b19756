"""The fusion ops in plain torch: composed in float32, rounded once; rotary is multiplication in the complex plane."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor as Array

from twofold.conformance.plain_torch.kv_cache import write_kv


def embedding(
    token_ids: Int[Array, " num_tokens"],
    weight: Float[Array, "vocab_size hidden_size"],
    *,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> Float[Array, "num_tokens hidden_size"]:
    _require(weight.ndim == 2 and token_ids.ndim == 1, "embedding", "token_ids and weight of one and two axes")
    return _deliver(F.embedding(token_ids.long(), weight), weight.dtype, out)


def rms_norm(
    x: Float[Array, "*rows hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "*rows hidden_size"] | None = None,
) -> Float[Array, "*rows hidden_size"]:
    return _deliver(_norm("rms_norm", _wide(x), weight, eps), x.dtype, out)


def add_rms_norm(
    x: Float[Array, "num_tokens hidden_size"],
    residual: Float[Array, "num_tokens hidden_size"],
    weight: Float[Array, " hidden_size"],
    *,
    eps: float,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
    residual_out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> tuple[Float[Array, "num_tokens hidden_size"], Float[Array, "num_tokens hidden_size"]]:
    _require(residual.shape == x.shape, "add_rms_norm", f"residual of shape {tuple(x.shape)}")
    total = _deliver(_wide(x) + _wide(residual), x.dtype, residual_out)
    return _deliver(_norm("add_rms_norm", _wide(total), weight, eps), x.dtype, out), total


def rms_norm_linear(
    x: Float[Array, "num_tokens hidden_size"],
    norm_weight: Float[Array, " hidden_size"],
    weight: Float[Array, "out_features hidden_size"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    eps: float,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    normed = _norm("rms_norm_linear", _wide(x), norm_weight, eps)
    return _deliver(_linear("rms_norm_linear", normed, weight, bias), x.dtype, out)


def linear_add(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    projected = _linear("linear_add", _wide(x), weight, bias)
    _require(residual.shape == projected.shape, "linear_add", f"residual of shape {tuple(projected.shape)}")
    return _deliver(_wide(residual) + projected, x.dtype, out)


def swiglu(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    *,
    out: Float[Array, "num_tokens intermediate_size"] | None = None,
) -> Float[Array, "num_tokens intermediate_size"]:
    return _deliver(_swiglu("swiglu", gate_up), gate_up.dtype, out)


def swiglu_linear_add(
    gate_up: Float[Array, "num_tokens twice_intermediate_size"],
    weight: Float[Array, "out_features intermediate_size"],
    residual: Float[Array, "num_tokens out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    projected = _linear("swiglu_linear_add", _swiglu("swiglu_linear_add", gate_up), weight, bias)
    _require(residual.shape == projected.shape, "swiglu_linear_add", f"residual of shape {tuple(projected.shape)}")
    return _deliver(_wide(residual) + projected, gate_up.dtype, out)


def rotary(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    cos: Float32[Array, "max_positions half_dim"],
    sin: Float32[Array, "max_positions half_dim"],
    positions: Int[Array, " num_tokens"],
    *,
    interleaved: bool = False,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]]:
    turned = (_turn("rotary", _wide(x), cos, sin, positions, interleaved).to(x.dtype) for x in (q, k))
    return next(turned), next(turned)


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
    op, q_wide, k_wide = "rotary_write_kv", _wide(q), _wide(k)
    q_wide = q_wide if q_norm is None else _norm(op, q_wide, q_norm, eps)
    k_wide = k_wide if k_norm is None else _norm(op, k_wide, k_norm, eps)
    k_wide = _turn(op, k_wide, cos, sin, positions, interleaved)

    write_kv(k_wide.to(k.dtype), v, k_cache, v_cache, slot_mapping)
    return _deliver(_turn(op, q_wide, cos, sin, positions, interleaved), q.dtype, out)


def _require(condition: bool, op: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{op}: expected {expected}")


def _wide(x: Array) -> Array:
    return x if x.dtype == torch.float64 else x.float()


def _deliver(result: Array, dtype: torch.dtype, out: Array | None) -> Array:
    if out is None:
        return result.to(dtype)
    _require(out.shape == result.shape and out.dtype == dtype, "out", f"{dtype} of shape {tuple(result.shape)}")
    return out.copy_(result)


def _norm(op: str, x: Array, weight: Array, eps: float) -> Array:
    _require(x.shape[-1:] == weight.shape, op, f"rows of {tuple(weight.shape)}, not of {tuple(x.shape)}")
    _require(eps > 0, op, f"eps above 0, not {eps}")
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def _linear(op: str, x: Array, weight: Array, bias: Array | None) -> Array:
    _require(x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1], op, f"weight [*, {x.shape[-1]}]")
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _swiglu(op: str, gate_up: Array) -> Array:
    _require(gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0, op, "gate_up as rows of even length")
    gate, up = _wide(gate_up).chunk(2, dim=1)
    return F.silu(gate) * up


def _turn(op: str, x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool) -> Array:
    """Pairs as complex numbers, times e^(i angle)."""
    _require(x.ndim == 3 and len(x) == len(positions), op, f"heads of {len(positions)} tokens")
    half_dim = cos.shape[1]
    _require(2 * half_dim <= x.shape[2], op, f"tables for at most {x.shape[2]} features")
    rotation = torch.complex(cos, sin)[positions.long()][:, None].to(torch.promote_types(x.dtype, torch.complex64))
    pairs, rest = x[..., : 2 * half_dim], x[..., 2 * half_dim :]
    if interleaved:
        turned = torch.complex(pairs[..., 0::2], pairs[..., 1::2]) * rotation
        turned = torch.stack([turned.real, turned.imag], dim=-1).flatten(-2)
    else:
        turned = torch.complex(*pairs.split(half_dim, dim=-1)) * rotation
        turned = torch.cat([turned.real, turned.imag], dim=-1)
    return torch.cat([turned, rest], dim=-1)
