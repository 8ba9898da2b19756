"""A linear layer's weight: the arrays of one format, and the ops that serve it. The mirror of `kv_cache/cache.py`."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class WeightFormat:
    name: str  # "float32", "bfloat16", "float16", "int8", "w8a8", "fp8", "fp8a8", "int4" (sym.), "q4_1" (with min), "sparse24"
    summary: str
    group_size: int | None = None


WEIGHT_FORMATS: dict[str, WeightFormat] = {}


@dataclass
class Weight:
    """``arrays`` by the names of the format's op arguments; ``bias`` or None."""

    format: WeightFormat
    out_features: int
    in_features: int
    arrays: dict[str, Any]
    bias: Any = None
    backend: ModuleType | Any = field(default=None, repr=False)

    @classmethod
    def from_float(cls, weight: Any, bias: Any = None, *, format: str, backend: Any, device: str | None = None) -> "Weight":
        """Round a host float matrix [out, in] to nearest in ``format`` and place it on the backend."""

    @property
    def nbytes(self) -> int: ...

    def linear(self, x: Any, *, out: Any = None) -> Any: ...

    def rms_norm_linear(self, x: Any, norm_weight: Any, *, eps: float, out: Any = None) -> Any:
        """The fused op for float weights, its parts for the others. So too the next two."""

    def linear_add(self, x: Any, residual: Any, *, out: Any = None) -> Any: ...

    def swiglu_linear_add(self, gate_up: Any, residual: Any, *, out: Any = None) -> Any: ...

    def rows(self, rows: Any) -> Any:
        """Rows as floats, for an embedding table kept in this format (tied weights)."""

    @staticmethod
    def concatenate(weights: "list[Weight]") -> "Weight":
        """Stack along out_features (q, k and v; gate and up). All of one format."""
