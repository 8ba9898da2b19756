r"""GPTQ: round the weights of a row one after another, and let those still to come make up for the error so far.

What matters is not how far each weight moves but how far the layer's *output* moves, on activations as they come:

.. math::
    \lVert x \, (w - \hat w) \rVert^2 = (w - \hat w) \, H \, (w - \hat w)^T \qquad H = x^T x

Features that go together (H is far from diagonal) can answer for each other: if one weight was rounded up, its
companions can go down. Optimal Brain Surgeon gives the best answer for fixed choices so far: with
:math:`H^{-1} = U^T U`, U upper triangular, rounding weight j by :math:`\delta` is best repaired by subtracting
:math:`\delta \, U_{jk} / U_{jj}` from every later weight k. Rows do not depend on each other; the same U serves all.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int
from numpy import ndarray as Array

from reference._checks import require, require_shape
from reference.linear import rounding
from reference.linear.weight import Weight, WeightFormat, weight_format

OPS = ("linear_int8", "linear_int8_int8", "linear_int4")  # that serve formats whose codes are integers
CODES = {8: (-rounding.INT8_MAX, rounding.INT8_MAX), 4: (-rounding.INT4_MAX, rounding.INT4_MAX)}  # about 0
BLOCK = 128  # columns that are repaired at once; the rest of the matrix waits for a whole block of errors


def hessian(calibration: Iterable[Float[Array, "num_tokens in_features"]]) -> Float64[Array, "in_features in_features"]:
    r"""H = :math:`x^T x / n` over all n tokens of batches of a layer's input; the error above, per token and row.

    Example:
        >>> hessian([np.array([[1.0, 2.0]]), np.array([[3.0, 0.0]])])
        array([[5., 1.],
               [1., 2.]])
    """
    total, num_tokens = None, 0
    for x in calibration:
        x = x.astype(np.float64)
        total = x.T @ x if total is None else total + x.T @ x
        num_tokens += len(x)
    require(num_tokens > 0, "hessian", "calibration", "at least one token", "none")
    assert total is not None
    return total / num_tokens


def row_errors(
    difference: Float[Array, "out_features in_features"], hessian: Float64[Array, "in_features in_features"]
) -> Float64[Array, " out_features"]:
    r"""The mean squared error of each output feature: :math:`(w - \hat w) H (w - \hat w)^T`.

    Example:
        >>> row_errors(np.array([[1.0, -2.0]]), np.array([[4.0, 2.0], [2.0, 1.0]]))    # one makes up for the other
        array([0.])
    """
    difference = difference.astype(np.float64)
    return np.vecdot(difference @ hessian, difference)


def gptq(
    weight: Float[Array, "out_features in_features"],
    calibration: Iterable[Float[Array, "num_tokens in_features"]],
    bias: Float[Array, " out_features"] | None = None,
    *,
    format: str | WeightFormat = "int4",
    damping: float = 0.01,
    act_order: bool = False,
    backend: ModuleType | Any = None,
    device: str | None = None,
) -> Weight:
    """Quantize a layer so that its output on calibration data suffers least.

    Args:
        weight: The matrix, on the host.
        calibration: Batches of what goes into the layer.
        bias: Takes no part.
        format: One whose codes are integers: "int4", "int4-64", "q4_1", "int8", "w8a8", "q8_0", ...
        damping: Added to the diagonal of H, as a share of its mean: features that calibration hardly saw stay put, and
            H can be inverted.
        act_order: Round the loudest features first, while there are many left to repair their errors. The scales of
            groups are then those of the weights as given, since a group's members are not met one after another;
            without it a group's scales are found when it is reached, repairs included.
        backend: Where to place the layer; None: on the host.
        device: The backend's device.

    Returns:
        The layer. Going one way without looking back is no guarantee: a row that came out worse than if each of its
        weights had been rounded to nearest is rounded to nearest.

    Raises:
        ValueError: If the format's codes are not integers, or there is no calibration data of this width.

    Source:
        Frantar et al., *GPTQ*, 2023, algorithm 1: U is its Cholesky(H^-1)^T, Err its errors; "act-order" and static
        groups are from the authors' code.

    Example:
        >>> x = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]] * 8)    # the first two always go together
        >>> layer = gptq(np.array([[0.4, 0.4, 0.0, 7.0]]), [x], format="int4-4")
        >>> layer.dequantize()                                # to nearest: 0, 0; their sum was 0.8
        array([[0., 1., 0., 7.]], dtype=float32)
    """
    format = weight_format(format)
    require(format.op in OPS, "gptq", "format", "one whose codes are integers", format.name)
    require_shape("gptq", "weight", weight, (None, None))
    require(damping > 0, "gptq", "damping", "a number above 0", damping)
    h = hessian(calibration)
    require_shape("gptq", "calibration", h, (weight.shape[1], weight.shape[1]))

    weight = weight.astype(np.float32, copy=False)
    nearest = Weight.from_float(weight, bias, format=format)
    found = replace(nearest, arrays=_compensate(weight, h, nearest, damping, act_order))
    better = [row_errors(weight - candidate.dequantize(), h) for candidate in (found, nearest)]
    worse = better[0] > better[1]
    for name, array in found.arrays.items():
        array[worse] = nearest.arrays[name][worse]
    return found.to(backend, device=device)


def _compensate(
    weight: Array, hessian: Array, nearest: Weight, damping: float, act_order: bool
) -> dict[str, np.ndarray]:
    """The arrays of ``nearest``'s format, by algorithm 1."""
    format, in_features = nearest.format, weight.shape[1]
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(in_features)
    u = _inverse_factor(hessian[np.ix_(order, order)], damping)
    rest = np.ascontiguousarray(weight.astype(np.float64).T)[order]  # a row for each input feature, in order
    codes = np.zeros((in_features, len(weight)), np.int8)
    grid = Grid(nearest, in_features)

    for start, stop in _blocks(in_features, None if act_order else format.group_size):
        if format.group_size and not act_order:
            grid.fit(rest[start:stop].T, group=start // format.group_size)
        errors = np.zeros((stop - start, len(weight)))
        for j in range(start, stop):
            codes[order[j]], rounded = grid.round(rest[j], feature=order[j])
            errors[j - start] = (rest[j] - rounded) / u[j, j]
            rest[j + 1 : stop] -= np.outer(u[j, j + 1 : stop], errors[j - start])
        rest[stop:] -= u[start:stop, stop:].T @ errors
    return grid.arrays(codes.T)


class Grid:
    """The values that a weight may take: for each group ``scale * code + offset``, with a range for the code.

    Codes are counted about zero here, as signed integers, unless the format has a minimum.
    """

    def __init__(self, nearest: Weight, in_features: int):
        self.format = nearest.format
        self.group_size = self.format.group_size or in_features
        self.scale = nearest.arrays["weight_scale"].reshape(nearest.out_features, -1).copy()
        self.minimum = nearest.arrays["weight_min"].copy() if self.format.with_min else None
        self.low, self.high = (0, 15) if self.format.with_min else CODES[int(self.format.code_bits)]

    def fit(self, weight: Array, *, group: int) -> None:
        """Find a group's scales again, for its weights as they are now."""
        weight = weight.astype(np.float32)
        if self.format.code_bits == 8:
            self.scale[:, [group]] = rounding.round_int8(weight, group_size=self.group_size)[1]
            return
        scale, minimum = rounding.int4_scales(weight, group_size=self.group_size, with_min=self.format.with_min)
        self.scale[:, [group]] = scale
        if self.minimum is not None and minimum is not None:
            self.minimum[:, [group]] = minimum

    def round(self, column: Array, *, feature: int) -> tuple[Int[Array, " out_features"], Array]:
        """The codes of one input feature's weights, and what they stand for."""
        group = feature // self.group_size
        scale = self.scale[:, group].astype(np.float64)
        offset = 0.0 if self.minimum is None else self.minimum[:, group].astype(np.float64)
        codes = np.divide(column - offset, scale, out=np.zeros_like(column), where=scale > 0)
        codes = np.clip(np.rint(codes), self.low, self.high)
        return codes.astype(np.int8), scale * codes + offset

    def arrays(self, codes: Array) -> dict[str, np.ndarray]:
        """As the format stores them."""
        if self.format.code_bits == 8:
            scale = self.scale if self.format.group_size else self.scale[:, 0]
            return {"weight": np.ascontiguousarray(codes), "weight_scale": scale}
        unsigned = (codes if self.minimum is not None else codes + np.int8(8)).astype(np.uint8)
        arrays = {"weight": rounding.pack_int4(unsigned, group_size=self.group_size), "weight_scale": self.scale}
        return arrays if self.minimum is None else arrays | {"weight_min": self.minimum}


def _inverse_factor(hessian: Array, damping: float) -> Array:
    """U, upper triangular, with :math:`U^T U = (H + damping)^{-1}`."""
    mean = np.trace(hessian) / max(1, len(hessian))
    damped = hessian + (damping * mean if mean > 0 else 1.0) * np.eye(len(hessian))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def _blocks(in_features: int, group_size: int | None) -> Iterator[tuple[int, int]]:
    """The columns, cut into blocks: a group where scales are found group by group."""
    step = group_size or BLOCK
    for start in range(0, in_features, step):
        yield start, min(start + step, in_features)
