"""The runner on a GPU: steps are queued and not waited for, and most are replayed from CUDA graphs.

Same protocol as `reference.batching.runner`, whose `ModelRunner` is the plain one. What differs is when things happen::

    launch   host: lay the batch's arrays end to end in pinned memory
             stream: swaps and copies of blocks | the arrays, one copy | the model and the draw | results to the host
    result   host: wait for the last of these, and read

With a lookahead of 1 the host schedules and launches step n + 1 while the device computes step n: the tokens of step n
that step n + 1 continues from are read on the device, where ``token_sources`` says. Nothing in ``launch`` waits for the
device, and no kernel's grid depends on what is on it. (A coded swap out does wait, for how long the codes will be; they
cross the bus on a stream of their own, while the device computes.)

What a step asks beyond drawing tokens (penalties, log-probabilities, verification, beams) follows the recorded part
as ordinary launches over the same logits.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast._runner.blocks import BlockMover
from fast._runner.memory import Arena, InArena
from fast._runner.staging import Readback, stamp, to_device
from fast._runner.step import Step, StepShape, Upload, only_draws
from fast._triton.platform import default_device
from fast.sampling._largest import largest
from reference.batching.packing import Batch, SamplingBatch
from reference.batching.runner import NOT_FINITE, Logprobs, StepResult, verified_tokens
from reference.kv_cache.cache import CacheView, KVCache
from reference.memory.arena import PlannedBackend
from reference.model.decoder import AdapterBank, Decoder
from reference.numerics.philox import PURPOSE_DRAFT

MOST_RECORDED_TOKENS = 512  # steps of so few are recorded when first met
LAUNCHING = 1.3e-3  # seconds that the host takes to launch a layer's kernels one by one (measured beside an H100)
COMPUTING = 6e14  # operations a second, of a large step (measured on an H100)


def is_on_gpu(device: str | None) -> bool:
    """Whether arrays of `fast` on this device (None: its default) are on a GPU."""
    return torch.device(device or default_device()).type == "cuda"


class GraphRunner:
    """Runs a decoder of `fast` over its cache.

    Args:
        decoder: On `fast`, `fast.invariant`, or a backend laid over one of them: its arrays are torch tensors. If it is
            a `PlannedBackend`, recorded steps compute in one arena.
        most_seqs: Sequences that a step may have.
        recorded: Steps of at most so many tokens are recorded when first met, and replayed from then on; 0: none.
        recorded_again: Steps of more than that and at most so many are recorded when met for the second time; None:
            those whose kernels take the host longer to launch than the device to compute.

    Attributes:
        host: Swapped blocks by key and pool, in pinned memory; coded ones in as much memory as they need.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        *,
        adapters: AdapterBank | None = None,
        most_seqs: int = 256,
        recorded: int = MOST_RECORDED_TOKENS,
        recorded_again: int | None = None,
    ):
        self.decoder, self.cache, self.adapters = decoder, cache, adapters
        self.backend: Any = decoder.backend
        self.vocab_size = decoder.config.vocab_size
        self.most_seqs, self.most_recorded = most_seqs, recorded
        long = tokens_launched_in_vain(decoder) if recorded_again is None else recorded_again
        self.most_recorded_again = long if recorded else 0
        self.device: torch.device = cache.pools[0].device
        self._blocks = BlockMover(cache)
        self.host = self._blocks.host
        self._recorded: dict[StepShape, Step] = {}
        self._met: set[StepShape] = set()
        self._memory, self._arena = _memory_of_graphs(self.device), Arena(self.device)
        self._drawn = torch.full((most_seqs + 1,), -1, dtype=torch.int32, device=self.device)

    def launch(self, batch: Batch) -> "InFlight":
        """Queue a step."""
        sampling = batch.sampling
        if sampling.num_drawn > self.most_seqs:
            raise ValueError(f"GraphRunner: expected at most {self.most_seqs} draws a step, got {sampling.num_drawn}")
        if batch.num_tokens == 0:
            start = stamp(self.device)
            self._blocks.move(batch)
            return InFlight(sampling, Readback({}, self.device, start))
        step = self._step_for(batch)
        packed = step.upload.packed(batch)
        start = stamp(self.device)  # from here on there is something to do for the device
        self._blocks.move(batch)
        found = self._run(step, packed, len(batch.logit_rows))
        results = {"best": found["best"]}
        if only_draws(sampling):
            results["token_ids"] = found["drawn"][: sampling.num_drawn]
        else:
            results |= Sampling(self.backend, batch, found).results()
            self._remember(results["token_ids"])
        return InFlight(sampling, Readback(results, self.device, start))

    # Memory.

    def bytes_of_a_step(self, num_tokens: int, num_blocks: int) -> int:
        """Measured: what the largest step takes while it is computed, beside the weights and the cache.

        Three times as much if it will be recorded: beside what computes it when it is met for the first time there is
        the arena, which grows. All memory there is, if that is not enough.

        Args:
            num_tokens: Of the step.
            num_blocks: Of its longest sequence.
        """
        num_tokens = max(num_tokens, self.most_seqs)
        has_window, has_adapters = len(self.cache.pools) > 1, bool(self.adapters and self.adapters.names)
        shape = StepShape(num_tokens, self.most_seqs, self.most_seqs, num_blocks, has_window, has_adapters, True)
        upload = Upload(shape, self.device)
        upload.send_padding()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        try:
            self._compute(shape.keeps_logits, upload.tensors)
        except torch.OutOfMemoryError:
            return torch.cuda.mem_get_info(self.device)[1]
        taken = torch.cuda.max_memory_allocated(self.device) - before
        return taken * 3 if num_tokens <= self.most_recorded_again else taken

    # From tokens to logits.

    def _step_for(self, batch: Batch) -> Step:
        shape = StepShape.of(batch)
        padded = shape.padded()
        if self._is_worth_recording(padded):
            return self._recorded_step(padded)
        return Step(shape, partial(self._compute, shape.keeps_logits), self.device)

    def _run(self, step: Step, packed: Tensor, num_rows: int) -> dict[str, Tensor]:
        """What the step has on the device in the end: its arrays, and what `_compute` makes of them."""
        results = step.run(packed)
        return step.upload.tensors | {name: x[:num_rows] if name in OF_ROWS else x for name, x in results.items()}

    def _is_worth_recording(self, shape: StepShape) -> bool:
        """To record a step takes longer than to launch it: so there should be many like it."""
        if shape.num_tokens <= self.most_recorded or shape in self._met:
            return True
        if shape.num_tokens <= self.most_recorded_again:
            self._met.add(shape)
        return False

    def _recorded_step(self, shape: StepShape) -> Step:
        if shape not in self._recorded:
            in_flight = self._drawn.clone()  # what is recorded is computed once before, and draws
            compute: Any = partial(self._compute, shape.keeps_logits)
            if isinstance(self.backend, PlannedBackend):
                compute = InArena(compute, self.backend, self._arena)
            step = Step(shape, compute, self.device)
            try:
                step.record(self._memory)
            except Exception:
                self._memory = _memory_of_graphs(self.device)  # after a capture that failed it takes no other
                raise
            self._recorded[shape] = step
            self._drawn.copy_(in_flight)
        return self._recorded[shape]

    def _compute(self, keeps_logits: bool, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is recorded. Gives the names of `OF_ROWS`, and ``token_ids``: with those that were in flight."""
        drawn_before = self._drawn[inputs["token_sources"]]  # from -1, the last place, comes -1
        token_ids = torch.maximum(inputs["token_ids"], drawn_before)
        view = CacheView(
            **{name: inputs[name] for name in ("cu_seqlens_q", "seq_lens", "block_table", "slot_mapping")},
            window_block_table=inputs.get("window_block_table"),
            window_slot_mapping=inputs.get("window_slot_mapping"),
        )
        logits = self.decoder.forward(
            token_ids,
            inputs["positions"],
            view,
            self.cache,
            logit_rows=inputs["logit_rows"],
            adapters=self.adapters,
            adapter_ids=inputs.get("adapter_ids"),
            in_float32=False,
        )
        drawn = self.backend.sample(logits, *(inputs[name] for name in FILTERS + COUNTERS))
        self._remember(drawn)
        results = {"token_ids": token_ids, "drawn": drawn, "best": largest(logits)}
        if keeps_logits:
            results["logits"] = logits if logits.dtype == torch.float32 else self.backend.cast(logits, "float32")
        return results

    def _remember(self, drawn: Tensor) -> None:
        """For the step after, which may name these tokens before anybody has read them."""
        count = min(len(drawn), self.most_seqs)  # a batch draws for no more: what follows is padding
        self._drawn[:count] = drawn[:count]


def tokens_launched_in_vain(decoder: Decoder) -> int:
    """A step of so many tokens takes the device as long as its launches take the host; in one of fewer it waits."""
    matrices = (shape for name, shape in decoder.config.expected_tensors().items() if ".layers.0." in name)
    weights = sum(math.prod(shape) for shape in matrices)
    return round(LAUNCHING * COMPUTING / (2 * weights))


def _memory_of_graphs(device: torch.device) -> Any:
    """What recorded steps compute in, all in the same, since they run one after another; None without a GPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Sampling:
    """What a step asks of its logits beyond a draw from each row; all of it on the device.

    Args:
        step: The step's arrays on the device; ``token_ids`` with those that were in flight; ``logits``; and ``drawn``,
            what `sample` draws from them as they are.
    """

    def __init__(self, backend: Any, batch: Batch, step: dict[str, Tensor]):
        self.backend, self.batch, self.step, self.sampling = backend, batch, step, batch.sampling
        self.logits = step["logits"]

    def results(self) -> dict[str, Tensor]:
        """By the names of `StepResult`, and those of `Logprobs`."""
        sampling = self.sampling
        scores = self.logits if sampling.penalties is None else self._penalized()
        first, last = sampling.num_drawn, sampling.num_drawn + sampling.num_verified_rows
        results = self._draw(scores[:first])
        if sampling.cu_drafts is not None:
            results |= self._verify(scores[first:last], slice(first, last))
        if sampling.cu_beams is not None:
            results |= self._beams(scores[last:])
        if sampling.logprob_rows is not None:
            results |= self._logprobs(results)
        return results

    def _put(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.logits.device)

    def _columns(self, names: tuple[str, ...], rows: slice | Tensor) -> list[Tensor]:
        return [self.step[name][rows] for name in names]

    def _draw(self, scores: Tensor) -> dict[str, Tensor]:
        rows = slice(0, self.sampling.num_drawn)
        if self.sampling.for_drafts:
            return self._draw_drafts(scores, rows)
        penalties, drawn = self.sampling.penalties, self.step["drawn"][rows]
        if penalties is None or not self.sampling.num_drawn:
            return {"token_ids": drawn}
        tokens = self.backend.sample(scores, *self._columns(FILTERS + COUNTERS, rows))
        penalized = self._put(penalties.present[rows])
        return {"token_ids": torch.where(penalized, tokens, drawn)}  # the others' company changes no bit of theirs

    def _draw_drafts(self, scores: Tensor, rows: slice) -> dict[str, Tensor]:
        """As `sample`, with noise of its own, and the distributions drawn from: what `verify` asks of a drafter."""
        probs = self._probs(scores, rows)
        counters = self._columns(COUNTERS, rows)
        noise = self.backend.random_gumbel(*counters, purpose=PURPOSE_DRAFT, num_draws=scores.shape[1])
        return {"token_ids": (probs.log() + noise).argmax(dim=1), "probs": probs}

    def _probs(self, scores: Tensor, rows: slice) -> Tensor:
        """What `sample` draws from, as distributions."""
        return torch.softmax(self.backend.filter_logits(scores, *self._columns(FILTERS, rows)), dim=1)

    def _penalized(self) -> Tensor:
        p = self.sampling.penalties
        assert p is not None
        history = self._put(p.history)
        # The tokens that were in flight when the batch was packed, where they belong. (Longer rows have no history.)
        columns = self.batch.positions[self.batch.logit_rows]
        rows = np.flatnonzero(columns < p.history.shape[1])
        tokens = self.step["token_ids"][self._put(self.batch.logit_rows[rows])]
        history[self._put(rows), self._put(columns[rows])] = tokens.to(history.dtype)
        columns = (p.prompt_lens, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        return self.backend.penalize(self.logits, history, *map(self._put, (*columns, p.bias_ids, p.bias_values)))

    def _verify(self, scores: Tensor, rows: slice) -> dict[str, Tensor]:
        s = self.sampling
        assert s.cu_drafts is not None
        assert s.draft_tokens is not None
        first = self._put(rows.start + s.cu_drafts[:-1] + np.arange(len(s.cu_drafts) - 1))
        accepted, following = self.backend.verify(
            self._probs(scores, rows),
            None if s.draft_probs is None else self._put(s.draft_probs),
            self._put(s.draft_tokens),
            self._put(s.cu_drafts),
            *self._columns(COUNTERS, first),
        )
        return {"num_accepted": accepted, "next_token_ids": following}

    def _beams(self, scores: Tensor) -> dict[str, Tensor]:
        s = self.sampling
        assert s.beam_scores is not None
        assert s.cu_beams is not None
        found = self.backend.beam_scores(
            scores, self._put(s.beam_scores), self._put(s.cu_beams), num_candidates=s.num_candidates
        )
        return dict(zip(("beam_scores", "beam_rows", "beam_tokens"), found, strict=True))

    def _logprobs(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the model's own distribution, for every row that wants them; the host knows which of them count."""
        tokens = results["token_ids"]
        if self.sampling.cu_drafts is not None:
            tokens = torch.cat((tokens, self._verified_tokens(results)))
        rows = self._put(self.sampling.logprob_rows)  # type: ignore[arg-type]
        logits = self.backend.take_rows(self.logits, rows)
        found = self.backend.log_probs(logits, tokens[rows], num_top=self.sampling.num_top)
        return dict(zip(LOGPROBS, found, strict=True))

    def _verified_tokens(self, results: dict[str, Tensor]) -> Tensor:
        """The token that came of each verified row; any, where it was rejected before."""
        s = self.sampling
        assert s.cu_drafts is not None
        assert s.draft_tokens is not None
        num_drafts = np.diff(s.cu_drafts)
        owner = np.repeat(np.arange(len(num_drafts)), num_drafts + 1)
        place = np.arange(len(owner)) - (s.cu_drafts[:-1] + np.arange(len(num_drafts)))[owner]
        drafts = np.zeros(len(owner), np.int64)
        drafts[place < num_drafts[owner]] = s.draft_tokens
        owner, place = self._put(owner), self._put(place)
        is_draft = place < results["num_accepted"][owner]
        return torch.where(is_draft, self._put(drafts), results["next_token_ids"][owner])


FILTERS = ("temperature", "top_k", "top_p", "min_p")
COUNTERS = ("seeds", "draw_positions", "sample_indices")
LOGPROBS = ("logprobs", "ranks", "top_ids", "top_logprobs")
OF_ROWS = ("logits", "drawn", "best")  # what a step gives for each row of logits; ``best`` is the largest of them


@dataclass
class InFlight:
    """A step that was queued."""

    sampling: SamplingBatch
    results: Readback

    def result(self) -> StepResult:
        """Wait for it, and read what it gave."""
        arrays = self.results.wait()
        best = arrays.pop("best", np.zeros(0, np.float32))
        logprobs = {name: arrays.pop(name) for name in LOGPROBS if name in arrays}
        tokens = arrays.pop("token_ids", np.zeros(0, np.int64))
        result = StepResult(tokens, **arrays, device_time=self.results.seconds)
        unsound = ~np.isfinite(best)  # NaN or +inf somewhere, or -inf throughout
        result.errors = {int(row): NOT_FINITE for row in np.flatnonzero(unsound)}
        if self.sampling.logprob_rows is not None:
            tokens = np.concatenate((result.token_ids, verified_tokens(self.sampling, result)))
            counts = tokens[self.sampling.logprob_rows] >= 0
            found = (logprobs[name][counts] for name in LOGPROBS)
            result.logprobs = Logprobs(self.sampling.logprob_rows[counts], *found)
        return result
