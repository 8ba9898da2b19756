"""From a checkpoint's tensors to weights on a backend: each is taken once, checked, hashed, rounded and placed."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reference._checks import require
from reference.linear.weight import Weight, weight_format
from reference.model.config import ModelConfig
from reference.numerics.arrays import from_host


class Fingerprint:
    """A hash of the weights that reads them at the speed of memory.

    SHA-256 of everything would take half a second for a model of half a gigabyte. So of each tensor the hash sees name,
    shape, dtype, the sum of all its 64-bit words modulo 2**64, and 256 of those words in full: a change of any one
    number changes the sum, and words that trade places show in the sample unless few do. It tells models apart that
    were trained apart; it is no defence against one made to collide.
    """

    def __init__(self, *described: Any):
        self._digest = hashlib.sha256(repr(described).encode())

    def add(self, name: str, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        words, tail = data[: data.size // 8 * 8].view(np.uint64), data[data.size // 8 * 8 :]
        total = int(np.add.reduce(words))
        sample = words[:: max(1, len(words) // 256)]
        self._digest.update(f"{name} {array.shape} {array.dtype} {total};".encode())
        self._digest.update(sample.tobytes() + tail.tobytes())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class Loader:
    """Takes each tensor once, checks it, hashes it, and places it on the backend."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Any], backend: Any, dtype: str, format: str, device: str | None
    ):
        self.shapes = config.expected_tensors()
        missing = [name for name in self.shapes if name not in tensors]
        first = f"{missing[0]} {list(self.shapes[missing[0]])}" if missing else ""
        require(
            not missing,
            "Decoder",
            "tensors",
            f"all {len(self.shapes)} tensors",
            f"{len(missing)} less, such as {first}",
        )
        self.tensors, self.backend, self.dtype, self.device = tensors, backend, dtype, device
        self.as_is = format == "as-is"
        self.format = weight_format(dtype if format in ("auto", "as-is") else format)
        self.fingerprint = Fingerprint(config, dtype, self.format.name, self.as_is)

    def vector(self, name: str) -> Any:
        return self.backend.from_host(self._array(name), dtype=self.dtype, device=self.device)

    def table(self, name: str) -> Weight:
        """The embedding or the head: never rounded to a quantized format, but kept in one."""
        return self._placed(self._weight(name, self.format.name if self.format.is_float else self.dtype))

    def matrix(self, name: str) -> Weight:
        return self._placed(self._unplaced_matrix(name))

    def stack(self, names: Sequence[str]) -> list[Weight]:
        """Layers that read the same input, as one matrix; apart where their formats differ."""
        weights = [self._unplaced_matrix(name) for name in names]
        if len({weight.format.name for weight in weights}) == 1:
            if weights[0].format.is_float:  # they go from the file to the device, and meet there
                weights = [self._placed(weight) for weight in weights]
            weights = [Weight.concatenate(weights)]
        return [self._placed(weight) for weight in weights]

    def _placed(self, weight: Weight) -> Weight:
        return weight.to(self.backend, device=self.device)

    def _unplaced_matrix(self, name: str) -> Weight:
        weight = self._weight(f"{name}.weight", self.format.name)
        if f"{name}.bias" in self.shapes:
            bias = from_host(self._array(f"{name}.bias"), dtype=self.dtype)
            weight.bias = bias if weight.backend is None else self.backend.from_host(bias, device=self.device)
        return weight

    def _weight(self, name: str, format: str) -> Weight:
        """In ``format`` unless it came in one; on the host unless it came on the backend."""
        tensor = self.tensors[name]
        if not isinstance(tensor, Weight):
            return Weight.from_float(self._checked(name, np.asarray(tensor)), format=format)
        allowed = self.as_is or tensor.format.name == format
        require(
            allowed, "Decoder", "weight_format", f"as-is, since {name} is in {tensor.format.name}", self.format.name
        )
        self._require_shape(name, (tensor.out_features, tensor.in_features))
        if tensor.backend is self.backend and tensor.device == self.device:
            for part, array in tensor.arrays.items():  # only a look: reading it back would take longer than all else
                self.fingerprint.add(f"{name}.{part}", self.backend.to_host(array[:1]))
            return tensor
        host = tensor.to(None)
        for part, array in host.host_arrays().items():
            self.fingerprint.add(f"{name}.{part}", array)
        return host

    def _array(self, name: str) -> np.ndarray:
        return self._checked(name, np.asarray(self.tensors[name]))

    def _checked(self, name: str, array: np.ndarray) -> np.ndarray:
        self._require_shape(name, array.shape)
        is_float = array.dtype.kind == "f" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
        require(is_float, "Decoder", name, "floating point numbers", array.dtype)
        self.fingerprint.add(name, array)
        return array

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        require(tuple(shape) == self.shapes[name], "Decoder", name, f"shape {list(self.shapes[name])}", list(shape))
