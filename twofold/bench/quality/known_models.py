"""What a token of well-known models takes in the KV cache: as many KV heads as query heads, fewer, or one."""

from dataclasses import dataclass
from typing import Any

from reference.kv_cache.formats import bytes_per_token

FORMATS = ("bfloat16", "int8", "int4", "kivi2")
BLOCK_SIZE = 32


@dataclass(frozen=True)
class KnownModel:
    """Sizes as its authors published them."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def kind(self) -> str:
        """Multi-head, grouped-query or multi-query attention."""
        return "MHA" if self.num_kv_heads == self.num_heads else "MQA" if self.num_kv_heads == 1 else "GQA"

    def row(self) -> dict[str, Any]:
        """Bytes a token in each format, and what they would be with a KV head for each query head."""
        sizes = {"num_layers": self.num_layers, "head_dim": self.head_dim, "block_size": BLOCK_SIZE}
        return {
            "model": self.name,
            "kind": self.kind,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "bytes_per_token": {
                name: bytes_per_token(name, num_kv_heads=self.num_kv_heads, dtype="bfloat16", **sizes)
                for name in FORMATS
            },
            "with_full_heads": bytes_per_token("bfloat16", num_kv_heads=self.num_heads, dtype="bfloat16", **sizes),
        }


KNOWN_MODELS = (
    KnownModel("Qwen1.5-14B", 40, 40, 40, 128),
    KnownModel("Qwen2.5-14B", 48, 40, 8, 128),
    KnownModel("StarCoder-15.5B", 40, 48, 1, 128),
    KnownModel("Llama-2-7B", 32, 32, 32, 128),
    KnownModel("Llama-3.1-8B", 32, 32, 8, 128),
    KnownModel("Falcon-7B", 32, 71, 1, 64),
    KnownModel("Llama-2-70B", 80, 64, 8, 128),
    KnownModel("SmolLM2-135M", 30, 9, 3, 64),
)
