"""Pruning: which weights to leave out, and how to keep what is left.

Two questions that have little to do with each other. *Which*: the smallest (magnitude), or those whose product with
the activations they meet is smallest (Wanda: a small weight on a loud feature matters more than a large one on a silent
feature). *Where*: anywhere, which no hardware profits from, or two of every four neighbours, which tensor cores skip.
A score answers the first, a mask made from a score the second:

    mask_24(wanda_score(weight, feature_norm(calibration)))

Nothing is trained afterwards, and nothing else is adjusted to make up for what is gone (SparseGPT would).
"""

from collections.abc import Iterable
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray as Array

from reference._checks import require, require_float, require_shape


def magnitude_score(weight: Float[Array, "out_features in_features"]) -> Float[Array, "out_features in_features"]:
    """:math:`|w_{oi}|`: what is small is assumed not to matter."""
    return np.abs(weight.astype(np.float32, copy=False))


def feature_norm(
    calibration: Iterable[Float[Array, "num_tokens in_features"]],
) -> Float[Array, " in_features"]:
    """The norm over all tokens of each input feature of a layer, from batches of what goes into it.

    Example:
        >>> feature_norm([np.array([[3.0, 0.0]]), np.array([[4.0, 1.0]])])
        array([5., 1.])
    """
    total = sum(np.square(x.astype(np.float64)).sum(axis=0) for x in calibration)
    require(isinstance(total, np.ndarray), "feature_norm", "calibration", "at least one batch", "none")
    return np.sqrt(total)


def wanda_score(
    weight: Float[Array, "out_features in_features"], norm: Float[Array, " in_features"]
) -> Float[Array, "out_features in_features"]:
    r"""Score a weight by what it does to the layer's output on real activations.

    .. math::
        score_{oi} = |w_{oi}| \cdot \lVert x_i \rVert_2

    Scores of different rows are not comparable: compare within a row, as the masks here do.

    Source:
        Sun et al., *A Simple and Effective Pruning Approach for Large Language Models*, 2024, equation 1.

    Example:
        >>> wanda_score(np.array([[2.0, -1.0]]), np.array([1.0, 10.0]))
        array([[ 2., 10.]], dtype=float32)
    """
    require_shape("wanda_score", "norm", norm, weight.shape[1:])
    return magnitude_score(weight) * norm.astype(np.float32, copy=False)


def mask_rows(
    score: Float[Array, "out_features in_features"], *, sparsity: float
) -> Bool[Array, "out_features in_features"]:
    """Keep the highest scores of each row, wherever they are; of equals the first.

    Args:
        score: One number for each weight.
        sparsity: The share of a row to leave out, 0 to 1; rounded down to whole weights.

    Example:
        >>> mask_rows(np.array([[3.0, 1.0, 2.0]]), sparsity=0.34)
        array([[ True, False,  True]])
    """
    require(0 <= sparsity <= 1, "mask_rows", "sparsity", "0 to 1", sparsity)
    count = score.shape[1] - int(sparsity * score.shape[1])
    highest = np.argsort(-score, axis=1, kind="stable")[:, :count]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, highest, True, axis=1)
    return mask


def mask_24(score: Float[Array, "out_features in_features"]) -> Bool[Array, "out_features in_features"]:
    """Keep the two highest scores of every four neighbours; of equals the first.

    Example:
        >>> mask_24(np.array([[3.0, 1.0, 2.0, 0.0]]))
        array([[ True, False,  True, False]])
    """
    require_shape("mask_24", "score", score, (None, None))
    require(score.shape[1] % 4 == 0, "mask_24", "score", "a multiple of 4 in_features", score.shape[1])
    fours = score.reshape(len(score), -1, 4)
    rank = np.zeros(fours.shape, np.int8)
    for first, second in combinations(range(4), 2):
        overtaken = fours[..., second] > fours[..., first]
        rank[..., first] += overtaken
        rank[..., second] += ~overtaken
    return (rank < 2).reshape(score.shape)


def compress_24(
    weight: Float[Array, "out_features in_features"],
) -> tuple[Float[Array, "out_features half_features"], UInt8[Array, "out_features index_bytes"]]:
    """The values and indices that ``sparse_linear`` takes, of a matrix that has two zeros in every four neighbours.

    Example:
        >>> values, indices = compress_24(np.array([[0.0, 2.0, 0.0, 3.0]]))
        >>> values, f"{indices.item():04b}"         # places 1 (low bits) and 3
        (array([[2., 3.]]), '1101')
    """
    require_shape("compress_24", "weight", weight, (None, None))
    require_float("compress_24", "weight", weight)
    require(weight.shape[1] % 4 == 0, "compress_24", "weight", "a multiple of 4 in_features", weight.shape[1])
    fours = weight.reshape(len(weight), -1, 4)
    kept = fours != 0
    most = np.count_nonzero(kept, axis=-1).max(initial=0)
    require(most <= 2, "compress_24", "weight", "at most two of four neighbours that are not 0", most)

    num_groups = fours.shape[1]
    first, second = _PLACES[np.packbits(kept, axis=-1, bitorder="little")[..., 0]].transpose(2, 0, 1)
    starts = 4 * np.arange(first.size).reshape(first.shape)
    values = np.stack([weight.take(starts + first), weight.take(starts + second)], axis=-1)
    nibbles = np.zeros((len(weight), num_groups + num_groups % 2), np.uint8)
    nibbles[:, :num_groups] = first | second << 2
    return values.reshape(len(weight), -1), nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def decompress_24(
    values: Float[Array, "out_features half_features"], indices: UInt8[Array, "out_features index_bytes"]
) -> Float[Array, "out_features in_features"]:
    """The matrix that was compressed.

    Raises:
        ValueError: If the two places of a group are not ascending: then they are no places.
    """
    num_groups = values.shape[1] // 2
    nibbles = np.stack([indices & 15, indices >> 4], axis=-1).reshape(len(values), -1)[:, :num_groups]
    first, second = nibbles & 3, nibbles >> 2
    require((first < second).all(), "decompress_24", "indices", "two ascending places in each nibble", "others")
    starts = 4 * np.arange(nibbles.size).reshape(nibbles.shape)
    dense = np.zeros(4 * nibbles.size, values.dtype)
    dense[starts + first], dense[starts + second] = values[:, 0::2], values[:, 1::2]
    return dense.reshape(len(values), -1)


def _two_places(kept: int) -> list[int]:
    """The places of the bits set in ``kept``, filled up with others where there are fewer than two: [0, 3] for 9."""
    return sorted(sorted(range(4), key=lambda place: not kept >> place & 1)[:2])


_PLACES = np.array([_two_places(kept) for kept in range(16)], np.uint8)
