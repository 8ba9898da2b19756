"""The least time that a step, a prompt or a whole run can take: bytes over the bandwidth, or operations over the rate.

A decoding step reads every weight once (of an embedding that is not also the head only a few rows) and the keys and
values of all its sequences once. A prompt's tokens are multiplied with every weight but the head's, which sees the last
of them only; and each with the keys and values before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reference.linear.weight import weight_format
from reference.model.config import ModelConfig
from twofold.sizing import kv_bytes_per_token, weight_bytes

BANDWIDTH = 3.02e12  # bytes a second, of a plain copy on an H100
RATE = 700e12  # operations a second in bfloat16, of its tensor cores on large products


@dataclass(frozen=True)
class Limits:
    """Of a model in some formats.

    Example:
        >>> from twofold.checkpoints.shapes import SHAPES
        >>> limits = Limits(ModelConfig.from_hf(SHAPES["Qwen/Qwen3-0.6B"]))
        >>> round(limits.step([512 + 128]) * 1e3, 2), round(limits.step([1024 + 64] * 32) * 1e3, 2)
        (0.42, 1.72)
    """

    config: ModelConfig
    weights: str = "auto"
    kv_cache_dtype: str = "auto"
    dtype: str = "bfloat16"

    @property
    def weight_bytes(self) -> float:
        """Read by a step of few tokens."""
        config, untied = self.config, not self.config.tie_word_embeddings
        format = weight_format(self.dtype if self.weights == "auto" else self.weights)
        table_bits = (format if format.is_float else weight_format(self.dtype)).bits
        unread = config.vocab_size * config.hidden_size * table_bits / 8 if untied else 0
        return weight_bytes(config, self.weights, self.dtype) - unread

    @property
    def kv_bytes(self) -> float:
        """Of a token."""
        return kv_bytes_per_token(self.config, self.kv_cache_dtype, dtype=self.dtype)

    @property
    def head_operations(self) -> float:
        """For a row of logits."""
        return 2.0 * self.config.vocab_size * self.config.hidden_size

    @property
    def layer_operations(self) -> float:
        """For a token in all layers, attention aside."""
        shapes = self.config.expected_tensors().items()
        return 2.0 * sum(math.prod(shape) for name, shape in shapes if ".layers." in name and len(shape) == 2)

    def step(self, lengths: Sequence[float]) -> float:
        """Seconds of a step that decodes a token of sequences of these lengths."""
        num_bytes = self.weight_bytes + sum(lengths) * self.kv_bytes
        operations = len(lengths) * (self.layer_operations + self.head_operations) + self._attention(sum(lengths))
        return max(num_bytes / BANDWIDTH, operations / RATE)

    def prompts(self, lengths: Sequence[int]) -> float:
        """Seconds of computing prompts of these lengths."""
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        operations = sum(lengths) * self.layer_operations + len(lengths) * self.head_operations + self._attention(pairs)
        num_bytes = self.weight_bytes + sum(lengths) * self.kv_bytes
        return max(num_bytes / BANDWIDTH, operations / RATE)

    def run(self, requests: Sequence[tuple[int, int]]) -> float:
        """Seconds of requests of (prompt, output) tokens, all at once: the prompts, then as many steps as the longest
        output has tokens after the first."""
        seconds = self.prompts([prompt for prompt, _ in requests])
        for i in range(1, max(output for _, output in requests)):
            seconds += self.step([prompt + i for prompt, output in requests if output > i])
        return seconds

    def _attention(self, pairs: float) -> float:
        """Operations for so many pairs of a query and a key: a product with the key, and one with the value."""
        return 4.0 * pairs * self.config.num_layers * self.config.num_heads * self.config.head_dim
