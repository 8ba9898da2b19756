"""`transformers` in the place of our engine: a model of the same shape with random weights, and the same requests."""

import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from reference.batching.request import Request
from twofold.checkpoints.shapes import SHAPES

ROUNDS = 2


def is_there() -> bool:
    """Can it be imported?"""
    return find_spec("transformers") is not None


class Transformers:
    """Its two ways to answer many requests. Greedy, and nothing ends early; the last of two rounds counts.

    Args:
        shape: A name of `SHAPES`.
        dtype: Of weights and activations, as torch names it.
        pool: Settings of its `ContinuousBatchingConfig`; by default it measures what there is room for.
    """

    def __init__(self, shape: str, dtype: str, **pool: Any):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = AutoConfig.for_model(**SHAPES[shape])
        with torch.device(device):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.device, self.pool = device, pool

    def generate(self, requests: Sequence[Request]) -> float:
        """Seconds of ``generate`` for one batch: prompts of one length, and as many tokens for each."""
        return [self._generate(requests) for _ in range(ROUNDS)][-1]

    def _generate(self, requests: Sequence[Request]) -> float:
        import torch

        [num_tokens] = {request.max_tokens or 0 for request in requests}
        start = time.perf_counter()
        ids = torch.tensor([request.prompt_token_ids for request in requests], device=self.device)
        with torch.inference_mode():
            found = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert found.cpu().shape[1] == ids.shape[1] + num_tokens, "it ended early"
        return time.perf_counter() - start

    def generate_batch(self, requests: Sequence[Request]) -> float:
        """Seconds of its continuous batching, requests all added at once, after its own warming up."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        pool = ContinuousBatchingConfig(allow_block_sharing=False, **self.pool)
        with self.model.continuous_batching_context_manager(settings, continuous_batching_config=pool) as session:
            return [_drain(session, requests) for _ in range(ROUNDS)][-1]


def _drain(session: Any, requests: Sequence[Request]) -> float:
    """Seconds until the last of the requests has ended."""
    start = time.perf_counter()
    for request in requests:
        session.add_request(request.prompt_token_ids, max_new_tokens=request.max_tokens)
    num_tokens = num_ended = 0
    while num_ended < len(requests):
        result = session.get_result(timeout=1)
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(result.error)
            num_ended, num_tokens = num_ended + 1, num_tokens + len(result.generated_tokens)
        elif result is None and not session.is_running():
            raise RuntimeError("its continuous batching has stopped")
    assert num_tokens == sum(request.max_tokens or 0 for request in requests), "requests ended early"
    return time.perf_counter() - start
