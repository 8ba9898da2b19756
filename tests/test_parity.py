"""One interface: every backend has every op, with the same signature; and the reference documents each as agreed."""

import inspect
import sys

import pytest

import fast
import reference
from twofold.conformance import plain_torch
from twofold.conformance.properties import parity

BACKENDS = {"plain_torch": plain_torch, "fast": fast}
backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
ops = pytest.mark.parametrize("name", reference.__all__)


@backends
def test_every_op_is_there(backend):
    """A backend has every op of the interface, and lists no other."""
    parity.has_every_op(backend)


@backends
@ops
def test_signatures_agree(backend, name):
    """Names, order, kinds, defaults, dtypes and axes are the reference's."""
    parity.signature_agrees(backend, name)


def test_a_drifted_signature_is_seen():
    """Another name, order, kind, default, dtype or axis is a difference; another array type is none."""
    from jaxtyping import Float, Int
    from numpy import ndarray
    from torch import Tensor

    def original(x: Float[ndarray, "a b"], *, k: int = 1, out: Float[ndarray, " a"] | None = None) -> tuple[int]: ...
    def ported(x: Float[Tensor, "a b"], *, k: int = 1, out: Float[Tensor, " a"] | None = None) -> tuple[int]: ...
    def name(y: Float[Tensor, "a b"], *, k: int = 1, out: Float[Tensor, " a"] | None = None) -> tuple[int]: ...
    def order(x: Float[Tensor, "a b"], *, out: Float[Tensor, " a"] | None = None, k: int = 1) -> tuple[int]: ...
    def kind(x: Float[Tensor, "a b"], k: int = 1, *, out: Float[Tensor, " a"] | None = None) -> tuple[int]: ...
    def default(x: Float[Tensor, "a b"], *, k: int = 2, out: Float[Tensor, " a"] | None = None) -> tuple[int]: ...
    def dtype(x: Int[Tensor, "a b"], *, k: int = 1, out: Float[Tensor, " a"] | None = None) -> tuple[int]: ...
    def axes(x: Float[Tensor, "b a"], *, k: int = 1, out: Float[Tensor, " a"] | None = None) -> tuple[int]: ...
    def option(x: Float[Tensor, "a b"], *, k: int = 1, out: Float[Tensor, " a"]) -> tuple[int]: ...
    def result(x: Float[Tensor, "a b"], *, k: int = 1, out: Float[Tensor, " a"] | None = None) -> tuple[int, int]: ...

    wanted = parity.describe_parameters(original)
    assert parity.describe_parameters(ported) == wanted, "only the array's type differs: that is no drift"
    for drifted in (name, order, kind, default, dtype, axes, option, result):
        assert parity.describe_parameters(drifted) != wanted, f"a drift in {drifted.__name__} went unseen"


def test_the_interface_is_sorted_and_real():
    """``reference.__all__`` is sorted, has no name twice, and names functions."""
    assert reference.__all__ == sorted(set(reference.__all__)), "reference.__all__ is not sorted, or repeats a name"
    for name in reference.__all__:
        assert inspect.isfunction(getattr(reference, name)), f"{name} is not a function"


def sections(op) -> set[str]:
    """The headings of a docstring: lines that begin a section, such as ``Args:``."""
    lines = (inspect.getdoc(op) or "").splitlines()
    return {line.split(":")[0] for line in lines if ":" in line and line[:1].isalpha()}


@ops
def test_the_reference_is_documented(name):
    """An op begins with one sentence, shows an example that runs, and annotates all that it takes and returns."""
    op = getattr(reference, name)
    lines = (inspect.getdoc(op) or "").splitlines()
    assert lines, f"{name}: no docstring"
    sentence = lines[0]
    whole = sentence.endswith((".", ":")) and (len(lines) == 1 or not lines[1].strip())
    assert whole, f"{name}: the docstring does not begin with one sentence on a line of its own: {sentence!r}"
    assert "Example" in sections(op), f"{name}: no Example"
    assert any(line.strip().startswith(">>>") for line in lines), f"{name}: its Example does not run"

    signature = inspect.signature(op)
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not bare, f"{name}: parameters without annotation: {bare}"
    assert signature.return_annotation is not signature.empty, f"{name}: no return annotation"
    assert sys.modules[op.__module__].__doc__, f"{op.__module__}: the module has no docstring"


@ops
def test_the_reference_names_its_sources(name):
    """A file is one technique, and where that comes from is said by the op, or by another op of its file."""
    module = getattr(reference, name).__module__
    siblings = [op for op in map(reference.__dict__.get, reference.__all__) if op.__module__ == module]
    sourced = any("Source" in sections(op) for op in siblings)
    assert sourced or module == "reference.numerics.arrays", f"{name}: nothing in {module} has a Source"
