"""Tables and pictures are those of the results."""

import copy
import re

import pytest

from benchmarks import report
from benchmarks.runs import RESULTS
from benchmarks.tables import TABLES


@pytest.fixture(scope="module")
def results():
    return report.load_results()


def test_the_readmes_tables_are_those_of_the_results(results):
    pages = [path.read_text() for path in report.READMES]
    for page in pages:
        assert report.fill(page, results) == page
    shown = set(re.findall(r"<!-- table: (\w+) -->", "".join(pages)))
    assert shown == set(TABLES)


def test_other_results_make_another_table(results):
    page = report.READMES[0].read_text()
    others = copy.deepcopy(results)
    for case in others["batches"]["lenet5"]["main"].values():
        case["codes"]["KernelCode"]["relative_accuracy"] = [0.123456, 0.05]
    assert "| 0.123 ± 0.050 |" in report.fill(page, others)


def test_every_picture_can_be_drawn_and_is_there(results, tmp_path):
    for name, draw in report.FIGURES.items():
        draw(results).savefig(tmp_path / "picture.png")
        picture = RESULTS / f"{name}.png"
        assert 0 < picture.stat().st_size < 300_000


def test_pages_show_pictures_and_link_to_files_that_exist():
    for path in report.READMES:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link.partition("#")[0]).exists(), link
