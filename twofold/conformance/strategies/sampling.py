"""Inputs for the sampling ops: logits with ties and masks, parameters at their ends, ragged beams and drafts."""

from dataclasses import dataclass, fields
from itertools import product
from typing import Any, Self

import numpy as np
from hypothesis import strategies as st

from reference.numerics.arrays import dtype_named
from twofold.conformance.strategies.numerics import FLOAT_DTYPES, with_strides


@dataclass
class PerRow:
    """Arguments of an op in its own order, all of them arrays with a row for each row."""

    def args(self) -> tuple[np.ndarray, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def rows(self, rows: Any) -> Self:
        return type(self)(*(array[rows] for array in self.args()))


@dataclass
class Filtering(PerRow):
    """What `filter_logits` takes."""

    logits: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray


@dataclass
class Sampling(Filtering):
    """What `sample` takes."""

    seeds: np.ndarray
    positions: np.ndarray
    sample_indices: np.ndarray

    def filtering(self) -> Filtering:
        return Filtering(*self.args()[:5])


@dataclass
class Penalties(PerRow):
    """What `penalize` takes."""

    logits: np.ndarray
    history: np.ndarray
    prompt_lens: np.ndarray
    repetition_penalty: np.ndarray
    presence_penalty: np.ndarray
    frequency_penalty: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray


@dataclass
class Beams:
    """What `beam_scores` takes."""

    logits: np.ndarray
    scores: np.ndarray
    cu_beams: np.ndarray
    num_candidates: int


@dataclass
class Drafted:
    """What `verify` takes."""

    target_probs: np.ndarray
    draft_probs: np.ndarray | None
    draft_tokens: np.ndarray
    cu_drafts: np.ndarray
    seeds: np.ndarray
    positions: np.ndarray
    sample_indices: np.ndarray

    def args(self) -> tuple[np.ndarray | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def seq(self, seq: int) -> "Drafted":
        """One sequence, alone."""
        start, end = self.cu_drafts[seq], self.cu_drafts[seq + 1]
        one, drafts = slice(seq, seq + 1), slice(start, end)
        draft_probs = None if self.draft_probs is None else self.draft_probs[drafts]
        cu_drafts = np.array([0, end - start], np.int32)
        target_probs = self.target_probs[start + seq : end + seq + 1]
        named = (self.seeds[one], self.positions[one], self.sample_indices[one])
        return Drafted(target_probs, draft_probs, self.draft_tokens[drafts], cu_drafts, *named)


# ---- logits and what is done with them --------------------------------------------------------------------------


@st.composite
def logit_rows(draw, num_rows: int) -> np.ndarray:
    """Rows of logits: smooth, peaked, huge, with ties or all equal; some tokens masked, at least one finite a row."""
    vocab_size = draw(st.sampled_from([1, 2, 3, 7, 33, 600]), label="vocab_size")
    dtype = dtype_named(draw(st.sampled_from(FLOAT_DTYPES), label="dtype"))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    spread = draw(st.sampled_from([0.0, 1.0, 5.0, 3e4]), label="spread")
    logits = rng.normal(scale=spread, size=(num_rows, vocab_size)).clip(-6e4, 6e4)
    if draw(st.booleans(), label="ties"):
        logits = np.round(logits)
    masked = rng.random(logits.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]), label="share masked")
    masked[np.arange(num_rows), rng.integers(0, vocab_size, num_rows)] = False
    logits[masked] = -np.inf
    logits = logits.astype(dtype)
    return with_strides(draw, logits)


def floats(draw, values: list[float], num_rows: int, label: str) -> np.ndarray:
    drawn = draw(st.lists(st.sampled_from(values), min_size=num_rows, max_size=num_rows), label=label)
    return np.array(drawn, np.float32)


def integers(draw, values: st.SearchStrategy[int], num_rows: int, label: str, dtype: type = np.int32) -> np.ndarray:
    return np.array(draw(st.lists(values, min_size=num_rows, max_size=num_rows), label=label), dtype)


