"""Tokens as they come, text as it may be shown: half characters held back, stop strings cut off."""

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """What a tokenizer's incremental detokenizer offers."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        ...

    def flush(self) -> str:
        """What was held back and will never be completed."""
        ...


class TextStream:
    """The text of one sample as it grows.

    A stop string may begin in one token and end in the next, so as much text as might be the beginning of one is held
    back until it is known. The stop string itself is never shown.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: Sequence[str] = ()):
        self.detokenizer = detokenizer
        self.stop = tuple(stop)
        self.text = ""  # shown
        self.held = ""  # known, not shown yet
        self.stopped_by: str | None = None

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """Take the next tokens; returns the text that may be shown now. ``last``: nothing will follow."""
        if self.detokenizer is None or self.stopped_by is not None:
            return ""
        self.held += self.detokenizer.push(token_ids)
        if last:
            self.held += self.detokenizer.flush()
        place, found = self._find_stop()
        if found is not None:
            shown, self.held, self.stopped_by = self.held[:place], "", found
        elif last:
            shown, self.held = self.held, ""
        else:
            keep = self._possible_stop()
            shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.text += shown
        return shown

    def _find_stop(self) -> tuple[int, str | None]:
        """The earliest stop string in the held text; the longest of those that begin there."""
        found = [(self.held.find(stop), -len(stop), stop) for stop in self.stop if stop in self.held]
        place, _, stop = min(found, default=(0, 0, None))
        return place, stop

    def _possible_stop(self) -> int:
        """How many characters at the end might begin a stop string."""
        longest = max((len(stop) for stop in self.stop), default=0)
        for size in range(min(longest - 1, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-size:]) for stop in self.stop):
                return size
        return 0
