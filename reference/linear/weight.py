"""A linear layer's weight: the arrays of one format, and the ops that serve it. The mirror of `kv_cache/cache.py`.

The one place that knows which formats there are. The decoder calls `linear`, `rms_norm_linear`, `linear_add`,
`swiglu_linear_add` and `rows`; a checkpoint, `from_float`, SmoothQuant, GPTQ and pruning make the arrays.
"""

import re
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the names bfloat16 and float8_e4m3fn)
import numpy as np

from reference._checks import require, require_shape
from reference.linear import pruning, rounding
from reference.numerics.low_precision import cast


@dataclass(frozen=True)
class WeightFormat:
    """One row of the table that every command shows.

    ``op`` is the op that serves the format, and ``row_op`` the one that gives a row back exactly (an op that also
    rounds the activations does not). ``bits`` are those of a stored weight, its share of the scales included.
    """

    name: str
    summary: str
    bits: float
    op: str = "linear"
    row_op: str = ""
    group_size: int | None = None
    with_min: bool = False

    @property
    def is_float(self) -> bool:
        return self.op == "linear"


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat("float32", "4 bytes a weight", 32),
        WeightFormat("float16", "2 bytes, 11 bits of precision, up to 65504", 16),
        WeightFormat("bfloat16", "2 bytes, 8 bits of precision, the range of float32", 16),
        WeightFormat("int8", "8-bit integers, a scale an output row", 8, "linear_int8", "linear_int8"),
        WeightFormat("w8a8", "int8, and activations too, rounded per token", 8, "linear_int8_int8", "linear_int8"),
        WeightFormat("fp8", "8-bit floats (e4m3), a scale an output row", 8, "linear_fp8", "linear_fp8"),
        WeightFormat("fp8a8", "fp8, and activations too, rounded per token", 8, "linear_fp8_fp8", "linear_fp8"),
        WeightFormat("q8_0", "8-bit integers in groups of 32 (GGUF Q8_0)", 8.5, "linear_int8", "linear_int8", 32),
        WeightFormat("int4", "4-bit integers in groups of 128 (int4-64: of 64)", 4.125, "linear_int4", "linear_int4", 128),
        WeightFormat("q4_0", "4-bit integers in groups of 32 (GGUF Q4_0)", 4.5, "linear_int4", "linear_int4", 32),
        WeightFormat("q4_1", "4 bits and a minimum in groups of 32 (GGUF Q4_1)", 5, "linear_int4", "linear_int4", 32, True),
        WeightFormat("sparse24", "float32, two of every four weights kept", 17, "sparse_linear", "sparse_linear"),
    )
}  # fmt: skip


def weight_format(name: str | WeightFormat) -> WeightFormat:
    """The format of that name; ``int4-64`` is ``int4`` in groups of 64, and so for any format in groups.

    Example:
        >>> weight_format("int4").group_size, weight_format("int4-64").group_size
        (128, 64)
    """
    if isinstance(name, WeightFormat):
        return name
    base, _, group_size = name.partition("-")
    format = WEIGHT_FORMATS.get(base)
    known = f"one of {', '.join(WEIGHT_FORMATS)}, or a format in groups with its size, like int4-64"
    require(format is not None and re.fullmatch(r"(\w+)(-[1-9]\d*)?", name), "weight_format", "name", known, name)
    assert format is not None
    if not group_size:
        return format
    require(format.group_size, "weight_format", "name", f"a format in groups before {group_size!r}", base)
    return in_groups_of(format, int(group_size))


def in_groups_of(format: WeightFormat, group_size: int) -> WeightFormat:
    """``format`` with another group size."""
    require(group_size > 0 and group_size % 2 == 0, "weight_format", "group_size", "a positive even number", group_size)
    scales = 32 if format.with_min else 16
    return replace(
        format,
        name=format.name if group_size == WEIGHT_FORMATS[format.name].group_size else f"{format.name}-{group_size}",
        group_size=group_size,
        bits=int(format.bits) // 4 * 4 + scales / group_size,
    )


