"""Decks of attention: prefill over packed sequences, over cached context, and paged decoding of every cache format."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F

from fast._triton.platform import portable_kernels
from twofold.bench.kernels import peers
from twofold.bench.kernels.rows import (
    Arrays,
    Call,
    Contender,
    Row,
    Target,
    default_device,
    int32,
    integers,
    random,
    size,
)  # fmt: skip

FLASH, CUDNN, FLEX, PORTABLE = "sdpa-flash", "sdpa-cudnn", "flex", "our portable"
FA3, FLASHINFER = "fa3", "flashinfer"


def rows() -> Iterator[Row]:
    yield from prefill_rows()
    yield from paged_prefill_rows()
    yield from decode_rows()
    yield from quantized_decode_rows()


def offsets(lens: Sequence[int]) -> torch.Tensor:
    return int32([0, *torch.tensor(lens).cumsum(0).tolist()])


def _portable(ours: Contender) -> Contender:
    """The same call, by the kernels that every generation of GPUs has."""

    def contender(backend: Any, a: Arrays) -> Call:
        call = ours(backend, a)

        def portable() -> Any:
            with portable_kernels():
                return call()

        return portable

    return contender


# ---- prefill ----------------------------------------------------------------------------------------------------

RAGGED = (37, 4096, 513, 2048, 8000, 129, 1, 1560)


def prefill_rows() -> Iterator[Row]:
    decks = [
        ([1024] * 16, 32, 8, 128), ([4096] * 4, 32, 8, 128), ([16384], 32, 8, 128),
        ([4096] * 4, 32, 32, 64), ([4096] * 4, 32, 32, 128), (RAGGED, 32, 8, 128),
    ]  # fmt: skip
    for lens, num_heads, num_kv_heads, head_dim in decks:
        yield _prefill_row(list(lens), num_heads, num_kv_heads, head_dim)


def _prefill_row(lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int) -> Row:
    equal = len(set(lens)) == 1
    best = (CUDNN, FLASHINFER, FA3)
    targets = [Target(0.9, 1.0, best), Target(0.8, None, best, of=PORTABLE)]
    if head_dim == 128 and equal:
        targets.append(Target(1.45, None, (FLASH,)))

    def build() -> Arrays:
        q = random(sum(lens), num_heads, head_dim)
        k, v = (random(sum(lens), num_kv_heads, head_dim) for _ in range(2))
        return Arrays(q=q, k=k, v=v, out=torch.empty_like(q), cu=offsets(lens))

    def ours(backend: Any, a: Arrays) -> Call:
        return lambda: backend.flash_attention(a.q, a.k, a.v, a.cu, a.cu, out=a.out)

    def sdpa(kernel: Any) -> Any:
        def contender(backend: Any, a: Arrays) -> Call:
            q, k, v = (x.unflatten(0, (len(lens), lens[0])).transpose(1, 2) for x in (a.q, a.k, a.v))

            def call() -> Any:
                with torch.nn.attention.sdpa_kernel(kernel):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            return call

        return contender

    def flex(backend: Any, a: Arrays) -> Call:
        q, k, v = (x.unflatten(0, (len(lens), lens[0])).transpose(1, 2) for x in (a.q, a.k, a.v))
        mask = _causal_blocks(lens[0])
        return lambda: _flex()(q, k, v, block_mask=mask, enable_gqa=True)

    def fa3(backend: Any, a: Arrays) -> Call:
        peers.fa3()
        longest = max(lens)
        return lambda: peers.fa3_attention(
            a.q, a.k, a.v, cu_seqlens_q=a.cu, cu_seqlens_k=a.cu, max_q=longest, max_k=longest
        )

    def flashinfer(backend: Any, a: Arrays) -> Call:
        workspace = torch.empty(512 << 20, dtype=torch.uint8)
        wrapper = peers.flashinfer().BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
        wrapper.plan(a.cu, a.cu, num_heads, num_kv_heads, head_dim, causal=True, q_data_type=a.q.dtype)
        return lambda: wrapper.run(a.q, a.k, a.v)

    backends = torch.nn.attention.SDPBackend
    dense = {FLASH: sdpa(backends.FLASH_ATTENTION), CUDNN: sdpa(backends.CUDNN_ATTENTION), FLEX: flex} if equal else {}
    name = f"{len(lens)}×{lens[0]}" if equal else f"{len(lens)} ragged, {sum(lens)} tokens"
    return Row(
        "flash_attention",
        f"prefill {name}, {num_heads}/{num_kv_heads} of {head_dim}",
        build,
        ours,
        lambda a: size(a.q, a.k, a.v, a.out),
        flops=sum(4 * num_heads * head_dim * n * (n + 1) / 2 for n in lens),
        peers={PORTABLE: _portable(ours)} | dense | {FA3: fa3, FLASHINFER: flashinfer},
        targets=targets,
        quick=lens[0] == 4096 and num_kv_heads == 8,
    )


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # each deck its own, as fast as it gets


@cache
def _causal_blocks(length: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=default_device())


# ---- the paged cache --------------------------------------------------------------------------------------------


def paged(lens: Sequence[int], block_size: int) -> Arrays:
    """A shuffled pool that the sequences fill: block table, and the same by FlashInfer's offsets."""
    counts = [math.ceil(n / block_size) for n in lens]
    shuffled = torch.randperm(sum(counts), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    table, start, starts = torch.full((len(lens), max(counts)), -1, dtype=torch.int32, device="cpu"), 0, [0]
    for row, count in enumerate(counts):
        table[row, :count] = shuffled[start : start + count]
        start += count
        starts.append(start)
    device = default_device()
    return Arrays(
        num_blocks=sum(counts),
        seq_lens=int32(lens),
        table=table.to(device),
        padded=table.clamp(min=0).to(device),  # for those who read a row to its end
        starts=int32(starts),
        blocks=int32(shuffled),
        last=int32([(n - 1) % block_size + 1 for n in lens]),
    )


def _caches(pages: Arrays, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (pages.num_blocks, block_size, num_kv_heads, head_dim)
    return random(*shape), random(*shape)


def paged_prefill_rows() -> Iterator[Row]:
    for block_size in (16, 64):
        yield _paged_prefill_row(block_size, chunk=512, cached=8192)


def _paged_prefill_row(block_size: int, chunk: int, cached: int) -> Row:
    num_heads, num_kv_heads, head_dim, total = 32, 8, 128, chunk + cached

    def build() -> Arrays:
        pages = paged([total], block_size)
        k_cache, v_cache = _caches(pages, block_size, num_kv_heads, head_dim)
        q = random(chunk, num_heads, head_dim)
        return Arrays(
            **vars(pages), k_cache=k_cache, v_cache=v_cache, q=q, out=torch.empty_like(q), cu=int32([0, chunk])
        )

    def ours(backend: Any, a: Arrays) -> Call:
        return lambda: backend.paged_attention(a.q, a.k_cache, a.v_cache, a.table, a.seq_lens, a.cu, out=a.out)

    def fa3(backend: Any, a: Arrays) -> Call:
        peers.fa3()
        return lambda: peers.fa3_attention(
            a.q, a.k_cache, a.v_cache, cu_seqlens_q=a.cu, max_q=chunk, max_k=total, seq_lens=a.seq_lens,
            block_table=a.padded,
        )  # fmt: skip

    return Row(
        "paged_attention",
        f"chunk of {chunk} over {cached} cached, page {block_size}, 32/8 of 128",
        build,
        ours,
        lambda a: size(a.q, a.k_cache, a.v_cache, a.out),
        flops=4 * num_heads * head_dim * chunk * (cached + (chunk + 1) / 2),
        peers={PORTABLE: _portable(ours), FA3: fa3},
        targets=[Target(0.85, 1.0, (FA3,))],
        quick=block_size == 16,
    )


# ---- decoding ---------------------------------------------------------------------------------------------------


def mixed_lengths() -> list[int]:
    return torch.randint(100, 8000, (64,), generator=torch.Generator("cpu").manual_seed(1), device="cpu").tolist()


def decode_rows() -> Iterator[Row]:
    decks = [
        ([8192], 32, 8, 1.25), ([131072], 32, 8, None), ([4096] * 8, 32, 8, None), ([4096] * 32, 32, 8, None),
        ([2048] * 256, 32, 8, None), ([256] * 256, 32, 8, None), (mixed_lengths(), 32, 8, None),
        ([2048] * 64, 32, 32, None), ([4096] * 64, 32, 1, None),
    ]  # fmt: skip
    for lens, num_heads, num_kv_heads, reach_for in decks:
        yield _decode_row(lens, num_heads, num_kv_heads, reach_for)


def deck_name(lens: Sequence[int], num_heads: int, num_kv_heads: int) -> str:
    name = f"{len(lens)}×{lens[0]}" if len(set(lens)) == 1 else f"{len(lens)} of {min(lens)} to {max(lens)}"
    return f"decode {name}, {num_heads}/{num_kv_heads} of 128"


def _decode_row(lens: list[int], num_heads: int, num_kv_heads: int, reach_for: float | None) -> Row:
    block_size, head_dim = 16, 128

    def build() -> Arrays:
        pages = paged(lens, block_size)
        k_cache, v_cache = _caches(pages, block_size, num_kv_heads, head_dim)
        return Arrays(**vars(pages), k_cache=k_cache, v_cache=v_cache, **_queries(lens, num_heads, head_dim))

    def fa3(backend: Any, a: Arrays) -> Call:
        peers.fa3()
        return lambda: peers.fa3_attention(
            a.q, a.k_cache, a.v_cache, cu_seqlens_q=a.cu, max_q=1, max_k=max(lens), seq_lens=a.seq_lens,
            block_table=a.padded,
        )  # fmt: skip

    def flashinfer(tensor_cores: bool) -> Any:
        def contender(backend: Any, a: Arrays) -> Call:
            workspace = torch.empty(512 << 20, dtype=torch.uint8)
            wrapper = peers.flashinfer().BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=tensor_cores
            )
            wrapper.plan(
                a.starts, a.blocks, a.last, num_heads, num_kv_heads, head_dim, block_size,
                q_data_type=a.q.dtype, kv_data_type=a.k_cache.dtype,
            )  # fmt: skip
            return lambda: wrapper.run(a.q, (a.k_cache, a.v_cache))

        return contender

    kv_bytes = 2 * 2 * num_kv_heads * head_dim * sum(lens)
    best = (FA3, FLASHINFER, f"{FLASHINFER} cores")
    targets = [Target(0.98, reach_for or 1.06, best)]
    if kv_bytes > 500e6:
        targets.append(Target(0.94, None, ("copy",)))
    return Row(
        "paged_attention",
        deck_name(lens, num_heads, num_kv_heads),
        build,
        plain_decode,
        lambda a: kv_bytes + size(a.q, a.out),
        flops=4 * num_heads * head_dim * sum(lens),
        peers={
            PORTABLE: _portable(plain_decode),
            FA3: fa3,
            f"{FLASHINFER} cores": flashinfer(False),
            FLASHINFER: flashinfer(True),
        },
        targets=targets,
        quick=lens in ([8192], [4096] * 32),
    )


def _queries(lens: Sequence[int], num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    q = random(len(lens), num_heads, head_dim)
    return {"q": q, "out": torch.empty_like(q), "cu": int32(range(len(lens) + 1))}


def plain_decode(backend: Any, a: Arrays) -> Call:
    return lambda: backend.paged_attention(a.q, a.k_cache, a.v_cache, a.table, a.seq_lens, a.cu, out=a.out)


# ---- decoding from quantized caches -----------------------------------------------------------------------------

BF16 = "our bf16"


def quantized_decode_rows() -> Iterator[Row]:
    for lens in ([4096] * 32, [2048] * 256):
        yield _quantized_row("int8", lens, _int8_arrays, ("k_cache", "v_cache", "k_scale", "v_scale"), 1.7, 1.85)
        yield _quantized_row("fp8", lens, _fp8_arrays, ("k_cache", "v_cache", "k_scale", "v_scale"), 1.7, 1.85)
        grouped = ("k_cache", "v_cache", "k_scale", "k_zero", "v_scale", "v_zero")
        yield _quantized_row("int4", lens, _int4_arrays, grouped, 2.4, 2.9)
        yield _kivi_row(lens, bits=2, at_least=3.0, reach_for=3.8)


def _quantized_row(
    format: str, lens: list[int], make: Any, names: tuple[str, ...], at_least: float, reach_for: float
) -> Row:
    block_size, num_heads, num_kv_heads, head_dim = 16, 32, 8, 128

    def build() -> Arrays:
        pages = paged(lens, block_size)
        stored = make(pages.num_blocks, block_size, num_kv_heads, head_dim)
        return Arrays(**vars(pages), **stored, **_queries(lens, num_heads, head_dim))

    def ours(backend: Any, a: Arrays) -> Call:
        op = getattr(backend, f"paged_attention_{format}")
        stored = {name: getattr(a, name) for name in names}
        return lambda: op(a.q, **stored, block_table=a.table, seq_lens=a.seq_lens, cu_seqlens_q=a.cu, out=a.out)

    def fa3(backend: Any, a: Arrays) -> Call:
        peers.fa3()
        q, ones = a.q.to(torch.float8_e4m3fn), torch.ones(len(lens), num_kv_heads)
        return lambda: peers.fa3_attention(
            q, a.k_cache, a.v_cache, cu_seqlens_q=a.cu, max_q=1, max_k=max(lens), seq_lens=a.seq_lens,
            block_table=a.padded, scales=(ones, ones, ones),
        )  # fmt: skip

    return Row(
        f"paged_attention_{format}",
        deck_name(lens, num_heads, num_kv_heads),
        build,
        ours,
        lambda a: size(*(getattr(a, name) for name in names), a.q, a.out),
        flops=4 * num_heads * head_dim * sum(lens),
        peers={BF16: _our_bf16(lens)} | ({f"{FA3} fp8": fa3} if format == "fp8" else {}),
        targets=[Target(at_least, reach_for, (BF16,))],
        quick=len(lens) == 32,
    )


def _our_bf16(lens: list[int]) -> Any:
    """The backend's plain cache of the same deck. (Its buffers are its own: they are larger, hence as cold.)"""

    def contender(backend: Any, a: Arrays) -> Call:
        k_cache, v_cache = _caches(paged(lens, 16), 16, 8, 128)
        pages = paged(lens, 16)
        return plain_decode(backend, Arrays(**vars(pages), k_cache=k_cache, v_cache=v_cache, q=a.q, out=a.out, cu=a.cu))

    return contender


def _int8_arrays(*shape: int) -> dict[str, torch.Tensor]:
    codes = {f"{n}_cache": integers(-127, 128, shape, torch.int8) for n in "kv"}
    return codes | {f"{n}_scale": random(*shape[:3], dtype=torch.float32).abs_() / 64 for n in "kv"}


def _fp8_arrays(*shape: int) -> dict[str, torch.Tensor]:
    codes = {f"{n}_cache": random(*shape, dtype=torch.float8_e4m3fn) for n in "kv"}
    return codes | {f"{n}_scale": random(*shape[:3], dtype=torch.float32).abs_() for n in "kv"}


def _int4_arrays(*shape: int, group_size: int = 64) -> dict[str, torch.Tensor]:
    half, groups = (*shape[:3], shape[3] // 2), (*shape[:3], shape[3] // group_size)
    codes = {f"{n}_cache": integers(0, 256, half, torch.uint8) for n in "kv"}
    scales = {f"{n}_scale": random(*groups, dtype=torch.float16).abs_() / 8 for n in "kv"}
    return codes | scales | {f"{n}_zero": random(*groups, dtype=torch.float16) for n in "kv"}


def _kivi_row(lens: list[int], bits: int, at_least: float, reach_for: float) -> Row:
    block_size = group_size = window = 32
    num_heads, num_kv_heads, head_dim = 32, 8, 128

    def build() -> Arrays:
        pages = paged(lens, block_size)
        # The window's blocks: the two or three last of each sequence; those before were released.
        kept = [max(0, (n - window) // block_size) for n in lens]
        table, count = torch.full(pages.table.shape, -1, dtype=torch.int32, device="cpu"), 0
        for row, (n, first) in enumerate(zip(lens, kept)):
            held = math.ceil(n / block_size) - first
            table[row, first : first + held] = torch.arange(count, count + held, device="cpu")
            count += held
        packed = (pages.num_blocks, block_size, num_kv_heads, head_dim * bits // 8)
        per_channel = (pages.num_blocks, block_size // group_size, num_kv_heads, head_dim)
        per_token = (pages.num_blocks, block_size, num_kv_heads, head_dim // group_size)
        stored = {
            "k_window": random(count, block_size, num_kv_heads, head_dim),
            "v_window": random(count, block_size, num_kv_heads, head_dim),
            "k_cache": integers(0, 256, packed, torch.uint8),
            "v_cache": integers(0, 256, packed, torch.uint8),
            "k_scale": random(*per_channel, dtype=torch.float16).abs_(),
            "k_zero": random(*per_channel, dtype=torch.float16),
            "v_scale": random(*per_token, dtype=torch.float16).abs_(),
            "v_zero": random(*per_token, dtype=torch.float16),
        }
        return Arrays(
            **vars(pages), stored=stored, window_table=table.to(default_device()), **_queries(lens, num_heads, head_dim)
        )

    def ours(backend: Any, a: Arrays) -> Call:
        return lambda: backend.paged_attention_kivi(
            a.q, **a.stored, window_block_table=a.window_table, block_table=a.table, seq_lens=a.seq_lens,
            cu_seqlens_q=a.cu, window=window, out=a.out,
        )  # fmt: skip

    return Row(
        "paged_attention_kivi",
        f"{deck_name(lens, num_heads, num_kv_heads)}, {bits} bit",
        build,
        ours,
        lambda a: size(*a.stored.values(), a.q, a.out),
        flops=4 * num_heads * head_dim * sum(lens),
        peers={BF16: _our_bf16(lens)},
        targets=[Target(at_least, reach_for, (BF16,))],
        quick=len(lens) == 32,
    )
