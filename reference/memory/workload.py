"""Requests to study memory with: lengths and arrivals.

Of the published traces only the mean lengths are known here. Lengths are drawn from the *geometric* distribution: of
all distributions on 1, 2, ... with a given mean it assumes least (its entropy is the largest), and it is what comes out
if every token has the same chance of being the last. So the published mean is all that goes in; there is no width to
choose. Prompt and answer are drawn apart from each other, and pairs longer than the context are drawn again; the means
hold for what remains.

What this cannot show: that a real prompt's length says something of its answer's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray as Array

from reference.batching.request import Request, SamplingParams


@dataclass(frozen=True)
class Workload:
    """How long prompts and answers are.

    Attributes:
        mean_prompt_len, mean_output_len: Tokens.
        max_model_len: Tokens of the longest pair.
    """

    name: str
    mean_prompt_len: float
    mean_output_len: float
    max_model_len: int = 2048

    def lengths(self, count: int, rng: np.random.Generator) -> Int64[Array, "count 2"]:
        """Prompt and output lengths."""
        means = self._untruncated_means()
        kept = np.zeros((0, 2), np.int64)
        while len(kept) < count:
            drawn = rng.geometric(1 / means, size=(2 * count, 2))
            kept = np.concatenate((kept, drawn[drawn.sum(axis=1) <= self.max_model_len]))
        return kept[:count]

    def _untruncated_means(self) -> Float64[Array, " 2"]:
        """Means of geometric distributions whose pairs that fit into the context have the means wanted."""
        wanted = np.array([self.mean_prompt_len, self.mean_output_len])
        lengths = np.arange(1, self.max_model_len)
        means = wanted
        for _ in range(50):
            prompt, output = ((1 - 1 / mean) ** (lengths - 1) / mean for mean in means)
            fits = np.cumsum(output)[::-1], np.cumsum(prompt)[::-1]  # of each length: the other one leaves room
            weights = prompt * fits[0], output * fits[1]
            means = means * wanted / [np.average(lengths, weights=weight) for weight in weights]
        return means


def poisson_arrivals(rate: float, count: int, rng: np.random.Generator) -> Float64[Array, " count"]:
    """Seconds at which requests come, ``rate`` a second on average, none knowing of the others; inf: all at once."""
    return np.cumsum(rng.exponential(1 / rate, count))


def requests(
    workload: Workload,
    *,
    rate: float,
    count: int,
    seed: int,
    prefix_len: int = 0,
    num_samples: int = 1,
    num_beams: int = 0,
) -> Iterator[Request]:
    """Requests as they come.

    Args:
        rate: Requests a second; inf: all at once, so that somebody is always waiting.
        prefix_len: Tokens with which every prompt begins, before its own.
        num_samples: Parallel samples of each.
        num_beams: Of a beam search, instead; its forks are those that `SimulatedRunner` knows by the request's seed.
    """
    rng = np.random.default_rng(seed)
    arrivals = poisson_arrivals(rate, count, rng).tolist()
    prefix = [0] * prefix_len
    for index, (prompt_len, output_len) in enumerate(workload.lengths(count, rng).tolist()):
        params = SamplingParams(n=num_samples, max_tokens=output_len, ignore_eos=True, seed=index)
        own = [index + 1] * prompt_len  # no two prompts are alike but in the prefix
        yield Request(str(index), prefix + own, params, num_beams=num_beams, arrival_time=arrivals[index])
