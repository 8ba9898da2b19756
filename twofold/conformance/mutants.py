"""The tests are tested: small faults, made from the syntax tree of a source file, each of which some test must catch.

A fault is one edit of the kind that slips into kernels: a mask forgotten, ``<`` for ``<=``, a rounded-down division for
a rounded-up one, two strides swapped, a rescale left out. Each makes a whole new file (a *mutant*); the tests that
judge the file are run against it, and a mutant that they pass is a *survivor*: a hole in the tests, or an edit that
changes nothing. `python -m twofold.conformance.mutants FILE --tests TEST_FILE...` does that and lists the survivors.

It says nothing of faults that take two edits, and nothing of races: `twofold.conformance.sanitizer` is for those.
"""

import argparse
import ast
import contextlib
import copy
import importlib.machinery
import importlib.util
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "TWOFOLD_MUTANT"  # module=file: what a test run imports in place of the module
IDLE = 20  # times its seconds on a processor, a run may last in all: the machine may be busy with something else


@dataclass(frozen=True)
class Mutant:
    """A file with one fault."""

    line: int
    what: str
    source: str
    elsewhere: bool = False  # in a branch that does not run here: only a GPU runs it, or only the interpreter


# ---- making them ------------------------------------------------------------------------------------------------

Edit = Callable[[Any], ast.AST]

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}
OPERATORS |= {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift}


def mutants_of(source: str, *, kernels_only: bool = True, interpreted: bool = True) -> list[Mutant]:
    """Every mutant of a source text, in the order of its lines.

    Args:
        kernels_only: Edit only functions decorated with ``triton.jit``; otherwise every function.
        interpreted: Whether the tests run in Triton's interpreter; what only a GPU runs is then ``elsewhere``.

    Example:
        >>> text = "@triton.jit\\ndef kernel(x, n):\\n    return tl.load(x, mask=x < n, other=0.0)"
        >>> [mutant.what for mutant in mutants_of(text)]
        ['without mask', 'without other', 'x < n becomes x <= n']
    """
    tree = ast.parse(source)
    skipped = {node for top in ast.walk(tree) for branch in never_run(top, interpreted) for node in ast.walk(branch)}
    parts = [ast.unparse(part) for part in tree.body]  # an edit changes one of them
    made = {}
    for i, part in enumerate(tree.body):
        for node in places_in(part, kernels_only):
            for what, edit in edits_of(node):
                text = edited(part, node, edit)
                if text is not None:
                    whole = "\n".join([*parts[:i], text, *parts[i + 1 :]]) + "\n"
                    made.setdefault(whole, Mutant(getattr(node, "lineno", 0), what, whole, node in skipped))
    return sorted(made.values(), key=lambda mutant: mutant.line)


def places_in(part: ast.stmt, kernels_only: bool) -> Iterator[ast.AST]:
    """What may be edited of a statement of a file: the bodies of its functions."""
    for function in ast.walk(part):
        if isinstance(function, ast.FunctionDef) and (not kernels_only or is_kernel(function)):
            yield from (node for statement in function.body for node in ast.walk(statement))


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether Triton compiles it."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def never_run(node: ast.AST, interpreted: bool) -> list[Any]:
    """The parts of a branch, or of a condition, that what `fast` knows of its surroundings rules out."""
    if isinstance(node, ast.If):
        return {True: node.orelse, False: node.body, None: []}[truth(node.test, interpreted)]
    if isinstance(node, ast.IfExp):
        return {True: [node.orelse], False: [node.body], None: []}[truth(node.test, interpreted)]
    if isinstance(node, ast.BoolOp):
        for i, value in enumerate(node.values):
            if truth(value, interpreted) is isinstance(node.op, ast.Or):
                return node.values[i + 1 :]
    return []


def truth(test: ast.expr, interpreted: bool) -> bool | None:
    """What a condition comes to in the interpreter, or on a GPU; None if that depends on more."""
    if isinstance(test, ast.Name) and test.id in ("INTERPRETED", "INTERPRETING"):
        return interpreted
    if isinstance(test, ast.Name) and test.id == "OVERLAP" and interpreted:  # kernels that follow each other on a GPU
        return False
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = truth(test.operand, interpreted)
        return None if value is None else not value
    if isinstance(test, ast.BoolOp):
        values = {truth(value, interpreted) for value in test.values}
        decides = isinstance(test.op, ast.Or)
        return decides if decides in values else None if None in values else not decides
    return None


