"""What `twofold.conformance.record` keeps of a run."""

import json
import os
import subprocess
import sys

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}

TESTS = """
from hypothesis import assume, event, given, settings, strategies as st

@settings(max_examples=20, derandomize=True, database=None)
@given(number=st.integers(0, 99))
def test_property(number):
    assume(number != 13)
    event("even" if number % 2 == 0 else "odd")

def test_plain():
    pass

def test_fails():
    assert False
"""


def test_examples_features_and_failures_are_kept(tmp_path):
    """Also when the tests run in several processes."""
    (tmp_path / "test_some.py").write_text(TESTS)
    record = tmp_path / "record.json"
    plugin = ["-p", "twofold.conformance.record", "--record", str(record)]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *plugin]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout
    results = json.loads(record.read_text())["results"]
    assert results["outcomes"] == {"passed": 2, "failed": 1}
    assert results["not passed"] == {"test_some.py::test_fails": "failed"}
    (kept,) = results["properties"].values()
    assert kept["examples"] == results["examples"] == 20
    assert kept["features"]["even"] + kept["features"]["odd"] == 20


def test_a_reduced_deck_is_reduced(tmp_path):
    """``--at-most`` holds for properties that name a number of their own, too."""
    (tmp_path / "test_some.py").write_text(TESTS)
    record = tmp_path / "record.json"
    plugin = ["-p", "twofold.conformance.record", "--record", str(record), "--at-most", "3"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *plugin]
    subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert json.loads(record.read_text())["results"]["examples"] == 3


def test_parts_are_put_together(tmp_path):
    """What failed and then passed has passed; examples add up over the parts that passed."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_more.py").write_text("def test_more():\n    pass\n")
    parts = [tmp_path / f"{n}.json" for n in range(2)]
    for part in parts:
        plugin = ["-p", "twofold.conformance.record", "--record", str(part)]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *plugin]
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        (tmp_path / "test_some.py").write_text(TESTS.replace("assert False", "assert True"))
    whole = tmp_path / "whole.json"
    merge = [sys.executable, "-m", "twofold.conformance.record", str(whole), *map(str, parts)]
    subprocess.run(merge, check=True, capture_output=True)
    results = json.loads(whole.read_text())["results"]
    assert results["outcomes"] == {"passed": 4}
    assert results["not passed"] == {}
    assert results["examples"] == 40
    assert results["other tests that passed"] == {
        "test_more.py": ["test_more"],
        "test_some.py": ["test_fails", "test_plain"],
    }
    assert [run["outcomes"].get("failed", 0) for run in results["runs"]] == [1, 0]

    other = json.loads(parts[0].read_text()) | {"device": "another"}
    parts[0].write_text(json.dumps(other))
    refused = subprocess.run(merge, check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "different machines: device" in refused.stderr


def test_nothing_is_written_unless_asked(tmp_path):
    """The plugin alone changes nothing."""
    (tmp_path / "test_some.py").write_text("def test():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "twofold.conformance.record"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
    assert {path.suffix for path in tmp_path.iterdir()} <= {".py", ""}
