"""What the README and the docstrings show is what happens."""

import doctest
import importlib
import json
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


def test_the_readmes_table_is_that_of_the_results():
    root = Path(__file__).resolve().parents[1]
    results = json.loads((root / "benchmarks" / "results" / "batches.json").read_text())
    readme = (root / "README.md").read_text()
    for setting, case in results["networks"]["lenet5"]["main"].items():
        cells = [
            "{:.3f} ± {:.3f}".format(*case["codes"][code]["relative_accuracy"])
            for code in ("paper", "replication", "default")
        ]
        error = case["codes"]["default"]["against paper"]["mse"][0]
        assert f"| {setting} | {' | '.join(cells)} | {error:.3f} |" in readme


def test_public_names_are_documented():
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if callable(value):
                assert value.__doc__, f"{name}.{public} has no docstring"
