"""lora, in Triton. What the technique is for: `reference/linear/lora.py`."""

from jaxtyping import Float, Float32, Int32
from torch import Tensor as Array


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
    """Same contract as `reference.linear.lora.lora`."""
    raise NotImplementedError("lora")
