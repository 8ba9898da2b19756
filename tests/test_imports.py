"""Every module of the three packages can be imported: those that only one kind of device asks for, too."""

import importlib
import pkgutil

import pytest

import fast
import reference
import twofold

MODULES = sorted(
    module.name
    for package in (fast, reference, twofold)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_can_be_imported(name: str):
    importlib.import_module(name)
