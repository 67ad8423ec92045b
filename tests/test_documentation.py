"""What the README and the docstrings show is what happens."""

import copy
import doctest
import importlib
import pkgutil
import re
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


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
        yield importlib.import_module("report")


@pytest.fixture(scope="module")
def results(report):
    return report.load_results()


def test_the_readmes_tables_are_those_of_the_results(report, results):
    pages = [path.read_text() for path in report.READMES]
    for page in pages:
        assert report.fill(page, results) == page
    shown = set(re.findall(r"<!-- table: (\w+) -->", "".join(pages)))
    assert shown == set(report.TABLES)


def test_other_results_make_another_table(report, results):
    page = report.READMES[0].read_text()
    others = copy.deepcopy(results)
    for case in others["batches"]["lenet5"]["main"].values():
        case["codes"]["default"]["relative_accuracy"] = [0.123456, 0.05]
    assert "| 0.123 ± 0.050 |" in report.fill(page, others)


def test_every_picture_can_be_drawn_and_is_there(report, results, tmp_path):
    for name, draw in report.FIGURES.items():
        draw(results).savefig(tmp_path / "picture.png")
        picture = report.FOLDER / "results" / f"{name}.png"
        assert 0 < picture.stat().st_size < 300_000


def test_pages_show_pictures_and_link_to_files_that_exist(report):
    for path in report.READMES:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link.partition("#")[0]).exists(), link


def test_public_names_are_documented():
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if callable(value):
                assert value.__doc__, f"{name}.{public} has no docstring"
