"""A long run: thousands of short requests on a small random model, with a tenth of the memory that they want.

    python -m twofold.conformance.soak --backend fast --requests 20000 --json FILE

They come as others end, so that there are always many; some fork (parallel samples, beams), some are judged instead of
drawn, some can never run, and some are aborted, or one of their samples is ended, at a step of chance. By turns on
engines of other settings: how blocks are preempted, whether prefixes are shared, the KV format, speculation.

Every request ends exactly once, with its answer, by the abort, or refused with a reason. Whenever all have ended, no
block, no row and no swapped byte is left. And then the memory of the device is what it was: of two such moments with no
step of a new shape recorded between them, to the byte. (A recorded step keeps its buffers. The first half of a turn
does not count: what is kept once may be made there.)
"""

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from reference.batching.drafting import NgramDrafter
from reference.batching.engine import Engine
from reference.batching.request import FinishReason, Request, RequestOutput, SamplingParams
from reference.memory.arena import PlannedBackend
from reference.model.decoder import Decoder
from twofold.backends import Execution, execution, resolve_backend
from twofold.bench.report import gpu_name, save
from twofold.conformance.strategies.batching import engine_for, nothing_is_left
from twofold.conformance.strategies.model import random_model
from twofold.errors import TwofoldError

AT_ONCE = 64  # requests that want to run
SHARE = 0.1  # of the blocks that they want is there
VOCAB, EOS = 61, (2, 3)
BLOCK_SIZE, MAX_MODEL_LEN = 4, 48
SEGMENT, MOST_SEGMENTS = 128, 12  # requests at least, and how many of a turn; after each everything has ended
ABORTS = 0.2  # a step

TURNS: tuple[dict[str, Any], ...] = (
    {"kv_format": "float32", "preemption": "recompute", "enable_prefix_caching": False},
    {"kv_format": "float32", "preemption": "swap", "enable_prefix_caching": True},
    {"kv_format": "int8", "preemption": "recompute", "enable_prefix_caching": True},
    {"kv_format": "fp8", "preemption": "swap", "swap_coding": "lossless", "enable_prefix_caching": False},
    {"kv_format": "kivi4", "preemption": "swap", "enable_prefix_caching": True},
    {"kv_format": "kivi2", "preemption": "recompute", "enable_prefix_caching": False},
    {"kv_format": "int4", "preemption": "recompute", "enable_prefix_caching": True, "speculate": 3},
    {"kv_format": "float32", "preemption": "swap", "enable_prefix_caching": True, "speculate": 3},
)


@dataclass
class Counts:
    """What became of a turn's requests.

    Attributes:
        kinds: How they were asked for.
        refused: Why, of those that can never run.
        ended: By the reason of their (first) sequence.
        samples_ended: Of the requests that went on, samples that were ended.
        wanted_blocks: On average by as many requests as there are at a time; ``num_blocks`` is what they have.
        device_bytes: Allocated on the device after each segment; none without a GPU.
        recorded: Steps that the runner has recorded by then.
        unchanged: How many pairs of segments of the second half had nothing new recorded; their bytes were the same.
    """

    settings: dict[str, Any]
    wanted_blocks: int = 0
    num_blocks: int = 0
    most_blocks: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    samples_ended: int = 0
    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    device_bytes: list[int] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)
    unchanged: int = 0
    seconds: float = 0.0


def drawn_request(rng: np.random.Generator, name: str) -> tuple[str, Request]:
    """A request and what kind it is. Prompts begin alike, in one of a few ways."""
    kind = str(rng.choice(["plain", "samples", "beams", "judged", "hopeless"], p=[0.55, 0.2, 0.1, 0.1, 0.05]))
    shared = [int(7 * i % (VOCAB - 4)) + 4 + int(rng.integers(3)) * (i == 0) for i in range(rng.choice([0, 4, 9]))]
    prompt_len = MAX_MODEL_LEN if kind == "hopeless" else rng.integers(1, 12)
    params = SamplingParams(
        temperature=0.0 if kind == "beams" or (rng.random() < 0.3 and kind != "samples") else 0.9,
        n=int(rng.integers(2, 5)) if kind == "samples" else 1,
        max_tokens=int(rng.integers(1, 17)),
        seed=int(rng.integers(1 << 30)),
        top_p=float(rng.choice([1.0, 0.8])),
        frequency_penalty=float(rng.choice([0.0, 0.0, 0.5])),
        logprobs=int(rng.integers(3)) if kind == "judged" or rng.random() < 0.2 else None,
    )
    return kind, Request(
        name,
        shared + rng.integers(4, VOCAB, prompt_len).tolist(),
        params,
        num_beams=int(rng.integers(2, 4)) if kind == "beams" else 0,
        forced_token_ids=rng.integers(4, VOCAB, rng.integers(1, 17)).tolist() if kind == "judged" else None,
    )


