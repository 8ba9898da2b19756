"""`twofold bench quality`: what each format of weights and cache costs a real model, on a running text.

`text` says what is read, `cases` what is judged, `fitting` makes the weights, `reading` the predictions, `known_models`
what a token's cache takes; `show` and `plots` tell it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reference.kv_cache.cache import block_bytes, bytes_per_token, resolve_format
from reference.linear.weight import Weight
from reference.model.decoder import Decoder
from reference.model.gqa_conversion import convert_to_gqa
from twofold.bench.quality.cases import Case
from twofold.bench.quality.fitting import fitted_decoder
from twofold.bench.quality.known_models import KNOWN_MODELS
from twofold.bench.quality.one_side import IN_PARTS, with_one_side
from twofold.bench.quality.reading import BLOCK_SIZE, Predictions, Reader, compare
from twofold.bench.quality.text import Windows
from twofold.bench.report import Unfinished
from twofold.checkpoints import Checkpoint

Progress = Callable[[str, int], None]  # what begins, and how many things begin in all


def baseline_name(checkpoint: Checkpoint) -> str:
    """The baseline by its name: what float32 weights were before. A model whose matrices were rounded to 4 bits is no
    original to compare 4 bits with."""
    stored = sorted(matrix_types(checkpoint))
    dequantized = [name for name in stored if name.startswith("Q")]
    return f"dequantized {' and '.join(dequantized)}" if dequantized else f"{' and '.join(stored)} as float32"


def matrix_types(checkpoint: Checkpoint) -> frozenset[str]:
    """How the layers' matrices are stored."""
    return frozenset(kind for name, kind in checkpoint.stored_as.items() if "_proj.weight" in name)


class Sweep:
    """Every case beside the baseline, kept as it is done: one that was interrupted goes on from there.

    Args:
        results: Where the results will go; what is done is kept beside it until all is.
        backend: Whose ops compute.
        text: Its name, for the results.

    Attributes:
        settings: What the figures depend on.
    """

    def __init__(
        self,
        results: Path,
        checkpoint: Checkpoint,
        windows: Windows,
        cases: Sequence[Case],
        *,
        backend: Any,
        device: str | None = None,
        text: str,
        seed: int,
    ):
        self.checkpoint, self.windows, self.cases = checkpoint, windows, cases
        self.backend, self.device = backend, device
        self.decoder = self._decoder(checkpoint.config, checkpoint.tensors())
        self.settings = {
            "model": checkpoint.name,
            "fingerprint": self.decoder.fingerprint,
            "baseline": baseline_name(checkpoint),
            "backend": getattr(backend, "__name__", type(backend).__name__),
            "text": text,
            "text_fingerprint": windows.fingerprint(),
            "seed": seed,
            "context": windows.context,
            "stride": windows.context,
            "num_predictions": windows.num_predictions,
            "num_calibration_tokens": windows.calibration[:, :-1].size,
            "block_size": BLOCK_SIZE,
        }
        self.unfinished = Unfinished(results, self.settings)

    @property
    def done(self) -> dict[str, Any]:
        """What an interrupted sweep with the same settings has found already, by the case's key."""
        return self.unfinished.done

    def run(self, on_progress: Progress = lambda what, total: None) -> dict[str, Any]:
        """Read the text with the baseline, then with each case that is left."""
        left = [case for case in self.cases if case.key not in self.done]
        total = len(self.windows.judged) * (1 + len(left)) + len(left)

        def begin(what: str) -> None:
            on_progress(what, total)

        self.reader = Reader(self.decoder)
        self.hidden = self._read(self.reader, lambda: begin("baseline"))
        self.baseline = self._predictions(self.reader, self.hidden)
        for case in left:
            begin(f"{case.key}: weights")
            self.unfinished.keep(case.key, self._measure(case, lambda case=case: begin(case.key)))
        return self._results()

    def _read(self, reader: Reader, on_window: Callable[[], None]) -> list[Any]:
        """What goes into the head, for each window."""
        hidden = []
        for window in self.windows.judged:
            on_window()
            hidden.append(reader.hidden(window[None, :-1]))
        return hidden

    def _predictions(self, reader: Reader, hidden: Sequence[Any]) -> Predictions:
        return Predictions.concatenate(
            [
                compare(self.reader, theirs, reader, ours, window[1:])
                for theirs, ours, window in zip(self.hidden, hidden, self.windows.judged)
            ]
        )

    def _measure(self, case: Case, on_window: Callable[[], None]) -> dict[str, Any]:
        decoder = self._with_case(case)
        format = IN_PARTS if case.side else resolve_format(case.cache, "float32").with_window(case.kv_window)
        reader = Reader(decoder, format)
        figures = self._predictions(reader, self._read(reader, on_window)).figures(self.baseline)
        sizes = {name: getattr(decoder.config, name) for name in ("num_layers", "num_kv_heads", "head_dim")}
        in_window = block_bytes(format, block_size=BLOCK_SIZE, **sizes)[1:]
        return figures | {
            "bytes_per_weight": _bytes_per_weight(decoder),
            "bytes_per_token": bytes_per_token(format, block_size=BLOCK_SIZE, **sizes),
            # A sequence's own, however long it is: the blocks that its next query may read in full.
            "window_bytes": sum((format.tail_blocks(BLOCK_SIZE) + 2) * size for size in in_window),
        }

    def _with_case(self, case: Case) -> Decoder:
        if case.num_kv_heads is not None:
            tensors: Any = self.checkpoint.tensors()
            return self._decoder(*convert_to_gqa(self.checkpoint.config, tensors, case.num_kv_heads))
        if case.weights == "as-is":
            return self._decoder(self.checkpoint.config, self.checkpoint.tensors(as_is=True), "as-is")
        if case.side:
            return with_one_side(self.decoder, resolve_format(case.cache, "float32"), case.side)
        if case.kind == "cache":
            return self.decoder
        return fitted_decoder(self.decoder, case, self.windows.calibration[:, :-1])

    def _decoder(self, config: Any, tensors: Any, weight_format: str = "auto") -> Decoder:
        return Decoder(
            config,
            tensors,
            backend=self.backend,
            weight_format=weight_format,
            device=self.device,
            max_positions=self.windows.context,
        )

    def _results(self) -> dict[str, Any]:
        described = ("name", "kind", "lossless")
        return {
            "settings": self.settings,
            "baseline": self.baseline.figures(self.baseline) | {"bytes_per_weight": 4.0},
            "cases": [{name: getattr(case, name) for name in described} | self.done[case.key] for case in self.cases],
            "known_models": [model.row() for model in KNOWN_MODELS],
        }


def _bytes_per_weight(decoder: Decoder) -> float:
    """Of the layers' matrices, with their scales."""
    weights = [w.to(None) for w in _matrices(decoder)]
    stored = sum(array.nbytes for weight in weights for array in weight.host_arrays().values())
    return stored / sum(weight.out_features * weight.in_features for weight in weights)


def _matrices(decoder: Decoder) -> Iterator[Weight]:
    for layer in decoder.layers:
        yield from (*layer.qkv, layer.o, *layer.gate_up, layer.down)
