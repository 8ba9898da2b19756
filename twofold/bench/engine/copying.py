"""Speculation by look-up where it pays: a text that the model has read twice, and writes once more.

One request at a time, greedy, with drafts and without, in one run: tokens a second after the first one, which share of
the drafts was accepted, and how many of the answers are the same, token for token. (In the default mode a product of
several tokens may round otherwise than one of a single token, and turn a tie; the deterministic mode has no such
choice, and is measured beside it.)
"""

import gc
import statistics
from collections.abc import Iterator
from typing import Any

from reference.batching.request import SamplingParams
from twofold.bench.engine import Figure, Target
from twofold.llm import LLM
from twofold.outputs import RequestOutput

NUM_DRAFTS = 8
NUM_TOKENS = 192
ROUNDS = 2  # the last one counts
AT_LEAST = Target(2.0)

TEXTS = (
    "A paged cache keeps the keys and values of a sequence in blocks of a fixed size, wherever there is room for them. "
    "A table says which block comes after which, as the page table of an operating system does. Nothing has to be "
    "reserved for tokens that may never come, and what is left empty is at most the end of the last block.",
    "def largest(numbers):\n    best = numbers[0]\n    for number in numbers[1:]:\n        if number > best:\n"
    "            best = number\n    return best\n\n\ndef smallest(numbers):\n    best = numbers[0]\n"
    "    for number in numbers[1:]:\n        if number < best:\n            best = number\n    return best\n",
    "The kettle stood on the stove, and the cat sat beside the kettle. When the kettle began to sing, the cat got up, "
    "walked once around the kitchen, and sat down on the other side. Nobody knew why the cat did so, but it did so "
    "every morning, and after a while nobody asked any more.",
    "Flour, 500 g. Water, 350 g. Salt, 10 g. Yeast, 3 g. Mix, wait an hour, fold, wait another hour, fold again. Shape "
    "a loaf, let it rest under a cloth until it has grown by half, and bake it at 230 degrees for 40 minutes.",
)


class Copying:
    """The task on an engine of one model.

    Args:
        settings: Of `LLM`.
    """

    def __init__(self, model: str | None, num_drafts: int, **settings: Any):
        how = f"ngram:{num_drafts}" if num_drafts else None
        self.llm = LLM(model, speculate=how, enable_prefix_caching=False, max_num_seqs=1, **settings)
        self.params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

    def run(self) -> list[RequestOutput]:
        """Every text, one after the other."""
        return [self.llm.generate(f"{text}\n\n{text}\n\n", self.params)[0] for text in TEXTS]

    def drafts(self) -> tuple[int, int]:
        """In a run: how many tokens were drafted, and how many of these accepted."""
        records: list[dict[str, Any]] = []
        self.llm.engine.trace = records.append
        self.run()
        self.llm.engine.trace = None
        steps = [record for record in records if record["kind"] == "step"]
        drafted = [(step["sequences"][0]["drafts"], step["output"]) for step in steps if step["sequences"]]
        accepted = [len(output[0]["tokens"]) - 1 for drafts, output in drafted if drafts]
        return sum(drafts for drafts, _ in drafted), sum(accepted)


def tokens_per_second(answers: list[RequestOutput]) -> float:
    """After the first token of each."""
    return 1 / statistics.mean(answer.metrics.time_between_tokens for answer in answers)  # type: ignore[union-attr]


def figures(model: str | None, backend: str, name: str, **settings: Any) -> Iterator[Figure]:
    """Of a model, in one mode."""
    found: dict[int, list[RequestOutput]] = {}
    accepted = drafted = 0
    for num_drafts in (0, NUM_DRAFTS):
        copying = Copying(model, num_drafts, backend=backend, **settings)
        found[num_drafts] = [copying.run() for _ in range(ROUNDS)][-1]
        if num_drafts:
            drafted, accepted = copying.drafts()
        of_model = copying.llm.checkpoint.name
        del copying
        gc.collect()  # its memory is the next one's
    plain, drafting = (tokens_per_second(answers) for answers in found.values())
    pairs = zip(*found.values(), strict=True)
    same = [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in pairs]
    for what, unit, value, target in (
        ("without drafts", "tokens/s", plain, None),
        (f"{NUM_DRAFTS} drafts by look-up", "tokens/s", drafting, None),
        ("with drafts", "times", drafting / plain, AT_LEAST),
        ("accepted drafts", "%", 100 * accepted / max(drafted, 1), None),
        ("the same answers", "%", 100 * statistics.mean(same), Target(100.0)),
    ):
        yield Figure(of_model, f"{name}: {what}", unit, value, target=target)


def run(model: str | None) -> Iterator[Figure]:
    """On a GPU in bfloat16: in the default mode, and in the deterministic one."""
    for name, deterministic in (("copying", False), ("copying, deterministic", True)):
        yield from figures(model, "fast", name, dtype="bfloat16", deterministic=deterministic)
