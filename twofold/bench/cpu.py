"""`twofold bench cpu`: the NumPy engine beside `transformers` on the same CPU, in one run.

Every comparison alternates between the two, round by round, and reports medians and the median of the rounds' ratios:
this holds on a noisy machine, where times of different runs cannot be compared.
"""

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from reference.batching.config import EngineConfig
from reference.batching.engine import Engine
from reference.batching.request import Request, SamplingParams
from reference.batching.runner import StepResult
from reference.batching.static_batching import StaticScheduler
from twofold.llm import LLM

SEED = 0


def side_by_side(first: Callable[[], float], second: Callable[[], float], rounds: int) -> dict[str, float]:
    """Seconds of each, alternating; and how many times faster the first is, as the median over the rounds."""
    pairs = [(first(), second()) for _ in range(rounds)]
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "theirs_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "ratio_min": min(b / a for a, b in pairs),
        "ratio_max": max(b / a for a, b in pairs),
    }


class Peer:
    """`transformers` on the same weights, in float32, greedy."""

    def __init__(self, llm: LLM):
        import torch
        from transformers import AutoModelForCausalLM

        path = llm.checkpoint.path
        torch.set_num_threads(os.cpu_count() or 1)
        self.torch = torch
        where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if where else path
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Seconds to generate ``num_tokens`` for each of the prompts, which are of one length."""
        ids = self.torch.tensor(prompts)
        start = time.perf_counter()
        with self.torch.inference_mode():
            self.model.generate(  # type: ignore[reportAttributeAccessIssue]
                ids,
                attention_mask=self.torch.ones_like(ids),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - start


def generate(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds for the same with our engine."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    seconds = time.perf_counter() - start
    if any(output.error or len(output.outputs[0].token_ids) != num_tokens for output in outputs):
        raise RuntimeError(f"bench cpu: not every request gave {num_tokens} tokens")
    return seconds


def random_prompts(llm: LLM, count: int, length: int, rng: np.random.Generator) -> list[list[int]]:
    """Prompts of random tokens: none shares a prefix with another, so the prefix cache finds nothing."""
    return rng.integers(100, llm.checkpoint.config.vocab_size, (count, length)).tolist()


def decode(llm: LLM, peer: Peer, batch: int, *, rounds: int, num_tokens: int = 48) -> dict[str, float]:
    """Tokens per second once the first is out: the time for all tokens less the time for one."""
    rng = np.random.default_rng(SEED)

    def ours() -> float:
        return _slope(lambda n: generate(llm, random_prompts(llm, batch, 32, rng), n), num_tokens)

    def theirs() -> float:
        return _slope(lambda n: peer.generate(random_prompts(llm, batch, 32, rng), n), num_tokens)

    result = side_by_side(ours, theirs, rounds)
    for name in ("ours", "theirs"):
        result[f"{name}_tokens_per_s"] = batch / result[f"{name}_s"]
    return result


def _slope(seconds: Callable[[int], float], num_tokens: int) -> float:
    """Seconds a step."""
    return (seconds(num_tokens) - seconds(1)) / (num_tokens - 1)


def first_token(llm: LLM, peer: Peer, *, rounds: int, length: int = 512) -> dict[str, float]:
    """Seconds from a prompt to its first token."""
    rng = np.random.default_rng(SEED)
    return side_by_side(
        lambda: generate(llm, random_prompts(llm, 1, length, rng), 1),
        lambda: peer.generate(random_prompts(llm, 1, length, rng), 1),
        rounds,
    )


def continuous_against_static(llm: LLM, *, slots: int = 8, num_requests: int = 48) -> dict[str, float]:
    """The same requests (16 prompt tokens, log-uniform lengths 8 to 256) through 8 slots, both ways."""
    rng = np.random.default_rng(SEED)
    lengths = np.exp(rng.uniform(math.log(8), math.log(256), num_requests)).astype(int).tolist()
    prompts = random_prompts(llm, num_requests, 16, rng)

    def requests(way: str) -> list[Request]:
        return [
            Request(f"{way}-{i}", ids, SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True))
            for i, (ids, n) in enumerate(zip(prompts, lengths))
        ]

    config = replace(llm.engine.config, max_num_seqs=slots, enable_prefix_caching=False)
    runner = llm.engine.runner
    engines = Engine(config, runner, scheduler=StaticScheduler(config)), Engine(config, runner)
    for engine, way in zip(engines, ("static", "continuous")):
        for request in requests(way):
            engine.add(request)
    steps = static_steps(lengths, slots), continuous_steps(lengths, slots)
    (static, num_static_steps), (continuous, num_steps) = drain_together(engines, steps)
    from_lengths = steps[0] / steps[1]
    return {
        "static_s": static,
        "continuous_s": continuous,
        "ratio": static / continuous,
        "ratio_from_lengths": from_lengths,
        "share_of_it": static / continuous / from_lengths,
        "static_steps": num_static_steps,
        "continuous_steps": num_steps,
    }


def drain_together(engines: tuple[Engine, ...], expected_steps: tuple[int, ...]) -> list[tuple[float, int]]:
    """Seconds and steps of each until all requests have ended, a step of one and a step of another in turn.

    Who has done less of what is expected of it goes next, so that all end at about the same time: whatever else the
    machine does meanwhile costs them alike.
    """
    seconds, steps = [0.0] * len(engines), [0] * len(engines)
    while unfinished := [i for i, engine in enumerate(engines) if engine.has_unfinished()]:
        i = min(unfinished, key=lambda i: steps[i] / expected_steps[i])
        start = time.perf_counter()
        engines[i].step()
        seconds[i] += time.perf_counter() - start
        steps[i] += 1
    return list(zip(seconds, steps))


def static_steps(lengths: list[int], slots: int) -> int:
    """Each batch lasts as long as its longest request."""
    return sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))


def continuous_steps(lengths: list[int], slots: int) -> int:
    """A freed slot takes the next request at once: the last slot to be done ends the run."""
    busy = [0] * slots
    for length in lengths:
        slot = busy.index(min(busy))
        busy[slot] += length
    return max(busy)


def startup(model: str | None) -> dict[str, float]:
    """`twofold generate` as a process of its own: seconds to the first byte of the answer, and its peak memory."""
    command = [sys.executable, "-m", "twofold", "generate", "Why is the sky blue?", "--max-tokens", "16"]
    start = time.perf_counter()
    process = subprocess.Popen(
        command + (["-m", model] if model else []), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    seconds = time.perf_counter() - start
    process.stdout.read()
    error = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"bench cpu: {error}")
    return {
        "first_token_s": seconds,
        "peak_resident_mb": usage.ru_maxrss / 1024 * (1 if sys.platform == "linux" else 1 / 1024),
    }


class InstantRunner:
    """Gives token 7 for every row, at once: what is left of a step is the engine's own work."""

    vocab_size = 50_000

    def launch(self, batch: Any) -> "InstantRunner":
        self.num_rows = batch.sampling.num_drawn
        return self

    def result(self) -> StepResult:
        return StepResult(np.full(self.num_rows, 7, np.int64))


