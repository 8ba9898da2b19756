"""2:4 sparsity: two of every four weights are kept, compressed, with two bits each that say which.

Pruning wherever the weights are smallest saves arithmetic that no hardware can skip. With *exactly* two zeros in every
four neighbours the position of what is left fits in a nibble, half the weights are stored, and a tensor core picks the
two activations it needs and multiplies at twice the rate. Which two to keep: `pruning.py`.
"""

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_float, require_shape
from reference.linear.linear import add_bias, check_linear, matmul_by_tiles
from reference.linear.pruning import decompress_24


def sparse_linear(
    x: Float[Array, "num_tokens in_features"],
    values: Float[Array, "out_features half_features"],
    indices: UInt8[Array, "out_features index_bytes"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""A linear layer with a 2:4 sparse weight.

    .. math::
        out_o = \sum_g \sum_{k=0}^{1} x_{4g + place_{ogk}} \, value_{ogk} + bias_o

    Args:
        x: The tokens' activations; the input features come in groups of four.
        values: The two weights that each group keeps, in order.
        indices: A nibble for each group holds the two places, 0 to 3 and ascending, the first in its low two bits; byte
            j holds groups 2j (low nibble) and 2j + 1. With an odd number of groups the last nibble is not read.
        bias: One number for each output feature, or None.
        residual: What is added to the layer's result, once that is rounded to the dtype of ``x``; or None.
        out: Where to write the result; may be ``residual``, and overlap no other argument.

    Returns:
        The result, in the dtype of ``x``; float32 sums, float64 for float64 ``x``. (Here a tile of rows is spread out
        to its dense form and multiplied: NumPy has no sparse matrix product. It shows the format, not the speed.)

    Raises:
        ValueError: If shapes disagree or the places of a group do not ascend.

    Source:
        Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021, section 3 and figure 3.

    Example:
        >>> x, values = np.array([[1.0, 10.0, 100.0, 1000.0]]), np.array([[2.0, 3.0]])
        >>> sparse_linear(x, values, np.array([[0b1101]], np.uint8))   # places 1 and 3: weights 0, 2, 0, 3
        array([[3020.]])
    """
    require_shape("sparse_linear", "values", values, (None, None))
    require_float("sparse_linear", "values", values)
    check_linear("sparse_linear", x, (len(values), 2 * values.shape[1]), bias, out, residual)
    require(values.shape[1] % 2 == 0, "sparse_linear", "values", "two values for each group of four", values.shape)
    require_shape("sparse_linear", "indices", indices, (len(values), -(-values.shape[1] // 4)))
    compute = compute_dtype(x.dtype)
    result = matmul_by_tiles(
        x.astype(compute, copy=False),
        len(values),
        lambda tile, rows: np.copyto(tile, decompress_24(values[rows], indices[rows])),
    )
    return add_bias(result, bias, residual, x.dtype, out)
