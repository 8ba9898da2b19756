"""A pytest plugin that keeps what a run tried: `pytest -p twofold.conformance.record --record FILE`.

For each test: its outcome and its seconds; for a property also how many examples Hypothesis ran, how many of them it
discarded, and how many had each feature that a strategy reports (several sequences, shared blocks, poisoned slots...).
With the machine's name and the versions beside it, that is the evidence of a long run, which CI does not repeat.

`--at-most N` reduces every property to N examples, for tools under which a kernel takes a hundred times as long.
"""

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.statistics import collector

from twofold.bench.report import gpu_name, save

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

        properties = {name: test for name, test in sorted(self.tests.items()) if "examples" in test}
        results = {
            "backends": os.environ.get("TWOFOLD_BACKENDS", "all"),
            "seconds": round(time.time() - self.start),
            "outcomes": dict(Counter(test["outcome"] for test in self.tests.values())),
            "not passed": sorted(name for name, test in self.tests.items() if test["outcome"] != "passed"),
            "examples asked for": settings().max_examples,
            "examples": sum(test["examples"] for test in properties.values()),
            "properties": properties,
        }
        command = " ".join(["pytest", *sys.argv[1:]])
        save(self.path, command, results, device=gpu_name() if torch.cuda.is_available() else None)
