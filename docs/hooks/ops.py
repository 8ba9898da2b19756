"""One page an op's module, made from the code: contract, reference source, Triton source, and what it is tested by."""

import ast
import functools
import importlib
import inspect
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
TOPICS = {
    "numerics": "Numerics",
    "attention": "Attention",
    "kv_cache": "KV cache",
    "linear": "Linear layers",
    "fusion": "Fusion",
    "sampling": "Sampling",
}


def on_config(config):
    """Put the pages into the navigation, by topic."""
    entries: list = ["ops/index.md"]
    for topic, title in TOPICS.items():
        pages = [{name: f"ops/{place}/{name}.md"} for place, name in _modules() if place == topic]
        entries.append({title: pages})
    config.nav = [{"Ops": entries} if entry == {"Ops": "ops/"} else entry for entry in config.nav]
    return config


def on_files(files: Files, config) -> Files:
    """Add a page for every module that has ops, one for each topic, the list of all, and the glossary."""
    modules = _modules()
    for (topic, name), ops in modules.items():
        files.append(File.generated(config, f"ops/{topic}/{name}.md", content=_page(topic, name, ops)))
    files.append(File.generated(config, "ops/index.md", content=_index(modules)))
    files.append(File.generated(config, "glossary.md", content=_glossary()))
    return files


@functools.cache
def _modules() -> dict[tuple[str, str], list[str]]:
    """(topic, module) to its ops, in the order in which the module defines them."""
    reference = importlib.import_module("reference")
    found: dict[tuple[str, str], list[str]] = {}
    for name in reference.__all__:
        op = getattr(reference, name)
        _, topic, module = op.__module__.split(".")
        found.setdefault((topic, module), []).append(name)
    order = list(TOPICS)
    for ops in found.values():
        ops.sort(key=lambda name: inspect.getsourcelines(getattr(reference, name))[1])
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _page(topic: str, name: str, ops: list[str]) -> str:
    path = f"reference/{topic}/{name}.py"
    head, _, rest = _docstring(ROOT / path).partition("\n")
    parts = [f"# {name}", f"*{head}*", rest.strip()]
    parts += [f"::: reference.{topic}.{name}.{op}" for op in ops]
    parts.append("## Source")
    parts.append(_tab("Reference (NumPy)", path))
    if (ROOT / f"fast/{topic}/{name}.py").exists():
        parts.append(_tab("Fast (Triton)", f"fast/{topic}/{name}.py"))
    parts += ["## Tested by", _properties(topic, name)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tab(title: str, path: str) -> str:
    return f'=== "{title}"\n\n    ```python title="{path}"\n    --8<-- "{path}"\n    ```'


def _properties(topic: str, name: str) -> str:
    """Every test of the module, by the sentence in its docstring, or by its name."""
    path = ROOT / f"tests/{topic}/test_{name}.py"
    if not path.exists():
        return "No test file carries this module's name."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    lines = [f"- {_sentence(test)} (`{test.name}`)" for test in sorted(tests, key=lambda test: test.lineno)]
    return f"`tests/{topic}/test_{name}.py`:\n\n" + "\n".join(lines)


def _sentence(test: ast.FunctionDef) -> str:
    doc = (ast.get_docstring(test) or "").partition("\n\n")[0]
    return " ".join(doc.split()) or test.name.removeprefix("test_").replace("_", " ").capitalize() + "."


def _index(modules: dict[tuple[str, str], list[str]]) -> str:
    parts = [
        "# Ops",
        "An op is arithmetic on arrays and scalars, nothing else. It exists under the same path, name and signature in "
        "`reference/` and in `fast/`, and `reference.__all__` lists them all: that list is the interface of a backend.",
    ]
    for topic, title in TOPICS.items():
        rows = [f"## {title}", "", "| module | ops | |", "|---|---|---|"]
        for (place, name), ops in modules.items():
            if place == topic:
                summary = _docstring(ROOT / f"reference/{topic}/{name}.py").partition("\n\n")[0]
                listed = ", ".join(f"`{op}`" for op in ops)
                rows.append(f"| [{name}]({topic}/{name}.md) | {listed} | {' '.join(summary.split())} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _glossary() -> str:
    vocabulary = importlib.import_module("reference.vocabulary")
    parts = ["# Glossary", "One thing has one name in the whole house. A test holds every op to this page."]
    for title, terms in (("Arguments", vocabulary.ARGUMENTS), ("Axes", vocabulary.AXES)):
        rows = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in sorted(terms.items()))
        parts.append(f"## {title}\n\n| name | meaning |\n|---|---|\n{rows}")
    return "\n\n".join(parts) + "\n"
