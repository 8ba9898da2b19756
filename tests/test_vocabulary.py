"""One thing has one name: every argument and every axis of every op is in the vocabulary."""

import inspect

import pytest

import reference
from reference.vocabulary import ARGUMENTS, AXES


def axes(annotation) -> set[str]:
    """The axes that an annotation names, whatever it is nested in."""
    inner = getattr(annotation, "__args__", None)
    if inner:
        return set().union(*(axes(part) for part in inner))
    return {axis.lstrip("*") for axis in getattr(annotation, "dim_str", "").split()}


@pytest.mark.parametrize("name", reference.__all__)
def test_every_name_is_in_the_vocabulary(name):
    """An op invents no name: what it calls its arguments and axes, the glossary explains."""
    signature = inspect.signature(getattr(reference, name))
    unknown = set(signature.parameters) - set(ARGUMENTS)
    assert not unknown, f"{name}: arguments that the vocabulary lacks: {sorted(unknown)}"
    named = set().union(*(axes(p.annotation) for p in signature.parameters.values()), axes(signature.return_annotation))
    unknown = {axis for axis in named if axis.isidentifier()} - set(AXES) - set(ARGUMENTS) - {"rest"}
    assert not unknown, f"{name}: axes that the vocabulary lacks: {sorted(unknown)}"


def test_no_name_is_explained_twice():
    """A name that is an axis and an argument means the same as both, and is explained once."""
    assert not set(AXES) & set(ARGUMENTS)
