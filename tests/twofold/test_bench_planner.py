"""`twofold bench planner`, on a small model."""

import json

from twofold.cli import run
from twofold.conformance.strategies.small_checkpoint import small_checkpoint


def test_it_prints_and_keeps_what_steps_take(tmp_path):
    """Of a step of all prompts, of a token of each, and of one alone."""
    model, file = small_checkpoint(tmp_path), tmp_path / "planner.json"
    assert run(["bench", "planner", "-m", str(model), "--results", str(file)]) == 0
    steps = json.loads(file.read_text())["results"]
    assert list(steps) == ["tokens: 256, logits: 8", "tokens: 8, logits: 8", "tokens: 1, logits: 1"]
    for figures in steps.values():
        assert figures["arena_bytes"] <= 1.05 * figures["bound_bytes"] < figures["total_bytes"]
