"""Formulas become MathML when the site is built: browsers draw it themselves, so no script and no other host is needed.

Two spellings are read: ``$...$`` and ``$$...$$`` in pages and tutorials (`pymdownx.arithmatex` finds them), and the
``.. math::`` and ``:math:`` of docstrings, which are written for `help()` first.
"""

import html as entities
import re

from latex2mathml.converter import convert
from markdown import Extension
from markdown.preprocessors import Preprocessor

DIRECTIVE = re.compile(r"^(?P<indent> *)\.\. math::[ \t]*(?P<first>.*)$")
FENCE = re.compile(r"^ *(```+|~~~+)")
ROLE = re.compile(r":math:`([^`]*)`")
FOUND = re.compile(r'<(?P<tag>span|div) class="arithmatex">\s*\\[(\[](?P<latex>.*?)\\[)\]]\s*</(?P=tag)>', re.DOTALL)


class DirectiveToDollars(Preprocessor):
    """``.. math::`` and the lines indented under it become a block between double dollars."""

    def run(self, lines: list[str]) -> list[str]:
        result: list[str] = []
        rest = iter([*lines, None])
        line = next(rest)
        fence = ""  # what closes the block of code we are in, if any
        while line is not None:
            if mark := FENCE.match(line):
                fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
            if fence or mark:
                result.append(line)
                line = next(rest)
                continue
            found = DIRECTIVE.match(line)
            if not found:
                result.append(ROLE.sub(r"\\(\1\\)", line))
                line = next(rest)
                continue
            indent = found["indent"]
            formula = [found["first"]]
            line = next(rest)
            while line is not None and (not line.strip() or line.startswith(indent + " ")):
                formula.append(line.strip())
                line = next(rest)
            rows = [row for row in "\n".join(formula).strip().split("\n\n") if row.strip()]
            for row in rows:
                result += ["", f"{indent}$$", f"{indent}{' '.join(row.split())}", f"{indent}$$", ""]
        return result


class MathDirective(Extension):
    """Registers `DirectiveToDollars` before anything else looks at the text."""

    def extendMarkdown(self, md):
        md.preprocessors.register(DirectiveToDollars(md), "math_directive", 200)


def on_config(config, **_):
    config.markdown_extensions.append(MathDirective())
    return config


def on_page_content(html, page, config, files):
    return FOUND.sub(_mathml, html)


def _mathml(found: re.Match) -> str:
    display = "block" if found["tag"] == "div" else "inline"
    return convert(entities.unescape(found["latex"]).strip(), display=display)
