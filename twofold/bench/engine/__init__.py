"""`twofold bench engine`: whole runs of the engine on a GPU, with random weights of well-known shapes.

Every figure stands beside the least that is possible (`limits`), what vLLM does on such a machine, and what was to be
reached. Requests are greedy and never stop early; the prefix cache is off. Each run is done twice before it counts, so
that kernels are compiled and steps recorded, the long ones too.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from reference.batching.request import Request, SamplingParams
from twofold.bench.engine import peer
from twofold.bench.limits import Limits
from twofold.bench.profiling import profile
from twofold.errors import TwofoldError
from twofold.llm import LLM

SEED = 0
QWEN, LLAMA = "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B"
VLLM_SOURCE = "vLLM 0.24 on one H100: torch 2.11, FA3, full and piecewise graphs, asynchronous scheduling, in process"
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=SEED, ignore_eos=True)


@dataclass(frozen=True)
class Target:
    """What is to be reached; ``vllm`` is what it does (`VLLM_SOURCE`), where it was measured."""

    at_least: float
    reach_for: float | None = None
    vllm: float | None = None


@dataclass(frozen=True)
class Deck:
    """What is run on one engine, and measured.

    Attributes:
        name: Part of the names of its figures, and what ``--only`` selects by.
        settings: Of `LLM`, beside those that all decks have.
        latency: (sequences, prompt tokens, output tokens): the first token, and a step after it.
        throughput: (requests, fewest, most): prompts and outputs of uniform lengths, all at once.
        arrivals: Of the throughput, that requests then arrive at; None: that is not measured.
        compare: Sampling parameters, and the name of what is measured once more with them.
        adapters: (how many, rank) to add; the requests then have them in turn, and are measured once more.
        beside: (sequences, prompt tokens, output tokens) for `transformers`' ``generate``, measured if it is there;
            and its continuous batching on the requests of the throughput.
        targets: By the figure's name without the deck's.
    """

    model: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    latency: Sequence[tuple[int, int, int]] = ()
    throughput: tuple[int, int, int] | None = None
    arrivals: float | None = None
    compare: tuple[str, SamplingParams] | None = None
    adapters: tuple[int, int] | None = None
    beside: tuple[int, int, int] | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)

    def quick(self) -> "Deck":
        """Fewer tokens and requests."""
        latency = [(seqs, prompt, max(2, min(tokens, 48))) for seqs, prompt, tokens in self.latency]
        throughput = self.throughput and (min(self.throughput[0], 64), *self.throughput[1:])
        beside = self.beside and (*self.beside[:2], min(self.beside[2], 48))
        return replace(self, latency=latency, throughput=throughput, beside=beside)


LATENCY = ((1, 512, 256), (32, 1024, 128), (128, 1024, 128))
MANY = (256, 100, 1024)
DECKS = [
    Deck(
        QWEN,
        "bfloat16",
        latency=LATENCY,
        throughput=MANY,
        arrivals=0.7,
        compare=("temperature, top-p and top-k", DRAWN),
        targets={
            "1 x 512, step": Target(0.90, 0.60, 1.98),
            "32 x 1024, step": Target(2.3, 1.95, 3.20),
            "128 x 1024, step": Target(6.5, 6.0, 7.4),
            "1 x 512, first token": Target(6.5, 4.0, 9.3),
            "32 x 1024, first token": Target(70.0, 60.0, 84.0),
            "32 x 1024, device idle": Target(2.0),
            "throughput": Target(22_000, 24_000, 19_000),
        },
    ),
    Deck(QWEN, "deterministic", settings={"deterministic": True}, throughput=MANY),
    Deck(QWEN, "int8 KV", settings={"kv_cache_dtype": "int8"}, throughput=MANY),
    Deck(
        LLAMA,
        "bfloat16",
        latency=LATENCY,
        throughput=MANY,
        targets={
            "start to first token": Target(25.0),
            "1 x 512, step": Target(5.7, 5.25, 6.6),
            "32 x 1024, step": Target(7.2, 6.8, 8.5),
            "128 x 1024, step": Target(12.2, 11.4, 13.9),
            "1 x 512, first token": Target(14.5, 13.0, 15.6),
            "32 x 1024, first token": Target(740.0, 720.0, 752.0),
            "throughput": Target(9_000, 9_700, 8_530),
        },
    ),
    Deck(LLAMA, "deterministic", settings={"deterministic": True}, throughput=MANY),
    Deck(
        LLAMA,
        "int4",
        settings={"weights": "int4"},
        latency=((1, 512, 256),),
        targets={"1 x 512, step": Target(2.8, 2.3)},
    ),
    Deck(LLAMA, "adapters", latency=((64, 512, 64),), adapters=(16, 16)),
    Deck(
        QWEN,
        "beside transformers",
        settings={"gpu_memory_utilization": 0.5},
        throughput=MANY,
        beside=(64, 512, 128),
        targets={
            "transformers' generate, ours": Target(8.0),
            "transformers' continuous batching, ours": Target(1.5),
        },
    ),
]


@dataclass(frozen=True)
class Figure:
    """One number, and what it is to be judged by. Less is better, but of a rate, and of how many "times" as fast."""

    model: str
    name: str
    unit: str
    value: float
    limit: float | None = None
    target: Target | None = None

    @property
    def of_limit(self) -> float | None:
        """How much of what is possible was reached, at most 1."""
        if self.limit is None:
            return None
        return self.value / self.limit if self.unit.endswith("/s") else self.limit / self.value

    def as_json(self) -> dict[str, Any]:
        """Without what is not known."""
        target = {} if self.target is None else asdict(self.target)
        flat = {"unit": self.unit, "value": self.value, "limit": self.limit, "of_limit": self.of_limit, **target}
        return {name: value for name, value in flat.items() if value is not None}


@dataclass
class Run:
    """Requests from the first to the last token.

    Attributes:
        first_token: Seconds until every request had one.
        device: Seconds of them that the device was given something to do.
        waits, gaps: Seconds to the first token of each request, and between the tokens of each.
        host: Of each step since every request had a token, the seconds that the engine took to schedule one, to launch
            it and to read one's results: `HOST_WORK`.
    """

    seconds: float
    device: float
    first_token: float
    num_tokens: int
    waits: list[float]
    gaps: list[float]
    host: np.ndarray


HOST_WORK = ("schedule", "launch", "update")


def play(llm: LLM, requests: Iterable[Request], arrivals: Sequence[float] | None = None) -> Run:
    """Run requests, added all at once or at these seconds from the start."""
    engine, waiting = llm.engine, list(requests)
    due = [0.0] * len(waiting) if arrivals is None else list(arrivals)
    added, last, waits, gaps = {}, {}, [], []
    num_tokens, first_token, first_step = 0, 0.0, 0
    worked = []
    before = engine.metrics.device_time
    start = now = time.perf_counter()
    while waiting or engine.has_unfinished():
        while waiting and due[0] <= now - start:
            added[waiting[0].request_id] = start + due.pop(0)
            engine.add(waiting.pop(0))
        output = engine.step()
        now = time.perf_counter()
        worked.append([getattr(engine.metrics, f"{work}_time") for work in HOST_WORK])
        for gained in output.sequences:
            name, count = gained.request_id, len(gained.new_token_ids)
            if name in last:
                gaps += [(now - last[name]) / count] * count
            else:
                waits.append(now - added[name])
                first_token, first_step = now - start, len(worked)
            last[name] = now
            num_tokens += count
        errors = [done.error for done in output.finished if done.error]
        if errors:
            raise TwofoldError(f"bench engine: a request failed: {errors[0]}")
    host = np.diff(np.array(worked[first_step - 1 :]), axis=0)
    return Run(now - start, engine.metrics.device_time - before, first_token, num_tokens, waits, gaps, host)


@dataclass(frozen=True)
class Times:
    """Seconds, medians over runs.

    Attributes:
        step: The time after the first token, over the other tokens.
        first_token: Until all sequences had one.
        idle: The share of time in which the device was given nothing to do.
        host: Of a step, by `HOST_WORK`.
    """

    step: float
    first_token: float
    idle: float
    host: dict[str, float]


class Bench:
    """One deck on its engine.

    Args:
        backend: Whose engine.
        rounds: Of each latency; the median counts.
        peer_pool: Settings of the cache of the engine beside ours.
    """

    def __init__(self, deck: Deck, backend: str = "fast", rounds: int = 3, peer_pool: Mapping[str, Any] | None = None):
        self.deck, self.rounds, self.num_runs, self.peer_pool = deck, rounds, 0, peer_pool or {}
        self.began = time.perf_counter()
        longest = [prompt + tokens for _, prompt, tokens in deck.latency]
        longest += [2 * deck.throughput[2]] if deck.throughput else []
        longest += [sum(deck.beside[1:])] if deck.beside else []
        self.llm = LLM(
            deck.model,
            load="dummy",
            backend=backend,
            dtype="bfloat16" if backend == "fast" else "float32",
            enable_prefix_caching=False,
            max_model_len=max(longest),
            **deck.settings,
        )
        chosen = {name: deck.settings[name] for name in ("weights", "kv_cache_dtype") if name in deck.settings}
        self.limits = Limits(self.llm.decoder.config, **chosen, dtype=self.llm.decoder.dtype)

    def figures(self) -> Iterator[Figure]:
        """All that the deck asks for, as it is known."""
        if self.deck.latency:
            yield self._start(self.deck.latency[0][1])
        for latency in self.deck.latency:
            yield from self._latency(*latency)
        if self.deck.adapters:
            yield from self._adapters(*self.deck.adapters)
        if self.deck.throughput:
            yield from self._throughput()
        if self.deck.beside and peer.is_there():
            yield from self._beside(*self.deck.beside)

    def profiles(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Of some decoding steps of each latency, kernel by kernel: see `profiling`."""
        for num_seqs, prompt, _ in self.deck.latency:
            engine, requests = self.llm.engine, self._requests([(prompt, 32)] * num_seqs)
            for request in requests:
                engine.add(request)
            while any(request.metrics.num_output_tokens < 8 for request in requests):
                engine.step()
            yield f"{num_seqs} x {prompt}", profile(engine.step, 8)
            for request in requests:
                engine.abort(request.request_id)
            while engine.has_unfinished():
                engine.step()

    def _requests(
        self, lengths: Sequence[tuple[int, int]], params: SamplingParams = GREEDY, adapters: Sequence[str] = ()
    ) -> list[Request]:
        """Random prompts, new ones each time; (prompt, output) tokens each."""
        self.num_runs += 1
        rng = np.random.default_rng([SEED, self.num_runs])
        vocab_size = self.llm.decoder.config.vocab_size
        return [
            Request(
                f"{self.num_runs}-{i}",
                rng.integers(0, vocab_size, prompt).tolist(),
                replace(params, max_tokens=output),
                adapter=adapters[i % len(adapters)] if adapters else None,
            )
            for i, (prompt, output) in enumerate(lengths)
        ]

    def _figure(self, name: str, unit: str, value: float, limit: float | None = None) -> Figure:
        return Figure(self.deck.model, f"{self.deck.name}: {name}", unit, value, limit, self.deck.targets.get(name))

    def _start(self, prompt: int) -> Figure:
        """From nothing but imports to the first token. (Kernels that no run before has compiled are compiled here.)"""
        play(self.llm, self._requests([(prompt, 1)]))
        return self._figure("start to first token", "s", time.perf_counter() - self.began)

    def _latency(self, num_seqs: int, prompt: int, tokens: int) -> Iterator[Figure]:
        name = f"{num_seqs} x {prompt}"
        times = self._times(num_seqs, prompt, tokens)
        limit = self.limits.step([prompt + tokens / 2] * num_seqs)
        yield self._figure(f"{name}, step", "ms", times.step * 1e3, limit * 1e3)
        limit = self.limits.prompts([prompt] * num_seqs)
        yield self._figure(f"{name}, first token", "ms", times.first_token * 1e3, limit * 1e3)
        yield self._figure(f"{name}, device idle", "%", 100 * times.idle)
        for work, seconds in times.host.items():
            yield self._figure(f"{name}, {work} on the host", "ms", seconds * 1e3)

    def _times(self, num_seqs: int, prompt: int, tokens: int, **how: Any) -> Times:
        lengths = [(prompt, tokens)] * num_seqs
        runs = [play(self.llm, self._requests(lengths, **how)) for _ in range(self.rounds + 2)][2:]
        return Times(
            step=statistics.median((run.seconds - run.first_token) / (tokens - 1) for run in runs),
            first_token=statistics.median(run.first_token for run in runs),
            idle=statistics.median(1 - run.device / run.seconds for run in runs),
            host=dict(zip(HOST_WORK, np.median(np.concatenate([run.host for run in runs]), axis=0).tolist())),
        )

    def _adapters(self, count: int, rank: int) -> Iterator[Figure]:
        """The same steps with adapters on all linear layers, and what they cost."""
        names = add_adapters(self.llm, count, rank)
        for num_seqs, prompt, tokens in self.deck.latency:
            plain = self._times(num_seqs, prompt, tokens).step
            step = self._times(num_seqs, prompt, tokens, adapters=names).step
            yield self._figure(f"{num_seqs} x {prompt}, step with {count} of rank {rank}", "ms", step * 1e3)
            yield self._figure(f"{num_seqs} x {prompt}, cost of adapters", "%", 100 * (step / plain - 1))

    def _throughput(self) -> Iterator[Figure]:
        lengths = self._lengths()
        run = self._third(lengths)
        saturated = run.num_tokens / run.seconds
        yield self._figure("throughput", "tokens/s", saturated, run.num_tokens / self.limits.run(lengths))
        yield self._figure("throughput, device idle", "%", 100 * (1 - run.device / run.seconds))
        if self.deck.compare:
            name, params = self.deck.compare
            other = self._third(lengths, params)
            yield self._figure(f"throughput with {name}", "tokens/s", other.num_tokens / other.seconds)
        if self.deck.arrivals:
            yield from self._arrivals(lengths, self.deck.arrivals * saturated)

    def _third(
        self,
        lengths: Sequence[tuple[int, int]],
        params: SamplingParams = GREEDY,
        arrivals: Sequence[float] | None = None,
    ) -> Run:
        """Of three runs. Long steps are met in the first, recorded in the second, and replayed in this one."""
        runs = [play(self.llm, self._requests(lengths, params), arrivals) for _ in range(3)]
        return runs[-1]

    def _lengths(self) -> list[tuple[int, int]]:
        """Of the throughput's prompts and outputs."""
        assert self.deck.throughput is not None
        count, low, high = self.deck.throughput
        return np.random.default_rng(SEED).integers(low, high + 1, (count, 2)).tolist()

    def _beside(self, num_seqs: int, prompt: int, tokens: int) -> Iterator[Figure]:
        """What `transformers` does, and how many times as fast we are. What it cannot do here is no figure."""
        transformers = peer.Transformers(self.deck.model, self.llm.decoder.dtype, **self.peer_pool)
        ways = {
            "generate": (transformers.generate, [(prompt, tokens)] * num_seqs),
            "continuous batching": (transformers.generate_batch, self._lengths()),
        }
        for name, (theirs, lengths) in ways.items():
            ours = self._third(lengths)
            try:
                seconds = theirs(self._requests(lengths))
            except Exception as error:
                warnings.warn(f"transformers' {name} is not measured: {error}", stacklevel=2)
                continue
            yield self._figure(f"transformers' {name}", "tokens/s", ours.num_tokens / seconds)
            yield self._figure(f"transformers' {name}, ours", "times", seconds / ours.seconds)

    def _arrivals(self, lengths: Sequence[tuple[int, int]], tokens_per_second: float) -> Iterator[Figure]:
        """Requests that arrive by chance (a Poisson process), so that prompts meet decoding sequences."""
        rate = tokens_per_second / statistics.mean(output for _, output in lengths)
        due = np.random.default_rng(SEED).exponential(1 / rate, len(lengths)).cumsum().tolist()
        run = self._third(lengths, arrivals=due)
        for name, seconds in (("to the first token", run.waits), ("between tokens", run.gaps)):
            for label, share in (("median", 50), ("p99", 99)):
                value = float(np.percentile(seconds, share)) * 1e3
                yield self._figure(f"{rate:.1f} requests/s: {name}, {label}", "ms", value)


