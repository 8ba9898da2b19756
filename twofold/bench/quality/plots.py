"""The results as plots: what is lost, over what is kept."""

from pathlib import Path
from typing import Any

from twofold import plot_style

LEAST = 1e-3  # percent: what is less, or better than the baseline by chance, is drawn here


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot that has something to show, as SVG; returns the files."""
    paths = []
    for kind, size in (("weights", "bytes_per_weight"), ("cache", "bytes_per_token")):
        cases = [case for case in results["cases"] if case["kind"] == kind and not case["lossless"]]
        if cases:
            paths.append(folder / f"quality-{kind}.svg")
            plot_style.save(_damage(cases, size), paths[-1])
    pruned = [case for case in results["cases"] if case["kind"] == "pruning"]
    if pruned:
        paths.append(folder / "quality-pruning.svg")
        plot_style.save(_pruning(pruned), paths[-1])
    return paths


def _damage(cases: list[dict[str, Any]], size: str) -> Any:
    """Change of perplexity, over bytes."""
    drawn, axes = plot_style.figure(7, 4)
    for case in cases:
        place = (case[size], max(LEAST, case["change"]))
        color = plot_style.COLORS["GPTQ" in case["name"] or "Smooth" in case["name"]]
        axes.plot(*place, "o", color=color)
        axes.annotate(case["name"], place, xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel=size.replace("_per_", " a ").replace("_", " "))
    axes.set_ylabel("perplexity, change in %")
    axes.margins(x=0.15)
    return drawn


def _pruning(cases: list[dict[str, Any]]) -> Any:
    """Perplexity by what is left out, magnitude beside Wanda."""
    drawn, axes = plot_style.figure(7, 3.4)
    shares = list(dict.fromkeys(case["name"].partition(",")[0] for case in cases))
    for place, method in enumerate(("magnitude", "Wanda")):
        of_method = {c["name"].partition(",")[0]: c["perplexity"] for c in cases if c["name"].endswith(method)}
        heights = [of_method.get(share, 0) for share in shares]
        axes.bar([i + 0.4 * place - 0.2 for i in range(len(shares))], heights, width=0.38, label=method)
    axes.set(xticks=range(len(shares)), xticklabels=shares, yscale="log", ylabel="perplexity")
    axes.legend(frameon=False)
    return drawn