def blocks_wanted(request: Request) -> int:
    """At its full length, by all its sequences."""
    prompt, most = len(request.prompt_token_ids), request.max_tokens or 0
    shared = prompt // BLOCK_SIZE if request.num_sequences > 1 else 0
    return shared + request.num_sequences * (-(-(prompt + most) // BLOCK_SIZE) - shared)


class Turn:
    """Some requests on an engine of some settings.

    Args:
        settings: Of `engine_for`; ``speculate`` is the number of drafts.
        num_requests: In all segments together.
    """

    def __init__(self, backend: Any, how: Execution, settings: Mapping[str, Any], num_requests: int, seed: int):
        self.rng, self.how, self.num_requests = np.random.default_rng(seed), how, num_requests
        self.counts = Counts(dict(settings))
        self.open: set[str] = set()  # requests that have not ended
        requests = [drawn_request(np.random.default_rng([seed, i]), "")[1] for i in range(min(num_requests, 1000))]
        wanted = [blocks_wanted(request) for request in requests]
        self.counts.wanted_blocks = round(AT_ONCE * float(np.mean(wanted)))
        self.counts.num_blocks = max(round(SHARE * self.counts.wanted_blocks), max(wanted))
        self.engine = self._engine(backend, dict(settings))

    def _engine(self, backend: Any, settings: dict[str, Any]) -> Engine:
        config, tensors = random_model("qwen3", num_layers=1, vocab_size=VOCAB, eos_token_ids=EOS)
        num_drafts = settings.pop("speculate", 0)
        return engine_for(
            Decoder(config, tensors, backend=PlannedBackend(backend) if self.how.plans_memory else backend),
            runner=self.how.runner,
            drafter=NgramDrafter(num_drafts, backend=backend) if num_drafts else None,
            num_blocks=self.counts.num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=AT_ONCE,
            lookahead=1,
            **settings,
        )

    def run(self) -> Counts:
        """All segments."""
        start = time.monotonic()
        num_segments = max(1, min(self.num_requests // SEGMENT, MOST_SEGMENTS))
        ends = [self.num_requests * segment // num_segments for segment in range(num_segments + 1)]
        for first, last in pairwise(ends):
            self._segment(range(first, last))
            self._look_at_the_device()
        metrics = self.engine.metrics
        self.counts.steps, self.counts.tokens = metrics.num_steps, metrics.num_tokens
        self.counts.preemptions, self.counts.most_blocks = metrics.num_preemptions, metrics.peak_blocks
        self.counts.seconds = round(time.monotonic() - start, 1)
        return self.counts

    def _segment(self, names: range) -> None:
        """So many requests, from the first to the end of the last; then nothing is left."""
        to_come = [f"{i}" for i in names]
        while to_come or self.engine.has_unfinished():
            while to_come and len(self.open) < AT_ONCE:
                self._add(to_come.pop())
            for result in self.engine.step().finished:
                self._ended(result)
            if self.open and self.rng.random() < ABORTS:
                self._abort(str(self.rng.choice(sorted(self.open))))
        assert not self.open, f"requests that have not ended: {', '.join(sorted(self.open))}"
        nothing_is_left(self.engine)
        kept = {key for key, _ in self.engine.runner.host}  # type: ignore[attr-defined]
        assert kept <= set(self.engine.scheduler.drops), "the host keeps blocks that nobody wants"

    def _add(self, name: str) -> None:
        kind, request = drawn_request(self.rng, name)
        self.counts.kinds[kind] += 1
        try:
            self.engine.add(request)
        except ValueError as reason:
            if kind != "hopeless":
                raise AssertionError(f"refused: {reason}") from reason
            self.counts.refused[str(reason).partition(": ")[2]] += 1
            return
        assert kind != "hopeless", f"a prompt of {len(request.prompt_token_ids)} tokens was accepted"
        self.open.add(name)

    def _abort(self, name: str) -> None:
        """A request, or one of its samples."""
        scheduler = self.engine.scheduler
        request = next((r for r in (*scheduler.running, *scheduler.waiting) if r.request_id == name), None)
        assert request is not None, f"request {name} is gone, and nobody has heard of its end"
        if request.num_beams or self.rng.random() < 0.5:
            result = self.engine.abort(name)
        else:
            index = int(self.rng.choice([seq.sample_index for seq in request.live]))
            result = self.engine.finish(name, FinishReason.STOP, index=index)
            self.counts.samples_ended += result is None
        if result:
            self._ended(result)

    def _ended(self, result: RequestOutput) -> None:
        assert result.error is None, f"request {result.request_id}: {result.error}"
        assert result.outputs, f"request {result.request_id}: no answer, and no reason why"
        self.open.remove(result.request_id)
        self.counts.ended[str(result.outputs[0].finish_reason)] += 1

    def _look_at_the_device(self) -> None:
        """Now that nothing runs: its memory is as it was, unless a step of a new shape was recorded."""
        if self.how.room is None:
            return
        import torch

        gc.collect()
        torch.cuda.synchronize()
        counts, recorded = self.counts, self.engine.runner._recorded  # type: ignore[attr-defined]
        counts.device_bytes.append(torch.cuda.memory_allocated())
        counts.recorded.append(len(recorded))
        counts.unchanged = unchanged(counts.device_bytes, counts.recorded)


def unchanged(device_bytes: list[int], recorded: list[int]) -> int:
    """How many pairs of neighbours in the second half had nothing new recorded.

    Raises:
        AssertionError: If the bytes of one differ.

    Example:
        >>> unchanged([100, 130, 200, 230, 230, 260], [1, 1, 2, 3, 3, 4])
        1
    """
    moments = list(zip(recorded, device_bytes, strict=True))[len(recorded) // 2 :]
    pairs = [(before, after) for (a, before), (b, after) in pairwise(moments) if a == b]
    for before, after in pairs:
        assert before == after, f"the memory of the device went from {before:,} to {after:,} bytes"
    return len(pairs)


def soak(backend: str, num_requests: int, *, seed: int = 0, only: Sequence[int] = ()) -> Iterator[Counts]:
    """Each turn's counts as they are known; their requests are ``num_requests`` together.

    Args:
        only: The turns that are run, by number, with the share that they have of all; none: every one.

    Raises:
        AssertionError: If a request, a block or a byte of the device is lost.
    """
    found = resolve_backend(backend)
    for number, settings in enumerate(TURNS):
        if only and number not in only:
            continue
        share = num_requests * (number + 1) // len(TURNS) - num_requests * number // len(TURNS)
        yield Turn(found, execution(found, None), settings, share, seed + number).run()


def total(turns: list[Counts]) -> dict[str, Any]:
    """The sums, and the turns one by one."""
    return {
        "requests": sum(turn.kinds.total() for turn in turns),
        "refused": sum(turn.refused.total() for turn in turns),
        "ended": sum((turn.ended for turn in turns), Counter()),
        "kinds": sum((turn.kinds for turn in turns), Counter()),
        "preemptions": sum(turn.preemptions for turn in turns),
        "moments with the same device memory": sum(turn.unchanged for turn in turns),
        "turns": [vars(turn) for turn in turns],
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if something was lost."""
    parser = argparse.ArgumentParser(description="Thousands of short requests, with a tenth of the memory they want.")
    parser.add_argument("--backend", default="reference", help="reference, fast or plain_torch")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the requests, and of what befalls them")
    turns_help = f"only this turn, 0 to {len(TURNS) - 1}; again for more: processes side by side can share them out"
    parser.add_argument("--turn", type=int, action="append", choices=range(len(TURNS)), help=turns_help, metavar="N")
    parser.add_argument("--json", type=Path, help="where the counts go")
    options = parser.parse_args(arguments)
    if options.requests < len(TURNS):
        parser.error(f"--requests {options.requests}: expected at least {len(TURNS)}, one for each turn")
    command = f"python -m twofold.conformance.soak --backend {options.backend} --requests {options.requests}"
    command += f" --seed {options.seed}" + "".join(f" --turn {number}" for number in options.turn or ())
    turns: list[Counts] = []
    try:
        for turn in soak(options.backend, options.requests, seed=options.seed, only=options.turn or ()):
            turns.append(turn)
            device = gpu_name() if turn.device_bytes else None
            print(f"{turn.settings}: {dict(turn.ended)}, {turn.preemptions} preemptions, {turn.seconds} s", flush=True)
            if options.json:
                save(options.json, command, total(turns), device=device)
    except TwofoldError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    except AssertionError as lost:
        print(f"soak: {TURNS[len(turns)]}: {lost}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
