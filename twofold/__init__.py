"""Twofold: every technique that makes LLM inference fast, twice: once to read, once to run.

from twofold import LLM, SamplingParams
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twofold.llm import LLM, SamplingParams
    from twofold.outputs import CompletionOutput, RequestOutput

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
__version__ = "0.1.0"

_HOME = {"LLM": "llm", "SamplingParams": "llm", "RequestOutput": "outputs", "CompletionOutput": "outputs"}


def __getattr__(name: str) -> Any:  # `import twofold` costs nothing until something of it is used
    if name not in _HOME:
        raise AttributeError(f"module 'twofold' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"twofold.{_HOME[name]}"), name)
