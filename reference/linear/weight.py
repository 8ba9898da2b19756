"""A linear layer's weight: the arrays of one format, and the ops that serve it. The mirror of `kv_cache/cache.py`.

The one place that knows which formats there are. The decoder calls `linear`, `rms_norm_linear`, `linear_add`,
`swiglu_linear_add` and `rows`, and does not care; a checkpoint, `Weight.from_float`, `smoothquant.py`, `gptq.py` and
`pruning.py` make the arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np

from reference._checks import require, require_shape
from reference.linear import pruning, rounding
from reference.linear.linear import TILE_WEIGHTS
from reference.numerics.arrays import dtype_named


@dataclass(frozen=True)
class WeightFormat:
    """One row of the table that every command shows.

    Attributes:
        code_bits: Of what is stored for each weight, scales aside.
        op: The op that serves the format.
        row_op: The op that gives a row back as it is stored: not one that also rounds the activations.
        group_size: Input features that share a scale; None: a scale for each output row, or none at all.
        with_min: Whether a group also has a minimum.
    """

    name: str
    summary: str
    code_bits: float
    op: str = "linear"
    row_op: str = "linear"
    group_size: int | None = None
    with_min: bool = False

    @property
    def is_float(self) -> bool:
        return self.op == "linear"

    @property
    def bits(self) -> float:
        """Bits that a weight takes, with its share of its group's float16 scale and minimum."""
        return self.code_bits + (0 if self.group_size is None else (16 + 16 * self.with_min) / self.group_size)

    def in_groups_of(self, group_size: int) -> "WeightFormat":
        """This format with another group size, which becomes part of its name: ``int4-64``."""
        base = self.name.partition("-")[0]
        grouped = self.group_size is not None and group_size > 0 and group_size % 2 == 0
        require(grouped, "WeightFormat", "group_size", "an even number, and a format in groups", f"{base}-{group_size}")
        name = base if WEIGHT_FORMATS[base].group_size == group_size else f"{base}-{group_size}"
        return replace(self, name=name, group_size=group_size)


_TABLE = [
    WeightFormat("float32", "4 bytes a weight", 32),
    WeightFormat("float16", "2 bytes: 11 bits of precision, up to 65504", 16),
    WeightFormat("bfloat16", "2 bytes: 8 bits of precision, the range of float32", 16),
    WeightFormat("int8", "8-bit integers, a scale for each output row", 8, "linear_int8", "linear_int8"),
    WeightFormat("w8a8", "int8, and activations rounded too, per token", 8, "linear_int8_int8", "linear_int8"),
    WeightFormat("fp8", "8-bit floats (e4m3), a scale for each output row", 8, "linear_fp8", "linear_fp8"),
    WeightFormat("fp8a8", "fp8, and activations rounded too, per token", 8, "linear_fp8_fp8", "linear_fp8"),
    WeightFormat("q8_0", "8-bit integers in groups of 32, as GGUF's Q8_0", 8, "linear_int8", "linear_int8", 32),
    WeightFormat("int4", "4-bit integers in groups of 128 (int4-64: of 64)", 4, "linear_int4", "linear_int4", 128),
    WeightFormat("q4_0", "4-bit integers in groups of 32, as GGUF's Q4_0", 4, "linear_int4", "linear_int4", 32),
    WeightFormat("q4_1", "the same with a minimum, as GGUF's Q4_1", 4, "linear_int4", "linear_int4", 32, True),
    WeightFormat("sparse24", "two of every four weights, in float32", 17, "sparse_linear", "sparse_linear"),
]
WEIGHT_FORMATS: dict[str, WeightFormat] = {format.name: format for format in _TABLE}


def weight_format(name: str | WeightFormat) -> WeightFormat:
    """The format of that name; with a number behind, in groups of so many.

    Example:
        >>> weight_format("int4").group_size, weight_format("int4-64").group_size, weight_format("int4-64").bits
        (128, 64, 4.25)
    """
    if isinstance(name, WeightFormat):
        return name
    base, _, group_size = name.partition("-")
    known = base in WEIGHT_FORMATS and (group_size.isdecimal() or name == base)
    require(known, "weight_format", "name", f"one of {', '.join(WEIGHT_FORMATS)} (int4-64: groups of 64)", repr(name))
    return WEIGHT_FORMATS[base].in_groups_of(int(group_size)) if group_size else WEIGHT_FORMATS[base]


