"""Which beam goes on from which: recorded from a model, so that memory can be studied without one.

How much beams share is decided by where they fork, and that is the model's doing: a sure model keeps going back to one
beam, an unsure one carries several far. The numbers that a search compares cannot be made up, so this takes them from a
real search, as parents: ``[0, 0, 2]`` says that of three beams the first has two children and the second none.

A recording is replayed from any of its steps, and from its beginning again when it ends.
"""

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reference.batching.beams import BeamSearch
from reference.batching.engine import Engine
from reference.batching.request import Request, SamplingParams, Sequence

Parents = list[int]
"""Of each beam, best first, its place among the beams of the step before."""


class RecordingSearch(BeamSearch):
    """A beam search that remembers its forks.

    Attributes:
        steps: The parents in each step since the prompt, the first fork (all from one) left out.
    """

    def __init__(self, request: Request):
        super().__init__(request)
        self.steps: list[Parents] = []

    def advance(
        self, beams: list[Sequence], scores: np.ndarray, rows: np.ndarray, tokens: np.ndarray
    ) -> list[tuple[Sequence, int]]:
        """As `BeamSearch.advance`."""
        successors = super().advance(beams, scores, rows, tokens)
        if successors and len(beams) > 1:
            self.steps.append([beams.index(parent) for parent, _ in successors])
        return successors


@dataclass(frozen=True)
class BeamForks:
    """Recorded searches, by their number of beams.

    Attributes:
        model: Whose they are.
        searches: Of each number of beams the searches, each a list of steps.

    Example:
        >>> forks = BeamForks("by hand", {2: [[[0, 1], [0, 0], [1, 0]]]})
        >>> [forks.parents(2, search=0, step=step) for step in range(4)]
        [[0, 1], [0, 0], [1, 0], [0, 1]]
    """

    model: str
    searches: dict[int, list[list[Parents]]]

    def parents(self, num_beams: int, *, search: int, step: int) -> Parents:
        """Who goes on from whom in a step of a search; both numbers may be any, and the same give the same.

        Raises:
            ValueError: If no search with so many beams was recorded.
        """
        if num_beams not in self.searches:
            known = ", ".join(map(str, self.searches)) or "none"
            raise ValueError(f"BeamForks: num_beams: expected one of those recorded ({known}), got {num_beams}")
        recorded = self.searches[num_beams]
        turn, index = divmod(search, len(recorded))
        steps = recorded[index]
        return steps[(step + 37 * turn) % len(steps)]  # the second time round it begins elsewhere

    def save(self, path: Path) -> None:
        """Write it as JSON, a step as its digits: ``"0012 0123"`` are two steps of four beams."""
        searches = {
            beams: [" ".join("".join(map(str, parents)) for parents in steps) for steps in recorded]
            for beams, recorded in self.searches.items()
        }
        path.write_text(json.dumps({"model": self.model, "searches": searches}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "BeamForks":
        """Read what `save` wrote."""
        content = json.loads(path.read_text())
        searches = {
            int(beams): [[[int(digit) for digit in parents] for parents in steps.split()] for steps in recorded]
            for beams, recorded in content["searches"].items()
        }
        return cls(content["model"], searches)


def record(
    engine: Engine, prompts: SequenceOf[list[int]], *, num_beams: int, num_tokens: int, length_penalty: float = 1.0
) -> list[list[Parents]]:
    """The forks of a beam search after each prompt, ``num_tokens`` long whatever the model would rather end."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    searches = []
    for index, prompt in enumerate(prompts):
        request = Request(
            f"{num_beams} beams, prompt {index}", prompt, params, num_beams=num_beams, length_penalty=length_penalty
        )
        engine.add(request)
        request.search = RecordingSearch(request)
        searches.append(request.search)
    while engine.has_unfinished():
        engine.step()
    return [search.steps for search in searches]
