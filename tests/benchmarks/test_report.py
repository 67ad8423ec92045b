"""Tables and pictures are those of the results."""

import copy
import re

import pytest

from benchmarks import report
from benchmarks.pictures import PICTURES
from benchmarks.runs import RESULTS
from benchmarks.tables import PAGES, TABLES, Table


@pytest.fixture(scope="module")
def results():
    return report.load_results()


def test_readmes_and_pages_are_those_of_the_results(results):
    texts = [path.read_text() for path in report.READMES]
    for text in texts:
        assert report.fill(text, results) == text
    for name, text in report.pages(results).items():
        assert (report.MEASUREMENTS / name).read_text() == text
    shown = set(re.findall(r"<!-- table: (\w+) -->", "".join(texts)))
    assert shown | {table for page in PAGES.values() for table in page.tables} == set(TABLES)


def test_the_index_is_short():
    assert len(report.READMES[1].read_text().splitlines()) <= 250


def test_paths_lead_to_numbers_with_intervals():
    results = {"a": {"x": {"n": [0.5, 0.25]}, "y": {"n": None}, "seconds": 3.0}}
    table = Table("a > *", ("",), {"n": "n:.1f", "none": "m:.1f"})
    assert report.rows_of(table, results) == [
        ["", "n", "none"],
        ["x", "0.5 ± 0.2", ""],
        ["y", "", ""],
    ]
    spread = Table("a > *", (), {"": "n:.1f"}, spread=True)
    assert report.rows_of(spread, results) == [["x", "y"], ["0.5 ± 0.2", ""]]


def test_values_in_sentences_are_those_of_the_results():
    results = {"a": {"x": {"n": [0.5, 0.25]}, "y": {"n": 1.0}}}
    text = (
        "<!-- value: least a > * > n:.0% -->?<!-- end --> <!-- value: a > y > n:g --><!-- end -->"
    )
    assert "-->50 %<!--" in report.fill(text, results)
    assert "-->1<!--" in report.fill(text, results)
    for wrong in ("a > * > n:g", "a > z > n:g"):
        with pytest.raises(ValueError, match="must lead to one number, got"):
            report.fill(f"<!-- value: {wrong} --><!-- end -->", results)


def test_other_results_make_another_table(results):
    page = report.READMES[2].read_text()
    others = copy.deepcopy(results)
    for case in others["batches"]["lenet5"]["main"].values():
        case["codes"]["KernelCode"]["relative_accuracy"] = [0.123456, 0.05]
    assert "| 0.123 ± 0.050 |" in report.fill(page, others)


def test_every_picture_can_be_drawn_and_is_there(results, tmp_path):
    for name, draw in PICTURES.items():
        draw(results).savefig(tmp_path / "picture.png")
        picture = RESULTS / f"{name}.png"
        assert 0 < picture.stat().st_size < 300_000


def test_pages_show_pictures_and_link_to_files_that_exist():
    for path in (*report.READMES, *report.MEASUREMENTS.glob("*.md")):
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link.partition("#")[0]).exists(), link
