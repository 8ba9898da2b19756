"""Drafting: who proposes the tokens that the model then verifies, several in one step.

A decoding step reads all weights to give one token; a step that verifies four drafts reads them once for up to five. So
whatever proposes good drafts cheaply makes decoding faster, and `verify` sees to it that a bad one changes nothing but
the time. Two drafters: one looks up what followed the same words before, one asks a smaller model.

Between the steps the engine hands a drafter the sequences that are decoding and whose tokens are all known; it sets
their ``drafts``, and ``draft_probs`` unless the drafts are certain.
"""

from typing import Any

import numpy as np

from reference.batching.cache_space import CacheSpace
from reference.batching.config import EngineConfig
from reference.batching.packing import pack
from reference.batching.plan import StepPlan
from reference.batching.request import Sequence
from reference.batching.runner import Runner, StepResult
from reference.batching.running_rows import RunningRows


def _room(seq: Sequence, num_drafts: int) -> int:
    """How many drafts a sequence can use: one token more comes after the last."""
    return min(num_drafts, seq.request.limit - len(seq.token_ids) - 1)


class NgramDrafter:
    """Drafts by prompt look-up: what followed the last time these words occurred. See `lookup`.

    Args:
        num_drafts: Most tokens to propose for a sequence.
        backend: Whose ``lookup``.
        max_ngram, min_ngram: How many last tokens must have occurred before.
    """

    def __init__(
        self, num_drafts: int, *, backend: Any, max_ngram: int = 4, min_ngram: int = 2, device: str | None = None
    ):
        if num_drafts < 1 or not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"NgramDrafter: expected num_drafts of at least 1 and 1 <= min_ngram <= max_ngram, got {num_drafts}, "
                f"{min_ngram} and {max_ngram}"
            )
        self.num_drafts, self.backend, self.device = num_drafts, backend, device
        self.max_ngram, self.min_ngram = max_ngram, min_ngram

    def propose(self, seqs: list[Sequence]) -> None:
        """Set the drafts of these sequences."""
        if not seqs:
            return
        lengths = np.array([len(seq.token_ids) for seq in seqs], np.int32)
        history = np.full((len(seqs), lengths.max()), -1, np.int32)
        for row, seq in zip(history, seqs):
            row[: len(seq.token_ids)] = seq.token_ids
        found = self.backend.lookup(
            self.backend.from_host(history, device=self.device),
            self.backend.from_host(lengths, device=self.device),
            max_ngram=self.max_ngram,
            min_ngram=self.min_ngram,
            num_draft=self.num_drafts,
        )
        for seq, drafts in zip(seqs, self.backend.to_host(found).tolist()):
            usable = drafts[: _room(seq, self.num_drafts)]
            seq.drafts = usable[: usable.index(-1)] if -1 in usable else usable


