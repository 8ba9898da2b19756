"""The command line: `twofold generate`, `chat`, `models`, `pull`, `trace`, `bench`.

Answers go to stdout; live lines, progress and summaries to stderr. What a user did wrong is one line on stderr and exit
status 2; Ctrl-C ends with what was generated so far and 130.
"""

import sys

import typer

from twofold.cli import bench, chat, generate, models, trace
from twofold.errors import TwofoldError

# What the parser raises. typer exports the leaves only, and brings its own click or uses the installed one.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="twofold",
    help="Every technique that makes LLM inference fast, twice: once to read, once to run.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("models")(models.models)
app.command("pull")(models.pull)
app.command("trace")(trace.trace)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit status. No exception that a user can cause leaves it."""
    if arguments in ([], ["bench"]):
        arguments = [*arguments, "--help"]  # the help, not a complaint
    try:
        return app(arguments, prog_name="twofold", standalone_mode=False) or 0
    except CommandLineError as error:
        return _complain(error.format_message())  # type: ignore[attr-defined]
    except (TwofoldError, ValueError, NotImplementedError) as error:
        return _complain(str(error))
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # `twofold generate ... | head`: the reader has seen enough
        sys.stdout = None
        return 0


def _complain(sentence: str) -> int:
    print(f"twofold: {' '.join(sentence.split())}", file=sys.stderr)
    return 2
