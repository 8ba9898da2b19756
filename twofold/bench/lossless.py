"""`twofold bench lossless`: what lossless coding makes of the blocks that an engine swaps, and of real bf16 weights.

Blocks: eight prompts in a pool that is too small for them, once with swaps as they are and once coded. The figures are
of the blocks that were preempted; and both runs must give the same tokens.

Weights: every matrix of the model in bfloat16, a tile at a time. (The default model's come from a checkpoint of 4-bit
groups. A coder that looks for groups would find far more in them; this one knows exponents only, which are skewed like
those of any other model.)
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

import reference
from reference.batching.request import SamplingParams
from reference.batching.trace import Record
from reference.kv_cache.coded_rows import WORD_LAYOUTS, CodedRows
from twofold.bench.answers import PROMPTS
from twofold.checkpoints import Checkpoint, load_checkpoint
from twofold.errors import TwofoldError
from twofold.llm import LLM

KV_FORMATS = ("bfloat16", "float16", "float32")
BLOCK_SIZE = 16
TILE = 1 << 16  # numbers of a matrix that are coded together

Figures = dict[str, float]


def run(model: str | None, *, quick: bool) -> Iterator[tuple[str, Figures]]:
    """Each measurement's name, and its figures.

    Args:
        model: As `LLM` takes it.
        quick: One KV format, short answers, a matrix of each kind.
    """
    checkpoint = load_checkpoint(model)
    for format in KV_FORMATS[: 1 if quick else None]:
        yield f"KV blocks, {format}", swapped_blocks(checkpoint, format, num_tokens=24 if quick else 64)
    for kind, names in matrices(checkpoint).items():
        yield f"weights, bfloat16: {kind}", coded_matrices(checkpoint, names[: 1 if quick else None])


def swapped_blocks(checkpoint: Checkpoint, format: str, *, num_tokens: int) -> Figures:
    """Blocks that were preempted, in bytes as they are and as they travelled."""
    plain, tokens = _swap_run(checkpoint, format, "none", num_tokens)
    coded, tokens_coded = _swap_run(checkpoint, format, "lossless", num_tokens)
    if tokens != tokens_coded or plain[0] != coded[0]:
        raise TwofoldError(f"KV blocks in {format}: coded swaps gave other tokens than plain ones")
    return {"blocks": plain[0], "bytes": plain[1], "coded_bytes": coded[1], "ratio": coded[1] / plain[1]}


def _swap_run(
    checkpoint: Checkpoint, format: str, coding: str, num_tokens: int
) -> tuple[tuple[int, int], list[list[int]]]:
    """(blocks, bytes) that went to the host, and every answer's tokens."""
    sizes: list[tuple[int, int]] = []

    def note(record: Record) -> None:
        for swap in record.get("swaps_out", ()):
            runner: Any = llm.engine.runner
            sizes.append((len(swap["blocks"]), runner.host[swap["key"], swap["pool"]].nbytes))

    prompts = [{"prompt_token_ids": checkpoint.require_tokenizer().encode(prompt)} for prompt in PROMPTS]
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts) + num_tokens
    blocks_per_seq = -(-longest // BLOCK_SIZE)
    llm = LLM(
        checkpoint,
        kv_cache_dtype=format,
        block_size=BLOCK_SIZE,
        num_blocks=len(PROMPTS) * blocks_per_seq // 2,
        max_model_len=longest,
        preemption="swap",
        swap_coding=coding,
        enable_prefix_caching=False,
        trace=note,
    )
    for pool in llm.cache.pools:  # what no token was written to travels as well: not what was found lying about
        pool[:] = 0
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    answers = llm.generate(prompts, params)
    total = sum(blocks for blocks, _ in sizes), sum(num_bytes for _, num_bytes in sizes)
    return total, [answer.outputs[0].token_ids for answer in answers]


def matrices(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The names of a model's matrices, by kind."""
    kinds = {"embedding and head": ("embed_tokens", "lm_head"), "attention": ("self_attn",), "feed-forward": ("mlp",)}
    names = [name for name, shape in checkpoint.config.expected_tensors().items() if len(shape) == 2]
    return {kind: [name for name in names if any(part in name for part in parts)] for kind, parts in kinds.items()}


def coded_matrices(checkpoint: Checkpoint, names: list[str]) -> Figures:
    """Bytes of matrices in bfloat16, and of the same coded; decoded they are the same bits."""
    figures: Figures = {"bytes": 0, "coded_bytes": 0}
    tensors: Any = checkpoint.tensors()
    for name in names:
        numbers = np.asarray(tensors[name]).astype(ml_dtypes.bfloat16).ravel()
        whole = len(numbers) // TILE * TILE
        for tiles in (numbers[:whole].reshape(-1, TILE), numbers[None, whole:]):
            rows = np.ascontiguousarray(tiles).view(np.uint8)
            coded = CodedRows.encode(rows, WORD_LAYOUTS["bfloat16"], reference)
            if not np.array_equal(coded.decode(reference), rows):
                raise TwofoldError(f"{name}: coded and decoded it is another")
            figures["bytes"] += rows.nbytes
            figures["coded_bytes"] += coded.nbytes
    return figures | {"ratio": figures["coded_bytes"] / figures["bytes"]}
