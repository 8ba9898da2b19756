"""The baseline's perplexity by an independent implementation."""

from collections.abc import Callable

import numpy as np

from twofold.bench.quality.text import Windows
from twofold.checkpoints import Checkpoint


def perplexity_of_transformers(
    checkpoint: Checkpoint, windows: Windows, on_window: Callable[[str, int], None] = lambda what, total: None
) -> float:
    """Of the same windows, by `transformers` on the same file, in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    path = checkpoint.path
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    model = AutoModelForCausalLM.from_pretrained(path.parent if where else path, dtype=torch.float32, **where).eval()
    losses = []
    for window in windows.judged:
        on_window("transformers", len(windows.judged))
        ids = torch.as_tensor(window.astype(np.int64))
        with torch.inference_mode():
            logits = model(ids[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double())
    return float(torch.cat(losses).mean().exp())
