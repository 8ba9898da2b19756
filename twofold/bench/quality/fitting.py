"""A decoder with other weights: rounded, fitted to what the model computes on a text, or left out.

What has to see the model at work is found in one pass over the calibration text, layer by layer: a stand-in takes each
matrix's place, fits it to the input that arrives, and answers as the fitted one. So a layer is fitted to what the
layers before it have become, and their errors can be made up for.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from reference.linear.gptq import gptq
from reference.linear.pruning import feature_norm, magnitude_score, mask_24, mask_rows, wanda_score
from reference.linear.smoothquant import activation_absmax, smooth_quant
from reference.linear.weight import Weight
from reference.model.decoder import Decoder, Layer
from twofold.bench.quality.cases import Case
from twofold.bench.quality.reading import Reader

Fit = Callable[[Weight, np.ndarray], Weight]
"""A float layer, and what goes into it [num_tokens, in_features], as host float32; returns what takes its place."""


def fitted_decoder(decoder: Decoder, case: Case, calibration: np.ndarray) -> Decoder:
    """A copy of a float32 decoder with the layers' matrices as ``case`` has them; ``decoder`` stays as it is.

    Args:
        calibration: [num_windows, num_tokens] of text, for methods that need one.
    """
    if case.method == "SmoothQuant":
        return _smoothed(decoder, case.weights, calibration)
    if case.needs_calibration:
        return _fitted(decoder, lambda weight, x: _find(weight, case, x), calibration)
    return _with_layers(decoder, lambda layer: _with_matrices(layer, lambda weight: _find(weight, case, None)))


def _find(weight: Weight, case: Case, x: np.ndarray | None) -> Weight:
    """One matrix as the case has it. ``x`` is what goes into it, where the method asks."""
    host = weight.to(None)
    matrix, placed = host.dequantize(), {"backend": weight.backend, "device": weight.device}
    if case.method == "GPTQ":
        assert x is not None
        return gptq(matrix, [x], host.bias, format=case.weights, act_order=True, **placed)
    if case.kind == "pruning":
        score = magnitude_score(matrix) if x is None else wanda_score(matrix, feature_norm([x]))
        is_24 = case.weights == "sparse24"
        mask = mask_24(score) if is_24 else mask_rows(score, sparsity=case.sparsity)
        matrix = np.where(mask, matrix, np.float32(0))
    return Weight.from_float(matrix, host.bias, format=case.weights, **placed)


def _smoothed(decoder: Decoder, format: str, calibration: np.ndarray) -> Decoder:
    """SmoothQuant on the layers behind a norm, the only ones whose input can be scaled for nothing; the others are
    rounded as they are."""
    loudest: dict[int, np.ndarray] = {}

    def listen(weight: Weight, x: np.ndarray) -> Weight:
        loudest[id(weight)] = activation_absmax([x])
        return weight

    _fitted(decoder, listen, calibration)
    backend, placed = decoder.backend, {"backend": decoder.backend, "device": decoder.device}

    def behind(norm: Any, weights: list[Weight]) -> tuple[Any, list[Weight]]:
        hosts = [weight.to(None) for weight in weights]
        new_norm, layers = smooth_quant(
            np.asarray(backend.to_host(norm)), [host.dequantize() for host in hosts], [loudest[id(weights[0])][None]],
            biases=[host.bias for host in hosts], format=format, **placed,
        )  # fmt: skip
        return backend.from_host(new_norm, dtype=decoder.dtype, device=decoder.device), layers

    def smooth(layer: Layer) -> Layer:
        attention_norm, qkv = behind(layer.attention_norm, layer.qkv)
        feed_forward_norm, gate_up = behind(layer.feed_forward_norm, layer.gate_up)
        o, down = (
            Weight.from_float(w.to(None).dequantize(), w.bias, format=format, **placed) for w in (layer.o, layer.down)
        )
        return replace(
            layer, attention_norm=attention_norm, qkv=qkv, o=o,
            feed_forward_norm=feed_forward_norm, gate_up=gate_up, down=down,
        )  # fmt: skip

    return _with_layers(decoder, smooth)


def _fitted(decoder: Decoder, fit: Fit, calibration: np.ndarray) -> Decoder:
    """Every matrix fitted in one pass, in which all of the calibration text goes through a layer at once."""
    standing_in = _with_layers(decoder, lambda layer: _with_matrices(layer, lambda weight: StandIn(weight, fit)))
    Reader(standing_in).hidden(calibration)
    return _with_layers(standing_in, lambda layer: _with_matrices(layer, lambda stand_in: stand_in.fitted))


def _with_layers(decoder: Decoder, change: Callable[[Layer], Layer]) -> Decoder:
    changed = copy.copy(decoder)
    changed.layers = [change(layer) for layer in decoder.layers]
    return changed


def _with_matrices(layer: Layer, change: Callable[[Any], Any]) -> Layer:
    """A layer with every matrix changed, in the order in which they are met."""
    return replace(
        layer,
        qkv=[change(weight) for weight in layer.qkv],
        o=change(layer.o),
        gate_up=[change(weight) for weight in layer.gate_up],
        down=change(layer.down),
    )


class StandIn:
    """In a layer's place for one pass: fits it to the input that comes, and answers as the fitted one would."""

    def __init__(self, weight: Weight, fit: Fit):
        self.weight, self.fit = weight, fit
        self.fitted: Weight | None = None

    def linear(self, x: Any, *, out: Any = None) -> Any:
        return self._fitted_to(x).linear(x, out=out)

    def rms_norm_linear(self, x: Any, norm_weight: Any, *, eps: float, out: Any = None) -> Any:
        return self.linear(self.weight.backend.rms_norm(x, norm_weight, eps=eps), out=out)

    def linear_add(self, x: Any, residual: Any, *, out: Any = None) -> Any:
        return self._fitted_to(x).linear_add(x, residual, out=out)

    def swiglu_linear_add(self, gate_up: Any, residual: Any, *, out: Any = None) -> Any:
        return self.linear_add(self.weight.backend.swiglu(gate_up), residual, out=out)

    def _fitted_to(self, x: Any) -> Weight:
        self.fitted = self.fit(self.weight, np.asarray(self.weight.backend.to_host(x)))
        return self.fitted
