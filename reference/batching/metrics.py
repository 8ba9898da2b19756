"""What a request waited for, and what a step cost."""

from dataclasses import dataclass


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of the engine's clock; None: not yet.

    Attributes:
        num_cached_tokens: Prompt tokens found in the prefix cache when it was first admitted.
        num_preemptions: How often its memory was taken away.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def queue_time(self) -> float | None:
        """From arrival to the first step it was part of."""
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        """From arrival to the first token read."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def time_between_tokens(self) -> float | None:
        """The mean over the tokens after the first of its sequences (those of parallel samples come side by side)."""
        span = _between(self.first_token_time, self.last_token_time)
        return span / (self.num_output_tokens - 1) if span is not None and self.num_output_tokens > 1 else None

    @property
    def end_to_end_time(self) -> float | None:
        """From arrival to the end."""
        return _between(self.arrival_time, self.finished_time)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
