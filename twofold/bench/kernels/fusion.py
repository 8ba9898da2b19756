"""Decks of the ops that are one trip to memory: norms, SwiGLU, rotary with the KV write, and copies of blocks."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from twofold.bench.kernels import peers
from twofold.bench.kernels.rows import Arrays, Call, Row, Target, int32, random, size

TORCH, FLASHINFER = "torch", "flashinfer"
BANDWIDTH = Target(0.92, 0.97, ("copy",))


def rows() -> Iterator[Row]:
    for num_tokens, hidden_size in ((8192, 4096), (16384, 1024), (8192, 8192)):
        yield _add_norm_row(num_tokens, hidden_size)
    yield _norm_row(8192, 4096)
    for num_tokens, intermediate_size in ((8192, 14336), (16384, 3072)):
        yield _swiglu_row(num_tokens, intermediate_size)
    for num_tokens, num_heads, num_kv_heads, head_dim in ((8192, 32, 8, 128), (16384, 9, 3, 64)):
        yield _rotary_row(num_tokens, num_heads, num_kv_heads, head_dim)
    yield _copy_row(num_copies=1024, block_bytes=16 * 8 * 128 * 2 * 2)
    yield _embedding_row(8192, 131072, 4096)
    for num_tokens in (1, 32):
        yield _add_norm_row(num_tokens, 4096, targets=())
        yield _rotary_row(num_tokens, 32, 8, 128, targets=())
        yield _swiglu_row(num_tokens, 14336, targets=())


def _norm_row(num_tokens: int, hidden_size: int) -> Row:
    def build() -> Arrays:
        x = random(num_tokens, hidden_size)
        return Arrays(x=x, weight=random(hidden_size), out=torch.empty_like(x))

    return Row(
        "rms_norm",
        f"{num_tokens}×{hidden_size}",
        build,
        lambda backend, a: lambda: backend.rms_norm(a.x, a.weight, eps=1e-6, out=a.out),
        lambda a: size(a.x, a.out),
        peers={TORCH: lambda backend, a: lambda: F.rms_norm(a.x, a.weight.shape, a.weight, 1e-6)},
        targets=[BANDWIDTH],
    )


def _add_norm_row(num_tokens: int, hidden_size: int, targets: tuple[Target, ...] = (BANDWIDTH,)) -> Row:
    def build() -> Arrays:
        x = random(num_tokens, hidden_size)
        return Arrays(
            x=x, residual=random(num_tokens, hidden_size), weight=random(hidden_size), out=torch.empty_like(x),
            residual_out=torch.empty_like(x),
        )  # fmt: skip

    def ours(backend: Any, a: Arrays) -> Call:
        return lambda: backend.add_rms_norm(a.x, a.residual, a.weight, eps=1e-6, out=a.out, residual_out=a.residual_out)

    def flashinfer(backend: Any, a: Arrays) -> Call:
        op = peers.flashinfer().fused_add_rmsnorm
        return lambda: op(a.x, a.residual, a.weight, 1e-6)  # in place

    return Row(
        "add_rms_norm",
        f"{num_tokens}×{hidden_size}",
        build,
        ours,
        lambda a: size(a.x, a.residual, a.out, a.residual_out),
        peers={
            TORCH: lambda backend, a: lambda: F.rms_norm(a.x + a.residual, a.weight.shape, a.weight, 1e-6),
            FLASHINFER: flashinfer,
        },
        targets=targets,
    )


def _swiglu_row(num_tokens: int, intermediate_size: int, targets: tuple[Target, ...] = (BANDWIDTH,)) -> Row:
    def build() -> Arrays:
        gate_up = random(num_tokens, 2 * intermediate_size)
        return Arrays(gate_up=gate_up, out=torch.empty_like(gate_up[:, :intermediate_size]))

    def torch_swiglu(backend: Any, a: Arrays) -> Call:
        gate, up = a.gate_up.chunk(2, dim=1)
        return lambda: F.silu(gate) * up

    def flashinfer(backend: Any, a: Arrays) -> Call:
        op = peers.flashinfer().silu_and_mul
        return lambda: op(a.gate_up, a.out)

    return Row(
        "swiglu",
        f"{num_tokens}×{intermediate_size}",
        build,
        lambda backend, a: lambda: backend.swiglu(a.gate_up, out=a.out),
        lambda a: size(a.gate_up, a.out),
        peers={TORCH: torch_swiglu, FLASHINFER: flashinfer},
        targets=targets,
    )


def _rotary_row(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    targets: tuple[Target, ...] = (Target(0.85, 0.97, ("copy",)),),
) -> Row:
    block_size, max_positions = 16, 8192

    def build() -> Arrays:
        qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
        widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        q, k, v = (x.unflatten(1, (-1, head_dim)) for x in qkv.split(widths, dim=1))
        pool = random(-(-num_tokens // block_size), 2, block_size, num_kv_heads, head_dim)
        angles = torch.rand(max_positions, head_dim // 2)
        return Arrays(
            q=q, k=k, v=v, cos=angles.cos(), sin=angles.sin(),
            positions=int32([t % max_positions for t in range(num_tokens)]),
            k_cache=pool[:, 0], v_cache=pool[:, 1],
            slot_mapping=torch.randperm(pool.shape[0] * block_size)[:num_tokens],
            q_norm=random(head_dim), k_norm=random(head_dim), out=random(num_tokens, num_heads, head_dim),
        )  # fmt: skip

    def ours(backend: Any, a: Arrays) -> Call:
        return lambda: backend.rotary_write_kv(
            a.q, a.k, a.v, a.cos, a.sin, a.positions, a.k_cache, a.v_cache, a.slot_mapping,
            q_norm=a.q_norm, k_norm=a.k_norm, eps=1e-6, out=a.out,
        )  # fmt: skip

    return Row(
        "rotary_write_kv",
        f"{num_tokens} tokens, {num_heads}/{num_kv_heads} of {head_dim}, q/k norms",
        build,
        ours,
        lambda a: 2 * size(a.q, a.k, a.v) + 4 * head_dim * min(num_tokens, max_positions),  # and their rows of tables
        targets=targets,
    )


def _copy_row(num_copies: int, block_bytes: int) -> Row:
    def build() -> Arrays:
        pool = torch.empty(2 * num_copies, block_bytes, dtype=torch.uint8).random_(0, 256)
        ids = torch.randperm(2 * num_copies)
        return Arrays(pool=pool, sources=ids[:num_copies], targets=ids[num_copies:])

    def by_index(backend: Any, a: Arrays) -> Call:
        return lambda: a.pool.index_copy_(0, a.targets, a.pool.index_select(0, a.sources))

    return Row(
        "copy_blocks",
        f"{num_copies} blocks of {block_bytes >> 10} KB",
        build,
        lambda backend, a: lambda: backend.copy_blocks(a.pool, a.sources, a.targets),
        lambda a: size(a.pool),  # one half is read, the other written
        peers={TORCH: by_index},
        targets=[BANDWIDTH],
    )


def _embedding_row(num_tokens: int, vocab_size: int, hidden_size: int) -> Row:
    def build() -> Arrays:
        ids = torch.randint(0, vocab_size, (num_tokens,))
        out = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16)
        return Arrays(ids=ids, weight=random(vocab_size, hidden_size), out=out)

    return Row(
        "embedding",
        f"{num_tokens} of {vocab_size}×{hidden_size}",
        build,
        lambda backend, a: lambda: backend.embedding(a.ids, a.weight, out=a.out),
        lambda a: 2 * size(a.out),
        peers={TORCH: lambda backend, a: lambda: torch.index_select(a.weight, 0, a.ids, out=a.out)},
    )
