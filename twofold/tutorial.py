"""What the tutorials share: reference code shown as it is, plots that fit the page, exercises that check themselves."""

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from twofold import plot_style

ROOT = Path(__file__).parents[1]


def show(*objects: Any) -> Any:
    """The source of functions, classes or modules, as it stands in the repository: included, never copied."""
    from IPython.display import Markdown

    parts = []
    for obj in objects:
        path = Path(inspect.getsourcefile(obj) or "").relative_to(ROOT)
        source = textwrap.dedent(inspect.getsource(obj)).rstrip()
        parts.append(f'```python title="{path}"\n{source}\n```')
    return Markdown("\n\n".join(parts))


def body(function: Callable[..., Any]) -> Any:
    """A function's lines without its docstring, where the contract has been read elsewhere."""
    from IPython.display import Markdown

    path = Path(inspect.getsourcefile(function) or "").relative_to(ROOT)
    source = textwrap.dedent(inspect.getsource(function)).rstrip()
    if function.__doc__:
        for quotes in ('"""', "'''"):
            before, mark, rest = source.partition(quotes)
            if mark:
                source = before.removesuffix("r").rstrip() + rest.partition(quotes)[2]
                break
    return Markdown(f'```python title="{path}"\n{source}\n```')


def figure(width: float = 7.0, height: float = 3.4, columns: int = 1, **settings: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes in the project's style, drawn as SVG where it stands."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("svg")
    return plot_style.figure(width, height, columns, **settings)


def check(name: str, attempt: Callable[[], Any], expected: Callable[[], Any]) -> None:
    """Compare a reader's answer with the right one, and print what comes of it. An exercise left undone is no error.

    Args:
        attempt: Calls the reader's code. None, or ``NotImplementedError``: not done yet.
        expected: Gives the right answer.

    Example:
        >>> check("Exercise 1", lambda: None, lambda: 3)
        Exercise 1: not done yet
        >>> check("Exercise 1", lambda: 4, lambda: 3)
        Exercise 1: not right yet: expected 3, got 4
        >>> check("Exercise 1", lambda: 3.0, lambda: 3)
        Exercise 1: right
    """
    try:
        got = attempt()
    except NotImplementedError:
        got = None
    except Exception as error:  # the reader's own code: whatever it raises is news for the reader
        print(f"{name}: it raised {type(error).__name__}: {error}")
        return
    if got is None:
        print(f"{name}: not done yet")
        return
    right = expected()
    if np.shape(got) != np.shape(right):
        print(f"{name}: not right yet: expected shape {np.shape(right)}, got {np.shape(got)}")
    elif not np.allclose(got, right, rtol=1e-4, atol=1e-6):
        if np.ndim(right) == 0:
            print(f"{name}: not right yet: expected {right}, got {got}")
        else:
            worst = np.unravel_index(np.argmax(np.abs(np.subtract(got, right))), np.shape(right))
            where = tuple(int(i) for i in worst)
            print(
                f"{name}: not right yet: at {where} expected {np.asarray(right)[worst]}, got {np.asarray(got)[worst]}"
            )
    else:
        print(f"{name}: right")
