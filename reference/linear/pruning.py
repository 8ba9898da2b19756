"""Pruning: which weights to leave out, and how to keep the rest."""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray as Array

from reference._checks import require


def mask_24(score: Float[Array, "out_features in_features"]) -> Bool[Array, "out_features in_features"]:
    """Keep the two of every four neighbours that score highest (of equals, the first)."""
    require(score.ndim == 2 and score.shape[1] % 4 == 0, "mask_24", "score", "in_features divisible by 4", score.shape)
    fours = score.reshape(len(score), -1, 4)
    order = np.argsort(-fours, axis=-1, kind="stable")
    mask = np.zeros(fours.shape, bool)
    np.put_along_axis(mask, order[..., :2], True, axis=-1)
    return mask.reshape(score.shape)


def compress_24(
    weight: Float[Array, "out_features in_features"],
) -> tuple[Float[Array, "out_features half_features"], UInt8[Array, "out_features index_bytes"]]:
    """The values and indices of ``sparse_linear`` for a matrix with at most two of every four weights not zero."""
    fours = weight.reshape(len(weight), -1, 4)
    require((np.count_nonzero(fours, axis=-1) <= 2).all(), "compress_24", "weight", "two of four zero", "more")
    places = np.sort(np.argsort(fours == 0, axis=-1, kind="stable")[..., :2], axis=-1)
    values = np.take_along_axis(fours, places, axis=-1).reshape(len(weight), -1)
    nibbles = (places[..., 0] | places[..., 1] << 2).astype(np.uint8)
    if nibbles.shape[1] % 2:
        nibbles = np.pad(nibbles, [(0, 0), (0, 1)])
    return values, nibbles[:, ::2] | nibbles[:, 1::2] << 4


def decompress_24(
    values: Float[Array, "out_features half_features"], indices: UInt8[Array, "out_features index_bytes"]
) -> Float[Array, "out_features in_features"]:
    """The dense matrix."""
    num_groups = values.shape[1] // 2
    nibbles = np.stack([indices & 15, indices >> 4], axis=-1).reshape(len(values), -1)[:, :num_groups]
    places = np.stack([nibbles & 3, nibbles >> 2], axis=-1)
    dense = np.zeros((len(values), num_groups, 4), values.dtype)
    np.put_along_axis(dense, places.astype(np.intp), values.reshape(len(values), -1, 2), axis=-1)
    return dense.reshape(len(values), -1)
