"""Tables and pictures are those of the results."""

import copy
import csv
import io
import itertools
import json
import operator
import re
from xml.etree import ElementTree

import markdown_it
import pytest
import torch

from benchmarks import cast, letcc, report
from benchmarks.pictures import PICTURES, decoded_digits
from benchmarks.runs import RESULTS
from benchmarks.tables import BASELINES, TABLES, Table
from coded_torch.experiments.scores import Comparison, Record, Row, Setting, score

from ..test_examples import PRINTED


@pytest.fixture(scope="module")
def results():
    return report.load_results()


def test_readmes_and_pages_are_those_of_the_results(results):
    for path in report.READMES:
        assert report.fill(path.read_text(), results) == path.read_text()
    for name, text in {**report.pages(results), **report.downloads(results)}.items():
        assert (report.MEASUREMENTS / name).read_text() == text
    texts = [path.read_text() for path in (*report.READMES, *report.PAGES.glob("*.md"))]
    assert set(re.findall(r"<!-- table: (\w+) -->", "".join(texts))) == set(TABLES)


def test_the_leaderboard_is_a_file_with_every_setting(results):
    head, *rows = csv.DictReader(io.StringIO(report.downloads(results)["leaderboard.csv"]))
    shown = report.pages(results)["leaderboard.md"]
    settings = {(row["network, data"], row["lost"], row["(N, K, S)"]) for row in (head, *rows)}
    assert len({setting for *_, setting in settings}) > 5
    assert len(rows) > 500
    assert 40 < shown.count("\n|") < 200
    assert "](leaderboard.csv)" in shown


def test_a_page_leaves_out_tables_that_are_not_measured(results):
    without = {**results, "job": {**results["job"], "memory": {}}}
    page = report.pages(without)["fleets.md"]
    assert "## Seconds of a job" in page
    assert "## Megabytes" in report.pages(results)["fleets.md"]
    assert "## Megabytes" not in page


FILLED = (*report.READMES, *report.PAGES.glob("*.md"))
PAGES = sorted(
    path
    for folder in (report.FOLDER.parent, report.FOLDER, *report.FOLDER.parent.glob("notebooks/**/"))
    for path in folder.glob("*.md")
)


def test_no_line_goes_on_after_a_comment_at_its_begin():
    """Markdown takes it for a block of HTML, which cuts the paragraph in two."""
    read = markdown_it.MarkdownIt()
    assert not _blocks(read, "was\n53<!-- end --> ms.")
    assert _blocks(read, "was\n<!-- value: n -->53<!-- end --> ms.")
    assert _blocks(read, "- <!-- claim: n -->It is less.<!-- end -->")
    assert {path.name: found for path in PAGES if (found := _blocks(read, path.read_text()))} == {}


def _blocks(read, text):
    """Return the blocks of HTML of a page that are not only comments."""
    blocks = (token.content for token in read.parse(text) if token.type == "html_block")
    return [block for block in blocks if re.sub(r"<!--.*?-->", "", block, flags=re.S).strip()]


def test_names_of_values_and_claims_are_short_and_used():
    text = "".join(path.read_text() for path in FILLED)
    for kind in ("value", "claim"):
        names = report.named(f"{kind}s.txt")
        assert set(re.findall(rf"<!-- {kind}: (.*?) -->", text)) == set(names)
        assert max(map(len, names)) <= 50


def test_every_claim_is_true(results):
    for path in FILLED:
        for claim, holds in report.claims(path.read_text(), results):
            assert holds, f"{path.name}: {claim}"


COMPARES = r"\b(better|worse|as (well|good) as|less than|more than|fewer|times the|cuts|fails?)\b"


def test_a_sentence_that_compares_has_its_numbers_or_its_claim():
    text = report.READMES[1].read_text()
    text = re.sub(r"<!-- table.*?end -->|^```.*?^```|^[|#!].*?$", "", text, flags=re.S | re.M)
    # A claim, up to its end, is one sentence.
    for sentence in re.split(r"(?<=[.:])\s+(?![^<]*<!-- end -->)", text):
        if re.search(COMPARES, re.sub(r"<!--.*?-->", "", sentence, flags=re.S)):
            assert "<!-- value" in sentence or "<!-- claim" in sentence, sentence


#: Tables of answers that compare a scheme with itself, or two codes as a paper does.
OWN_REFERENCE = {"metrics"}


def test_no_table_of_answers_lacks_a_baseline(results):
    for name, table in TABLES.items():
        of = getattr(table, "rows", "").partition(" > ")[0]
        if of in ("accuracy", "distances", "peers") and name not in OWN_REFERENCE:
            text = report.markdown(name, results)
            for baseline in ("no redundancy, regression", "on missing rows", "student alone"):
                assert baseline in text, (name, baseline)


def test_no_comparison_lacks_a_baseline(results):
    kinds = ("table", "neighbours", "adversarial", "curve")
    of_accuracy = [x[kind] for x in results["accuracy"].values() for kind in kinds if kind in x]
    compared = [*of_accuracy, results["distances"], results["peers"]["ParM"]]
    found = [x["schemes"] for x in _with_schemes(compared)]
    assert len(found) > 20
    for schemes in found:
        assert set(BASELINES) <= set(schemes)


def _with_schemes(value):
    values = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict) and "schemes" in value:
        yield value
    elif isinstance(value, dict | list):
        for one in values:
            yield from _with_schemes(one)


