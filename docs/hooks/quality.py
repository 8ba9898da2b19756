"""What `twofold bench quality` found, on its page: tables and plots from the JSON that the repository keeps."""

import json
import tempfile
from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[2] / "benchmarks/results/quality.json"
NOT_YET = "*Not measured on the real model yet: the command above does it.*"
TABLES = ("weights", "pruning", "cache", "heads", "known_models")


def on_files(files, config):
    """Draw the plots."""
    if RESULTS.exists():
        from twofold.bench.quality.plots import draw

        with tempfile.TemporaryDirectory() as folder:
            for path in draw(_results(), Path(folder)):
                files.append(File.generated(config, f"plots/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put tables and plots where they belong: ``<!-- quality: weights -->``, ``<!-- quality plot: weights -->``."""
    if "<!-- quality" not in markdown:
        return markdown
    for name in TABLES:
        markdown = markdown.replace(f"<!-- quality: {name} -->", _table(name))
    for name in ("weights", "cache", "pruning"):
        plot = f"plots/quality-{name}.svg"
        there = files.get_file_from_path(plot) is not None
        markdown = markdown.replace(f"<!-- quality plot: {name} -->", f"![{name}]({plot}){{ .plot }}" if there else "")
    return markdown


def _table(name: str) -> str:
    from twofold.bench.quality import show
    from twofold.bench.quality.known_models import KNOWN_MODELS

    if name == "known_models":  # computed, not measured
        return show.markdown(show.known_models({"known_models": [model.row() for model in KNOWN_MODELS]}))
    if not RESULTS.exists():
        return NOT_YET
    return show.markdown(getattr(show, name)(_results()))


def _results():
    return json.loads(RESULTS.read_text())["results"]