def edits_of(node: ast.AST) -> Iterator[tuple[str, Edit]]:
    """What can be done to a node, each with a name; the edit gets a copy of the node, and returns what replaces it."""
    yield from edits_of_call(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        swapped = COMPARISONS[type(node.ops[0])]()
        yield becomes(node, lambda n: ast.Compare(n.left, [swapped], n.comparators))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not is_text(node):
        other = OPERATORS[type(node.op)]()
        yield becomes(node, lambda n: ast.BinOp(n.left, other, n.right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield becomes(node, lambda n: n.left)
        yield becomes(node, lambda n: n.right)
    if isinstance(node, ast.AugAssign):
        yield f"without {ast.unparse(node)}", lambda n: ast.Pass()
    if isinstance(node, ast.Assign) and rescales(node):
        yield f"without {ast.unparse(node)}", lambda n: ast.Pass()
    if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= 4096:
        yield becomes(node, lambda n: ast.Constant(n.value + 1))


def edits_of_call(node: ast.AST) -> Iterator[tuple[str, Edit]]:
    """Masks and defaults dropped, roundings turned, branches swapped."""
    if not isinstance(node, ast.Call):
        return
    for keyword in node.keywords:
        if keyword.arg in ("mask", "other"):
            yield f"without {keyword.arg}", lambda n, name=keyword.arg: without_keyword(n, name)
    name = ast.unparse(node.func)
    if name.endswith("cdiv") and len(node.args) == 2:
        yield becomes(node, lambda n: ast.BinOp(n.args[0], ast.FloorDiv(), n.args[1]))
    if name == "tl.where" and len(node.args) == 3:
        yield becomes(node, lambda n: n.args[1])
        yield becomes(node, lambda n: n.args[2])
    if name in ("tl.maximum", "tl.minimum"):
        other = "minimum" if name.endswith("maximum") else "maximum"
        yield becomes(node, lambda n: ast.Call(ast.Attribute(ast.Name("tl"), other), n.args, n.keywords))
    if isinstance(node.func, ast.Name):
        for i, (a, b) in enumerate(zip(node.args, node.args[1:])):
            if isinstance(a, ast.Name) and isinstance(b, ast.Name) and "stride" in a.id and "stride" in b.id:
                yield becomes(node, lambda n, i=i: with_swapped(n, i))


def becomes(node: ast.AST, edit: Edit) -> tuple[str, Edit]:
    """An edit that is named by what it does."""
    return f"{short(node)} becomes {short(edit(copy.deepcopy(node)))}", edit


def short(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else text[:57] + "..."


def is_text(node: ast.BinOp) -> bool:
    return any(isinstance(x, ast.Constant) and isinstance(x.value, str) for x in (node.left, node.right))


def rescales(node: ast.Assign) -> bool:
    """Whether a variable is set from its own old value."""
    names = {target.id for target in node.targets if isinstance(target, ast.Name)}
    return bool(names & {x.id for x in ast.walk(node.value) if isinstance(x, ast.Name)})


def without_keyword(node: ast.AST, name: str) -> ast.AST:
    assert isinstance(node, ast.Call)
    dropped = ("mask", "other") if name == "mask" else (name,)  # a default without a mask is refused
    node.keywords = [keyword for keyword in node.keywords if keyword.arg not in dropped]
    return node


def with_swapped(node: ast.AST, index: int) -> ast.AST:
    assert isinstance(node, ast.Call)
    node.args[index], node.args[index + 1] = node.args[index + 1], node.args[index]
    return node


def edited(part: ast.stmt, node: ast.AST, edit: Edit) -> str | None:
    """A statement of a file, with a node of it edited; None if that is not another program."""

    class Replace(ast.NodeTransformer):
        def visit(self, visited: ast.AST) -> ast.AST:
            return edit(copy.deepcopy(visited)) if visited is node else self.generic_visit(copy.copy(visited))

        def generic_visit(self, visited: ast.AST) -> ast.AST:
            for name, value in list(ast.iter_fields(visited)):
                if isinstance(value, list):
                    setattr(visited, name, [self.visit(x) if isinstance(x, ast.AST) else x for x in value])
                elif isinstance(value, ast.AST):
                    setattr(visited, name, self.visit(value))
            return visited

    if ast.dump(edit(copy.deepcopy(node))) == ast.dump(node):
        return None
    return ast.unparse(ast.fix_missing_locations(Replace().visit(part)))


# ---- running tests against them ---------------------------------------------------------------------------------


def install(setting: str | None = None) -> None:
    """Import a mutant in place of a module, if the environment asks for it; before the module is imported."""
    setting = setting or os.environ.get(VARIABLE)
    if setting:
        sys.meta_path.insert(0, MutantFinder(*setting.split("=", 1)))


class MutantFinder:
    """Finds one module elsewhere."""

    def __init__(self, module: str, file: str):
        self.module, self.file = module, file

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """The mutant's file for its module; nothing for all others."""
        return importlib.util.spec_from_file_location(name, self.file) if name == self.module else None


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: ``killed``, ``timeout`` (killed too: the original ends in time), or ``survived``."""

    line: int
    what: str
    outcome: str
    seconds: float


class Order:
    """A plugin of pytest, for one file's mutants: first the tests that saw most of them, then the quickest ones.

    So most mutants cost the time of a test or two, whatever the tests of the file take together.
    """

    def __init__(self):
        self.kills: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.log: Path | None = None  # of the run at hand: it is another process, so it writes down what the next needs

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Before they run; tests that never ran come last."""
        items.sort(key=lambda item: (-self.kills[item.nodeid], self.seconds.get(item.nodeid, math.inf)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """After each."""
        if self.log is not None and (report.when == "call" or report.failed):
            with self.log.open("a") as file:
                file.write(json.dumps([report.nodeid, report.duration, report.failed]) + "\n")

    def learn(self, log: Path) -> None:
        """What the run of a mutant showed."""
        for name, seconds, failed in map(json.loads, log.read_text().splitlines() if log.exists() else ()):
            self.kills[name] += failed
            self.seconds.setdefault(name, seconds)


def judge(mutant: Mutant, module: str, pytest_arguments: list[str], seconds: float, order: Order) -> Verdict:
    """Run the tests against a mutant in a process of their own, which may use so many seconds of a processor."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / (module.rsplit(".", 1)[-1] + ".py"), Path(folder) / "log"
        file.write_text(mutant.source)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds)))
            order.log = log
            run_tests(f"{module}={file}", pytest_arguments, order)
        outcome = wait(child, start + IDLE * seconds)
        order.learn(log)
    return Verdict(mutant.line, mutant.what, outcome, round(time.monotonic() - start, 1))


def run_tests(setting: str, pytest_arguments: list[str], order: Order) -> None:
    """In the child: the tests, silently; never returns."""
    try:
        import pytest

        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            install(setting)
            os.environ.setdefault("TWOFOLD_PROFILE", "judge")  # a failure need not be shrunk
            options = ["-x", "-n", "0", "-p", "no:cacheprovider"]
            os._exit(int(pytest.main([*options, *pytest_arguments], plugins=[order])))
    finally:
        os._exit(1)


def wait(child: int, deadline: float) -> str:
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done and os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
            return "timeout"
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


@dataclass(frozen=True)
class Report:
    """What became of a file's mutants: how many were made, how many more of what does not run here, the verdicts."""

    file: str
    made: int
    elsewhere: int
    verdicts: list[Verdict]

    @property
    def survivors(self) -> list[Verdict]:
        """Those that the tests did not see."""
        return [verdict for verdict in self.verdicts if verdict.outcome == "survived"]

    @property
    def killed(self) -> int:
        """How many the tests saw."""
        return len(self.verdicts) - len(self.survivors)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        counts = {"made": self.made, "elsewhere": self.elsewhere}
        counts |= {"judged": len(self.verdicts), "killed": self.killed}
        return counts | {"survivors": [asdict(verdict) for verdict in self.survivors]}


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if fewer than the asked share of some file's mutants were killed."""
    parser = argparse.ArgumentParser(description="Run tests against mutants of a file, or of each file of a deck.")
    parser.add_argument("file", type=Path, nargs="*", help="with --deck: only these of its files")
    parser.add_argument("--tests", nargs="+", help="arguments of pytest")
    parser.add_argument("--deck", type=Path, help="TOML: tables of file = [arguments of pytest]")
    parser.add_argument("--sample", type=int, help="judge so many of a file's, drawn with seed 0; default: all")
    parser.add_argument("--seconds", type=float, default=120.0, help="of a processor, for a mutant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--all-functions", action="store_true", help="not only Triton's kernels")
    parser.add_argument("--at-least", type=float, default=0.9)
    parser.add_argument("--json", type=Path, help="where to write the verdicts, file by file; what is there is kept")
    options = parser.parse_args(arguments)
    if bool(options.tests) == bool(options.deck) or (options.tests and not options.file):
        parser.error("give files and --tests, or --deck")

    if options.deck:
        decks = tomllib.loads(options.deck.read_text())
    else:
        decks = {"": {str(file): options.tests for file in options.file}}
    chosen = {file: tests for deck in decks.values() for file, tests in deck.items()}
    if options.file:
        unknown = [str(file) for file in options.file if str(file) not in chosen]
        if unknown:
            parser.error(f"{options.deck}: does not say which tests judge {', '.join(unknown)}")
        chosen = {str(file): chosen[str(file)] for file in options.file}
    import_what_is_not_mutated({Path(test) for tests in chosen.values() for test in tests if Path(test).is_file()})
    reports = []
    for file, tests in chosen.items():
        report = judge_file(Path(file), tests, options)
        if report is None:
            print(f"{file}: the tests do not pass without a fault", file=sys.stderr)
            return 2
        reports.append(report)
        elsewhere = f", {report.elsewhere} more of what does not run here" if report.elsewhere else ""
        print(f"{file}: {report.killed} of {len(report.verdicts)} killed ({report.made} made{elsewhere})", flush=True)
        for verdict in report.survivors:
            print(f"  line {verdict.line}: {verdict.what}", flush=True)
        if options.json:
            known = json.loads(options.json.read_text()) if options.json.exists() else {}
            options.json.write_text(json.dumps(known | {file: report.record()}, indent=1) + "\n")
    return int(any(report.killed < options.at_least * len(report.verdicts) for report in reports))


def judge_file(file: Path, tests: list[str], options: argparse.Namespace) -> Report | None:
    """Judge a file's mutants, or a sample of them; None if its tests fail without any fault."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    everywhere = mutants_of(file.read_text(), kernels_only=not options.all_functions, interpreted=interpreted)
    mutants = [mutant for mutant in everywhere if not mutant.elsewhere]
    made, elsewhere = len(mutants), len(everywhere) - len(mutants)
    if options.sample and options.sample < made:
        mutants = sorted(random.Random(0).sample(mutants, options.sample), key=lambda mutant: mutant.line)
    module = ".".join(file.with_suffix("").parts)
    order = Order()
    original = judge(Mutant(0, "nothing", file.read_text()), module, tests, 10 * options.seconds, order)
    if original.outcome != "survived":
        return None
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = list(pool.map(lambda m: judge(m, module, tests, options.seconds, order), mutants))
    return Report(str(file), made, elsewhere, verdicts)


def import_what_is_not_mutated(tests: set[Path]) -> None:
    """Once, for every child to share: what takes seconds to import. Of what the tests want, all that lies elsewhere."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's own helpers are decorated when it is imported
    import triton  # noqa: F401

    wanted = {name for test in tests for name in imports_of(test.read_text())}
    for name in sorted(wanted):
        if importlib.machinery.PathFinder.find_spec(name.split(".")[0], [os.getcwd()]) is None:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    torch.set_num_threads(1)  # a pool of threads does not survive a fork


def imports_of(source: str) -> set[str]:
    """The modules that a file names in its imports."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


if __name__ == "__main__":
    sys.exit(main())