def engine_overhead(num_seqs: int = 256, num_steps: int = 200) -> dict[str, float]:
    """Milliseconds a step of schedule, block tables, sampling set-up and update, all sequences decoding."""
    config = EngineConfig(
        num_blocks=num_seqs * 64, max_model_len=1024, max_num_seqs=num_seqs, max_num_batched_tokens=8192
    )
    engine = Engine(config, InstantRunner())
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=num_steps + 10, ignore_eos=True)
    for i in range(num_seqs):
        engine.add(Request(str(i), [i + 1] * 32, params))
    for _ in range(5):
        engine.step()
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - start) * 1e3)
    return {"median_ms": statistics.median(times), "p99_ms": sorted(times)[int(0.99 * num_steps)], "num_seqs": num_seqs}


def run(model: str | None, *, rounds: int = 5) -> Iterator[tuple[str, dict[str, float]]]:
    """Every figure, as it is known."""
    yield "start to first token", startup(model)
    yield "engine's own work, 256 sequences", engine_overhead()
    llm = LLM(model, max_num_seqs=64)
    peer = Peer(llm)
    for batch in (1, 8):
        yield f"decode, batch {batch}", decode(llm, peer, batch, rounds=rounds)
    yield "first token, 512 prompt tokens", first_token(llm, peer, rounds=rounds)
    del peer
    yield "continuous against static batching", continuous_against_static(llm)
