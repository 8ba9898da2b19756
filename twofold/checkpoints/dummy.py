"""A model made of random weights: how fast it is does not depend on what they are. `twofold generate --load dummy`.

Only the config counts; the weights are made where they will be used, in the format asked for.
"""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reference.linear.weight import Weight, weight_format
from reference.model.config import ModelConfig
from reference.numerics.philox import PURPOSE_DRAW
from twofold.checkpoints.checkpoint import Checkpoint
from twofold.checkpoints.huggingface import read_config, read_eos_token_ids, read_tokenizer
from twofold.checkpoints.shapes import SHAPES, known_shape
from twofold.errors import TwofoldError

TILE_NUMBERS = 1 << 24  # drawn at once: float32, on the device
ROUNDED_ROWS = 64  # of a quantized matrix that are rounded; they are repeated, since rounding all takes minutes


def dummy_checkpoint(model: str | Path | None) -> Checkpoint:
    """A model without weights.

    Args:
        model: A folder with a ``config.json`` (and a tokenizer or not), or a name of ``SHAPES``.

    Raises:
        TwofoldError: If it is neither, or the config makes no sense.
    """
    path = Path(model or "")
    if model and (path / "config.json").is_file():
        name, config = path.name, read_config(path)
        eos_token_ids = read_eos_token_ids(path, config)
        tokenizer, no_tokenizer = read_tokenizer(path)
    else:
        name = known_shape(str(model or "")) or ""
        if not name:
            raise TwofoldError(f"--load dummy: give a folder with a config.json, or one of {', '.join(SHAPES)}")
        config = ModelConfig.from_hf(SHAPES[name])
        eos_token_ids, tokenizer, no_tokenizer = config.eos_token_ids, None, "a table of shapes has no tokenizer"

    def read(name: str, as_is: bool) -> np.ndarray:
        raise TwofoldError(f"{path}: there are no weights (see --load dummy)")

    return Checkpoint(
        name=name,
        path=path,
        files=(),
        config=config,
        shapes=config.expected_tensors(),
        stored_as={},
        nbytes=0,
        read=read,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        eos_token_ids=eos_token_ids,
    )


class RandomTensors(Mapping[str, Any]):
    """The tensors that a config expects, each made when it is asked for: matrices as `Weight`s on the backend.

    Numbers are normal, with a deviation that keeps activations near 1; norms are ones and biases zeros. What is
    quantized repeats a few rows.

    Args:
        dtype: Of the activations, and of the embedding and the head.
        format: Of the matrices in the layers: "auto" is ``dtype``.
        seed: The same seed, config and formats make the same model.
    """

    def __init__(
        self, config: ModelConfig, *, backend: Any, dtype: str, format: str, device: str | None, seed: int = 0
    ):
        self.shapes, self.backend, self.dtype, self.device, self.seed = (
            config.expected_tensors(), backend, dtype, device, seed
        )  # fmt: skip
        self.format = weight_format(dtype if format in ("auto", "as-is") else format)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Any:
        shape = self.shapes[name]
        if len(shape) == 1:
            return (np.zeros if name.endswith(".bias") else np.ones)(shape, np.float32)
        num_rows, width = shape
        is_table = name.startswith(("model.embed", "lm_head"))
        format = self.format if self.format.is_float or not is_table else weight_format(self.dtype)
        key = zlib.crc32(name.encode()) << 31 | self.seed
        if format.is_float:
            arrays = {"weight": self._normal(num_rows, width, format.name, key)}
            return Weight(format, num_rows, width, arrays, backend=self.backend, device=self.device)
        rows = np.random.default_rng(key).standard_normal((min(ROUNDED_ROWS, num_rows), width), np.float32)
        rounded = Weight.from_float(rows / np.float32(np.sqrt(width)), format=format).arrays
        arrays = {part: np.resize(array, (num_rows, *array.shape[1:])) for part, array in rounded.items()}
        return Weight(format, num_rows, width, arrays)

    def _normal(self, num_rows: int, width: int, dtype: str, key: int) -> Any:
        """Drawn on the device, some rows at a time."""
        backend = self.backend
        matrix = backend.empty((num_rows, width), dtype=dtype, device=self.device)
        step = max(1, TILE_NUMBERS // width)
        for start in range(0, num_rows, step):
            places = np.arange(start, min(start + step, num_rows), dtype=np.int32)
            keys, zeros = np.full(len(places), key, np.int64), np.zeros_like(places)
            named = (backend.from_host(array, device=self.device) for array in (keys, places, zeros))
            drawn = backend.random_normal(*named, purpose=PURPOSE_DRAW, num_draws=width)
            matrix[start : start + len(places)] = backend.cast(drawn * width**-0.5, dtype)
        return matrix
