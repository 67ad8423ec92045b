"""What the README and the docstrings show is what happens."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import coded_torch

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = [
    m.name
    for m in pkgutil.walk_packages(coded_torch.__path__, "coded_torch.")
    if not m.name.startswith(("coded_torch._ops", "coded_torch._plan"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=OPTIONS).failed == 0


def test_readme():
    readme = Path(__file__).resolve().parents[1] / "README.md"
    result = doctest.testfile(str(readme), module_relative=False, optionflags=OPTIONS)
    assert result.attempted > 5
    assert result.failed == 0


def test_public_names_are_documented():
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if callable(value):
                assert value.__doc__, f"{name}.{public} has no docstring"
