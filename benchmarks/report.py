"""Generate tables, pictures and pages from the results: ``python -m benchmarks.report``.

It prints the commit of each file of results, and how many later ones change the code.

A README or page holds, each up to ``<!-- end -->``:

- ``<!-- table: NAME -->``: a table of ``tables.py``, with text of ``cells.py``;
- ``<!-- value: NAME -->``: a number, whose line in ``values.txt`` is ``NAME = PATH:FORMAT``;
- ``<!-- claim: NAME -->``: a sentence that compares, which is true of the results. Its line in
  ``claims.txt`` is ``NAME = SIDE is below SIDE``; a side is a path, a number, or a number "times" a
  path.

No line of a page begins with such a comment and goes on: Markdown takes it for a block of HTML.

READMEs are filled in place. Long tables are pages of the documentation: ``benchmarks/pages`` has
them without numbers, ``notebooks/measurements`` with them, and without these comments. A test holds
that all of it comes from ``results`` by this script, and that every claim is true.

A path names the question and then the keys of its JSON, with " > " between. A ``*`` stands for
every key, and ``a|b`` for some. A path to several numbers starts with "least" or "most".
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cells import leaderboard, shown
from .names import NAMES
from .pictures import DPI, PICTURES
from .runs import QUESTIONS, RESULTS
from .tables import TABLES, Column, Table

FOLDER = Path(__file__).resolve().parent
PAGES = FOLDER / "pages"
MEASUREMENTS = FOLDER.parent / "notebooks" / "measurements"
READMES = (
    FOLDER.parent / "README.md",
    FOLDER / "README.md",
    FOLDER.parent / "notebooks" / "science.md",
    FOLDER.parent / "notebooks" / "guides" / "error_bounds.md",
    FOLDER.parent / "notebooks" / "guides" / "means.md",
    FOLDER.parent / "notebooks" / "comparison.md",
    FOLDER.parent / "notebooks" / "faq.md",
)

Results = Mapping[str, Any]


def load_results(folder: Path = RESULTS) -> dict[str, Any]:
    """Return the numbers of every question by its name, and the settings of all of them."""
    paths = {name: folder / f"{name}.json" for name in QUESTIONS}
    files = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    results = {name: file["measured"] for name, file in files.items()}
    for of in results.get("latency", {}).values():
        exact = of["policies"]["wait for all"]["accuracy"]
        for each in of["policies"].values():
            if each["estimated"]:  # computed rows are as accurate as the model
                computed = (1 - each["estimated"]) * exact
                each["right estimates"] = (each["accuracy"] - computed) / each["estimated"]
    for of in results.get("convergence", {}).values():
        for each in of.get("adversaries", {}).values():
            slope, half = each["slope"]
            each["slope above the rate"] = slope - half - each["slope of the bound"]
            each["error at the least N, over the variance"] = each["mse"][0][0] / each["variance"]
    return {**results, "settings": {name: file["settings"] for name, file in files.items()}}


def find(value: Any, path: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every match of a path: the keys of its stars, and the value there."""
    if not path:
        yield (), value
    elif isinstance(value, list):
        yield from find(value[int(path[0])], path[1:])
    elif isinstance(value, Mapping):
        some = value if path[0] == "*" else [key for key in path[0].split("|") if key in value]
        starred = path[0] == "*" or "|" in path[0]
        for key in some:
            if not (starred and key == "seconds"):
                for stars, found in find(value[key], path[1:]):
                    yield ((key, *stars) if starred else stars), found


def _cell(stars: Sequence[str], value: Any, column: Column) -> str:
    if callable(column):
        return column(stars, value)
    path, _, how = column.rpartition(":")
    found = [x for _, x in find(value, path.split(" > "))] if path else [value]
    return shown(found[0], how, positive="mse" in path) if found else ""


def rows_of(table: Table, results: Results) -> list[list[str]]:
    """Return the head of a table and its rows."""
    matches = list(find(results, table.rows.split(" > ")))
    if table.across is None:
        rows = [[*table.heads, *table.columns]]
        for stars, value in matches:
            cells = (_cell(stars, value, column) for column in table.columns.values())
            rows.append([*map(_name, stars), *cells])
        return rows
    (column,) = table.columns.values()
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for stars, value in matches:
        rest = list(stars)
        across = rest.pop(table.across)
        lines.setdefault(tuple(rest), {})[across] = _cell(stars, value, column)
    heads = list(dict.fromkeys(stars[table.across] for stars, _ in matches))
    return [
        [*table.heads, *map(_name, heads)],
        *([*map(_name, at), *(line.get(x, "") for x in heads)] for at, line in lines.items()),
    ]


