"""Results of benchmarks on the pages: tables and plots, from the JSON that the repository keeps."""

import json
import tempfile
from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def on_files(files, config):
    """Draw the plots."""
    from twofold.bench.memory.plots import draw

    with tempfile.TemporaryDirectory() as folder:
        for path in draw(_results("memory"), Path(folder)):
            files.append(File.generated(config, f"plots/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put the tables where they belong: ``<!-- table: claims -->``."""
    from twofold.bench.memory import show

    for name in ("claims", "allocators", "block_sizes"):
        mark = f"<!-- table: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, show.markdown(getattr(show, name)(_results("memory"))))
    return markdown


def _results(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]