# Each filter off, at its ends, and between; the simplest first. top_k as a number, or a share of the vocabulary.
ROW_FILTERS = list(
    product(
        [1.0, 0.0, 1e-30, 0.1, 0.7, 1.7, 100.0],
        [0, 1, 2, 0.5, 1.0, 1.5, 2**31 - 1],
        [1.0, 1e-30, 0.2, 0.5, 0.9, 0.999, 1 - 2.0**-24],
        [0.0, 1e-40, 0.01, 0.2, 1.0],
    )
)


@st.composite
def filterings(draw, max_rows: int = 3) -> Filtering:
    """Logits and filters, each of them off, at its ends, or between, independently in each row."""
    num_rows = draw(st.integers(0, max_rows), label="num_rows")
    logits = draw(logit_rows(num_rows))
    chosen = st.lists(st.sampled_from(ROW_FILTERS), min_size=num_rows, max_size=num_rows)
    parameters = np.array(draw(chosen, label="temperature, top_k, top_p, min_p of each row")).reshape(num_rows, 4)
    temperature, top_k, top_p, min_p = parameters.T
    top_k = np.where(top_k % 1 == 0.5, top_k * logits.shape[1], top_k)
    filters = (x.astype(t) for x, t in zip((top_k, top_p, min_p), (np.int32, np.float32, np.float32)))
    return Filtering(logits, temperature.astype(np.float32), *filters)


@st.composite
def samplings(draw, max_rows: int = 3) -> Sampling:
    """Filtered logits, and the names of their draws."""
    filtering = draw(filterings(max_rows))
    seeds, positions, sample_indices = names_of_draws(draw, len(filtering.logits))
    return Sampling(**vars(filtering), seeds=seeds, positions=positions, sample_indices=sample_indices)


def names_of_draws(draw, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seeds, positions and sample indices."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed of the names of the draws"))
    seeds = rng.integers(-(2**63), 2**63 - 1, num_rows, endpoint=True)
    return seeds, rng.integers(0, 2**20, num_rows, np.int32), rng.integers(0, 4, num_rows, np.int32)


@st.composite
def penalties(draw) -> Penalties:
    """Logits, ragged histories in which tokens repeat, and penalties and biases that are off in some rows."""
    num_rows = draw(st.integers(0, 4), label="num_rows")
    logits = draw(logit_rows(num_rows))
    vocab_size = logits.shape[1]
    max_history = draw(st.integers(0, 9), label="max_history")
    max_biases = draw(st.integers(0, min(3, vocab_size)), label="max_biases")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed of the history"))
    lengths = rng.integers(0, max_history + 1, num_rows)
    history = rng.integers(0, min(vocab_size, 5), (num_rows, max_history)).astype(np.int32)
    history[np.arange(max_history) >= lengths[:, None]] = -1
    bias_ids = [rng.permutation(vocab_size)[:max_biases] for _ in range(num_rows)]
    bias_ids = np.array(bias_ids, np.int32).reshape(num_rows, max_biases)
    bias_ids[rng.random(bias_ids.shape) < 0.3] = -1
    bias_values = rng.choice([-100.0, -0.5, 0.0, 3.0, -np.inf], bias_ids.shape).astype(np.float32)
    bias_values[bias_ids < 0] = np.nan  # where there is no id, anything
    return Penalties(
        logits,
        history,
        rng.integers(0, lengths + 1, num_rows).astype(np.int32),
        floats(draw, [1.0, 1.3, 0.5, 2.0, 100.0], num_rows, "repetition_penalty"),
        floats(draw, [0.0, 0.4, 1.0, -2.0], num_rows, "presence_penalty"),
        floats(draw, [0.0, 0.3, 1.0, -2.0], num_rows, "frequency_penalty"),
        bias_ids,
        bias_values,
    )


# ---- beams, drafts, look-up -------------------------------------------------------------------------------------


def ragged(draw, label: str, max_groups: int = 3, max_size: int = 3) -> np.ndarray:
    """Offsets of a few groups, some of them empty."""
    sizes = draw(st.lists(st.integers(0, max_size), max_size=max_groups), label=label)
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


