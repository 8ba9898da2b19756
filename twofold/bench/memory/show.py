"""The results as tables: for the terminal, and for the documentation's page."""

from typing import Any

from twofold.bench.report import Table


def tables(results: dict[str, Any]) -> list[Table]:
    """All of them."""
    return [claims(results), allocators(results), block_sizes(results)]


def claims(results: dict[str, Any]) -> Table:
    """The published figures beside ours."""
    notes: list[str] = []
    rows = []
    for row in results["claims"]:
        unit, changed, changed_gap, note = row["unit"], "", "", ""
        if "change" in row:
            if row["change"] not in notes:
                notes.append(row["change"])
            note = f" [{notes.index(row['change']) + 1}]"
            changed, changed_gap = f"{row['changed']:.2f}{note}", f"{row['changed_gap']:+.0%}"
        published = " to ".join(f"{value:g}" for value in row["published"])
        figure = f"{row['figure']}, {unit}" if unit else row["figure"]
        rows.append((figure, published, f"{row['ours']:.2f}", f"{row['gap']:+.0%}", changed, changed_gap))
    columns = ("figure", "published", "ours", "gap", "one thing changed", "gap")
    numbered = [f"[{number}] {note}." for number, note in enumerate(notes, start=1)]
    return "The published figures", columns, rows, numbered


def allocators(results: dict[str, Any]) -> Table:
    """What each reservation is worth in each allocator."""
    names = ("tokens", "reserved", "internal", "external")
    rows = [
        (
            f"{run['workload']}, {run['strategy']}, {run['allocator']}",
            *(f"{100 * run[name]:.1f}" for name in names),
            f"{run['batched']:.2f}",
            f"{run['requests_per_s']:.2f}",
        )
        for run in results["allocators"]
    ]
    columns = ("reservation", "tokens, %", "later", "never", "nobody's", "batched requests", "req/s")
    return "The same reservations in two allocators, somebody always waiting", columns, rows, []


def block_sizes(results: dict[str, Any]) -> Table:
    """What a block's size costs, for each workload."""
    rows = []
    for name, runs in results["block_sizes"].items():
        for run in runs:
            best = " (best)" if run["block_size"] == results["best_block_sizes"][name] else ""
            shares = (f"{100 * run[figure]:.1f}" for figure in ("tokens", "last_blocks", "saved"))
            rows.append(
                (f"{name}, {run['block_size']}{best}", *shares, f"{run['batched']:.1f}", f"{run['requests_per_s']:.2f}")
            )
    columns = ("block size", "tokens, %", "empty in last blocks, %", "shared, %", "batched requests", "req/s")
    note = "Best: the largest block that costs no more than a fiftieth of the best throughput."
    return "Block sizes, somebody always waiting", columns, rows, [note]
