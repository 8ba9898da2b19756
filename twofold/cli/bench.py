"""`twofold bench`: measurements, side by side with what people would use otherwise."""

from pathlib import Path
from typing import Annotated

import typer

from twofold.cli import options

app = typer.Typer(help="Measure, side by side with the best alternatives.", rich_markup_mode=None)

Results = Annotated[Path, typer.Option(help="Where the JSON goes.", metavar="FILE")]


@app.callback()
def bench() -> None:
    """Measure, side by side with the best alternatives."""


@app.command()
def cpu(
    model: options.Model = None,
    rounds: Annotated[int, typer.Option(help="Of each comparison.", metavar="N", min=1)] = 5,
    results: Results = Path("benchmarks/results/cpu.json"),
) -> int:
    """The NumPy engine beside `transformers` on this CPU, in float32 on the same threads."""
    from twofold.bench.cpu import run
    from twofold.bench.report import save, table

    found: dict[str, dict[str, float]] = {}
    for name, figures in run(model, rounds=rounds):
        found[name] = figures
        table(name, ("figure", "value"), list(figures.items()))
        save(results, f"twofold bench cpu --rounds {rounds}", found)  # what is measured is kept, whatever comes
    return 0
