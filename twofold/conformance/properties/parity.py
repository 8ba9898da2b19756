"""The interface is one: a backend's ops have the names and the signatures of the reference's, to the letter.

Only the array's type differs, `numpy.ndarray` there and the backend's own here; everything else in a signature (names,
order, kinds, defaults, dtypes, axes) is the contract, and drifts unless it is compared.
"""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import reference


def describe(annotation: Any) -> str:
    """An annotation as text, without the type of the array: dtype and axes of arrays, the names of all else."""
    if annotation is inspect.Parameter.empty:
        return "nothing"
    if hasattr(annotation, "dim_str"):  # a jaxtyping array
        dtypes = annotation.dtypes  # names, or an object that stands for any
        names = ", ".join(sorted(dtypes)) if isinstance(dtypes, list | tuple) else "any dtype"
        return f"array of {names}: [{annotation.dim_str}]"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(describe, arguments))
    if origin is not None:
        return f"{getattr(origin, '__name__', origin)}[{', '.join(map(describe, arguments))}]"
    return getattr(annotation, "__name__", str(annotation))


def describe_parameters(op: Callable[..., Any]) -> list[str]:
    """One line for each parameter, in order, and one for what is returned."""
    signature = inspect.signature(op)
    lines = [
        f"{p.name} ({p.kind.description}): {describe(p.annotation)}"
        + ("" if p.default is p.empty else f" = {p.default!r}")
        for p in signature.parameters.values()
    ]
    return [*lines, f"-> {describe(signature.return_annotation)}"]


def has_every_op(backend: Any) -> None:
    """Every op of the interface is there, and what the backend lists as its ops is the interface."""
    missing = [name for name in reference.__all__ if not callable(getattr(backend, name, None))]
    assert not missing, f"ops that the backend lacks: {missing}"
    strangers = sorted(set(getattr(backend, "__all__", reference.__all__)) - set(reference.__all__))
    assert not strangers, f"names in the backend's __all__ that are no ops of the interface: {strangers}"


def signature_agrees(backend: Any, name: str) -> None:
    """The op's signature is the reference's: names, order, kinds, defaults, dtypes and axes."""
    op = getattr(backend, name, None)
    assert callable(op), f"{name}: the backend lacks it"
    expected, got = describe_parameters(getattr(reference, name)), describe_parameters(op)
    different = [f"  expected {a}\n  got      {b}" for a, b in zip(expected, got) if a != b]
    longer = [f"  only in the reference: {line}" for line in expected[len(got) :]]
    longer += [f"  only in the backend: {line}" for line in got[len(expected) :]]
    assert expected == got, "\n".join([f"{name}: the signatures differ", *different, *longer])