class ModelDrafter:
    """Drafts by a smaller model of the same vocabulary, with a KV cache of its own.

    Each sequence has a *shadow* in the small model: the same tokens, and after them the drafts. When some drafts were
    rejected the shadow is cut back to what both have in common, and what the model said instead is computed along with
    the next drafts; so its cache is always in step with the accepted tokens. If the small cache is full a sequence goes
    without drafts.

    Args:
        runner: Of the small model.
        config: Of its cache: ``num_blocks``, ``block_size``, ``max_model_len``, ``max_num_seqs``,
            ``max_num_batched_tokens`` are read.
        num_drafts: Most tokens to propose for a sequence.
        vocab_size: Of the model that verifies.
    """

    def __init__(self, runner: Runner, config: EngineConfig, *, num_drafts: int, vocab_size: int):
        if num_drafts < 1:
            raise ValueError(f"ModelDrafter: num_drafts: expected at least 1, got {num_drafts}")
        if runner.vocab_size != vocab_size:
            raise ValueError(
                f"ModelDrafter: expected a draft model of the same vocabulary, {vocab_size} tokens; "
                f"it has {runner.vocab_size}"
            )
        self.runner, self.config, self.num_drafts = runner, config, num_drafts
        self.rows = RunningRows(config.max_num_seqs, config.max_model_len, config.block_size, len(config.pool_sizes))
        self.space = CacheSpace(config, self.rows)
        self.shadows: dict[Sequence, Sequence] = {}
        self.num_steps = 0

    def propose(self, seqs: list[Sequence]) -> None:
        """Set the drafts of these sequences, and the distributions they were drawn from."""
        for seq in [seq for seq in self.shadows if seq.finish_reason is not None]:
            self._drop(seq)
        drafting: dict[Sequence, int] = {}  # shadow: how many tokens it shall have
        for seq in seqs:
            wanted = min(_room(seq, self.num_drafts), self.config.max_model_len - len(seq.token_ids))
            if wanted > 0 and (shadow := self._catch_up(seq, seqs)) is not None:
                drafting[shadow] = len(seq.token_ids) + wanted
        probs: dict[Sequence, list[np.ndarray]] = {shadow: [] for shadow in drafting}
        while drafting:
            drafting = self._step(drafting, probs)
        for seq in seqs:
            shadow = self.shadows.get(seq)
            if shadow in probs:
                seq.drafts = shadow.token_ids[len(seq.token_ids) :]
                seq.draft_probs = np.stack(probs[shadow]) if probs[shadow] else None

    def _catch_up(self, seq: Sequence, wanted: list[Sequence]) -> Sequence | None:
        """The sequence's shadow, with its tokens, and in the cache what they have in common; None: no room for it."""
        shadow = self.shadows.get(seq)
        if shadow is None:
            if self.rows.num_used == self.config.max_num_seqs:
                for other in [other for other in self.shadows if other not in wanted]:
                    self._drop(other)
            if self.rows.num_used == self.config.max_num_seqs:
                return None
            shadow = self.shadows[seq] = Sequence(seq.seq_id, seq.request, seq.sample_index, [])
            self.space.open(shadow, 1)
            self.space.take_row(shadow)
            self.rows.adapter_ids[shadow.row] = self.rows.num_top[shadow.row] = -1  # the large model's business
            self.rows.penalized[shadow.row] = False
        same = _common_prefix(shadow.token_ids[: shadow.num_computed], seq.token_ids[:-1])
        if same < shadow.num_computed:
            self.space.truncate(shadow, same)
        shadow.token_ids = list(seq.token_ids)
        self.rows.write_tokens(shadow, len(seq.token_ids) - same)
        return shadow

    def _step(self, drafting: dict[Sequence, int], probs: dict[Sequence, list[np.ndarray]]) -> dict[Sequence, int]:
        """One step of the small model over those that still draft; who goes on."""
        plan = StepPlan(self.num_steps)
        self.num_steps += 1
        self.space.begin_step(plan.step)
        for shadow in drafting:
            left = min(shadow.num_uncomputed, self.config.max_num_batched_tokens - plan.num_tokens)
            num_new = self.space.room(shadow, left)
            if num_new:
                self.space.append(shadow, num_new)
                place = plan.add(shadow, num_new)
                if shadow.num_uncomputed == 0:
                    plan.drawn.append(place)
                    plan.samples.append(shadow.sample_index)
        plan.copies = self.space.copies
        if not plan.seqs:
            return {}
        result = self._run(plan)
        for row, place in enumerate(plan.drawn):
            shadow = plan.seqs[place]
            shadow.token_ids.append(int(result.token_ids[row]))
            self.rows.write_tokens(shadow, 1)
            if result.probs is not None and shadow.request.params.temperature > 0:
                probs[shadow].append(result.probs[row])
        given_up = {plan.seqs[plan.drawn[row]] for row in result.errors}
        if plan.num_tokens < self.config.max_num_batched_tokens:  # the others had no room
            given_up |= set(drafting) - set(plan.seqs)
        return {s: goal for s, goal in drafting.items() if len(s.token_ids) < goal and s not in given_up}

    def _run(self, plan: StepPlan) -> StepResult:
        batch = pack(plan, self.rows)
        batch.sampling.for_drafts = bool((batch.sampling.temperature > 0).any())
        result = self.runner.launch(batch).result()
        self.space.step_resulted(plan.step)
        return result

    def _drop(self, seq: Sequence) -> None:
        self.space.close(self.shadows.pop(seq))


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(b))
