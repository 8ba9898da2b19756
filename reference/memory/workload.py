"""Requests to study memory with: lengths and arrivals.

Of the published traces only the mean lengths are known here. Lengths are drawn from the *geometric* distribution: of
all distributions on 1, 2, ... with a given mean it assumes least (its entropy is the largest), and it is what comes out
if every token has the same chance of being the last. So the published mean is all that goes in; there is no width to
choose. To see what depends on this, there are two more shapes: *log-normal* with a sigma of 1, which has a longer tail,
and *constant*, where all have the mean length.

Prompt and answer are drawn apart from each other, and pairs longer than the context are drawn again; the means hold for
what remains. What this cannot show: that a real prompt's length says something of its answer's.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray as Array

from reference.batching.request import Request, SamplingParams

SIGMA = 1.0  # of the log-normal shape
CHUNK = 1024  # requests drawn at a time

Shape = Literal["geometric", "log-normal", "constant"]


@dataclass(frozen=True)
class Workload:
    """How long prompts and answers are.

    Attributes:
        mean_prompt_len, mean_output_len: Tokens.
        max_model_len: Tokens of the longest pair.
        shape: Of both distributions.
    """

    name: str
    mean_prompt_len: float
    mean_output_len: float
    max_model_len: int = 2048
    shape: Shape = "geometric"

    def lengths(self, count: int, rng: np.random.Generator) -> Int64[Array, "count 2"]:
        """Prompt and output lengths."""
        distributions = np.cumsum(_distributions(self), axis=1)
        kept = np.zeros((0, 2), np.int64)
        while len(kept) < count:
            drawn = [1 + np.searchsorted(upto, rng.random(2 * count)) for upto in distributions]
            pairs = np.stack(drawn, axis=1)
            kept = np.concatenate((kept, pairs[pairs.sum(axis=1) <= self.max_model_len]))
        return kept[:count]


@cache
def _distributions(workload: Workload) -> Float64[Array, "2 max_len"]:
    """Chances of each prompt and output length, such that of the pairs that fit the means are those wanted."""
    wanted = np.array([workload.mean_prompt_len, workload.mean_output_len])
    lengths = np.arange(1, workload.max_model_len)
    scales = wanted
    for _ in range(50):
        chances = np.stack([_chances(workload.shape, lengths, scale) for scale in scales])
        the_other_fits = np.cumsum(chances, axis=1)[::-1, ::-1]
        scales = scales * wanted / [np.average(lengths, weights=w) for w in chances * the_other_fits]
    return chances


def _chances(shape: Shape, lengths: Array, scale: float) -> Array:
    if shape == "geometric":
        weights = (1 - 1 / scale) ** lengths
    elif shape == "constant":
        weights = np.maximum(0, 1 - np.abs(lengths - scale))  # the two whole numbers beside it
    else:
        weights = np.exp(-((np.log(lengths / scale) / SIGMA) ** 2) / 2) / lengths
    return weights / weights.sum()


def requests(
    workload: Workload,
    *,
    rate: float,
    seed: int,
    prefix_len: int = 0,
    num_samples: int = 1,
    num_beams: int = 0,
) -> Iterator[Request]:
    """Requests as they come, without end.

    Args:
        rate: Requests a second on average, none knowing of the others (Poisson); inf: all are there at once.
        prefix_len: Tokens with which every prompt begins, before its own.
        num_samples: Parallel samples of each.
        num_beams: Of a beam search, instead; which recorded one it goes by, its seed says (`SimulatedRunner`).
    """
    rng = np.random.default_rng(seed)
    prefix, arrival = [0] * prefix_len, 0.0
    for index in itertools.count():
        if index % CHUNK == 0:
            lengths = workload.lengths(CHUNK, rng).tolist()
            gaps = rng.exponential(1 / rate, CHUNK).tolist()
        prompt_len, output_len = lengths[index % CHUNK]
        arrival += gaps[index % CHUNK]
        params = SamplingParams(n=num_samples, max_tokens=output_len, ignore_eos=True, seed=index)
        own = [index + 1] * prompt_len  # no two prompts are alike but in the prefix
        yield Request(str(index), prefix + own, params, num_beams=num_beams, arrival_time=arrival)
