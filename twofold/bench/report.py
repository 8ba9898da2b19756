"""Benchmark results: what was run, on what, when; as JSON and as a table."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError

PACKAGES = ("twofold", "numpy", "torch", "triton", "transformers", "flashinfer-python")


def provenance(command: str, device: str | None = None) -> dict[str, Any]:
    """Command, date, device (by default this CPU) and versions: without them a figure means nothing."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "date": date.today().isoformat(),
        "device": device or f"{_cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpu_name() -> str:
    """Of the current GPU.

    Raises:
        TwofoldError: If there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise TwofoldError("this needs a GPU, and torch finds none")
    return torch.cuda.get_device_name()


def save(path: Path, command: str, results: Mapping[str, Any], *, device: str | None = None) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**provenance(command, device), "results": results}, indent=1) + "\n")
    unfinished.replace(path)


def figures_of_earlier_runs(path: Path, device: str) -> dict[str, dict[str, Any]]:
    """What a results file has of this device, by model and name, each with the ``run`` that it is from."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if kept["device"] != device:
        return {}
    run = {name: kept[name] for name in ("command", "date")}
    models = kept["results"]["figures"].items()
    return {model: {name: {"run": run} | figure for name, figure in figures.items()} for model, figures in models}


class Unfinished:
    """What a sweep has done so far, kept beside where its results will go, so that one that is interrupted can go on.

    Args:
        results: Where the results will go.
        settings: What the figures depend on: what was kept with others is not looked at.

    Attributes:
        done: Figures by name.
    """

    def __init__(self, results: Path, settings: Mapping[str, Any]):
        self.path = results.with_suffix(".sweep.json")
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[str, Any] = {}
        try:
            kept = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return
        if isinstance(kept, dict) and kept.get("settings") == self.settings:
            self.done = kept["done"]

    def keep(self, name: str, figures: Any) -> None:
        """Add what was found, on the disk too."""
        self.done[name] = figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".new")
        whole.write_text(json.dumps({"settings": self.settings, "done": self.done}))
        whole.replace(self.path)

    def remove(self) -> None:
        """All is done."""
        self.path.unlink(missing_ok=True)


Table = tuple[str, tuple[str, ...], list[tuple[str, ...]], list[str]]
"""Title, columns, rows, and notes below them."""


def markdown(table: Table) -> str:
    """A table of the documentation."""
    _, columns, rows, notes = table
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "".join(f"\n\n{note}" for note in notes)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = ()) -> None:
    """Print a table, and below it what there is to say of it."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        drawn.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(drawn)
    for note in notes:
        Console().print(note)
