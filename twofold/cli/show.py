"""What the terminal shows: progress while loading, answers as they come, one line of figures at the end."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twofold.llm import Chunk, RequestOutput, RunMetrics


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A callback ``(what, done, total)`` that draws progress bars on stderr; silent when that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield on_progress


@contextmanager
def counting(what: str) -> Iterator[Callable[[str, int], None]]:
    """A callback that is told what begins, and of how many; draws a bar with an estimate on stderr, if a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(what),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=None, now="")
        begun = 0

        def on_begin(now: str, total: int) -> None:
            nonlocal begun
            bars.update(task, completed=begun, total=total, now=now)
            begun += 1

        yield on_begin


class Answers:
    """Answers on stdout. One prompt streams as it comes; several show a live line each on stderr until all are done."""

    def __init__(self, prompts: Sequence[str], *, num_outputs: int, as_json: bool):
        self.prompts = prompts
        self.as_json = as_json
        self.streams = len(prompts) == 1 and num_outputs <= 1 and not as_json
        self.tails: dict[tuple[int, int], str] = {}
        self.live = None
        self.wrote_newline = True

    def __enter__(self) -> "Answers":
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        if not self.streams and console.is_terminal:
            self.live = Live(console=console, transient=True, refresh_per_second=8, get_renderable=self._lines)
            self.live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.__exit__(None, None, None)
        if self.streams and not self.wrote_newline:
            print(flush=True)

    def show(self, chunk: "Chunk") -> None:
        """Take what came: to stdout at once if it is the only answer, else to its live line."""
        if self.streams:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            self.wrote_newline = chunk.text.endswith("\n") if chunk.text else self.wrote_newline
        else:
            key = (chunk.prompt_index, chunk.output_index)
            self.tails[key] = (self.tails.get(key, "") + chunk.text)[-200:]

    def _lines(self):
        from rich.text import Text

        lines = [
            Text.assemble((f"{prompt + 1}.{sample} ", "bold"), (" ".join(tail.split()))[-100:])
            for (prompt, sample), tail in sorted(self.tails.items())
        ]
        return Text("\n").join(lines[-40:])

    def finish(self, outputs: "Sequence[RequestOutput]") -> None:
        """The answers that were not streamed, in the order of their prompts; log-probabilities if asked for."""
        for index, output in enumerate(outputs):
            if self.as_json:
                print(json.dumps(output.as_dict(), ensure_ascii=False))
                continue
            for sample in output.outputs:
                if not self.streams:
                    if len(self.prompts) > 1 or len(output.outputs) > 1:
                        print(f"--- {index + 1}.{sample.index}: {' '.join(self.prompts[index].split())[:60]}")
                    print(sample.text)
                for step in sample.logprobs or []:
                    print("  ".join(f"{entry.decoded_token!r} {entry.logprob:.3f}" for entry in step.values()))
        sys.stdout.flush()


def summary(metrics: "RunMetrics") -> str:
    """The closing line: tokens, time to first token, tokens per second, KV blocks at the peak and what they held."""
    first = f"{metrics.time_to_first_token:.2f} s" if metrics.time_to_first_token is not None else "no token"
    parts = [
        f"{metrics.num_prompt_tokens} prompt + {metrics.num_generated_tokens} generated tokens",
        f"first token {first}",
        f"{metrics.tokens_per_second:.1f} tokens/s",
        f"{metrics.peak_blocks} of {metrics.num_blocks} KV blocks at the peak, {metrics.empty_slots:.1%} of slots free",
    ]
    if metrics.seed is not None:
        parts.append(f"seed {metrics.seed}")
    return " · ".join(parts)
