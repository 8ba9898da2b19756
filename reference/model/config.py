"""What a Llama-family model is made of, read from its config; which family it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    family: str  # "llama", "mistral", "qwen2", "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rope_interleaved: bool = False
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None  # which layers slide; None: all or none
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Raises ValueError for an unknown family, naming it and those known."""

    def layer_window(self, layer: int) -> int | None: ...

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a checkpoint must have, by Hugging Face's name, with its shape."""


FAMILIES: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3")
