"""A backend put together from a partial one and a complete one."""

from types import ModuleType, SimpleNamespace

import pytest

import reference
from reference.model.decoder import Decoder, overlay
from twofold.conformance import plain_torch
from twofold.conformance.properties import model as properties
from twofold.conformance.strategies.model import random_model


def test_every_op_comes_from_the_module_or_else_from_the_base():
    mine = ModuleType("mine")
    mine.swiglu = lambda gate_up, *, out=None: gate_up
    mine.helper = lambda: None
    backend = overlay(mine, reference)
    assert backend.swiglu is mine.swiglu
    assert backend.rms_norm is reference.rms_norm
    assert backend.__all__ == reference.__all__
    assert {name for name, where in backend.origin.items() if where == "mine"} == {"swiglu"}
    assert set(backend.origin) == set(reference.__all__)
    assert not hasattr(backend, "helper")


def test_dunder_all_says_which_names_are_ops():
    """A module that imports `linear` for its own use does not offer it."""
    mine = SimpleNamespace(__name__="mine", __all__=["swiglu"], swiglu=min, linear=max)
    assert overlay(mine, reference).linear is reference.linear
    with pytest.raises(ValueError, match="none called rotary"):
        overlay(SimpleNamespace(__all__=["swiglu", "rotary"], swiglu=min), reference)


@pytest.mark.parametrize("module", [SimpleNamespace(), SimpleNamespace(swigglu=min), SimpleNamespace(__all__=[])])
def test_a_module_without_any_op_is_refused(module):
    """A misspelt name would otherwise run the base and call it the module's."""
    with pytest.raises(ValueError, match="one or more of the ops"):
        overlay(module, reference)


def test_an_op_that_nobody_has_is_named():
    base = SimpleNamespace(swiglu=min, rotary=max)
    backend = overlay(SimpleNamespace(swiglu=sum), base)
    with pytest.raises(NotImplementedError, match="'rms_norm'"):
        backend.rms_norm  # noqa: B018
    assert getattr(backend, "rms_norm", None) is None


def test_overlays_stack():
    """An overlay is a backend: it can be a base or a module, and ops keep saying where they are from."""
    first = overlay(SimpleNamespace(__name__="first", swiglu=reference.swiglu), reference)
    second = overlay(SimpleNamespace(__name__="second", rotary=reference.rotary), first)
    assert (second.origin["swiglu"], second.origin["rotary"]) == ("first", "second")
    assert second.origin["linear"] == "reference"
    assert overlay(first, plain_torch).origin["linear"] == "reference"


def test_a_decoder_runs_on_an_overlay():
    """One op replaced: it is called, and the logits are what they were."""
    calls = []

    def swiglu_linear_add(*args, **kwargs):
        calls.append(1)
        return reference.swiglu_linear_add(*args, **kwargs)

    model, tokens = random_model("llama"), [[4, 5, 6]]
    backend = overlay(SimpleNamespace(swiglu_linear_add=swiglu_linear_add), reference)
    got, expected = (properties.paged_logits(Decoder(*model, backend=b), tokens, [[3]]) for b in (backend, reference))
    properties.assert_same_logits(got, expected, "overlay", tolerance=0)
    assert len(calls) == model[0].num_layers
