"""A pytest plugin that keeps what a run tried: `pytest -p twofold.conformance.record --record FILE`.

For each test: its outcome and its seconds; for a property also how many examples Hypothesis ran, how many of them it
discarded, and how many had each feature that a strategy reports (several sequences, shared blocks, poisoned slots...).
With the machine's name and the versions beside it, that is the evidence of a long run, which CI does not repeat.

`--at-most N` reduces every property to N examples, for tools under which a kernel takes a hundred times as long.

A run may come in parts, each in a process of its own: `python -m twofold.conformance.record ALL PART...` puts them
together, the oldest first. What a later part says of a test holds; the examples of all parts that passed count.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.statistics import collector

from twofold.bench.report import gpu_name, save
from twofold.errors import TwofoldError

KEY = "hypothesis"  # of a report's user property


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options ``--record`` and ``--at-most``."""
    parser.addoption("--record", metavar="FILE", help="write what was tried to this JSON file")
    parser.addoption("--at-most", metavar="N", type=int, help="examples that a property gets at most")


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that gathers the reports writes; its workers count."""
    path = config.getoption("--record")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A property has its settings on its function, whoever asks for them."""
    most, name = config.getoption("--at-most"), "_hypothesis_internal_use_settings"
    for test in {getattr(item, "obj", None) for item in items} if most else ():
        asked = getattr(test, name, None)
        if asked is not None:
            setattr(test, name, settings(asked, max_examples=min(asked.max_examples, most)))


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Count a property's examples; they travel with its report."""
    if not item.config.getoption("--record"):
        return (yield)
    runs: list[dict[str, Any]] = []
    with collector.with_value(runs.append):  # type: ignore[arg-type]
        try:
            return (yield)
        finally:
            if runs:
                item.user_properties.append((KEY, counted(runs)))


def counted(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Examples by what became of them, and the features of those that were not discarded."""
    cases = [case for run in runs for phase in run.values() if isinstance(phase, dict) for case in phase["test-cases"]]
    kept = [case for case in cases if case["status"] in ("valid", "interesting")]
    features = Counter(name for case in kept for name in set(case["events"]))
    return {"examples": len(kept), "discarded": len(cases) - len(kept), "features": dict(sorted(features.items()))}


class Recorder:
    """Gathers the reports of a run, and writes them at its end."""

    def __init__(self, path: Path) -> None:
        self.path, self.start, self.tests = path, time.time(), {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test; the call counts, and a set-up that does not get there."""
        if report.when == "call" or report.outcome != "passed":
            properties: dict[str, Any] = dict(report.user_properties)
            self.tests[report.nodeid] = {
                "outcome": report.outcome,
                "seconds": round(report.duration, 2),
                **properties.get(KEY, {}),
            }

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        import torch

        how = {
            "backends": os.environ.get("TWOFOLD_BACKENDS", "all"),
            "seconds": round(time.time() - self.start),
            "examples asked for": settings().max_examples,
        }
        command = " ".join(["pytest", *sys.argv[1:]])
        device = gpu_name() if torch.cuda.is_available() else None
        save(self.path, command, how | summary(self.tests), device=device)


def summary(tests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a file says of tests: each property, and the names of the others, file by file."""
    properties = {name: test for name, test in sorted(tests.items()) if "examples" in test}
    others: dict[str, list[str]] = {}
    for name, test in sorted(tests.items()):
        if name not in properties and test["outcome"] == "passed":
            file, _, rest = name.partition("::")
            others.setdefault(file, []).append(rest)
    return {
        "outcomes": dict(Counter(test["outcome"] for test in tests.values())),
        "not passed": {name: test["outcome"] for name, test in sorted(tests.items()) if test["outcome"] != "passed"},
        "examples": sum(test["examples"] for test in properties.values()),
        "properties": properties,
        "other tests that passed": others,
    }


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Records of one suite on one machine as one, the oldest first.

    Raises:
        TwofoldError: If they come from different devices or versions.
    """
    first, tests = parts[0], {}
    for part in parts:
        for key in ("device", "python", "versions"):
            if part[key] != first[key]:
                raise TwofoldError(f"records of different machines: {key} {part[key]} and {first[key]}")
        found = part["results"]
        names = {f"{file}::{rest}" for file, all in found["other tests that passed"].items() for rest in all}
        now = {name: {"outcome": outcome} for name, outcome in found["not passed"].items()} | found["properties"]
        for name, test in (now | {name: {"outcome": "passed"} for name in names}).items():
            before = tests.get(name, {})
            if before.get("outcome") == test["outcome"] == "passed" and "examples" in before and "examples" in test:
                features = Counter(before["features"]) + Counter(test["features"])
                sums = {key: before[key] + test[key] for key in ("examples", "discarded", "seconds")}
                test = test | sums | {"features": dict(sorted(features.items()))}
            tests[name] = test
    runs = [
        {"command": part["command"], "date": part["date"]}
        | {key: part["results"][key] for key in ("backends", "seconds", "examples asked for", "outcomes")}
        for part in parts
    ]
    provenance = {key: value for key, value in first.items() if key != "results"}
    return provenance | {"command": "several runs, listed", "results": {"runs": runs} | summary(tests)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Put the records of a run's parts together.")
    parser.add_argument("all", type=Path, help="the file to write")
    parser.add_argument("parts", type=Path, nargs="+", help="records, the oldest first")
    options = parser.parse_args()
    try:
        found = merged([json.loads(part.read_text()) for part in options.parts])
    except (TwofoldError, OSError, KeyError, json.JSONDecodeError) as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    options.all.write_text(json.dumps(found, indent=1) + "\n")
    print(found["results"]["outcomes"], found["results"]["examples"], "examples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
