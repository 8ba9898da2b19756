"""`twofold bench kernels`: every kernel beside the best there is, in one run, so that ratios hold.

A figure is the median over replays of a CUDA graph whose calls rotate through buffers that no cache holds. Bytes and
operations are counted, not measured: what the op must read and write as stored, and multiply. The shares are of this
machine's own copy and matmul. A call that fails says so in its row, and the others go on.
"""

import gc
import math
import re
import statistics
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from reference.model.overlay import overlay
from twofold.backends import resolve_backend
from twofold.bench.kernels import attention, fusion, linear, sampling, timing
from twofold.bench.kernels.peers import Missing
from twofold.bench.kernels.rows import Arrays, Contender, Row, Target
from twofold.errors import TwofoldError

TOPICS = {"attention": attention, "linear": linear, "fusion": fusion, "sampling": sampling}
REPLAYS, QUICK_REPLAYS = 20, 5


@dataclass
class Ceilings:
    """What this machine reaches at best: bytes a second copied, operations a second multiplied."""

    copy: float
    matmul: float


@dataclass
class Measured:
    """One row's figures. Seconds by contender; for one that failed, why."""

    row: Row
    seconds: float | None = None
    num_bytes: int = 0
    peers: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def reached(self, target: Target, ceilings: Ceilings) -> float | None:
        """The figure that the target is about; None if it could not be measured."""
        seconds = self.peers.get(target.of) if target.of else self.seconds
        if seconds is None:
            return None
        if target.over == ("copy",):
            return self.num_bytes / seconds / ceilings.copy
        rivals = [self.peers[name] for name in target.over if name in self.peers]
        return min(rivals) / seconds if rivals else None

    def as_json(self, ceilings: Ceilings) -> dict[str, Any]:
        found: dict[str, Any] = {"op": self.row.op, "deck": self.row.deck, "bytes": self.num_bytes}
        found |= {"operations": self.row.flops} if self.row.flops else {}
        if self.seconds is not None:
            bandwidth, rate = self.num_bytes / self.seconds, self.row.flops / self.seconds
            found |= {"us": self.seconds * 1e6, "TB/s": bandwidth / 1e12, "of_copy": bandwidth / ceilings.copy}
            found |= {"TFLOP/s": rate / 1e12, "of_matmul": rate / ceilings.matmul} if self.row.flops else {}
        found["peers_us"] = {name: seconds * 1e6 for name, seconds in self.peers.items()}
        found["failures"] = self.failures
        found["targets"] = [
            {
                "of": target.of,
                "over": list(target.over),
                "at_least": target.at_least,
                "reach_for": target.reach_for,
                "reached": self.reached(target, ceilings),
            }
            for target in self.row.targets
        ]
        return found


def run(
    backend: str = "fast", *, only: Collection[str] = (), quick: bool = False
) -> tuple[Ceilings, Iterator[Measured]]:
    """The machine's ceilings, and the rows as they are measured.

    Args:
        backend: Whose ops: "fast", or a module; of a module with some of the ops, the rows of those, and `fast` beside.
        only: Ops or topics to measure; none: all.
        quick: Fewer decks and replays.

    Raises:
        TwofoldError: Without a GPU, or if ``only`` leaves nothing.
    """
    if not torch.cuda.is_available():
        raise TwofoldError("bench kernels: needs a GPU, and torch finds none")
    module, brings = _backend(backend)
    rows = [row for row in _rows(only) if (not quick or row.quick) and (brings is None or row.op in brings)]
    if not rows:
        raise TwofoldError(
            f"bench kernels: nothing to measure; ops are {', '.join(sorted({row.op for row in _rows(())}))}"
        )
    replays = QUICK_REPLAYS if quick else REPLAYS
    ceilings = Ceilings(timing.copy_bandwidth(replays), timing.matmul_rate(replays))
    _release()
    return ceilings, (_measure(row, module, backend, replays) for row in rows)


def _rows(only: Collection[str]) -> list[Row]:
    """Those asked for, an op's together."""
    by_op: dict[str, list[Row]] = {}
    for topic, decks in TOPICS.items():
        for row in decks.rows():
            if not only or topic in only or row.op in only:
                by_op.setdefault(row.op, []).append(row)
    return [row for rows in by_op.values() for row in rows]


def _backend(name: str) -> tuple[Any, set[str] | None]:
    """The backend, and which ops it brings of its own (None: all)."""
    import fast

    if name in ("fast", "plain_torch"):
        return resolve_backend(name), None
    found = resolve_backend(name)
    own = {op for op, origin in getattr(found, "origin", {}).items() if origin != "reference"}
    return overlay_of(found, own, fast), own


def overlay_of(found: Any, own: set[str], base: Any) -> Any:
    """The ops that a stranger's module brings, over those of ``base``."""
    from types import SimpleNamespace

    return overlay(SimpleNamespace(__name__="theirs", **{op: getattr(found, op) for op in own}), base)


def _measure(row: Row, backend: Any, name: str, replays: int) -> Measured:
    found = Measured(row)
    try:
        with torch.device("cuda"):
            sets = [row.build()]
            found.num_bytes = row.num_bytes(sets[0])
            sets += [row.build() for _ in range(timing.num_sets(found.num_bytes) - 1)]
    except Exception as error:  # out of memory, say
        found.failures["buffers"] = _why(error)
        return found
    contenders: dict[str, Contender] = {name: row.ours}
    if name != "fast":
        import fast

        contenders["fast"] = lambda _, arrays: row.ours(fast, arrays)
    for who, contender in (contenders | dict(row.peers)).items():
        try:
            seconds = _time(contender, backend, sets, replays)
        except Exception as error:  # whatever a peer does, the table goes on
            found.failures[who] = _why(error)
            continue
        finally:
            torch.cuda.empty_cache()
        if who == name:
            found.seconds = seconds
        else:
            found.peers[who] = seconds
    del sets
    _release()
    return found


def _time(contender: Contender, backend: Any, sets: list[Arrays], replays: int) -> float:
    with torch.device("cuda"):
        calls = [contender(backend, arrays) for arrays in sets]
    return timing.seconds(calls * math.ceil(4 / len(calls)), replays)


FOLDERS = re.compile(r"(?<![\w.])(/[^\s/:'\"]+)+/")


def _why(error: Exception) -> str:
    """The first line; of a path only the name: whose folder it is in says nothing."""
    first = FOLDERS.sub("", str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return first if isinstance(error, Missing) else f"{type(error).__name__}: {first}"


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def geometric_means(measured: list[Measured], ceilings: Ceilings) -> dict[str, float]:
    """Of every target that several rows of an op share, over those rows."""
    figures: dict[tuple[str, str], list[float]] = {}
    for row in measured:
        for target in row.row.targets:
            reached = row.reached(target, ceilings)
            if reached:
                by = f" by {target.of}" if target.of else ""
                figures.setdefault((row.row.op, " / ".join(target.over) + by), []).append(reached)
    return {
        f"{op} over {over}": statistics.geometric_mean(values)
        for (op, over), values in figures.items()
        if len(values) > 1
    }
