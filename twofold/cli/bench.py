"""`twofold bench`: measurements, side by side with what people would use otherwise."""

import sys
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


@app.command()
def kernels(
    backend: Annotated[
        str, typer.Option(help="fast, plain_torch, or an importable module with some of the ops.", metavar="NAME")
    ] = "fast",
    only: Annotated[
        list[str] | None, typer.Option(help="An op, or attention, linear, fusion or sampling; again for more.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Fewer decks and replays.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(help="Where the JSON goes; by default benchmarks/results/kernels-DEVICE.json.", metavar="FILE"),
    ] = None,
) -> int:
    """Every kernel beside the best there is, on a GPU, in one run."""
    from itertools import groupby

    from rich.console import Console

    from twofold.bench.kernels import geometric_means, run
    from twofold.bench.kernels.show import table
    from twofold.bench.report import gpu_name, save

    console = Console(width=None if sys.stdout.isatty() else 200)
    command = " ".join(
        ["twofold bench kernels", f"--backend {backend}", *(f"--only {op}" for op in only or ())] + ["--quick"] * quick
    )
    device = gpu_name()
    results = results or Path(f"benchmarks/results/kernels-{device.lower().replace(' ', '-')}.json")
    ceilings, rows = run(backend, only=only or (), quick=quick)
    console.print(f"{device}: copies {ceilings.copy / 1e12:.3f} TB/s, multiplies {ceilings.matmul / 1e12:.0f} TFLOP/s")
    measured = []
    for _, of_one_op in groupby(rows, key=lambda found: found.row.op):
        found = list(of_one_op)
        measured += found
        table(found, ceilings, console)
        figures = {
            "ceilings": {"copy_TB/s": ceilings.copy / 1e12, "matmul_TFLOP/s": ceilings.matmul / 1e12},
            "geometric_means": geometric_means(measured, ceilings),
            "rows": [row.as_json(ceilings) for row in measured],
        }
        save(results, command, figures, device=device)  # what is measured is kept, whatever comes
    for name, mean in geometric_means(measured, ceilings).items():
        console.print(f"geometric mean of {name}: {mean:.2f}")
    return 0


@app.command()
def memory(
    seed: Annotated[int, typer.Option(help="Of lengths and arrivals.", metavar="N", min=0)] = 0,
    quick: Annotated[bool, typer.Option(help="In a minute: fewer requests, so more noise, and fewer sizes.")] = False,
    slots: Annotated[
        int | None, typer.Option(help="Tokens of the cache, instead of the published 15,728.", metavar="N", min=1)
    ] = None,
    forks_from: Annotated[
        str | None,
        typer.Option(help="Record anew where this model's beams fork (minutes); see --model.", metavar="MODEL"),
    ] = None,
    results: Results = Path("benchmarks/results/memory.json"),
    plots: Annotated[Path | None, typer.Option(help="Draw plots into this folder.", metavar="FOLDER")] = None,
) -> int:
    """The published figures of paging and sharing, reproduced by simulation. An interrupted run goes on from there."""
    from rich.console import Console

    from twofold.bench.memory import Sweep
    from twofold.bench.memory.forks import load_forks, record_forks
    from twofold.bench.memory.show import tables
    from twofold.bench.report import save, table
    from twofold.cli.show import counting
    from twofold.llm import LLM

    asked = {"--seed": seed, "--slots": slots, "--forks-from": forks_from}
    parts = [f"{name} {value}" for name, value in asked.items() if value is not None] + ["--quick"] * quick
    console = Console(stderr=True)
    forks = load_forks() if forks_from is None else record_forks(LLM(forks_from), console.print)
    sweep = Sweep(results, forks, seed=seed, quick=quick, num_slots=slots)
    if sweep.done:
        console.print(f"{len(sweep.done)} simulations of an interrupted run are kept")
    with counting("simulations") as count:
        found = sweep.run(lambda case, total: count(case.name, total))
    save(results, f"twofold bench memory {' '.join(parts)}", found)
    for title, columns, rows, notes in tables(found):
        table(title, columns, rows)
        for note in notes:
            Console().print(note)
    if plots is not None:
        from twofold.bench.memory.plots import draw

        draw(found, plots)
    return 0
