"""From logits to tokens: penalties, temperature and filters, a reproducible draw, log-probabilities."""

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64
from numpy import ndarray as Array


def penalize(
    logits: Float[Array, "num_rows vocab_size"],
    history: Int32[Array, "num_rows max_history"],
    prompt_lens: Int32[Array, " num_rows"],
    repetition_penalty: Float32[Array, " num_rows"],
    presence_penalty: Float32[Array, " num_rows"],
    frequency_penalty: Float32[Array, " num_rows"],
    bias_ids: Int32[Array, "num_rows max_biases"],
    bias_values: Float32[Array, "num_rows max_biases"],
    *,
    out: Float32[Array, "num_rows vocab_size"] | None = None,
) -> Float32[Array, "num_rows vocab_size"]:
    """history: prompt then output tokens, -1 pads; repetition counts both, presence and frequency the output only."""
    raise NotImplementedError


def filter_logits(
    logits: Float[Array, "num_rows vocab_size"],
    temperature: Float32[Array, " num_rows"],
    top_k: Int32[Array, " num_rows"],
    top_p: Float32[Array, " num_rows"],
    min_p: Float32[Array, " num_rows"],
    *,
    out: Float32[Array, "num_rows vocab_size"] | None = None,
) -> Float32[Array, "num_rows vocab_size"]:
    """logits / temperature with what the filters exclude at -inf; temperature 0 leaves the first best token at 0 and
    the rest at -inf. top_k 0 (or >= vocab_size) and top_p 1 and min_p 0 exclude nothing. Ties at a threshold stay."""
    raise NotImplementedError


def sample(
    logits: Float[Array, "num_rows vocab_size"],
    temperature: Float32[Array, " num_rows"],
    top_k: Int32[Array, " num_rows"],
    top_p: Float32[Array, " num_rows"],
    min_p: Float32[Array, " num_rows"],
    seeds: Int64[Array, " num_rows"],
    positions: Int32[Array, " num_rows"],
    sample_indices: Int32[Array, " num_rows"],
) -> Int64[Array, " num_rows"]:
    """argmax of filtered logits + Gumbel noise (PURPOSE_DRAW) of (seed, position, sample index); temperature 0 is the
    argmax, the lowest id among equals."""
    raise NotImplementedError


def log_probs(
    logits: Float[Array, "num_rows vocab_size"], token_ids: Int64[Array, " num_rows"], *, num_top: int
) -> tuple[
    Float32[Array, " num_rows"], Int32[Array, " num_rows"], Int64[Array, "num_rows num_top"],
    Float32[Array, "num_rows num_top"],
]:  # fmt: skip
    """(log-probability of the token, its rank (1 is best), the best ids, their log-probabilities)."""
    raise NotImplementedError