@dataclass(eq=False)
class Weight:
    """A matrix [out_features, in_features] in some format, and a bias.

    Attributes:
        arrays: By the names of the op's arguments: ``weight`` alone for a float format; with ``weight_scale``, and
            ``weight_min`` where the format has one (None counts as absent), for a quantized one; ``values`` and
            ``indices`` for ``sparse24``.
        bias: One number for each output feature, or None.
        backend: Whose arrays they are. None: NumPy arrays on the host, in the layout that the ops document; such a
            weight is only waiting for `to`.
        device: The backend's device; None is its default.

    Example:
        >>> import reference
        >>> weight = Weight.from_float(np.eye(4, dtype=np.float32), format="int4-2", backend=reference)
        >>> weight.linear(np.array([[1.0, 2.0, 3.0, 4.0]])).round(2), weight.nbytes   # 8 bytes of codes, 16 of scales
        (array([[1., 2., 3., 4.]]), 24)
    """

    format: WeightFormat
    out_features: int
    in_features: int
    arrays: dict[str, Any]
    bias: Any = None
    backend: ModuleType | Any = field(default=None, repr=False)
    device: str | None = None
    _kept: dict[str | int, Any] = field(default_factory=dict, init=False, repr=False)  # by dtype or size: see `rows`

    @classmethod
    def from_float(
        cls,
        weight: np.ndarray,
        bias: np.ndarray | None = None,
        *,
        format: str | WeightFormat,
        backend: ModuleType | Any = None,
        device: str | None = None,
        group_size: int | None = None,
    ) -> "Weight":
        """Round a host float matrix [out_features, in_features] to nearest in ``format`` and place it on ``backend``.

        Args:
            weight: The matrix; its memory is kept where ``format`` is the dtype it already has.
            bias: Kept as it is.
            format: A name of ``WEIGHT_FORMATS``, maybe with a group size (``int4-64``), or a format.
            backend: None leaves the arrays on the host.
            device: The backend's device.
            group_size: Instead of the format's own.
        """
        format = weight_format(format) if group_size is None else weight_format(format).in_groups_of(group_size)
        require_shape("Weight.from_float", "weight", weight, (None, None))
        out_features, in_features = weight.shape
        arrays = _round(weight, format)
        return cls(format, out_features, in_features, arrays, bias).to(backend, device=device)

    def to(self, backend: ModuleType | Any, *, device: str | None = None) -> "Weight":
        """The same weight on ``backend`` (None: on the host), in the layout that its kernels like."""
        if backend is self.backend and device == self.device:
            return self
        arrays, bias = self.host_arrays(), self._host(self.bias)
        if backend is not None:
            arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # kernels read along rows
            arrays = {name: backend.from_host(array, device=device) for name, array in arrays.items()}
            if self._layout:
                arrays["weight"] = backend.pack_weight(arrays["weight"], format=self._layout)
            bias = None if bias is None else backend.from_host(bias, device=device)
        return replace(self, arrays=arrays, bias=bias, backend=backend, device=device)

    def host_arrays(self) -> dict[str, np.ndarray]:
        """The arrays on the host, in the documented layout; absent ones left out."""
        arrays = {name: array for name, array in self.arrays.items() if array is not None}
        if self._layout and self.backend is not None:
            arrays["weight"] = self._unpacked()
        return {name: self._host(array) for name, array in arrays.items()}

    def dequantize(self) -> np.ndarray:
        """The whole matrix as host float32: the numbers that the layer computes with."""
        arrays, group_size = self.host_arrays(), self.format.group_size
        if self.format.is_float:
            return arrays["weight"].astype(np.float32, copy=False)
        if self.format.op == "sparse_linear":
            return pruning.decompress_24(**arrays).astype(np.float32, copy=False)
        if self.format.op == "linear_int4":
            return rounding.dequantize_int4(**arrays, group_size=group_size)  # type: ignore[arg-type]
        return rounding.dequantize_8bit(**arrays, group_size=group_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the bias included."""
        return sum(int(array.nbytes) for array in [*self.arrays.values(), self.bias] if array is not None)

    # ---- what the decoder calls -----------------------------------------------------------------------------------

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
        return self._apply(self.format.op, self.arrays, x, self.bias, out, residual=residual)

    def swiglu_linear_add(self, gate_up: Any, residual: Any, *, out: Any = None) -> Any:
        """SwiGLU, then this layer, plus the residual. ``out`` may be ``residual``."""
        if self.format.is_float:
            return self.backend.swiglu_linear_add(gate_up, self.arrays["weight"], residual, self.bias, out=out)
        return self.linear_add(self.backend.swiglu(gate_up), residual, out=out)

    def rows(self, rows: Any, *, dtype: str = "float32") -> Any:
        """Rows as floats: tied weights are one `Weight`, both the embedding table and the head.

        A float format gives its own dtype, the others ``dtype``. They have no op that only dequantizes, and need none:
        the rows of a matrix are what it makes of the identity, exactly, as all other terms of the sums are zero.
        """
        if self.format.is_float:
            return self.backend.embedding(rows, self.arrays["weight"])
        arrays = dict(self.arrays, weight=self._unpacked()) if self._layout else self.arrays
        arrays = {name: self.backend.take_rows(array, rows) for name, array in arrays.items() if array is not None}
        if self._layout:
            arrays["weight"] = self.backend.pack_weight(arrays["weight"], format=self._layout)
        if dtype not in self._kept:
            self._kept[dtype] = self.backend.from_host(np.eye(self.in_features), dtype=dtype, device=self.device)
        columns = self._apply(self.format.row_op, arrays, self._kept[dtype], None, None)
        return self.backend.take_rows(columns.T, self._in_order(len(rows)))  # a transposed view, row after row

    def _in_order(self, count: int) -> Any:
        """0 to ``count``. Kept on the device: a step that is recorded may bring nothing from the host."""
        size = 1 << max(count - 1, 0).bit_length()
        if size not in self._kept:
            self._kept[size] = self.backend.from_host(np.arange(size), device=self.device)
        return self._kept[size][:count]

    # ---- at load --------------------------------------------------------------------------------------------------

    @staticmethod
    def concatenate(weights: "Sequence[Weight]") -> "Weight":
        """Stack along out_features (q, k and v; gate and up). All of one format, on one backend."""
        first, kinds = weights[0], {(weight.format.name, weight.in_features) for weight in weights}
        require(
            len(kinds) == 1, "Weight.concatenate", "weights", "one format, one number of in_features", sorted(kinds)
        )
        bias = None
        if any(weight.bias is not None for weight in weights):
            biases = [(weight._host(weight.bias), weight.out_features) for weight in weights]
            bias = np.concatenate([np.zeros(size, np.float32) if bias is None else bias for bias, size in biases])
        out_features = sum(weight.out_features for weight in weights)
        if first.format.is_float and first.backend is not None:  # as large as they are, they stay where they are
            bias = None if bias is None else first.backend.from_host(bias, device=first.device)
            arrays = {"weight": first._end_to_end([weight.arrays["weight"] for weight in weights], out_features)}
            return replace(first, out_features=out_features, arrays=arrays, bias=bias)
        parts = [weight.host_arrays() for weight in weights]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        stacked = Weight(first.format, out_features, first.in_features, arrays, bias)
        return stacked.to(first.backend, device=first.device)

    def _end_to_end(self, matrices: list[Any], num_rows: int) -> Any:
        backend: Any = self.backend
        stacked = backend.empty((num_rows, self.in_features), dtype=self.format.name, device=self.device)
        start = 0
        for matrix in matrices:
            stacked[start : start + len(matrix)] = matrix
            start += len(matrix)
        return stacked

    @property
    def _layout(self) -> str | None:
        """What `pack_weight` calls this format; None where there is nothing to pack."""
        return self.format.op.removeprefix("linear_") if "weight_scale" in self.arrays else None

    def _unpacked(self) -> Any:
        return self.backend.unpack_weight(self.arrays["weight"], format=self._layout, out_features=self.out_features)

    def _host(self, array: Any) -> Any:
        return array if self.backend is None or array is None else self.backend.to_host(array)

    def _apply(self, op: str, arrays: dict[str, Any], x: Any, bias: Any, out: Any, **options: Any) -> Any:
        if self.format.group_size is not None:
            options["group_size"] = self.format.group_size
        return getattr(self.backend, op)(x, **arrays, bias=bias, **options, out=out)


def _round(weight: np.ndarray, format: WeightFormat) -> dict[str, np.ndarray]:
    """The arrays of ``format``, rounded to nearest; a tile of rows at a time, so that little is in flight."""
    if format.is_float:
        return {"weight": _as_float(weight, format.name)}
    step = max(1, TILE_WEIGHTS // max(1, weight.shape[1]))
    starts = range(0, max(1, len(weight)), step)
    tiles = [_round_rows(weight[start : start + step].astype(np.float32), format) for start in starts]
    return {name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}


def _round_rows(weight: np.ndarray, format: WeightFormat) -> dict[str, np.ndarray]:
    if format.op == "sparse_linear":
        mask = pruning.mask_24(pruning.magnitude_score(weight))
        values, indices = pruning.compress_24(np.where(mask, weight, np.float32(0)))
        return {"values": values, "indices": indices}
    if format.op == "linear_int4":
        group_size = format.group_size or weight.shape[1]
        codes, scale, minimum = rounding.round_int4(weight, group_size=group_size, with_min=format.with_min)
        arrays = {"weight": rounding.pack_int4(codes, group_size=group_size), "weight_scale": scale}
        return arrays if minimum is None else arrays | {"weight_min": minimum}
    if format.op in ("linear_fp8", "linear_fp8_fp8"):
        codes, scale = rounding.round_fp8(weight)
    else:
        codes, scale = rounding.round_int8(weight, group_size=format.group_size)
    return {"weight": codes, "weight_scale": scale}


def _as_float(weight: np.ndarray, name: str) -> np.ndarray:
    """What `numerics.cast` gives, by the dtype's own conversion: a checkpoint is large, and that is faster."""
    if name == "float16":
        weight = np.clip(weight, -65504, 65504)  # saturate, as `cast` does
    return weight.astype(dtype_named(name), copy=False)
