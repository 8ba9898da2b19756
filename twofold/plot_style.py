"""How the project's plots look: the same in tutorials, on the pages and in the benchmarks."""

from pathlib import Path
from typing import Any

COLORS = ("#26486f", "#c2571a", "#5a8f3d", "#8d5ba6", "#888888")

STYLE: dict[str, Any] = {
    "font.size": 11,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "twofold",  # the same plot is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def figure(width: float = 7.0, height: float = 3.4, columns: int = 1, **settings: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, legible on a phone and on light or dark paper."""
    import matplotlib
    import matplotlib.pyplot as plt
    from cycler import cycler

    style: Any = STYLE | {"axes.prop_cycle": cycler(color=COLORS)}
    matplotlib.rcParams.update(style)
    return plt.subplots(1, columns, figsize=(width, height), **settings)


def save(drawn: Any, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same plot, and close it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(drawn)
