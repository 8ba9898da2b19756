"""The copying task on a small model: what it counts. How fast it is, a GPU says."""

import pytest

from twofold.bench.engine import copying
from twofold.conformance.strategies.small_checkpoint import small_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture(autouse=True)
def small_task(monkeypatch):
    monkeypatch.setattr(copying, "TEXTS", ("hello world 123, hello", "12 12 12"))
    monkeypatch.setattr(copying, "NUM_TOKENS", 120)


def test_figures_are_of_the_same_answers(path):
    """Greedy answers are the same with drafts; some of these are accepted."""
    found = {figure.name: figure for figure in copying.figures(str(path), "plain_torch", "copying")}
    assert [figure.unit for figure in found.values()] == ["tokens/s", "tokens/s", "times", "%", "%"]
    without, drafting = found["copying: without drafts"].value, found["copying: 8 drafts by look-up"].value
    assert found["copying: with drafts"].value == pytest.approx(drafting / without)
    assert found["copying: with drafts"].target == copying.AT_LEAST
    assert found["copying: the same answers"].value == 100
    assert 0 <= found["copying: accepted drafts"].value <= 100


def test_accepted_drafts_are_counted(path):
    """Tokens of a run are those of its steps without drafts, and one more than was accepted of the others."""
    task = copying.Copying(str(path), 3, backend="plain_torch")
    drafted, accepted = task.drafts()
    records = []
    task.llm.engine.trace = records.append
    answers = task.run()
    assert all(len(answer.outputs[0].token_ids) == 120 for answer in answers)
    steps = [record for record in records if record["kind"] == "step"]
    assert drafted == sum(seq["drafts"] for step in steps for seq in step["sequences"])
    assert accepted == 120 * len(answers) - sum(bool(step["output"]) for step in steps)
    assert 0 < accepted <= drafted
