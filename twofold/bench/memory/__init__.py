"""`twofold bench memory`: the published figures of paging and sharing, reproduced by simulation.

`cases` says what is simulated, `published` what should come of it, `forks` where beams fork, `show` and `plots` how it
is told.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reference.memory.beam_forks import BeamForks
from twofold.bench.memory.cases import OPT_13B, Case, Figures, measure
from twofold.bench.memory.published import (
    all_cases,
    allocator_cases,
    best_block_size,
    block_size_cases,
    changed_cases,
    claims,
)
from twofold.bench.report import Unfinished

LENGTH = {"num_finished": 512, "num_answers": 10}  # of each simulation: see `measure`
QUICK_LENGTH = {"num_finished": 24, "num_answers": 2}


class Sweep:
    """All simulations, kept as they are done: one that was interrupted goes on from there.

    Args:
        results: Where the results will go; what is done is kept beside it until all is.
        forks: Recorded beams, of "short" and of "long" answers.
        num_slots: Of the memory that has OPT-13B's 15.7 K tokens in the paper.

    Attributes:
        settings: What the figures depend on.
    """

    def __init__(
        self, results: Path, forks: Mapping[str, BeamForks], *, seed: int, quick: bool, num_slots: int | None = None
    ):
        self.forks = forks
        self.quick = quick
        self.served = OPT_13B if num_slots is None else replace(OPT_13B, num_slots=num_slots)
        self.settings = {
            "seed": seed,
            **(QUICK_LENGTH if quick else LENGTH),
            "num_slots": self.served.num_slots,
            "forks": {kind: recorded.model for kind, recorded in forks.items()},
        }
        self.unfinished = Unfinished(results, self.settings)

    @property
    def done(self) -> dict[str, Figures]:
        """What an interrupted sweep with the same settings has found already, by the case's name."""
        return self.unfinished.done

    def cases(self) -> list[Case]:
        """All that has to be simulated, but for what `changed_cases` adds where a figure is not met."""
        return all_cases(self.served, quick=self.quick)

    def run(self, on_case: Callable[[Case, int], None] = lambda case, total: None) -> dict[str, Any]:
        """Simulate what is left, then put it together. ``on_case`` hears what begins, and how many there are in all."""
        cases = self.cases()
        for case in cases:
            case.simulation(self.forks[case.forks])  # whatever is wrong with one is said before an hour of others
        figures = self._run_all(cases, lambda case: on_case(case, len(cases)))
        more = changed_cases(figures, self.served, quick=self.quick)
        figures |= self._run_all(more, lambda case: on_case(case, len(cases) + len(more)))
        return self.results(figures)

    def _run_all(self, cases: list[Case], on_case: Callable[[Case], None]) -> dict[Case, Figures]:
        for case in cases:
            on_case(case)
            if case.name not in self.done:
                self.unfinished.keep(case.name, self._measure(case))
        return {case: self.done[case.name] for case in cases}

    def _measure(self, case: Case) -> Figures:
        length = QUICK_LENGTH if self.quick else LENGTH
        return measure(case, seed=self.settings["seed"], forks=self.forks, **length)

    def results(self, figures: Mapping[Case, Figures]) -> dict[str, Any]:
        """Every table."""
        sizes = block_size_cases(self.served, quick=self.quick)
        rates = {
            name: {case.block_size: figures[case]["requests_per_s"] for case in cases} for name, cases in sizes.items()
        }
        return {
            "settings": self.settings,
            "claims": [claim.row(figures) for claim in claims(self.served, quick=self.quick)],
            "allocators": [
                {
                    "workload": case.workload.name,
                    "strategy": case.strategy,
                    "allocator": case.allocator,
                    **figures[case],
                }
                for case in allocator_cases(self.served)
            ],
            "block_sizes": {
                name: [{"block_size": case.block_size, **figures[case]} for case in cases]
                for name, cases in sizes.items()
            },
            "best_block_sizes": {name: best_block_size(of_sizes) for name, of_sizes in rates.items()},
            "simulations": {case.name: of_case for case, of_case in figures.items()},
        }
