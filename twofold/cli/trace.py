"""`twofold trace`: a trace file as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from twofold.errors import TwofoldError


def trace(
    file: Annotated[Path, typer.Argument(help="What `generate --trace FILE` wrote.", metavar="FILE")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: FILE with .svg.", metavar="FILE")
    ] = None,
) -> int:
    """Draw a trace as an SVG: blocks over time, and the batch over time."""
    from reference.batching.trace import read_trace
    from twofold.trace_svg import draw

    try:
        with file.open(encoding="utf-8") as lines:
            records = read_trace(lines)
    except OSError as error:
        raise TwofoldError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise TwofoldError(f"{file}: not a trace (`twofold generate --trace FILE` writes one)") from None
    target = output or file.with_suffix(".svg")
    try:
        picture = draw(records)
        target.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise TwofoldError(f"{target}: {error.strerror}") from None
    except (KeyError, TypeError, IndexError):
        raise TwofoldError(f"{file}: not a whole trace: a record lacks what the schema asks for") from None
    print(target)
    return 0
