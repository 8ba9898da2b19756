"""Mutants: what is made of a kernel, and that the right ones die."""

import ast
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from twofold.conformance import mutants

KERNEL = """
@triton.jit
def kernel(x_ptr, out_ptr, stride_x, stride_out, n, TILE: tl.constexpr):
    offset = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + offset * stride_x, mask=offset < n, other=0.0)
    total = tl.zeros([TILE], tl.float32)
    total += helper(x, stride_x, stride_out)
    total = total * 2.0
    tl.store(out_ptr + offset * stride_out, tl.where(x > 0, total, x), mask=offset < n)


def grid(n, TILE):
    return triton.cdiv(n, TILE) + 1
"""


def test_each_kind_of_fault_is_made():
    """Masks, defaults, comparisons, strides, branches, rescales and sums each get their mutant."""
    names = [mutant.what for mutant in mutants.mutants_of(KERNEL)]
    wanted = [
        "without mask",
        "without other",
        "offset < n becomes offset <= n",
        "x > 0 becomes x >= 0",
        "helper(x, stride_x, stride_out) becomes helper(x, stride_out, stride_x)",
        "tl.where(x > 0, total, x) becomes total",
        "without total += helper(x, stride_x, stride_out)",
        "without total = total * 2.0",
    ]
    assert not [name for name in wanted if name not in names], names


def test_every_mutant_is_another_program_and_compiles():
    """No two mutants are the same, none is the original, and each is Python."""
    sources = [mutant.source for mutant in mutants.mutants_of(KERNEL)]
    assert len(sources) == len(set(sources))
    for source in sources:
        compile(source, "mutant", "exec")


def test_only_kernels_are_edited_unless_asked():
    """What runs on the host is left alone, or not."""
    assert not [m for m in mutants.mutants_of(KERNEL) if "cdiv" in m.what]
    assert [m for m in mutants.mutants_of(KERNEL, kernels_only=False) if "cdiv" in m.what]


BRANCHES = """
@triton.jit
def kernel(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:
        y = x + 1
    elif INTERPRETED:
        y = x + 2
    else:
        y = x + 3
        if y < 4:
            y = 0
    if not INTERPRETED:
        y = y * 5
    z = y - 6 if INTERPRETED or dtype == tl.int16 else y - 7
    if OVERLAP and y > 8:
        z = y + 9
    return z
"""


def test_what_does_not_run_here_is_told_apart():
    """A fault in a branch for GPUs alone is no hole in tests that run in the interpreter; nor the reverse."""
    added = {"x + 1 becomes x - 1", "x + 2 becomes x - 2", "y - 6 becomes y + 6"}
    native = {
        "x + 3 becomes x - 3",
        "y < 4 becomes y <= 4",
        "0 becomes 1",
        "y * 5 becomes y + 5",
        "y - 7 becomes y + 7",
        "y > 8 becomes y >= 8",
        "y + 9 becomes y - 9",
    }

    def elsewhere(interpreted: bool) -> set[str]:
        return {m.what for m in mutants.mutants_of(BRANCHES, interpreted=interpreted) if m.elsewhere}

    on_cpu, on_gpu = elsewhere(True), elsewhere(False)
    assert native | {"dtype == tl.int16 becomes dtype != tl.int16"} <= on_cpu
    assert not added & on_cpu
    assert added - {"y - 6 becomes y + 6"} | {"dtype == tl.bfloat16 becomes dtype != tl.bfloat16"} <= on_gpu
    assert not native & on_gpu


def test_imports_of_a_file():
    """What a child would import anyway, by the names of modules."""
    text = "import a.b as c, d\nfrom e.f import g\n\ndef h():\n    import i\n    from . import j\n"
    assert mutants.imports_of(text) == {"a.b", "d", "e.f", "i"}


def test_verdicts(tmp_path, monkeypatch, capfd):
    """A fault that a test sees is killed, one that none sees survives, and tests that fail anyway judge nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "judged.py").write_text("def least(a, b):\n    return a if a < b else b\n")
    run = [sys.executable, "-m", "twofold.conformance.mutants", "judged.py", "--all-functions", "--jobs", "1"]

    def judge(test: str) -> tuple[int, str]:
        import subprocess

        (tmp_path / "test_judged.py").write_text(f"from judged import least\n\n\ndef test():\n    {test}\n")
        done = subprocess.run([*run, "--tests", "test_judged.py"], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    status, text = judge("assert least(1, 2) == 1")
    assert status == 1, text
    assert "0 of 1 killed" in text  # a <= b gives the same: a survivor
    assert "a < b becomes a <= b" in text
    status, text = judge("assert least(1, 2) == 2")
    assert status == 2, text
    assert "do not pass without a fault" in text


def test_a_mutant_that_never_ends(tmp_path, monkeypatch):
    """It counts as seen, by the time that it takes of a processor."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_endless.py").write_text("def test():\n    while True:\n        pass\n")
    verdict = mutants.judge(mutants.Mutant(1, "endless", ""), "judged", ["test_endless.py"], 1, mutants.Order())
    assert verdict.outcome == "timeout"


def test_the_order_of_tests(tmp_path):
    """Who saw most faults comes first, then the quickest, then who never ran."""
    order = mutants.Order()
    log = order.log = tmp_path / "log"
    runs = [("slow", 2.0, False), ("keen", 3.0, True), ("keen", 3.0, True), ("quick", 1.0, False), ("lucky", 9.0, True)]
    for name, seconds, failed in runs:
        order.pytest_runtest_logreport(SimpleNamespace(nodeid=name, duration=seconds, failed=failed, when="call"))
    order.pytest_runtest_logreport(SimpleNamespace(nodeid="quick", duration=0.0, failed=False, when="teardown"))
    order.learn(log)
    items = [SimpleNamespace(nodeid=name) for name in ("new", "slow", "quick", "lucky", "keen")]
    order.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["keen", "lucky", "quick", "slow", "new"]


def test_a_file_that_no_deck_names(tmp_path, capsys):
    """Whoever asks for it is told so, before anything is run."""
    (tmp_path / "deck.toml").write_text('[room]\n"a.py" = ["test_a.py"]\n')
    with pytest.raises(SystemExit) as stopped:
        mutants.main(["--deck", str(tmp_path / "deck.toml"), "a.py", "b.py"])
    assert stopped.value.code == 2
    assert "does not say which tests judge b.py" in capsys.readouterr().err


def test_the_deck_names_every_kernel():
    """A kernel that no line of the deck names would never be judged."""
    root = Path(__file__).parents[2]
    deck = tomllib.loads((root / "tests" / "mutants.toml").read_text())
    named = {file for files in deck.values() for file in files}
    kernels = {str(file.relative_to(root)) for file in (root / "fast").rglob("*.py") if has_mutants(file)}
    assert named == kernels


def has_mutants(file: Path) -> bool:
    """No matter which, since making them takes minutes; none of the Hopper kernels, which are not interpreted."""
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    kernels = [function for function in functions if "hopper" not in file.name and mutants.is_kernel(function)]
    return any(True for kernel in kernels for node in ast.walk(kernel) for _ in mutants.edits_of(node))
