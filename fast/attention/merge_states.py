"""merge_states, in Triton. What the technique is for: `reference/attention/merge_states.py`."""

from jaxtyping import Float
from torch import Tensor as Array


def merge_states(
    out_parts: Float[Array, "num_parts num_tokens num_heads head_dim"],
    lse_parts: Float[Array, "num_parts num_tokens num_heads"],
    *,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_heads"]]:
    """Same contract as `reference.attention.merge_states.merge_states`."""
    raise NotImplementedError("merge_states")
