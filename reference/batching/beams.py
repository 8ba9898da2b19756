"""Beam search: keep the best few continuations of a prompt, and go on from them all.

A step takes every beam's log-probability so far plus that of each next token, and the best ``num_candidates`` of all of
them go on (`beam_scores`): two children of one beam fork its block table, and a beam without children gives its blocks
back. So beams share nearly all of their past, and no keys or values are ever moved for it.

The rules are those of `transformers` (``early_stopping=False``), so that the same sequences come out with the same
scores:

- of the candidates in order, those which do not end the text become the next beams, as many as there are beams;
- one that does end it is a finished hypothesis if it is among the first ``num_beams`` candidates, with the score
  log-probability / length ** length_penalty; the best ``num_beams`` of these are kept;
- the search is over when every hypothesis is there and the best open beam, scored at its present length, is no better
  than the worst of them; or when no candidate is open.

Source: `transformers`' ``GenerationMixin._beam_search``.
"""

from dataclasses import dataclass

import numpy as np

from reference.batching.request import CompletionOutput, FinishReason, Request, Sequence


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam."""

    token_ids: list[int]  # output only, its last token included
    logprob: float
    score: float
    finish_reason: FinishReason


class BeamSearch:
    """The state of one request's search.

    Attributes:
        scores: Log-probability of each live beam, in the order of ``request.live``.
        num_candidates: Enough that ``num_beams`` of them are open, whatever stop tokens are among them.
        finished: The best hypotheses so far, best first.
    """

    def __init__(self, request: Request):
        self.request = request
        self.num_beams = request.num_beams
        self.num_candidates = max(2, 1 + len(request.stop_ids)) * request.num_beams
        self.scores = np.zeros(1, np.float32)
        self.finished: list[Hypothesis] = []

    def advance(
        self, beams: list[Sequence], scores: np.ndarray, rows: np.ndarray, tokens: np.ndarray
    ) -> list[tuple[Sequence, int]]:
        """The next beams, best first: which one each goes on from, and with what token. Empty: the search is over.

        Args:
            beams: The live ones, as the step computed them.
            scores, rows, tokens: The candidates, best first: log-probability, which beam, which token.
        """
        length = len(beams[0].output_token_ids) + 1
        divisor = length**self.request.length_penalty
        open_scores: list[float] = []
        successors: list[tuple[Sequence, int]] = []
        candidates = zip(scores.tolist(), rows.tolist(), tokens.tolist())
        for rank, (score, row, token) in enumerate(candidates):
            reason = self._ends(beams[row], token)
            if reason is None and len(successors) < self.num_beams:
                open_scores.append(score)
                successors.append((beams[row], token))
            elif reason is not None and rank < self.num_beams:
                self._finish(Hypothesis([*beams[row].output_token_ids, token], score, score / divisor, reason))
        if not successors or not self._can_improve(open_scores[0] / divisor):
            return []
        self.scores = np.array(open_scores, np.float32)
        return successors

    def outputs(self) -> list[CompletionOutput]:
        """The hypotheses, best first."""
        return [
            CompletionOutput(
                index=index,
                token_ids=h.token_ids,
                finish_reason=h.finish_reason,
                stop_token_id=h.token_ids[-1] if h.finish_reason is FinishReason.STOP else None,
                cumulative_logprob=h.logprob,
                score=h.score,
            )
            for index, h in enumerate(self.finished)
        ]

    def _ends(self, beam: Sequence, token: int) -> FinishReason | None:
        if token in self.request.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(beam.token_ids) + 1 >= self.request.limit else None

    def _finish(self, hypothesis: Hypothesis) -> None:
        self.finished.append(hypothesis)
        self.finished.sort(key=lambda h: -h.score)  # stable: among equals, who came first
        del self.finished[self.num_beams :]

    def _can_improve(self, best_open_score: float) -> bool:
        return len(self.finished) < self.num_beams or best_open_score > self.finished[-1].score
