"""The LoRA adapters of a running model: read from a checkpoint, stacked, and added to whatever a linear layer gives.

An adapter changes a linear layer by a product of two thin matrices, y = W x + scaling * B (A x). The base stays as it
is, so one model serves many adapters at once; each token says which is its own. For that the adapters of a layer lie
stacked in one array, smaller ranks padded with zeros, which add nothing.

Not here: adapters of the embedding or the head, DoRA, and initialisations that change the base weights.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from reference._checks import require
from reference.model.config import ModelConfig

_TENSOR = re.compile(r"(?:base_model\.model\.)?(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.lora_([AB])\.weight")


class LowRank(NamedTuple):
    """What one adapter adds to one linear layer: ``scaling * b @ a``."""

    a: np.ndarray  # [rank, in_features]
    b: np.ndarray  # [out_features, rank]
    scaling: float


class AdapterBank:
    """The adapters of a running model, by name and by number.

    Attributes:
        names: An adapter's number, as ``adapter_ids`` has it, is its place here. -1 is no adapter.
        digests: By name, a hash of the adapter's *content*: equal digests, equal function. Prefix keys are made of it.

    Example:
        >>> config = ModelConfig("llama", vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=1,
        ...                      num_heads=2, num_kv_heads=1, head_dim=2, max_position_embeddings=16)
        >>> import reference
        >>> bank = AdapterBank(config, backend=reference)
        >>> layer = "base_model.model.model.layers.0.self_attn.v_proj"
        >>> tensors = {f"{layer}.lora_A.weight": np.ones((3, 4)), f"{layer}.lora_B.weight": np.ones((2, 3))}
        >>> bank.add("style", tensors, {"r": 3, "lora_alpha": 6})
        0
        >>> base, x = np.zeros((2, 2), np.float32), np.ones((2, 4), np.float32)
        >>> bank.apply(base, x, 0, ["self_attn.v_proj"], np.array([0, -1], np.int32))   # 6 / 3 * 3 * 4, and nothing
        array([[24., 24.],
               [ 0.,  0.]], dtype=float32)
    """

    def __init__(
        self, config: ModelConfig, *, backend: ModuleType | Any, dtype: str = "float32", device: str | None = None
    ):
        self.names: list[str] = []
        self.digests: dict[str, str] = {}
        self._shapes = {n.removesuffix(".weight"): s for n, s in config.expected_tensors().items() if "_proj.w" in n}
        self._backend, self._dtype, self._device = backend, dtype, device
        self._adapters: list[dict[str, LowRank]] = []
        self._stacks: dict[tuple[str, ...], tuple[Any, Any, Any] | None] = {}

    def add(self, name: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> int:
        """Add an adapter as `peft` saves it, and return its number.

        Args:
            name: What requests call it.
            tensors: Host arrays by the names in ``adapter_model.safetensors``.
            config: The parsed ``adapter_config.json``: ``lora_alpha``, ``use_rslora``, ``alpha_pattern`` are read;
                ranks are those of the tensors.

        Raises:
            ValueError: If the name is taken, a tensor belongs to no linear layer of this model, has no partner or not
                the layer's shape, or the config asks for what is not supported.
        """
        require(name not in self.digests, "AdapterBank.add", "name", "a name that is not taken", repr(name))
        _refuse_unsupported(config)
        adapter = {layer: self._low_rank(layer, pair, config) for layer, pair in _pairs(tensors).items()}
        require(adapter, "AdapterBank.add", "tensors", "lora_A and lora_B of at least one layer", "none")
        self._adapters.append(adapter)
        self._stacks.clear()
        self.names.append(name)
        self.digests[name] = _digest(adapter)
        return len(self.names) - 1

    def apply(self, base: Any, x: Any, layer: int, modules: Sequence[str], adapter_ids: Any) -> Any:
        """Add each token's adapter to the output of some linear layers, in place.

        Args:
            base: What the layers gave for ``x``, side by side in the order of ``modules``. Written.
            x: What went into them.
            layer: Which decoder layer they belong to.
            modules: Their names in it, such as "self_attn.q_proj".
            adapter_ids: An adapter's number for each token; -1 for none.
        """
        names = [f"model.layers.{layer}.{module}" for module in modules]
        stack = self._stack(tuple(names))
        if stack is not None:
            widths = [self._shapes[name][0] for name in names]
            self._backend.lora(base, x, *stack, adapter_ids, widths=widths, out=base)
            return base
        start = 0
        for name in names:
            end = start + self._shapes[name][0]
            stack = self._stack((name,))
            if stack is not None:
                columns = base[:, start:end]
                self._backend.lora(columns, x, *stack, adapter_ids, out=columns)
            start = end
        return base

    def _stack(self, layers: tuple[str, ...]) -> tuple[Any, Any, Any] | None:
        """(lora_a, lora_b, scaling) of all adapters for these linear layers, side by side; None where one of them is
        touched by no adapter, or by one with another scaling than its neighbour."""
        if layers not in self._stacks:
            parts = [[adapter.get(layer) for layer in layers] for adapter in self._adapters]
            touched = all(any(of_layer) for of_layer in zip(*parts))
            alike = all(len({part.scaling for part in of_adapter if part}) <= 1 for of_adapter in parts)
            self._stacks[layers] = self._place(layers, parts) if parts and touched and alike else None
        return self._stacks[layers]

    def _place(self, layers: tuple[str, ...], parts: list[list[LowRank | None]]) -> tuple[Any, Any, Any]:
        in_features, widths = self._shapes[layers[0]][1], [self._shapes[layer][0] for layer in layers]
        rank = max(len(part.a) for of_adapter in parts for part in of_adapter if part)
        lora_a = np.zeros((len(parts), len(layers) * rank, in_features), np.float32)
        lora_b = np.zeros((len(parts), sum(widths), rank), np.float32)
        scaling = np.zeros(len(parts), np.float32)
        for i, of_adapter in enumerate(parts):
            end = 0
            for j, (part, width) in enumerate(zip(of_adapter, widths)):
                end += width
                if part:
                    own = len(part.a)
                    lora_a[i, j * rank : j * rank + own], lora_b[i, end - width : end, :own] = part.a, part.b
                    scaling[i] = part.scaling
        place = self._backend.from_host
        a, b = (place(array, dtype=self._dtype, device=self._device) for array in (lora_a, lora_b))
        return a, b, place(scaling, device=self._device)

    def _low_rank(self, layer: str, pair: dict[str, np.ndarray], config: Mapping[str, Any]) -> LowRank:
        op = "AdapterBank.add"
        require(layer in self._shapes, op, "tensors", "linear layers of this model", layer)
        require(len(pair) == 2, op, f"{layer}.lora_{'B' if 'A' in pair else 'A'}.weight", "to be there", "nothing")
        out_features, in_features = self._shapes[layer]
        rank = len(pair["A"]) if pair["A"].ndim == 2 else 0
        require(rank >= 1, op, f"{layer}.lora_A.weight", f"[rank, {in_features}]", list(pair["A"].shape))
        for half, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            got = pair[half]
            require(got.shape == shape, op, f"{layer}.lora_{half}.weight", f"shape {list(shape)}", list(got.shape))
        alpha = _pattern(config.get("alpha_pattern") or {}, layer, config.get("lora_alpha", 8))
        finite = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and math.isfinite(alpha)
        require(finite, op, "lora_alpha", "a finite number", repr(alpha))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return LowRank(pair["A"].astype(np.float32), pair["B"].astype(np.float32), scaling)


def _pairs(tensors: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """{"model.layers.0.mlp.up_proj": {"A": ..., "B": ...}}"""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name in tensors:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(f"AdapterBank.add: tensors: expected lora_A and lora_B of linear layers, got {name}")
        pairs.setdefault(match[1], {})[match[2]] = np.asarray(tensors[name])
    return pairs


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """What would make the adapter another function than base + scaling * B A."""
    for name, plain in (
        ("peft_type", (None, "LORA")),
        ("use_dora", (None, False)),
        ("lora_bias", (None, False)),
        ("bias", (None, "none")),
        ("modules_to_save", (None, [])),
        ("init_lora_weights", (None, True, False, "gaussian", "eva", "orthogonal")),  # the others change the base
    ):
        require(
            config.get(name) in plain, "AdapterBank.add", name, " or ".join(map(repr, plain)), repr(config.get(name))
        )


def _pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value for the first pattern that is the end of the layer's name. Regular expressions are refused: they come
    from a stranger's file, and may take forever."""
    for pattern, value in patterns.items():
        require(re.fullmatch(r"[\w.]+", pattern), "AdapterBank.add", "alpha_pattern", "names of layers", repr(pattern))
        if f".{layer}".endswith(f".{pattern}"):
            return value
    return default


def _digest(adapter: dict[str, LowRank]) -> str:
    digest = hashlib.sha256()
    for layer in sorted(adapter):
        a, b, scaling = adapter[layer]
        digest.update(f"{layer} {a.shape} {b.shape} {scaling!r};".encode())
        digest.update(a.tobytes())
        digest.update(b.tobytes())
    return digest.hexdigest()
