"""Reading a text with a model, and how far a changed model's predictions are from the baseline's.

Logits of a long text would fill memory (a token of SmolLM2 has 49,152 of them), so what is kept of a text is what goes
into the head; logits are made of that a few rows at a time.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference.kv_cache.cache import CacheView, KVCache
from reference.kv_cache.formats import KV_FORMATS, KVFormat
from reference.model.decoder import Decoder

BLOCK_SIZE = 32  # KIVI's keys share a scale over 32 tokens, which must lie in one block
ROWS = 256  # of logits, at a time


class NoHead:
    """In the head's place: gives on what would go into it."""

    def rms_norm_linear(self, x: Any, norm_weight: Any, *, eps: float) -> Any:
        return x


class Reader:
    """Reads windows of text with a decoder, through the paged cache of a format."""

    def __init__(self, decoder: Decoder, format: KVFormat = KV_FORMATS["float32"]):
        self.head, self.format = decoder.head, format
        self.decoder = copy.copy(decoder)
        self.decoder.head = NoHead()  # type: ignore[assignment]

    def hidden(self, windows: np.ndarray) -> Any:
        """What goes into the head for each token of ``windows`` [num_windows, num_tokens], one after the other in a
        backend's array. All windows are read in one step, each from an empty cache."""
        decoder, config, place = self.decoder, self.decoder.config, self._place
        num_windows, num_tokens = windows.shape
        blocks = -(-num_tokens // BLOCK_SIZE)
        cache = KVCache(
            self.format, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            block_size=BLOCK_SIZE, num_blocks=num_windows * blocks,
            num_window_blocks=0 if self.format.window is None else num_windows * blocks,
            dtype=decoder.dtype, backend=decoder.backend, device=decoder.device,
        )  # fmt: skip
        table = np.arange(num_windows * blocks, dtype=np.int32).reshape(num_windows, blocks)
        slots = np.arange(num_tokens) + BLOCK_SIZE * table[:, :1].astype(np.int64)
        lengths = np.full(num_windows, num_tokens, np.int32)
        block_table, slot_mapping = place(table), place(slots.reshape(-1))
        has_window = self.format.window is not None
        view = CacheView(
            cu_seqlens_q=place(np.arange(num_windows + 1, dtype=np.int32) * num_tokens),
            seq_lens=place(lengths),
            block_table=block_table,
            slot_mapping=slot_mapping,
            window_block_table=block_table if has_window else None,
            window_slot_mapping=slot_mapping if has_window else None,
        )
        positions = np.tile(np.arange(num_tokens, dtype=np.int32), num_windows)
        return decoder.forward(place(windows.astype(np.int32).reshape(-1)), place(positions), view, cache)

    def logits(self, hidden: Any) -> Any:
        """Of rows of ``hidden``."""
        return self.head.rms_norm_linear(hidden, self.decoder.final_norm, eps=self.decoder.config.rms_norm_eps)

    def _place(self, array: np.ndarray) -> Any:
        return self.decoder.backend.from_host(array, device=self.decoder.device)


@dataclass(frozen=True)
class Predictions:
    """How well each token was predicted, and how far that is from the baseline.

    Attributes:
        losses: Minus the logarithm of the probability that the token had.
        divergences: KL divergence of the prediction from the baseline's, in nats.
        agrees: Whether the likeliest token is the baseline's.
    """

    losses: np.ndarray
    divergences: np.ndarray
    agrees: np.ndarray

    @staticmethod
    def concatenate(parts: "list[Predictions]") -> "Predictions":
        fields = ("losses", "divergences", "agrees")
        return Predictions(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))

    def figures(self, baseline: "Predictions") -> dict[str, float]:
        """Perplexity; its change in percent, with its standard error over the tokens; and the means of the others."""
        change = self.losses - baseline.losses
        relative = np.exp(change.mean())
        return {
            "perplexity": _rounded(np.exp(self.losses.mean())),
            "change": _rounded(100 * (relative - 1)),
            "change_error": _rounded(100 * relative * change.std() / np.sqrt(len(change))),
            "divergence": _rounded(self.divergences.mean()),
            "agreement": _rounded(100 * self.agrees.mean()),
        }


def _rounded(figure: float) -> float:
    return float(f"{figure:.6g}")


def compare(baseline: Reader, of_baseline: Any, reader: Reader, hidden: Any, targets: np.ndarray) -> Predictions:
    """What ``reader`` predicts beside the baseline, from what goes into the head of each, for the tokens that came."""
    parts = []
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        theirs, ours = baseline.logits(of_baseline[rows]), reader.logits(hidden[rows])
        on_host = isinstance(ours, np.ndarray)
        parts.append((predictions if on_host else predictions_on_device)(theirs, ours, targets[rows]))
    return Predictions.concatenate(parts)


def predictions(baseline: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> Predictions:
    """From logits [num_rows, vocab_size] of both.

    Example:
        >>> same = np.log([[0.25, 0.75]])
        >>> found = predictions(same, np.log([[0.5, 0.5]]), np.array([1]))
        >>> found.losses.round(4), found.divergences.round(4), found.agrees
        (array([0.6931]), array([0.1308]), array([False]))
    """
    log_p, log_q = _log_softmax(baseline), _log_softmax(logits)
    return Predictions(
        losses=-log_q[np.arange(len(targets)), targets],
        divergences=np.vecdot(np.exp(log_p), log_p - log_q),
        agrees=baseline.argmax(axis=1) == logits.argmax(axis=1),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def predictions_on_device(baseline: Any, logits: Any, targets: np.ndarray) -> Predictions:
    """The same in torch: a GPU's logits are not sent to the host."""
    import torch

    log_p, log_q = baseline.double().log_softmax(1), logits.double().log_softmax(1)
    chosen = torch.as_tensor(targets, dtype=torch.int64, device=log_q.device)
    parts = (
        -log_q.gather(1, chosen[:, None])[:, 0],
        (log_p.exp() * (log_p - log_q)).sum(1),
        baseline.argmax(1) == logits.argmax(1),
    )
    return Predictions(*(part.cpu().numpy() for part in parts))
