"""The tables that a person reads, in a terminal and on the documentation's page: the figures to reach at the end."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from twofold.bench import report
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


# ---- the page -------------------------------------------------------------------------------------------------------


def prefill(results: dict[str, Any]) -> report.Table:
    """Packed attention."""
    return _page(results, "flash_attention")


def paged(results: dict[str, Any]) -> report.Table:
    """Chunks and decodes over a paged cache of floats."""
    return _page(results, "paged_attention")


def codes(results: dict[str, Any]) -> report.Table:
    """Decodes over quantized caches."""
    return _page(results, *(f"paged_attention_{format}" for format in ("int8", "fp8", "int4", "kivi")))


def linear(results: dict[str, Any]) -> report.Table:
    """Dense layers of a few tokens."""
    return _page(results, "linear")


def quantized(results: dict[str, Any]) -> report.Table:
    """Layers whose weights, or activations too, are stored in less than 16 bits; sparse ones; adapters."""
    ops = ("linear_int4", "linear_int8", "linear_int8_int8", "linear_fp8_fp8", "sparse_linear", "lora")
    return _page(results, *ops)


def others(results: dict[str, Any]) -> report.Table:
    """What moves bytes, and the draw."""
    ops = ("add_rms_norm", "rms_norm", "swiglu", "embedding", "rotary_write_kv", "copy_blocks", "sample")
    return _page(results, *ops)


def invariant(results: dict[str, Any]) -> report.Table:
    """The batch-invariant product."""
    return _page(results, "invariant.linear")


def _page(results: dict[str, Any], *ops: str) -> report.Table:
    rows = [row for row in results["rows"] if row["op"] in ops]
    columns = ("", "µs", "", "peers, µs", "reached", "at least")
    measured = results["measured"]
    note = f"{measured['device']}, {measured['date']}: `{measured['command']}`"
    named = len({row["op"] for row in rows}) > 1
    return ", ".join(ops), columns, [_line(row, f"`{row['op']}`, " if named else "") for row in rows], [note]


def _line(row: dict[str, Any], op: str) -> tuple[str, ...]:
    of_copy, of_matmul = row.get("of_copy") or 0.0, row.get("of_matmul") or 0.0
    if of_matmul > of_copy:
        speed = f"{row['TFLOP/s']:.0f} TFLOP/s, {of_matmul:.0%}"
    else:
        speed = f"{row['TB/s']:.2f} TB/s, {of_copy:.0%}"
    peers = " · ".join(f"{name} {_short(us)}" for name, us in row["peers_us"].items())
    targets = [target for target in row["targets"] if target["reached"] is not None]
    whose = ["" if target["of"] is None else f" ({target['of']})" for target in targets]
    reached = [f"{t['reached']:.2f} × {_best_of(t['over'])}{of}" for t, of in zip(targets, whose)]
    least = [f"{target['at_least']:g}" for target in targets]
    return op + row["deck"], _short(row["us"]), speed, peers, "<br>".join(reached), "<br>".join(least)


def _best_of(peers: list[str]) -> str:
    return peers[0] if len(peers) == 1 else f"the best of {', '.join(peers)}"
