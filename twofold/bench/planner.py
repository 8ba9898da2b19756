"""`twofold bench planner`: the memory that a step's activations take in an arena, beside all of them together.

An engine answers random prompts: a step of all their tokens, then a token of each, then of one alone. Every step is
computed twice, as ever and in the arena that was planned for it, and must come out the same bit for bit.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

import reference
from reference.batching.request import SamplingParams
from reference.memory.arena import ArenaPlan, PlannedBackend
from twofold.errors import TwofoldError
from twofold.llm import LLM

SEED = 0
NUM_PROMPTS, PROMPT_TOKENS = 8, 32


def run(model: str | None) -> Iterator[tuple[str, dict[str, float]]]:
    """A step's name, and the figures of its plan.

    Args:
        model: As `LLM` takes it.
    """
    backend = PlannedBackend(reference)
    llm = LLM(model, backend=backend, max_num_batched_tokens=NUM_PROMPTS * PROMPT_TOKENS)
    plans: dict[str, ArenaPlan] = {}
    forward = llm.decoder.forward

    def watched(token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        logits, plan = backend.record(lambda: forward(token_ids, *args, **kwargs))
        arena = backend.empty((plan.memory.num_bytes,), dtype="uint8")
        in_arena = backend.run(lambda: forward(token_ids, *args, **kwargs), plan, arena)
        if in_arena.tobytes() != logits.tobytes():
            raise TwofoldError(f"a step of {len(token_ids)} tokens has other logits in the arena")
        plans[f"tokens: {len(token_ids)}, logits: {len(logits)}"] = plan
        return logits

    llm.decoder.forward = watched
    tokens = np.random.default_rng(SEED).integers(0, llm.checkpoint.config.vocab_size, (NUM_PROMPTS, PROMPT_TOKENS))
    lengths = [2] * (NUM_PROMPTS - 1) + [3]  # one goes on alone
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    llm.generate([{"prompt_token_ids": prompt} for prompt in tokens.tolist()], params)
    for step, plan in plans.items():
        yield step, figures(plan)


def figures(plan: ArenaPlan) -> dict[str, float]:
    """Of one plan, in bytes and as shares."""
    memory = plan.memory
    return {
        "activations": len(plan.activations),
        "total_bytes": memory.total,
        "bound_bytes": memory.bound,
        "arena_bytes": memory.num_bytes,
        "of_bound": memory.num_bytes / memory.bound,
        "of_total": memory.num_bytes / memory.total,
    }
