"""What is judged: a format of the weights, weights left out, fewer KV heads or a format of the cache, one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from reference.kv_cache.formats import KV_FORMATS, resolve_format
from reference.linear.weight import weight_format
from twofold.bench.quality.one_side import Side
from twofold.errors import TwofoldError

Kind = Literal["weights", "pruning", "heads", "cache", "sides"]
Method = Literal["rounding", "GPTQ", "SmoothQuant", "magnitude", "Wanda"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Case:
    """One change to the baseline, which computes in float32 and keeps its cache so.

    Attributes:
        name: In tables and results; of its kind, as "int8" is a format of weights and of the cache.
        weights: Format of the layers' matrices; the embedding and the head stay as they are. "as-is": the whole
            checkpoint as it is stored.
        method: How the numbers of that format, or the weights to leave out, are found.
        sparsity: The share of each row's weights that is left out. (2:4 is a format, "sparse24".)
        num_kv_heads: After the heads were averaged in groups; None: as many as there are.
        cache: Format of the KV cache.
        kv_window: Of a KIVI format; None: its own.
        side: What alone is rounded as that format does, and then cached in full; None: the cache is of the format.
        lossless: Whether nothing can change, because the baseline's weights were rounded so before.
    """

    name: str
    kind: Kind
    weights: str = "float32"
    method: Method = "rounding"
    sparsity: float = 0.0
    num_kv_heads: int | None = None
    cache: str = "float32"
    kv_window: int | None = None
    side: Side | None = None
    lossless: bool = False

    @property
    def key(self) -> str:
        """Names it among all cases."""
        return f"{self.kind}, {self.name}"

    @property
    def needs_calibration(self) -> bool:
        return self.method in ("GPTQ", "SmoothQuant", "Wanda")


def all_cases(stored_as: frozenset[str], num_kv_heads: int) -> list[Case]:
    """Everything, for a checkpoint with matrices stored as ``stored_as`` ("F32", "Q4_1", ...)."""
    weights = [weights_case(name) for name in ("bfloat16", "int8", "q8_0", "w8a8")]
    weights.append(Case("w8a8, SmoothQuant", "weights", "w8a8", "SmoothQuant"))
    for group_size in (32, 64, 128):
        weights.append(weights_case(f"int4-{group_size}"))
        weights.append(Case(f"int4-{group_size}, GPTQ", "weights", f"int4-{group_size}", "GPTQ"))
    was_q4_1 = "Q4_1" in stored_as
    weights.append(Case("q4_1", "weights", "q4_1", lossless=was_q4_1))
    if stored_as & {"Q4_0", "Q4_1", "Q8_0"}:
        weights.append(Case("as stored", "weights", "as-is", lossless=True))
    pruning = [
        Case(f"{sparsity:.0%}, {method}", "pruning", method=method, sparsity=sparsity)
        for sparsity in (0.25, 0.5)
        for method in ("magnitude", "Wanda")
    ]
    pruning += [Case(f"2:4, {method}", "pruning", "sparse24", method) for method in ("magnitude", "Wanda")]
    heads = [
        Case(f"{num_kv_heads} to {count} KV heads", "heads", num_kv_heads=count)
        for count in (num_kv_heads // 2, 1)
        if 1 <= count < num_kv_heads and num_kv_heads % count == 0
    ]
    cache = [cache_case(name) for name in ("bfloat16", "int8", "fp8", "int4")]
    cache += [cache_case(name, window) for name in ("kivi4", "kivi2") for window in (0, 32, 128)]
    sides = [Case(f"{name}, {side}", "sides", cache=name, side=side) for name in ("int4", "kivi2") for side in SIDES]
    return weights + pruning + list(dict.fromkeys(heads)) + cache + sides


def named_cases(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Those of a kind or with a name among ``names``.

    Raises:
        TwofoldError: If there is none for one of them.
    """
    for name in names:
        if not any(name in (case.kind, case.name) for case in cases):
            known = ", ".join(f"'{case.name}'" for case in cases)
            raise TwofoldError(f"--only {name}: expected weights, pruning, heads, cache, sides, or one of {known}")
    return [case for case in cases if case.kind in names or case.name in names]


def quick_cases(cases: Sequence[Case]) -> list[Case]:
    """Those that show the most for their time: fitting a model's weights takes longer than reading a short text."""
    weights = ("int8", "int4-32", "int4-128")
    cache = ("int8", "fp8", "int4", "kivi4, window 0", "kivi2, window 0", "kivi2, window 128")
    chosen = (
        {f"weights, {name}" for name in weights} | {f"cache, {name}" for name in cache} | {"pruning, 2:4, magnitude"}
    )
    return [case for case in cases if case.key in chosen]


def weights_case(name: str) -> Case:
    """Weights rounded to nearest. Raises ValueError for a format that is unknown, or a group that does not fit."""
    weight_format(name)
    return Case(name, "weights", name)


def cache_case(name: str, window: int | None = None) -> Case:
    """A cache in that format. Raises ValueError for one that is unknown, or a window of a format that has none."""
    format = resolve_format(name, "float32").with_window(window)
    full = name if KV_FORMATS[name].window is None else f"{name}, window {format.window}"
    return Case(full, "cache", cache=name, kv_window=format.window)
