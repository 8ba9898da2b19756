"""Decks of linear layers: bf16 at the engine's shapes, every weight format, adapters, and the invariant choice."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from twofold.bench.kernels.rows import Arrays, Call, Row, Target, int32, integers, random, size

CUBLAS, BASE, DENSE = "cublas", "base matmul", "our dense"
ENGINE_SHAPES = (  # (in_features, out_features)
    (1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096),
)  # fmt: skip


def rows() -> Iterator[Row]:
    for in_features, out_features in ENGINE_SHAPES:
        for num_tokens in (1, 2, 4, 8, 16, 32):
            yield _dense_row(num_tokens, in_features, out_features)
    for in_features, out_features in ((8192, 8192), (4096, 14336)):
        for num_tokens in (1, 8, 16, 512, 4096):
            yield _int4_row(num_tokens, in_features, out_features)
        for num_tokens in (1, 16):
            yield _int8_row(num_tokens, in_features, out_features)
    for in_features, out_features in ((4096, 4096), (4096, 14336)):
        yield _w8a8_row("int8", 4096, in_features, out_features)
        yield _w8a8_row("fp8", 4096, in_features, out_features)
    for in_features, out_features in ((4096, 4096), (4096, 14336)):
        yield _sparse_row(1, in_features, out_features)
    yield _lora_row(num_tokens=64, num_adapters=16, rank=16, features=4096)
    for in_features, out_features in ((4096, 4096), (4096, 14336)):
        for num_tokens in (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096):
            yield _invariant_row(num_tokens, in_features, out_features)


def _cublas(backend: Any, a: Arrays) -> Call:
    weight = a.weight if a.weight.dtype == a.x.dtype else random(a.out.shape[1], a.x.shape[1], dtype=a.x.dtype)
    out = torch.empty_like(a.out)
    return lambda: torch.mm(a.x, weight.T, out=out)


def _dense(num_tokens: int, in_features: int, out_features: int) -> Arrays:
    x, weight = random(num_tokens, in_features), random(out_features, in_features, scale=in_features**-0.5)
    return Arrays(x=x, weight=weight, out=torch.empty(num_tokens, out_features, dtype=x.dtype))


def _linear(backend: Any, a: Arrays) -> Call:
    return lambda: backend.linear(a.x, a.weight, out=a.out)


def _deck(num_tokens: int, in_features: int, out_features: int) -> str:
    return f"{num_tokens} × {in_features}→{out_features}"


def _flops(num_tokens: int, in_features: int, out_features: int) -> float:
    return 2.0 * num_tokens * in_features * out_features


def _dense_row(*shape: int) -> Row:
    num_tokens, in_features, _ = shape
    return Row(
        "linear",
        _deck(*shape),
        lambda: _dense(*shape),
        _linear,
        lambda a: size(a.x, a.weight, a.out),
        flops=_flops(*shape),
        peers={CUBLAS: _cublas},
        targets=[Target(1.3, 2.0, (CUBLAS,))],
        quick=num_tokens in (1, 16) and in_features in (1024, 4096),
    )


def _invariant_row(*shape: int) -> Row:
    return Row(
        "invariant.linear",
        _deck(*shape),
        lambda: _dense(*shape),
        lambda backend, a: _linear(backend.invariant, a),
        lambda a: size(a.x, a.weight, a.out),
        flops=_flops(*shape),
        peers={CUBLAS: _cublas},
        targets=[Target(0.8, 0.9, (CUBLAS,))],
        quick=shape[0] in (1, 4096) and shape[2] == 4096,
    )


# ---- quantized weights ------------------------------------------------------------------------------------------


def _int4_row(*shape: int) -> Row:
    num_tokens, in_features, out_features = shape
    group_size = 128
    figures = {512: (0.75, 0.95), 4096: (0.92, 0.97)}.get(num_tokens, (1.8, 3.0))

    def build() -> Arrays:
        a = _dense(num_tokens, in_features, 1)
        weight = integers(0, 256, (out_features, in_features // 2), torch.uint8)
        scale = random(out_features, in_features // group_size, dtype=torch.float16).abs_() / 64
        return Arrays(x=a.x, weight=weight, scale=scale, out=a.x.new_empty(num_tokens, out_features))

    def ours(backend: Any, a: Arrays) -> Call:
        packed = backend.pack_weight(a.weight, format="int4")
        return lambda: backend.linear_int4(a.x, packed, a.scale, group_size=group_size, out=a.out)

    return Row(
        "linear_int4",
        f"{_deck(*shape)}, groups of {group_size}",
        build,
        ours,
        lambda a: size(a.x, a.weight, a.scale, a.out),
        flops=_flops(*shape),
        peers={CUBLAS: _cublas},
        targets=[Target(*figures, (CUBLAS,))],
        quick=in_features == 8192 and num_tokens in (1, 16, 4096),
    )


def _int8_row(*shape: int) -> Row:
    num_tokens, in_features, out_features = shape

    def build() -> Arrays:
        return _eight_bit_arrays(torch.int8, num_tokens, in_features, out_features)

    def ours(backend: Any, a: Arrays) -> Call:
        packed = backend.pack_weight(a.weight, format="int8")
        return lambda: backend.linear_int8(a.x, packed, a.scale, out=a.out)

    return Row(
        "linear_int8",
        _deck(*shape),
        build,
        ours,
        lambda a: size(a.x, a.weight, a.scale, a.out),
        flops=_flops(*shape),
        peers={CUBLAS: _cublas},
        quick=num_tokens == 1 and in_features == 8192,
    )


def _eight_bit_arrays(dtype: torch.dtype, num_tokens: int, in_features: int, out_features: int) -> Arrays:
    x, shape = random(num_tokens, in_features), (out_features, in_features)
    weight = integers(-127, 128, shape, dtype) if dtype == torch.int8 else random(*shape, dtype=dtype)
    scale = random(out_features, dtype=torch.float32).abs_() / 64
    return Arrays(x=x, weight=weight, scale=scale, out=x.new_empty(num_tokens, out_features))


def _w8a8_row(kind: str, *shape: int) -> Row:
    """Ours rounds the activations too; the peer multiplies codes that are ready."""
    num_tokens, _, out_features = shape
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    peer = "_int_mm" if kind == "int8" else "_scaled_mm"

    def ours(backend: Any, a: Arrays) -> Call:
        packed, op = backend.pack_weight(a.weight, format=f"{kind}_{kind}"), getattr(backend, f"linear_{kind}_{kind}")
        return lambda: op(a.x, packed, a.scale, out=a.out)

    def int_mm(backend: Any, a: Arrays) -> Call:
        codes, out = integers(-127, 128, a.x.shape, torch.int8), torch.empty_like(a.out, dtype=torch.int32)
        int_mm = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
        return lambda: int_mm(codes, a.weight.T, out=out)

    def scaled_mm(backend: Any, a: Arrays) -> Call:
        codes, x_scale = a.x.to(torch.float8_e4m3fn), torch.ones(num_tokens, 1)
        w_scale = a.scale[None, :].contiguous()
        scaled = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        return lambda: scaled(codes, a.weight.T, x_scale, w_scale, out_dtype=torch.bfloat16)

    return Row(
        f"linear_{kind}_{kind}",
        _deck(*shape),
        lambda: _eight_bit_arrays(dtype, *shape),
        ours,
        lambda a: size(a.x, a.weight, a.scale, a.out),
        flops=_flops(*shape),
        peers={peer: int_mm if kind == "int8" else scaled_mm},
        targets=[Target(0.85, 1.0, (peer,))],
        quick=out_features == 4096,
    )


# ---- pruned weights, adapters -----------------------------------------------------------------------------------


def _sparse_row(*shape: int) -> Row:
    num_tokens, in_features, out_features = shape

    def build() -> Arrays:
        x = random(num_tokens, in_features)
        pairs = torch.tensor([a | b << 2 for a in range(4) for b in range(a + 1, 4)])  # two places of 4
        nibbles = pairs[torch.randint(0, 6, (out_features, in_features // 4))]
        indices = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
        return Arrays(
            x=x, values=random(out_features, in_features // 2), indices=indices,
            weight=random(out_features, in_features), out=x.new_empty(num_tokens, out_features),
        )  # fmt: skip

    return Row(
        "sparse_linear",
        f"{_deck(*shape)}, 2:4",
        build,
        lambda backend, a: lambda: backend.sparse_linear(a.x, a.values, a.indices, out=a.out),
        lambda a: size(a.x, a.values, a.indices, a.out),
        flops=_flops(*shape) / 2,
        peers={DENSE: _linear, CUBLAS: _cublas},
        targets=[Target(1.4, 1.7, (DENSE,))],
    )


def _lora_row(num_tokens: int, num_adapters: int, rank: int, features: int) -> Row:
    """The layer with its adapters beside the layer alone: 40 % on top are 1 / 1.4 of its speed."""

    def build() -> Arrays:
        a = _dense(num_tokens, features, features)
        return Arrays(
            **vars(a),
            lora_a=random(num_adapters, rank, features),
            lora_b=random(num_adapters, features, rank),
            scaling=torch.ones(num_adapters),
            adapter_ids=int32([t % num_adapters for t in range(num_tokens)]),
        )

    def ours(backend: Any, a: Arrays) -> Call:
        def call() -> Any:
            base = F.linear(a.x, a.weight)
            return backend.lora(base, a.x, a.lora_a, a.lora_b, a.scaling, a.adapter_ids, out=base)

        return call

    return Row(
        "lora",
        f"{num_tokens} tokens, {num_adapters} adapters of rank {rank}, {features}→{features}, with the base",
        build,
        ours,
        lambda a: size(a.x, a.weight, a.out, a.lora_a, a.lora_b),
        flops=_flops(num_tokens, features, features) + 4.0 * num_tokens * rank * features,
        peers={BASE: lambda backend, a: lambda: F.linear(a.x, a.weight)},
        targets=[Target(round(1 / 1.4, 3), round(1 / 1.2, 3), (BASE,))],
    )