def _name(key: str) -> str:
    return NAMES.get(key, key)


def markdown(name: str, results: Results) -> str:
    table = TABLES[name]
    rows = rows_of(table, results) if isinstance(table, Table) else [*table(results)]
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def named(file: str) -> dict[str, str]:
    """Return what ``values.txt`` or ``claims.txt`` says, by name."""
    lines = (FOLDER / file).read_text().splitlines()
    return {name: said for name, _, said in (line.partition(" = ") for line in lines)}


def _number(path: str, results: Results) -> float:
    """Return the one number at a path, or the least or most of several."""
    choose = {"least": min, "most": max}.get(path.partition(" ")[0])
    keys = (path.partition(" ")[2] if choose else path).split(" > ")
    found = [x[0] if isinstance(x, list) else x for _, x in find(results, keys)]
    if not found or (len(found) > 1 and not choose):
        raise ValueError(f"{path} must lead to one number, got {len(found)}")
    return choose(found) if choose else found[0]  # type: ignore[no-any-return, operator]


def _side(text: str, results: Results) -> float:
    """Return the value of one side of a claim."""
    factor, path = re.fullmatch(r"(?:([\d.]+) times )?(.*)", text).groups()
    try:
        return float(text)
    except ValueError:
        return float(factor or 1) * _number(path, results)


def claims(
    text: str, results: Results, said: Mapping[str, str] | None = None
) -> Iterator[tuple[str, bool]]:
    """Yield the claims of a page, and whether each is true; ``said`` is that of ``claims.txt``."""
    said = named("claims.txt") if said is None else said
    for name in re.findall(r"<!-- claim: (.*?) -->", text):
        smaller, larger = said[name].split(" is below ")
        yield name, _side(smaller, results) < _side(larger, results)


def fill(text: str, results: Results, said: Mapping[str, str] | None = None) -> str:
    """Return a page with its tables and numbers made anew; ``said`` is that of ``values.txt``."""
    said = named("values.txt") if said is None else said

    def block(match: re.Match[str]) -> str:
        start, kind, what, end = match.groups()
        if kind == "value":
            where, _, how = said[what].rpartition(":")
            return f"{start}{shown(_number(where, results), how)}{end}"
        return f"{start}\n{markdown(what, results)}\n{end}"

    marked = r"(<!-- (table|value): (.*?) -->).*?(<!-- end -->)"
    return re.sub(marked, block, text, flags=re.DOTALL)


def pages(results: Results) -> dict[str, str]:
    """Return the pages of long tables, by file name, without tables that are not measured."""
    texts = {path.name: fill(path.read_text(), results) for path in sorted(PAGES.glob("*.md"))}
    empty = r"\n## [^\n]*\n\n<!-- table: \w+ -->\n[^\n]*\n[^\n]*\n<!-- end -->\n"
    return {
        name: re.sub(r"<!-- table: \w+ -->\n|^<!-- end -->\n|<!-- .*? -->", "", shown, flags=re.M)
        for name, text in texts.items()
        for shown in [re.sub(empty, "", text)]
    }


def downloads(results: Results) -> dict[str, str]:
    """Return the CSV files beside the pages, by file name."""
    text = io.StringIO()
    for row in leaderboard(results):
        csv.writer(text, lineterminator="\n").writerow(cell.replace("`", "") for cell in row)
    return {"leaderboard.csv": text.getvalue()}


def commits() -> Iterator[str]:
    """Yield, by file of results, its last commit and how many later ones change the code."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(FOLDER.parent), *arguments]
        return subprocess.check_output(command, text=True).strip()

    for path in sorted(RESULTS.glob("*.json")):
        commit = git("log", "-1", "--format=%h", "--", str(path))
        if commit:
            later = git("rev-list", "--count", f"{commit}..HEAD", "--", "coded_torch", "csrc")
            yield f"{path.name}: commit {commit}, {later} later commits change the code"


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results = load_results()
    for path in READMES:
        path.write_text(fill(path.read_text(), results))
    for name, text in {**pages(results), **downloads(results)}.items():
        (MEASUREMENTS / name).write_text(text)
    for name, draw in PICTURES.items():
        draw(results).savefig(RESULTS / f"{name}.png", dpi=DPI, pil_kwargs={"optimize": True})
    if shutil.which("git") and (FOLDER.parent / ".git").exists():
        print(*commits(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
