"""The results as plots."""

from pathlib import Path
from typing import Any

from twofold import plot_style
from twofold.bench.memory.cases import STRATEGIES

STATES = {"tokens": "tokens", "reserved": "a token later", "internal": "never a token", "external": "nobody's"}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot, as SVG; returns the files."""
    plots = {"memory-slots": slots, "memory-batched": batched, "memory-sharing": sharing, "memory-blocks": block_sizes}
    paths = []
    for name, plot in plots.items():
        paths.append(folder / f"{name}.svg")
        plot_style.save(plot(results), paths[-1])
    return paths


def slots(results: dict[str, Any]) -> Any:
    """What the slots are used for."""
    drawn, axes = plot_style.figure(7, 3.2)
    names = [f"ShareGPT, {strategy}" for strategy in STRATEGIES]
    left = [0.0] * len(names)
    for state, label in STATES.items():
        shares = [100 * results["simulations"][name][state] for name in names]
        axes.barh(STRATEGIES, shares, left=left, label=label)
        left = [a + b for a, b in zip(left, shares)]
    for place, strategy in enumerate(STRATEGIES):
        published = next(r for r in results["claims"] if r["figure"] == f"slots holding tokens, {strategy}")
        axes.plot(published["published"] * 2, [place - 0.4, place + 0.4], color="black", lw=2)
    axes.invert_yaxis()
    axes.set(xlabel="slots of the cache, %; black: tokens as published", xlim=(0, 100))
    drawn.legend(loc="outside upper center", ncols=4, frameon=False)
    return drawn


def batched(results: dict[str, Any]) -> Any:
    """Batched requests: published, ours, and with the published time of a step."""
    drawn, axes = plot_style.figure(7, 3.2, columns=2)
    for axis, workload in zip(axes, ("ShareGPT 2 req/s", "Alpaca 30 req/s")):
        rows = [row for row in results["claims"] if row["figure"].startswith(f"batched requests, {workload}")]
        kinds = {
            "published": [row["published"][0] for row in rows],
            "ours": [row["ours"] for row in rows],
            "ours, their time of a step": [row.get("changed", row["ours"]) for row in rows],
        }
        for place, (label, values) in enumerate(kinds.items()):
            label = label if axis is axes[0] else None
            axis.bar([i + 0.27 * (place - 1) for i in range(len(rows))], values, width=0.25, label=label)
        axis.set(title=workload, xticks=range(len(rows)), xticklabels=STRATEGIES)
    axes[0].set_ylabel("batched requests")
    drawn.legend(loc="outside upper center", ncols=3, frameon=False)
    return drawn


def sharing(results: dict[str, Any]) -> Any:
    """Memory saved by sharing; where a range is published, it is a band."""
    drawn, axes = plot_style.figure(7, 3.2, columns=2, sharey=True)
    for axis, workload in zip(axes, ("Alpaca", "ShareGPT")):
        for color, way in zip(plot_style.COLORS, ("parallel", "beam")):
            start = f"saved by sharing, {workload}, {way}"
            rows = [row for row in results["claims"] if row["figure"].startswith(start)]
            counts = [int(row["figure"].rsplit(" ", 1)[1]) for row in rows]
            axis.plot(counts, [row["ours"] for row in rows], "o-", color=color, label=f"{way}, ours")
            published = [row["published"] for row in rows]
            if all(len(values) == 1 for values in published):
                axis.plot(counts, published, "x", color=color, ms=9, label=f"{way}, published")
            else:
                axis.axhspan(*published[0], color=color, alpha=0.15, lw=0)
        axis.set(title=workload, xlabel="sequences of a request", xticks=[2, 4, 6], ylim=(0, 83))
    axes[0].set_ylabel("blocks saved, %")
    axes[0].legend(frameon=False, fontsize=9)
    return drawn


def block_sizes(results: dict[str, Any]) -> Any:
    """What a block's size costs."""
    drawn, (left, right) = plot_style.figure(7, 3.2, columns=2)
    for name, runs in results["block_sizes"].items():
        sizes = [run["block_size"] for run in runs]
        left.plot(sizes, [100 * run["last_blocks"] for run in runs], "o-", label=name)
        most = max(run["batched"] for run in runs)
        right.plot(sizes, [100 * run["batched"] / most for run in runs], "o-", label=name)
    left.axhline(4, color="black", lw=1, ls="--")
    left.annotate("4 %", (1, 4), xytext=(0, 3), textcoords="offset points")
    left.set(ylabel="empty, of the slots taken, %")
    right.set(ylabel="batched requests, % of the most", ylim=(0, None))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="block size, tokens", xticks=sizes, xticklabels=sizes)
    left.legend(frameon=False, fontsize=9)
    return drawn
