"""What a request waited for, what a step cost, and how the memory was used."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from reference.kv_cache.block_pool import BlockPool
from reference.kv_cache.block_table import BlockTable


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of the engine's clock; None: not yet.

    Attributes:
        num_output_tokens: Of all its sequences together.
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

    def gained(self, num_tokens: int, now: float) -> None:
        """Tokens were read."""
        if self.first_token_time is None:
            self.first_token_time = now
        self.last_token_time = now
        self.num_output_tokens += num_tokens

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
        """The mean over the tokens after the first. Those of parallel samples count together: it is the request's."""
        span = _between(self.first_token_time, self.last_token_time)
        return span / (self.num_output_tokens - 1) if span is not None and self.num_output_tokens > 1 else None

    @property
    def end_to_end_time(self) -> float | None:
        """From arrival to the end."""
        return _between(self.arrival_time, self.finished_time)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """One pool at one moment.

    Attributes:
        used: Blocks that are not free: those that sequences own, and those held for steps in flight.
        shared: Of these, blocks with more than one owner.
        slots: Token slots of the used blocks; a shared block counts once.
        empty_slots: Of these, the ones that hold no token: the waste of paging, at the end of last blocks.
    """

    used: int
    shared: int
    slots: int
    empty_slots: int


def pool_usage(pool: BlockPool, tables: Iterable[BlockTable], block_size: int) -> PoolUsage:
    """How the tables of the running sequences use their pool."""
    tails: dict[int, int] = {}  # last block: its empty slots, by the fullest of those who share it
    for table in tables:
        if table.block_ids:
            tail, empty = table.block_ids[-1], -table.num_tokens % block_size
            tails[tail] = min(empty, tails.get(tail, empty))
    return PoolUsage(pool.num_used, pool.num_shared, pool.num_used * block_size, sum(tails.values()))


@dataclass(slots=True)
class StepRecord:
    """What one step did, and how long the host took for it, in seconds.

    Attributes:
        num_tokens: That the model computed.
        schedule_time: Choosing and packing.
        launch_time: In ``launch``: on a synchronous runner, all of the model's time.
        wait_time: In ``result``.
        update_time: Reading the result.
        device_time: Of a device, behind the host's back; None: nobody measured it.
    """

    step: int
    start_time: float
    num_seqs: int
    num_tokens: int
    num_preempted: int
    schedule_time: float = 0.0
    launch_time: float = 0.0
    wait_time: float = 0.0
    update_time: float = 0.0
    device_time: float | None = None


@dataclass(slots=True)
class EngineMetrics:
    """Sums over the steps of an engine, and its peak.

    Attributes:
        peak_blocks: The most blocks of the first pool that were in use at once.
        peak: How each pool was used then, or when it was within a hundredth of it.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    schedule_time: float = 0.0
    launch_time: float = 0.0
    wait_time: float = 0.0
    update_time: float = 0.0
    device_time: float = 0.0
    peak_blocks: int = 0
    peak: list[PoolUsage] = field(default_factory=list)

    def add(self, record: StepRecord) -> None:
        """A step was read."""
        self.num_steps += 1
        self.num_tokens += record.num_tokens
        self.num_preemptions += record.num_preempted
        for name in ("schedule_time", "launch_time", "wait_time", "update_time"):
            setattr(self, name, getattr(self, name) + getattr(record, name))
        self.device_time += record.device_time or 0.0

    @property
    def host_time_per_step(self) -> float:
        """The engine's own work: everything but the runner's."""
        return (self.schedule_time + self.update_time) / max(1, self.num_steps)

    @property
    def empty_share(self) -> float:
        """The share of token slots that were empty at the peak."""
        return self.peak[0].empty_slots / self.peak[0].slots if self.peak and self.peak[0].slots else 0.0