@dataclass
class Weight:
    """A matrix [out_features, in_features] in some format, and a bias.

    Attributes:
        arrays: By the names of the op's arguments: ``weight`` alone for a float format, with ``weight_scale`` (and
            ``weight_min``, absent or None when there is none) for a quantized one, ``values`` and ``indices`` for
            ``sparse24``.
        bias: One number an output feature, or None.
        backend: Where the arrays live. None: on the host, as NumPy arrays in the layout that the ops document; such a
            weight only waits to be placed by `to`.
        device: The backend's device, or None for its default.
    """

    format: WeightFormat
    out_features: int
    in_features: int
    arrays: dict[str, Any]
    bias: Any = None
    backend: ModuleType | Any = field(default=None, repr=False)
    device: str | None = None

    @classmethod
    def from_float(
        cls,
        weight: Any,
        bias: Any = None,
        *,
        format: str | WeightFormat,
        backend: Any = None,
        device: str | None = None,
        group_size: int | None = None,
    ) -> "Weight":
        """Round a host float matrix [out_features, in_features] to nearest in ``format`` and place it on ``backend``.

        ``group_size`` overrides that of a format in groups; ``backend`` None leaves the arrays on the host.
        ``sparse24`` drops the two smallest of every four (`pruning.py` has better ways to choose).
        """
        format = weight_format(format)
        if group_size is not None:
            require(
                format.group_size, "Weight.from_float", "group_size", "None, as the format has no groups", group_size
            )
            format = in_groups_of(weight_format(format.name.partition("-")[0]), group_size)
        weight = np.asarray(weight)
        require_shape("Weight.from_float", "weight", weight, (None, None))
        arrays = _round(weight, format)
        return cls(format, *weight.shape, arrays, bias).to(backend, device=device)

    def to(self, backend: ModuleType | Any, *, device: str | None = None) -> "Weight":
        """The same weight on ``backend`` (None: on the host), in the layout that its kernels like."""
        host = self.host_arrays()
        bias = None if self.bias is None else (self.bias if self.backend is None else self.backend.to_host(self.bias))
        if backend is None:
            return replace(self, arrays=host, bias=bias, backend=None, device=None)
        arrays = {name: backend.from_host(array, device=device) for name, array in host.items()}
        if self._layout:
            arrays["weight"] = backend.pack_weight(arrays["weight"], format=self._layout)
        bias = None if bias is None else backend.from_host(bias, device=device)
        return replace(self, arrays=arrays, bias=bias, backend=backend, device=device)

    def host_arrays(self) -> dict[str, np.ndarray]:
        """The arrays as NumPy, in the documented layout."""
        arrays = {name: array for name, array in self.arrays.items() if array is not None}
        if self.backend is None:
            return arrays
        if self._layout:
            arrays["weight"] = self._unpacked()
        return {name: self.backend.to_host(array) for name, array in arrays.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the bias included."""
        arrays = [*self.arrays.values(), self.bias]
        return sum(int(array.nbytes) for array in arrays if array is not None)

    def linear(self, x: Any, *, out: Any = None) -> Any:
        """``x @ weight.T + bias``."""
        return self._apply(self.format.op, self.arrays, x, self.bias, out)

    def rms_norm_linear(self, x: Any, norm_weight: Any, *, eps: float, out: Any = None) -> Any:
        """RMSNorm, then this layer: the fused op for float weights, its parts for the others. So too the next two."""
        if self.format.is_float:
            return self.backend.rms_norm_linear(x, norm_weight, self.arrays["weight"], self.bias, eps=eps, out=out)
        return self.linear(self.backend.rms_norm(x, norm_weight, eps=eps), out=out)

    def linear_add(self, x: Any, residual: Any, *, out: Any = None) -> Any:
        """This layer, plus the residual. ``out`` may be ``residual``."""
        if self.format.is_float:
            return self.backend.linear_add(x, self.arrays["weight"], residual, self.bias, out=out)
        return _add(self.linear(x), residual, out)

    def swiglu_linear_add(self, gate_up: Any, residual: Any, *, out: Any = None) -> Any:
        """SwiGLU, then this layer, plus the residual. ``out`` may be ``residual``."""
        if self.format.is_float:
            return self.backend.swiglu_linear_add(gate_up, self.arrays["weight"], residual, self.bias, out=out)
        return _add(self.linear(self.backend.swiglu(gate_up)), residual, out)

    def rows(self, rows: Any, *, dtype: str = "float32") -> Any:
        """Rows as floats, for an embedding table kept in this format: tied weights are one `Weight`, used twice.

        Float formats give their own dtype. The others have no op that only dequantizes, and need none: the rows of a
        matrix are what it makes of the identity, exactly, since every other term of each sum is zero.
        """
        if self.format.is_float:
            return self.backend.embedding(rows, self.arrays["weight"])
        arrays = dict(self.arrays, weight=self._unpacked()) if self._layout else self.arrays
        arrays = {name: self.backend.take_rows(array, rows) for name, array in arrays.items() if array is not None}
        if self._layout:
            arrays["weight"] = self.backend.pack_weight(arrays["weight"], format=self._layout)
        identity = self.backend.from_host(np.eye(self.in_features, dtype=dtype), device=self.device)
        columns = self._apply(self.format.row_op, arrays, identity, None, None)
        in_order = self.backend.from_host(np.arange(len(rows)), device=self.device)
        return self.backend.take_rows(columns.T, in_order)  # rows of a transposed view, laid out one after another

    def dequantize(self) -> np.ndarray:
        """The whole matrix as host float32: what the layer computes with."""
        host = self.host_arrays()
        if self.format.is_float:
            return np.asarray(host["weight"]).astype(np.float32)
        if self.format.op == "sparse_linear":
            return pruning.decompress_24(host["values"], host["indices"]).astype(np.float32)
        if self.format.op == "linear_int4":
            assert self.format.group_size is not None
            return rounding.dequantize_int4(
                host["weight"], host["weight_scale"], host.get("weight_min"), group_size=self.format.group_size
            )
        return rounding.dequantize_8bit(host["weight"], host["weight_scale"], group_size=self.format.group_size)

    @staticmethod
    def concatenate(weights: "list[Weight]") -> "Weight":
        """Stack along out_features (q, k and v; gate and up). All of one format, on one backend."""
        first = weights[0]
        for other in weights[1:]:
            same = (other.format, other.in_features) == (first.format, first.in_features)
            got = [(w.format.name, w.in_features) for w in weights]
            require(same, "Weight.concatenate", "weights", "one format and one number of in_features", got)
        host = [w.to(None) for w in weights]
        arrays = {name: np.concatenate([w.arrays[name] for w in host]) for name in host[0].arrays}
        bias = None
        if any(w.bias is not None for w in host):
            bias = np.concatenate([np.zeros(w.out_features, np.float32) if w.bias is None else w.bias for w in host])
        stacked = Weight(first.format, sum(w.out_features for w in weights), first.in_features, arrays, bias)
        return stacked.to(first.backend, device=first.device)

    @property
    def _layout(self) -> str | None:
        """What `pack_weight` calls this format; None where there is nothing to pack."""
        return self.format.op.removeprefix("linear_") if "weight_scale" in self.arrays else None

    def _unpacked(self) -> Any:
        return self.backend.unpack_weight(self.arrays["weight"], format=self._layout, out_features=self.out_features)

    def _apply(self, op: str, arrays: dict[str, Any], x: Any, bias: Any, out: Any) -> Any:
        groups = {} if self.format.group_size is None else {"group_size": self.format.group_size}
        return getattr(self.backend, op)(x, **arrays, bias=bias, **groups, out=out)


def _round(weight: np.ndarray, format: WeightFormat) -> dict[str, np.ndarray]:
    """The arrays of ``format``, each weight rounded to nearest."""
    if format.is_float:
        return {"weight": cast(weight, format.name)}
    if format.op == "sparse_linear":
        mask = pruning.mask_24(np.abs(weight))
        return dict(zip(("values", "indices"), pruning.compress_24(np.where(mask, weight, 0).astype(np.float32))))
    if format.op == "linear_int4":
        assert format.group_size is not None
        codes, scale, minimum = rounding.round_int4(weight, group_size=format.group_size, with_min=format.with_min)
        arrays = {"weight": rounding.pack_int4(codes, group_size=format.group_size), "weight_scale": scale}
        return arrays if minimum is None else arrays | {"weight_min": minimum}
    if format.op.startswith("linear_fp8"):
        return dict(zip(("weight", "weight_scale"), rounding.round_fp8(weight)))
    return dict(zip(("weight", "weight_scale"), rounding.round_int8(weight, group_size=format.group_size)))


def _add(y: Any, residual: Any, out: Any) -> Any:
    total = residual + y
    if out is None:
        return total
    out[...] = total
    return out
