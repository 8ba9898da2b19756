"""Token embedding: a row of the table for each token."""

from jaxtyping import Float, Int
from numpy import ndarray as Array

from reference._checks import deliver, require, require_out, require_shape


def embedding(
    token_ids: Int[Array, " num_tokens"],
    weight: Float[Array, "vocab_size hidden_size"],
    *,
    out: Float[Array, "num_tokens hidden_size"] | None = None,
) -> Float[Array, "num_tokens hidden_size"]:
    r"""Look each token's row up.

    .. math::
        out_t = weight_{token\_ids_t}

    Args:
        token_ids: From 0 to ``vocab_size`` - 1, in any order, with repeats.
        weight: The table. Nothing is computed, so rows keep its dtype.
        out: Where to write the rows; may not overlap ``weight``.

    Returns:
        One row for each token.

    Raises:
        ValueError: If an id is out of range, or a shape is wrong.

    Source:
        A one-hot vector times the table, without the multiplication.

    Example:
        >>> import numpy as np
        >>> embedding(np.array([2, 0]), np.array([[0.0, 0.1], [1.0, 1.1], [2.0, 2.1]]))
        array([[2. , 2.1],
               [0. , 0.1]])
    """
    require_shape("embedding", "weight", weight, (None, None))
    require_shape("embedding", "token_ids", token_ids, (None,))
    require(token_ids.dtype.kind in "iu", "embedding", "token_ids", "an integer dtype", token_ids.dtype)
    vocab_size, hidden_size = weight.shape
    in_range = not token_ids.size or (token_ids.min() >= 0 and token_ids.max() < vocab_size)
    require(in_range, "embedding", "token_ids", f"ids from 0 to {vocab_size - 1}", token_ids)
    require_out("embedding", out, (len(token_ids), hidden_size), weight.dtype)
    return deliver(weight[token_ids], weight.dtype, out)
