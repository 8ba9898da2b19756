"""The table that a person reads: one line for each row, the figures to reach at its end."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from twofold.bench.kernels import Ceilings, Measured


def table(rows: Iterable[Measured], ceilings: Ceilings, console: Console) -> None:
    """Print the rows of one op."""
    rows = list(rows)
    drawn = Table(title=rows[0].row.op, title_justify="left")
    drawn.add_column("deck")
    for column in ("µs", "TB/s", "of copy", "TFLOP/s", "of matmul"):
        drawn.add_column(column, justify="right")
    drawn.add_column("peers, µs")
    drawn.add_column("to reach")
    for row in rows:
        drawn.add_row(*_cells(row, ceilings))
    console.print(drawn)


def _cells(measured: Measured, ceilings: Ceilings) -> list[str]:
    figures = measured.as_json(ceilings)
    names = ("us", "TB/s", "of_copy", "TFLOP/s", "of_matmul")
    shown = [_short(figures.get(name)) for name in names]
    peers = [f"{name} {_short(us)}" for name, us in figures["peers_us"].items()]
    failed = [f"[red]{name}: {why}[/red]" for name, why in measured.failures.items()]
    return [measured.row.deck, *shown, "\n".join(peers + failed), "\n".join(_verdicts(measured, ceilings))]


def _verdicts(measured: Measured, ceilings: Ceilings) -> Iterable[str]:
    for target in measured.row.targets:
        reached = measured.reached(target, ceilings)
        if reached is None:
            yield f"[dim]{target.says}: not measured[/dim]"
            continue
        good = reached >= target.at_least
        best = target.reach_for is not None and reached >= target.reach_for
        colour = "bold green" if best else "green" if good else "yellow"
        yield f"[{colour}]{reached:.2f} of {target.says}[/{colour}]"


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
