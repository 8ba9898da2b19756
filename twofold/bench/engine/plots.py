"""The results as plots: how fast many sequences decode, and what a step is made of."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reference.model.config import ModelConfig
from twofold import plot_style
from twofold.bench.engine import LATENCY
from twofold.bench.limits import BANDWIDTH, Limits
from twofold.checkpoints.shapes import SHAPES

STEP = re.compile(r"bfloat16: (\d+) x (\d+), step")
SMALLEST = 0.01  # share of a step: kernels that add less are drawn together
BAR = 0.62

Bars = list[tuple[str, float, str]]
"""What, how many microseconds, and in which color."""


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot that has something to show, as SVG; returns the files."""
    paths = []
    steps = {model: _steps(figures) for model, figures in results["figures"].items()}
    steps = {model: found for model, found in steps.items() if found}
    if steps:
        paths.append(folder / "engine-batches.svg")
        plot_style.save(_batches(steps), paths[-1])
    for model, found in steps.items():
        for (num_seqs, prompt), figure in found.items():
            profile = results["profiles"].get(f"{model}, bfloat16: {num_seqs} x {prompt}")
            if profile is not None:
                paths.append(folder / f"engine-{short(model)}-{num_seqs}.svg")
                title = f"{model.rpartition('/')[2]}, {num_seqs} x {prompt}"
                plot_style.save(_waterfall(bars(model, figure, profile), title), paths[-1])
    return paths


def short(model: str) -> str:
    """A model's name in a file's.

    Example:
        >>> short("Qwen/Qwen3-0.6B")
        'qwen3'
    """
    return model.rpartition("/")[2].partition("-")[0].lower()


def _steps(figures: Mapping[str, Any]) -> dict[tuple[int, int], Any]:
    """The steps that were measured in bfloat16, by sequences and prompt."""
    found = {STEP.fullmatch(name): figure for name, figure in figures.items()}
    return {(int(match[1]), int(match[2])): figure for match, figure in found.items() if match}


def _batches(steps: Mapping[str, Any]) -> Any:
    """Tokens a second over sequences, below the limit."""
    drawn, panels = plot_style.figure(9, 3.6, columns=len(steps), squeeze=False)
    for axes, (model, found) in zip(panels[0], steps.items(), strict=True):
        places = [num_seqs for num_seqs, _ in found]
        many = np.unique(np.geomspace(1, max(places), 40).round()).astype(int)
        limits, (_, prompt, tokens) = Limits(ModelConfig.from_hf(SHAPES[model])), LATENCY[-1]
        least = [limits.step([prompt + tokens / 2] * n) for n in many]
        axes.plot(many, many / least, "--", color="#888888", label="limit")
        for key, style, label in (("value", "o-", "measured"), ("vllm", "s", "vLLM 0.24")):
            of = {n: n / figure[key] * 1e3 for n, figure in zip(places, found.values()) if key in figure}
            axes.plot(list(of), list(of.values()), style, label=label)
        axes.set(xscale="log", yscale="log", xlabel="sequences", title=model.rpartition("/")[2])
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
    panels[0][0].set_ylabel("tokens a second")
    panels[0][0].legend(frameon=False)
    return drawn


def bars(model: str, figure: Mapping[str, float], profile: Mapping[str, Any]) -> Bars:
    """From the bytes of a step to its time. Products and attention come after the bytes that they have to read, with
    what they add beyond; then what else runs; then idle moments, and how far the profile is from the measured step."""
    limit, kernels = figure["limit"] * 1e3, profile["kernels"]
    weights = min(limit, Limits(ModelConfig.from_hf(SHAPES[model])).weight_bytes / BANDWIDTH * 1e6)
    rooms = {"linear": weights, "attention": limit - weights}
    bound, beyond, other = (plot_style.COLORS[i] for i in (0, 1, 3))
    found: Bars = [("bytes of the weights", weights, bound), ("bytes of keys and values", limit - weights, bound)]
    for room, least in rooms.items():
        adds = sum(kernel["adds_us"] for kernel in kernels.values() if kernel["room"] == room)
        found.append(({"linear": "products", "attention": "attention"}[room] + ", beyond these", adds - least, beyond))
    rest = {name: kernel["adds_us"] for name, kernel in kernels.items() if kernel["room"] not in rooms}
    large = {name: adds for name, adds in rest.items() if adds >= SMALLEST * profile["span_us"]}
    found += [(name.strip("_").removesuffix("_kernel")[:30], adds, beyond) for name, adds in large.items()]
    found.append(("other kernels", sum(rest.values()) - sum(large.values()), beyond))
    found.append(("idle", profile["idle_us"], other))
    return [*found, ("not in the profile", figure["value"] * 1e3 - profile["span_us"], other)]


def _waterfall(parts: Bars, title: str) -> Any:
    """Each part begins where the one before ends; the last bar is the step."""
    names = [*(name for name, _, _ in parts), "a step"]
    drawn, axes = plot_style.figure(8, 1.2 + 0.3 * len(names))
    reached = 0.0
    total = sum(size for _, size, _ in parts)
    for place, (_, size, color) in enumerate([*parts, ("", total, plot_style.COLORS[2])]):
        start = reached if place < len(parts) else 0.0
        axes.barh(place, size, left=start, height=BAR, color=color)
        reached = start + size
        right = max(start, reached), place
        axes.annotate(f"{size:,.0f}", right, xytext=(4, -3), textcoords="offset points", fontsize=8)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="microseconds of a step", title=title)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    return drawn