def test_paths_lead_to_numbers_with_intervals():
    results = {"a": {"x": {"n": [0.5, 0.25]}, "y": {"n": None}, "seconds": 3.0}}
    table = Table("a > *", ("",), {"n": "n:.1f", "none": "m:.1f"})
    assert report.rows_of(table, results) == [
        ["", "n", "none"],
        ["x", "0.5 ± 0.2", ""],
        ["y", "", ""],
    ]
    assert report.rows_of(table._replace(rows="a > y|z"), results)[1:] == [["y", "", ""]]
    across = Table("a > *", (), {"": "n:.1f"}, 0)
    assert report.rows_of(across, results) == [["x", "y"], ["0.5 ± 0.2", ""]]
    both = {"a": {"x": {"p": 1, "q": 2}, "y": {"q": 3}}}
    assert report.rows_of(Table("a > * > *", ("",), {"": ":g"}, 0), both) == [
        ["", "x", "y"],
        ["p", "1", ""],
        ["q", "2", "3"],
    ]


def test_values_and_claims_are_those_of_the_results():
    results = {"a": {"x": {"n": [0.5, 0.25]}, "y": {"n": 1.0}}}
    said = {"least": "least a > * > n:.0%", "y": "a > y > n:g"}
    text = "<!-- value: least -->?<!-- end --> <!-- value: y --><!-- end -->"
    assert "-->50 %<!--" in report.fill(text, results, said)
    assert "-->1<!--" in report.fill(text, results, said)
    for wrong in ("a > * > n:g", "a > z > n:g"):
        with pytest.raises(ValueError, match="must lead to one number, got"):
            report.fill(text, results, said | {"y": wrong})
    sides = {"a > x > n is below a > y > n": True, "most a > * > n is below 1": False}
    sides |= {"2.1 times a > x > n is below a > y > n": False}
    text = "".join(f"<!-- claim: {claim} -->true<!-- end -->" for claim in sides)
    assert dict(report.claims(text, results, {claim: claim for claim in sides})) == sides


def test_other_results_make_another_table(results):
    page = report.READMES[2].read_text()
    others = copy.deepcopy(results)
    for case in others["accuracy"]["lenet5"]["table"]["B = 240"].values():
        case["schemes"]["regression"]["relative_accuracy"] = [0.123456, 0.05]
    assert "| 0.123 ± 0.050 |" in report.fill(page, others)


def lines_of(picture):
    return [x for x in ElementTree.fromstring(picture) if x.tag.endswith("text")]


def test_the_cast_is_of_the_example():
    for picture in (
        cast.TARGET.read_text(),
        cast.drawn([(9.0, "$ x"), (0.5, "a & b"), (9.0, "c")]),
    ):
        lines = lines_of(picture)
        first, *later = lines
        assert "style" not in first.attrib  # it is there from the begin
        delays = [float(x.attrib["style"].split()[1].removesuffix("s")) for x in later]
        assert delays == sorted(delays)
        assert max(b - a for a, b in itertools.pairwise([0.0, *delays])) <= cast.LONGEST
    assert [x.text for x in lines] == ["$ x", "a & b", "c"]
    first, *_, count, wrong = [x.text for x in lines_of(cast.TARGET.read_text())]
    assert first == f"$ python {cast.EXAMPLE.name}"
    assert re.fullmatch(PRINTED[cast.EXAMPLE.stem], f"{count}\n{wrong}\n")


def test_every_picture_can_be_drawn_and_is_there(results, tmp_path):
    for name, draw in PICTURES.items():
        draw(results).savefig(tmp_path / "picture.png")
        picture = RESULTS / f"{name}.png"
        assert 0 < picture.stat().st_size < 300_000


def test_the_caption_of_decoded_digits_counts_them():
    _, _, decoded, computed = decoded_digits()
    right = sum(map(operator.eq, decoded, computed))
    for path in (report.READMES[0], report.FOLDER.parent / "notebooks" / "index.md"):
        assert f"and {right} of the {len(computed)} classes decoded are those" in path.read_text()


def test_the_command_prints_the_table_of_compromised_workers_that_is_on_the_page():
    results = json.loads((RESULTS / "letcc.json").read_text())
    printed = letcc.attacked("negated")["codes"]
    for code, published in results["measured"]["adversaries"]["negated"]["codes"].items():
        assert printed[code] == pytest.approx(published, rel=0.02, abs=1e-6)


def test_the_fields_of_a_comparison_are_on_the_page_with_types_and_examples():
    text = (report.PAGES / "letcc.md").read_text()
    kinds = {
        "Setting": Setting,
        "str": str,
        "float": float,
        "interval": list,
        "two integers": tuple,
    }
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    fields = {
        name.strip("| `"): (
            kinds[kind.removesuffix(" or None").strip("`")],
            eval(example.strip("| `"), {"Setting": Setting}),
        )
        for name, kind, _, example in table
    }
    assert (*fields,) == Row._fields
    assert all(isinstance(example, kind) for kind, example in fields.values())
    exact = torch.eye(3)
    numbers = score(exact + 0.1, exact, labels=torch.arange(3))
    records = [
        Record(24, 20, 4, name, "", 0, batch, 3, 1.2, numbers)
        for name in ("one", "other")
        for batch in range(3)
    ]
    *_, row = Comparison(records).against("one")
    for name, (kind, _) in fields.items():
        assert isinstance(getattr(row, name), kind)


def test_pages_show_pictures_and_link_to_files_that_exist():
    for path in (*report.READMES, *report.MEASUREMENTS.glob("*.md")):
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link.partition("#")[0]).exists(), link
