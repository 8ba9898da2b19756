"""`twofold bench`: measurements, side by side with what people would use otherwise."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofold.cli import options

if TYPE_CHECKING:
    from twofold.bench.engine import Figure

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
def lossless(
    model: options.Model = None,
    quick: Annotated[bool, typer.Option(help="One KV format, short answers, a matrix of each kind.")] = False,
    results: Results = Path("benchmarks/results/lossless.json"),
) -> int:
    """What lossless coding makes of swapped KV blocks and of real weights."""
    from twofold.bench.lossless import run
    from twofold.bench.report import save, table

    found: dict[str, dict[str, float]] = {}
    for name, figures in run(model, quick=quick):
        found[name] = figures
        save(results, "twofold bench lossless" + " --quick" * quick, found)  # what is measured is kept, whatever comes
    columns = ("blocks", "bytes", "coded_bytes", "ratio")
    table(
        "Lossless coding", ("of", *columns), [(name, *(row.get(c, "") for c in columns)) for name, row in found.items()]
    )
    return 0


@app.command()
def planner(model: options.Model = None, results: Results = Path("benchmarks/results/planner.json")) -> int:
    """The memory of a step's activations: in an arena, at the least, and with none sharing any."""
    from twofold.bench.planner import run
    from twofold.bench.report import save, table

    found = dict(run(model))
    save(results, "twofold bench planner", found)
    columns = {"total_bytes": "together", "bound_bytes": "bound", "arena_bytes": "arena", "of_total": "of all"}
    rows = [(step, *(figures[column] for column in columns)) for step, figures in found.items()]
    table("Activations of a step, in bytes", ("step", *columns.values()), rows)
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
        start = len(measured)
        for found in of_one_op:
            measured.append(found)
            figures = {
                "ceilings": {"copy_TB/s": ceilings.copy / 1e12, "matmul_TFLOP/s": ceilings.matmul / 1e12},
                "geometric_means": geometric_means(measured, ceilings),
                "rows": [row.as_json(ceilings) for row in measured],
            }
            save(results, command, figures, device=device)  # what is measured is kept, whatever comes
        table(measured[start:], ceilings, console)
    for name, mean in geometric_means(measured, ceilings).items():
        console.print(f"geometric mean of {name}: {mean:.2f}")
    return 0


@app.command()
def engine(
    only: Annotated[
        list[str] | None, typer.Option(help="A word of a deck's model or name; again to narrow it down.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Fewer tokens, requests and rounds.")] = False,
    profile: Annotated[bool, typer.Option(help="Also decoding steps kernel by kernel.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(help="Where the JSON goes; by default benchmarks/results/engine-DEVICE.json.", metavar="FILE"),
    ] = None,
) -> int:
    """Whole runs of the engine on a GPU, with random weights of well-known shapes, beside what is possible."""
    from rich.console import Console

    from twofold import __version__
    from twofold.bench.engine import SEED, VLLM_SOURCE, Figure, chosen, run
    from twofold.bench.report import gpu_name, save

    decks = chosen(only or (), quick=quick)
    device = gpu_name()
    results = results or Path(f"benchmarks/results/engine-{device.lower().replace(' ', '-')}.json")
    command = " ".join(
        ["twofold bench engine", *(f"--only '{word}'" for word in only or ())]
        + ["--quick"] * quick
        + ["--profile"] * profile
    )
    figures: dict[str, dict[str, Any]] = {}
    profiles: dict[str, Any] = {}
    console = Console(width=None if sys.stdout.isatty() else 200)
    for found in run(decks, rounds=1 if quick else 3, profiled=profile):
        if isinstance(found, Figure):
            figures.setdefault(found.model, {})[found.name] = found.as_json()
            console.print(_line(found))
        else:
            name, profiles[name] = found
            console.print(f"{name}: {profiles[name]['span_us']:.0f} us a step, busy {profiles[name]['busy']:.1%}")
        about = {"seed": SEED, "interface": __version__, "vllm": VLLM_SOURCE}
        save(results, command, {**about, "figures": figures, "profiles": profiles}, device=device)
    return 0


def _line(figure: "Figure") -> str:
    """What was measured, and beside it what it is to be judged by."""
    line = f"{figure.model}, {figure.name}: {figure.value:,.2f} {figure.unit}"
    if figure.limit is not None and figure.of_limit is not None:
        line += f", limit {figure.limit:,.2f} ({figure.of_limit:.0%} of it)"
    if figure.target is not None:
        wanted = f", at least {figure.target.at_least:,g}"
        wanted += "" if figure.target.reach_for is None else f", reach for {figure.target.reach_for:,g}"
        line += wanted + ("" if figure.target.vllm is None else f", vLLM {figure.target.vllm:,g}")
    return line


@app.command()
def memory(
    seed: Annotated[int, typer.Option(help="Of lengths and arrivals.", metavar="N", min=0)] = 0,
    quick: Annotated[bool, typer.Option(help="In a minute: fewer requests, so more noise, and fewer sizes.")] = False,
    slots: Annotated[
        int | None, typer.Option(help="Tokens of the cache, instead of the published 15,728.", metavar="N", min=1)
    ] = None,
    forks_from: Annotated[
        str | None,
        typer.Option(
            help="Record anew where this model's beams fork (minutes): a folder, a .gguf file, or a hub name.",
            metavar="MODEL",
        ),
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
