"""The process that renders chat templates; `chat_template.py` starts it, asks it, and kills it when it takes too long.

    python -I -S _chat_template_worker.py SYS_PATH_AS_JSON

One line of JSON in, ``[template, variables]``; one out, ``{"text": ...}`` or ``{"error": ...}``. The names and filters
that templates expect are those of `transformers`' ``apply_chat_template``.
"""

import contextlib
import json
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

MEMORY = 512 << 20
CPU_SECONDS = 10  # should the parent die and leave a template that loops
MAX_TEXT = 8 << 20


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401

    answer({"text": "ready"})
    while line := sys.stdin.buffer.readline():
        limit_resources()
        source, variables = json.loads(line)
        answer(render(source, variables))


def answer(value: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def limit_resources() -> None:
    """So much memory for this process, and so many more seconds of computing. (Windows has no such limits.)"""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
    for name, limit in (("RLIMIT_AS", MEMORY), ("RLIMIT_CPU", seconds), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(ValueError, OSError, AttributeError):  # not known here, or set lower already
            which = getattr(resource, name)
            resource.setrlimit(which, (limit, resource.getrlimit(which)[1]))


def render(source: str, variables: dict[str, Any]) -> dict[str, str]:
    import jinja2

    try:
        text = compiled(source).render(**variables)
    except jinja2.TemplateSyntaxError as error:
        return {"error": one_line(f"the chat template is not valid Jinja ({error.message}, line {error.lineno})")}
    except Refused as error:
        return {"error": one_line(f"the chat template refuses these messages: {error}")}
    except MemoryError:
        return {"error": "the chat template was stopped: it takes too much memory"}
    except Exception as error:
        return {"error": one_line(f"the chat template failed ({type(error).__name__}: {error})")}
    if len(text) > MAX_TEXT:
        return {"error": f"the chat template wrote {len(text):,} characters, more than any model reads"}
    return {"text": text}


def one_line(sentence: str) -> str:
    """Short, and nothing in it that a terminal would obey."""
    sentence = "".join(letter if letter.isprintable() else " " for letter in " ".join(sentence.split()))
    return sentence if len(sentence) <= 500 else sentence[:497] + "..."


class Refused(Exception):
    """A template's own words, by way of its `raise_exception`."""


@lru_cache(maxsize=1)
def compiled(source: str) -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what a model wrote, for training. Here its body is all that counts."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As JSON, with no escapes for HTML (Jinja's own filter has them, and models never saw them)."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise Refused(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


if __name__ == "__main__":
    main()
