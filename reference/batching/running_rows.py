"""Rows of the running: what a step needs of each running sequence, as arrays that change only where they change.

A sequence owns a row for as long as it runs. What is the same in every step (its sampling parameters) is written once,
and what grows (its tokens, its block tables) is written where it grew; so packing a step of hundreds of sequences is a
dozen gathers.
"""

from collections.abc import Mapping

import numpy as np

from reference.batching.request import Sequence

FORCE = 1e30  # added to a logit, it leaves every other token without a chance, whatever the sampling parameters


class RunningRows:
    """A row of arrays for each running sequence.

    Attributes:
        token_ids: By position; drafts and forced tokens stand after the known ones. What is past them is left over from
            before.
        forced: Are the tokens after the known ones forced?
        block_tables: One array a pool; -1 where there is no block.
    """

    def __init__(self, max_rows: int, max_model_len: int, block_size: int, num_pools: int):
        self.block_size = block_size
        # zeros, not empty or full: pages of memory that nobody touches are never made real
        self.token_ids = np.zeros((max_rows, max_model_len), np.int32)
        blocks = -(-max_model_len // block_size)
        self.block_tables = [np.full((max_rows, blocks), -1, np.int32) for _ in range(num_pools)]
        self.prompt_lens = np.zeros(max_rows, np.int32)
        self.temperature = np.zeros(max_rows, np.float32)
        self.top_k = np.zeros(max_rows, np.int32)
        self.top_p = np.ones(max_rows, np.float32)
        self.min_p = np.zeros(max_rows, np.float32)
        self.seeds = np.zeros(max_rows, np.int64)
        self.adapter_ids = np.full(max_rows, -1, np.int32)
        self.penalized = np.zeros(max_rows, bool)
        self.repetition_penalty = np.ones(max_rows, np.float32)
        self.presence_penalty = np.zeros(max_rows, np.float32)
        self.frequency_penalty = np.zeros(max_rows, np.float32)
        self.logit_bias: list[Mapping[int, float]] = [{}] * max_rows
        self.forced = np.zeros(max_rows, bool)
        self.num_top = np.full(max_rows, -1, np.int32)
        self._free = list(range(max_rows - 1, -1, -1))

    @property
    def num_used(self) -> int:
        """Sequences that run."""
        return len(self.prompt_lens) - len(self._free)

    def claim(self, seq: Sequence) -> None:
        """Give a sequence a row, with its tokens and parameters; its block tables are empty."""
        row = seq.row = self._free.pop()
        params, forced = seq.request.params, seq.request.forced_token_ids
        prompt_len = self.prompt_lens[row] = len(seq.request.prompt_token_ids)
        self.forced[row] = forced is not None
        if forced is not None:
            self.token_ids[row, prompt_len : prompt_len + len(forced)] = forced
        self.token_ids[row, : len(seq.token_ids)] = seq.token_ids
        self.temperature[row] = params.temperature
        self.top_k[row] = max(params.top_k, 0)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seeds[row] = seq.request.seed
        self.adapter_ids[row] = seq.request.adapter_id
        self.penalized[row] = params.has_penalties
        self.repetition_penalty[row] = params.repetition_penalty
        self.presence_penalty[row] = params.presence_penalty
        self.frequency_penalty[row] = params.frequency_penalty
        self.logit_bias[row] = params.logit_bias or {}
        self.num_top[row] = -1 if params.logprobs is None else params.logprobs

    def bias(self, row: int, position: int) -> Mapping[int, float]:
        """What is added to the logits that decide the token at a position."""
        return {int(self.token_ids[row, position]): FORCE} if self.forced[row] else self.logit_bias[row]

    def give_up(self, seq: Sequence) -> None:
        """The sequence stops running: its row is anybody's."""
        for table in self.block_tables:
            table[seq.row] = -1
        self._free.append(seq.row)
        seq.row = -1

    def write_blocks(self, seq: Sequence, pool: int, first: int = 0) -> None:
        """The sequence's block table changed from its ``first`` block on."""
        block_ids = seq.tables[pool].block_ids
        row = self.block_tables[pool][seq.row]
        row[first : len(block_ids)] = block_ids[first:]
        row[len(block_ids) :] = -1

    def write_tokens(self, seq: Sequence, count: int) -> None:
        """The sequence's last ``count`` tokens are new; nothing to do if it does not run."""
        if seq.row >= 0:
            end = len(seq.token_ids)
            for position in range(end - count, end):
                self.token_ids[seq.row, position] = seq.token_ids[position]

    def write_drafts(self, seq: Sequence) -> None:
        """The sequence's drafts, behind its tokens."""
        end = len(seq.token_ids)
        self.token_ids[seq.row, end : end + len(seq.drafts)] = seq.drafts
