"""Tutorials: percent-format scripts, run top to bottom when the site is built, with what they printed and drew.

A script is a notebook (`jupytext`) that is executed here (`nbclient`) and written as a page of the site, so that its
formulas, code and search are those of every other page. A cell's tag says how it is shown:

- ``solution``: folded;
- ``hide``: run, and only its output shown.

While writing: ``TWOFOLD_TUTORIALS=04 mkdocs serve`` executes those whose name begins so, and shows the others' text.
"""

import base64
import os
import textwrap
from pathlib import Path

import jupytext
import nbclient
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SECONDS = 600  # for one cell, at most
SUFFIXES = {"image/svg+xml": "svg", "image/png": "png"}


def on_config(config):
    """Put the pages into the navigation."""
    pages = ["tutorials/index.md", *(f"tutorials/{script.stem}.md" for script in _scripts())]
    config.nav = [{"Tutorials": pages} if entry == {"Tutorials": "tutorials/"} else entry for entry in config.nav]
    return config


def _scripts() -> list[Path]:
    return sorted((ROOT / "tutorials").glob("[0-9]*.py"))


def on_files(files: Files, config) -> Files:
    """Add the pages, their pictures, and the list of them."""
    titles = []
    for script in _scripts():
        notebook = jupytext.read(script)
        if script.stem.startswith(os.environ.get("TWOFOLD_TUTORIALS", "")):
            _execute(script, notebook)
        page, pictures = _page(script.stem, notebook)
        titles.append((script.stem, page.lstrip("# ").splitlines()[0], _summary(notebook)))
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    files.append(File.generated(config, "tutorials/index.md", content=_index(titles)))
    return files


def _execute(script: Path, notebook) -> None:
    """Run every cell in place. A cell that raises ends the build: a tutorial that does not run is no tutorial."""
    where = {"metadata": {"path": str(ROOT)}}
    client = nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where)
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise PluginError(f"{script.name}: {error}") from None


def _page(name: str, notebook) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        shown = [] if "hide" in tags else [_fence(cell.source, "python")]
        for output in cell.get("outputs", []):
            shown.append(_output(output, f"{name}-{len(pictures)}", pictures))
        text = "\n\n".join(part for part in shown if part)
        if "solution" in tags:
            text = '??? success "Solution"\n\n' + textwrap.indent(text, "    ")
        parts.append(text)
    return "\n\n".join(parts) + "\n", pictures


def _fence(text: str, language: str) -> str:
    ticks = "````" if "```" in text else "```"
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _output(output, picture: str, pictures: dict[str, bytes]) -> str:
    """One output of a cell: text as it stands, Markdown as Markdown, a picture as a file."""
    if output.output_type == "stream":
        return _fence(output.text, "text") if output.name == "stdout" and output.text.strip() else ""
    data = output.get("data", {})
    for kind, suffix in SUFFIXES.items():
        if kind in data:
            raw = data[kind]
            pictures[f"{picture}.{suffix}"] = raw.encode() if suffix == "svg" else base64.b64decode(raw)
            text = data.get("text/markdown") or data.get("text/alt") or "plot"
            return f"![{text}]({picture}.{suffix}){{ .plot }}"
    if "text/markdown" in data:
        return data["text/markdown"]
    return _fence(data["text/plain"], "text") if "text/plain" in data else ""


def _summary(notebook) -> str:
    """The first paragraph after the title."""
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    paragraphs = [part.strip() for part in first.split("\n\n")[1:] if part.strip()]
    return " ".join(paragraphs[0].split()) if paragraphs else ""


def _index(titles: list[tuple[str, str, str]]) -> str:
    rows = "\n".join(f"- **[{title}]({name}.md)**. {summary}" for name, title, summary in titles)
    return f"# Tutorials\n\nEach is a script that ran, top to bottom, when this site was built.\n\n{rows}\n"
