"""A small model with a tokenizer and a chat template, as one file: all that `LLM` and the command line need."""

from pathlib import Path

import numpy as np

from twofold.conformance.strategies.checkpoints import CHATML, byte_level_vocabulary, write_gguf
from twofold.conformance.strategies.model import random_model


def small_checkpoint(folder: Path, *, seed: int = 0, chat_template: str | None = CHATML, context: int = 256) -> Path:
    """Write it into ``folder``; ends its texts now and then, as ``eos_token_id`` 2 is among its tokens."""
    vocabulary = byte_level_vocabulary()
    config, tensors = random_model(
        "llama",
        seed,
        vocab_size=len(vocabulary["tokens"]),
        max_position_embeddings=context,
        rope_scaling=None,
        hidden_size=32,
    )
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    metadata = {} if chat_template is None else {"tokenizer.chat_template": chat_template}
    return write_gguf(folder / "small.gguf", config, tensors, vocabulary=vocabulary, metadata=metadata)
