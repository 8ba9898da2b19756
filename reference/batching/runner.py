"""The runner: executes one packed batch on a backend. `fast/runner.py` is the same protocol on a GPU.

`ModelRunner` is the plain one: it executes a step when it is launched and has the result at once. So a lookahead buys
it nothing; but it may be given one, and then goes through the same steps as a runner that works in the background.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int32, Int64
from numpy import ndarray as Array

from reference.batching.packing import Batch, SamplingBatch
from reference.kv_cache.cache import CacheView, KVCache
from reference.kv_cache.coded_rows import CodedRows
from reference.model.decoder import AdapterBank, Decoder
from reference.numerics.philox import PURPOSE_DRAFT

NOT_FINITE = "the model's logits are not finite"


@dataclass
class Logprobs:
    """What `log_probs` says of the tokens that some logit rows gave.

    Attributes:
        rows: Those of ``SamplingBatch.logprob_rows`` that gave one: not the rows of rejected drafts.
    """

    rows: Int32[Array, " num_reported"]
    logprobs: Float32[Array, " num_reported"]
    ranks: Int32[Array, " num_reported"]
    top_ids: Int64[Array, "num_reported num_top"]
    top_logprobs: Float32[Array, "num_reported num_top"]


@dataclass
class StepResult:
    """What a step gives back, as host arrays.

    Attributes:
        token_ids: Of the drawn rows.
        num_accepted, next_token_ids: Of the verified sequences: how many drafts, and the token after them.
        beam_scores, beam_rows, beam_tokens: Candidates of each beam search, best first.
        probs: The distribution of each drawn row, if ``SamplingBatch.for_drafts``.
        errors: Logit rows that gave no result, and why. Their tokens mean nothing.
        device_time: Seconds that a device spent on the step, where the runner measures it.
    """

    token_ids: Int64[Array, " num_drawn"]
    num_accepted: Int32[Array, " num_verified"] | None = None
    next_token_ids: Int64[Array, " num_verified"] | None = None
    beam_scores: Float32[Array, "num_groups num_candidates"] | None = None
    beam_rows: Int32[Array, "num_groups num_candidates"] | None = None
    beam_tokens: Int64[Array, "num_groups num_candidates"] | None = None
    logprobs: Logprobs | None = None
    probs: Float32[Array, "num_drawn vocab_size"] | None = None
    errors: dict[int, str] = field(default_factory=dict)
    device_time: float | None = None


class Pending(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for it, and read what it gave."""
        ...


class Runner(Protocol):
    """Whatever executes steps.

    Attributes:
        vocab_size: Tokens that it knows: 0 to this.
    """

    vocab_size: int

    def launch(self, batch: Batch) -> Pending:
        """Start a step, in the order that `Batch` says; return at once where that is possible.

        Steps are executed in the order in which they are launched. What a batch does not say cannot be asked for: a
        runner keeps no state of requests but the tokens of its last step and the swapped blocks.
        """
        ...


@dataclass
class Done:
    """A step that was executed when it was launched."""

    value: StepResult

    def result(self) -> StepResult:
        """The result."""
        return self.value


