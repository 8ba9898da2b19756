r"""SmoothQuant: move the outliers of the activations into the weights, where they do less harm.

W8A8 gives a token one scale, so a feature that is a hundred times louder than the rest (large models have some, always
the same ones) leaves them a hundredth of the 255 codes. A scale for each feature would cure that but cannot be taken
out of the sum over features. What can be done: divide the feature by s and multiply its column of the weight by s,

.. math::
    x \, W^T = (x / s) \, (W s)^T \qquad
    s_j = \frac{\max_t |x_{tj}|^{\alpha}}{\max_o |w_{oj}|^{1 - \alpha}}

which changes nothing until both are rounded. The division costs nothing at run time either: it goes into the weight of
the norm in front. With :math:`\alpha` = 1/2 a feature's activations and weights end up with the same maximum, and both
are rounded equally well.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from numpy import ndarray as Array

from reference._checks import require, require_shape
from reference.linear.weight import Weight, WeightFormat


def activation_absmax(calibration: Iterable[Float[Array, "num_tokens in_features"]]) -> Float32[Array, " in_features"]:
    """The largest magnitude of each feature in batches of activations.

    Example:
        >>> activation_absmax([np.array([[1.0, -2.0]]), np.array([[-3.0, 0.5]])])
        array([3., 2.], dtype=float32)
    """
    largest = None
    for x in calibration:
        batch = np.abs(x.astype(np.float32)).max(axis=0, initial=0)
        largest = batch if largest is None else np.maximum(largest, batch)
    require(largest is not None, "activation_absmax", "calibration", "at least one batch", "none")
    assert largest is not None
    return largest


def smoothing_scales(
    activations: Float[Array, " in_features"],
    weights: Sequence[Float[Array, "out_features in_features"]],
    *,
    alpha: float = 0.5,
) -> Float32[Array, " in_features"]:
    r"""How much of each feature's size moves from the activations into the weights: s in the module's equation.

    Args:
        activations: Each feature's largest magnitude, from ``activation_absmax``.
        weights: Every layer that reads these activations (q, k and v read the same ones): they share one s.
        alpha: The migration strength, 0 (make all columns of the weights alike) to 1 (make all activations alike).

    Returns:
        One positive number a feature; 1 where the feature or its weights are all zero, as there is nothing to balance.

    Source:
        Xiao et al., *SmoothQuant*, 2023, equation 4.

    Example:
        >>> smoothing_scales(np.array([100.0, 1.0]), [np.array([[1.0, 1.0], [-1.0, 0.5]])])
        array([10.,  1.], dtype=float32)
    """
    require(0 <= alpha <= 1, "smoothing_scales", "alpha", "0 to 1", alpha)
    require(len(weights) > 0, "smoothing_scales", "weights", "at least one layer", "none")
    for weight in weights:
        require_shape("smoothing_scales", "weights", weight, (None, len(activations)))
    columns = np.max([np.abs(weight.astype(np.float32)).max(axis=0, initial=0) for weight in weights], axis=0)
    balanced = (activations > 0) & (columns > 0)
    activations, columns = (np.where(balanced, size, 1).astype(np.float64) for size in (activations, columns))
    return np.where(balanced, activations**alpha / columns ** (1 - alpha), 1).astype(np.float32)


def smooth(
    norm_weight: Float[Array, " in_features"],
    weights: Sequence[Float[Array, "out_features in_features"]],
    scales: Float[Array, " in_features"],
) -> tuple[Float32[Array, " in_features"], list[Float32[Array, "out_features in_features"]]]:
    """The norm in front divided by the scales, and every layer behind it multiplied: together they do what they did.

    Example:
        >>> smooth(np.array([1.0, 1.0]), [np.array([[3.0, 1.0]])], np.array([2.0, 0.5]))
        (array([0.5, 2. ], dtype=float32), [array([[6. , 0.5]], dtype=float32)])
    """
    require_shape("smooth", "norm_weight", norm_weight, scales.shape)
    return (norm_weight / scales).astype(np.float32), [(weight * scales).astype(np.float32) for weight in weights]


def smooth_quant(
    norm_weight: Float[Array, " in_features"],
    weights: Sequence[Float[Array, "out_features in_features"]],
    calibration: Iterable[Float[Array, "num_tokens in_features"]],
    *,
    biases: Sequence[Float[Array, " out_features"] | None] | None = None,
    alpha: float = 0.5,
    format: str | WeightFormat = "w8a8",
    backend: ModuleType | Any = None,
    device: str | None = None,
) -> tuple[Float32[Array, " in_features"], list[Weight]]:
    """Smooth a norm and the layers that read it, then round those to nearest.

    Args:
        norm_weight: Of the norm in front, on the host.
        weights: The layers that read the norm's result, on the host.
        calibration: Batches of the norm's result, as it is now.
        biases: One for each layer, or None: they take no part.
        alpha: See ``smoothing_scales``.
        format: "w8a8", or any other.
        backend: Where to place the layers; None: on the host.
        device: The backend's device.

    Returns:
        The new weight of the norm, on the host, and the layers.
    """
    scales = smoothing_scales(activation_absmax(calibration), weights, alpha=alpha)
    norm_weight, smoothed = smooth(norm_weight, weights, scales)
    biases = [None] * len(smoothed) if biases is None else biases
    require(len(biases) == len(smoothed), "smooth_quant", "biases", f"{len(smoothed)} of them", len(biases))
    layers = [
        Weight.from_float(weight, bias, format=format, backend=backend, device=device)
        for weight, bias in zip(smoothed, biases)
    ]
    return norm_weight, layers
