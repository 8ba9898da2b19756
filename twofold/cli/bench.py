"""`twofold bench`: measurements, side by side with what people would use otherwise."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofold.cli import options

if TYPE_CHECKING:
    from twofold.bench.engine import Figure


def _asked(command: str, **options: Any) -> str:
    """A command as it would be typed, for its results. Of a path only the name: whose folder it is in says nothing."""
    words = ["twofold", "bench", command]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                path = Path(str(one))
                words += [flag, path.name if path.exists() else str(one)]
    return shlex.join(words)


def _of_device(study: str, device: str) -> Path:
    """Where the results of a study on a GPU go, if nobody says."""
    return Path(f"benchmarks/results/{study}-{device.lower().replace(' ', '-')}.json")


app = typer.Typer(help="Measure, side by side with the best alternatives.", rich_markup_mode=None)

CONTEXT, QUICK_CONTEXT = 2048, 256  # tokens of a window
NUM_PREDICTIONS = 16384

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
        save(results, _asked("lossless", model=model, quick=quick), found)  # what is measured is kept, whatever comes
    columns = ("blocks", "bytes", "coded_bytes", "ratio")
    table(
        "Lossless coding", ("of", *columns), [(name, *(row.get(c, "") for c in columns)) for name, row in found.items()]
    )
    return 0


@app.command()
def swap(
    results: Annotated[
        Path | None,
        typer.Option(help="Where the JSON goes; by default benchmarks/results/swap-DEVICE.json.", metavar="FILE"),
    ] = None,
) -> int:
    """Blocks to the host and back over the bus, as they are and losslessly coded, on a GPU."""
    from twofold.bench.report import gpu_name, save, table

    device = gpu_name()
    from twofold.bench.swap import run

    found = {f"{count} blocks": figures for count, figures in run()}
    save(results or _of_device("swap", device), _asked("swap"), found, device=device)
    columns = ("bytes", "coded_bytes", "plain_out_ms", "plain_back_ms", "coded_out_ms", "coded_back_ms", "times")
    table("Swapping", ("of", *columns), [(name, *(row[c] for c in columns)) for name, row in found.items()])
    return 0


@app.command()
def planner(model: options.Model = None, results: Results = Path("benchmarks/results/planner.json")) -> int:
    """The memory of a step's activations: in an arena, at the least, and with none sharing any."""
    from twofold.bench.planner import run
    from twofold.bench.report import save, table

    found = dict(run(model))
    save(results, _asked("planner", model=model), found)
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
    command = _asked("kernels", backend=backend, only=only, quick=quick)
    device = gpu_name()
    results = results or _of_device("kernels", device)
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
        list[str] | None, typer.Option(help="Words of a deck's model and name, as 'qwen int8'; again for another.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Fewer tokens, requests and rounds.")] = False,
    profile: Annotated[bool, typer.Option(help="Also decoding steps kernel by kernel.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Instead: this model copies a text, with drafts and without."
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Where the JSON goes; by default benchmarks/results/engine-DEVICE.json (or copying-...).",
            metavar="FILE",
        ),
    ] = None,
) -> int:
    """Whole runs of the engine on a GPU, with random weights of well-known shapes, beside what is possible."""
    from rich.console import Console

    from twofold import __version__
    from twofold.bench.engine import SEED, VLLM_SOURCE, Figure, chosen, copying, run
    from twofold.bench.report import figures_of_earlier_runs, gpu_name, save

    decks = chosen(only or (), quick=quick)
    device = gpu_name()
    results = results or _of_device("copying" if model else "engine", device)
    command = _asked("engine", only=only, quick=quick, profile=profile, model=model)
    measured = copying.run(model) if model else run(decks, rounds=1 if quick else 3, profiled=profile)
    figures = figures_of_earlier_runs(results, device) if only else {}  # of the decks that are not asked for
    profiles: dict[str, Any] = {}
    console = Console(width=None if sys.stdout.isatty() else 200)
    for found in measured:
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

    command = _asked("memory", seed=seed, slots=slots, forks_from=forks_from, quick=quick)
    console = Console(stderr=True)
    forks = load_forks() if forks_from is None else record_forks(LLM(forks_from), console.print)
    sweep = Sweep(results, forks, seed=seed, quick=quick, num_slots=slots)
    if sweep.done:
        console.print(f"{len(sweep.done)} simulations of an interrupted run are kept")
    with counting("simulations") as count:
        found = sweep.run(lambda case, total: count(case.name, total))
    save(results, command, found)
    sweep.unfinished.remove()
    for parts in tables(found):
        table(*parts)
    if plots is not None:
        from twofold.bench.memory.plots import draw

        draw(found, plots)
    return 0


