"""The command line's page: what `--help` says, of every command, as it is now."""

import contextlib
import io
import os

MARK = "<!-- help of every command -->"
COMMANDS = [
    "generate", "chat", "models", "pull", "trace", "bench cpu", "bench kernels", "bench engine", "bench memory",
    "bench lossless", "bench planner", "bench quality",
]  # fmt: skip


def on_page_markdown(markdown, page, config, files):
    return markdown.replace(MARK, "\n\n".join(_help(command) for command in COMMANDS)) if MARK in markdown else markdown


def _help(command: str) -> str:
    from twofold.cli import run

    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        run([*command.split(), "--help"])
    return f"## twofold {command}\n\n```text\n{text.getvalue().strip()}\n```"
