"""Results of benchmarks on the pages: tables and plots, from the JSON that the repository keeps.

``<!-- table: memory.claims -->`` is what `twofold.bench.memory.show.claims` makes of `benchmarks/results/memory.json`,
``<!-- plot: quality-weights -->`` the picture of that name. What has not been measured yet says so. A file of
results from a GPU has the GPU's name in its own: `engine-nvidia-....json`.
"""

import json
import re
import tempfile
from importlib import import_module
from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
DRAWN = ("memory", "quality", "engine")  # studies that have plots
NOT_YET = "*Not measured yet: the command above does it.*"


def on_files(files, config):
    """Draw the plots."""
    for study in DRAWN:
        results = _results(study)
        if results is not None:
            with tempfile.TemporaryDirectory() as folder:
                for path in import_module(f"twofold.bench.{study}.plots").draw(results, Path(folder)):
                    files.append(File.generated(config, f"plots/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put tables and plots where they belong."""

    def plot(found):
        path = f"plots/{found[1]}.svg"
        return f"![{found[2]}]({path}){{ .plot }}" if files.get_file_from_path(path) is not None else ""

    markdown = re.sub(r"<!-- table: (\w+)\.(\w+) -->", lambda found: _table(found[1], found[2]), markdown)
    return re.sub(r"<!-- plot: ([\w-]+), ([^>]*) -->", plot, markdown)


def _table(study: str, name: str) -> str:
    from twofold.bench.quality.known_models import KNOWN_MODELS
    from twofold.bench.report import markdown

    results = _results("copying" if name == "copying" else study)
    if name == "known_models":  # computed, not measured
        results = {"known_models": [model.row() for model in KNOWN_MODELS]}
    if results is None:
        return NOT_YET
    return markdown(getattr(import_module(f"twofold.bench.{study}.show"), name)(results))


def _results(study: str):
    paths = [*RESULTS.glob(f"{study}.json"), *sorted(RESULTS.glob(f"{study}-nvidia-*.json"))]
    if not paths:
        return None
    kept = json.loads(paths[0].read_text())
    return kept.pop("results") | {"measured": kept}
