"""embedding, in Triton. What the technique is for: `reference/fusion/embedding.py`."""

from jaxtyping import Float, Int
from torch import Tensor as Array


def embedding(
    token_ids: Int[Array, " num_tokens"],
    weight: Float[Array, "vocab_size hidden_size"],
    *,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> Float[Array, "num_tokens hidden_size"]:
    """Same contract as `reference.fusion.embedding.embedding`."""
    raise NotImplementedError("embedding")
