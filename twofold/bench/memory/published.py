"""The published figures, what they are called here, and why ours differ where they do.

Source: Kwon et al., *Efficient Memory Management for Large Language Model Serving with PagedAttention* (2023), figures
2, 13, 15 and 16 and sections 6.2 to 6.4. Its baselines are Orca (Max), (Pow2) and (Oracle).

Where a figure is not met within a tenth, a row names one difference in the set-up, and gives the figure once more with
that one thing changed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from twofold.bench.memory.cases import (
    ALPACA,
    OPT_13B,
    OPT_66B,
    OPT_175B,
    SHAREGPT,
    STRATEGIES,
    TRANSLATION,
    Case,
    Figures,
    Served,
)

WITHIN = 0.10

SHAPE = "the shape of the lengths: log-normal (sigma 1), which has more short ones and a longer tail"
STEP_TIME = (
    "the time of a step: ours is what a data sheet allows; by Little's law from their own figures theirs took two to "
    "four times as long, and depended on the sequences more than on their arithmetic"
)
GAPS = (
    "two things: a step takes as long as theirs did; and reservations lie in the smallest gap that fits, where a buddy "
    "allocator rounds most of these requests, of 145 tokens, up to 256. Either alone leaves a sixth or more"
)

Runs = Mapping[Case, Figures]


@dataclass(frozen=True)
class Claim:
    """One published figure.

    Attributes:
        published: Its value, or the ends of its range.
        cases: What has to be simulated.
        ours: The figure from what came of them.
        changed_cases: The same cases with one thing changed (once two); simulated where ours is not within a tenth.
        change: Which, and why: in words.
        unit: Of the figures.
    """

    figure: str
    published: tuple[float, ...]
    cases: tuple[Case, ...]
    ours: Callable[[list[Figures]], float]
    change: str = ""
    changed_cases: tuple[Case, ...] = ()
    unit: str = ""

    def gap(self, runs: Runs) -> float:
        """Of ours."""
        return gap(self.ours([runs[case] for case in self.cases]), self.published)

    def row(self, runs: Runs) -> dict[str, Any]:
        """Ours beside the published figure."""
        ours = self.ours([runs[case] for case in self.cases])
        found: dict[str, Any] = {
            "figure": self.figure,
            "unit": self.unit,
            "published": list(self.published),
            "ours": ours,
            "gap": self.gap(runs),
        }
        if self.changed_cases and abs(found["gap"]) > WITHIN:
            changed = self.ours([runs[case] for case in self.changed_cases])
            found |= {"change": self.change, "changed": changed, "changed_gap": gap(changed, self.published)}
        return found


def gap(ours: float, published: tuple[float, ...]) -> float:
    """How far off, as a share of the published figure; 0 within its range."""
    nearest = min(max(ours, min(published)), max(published))
    return ours / nearest - 1


def claims(served: Served = OPT_13B, *, quick: bool = False) -> list[Claim]:
    """All of them, with the memory of ``served`` where the paper has OPT-13B's. Quick: without the larger models."""
    return [
        *_slots(served),
        *_batched(served),
        *_saved(served),
        *_sustained([served] if quick else [served, OPT_66B, OPT_175B]),
        *_shared_prefix(served),
        *_last_blocks(served),
    ]


def _percent(name: str) -> Callable[[list[Figures]], float]:
    return lambda runs: 100 * runs[0][name]


def _slots(served: Served) -> Iterator[Claim]:
    """Figure 2. Waste means something where memory is wanted: somebody is always waiting."""
    for strategy, published in zip(STRATEGIES, (20.4, 26.8, 38.2, 96.3)):
        case = Case(SHAREGPT, strategy, served=served)
        changed = replace(case, workload=replace(SHAREGPT, shape="log-normal"))
        name = f"slots holding tokens, {strategy}"
        yield Claim(name, (published,), (case,), _percent("tokens"), SHAPE, (changed,), unit="%")


def _batched(served: Served) -> Iterator[Claim]:
    """Figure 13."""
    for workload, rate, figures in (
        (SHAREGPT, 2.0, (7.00, 9.81, 13.62, 30.42)),
        (ALPACA, 30.0, (7.00, 43.24, 72.75, 132.44)),
    ):
        for strategy, published in zip(STRATEGIES, figures):
            case = Case(workload, strategy, rate, served)
            yield Claim(
                f"batched requests, {workload.name} {rate:g} req/s, {strategy}",
                (published,),
                (case,),
                lambda runs: runs[0]["batched"],
                STEP_TIME,
                (replace(case, step_time="published"),),
            )