@app.command()
def quality(
    model: options.Model = None,
    text: Annotated[
        Path | None, typer.Option(help="Read this, instead of the State of the Union addresses.", metavar="FILE")
    ] = None,
    backend: options.Backend = "reference",
    device: options.Device = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A row of the tables (`int4-64, GPTQ`), or weights, pruning, heads, cache or sides; again for more.",
            metavar="NAME",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="Only this format of the weights; again for more.", metavar="NAME")
    ] = None,
    kv_cache_dtype: Annotated[
        list[str] | None, typer.Option(help="Only this format of the KV cache; again for more.", metavar="NAME")
    ] = None,
    kv_window: options.KVWindow = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window, by default 2048.", metavar="N")] = None,
    tokens: Annotated[int | None, typer.Option(help="Predictions to judge by, by default 16384.", metavar="N")] = None,
    calibration: Annotated[
        int, typer.Option(help="Tokens for GPTQ, SmoothQuant and Wanda to see the model at work.", metavar="N", min=1)
    ] = 8192,
    against_transformers: Annotated[
        bool, typer.Option("--against-transformers", help="Also the baseline's perplexity by `transformers`.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the choice among the texts.", metavar="N", min=0)] = 0,
    quick: Annotated[bool, typer.Option(help="In a minute: few tokens, so more noise, and no calibration.")] = False,
    results: Results = Path("benchmarks/results/quality.json"),
    plots: Annotated[Path | None, typer.Option(help="Draw plots into this folder.", metavar="FOLDER")] = None,
) -> int:
    """What each format of weights and cache costs a real model. An interrupted run goes on from there."""
    from rich.console import Console

    from twofold.backends import resolve_backend
    from twofold.bench.quality import Sweep, matrix_types
    from twofold.bench.quality.cases import all_cases, cache_case, named_cases, quick_cases, weights_case
    from twofold.bench.quality.show import tables
    from twofold.bench.quality.text import draw_windows, fetch_addresses, read_text
    from twofold.bench.report import gpu_name, save, table
    from twofold.checkpoints import load_checkpoint
    from twofold.cli.show import counting, progress
    from twofold.errors import TwofoldError

    command = _asked(
        "quality", model=model, text=text, backend=backend, only=only, weights=weights, kv_cache_dtype=kv_cache_dtype,
        kv_window=kv_window, context=context, tokens=tokens, calibration=calibration, seed=seed, quick=quick,
        against_transformers=against_transformers,
    )  # fmt: skip
    chosen = [weights_case(name) for name in weights or ()]
    chosen += [cache_case(name, kv_window) for name in kv_cache_dtype or ()]
    if kv_window is not None and not kv_cache_dtype:
        raise TwofoldError("--kv-window is of a cache: say which with --kv-cache-dtype kivi2 or kivi4")
    context = (QUICK_CONTEXT if quick else CONTEXT) if context is None else context
    tokens = (context if quick else NUM_PREDICTIONS) if tokens is None else tokens
    if context < 1 or tokens < 1:
        raise TwofoldError(f"--context {context}, --tokens {tokens}: both must be at least 1")
    ops = resolve_backend(backend)
    with progress() as on_progress:
        checkpoint = load_checkpoint(model, on_progress=on_progress)
        texts = read_text(text) if text is not None else fetch_addresses(on_progress)
    longest = checkpoint.config.max_position_embeddings
    if context > longest:
        raise TwofoldError(f"--context {context}: the model was made for {longest} tokens at most")
    cases = all_cases(matrix_types(checkpoint), checkpoint.config.num_kv_heads)
    if chosen or only:
        cases = [*chosen, *named_cases(cases, only or ())]
    elif quick:
        cases = quick_cases(cases)
    calibrating = any(case.needs_calibration for case in cases)
    windows = draw_windows(
        texts,
        checkpoint.require_tokenizer().encode,
        context=context,
        num_windows=-(-tokens // context),
        num_calibration=-(-calibration // context) if calibrating else 0,
        seed=seed,
    )
    named = "the State of the Union addresses" if text is None else text.name
    sweep = Sweep(results, checkpoint, windows, cases, backend=ops, device=device, text=named, seed=seed)
    if sweep.done:
        Console(stderr=True).print(f"{len(sweep.done)} cases of an interrupted run are kept")
    with counting("windows") as count:
        found = sweep.run(count)
    if against_transformers:
        from twofold.bench.quality.peer import perplexity_of_transformers

        with counting("windows") as count:
            found["transformers"] = {"perplexity": perplexity_of_transformers(checkpoint, windows, count)}
    computed_on = None
    if backend == "fast":
        import torch

        computed_on = gpu_name() if torch.cuda.is_available() else None
    save(results, command, found, device=computed_on)
    sweep.unfinished.remove()
    if against_transformers:
        theirs, ours = found["transformers"]["perplexity"], found["baseline"]["perplexity"]
        Console().print(f"baseline: perplexity {ours:.5f}; transformers on the same text: {theirs:.5f}")
    for parts in tables(found):
        table(*parts)
    if plots is not None:
        from twofold.bench.quality.plots import draw

        draw(found, plots)
    return 0
