"""A scheduler whose requests reserve all their memory in one piece: what paging is compared with.

It differs from `Scheduler` in one thing: a request is admitted when the allocator has a piece for all that it may ever
need, and keeps that piece until it has ended. So it is never preempted, and what is reserved and not yet (or never)
used is nobody's. Who comes first is served first: one that finds no gap keeps all behind it waiting.

The block tables below it go on as ever, on a pool so large that it never says no; they count the tokens.
"""

from dataclasses import dataclass, replace

from reference.batching.config import EngineConfig
from reference.batching.request import Request, RequestOutput
from reference.batching.scheduler import Scheduler
from reference.memory.allocators import Allocator, Extent, Reserve


@dataclass(frozen=True, slots=True)
class SlotUsage:
    """What every slot of the memory is at one moment; the four add up to all there are.

    Attributes:
        tokens: They hold keys and values.
        reserved: A request that has them will fill them, later.
        internal: A request has them and will never fill them.
        external: No request has them: free, too small a gap for whoever waits, or what an allocator rounds up.
    """

    tokens: int
    reserved: int
    internal: int
    external: int


class ReservingScheduler(Scheduler):
    """First come, first served, each in a piece of its own.

    Args:
        allocator: Of all the memory there is, in tokens. ``config.num_blocks`` is not heeded.
        reserve: How much a request reserves.

    Attributes:
        extents: The piece of each running request.
    """

    def __init__(self, config: EngineConfig, allocator: Allocator, reserve: Reserve):
        roomy = replace(config, num_blocks=allocator.num_slots, watermark=0.0, enable_prefix_caching=False)
        super().__init__(roomy)
        self.allocator = allocator
        self.reserve = reserve
        self.extents: dict[Request, Extent] = {}

    def reserved_size(self, request: Request) -> int:
        """What a request asks for."""
        prompt_len = len(request.prompt_token_ids)
        return self.reserve(prompt_len, self._final_len(request) - prompt_len, self.config.max_model_len)

    def _final_len(self, request: Request) -> int:
        """Tokens of it in the end, if no stop token ends it before."""
        longest, max_tokens = self.config.max_model_len, request.max_tokens
        return longest if max_tokens is None else min(longest, len(request.prompt_token_ids) + max_tokens)

    def _refuse_hopeless(self, request: Request) -> None:
        super()._refuse_hopeless(request)
        size, num_slots = self.reserved_size(request), self.allocator.num_slots
        reason = None
        if request.num_sequences > 1:
            reason = f"it has {request.num_sequences} sequences, and one piece of memory"
        elif size > num_slots:
            reason = f"it reserves {size} slots of a memory of {num_slots}"
        if reason:
            raise ValueError(f"request {request.request_id}: {reason}")

    def slot_usage(self) -> SlotUsage:
        """What the slots are now."""
        tokens = sum(seq.num_computed for request in self.extents for seq in request.live)
        used_in_the_end = sum(map(self._final_len, self.extents))
        asked_for = sum(map(self.reserved_size, self.extents))
        return SlotUsage(
            tokens=tokens,
            reserved=used_in_the_end - tokens,
            internal=asked_for - used_in_the_end,
            external=self.allocator.num_slots - asked_for,
        )

    def _may_admit(self, request: Request) -> bool:
        """Is there a piece for it? It has it from now on."""
        if request not in self.extents:
            extent = self.allocator.allocate(self.reserved_size(request))
            if extent is None:
                return False
            self.extents[request] = extent
        return True

    def _end_request(self, request: Request) -> RequestOutput:
        if request in self.extents:
            self.allocator.free(self.extents.pop(request))
        return super()._end_request(request)
