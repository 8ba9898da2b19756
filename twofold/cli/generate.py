"""`twofold generate`: answers to one or many prompts."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twofold.cli import options
from twofold.errors import TwofoldError

if TYPE_CHECKING:
    from reference.batching.trace import TraceWriter
    from twofold.llm import LLM

Prompts = Annotated[
    list[str] | None, typer.Argument(help="One or many; - reads one from stdin.", metavar="[PROMPT]...")
]


def generate(
    prompts: Prompts = None,
    model: options.Model = None,
    backend: options.Backend = "reference",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    deterministic: Annotated[bool, typer.Option(help="The backend's batch-invariant ops.")] = False,
    file: Annotated[Path | None, typer.Option("--file", help="Prompts, one a line.", metavar="FILE")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--raw", help="Use the chat template (if there is one).")] = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    n: Annotated[int, typer.Option("--n", help="Samples for each prompt.", metavar="N")] = 1,
    beam: Annotated[int, typer.Option(help="Beam search with this many beams.", metavar="N")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.", metavar="TEXT")] = None,
    logprobs: Annotated[int | None, typer.Option(help="Show this many best tokens at each place.", metavar="N")] = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_window: options.KVWindow = None,
    weights: options.Weights = "auto",
    lora_modules: options.LoraModules = None,
    speculate: options.Speculate = None,
    block_size: options.BlockSize = 16,
    num_blocks: options.NumBlocks = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    max_num_seqs: options.MaxNumSeqs = None,
    max_model_len: options.MaxModelLen = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    preemption: options.Preemption = "recompute",
    swap_coding: options.SwapCoding = "none",
    prefix_cache: Annotated[bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Share prefixes.")] = True,
    load: options.Load = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt, on stdout.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write every step as JSON.", metavar="FILE")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Write what host and device do, kernel by kernel, for chrome://tracing.", metavar="FILE"),
    ] = None,
) -> int:
    """Answer prompts with a model, and say what it took."""
    from twofold.cli.show import Answers, progress, summary
    from twofold.llm import LLM, SamplingParams

    texts = list(read_prompts(prompts, file))
    adapters = options.adapters(lora_modules)
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        n=n,
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        logprobs=logprobs,
    )
    with open_trace(trace) as tracer:
        with progress() as on_progress:
            llm = LLM(
                model,
                backend=backend,
                device=device,
                dtype=dtype,
                deterministic=deterministic,
                kv_cache_dtype=kv_cache_dtype,
                kv_window=kv_window,
                weights=weights,
                lora_modules=adapters,
                speculate=speculate,
                block_size=block_size,
                num_blocks=num_blocks,
                gpu_memory_utilization=gpu_memory_utilization,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_num_batched_tokens=max_num_batched_tokens,
                preemption=preemption,
                swap_coding=swap_coding,
                enable_prefix_caching=prefix_cache,
                trace=tracer,
                load=load,
                on_progress=on_progress,
            )
        wanted = [llm.render(text, chat=chat, system=system) for text in texts]
        lora = list(adapters)[-1] if adapters else None
        answers = Answers(texts, num_outputs=beam or n, as_json=as_json)
        with interruptible(llm.stop) as interrupted, open_profile(profile, llm), answers:
            for chunk in llm.stream(wanted, params, lora=lora, num_beams=beam):
                answers.show(chunk)
    answers.finish(llm.outputs)
    print(summary(llm.metrics()), file=sys.stderr)
    failed = [output for output in llm.outputs if output.error]
    for output in failed:
        print(f"twofold: {f'prompt {output.request_id}: ' if len(texts) > 1 else ''}{output.error}", file=sys.stderr)
    return 130 if interrupted else 2 if failed else 0


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[list[bool]]:
    """While open, Ctrl-C calls ``stop`` and is noted in the list; a second one is a KeyboardInterrupt as ever."""
    noted: list[bool] = []
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_: object) -> None:
        noted.append(True)
        signal.signal(signal.SIGINT, before)
        stop()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def open_trace(path: Path | None) -> "Iterator[TraceWriter | None]":
    """A writer of trace records into ``path``, or None."""
    if path is None:
        yield None
        return
    from reference.batching.trace import TraceWriter

    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise TwofoldError(f"--trace {path}: {error.strerror}") from None
    with file:
        yield TraceWriter(file)


@contextmanager
def open_profile(path: Path | None, llm: "LLM") -> Iterator[None]:
    """While open, `torch.profiler` watches, and then writes into ``path``; None: nobody does."""
    if path is None:
        yield
        return
    if not type(llm.cache.pools[0]).__module__.startswith("torch"):
        raise TwofoldError("--profile: only a backend on torch can be profiled (--trace times every step on any)")
    try:
        path.touch()
    except OSError as error:
        raise TwofoldError(f"--profile {path}: {error.strerror}") from None
    from torch.profiler import profile

    with profile() as profiler:
        yield
    profiler.export_chrome_trace(str(path))


def read_prompts(prompts: list[str] | None, file: Path | None) -> Iterator[str]:
    """The prompts of the command line, of stdin where one is "-", and of ``file``."""
    if not prompts and file is None:
        raise TwofoldError("no prompt: give one or many, - to read one from stdin, or --file with one a line")
    for prompt in prompts or []:
        yield sys.stdin.read() if prompt == "-" else prompt
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TwofoldError(f"--file {file}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
        if not any(line.strip() for line in lines):
            raise TwofoldError(f"--file {file}: no prompt in it")
        yield from (line for line in lines if line.strip())
