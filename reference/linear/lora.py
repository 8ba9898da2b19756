"""LoRA: many low-rank adapters in one batch, each with its own rank and scaling."""

import numpy as np
from jaxtyping import Float, Float32, Int32
from numpy import ndarray as Array


def lora(
    base: Float[Array, "num_tokens out_features"],
    x: Float[Array, "num_tokens in_features"],
    lora_a: Float[Array, "num_adapters max_rank in_features"],
    lora_b: Float[Array, "num_adapters out_features max_rank"],
    scaling: Float32[Array, " num_adapters"],
    adapter_ids: Int32[Array, " num_tokens"],
    *,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    """base + scaling * B (A x), row by row with that token's adapter; -1 adds nothing; smaller ranks are padded with
    zeros. ``base`` is the result of any linear layer, float or quantized; ``out`` may be ``base``."""
    raise NotImplementedError
