"""sample, in Triton. What the technique is for: `reference/sampling/sample.py`."""

from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor as Array


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
    out: Float[Array, "num_rows vocab_size"] | None = None,
) -> Float[Array, "num_rows vocab_size"]:
    """Same contract as `reference.sampling.sample.penalize`."""
    raise NotImplementedError("penalize")


def filter_logits(
    logits: Float[Array, "num_rows vocab_size"],
    temperature: Float32[Array, " num_rows"],
    top_k: Int32[Array, " num_rows"],
    top_p: Float32[Array, " num_rows"],
    min_p: Float32[Array, " num_rows"],
    *,
    out: Float[Array, "num_rows vocab_size"] | None = None,
) -> Float[Array, "num_rows vocab_size"]:
    """Same contract as `reference.sampling.sample.filter_logits`."""
    raise NotImplementedError("filter_logits")


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
    """Same contract as `reference.sampling.sample.sample`."""
    raise NotImplementedError("sample")


def log_probs(
    logits: Float[Array, "num_rows vocab_size"], token_ids: Int64[Array, " num_rows"], *, num_top: int
) -> tuple[
    Float[Array, " num_rows"], Int32[Array, " num_rows"], Int64[Array, "num_rows num_top"],
    Float[Array, "num_rows num_top"],
]:  # fmt: skip
    """Same contract as `reference.sampling.sample.log_probs`."""
    raise NotImplementedError("log_probs")