def _saved(served: Served) -> Iterator[Claim]:
    """Figure 15, and section 6.3 for ShareGPT: at such a rate that as many sequences are asked for as in figure 13."""
    text = "the text: of the long answers only the one whose beams run side by side the longest"
    for workload, rate, way, published in (
        (ALPACA, 30.0, "parallel", ((6.1,), (8.5,), (9.8,))),
        (ALPACA, 30.0, "beam", ((37.6,), (53.1,), (55.2,))),
        (SHAREGPT, 2.0, "parallel", ((16.2, 30.5),) * 3),
        (SHAREGPT, 2.0, "beam", ((44.3, 66.3),) * 3),
    ):
        for count, figures in zip((2, 4, 6), published):
            case = Case(workload, "paged", rate / count, served)
            change, changed = SHAPE, replace(case, workload=replace(workload, shape="log-normal"))
            if way == "parallel":
                case, changed = replace(case, num_samples=count), replace(changed, num_samples=count)
            elif workload is ALPACA:
                case, changed = replace(case, num_beams=count), replace(changed, num_beams=count)
            else:
                case = replace(case, num_beams=count, forks="long")
                change, changed = text, replace(case, forks="divergent")
            name = f"saved by sharing, {workload.name}, {way} {count}"
            yield Claim(name, figures, (case,), _percent("saved"), change, (changed,), unit="%")


def _sustained(models: list[Served]) -> Iterator[Claim]:
    """Section 6.2, a range over models: the rate at which a queue does not grow is what is done when it never ends."""
    for baseline, published in (("oracle", (1.7, 2.7)), ("max", (2.7, 8.0))):
        for model in models:
            cases = tuple(Case(SHAREGPT, strategy, served=model) for strategy in ("paged", baseline))
            changed = tuple(replace(case, step_time="published") for case in cases)
            yield Claim(
                f"sustained rate, ShareGPT, {model.name}, paged over {baseline}",
                published,
                cases,
                _ratio,
                STEP_TIME,
                changed,
                unit="x",
            )


def _shared_prefix(served: Served) -> Iterator[Claim]:
    """Section 6.4, LLaMA-13B, which has OPT-13B's sizes."""
    for prefix_len, published in ((80, 1.67), (341, 3.58)):
        cases = tuple(
            Case(TRANSLATION, strategy, served=served, prefix_len=prefix_len) for strategy in ("paged", "oracle")
        )
        paged, oracle = (replace(case, step_time="published") for case in cases)
        changed = paged, replace(oracle, allocator="best fit")
        name = f"throughput with a shared prefix of {prefix_len}, paged over oracle"
        yield Claim(name, (published,), cases, _ratio, GAPS, changed, unit="x")


def _ratio(runs: list[Figures]) -> float:
    return runs[0]["requests_per_s"] / runs[1]["requests_per_s"]


def _last_blocks(served: Served) -> Iterator[Claim]:
    """Sections 1 and 4: waste «under 4 %» is the end of each sequence's last block."""
    change = (
        "none mends it: half a block a sequence is lost, and these are short; with all lengths at their means more is"
    )
    for workload in (SHAREGPT, ALPACA):
        case = Case(workload, "paged", served=served)
        constant = replace(case, workload=replace(workload, shape="constant"))
        name = f"taken and empty, in last blocks, {workload.name}"
        yield Claim(name, (0.0, 4.0), (case,), _percent("last_blocks"), change, (constant,), unit="%")


BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def block_size_cases(served: Served = OPT_13B, *, quick: bool = False) -> dict[str, list[Case]]:
    """Every block size, for long sequences and for short ones; quick: every third size."""
    sizes = BLOCK_SIZES[1::3] if quick else BLOCK_SIZES
    return {
        workload.name: [Case(workload, "paged", served=served, block_size=size) for size in sizes]
        for workload in (SHAREGPT, ALPACA)
    }


def allocator_cases(served: Served = OPT_13B) -> list[Case]:
    """What the allocator has to do with it: the same reservations in the smallest gap that fits."""
    return [
        Case(workload, strategy, served=served, allocator=allocator)
        for workload in (SHAREGPT, ALPACA)
        for strategy in ("max", "pow2", "oracle")
        for allocator in ("buddy", "best fit")
    ]


def all_cases(served: Served = OPT_13B, *, quick: bool = False) -> list[Case]:
    """Every simulation that a table or a plot needs, each once; but for those with one thing changed."""
    of_claims = [case for claim in claims(served, quick=quick) for case in claim.cases]
    of_sizes = [case for cases in block_size_cases(served, quick=quick).values() for case in cases]
    return [*dict.fromkeys([*of_claims, *of_sizes, *allocator_cases(served)])]


def changed_cases(runs: Runs, served: Served = OPT_13B, *, quick: bool = False) -> list[Case]:
    """Of the claims that are not met, the simulations with one thing changed."""
    unmet = [claim for claim in claims(served, quick=quick) if abs(claim.gap(runs)) > WITHIN]
    return [*dict.fromkeys(case for claim in unmet for case in claim.changed_cases)]


def best_block_size(rates: Mapping[int, float]) -> int:
    """The largest block that costs no more than a fiftieth of the best throughput.

    The simulation charges nothing for a block's overhead (its entry in the table, a kernel that reads short pieces), so
    in it the smallest is best; a larger one is preferred until it costs something.

    Args:
        rates: Requests a second, by block size.

    Example:
        >>> best_block_size({8: 100.0, 16: 99.0, 32: 95.0})
        16
    """
    return max(size for size, rate in rates.items() if rate >= 0.98 * max(rates.values()))