def add_adapters(llm: LLM, count: int, rank: int) -> list[str]:
    """Random adapters on every linear layer, under names of their own; their numbers are the same."""
    rng, tensors = np.random.default_rng(SEED), {}
    for name, shape in llm.decoder.config.expected_tensors().items():
        if name.endswith("_proj.weight"):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = rng.standard_normal((rank, shape[1]), np.float32)
            tensors[f"{layer}.lora_B.weight"] = rng.standard_normal((shape[0], rank), np.float32) * np.float32(1e-3)
    names = [f"adapter {i}" for i in range(count)]
    llm.engine.adapters = {
        name: (llm.adapters.add(name, tensors, {"r": rank, "lora_alpha": rank}), llm.adapters.digests[name])
        for name in names
    }
    return names


def chosen(only: Sequence[str], *, quick: bool = False) -> list[Deck]:
    """The decks that have all words of one of these phrases in their model or name; all, if there are none.

    Raises:
        TwofoldError: If a phrase chooses none.
    """

    def is_meant(deck: Deck, phrase: str) -> bool:
        return all(word in f"{deck.model} {deck.name}".lower() for word in phrase.lower().split())

    for phrase in only:
        if not any(is_meant(deck, phrase) for deck in DECKS):
            known = ", ".join(f"{deck.model} {deck.name}" for deck in DECKS)
            raise TwofoldError(f"--only {phrase}: no such deck; there are {known}")
    decks = [deck for deck in DECKS if not only or any(is_meant(deck, phrase) for phrase in only)]
    return [deck.quick() for deck in decks] if quick else decks


def run(decks: Sequence[Deck], *, rounds: int = 3, profiled: bool = False) -> Iterator[Figure | tuple[str, Any]]:
    """Every figure as it is known, one engine after the other; and of each deck its profiles, by name, if wanted."""
    for deck in decks:
        bench = Bench(deck, rounds=rounds)
        yield from bench.figures()
        if profiled:
            yield from ((f"{deck.model}, {deck.name}: {name}", found) for name, found in bench.profiles())
        del bench
        gc.collect()  # its memory is the next one's
