"""`twofold models` and `twofold pull`: what is here, what a token of it costs in memory, and fetching more."""

import json
import sys
from typing import Annotated, Any

import typer

from twofold.cli import options


def models(
    model: options.Model = None,
    block_size: options.BlockSize = 16,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, on stdout.")] = False,
) -> int:
    """What models are here, and the bytes of KV cache a token of each takes in every format."""
    from reference.kv_cache.cache import KV_FORMATS
    from reference.linear.weight import WEIGHT_FORMATS
    from twofold.checkpoints import list_local_models, load_checkpoint
    from twofold.sizing import kv_bytes_per_token

    if model is not None:
        checkpoint = load_checkpoint(model)
        entries: list[Any] = [
            {"name": model, "path": str(checkpoint.path), "bytes": checkpoint.nbytes, "config": checkpoint.config}
        ]
    else:
        entries = list_local_models()
    rows = [
        {
            "name": entry["name"],
            "path": entry["path"],
            "bytes": entry["bytes"],
            "family": entry["config"].family,
            "kv_bytes_per_token": {
                name: kv_bytes_per_token(entry["config"], name, block_size=block_size) for name in KV_FORMATS
            },
        }
        for entry in entries
    ]
    if as_json:
        print(json.dumps(rows))
        return 0
    if not rows:
        print("no model here yet: `twofold pull` fetches SmolLM2-135M-Instruct (98 MB)", file=sys.stderr)
    _print_tables(rows, KV_FORMATS, WEIGHT_FORMATS)
    return 0


def _print_tables(rows, kv_formats, weight_formats) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for row in rows:
        console.print(f"{row['name']}  ({row['family']}, {row['bytes'] / 1e6:.0f} MB)", style="bold")
        console.print(f"  {row['path']}", soft_wrap=True)
    table = Table(title="KV cache formats (--kv-cache-dtype)", title_justify="left")
    for column in ("format", *(f"bytes a token: {row['name']}" for row in rows), "what it is"):
        table.add_column(column)
    for name, format in kv_formats.items():
        table.add_row(name, *(f"{row['kv_bytes_per_token'][name]:,.0f}" for row in rows), format.summary)
    console.print(table)
    table = Table(title="Weight formats (--weights)", title_justify="left")
    for column in ("format", "what it is"):
        table.add_column(column)
    for name, format in weight_formats.items():
        table.add_row(name, format.summary)
    console.print(table)


def pull(
    model: Annotated[str | None, typer.Argument(help="SmolLM2 (the default) or a hub name.", metavar="[MODEL]")] = None,
) -> int:
    """Fetch a model into the cache."""
    from twofold.checkpoints import resolve_model
    from twofold.cli.show import progress

    with progress() as on_progress:
        path = resolve_model(model, on_progress=on_progress)
    print(path)
    return 0
