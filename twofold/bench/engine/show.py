"""The results as tables: for the documentation's page."""

from typing import Any

from twofold.bench.engine import LLAMA, QWEN
from twofold.bench.report import Table

COLUMNS = ("", "measured", "limit", "of the limit", "vLLM 0.24", "at least", "reach for")


def qwen(results: dict[str, Any]) -> Table:
    """Every figure of Qwen3-0.6B's shape."""
    return _table(results, QWEN)


def llama(results: dict[str, Any]) -> Table:
    """Every figure of Llama-3.1-8B's shape."""
    return _table(results, LLAMA)


def copying(results: dict[str, Any]) -> Table:
    """Speculation on the copying task."""
    [model] = results["figures"]
    return _table(results, model)


def _table(results: dict[str, Any], model: str) -> Table:
    figures = results["figures"].get(model, {})
    rows = [(name, *_cells(figure)) for name, figure in figures.items()]
    kept = [place for place in range(len(COLUMNS)) if place < 2 or any(row[place] for row in rows)]
    measured = results["measured"]
    runs = [figure.get("run", measured) for figure in figures.values()]
    notes = dict.fromkeys(f"{measured['device']}, {run['date']}: `{run['command']}`" for run in runs)
    return model, tuple(COLUMNS[i] for i in kept), [tuple(row[i] for i in kept) for row in rows], [*notes]


def _cells(figure: dict[str, Any]) -> tuple[str, ...]:
    """As many digits as say something."""
    numbers = {name: figure.get(name) for name in ("value", "limit", "vllm", "at_least", "reach_for")}
    shown = {name: "" if value is None else f"{value:,.{_digits(value)}f}" for name, value in numbers.items()}
    share = "" if figure.get("of_limit") is None else f"{figure['of_limit']:.0%}"
    value = f"{shown['value']} {figure['unit']}"
    return value, shown["limit"], share, shown["vllm"], shown["at_least"], shown["reach_for"]


def _digits(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