class ModelRunner:
    """Runs a decoder over its cache, on the decoder's backend, whichever it is.

    Attributes:
        host: Swapped blocks, by key and pool.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, *, adapters: AdapterBank | None = None):
        self.decoder, self.cache, self.adapters = decoder, cache, adapters
        self.backend: Any = decoder.backend
        self.vocab_size = decoder.config.vocab_size
        self.host: dict[tuple[int, int], np.ndarray | CodedRows] = {}
        self._drawn = np.zeros(0, np.int64)

    def launch(self, batch: Batch) -> Done:
        """Execute a step."""
        self._move_blocks(batch)
        if batch.num_tokens == 0:
            return Done(StepResult(np.zeros(0, np.int64)))
        token_ids = batch.token_ids
        if (batch.token_sources >= 0).any():
            token_ids = np.where(batch.token_sources >= 0, self._drawn[batch.token_sources], token_ids).astype(np.int32)
        logits = self._forward(batch, token_ids)
        if batch.sampling.penalties is not None:
            _complete_history(batch, token_ids)
        result = self._sample(batch.sampling, logits)
        self._drawn = result.token_ids
        return Done(result)

    def _move_blocks(self, batch: Batch) -> None:
        for swap in batch.swaps_out:
            rows = self.cache.swap_out(swap.block_ids, pool=swap.pool, coded=swap.coded)
            self.host[swap.key, swap.pool] = rows
        for swap in batch.swaps_in:
            rows = self.host.pop((swap.key, swap.pool))
            self.cache.swap_in(rows[swap.host_rows], swap.block_ids, pool=swap.pool)
        for key in batch.drops:
            for pool in range(len(batch.copies)):
                self.host.pop((key, pool), None)
        for pool, copies in enumerate(batch.copies):
            self.cache.copy_blocks(copies, pool=pool)

    def _put(self, array: np.ndarray) -> Any:
        return self.backend.from_host(array, device=self.decoder.device)

    def _forward(self, batch: Batch, token_ids: np.ndarray) -> Any:
        has_window = len(batch.block_tables) > 1
        view = CacheView(
            cu_seqlens_q=self._put(batch.cu_seqlens_q),
            seq_lens=self._put(batch.seq_lens),
            block_table=self._put(batch.block_tables[0]),
            slot_mapping=self._put(batch.slot_mappings[0]),
            window_block_table=self._put(batch.block_tables[1]) if has_window else None,
            window_slot_mapping=self._put(batch.slot_mappings[1]) if has_window else None,
        )
        return self.decoder.forward(
            self._put(token_ids),
            self._put(batch.positions),
            view,
            self.cache,
            logit_rows=self._put(batch.logit_rows),
            adapters=self.adapters,
            adapter_ids=None if batch.adapter_ids is None else self._put(batch.adapter_ids),
        )

    # From logits to tokens.

    def _sample(self, sampling: SamplingBatch, logits: Any) -> StepResult:
        """All that is asked of the logits. A row that is not sound fails alone."""
        try:
            return self._sample_rows(sampling, logits)
        except ValueError:
            host = self.backend.to_host(logits)
            bad = ~np.isfinite(host.max(axis=1))  # NaN, +inf, or -inf throughout
            if not bad.any():
                raise
            result = self._sample_rows(sampling, self._put(np.where(bad[:, None], np.float32(0), host)))
            result.errors = {int(row): NOT_FINITE for row in np.flatnonzero(bad)}
            return result

    def _sample_rows(self, sampling: SamplingBatch, logits: Any) -> StepResult:
        scores = logits if sampling.penalties is None else self._penalize(sampling, logits)
        drawn = slice(0, sampling.num_drawn)
        verified = slice(drawn.stop, drawn.stop + sampling.num_verified_rows)
        result = StepResult(np.zeros(0, np.int64))
        if sampling.for_drafts:
            result.token_ids, result.probs = self._draw_drafts(sampling, scores)
        elif sampling.num_drawn:
            draw = (
                self._put(column[drawn]) for column in (sampling.seeds, sampling.positions, sampling.sample_indices)
            )
            tokens = self.backend.sample(scores[drawn], *self._filters(sampling, drawn), *draw)
            result.token_ids = self.backend.to_host(tokens)
        if sampling.cu_drafts is not None:
            self._verify(sampling, scores[verified], verified, result)
        if sampling.cu_beams is not None:
            found = self.backend.beam_scores(
                scores[verified.stop :],
                self._put(sampling.beam_scores),  # type: ignore[arg-type]
                self._put(sampling.cu_beams),
                num_candidates=sampling.num_candidates,
            )
            result.beam_scores, result.beam_rows, result.beam_tokens = map(self.backend.to_host, found)
        if sampling.logprob_rows is not None:
            result.logprobs = self._logprobs(sampling, logits, result)
        return result

    def _filters(self, sampling: SamplingBatch, rows: slice) -> tuple[Any, ...]:
        columns = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        return tuple(self._put(column[rows]) for column in columns)

    def _penalize(self, sampling: SamplingBatch, logits: Any) -> Any:
        p = sampling.penalties
        assert p is not None
        columns = (p.history, p.prompt_lens, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        return self.backend.penalize(logits, *map(self._put, (*columns, p.bias_ids, p.bias_values)))

    def _probs(self, sampling: SamplingBatch, scores: Any, rows: slice) -> np.ndarray:
        """What `sample` draws from, as distributions."""
        filtered = self.backend.to_host(self.backend.filter_logits(scores, *self._filters(sampling, rows)))
        weights = np.exp(filtered)  # the best is at 0
        return weights / weights.sum(axis=1, keepdims=True)

    def _verify(self, sampling: SamplingBatch, scores: Any, rows: slice, result: StepResult) -> None:
        assert sampling.cu_drafts is not None
        assert sampling.draft_tokens is not None
        first = rows.start + sampling.cu_drafts[:-1] + np.arange(len(sampling.cu_drafts) - 1)
        accepted, following = self.backend.verify(
            self._put(self._probs(sampling, scores, rows)),
            None if sampling.draft_probs is None else self._put(sampling.draft_probs),
            self._put(sampling.draft_tokens),
            self._put(sampling.cu_drafts),
            self._put(sampling.seeds[first]),
            self._put(sampling.positions[first]),
            self._put(sampling.sample_indices[first]),
        )
        result.num_accepted, result.next_token_ids = self.backend.to_host(accepted), self.backend.to_host(following)

    def _draw_drafts(self, sampling: SamplingBatch, scores: Any) -> tuple[np.ndarray, np.ndarray]:
        """As `sample`, with noise of its own, and the distributions drawn from: what `verify` asks of a drafter."""
        rows = slice(0, sampling.num_drawn)
        probs = self._probs(sampling, scores, rows)
        draw = (self._put(column[rows]) for column in (sampling.seeds, sampling.positions, sampling.sample_indices))
        noise = self.backend.random_gumbel(*draw, purpose=PURPOSE_DRAFT, num_draws=self.vocab_size)
        with np.errstate(divide="ignore"):
            return np.argmax(np.log(probs) + self.backend.to_host(noise), axis=1), probs

    def _logprobs(self, sampling: SamplingBatch, logits: Any, result: StepResult) -> Logprobs:
        """Of the model's own distribution, for the tokens that came of the rows that want them."""
        assert sampling.logprob_rows is not None
        tokens = np.concatenate((result.token_ids, verified_tokens(sampling, result)))
        rows = sampling.logprob_rows[tokens[sampling.logprob_rows] >= 0]
        found = self.backend.log_probs(
            self.backend.take_rows(logits, self._put(rows)), self._put(tokens[rows]), num_top=sampling.num_top
        )
        return Logprobs(rows, *map(self.backend.to_host, found))


def _complete_history(batch: Batch, token_ids: np.ndarray) -> None:
    """Put the tokens that were in flight when the batch was packed where they belong."""
    assert batch.sampling.penalties is not None
    history, columns = batch.sampling.penalties.history, batch.positions[batch.logit_rows]
    rows = np.flatnonzero(columns < history.shape[1])  # longer rows have no penalties, and no history
    history[rows, columns[rows]] = token_ids[batch.logit_rows[rows]]


def verified_tokens(sampling: SamplingBatch, result: StepResult) -> np.ndarray:
    """For each verified row the token that came of it; -1 where it was rejected before."""
    tokens = np.full(sampling.num_verified_rows, -1, np.int64)
    if sampling.cu_drafts is None or result.num_accepted is None or result.next_token_ids is None:
        return tokens
    for seq, (start, accepted) in enumerate(zip(sampling.cu_drafts[:-1], result.num_accepted)):
        row = start + seq
        tokens[row : row + accepted] = sampling.draft_tokens[start : start + accepted]  # type: ignore[index]
        tokens[row + accepted] = result.next_token_ids[seq]
    return tokens
