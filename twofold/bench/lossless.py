"""`twofold bench lossless`: what lossless coding makes of the blocks that an engine swaps, and of real bf16 weights.

Blocks: eight prompts in a pool that is too small for them. The figures are of the blocks that were preempted.

Weights: every matrix of the model in bfloat16, a tile at a time. (The default model's come from a checkpoint of 4-bit
groups. A coder that looks for groups would find far more in them; this one knows exponents only, which are skewed like
those of any other model.)

All that is counted is decoded as well, and compared bit for bit.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

import reference
from reference.batching.request import SamplingParams
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
        yield f"KV blocks, {format}", swapped_blocks(checkpoint, format, num_tokens=24 if quick else 48)
    for kind, names in matrices(checkpoint).items():
        yield f"weights, bfloat16: {kind}", coded_matrices(checkpoint, names[: 1 if quick else None])


def swapped_blocks(checkpoint: Checkpoint, format: str, *, num_tokens: int) -> Figures:
    """Blocks that were preempted, in bytes as they are and as they travelled."""
    prompts = [{"prompt_token_ids": checkpoint.require_tokenizer().encode(prompt)} for prompt in PROMPTS]
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts) + num_tokens
    llm = LLM(
        checkpoint,
        kv_cache_dtype=format,
        block_size=BLOCK_SIZE,
        num_blocks=len(PROMPTS) * -(-longest // BLOCK_SIZE) // 2,
        max_model_len=longest,
        preemption="swap",
        swap_coding="lossless",
        enable_prefix_caching=False,
    )
    for pool in llm.cache.pools:  # what no token was written to travels as well: not what was found lying about
        pool[:] = 0
    figures: Figures = {"blocks": 0, "bytes": 0, "coded_bytes": 0}
    swap_out = llm.cache.swap_out

    def counted(block_ids: Sequence[int], *, pool: int = 0, coded: bool = False) -> Any:
        rows = swap_out(block_ids, pool=pool, coded=coded)
        figures["blocks"] += len(block_ids)
        _count(f"KV blocks in {format}", swap_out(block_ids, pool=pool), rows, figures)
        return rows

    llm.cache.swap_out = counted
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))
    return figures | {"ratio": figures["coded_bytes"] / figures["bytes"]}


def matrices(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The names of a model's matrices, by kind."""
    kinds = {"embedding and head": ("embed_tokens", "lm_head"), "attention": ("self_attn",), "feed-forward": ("mlp",)}
    names = [name for name, shape in checkpoint.config.expected_tensors().items() if len(shape) == 2]
    return {kind: [name for name in names if any(part in name for part in parts)] for kind, parts in kinds.items()}


def coded_matrices(checkpoint: Checkpoint, names: list[str]) -> Figures:
    """Matrices in bfloat16, in bytes as they are and coded."""
    figures: Figures = {"bytes": 0, "coded_bytes": 0}
    tensors: Any = checkpoint.tensors()
    for name in names:
        numbers = np.asarray(tensors[name]).astype(ml_dtypes.bfloat16).ravel()
        whole = len(numbers) // TILE * TILE
        for tiles in (numbers[:whole].reshape(-1, TILE), numbers[None, whole:]):
            rows = np.ascontiguousarray(tiles).view(np.uint8)
            _count(name, rows, CodedRows.encode(rows, WORD_LAYOUTS["bfloat16"], reference), figures)
    return figures | {"ratio": figures["coded_bytes"] / figures["bytes"]}


def _count(what: str, rows: Any, coded: Any, figures: Figures) -> None:
    """Bytes of rows, as they are and coded; which must be the same rows."""
    if not np.array_equal(coded.decode(reference), rows):
        raise TwofoldError(f"{what}: coded and decoded they are others")
    figures["bytes"] += rows.nbytes
    figures["coded_bytes"] += coded.nbytes
