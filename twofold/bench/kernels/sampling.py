"""Decks of sampling: one token for each row of a batch, filtered and drawn."""

from collections.abc import Iterator
from typing import Any

import torch

from twofold.bench.kernels import peers
from twofold.bench.kernels.rows import Arrays, Call, Row, Target, int32, random, size

FLASHINFER, SORTING = "flashinfer", "torch sorting"
TOP_K, TOP_P, TEMPERATURE = 50, 0.9, 0.8


def rows() -> Iterator[Row]:
    yield _sample_row(128, 131072)
    yield _sample_row(1, 131072, targets=())


def _sample_row(
    num_rows: int, vocab_size: int, targets: tuple[Target, ...] = (Target(1.0, 1.8, (FLASHINFER,)),)
) -> Row:
    def build() -> Arrays:
        ones = torch.ones(num_rows)
        return Arrays(
            logits=random(num_rows, vocab_size, dtype=torch.float32, scale=3.0),
            temperature=TEMPERATURE * ones, top_k=int32([TOP_K] * num_rows), top_p=TOP_P * ones, min_p=0.0 * ones,
            seeds=torch.arange(num_rows), positions=int32(range(num_rows)),
            sample_indices=int32([0] * num_rows),
        )  # fmt: skip

    def ours(backend: Any, a: Arrays) -> Call:
        return lambda: backend.sample(
            a.logits, a.temperature, a.top_k, a.top_p, a.min_p, a.seeds, a.positions, a.sample_indices
        )

    def flashinfer(backend: Any, a: Arrays) -> Call:
        sampling = peers.flashinfer().sampling

        def call() -> Any:
            probs = sampling.softmax(a.logits, temperature=a.temperature)
            return sampling.top_k_top_p_sampling_from_probs(
                probs, a.top_k, a.top_p, filter_apply_order="joint", deterministic=True
            )

        return call

    def sorting(backend: Any, a: Arrays) -> Call:
        def call() -> Any:
            ordered, order = (a.logits / TEMPERATURE).sort(dim=-1, descending=True)
            kept = ordered[:, :TOP_K].softmax(dim=-1)
            kept = torch.where(kept.cumsum(dim=-1) - kept < TOP_P, kept, 0.0)
            return order.gather(1, (kept / torch.empty_like(kept).exponential_()).argmax(dim=-1, keepdim=True))

        return call

    return Row(
        "sample",
        f"{num_rows}×{vocab_size}, top-k {TOP_K}, top-p {TOP_P}",
        build,
        ours,
        lambda a: size(a.logits),
        peers={FLASHINFER: flashinfer, SORTING: sorting},
        targets=targets,
    )
