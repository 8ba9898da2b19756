"""A checkpoint: what a folder or a file of weights turns out to hold, whatever format it is in.

Loading reads headers and the tokenizer, and checks that every tensor the config implies is there in the right shape.
A tensor itself is read each time it is asked for and kept by nobody here: who builds a model takes one, puts it where
it belongs and lets it go, so that no more than the model and one tensor are ever in memory.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reference.linear.weight import Weight
from reference.model.config import ModelConfig
from twofold.bounded import shown
from twofold.checkpoints.fetch import Progress
from twofold.errors import TwofoldError
from twofold.tokenizer import Tokenizer

Tensors = Mapping[str, "np.ndarray | Weight"]
NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|^lm_head\.weight$|attention\.(masked_)?bias$")  # in old files; tied


class LazyTensors(Mapping[str, Any]):
    """Tensors by name, each read anew whenever it is asked for.

    Example:
        >>> tensors = LazyTensors(["a", "b"], lambda name: name.upper())
        >>> len(tensors), tensors["b"]
        (2, 'B')
    """

    def __init__(self, names: Any, read: Callable[[str], Any]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Checkpoint:
    """What was found at ``path``.

    Attributes:
        name: What a user would call it.
        files: Every file with weights.
        config: The model's sizes and switches.
        shapes: Every tensor's shape, by Hugging Face's name.
        stored_as: Every tensor's type as stored ("F32", "BF16", "Q4_1", ...), by the same names.
        tokenizer: With the chat template. None where there is none that can be used; ``no_tokenizer`` then says why.
        eos_token_ids: Any of them ends a text: the config's and the generation config's.
        nbytes: Bytes of weights as stored.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    stored_as: Mapping[str, str]
    nbytes: int
    read: Callable[[str, bool], "np.ndarray | Weight"] = field(repr=False)
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    no_tokenizer: str = ""
    eos_token_ids: tuple[int, ...] = ()

    def tensors(self, *, as_is: bool = False, on_progress: Progress | None = None) -> Tensors:
        """Every tensor by Hugging Face's name, read when asked for; ``on_progress`` is told of each.

        Quantized tensors are unpacked to float32, floats come in the type they are stored in. With ``as_is`` those of
        Q4_0, Q4_1 and Q8_0 come as `Weight`s in their own blocks, to be computed with as they are.
        """
        if on_progress is None:
            return LazyTensors(self.shapes, lambda name: self.read(name, as_is))
        numbers = {name: math.prod(shape) for name, shape in self.shapes.items()}
        left = dict(numbers)

        def read(name: str) -> "np.ndarray | Weight":
            left.pop(name, None)
            share = 1 - sum(left.values()) / max(sum(numbers.values()), 1)
            on_progress(f"loading {self.name}", round(share * self.nbytes), self.nbytes)
            return self.read(name, as_is)

        return LazyTensors(self.shapes, read)

    def fingerprint(self) -> str:
        """Names this very model, for keys of what was computed with it: changed files make another model."""
        status = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        tensors = [(name, self.shapes[name], self.stored_as[name]) for name in self.shapes]
        return hashlib.sha256(json.dumps([repr(self.config), status, tensors]).encode()).hexdigest()

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; where there is none, a sentence that says why and what still works."""
        if self.tokenizer is None:
            raise TwofoldError(f"{self.name}: {self.no_tokenizer}; give prompts as token ids (prompt_token_ids)")
        return self.tokenizer


def check_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Every tensor that the config implies must be there, in its shape, and none that would change the model."""
    expected = config.expected_tensors()
    missing = [name for name in expected if name not in shapes]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TwofoldError(f"{where}: tensor {missing[0]} is missing{others}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise TwofoldError(f"{where}: tensor {name} has shape {shapes[name]}; the config makes it {shape}")
    strange = [name for name in shapes if name not in expected and not NOT_WEIGHTS.search(name)]
    if strange:
        raise TwofoldError(
            f"{where}: tensor {shown(strange[0])} is not part of a {config.family} model with this config, and "
            "leaving it out would change what the model computes"
        )