@st.composite
def beams(draw) -> Beams:
    """Groups of beams, some empty, some of beams that are not there yet; more candidates asked for than there are."""
    cu_beams = ragged(draw, "beams in each group")
    num_rows = int(cu_beams[-1])
    logits = draw(logit_rows(num_rows))
    scores = floats(draw, [0.0, -0.5, -7.25, -1000.0, -np.inf], num_rows, "scores")
    return Beams(logits, scores, cu_beams, draw(st.sampled_from([1, 2, 3, 8, 40]), label="num_candidates"))


def distributions(rng: np.random.Generator, num_rows: int, vocab_size: int, kind: str, dtype: Any) -> np.ndarray:
    """Rows that sum to 1: anything, with zeros in them, or one-hot."""
    weights = rng.gamma(0.3, size=(num_rows, vocab_size)) + 1e-3
    if kind == "with zeros":
        zeros = rng.random(weights.shape) < 0.5
        zeros[np.arange(num_rows), rng.integers(0, vocab_size, num_rows)] = False
        weights[zeros] = 0
    if kind == "one-hot":
        weights = np.eye(vocab_size)[rng.integers(0, vocab_size, num_rows)]
    return (weights / weights.sum(axis=1, keepdims=True)).astype(dtype)


@st.composite
def drafted(draw, targets=("any", "with zeros", "one-hot")) -> Drafted:
    """Drafts of a few sequences, none or some each; certain ones, from a distribution, or from the target's own."""
    cu_drafts = ragged(draw, "drafts of each sequence")
    num_seqs, num_drafts = len(cu_drafts) - 1, int(cu_drafts[-1])
    vocab_size = draw(st.sampled_from([1, 2, 5, 40]), label="vocab_size")
    dtype = dtype_named(draw(st.sampled_from(FLOAT_DTYPES), label="dtype"))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    target = distributions(
        rng, num_drafts + num_seqs, vocab_size, draw(st.sampled_from(targets), label="target"), dtype
    )
    kind = draw(st.sampled_from(["certain", "any", "with zeros", "one-hot", "the target's"]), label="drafts")
    row_of_draft = np.arange(num_drafts) + np.repeat(np.arange(num_seqs), np.diff(cu_drafts))
    if kind == "certain":
        draft = None
        tokens = rng.integers(0, vocab_size, num_drafts)
    else:
        same = kind == "the target's"
        draft = target[row_of_draft] if same else distributions(rng, num_drafts, vocab_size, kind, dtype)
        tokens = draw_from(rng, draft.astype(np.float64))
    if num_drafts and draw(st.booleans(), label="some drafts are the target's best"):
        best = target[row_of_draft].astype(np.float64).argmax(axis=1)
        tokens = np.where(rng.random(num_drafts) < 0.7, best, tokens)
    return Drafted(target, draft, tokens.astype(np.int64), cu_drafts, *names_of_draws(draw, num_seqs))


def draw_from(rng: np.random.Generator, probs: np.ndarray) -> np.ndarray:
    """A token from each row, by the inverse of its distribution function; never one of probability 0."""
    reached = probs.cumsum(axis=1)
    aim = rng.random((len(probs), 1)) * reached[:, -1:]
    return (reached <= aim).sum(axis=1)


@st.composite
def histories(draw) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Histories of few different tokens, so that much repeats, more than ``max_ngram`` too; ragged, with garbage beyond
    their lengths."""
    num_seqs = draw(st.sampled_from([2, 1, 4, 0]), label="num_seqs")
    max_history = draw(st.sampled_from([24, 12, 3, 48, 1, 0]), label="max_history")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    history = rng.integers(0, draw(st.sampled_from([2, 4, 1, 50]), label="tokens"), (num_seqs, max_history))
    lengths = np.where(rng.random(num_seqs) < 0.3, max_history, rng.integers(0, max_history + 1, num_seqs))
    min_ngram = draw(st.integers(1, 3), label="min_ngram")
    options = {
        "min_ngram": min_ngram,
        "max_ngram": min_ngram + draw(st.sampled_from([0, 1, 2, 5, 100]), label="max_ngram - min_ngram"),
        "num_draft": draw(st.sampled_from([3, 1, 6, 0]), label="num_draft"),
    }
    return with_strides(draw, history.astype(np.int32)), lengths.astype(np.int32), options
