"""JSON from a stranger: read only within bounds, so that no file costs more than a moment and a little memory.

A parser turns three bytes (``[],``) into a hundred, recurses on nesting and lets the last of two equal keys win.
Here a text too large or too full is refused before it is parsed, and a key said twice is an error.
"""

import json
import stat
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError

MAX_BYTES = 16 << 20
MAX_CONTAINERS = 200_000  # objects and lists: what costs most memory for its bytes
MAX_VALUES = 1_000_000


def parse_json(text: bytes, where: str) -> Any:
    """The value in ``text``; ``where`` names it in the sentence of a ``TwofoldError``.

    Example:
        >>> parse_json(b'{"layers": 2}', "config.json")
        {'layers': 2}
        >>> parse_json(b'{"layers": 2, "layers": 3}', "config.json")
        Traceback (most recent call last):
        twofold.errors.TwofoldError: config.json: says 'layers' twice
    """
    if len(text) > MAX_BYTES:
        raise TwofoldError(f"{where}: {len(text):,} bytes of JSON, more than the {MAX_BYTES:,} that are read")
    containers = text.count(b"{") + text.count(b"[")
    if containers > MAX_CONTAINERS or text.count(b",") > MAX_VALUES:
        raise TwofoldError(f"{where}: JSON with more values than any checkpoint has")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise TwofoldError(f"{where}: says {shown(name)!r} twice")
            found[name] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except TwofoldError:
        raise
    except RecursionError:
        raise TwofoldError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:  # malformed, not UTF-8, or a number of thousands of digits
        raise TwofoldError(f"{where}: not valid JSON ({error})") from None


def read_json(path: Path) -> Any:
    """The value in a file of JSON."""
    return parse_json(read_bytes(path, MAX_BYTES), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; anything else in it is refused."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise TwofoldError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole file of at most ``limit`` bytes."""
    size = file_size(path)
    if size > limit:
        raise TwofoldError(f"{path}: {size:,} bytes, more than the {limit:,} that are read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from None


def file_size(path: Path) -> int:
    """Bytes of a regular file. Anything else (a folder, a pipe that never ends) is refused."""
    try:
        status = path.stat()
    except OSError as error:
        raise cannot_read(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise TwofoldError(f"{path}: not a file")
    return status.st_size


def cannot_read(path: Path, error: OSError) -> TwofoldError:
    """The sentence for a file that the system does not let us read."""
    return TwofoldError(f"{path}: cannot be read ({error.strerror or error})")


def shown(name: object) -> str:
    """A stranger's name as it may stand in a sentence: short, one line, nothing a terminal would obey.

    Example:
        >>> shown("model.norm.weight"), shown("two\\nlines")
        ('model.norm.weight', 'two\\\\nlines')
    """
    text = str(name)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if text.isprintable() else repr(text)[1:-1]
