"""Generate tables, pictures and pages from the results: ``python -m benchmarks.report``.

A README holds ``<!-- table: NAME -->`` and ``<!-- value: PATH:FORMAT -->``, each up to ``<!-- end
-->``; what stands between is generated. A sentence that compares numbers takes them from values.
Long tables are pages of the documentation, in ``notebooks/measurements``. A test holds that all of
it is what this script makes of ``results``.

A path names the question and then the keys of its JSON, with " > " between. A ``*`` stands for
every key. A value with stars starts with "least" or "most".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .pictures import PICTURES
from .runs import QUESTIONS, RESULTS
from .tables import NAMES, PAGES, TABLES, Column, Table

__all__ = ["READMES", "fill", "load_results", "pages", "rows_of"]

FOLDER = Path(__file__).resolve().parent
MEASUREMENTS = FOLDER.parent / "notebooks" / "measurements"
READMES = (
    FOLDER.parent / "README.md",
    FOLDER / "README.md",
    FOLDER.parent / "notebooks" / "science.md",
)
#: Parts of the names of codes that version 0.3 does not have, and of data that are not tried now.
GONE = ("systematic", "paper's encoder", "efficientnet")

Results = Mapping[str, Any]


def load_results(folder: Path = RESULTS) -> dict[str, Any]:
    """Return the numbers of every question by its name, and the settings of all of them."""
    paths = {name: folder / f"{name}.json" for name in QUESTIONS}
    files = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    results = {name: file["measured"] for name, file in files.items()}
    return {**results, "settings": {name: file["settings"] for name, file in files.items()}}


def find(value: Any, path: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every match of a path: what its stars stand for, and the value there."""
    if not path:
        yield (), value
    elif path[0] == "*":
        for key, inner in value.items():
            if key != "seconds" and not any(part in key for part in GONE):
                yield from (((key, *stars), found) for stars, found in find(inner, path[1:]))
    elif isinstance(value, list):
        yield from find(value[int(path[0])], path[1:])
    elif isinstance(value, Mapping) and path[0] in value:
        yield from find(value[path[0]], path[1:])


def shown(value: Any, how: str) -> str:
    """Return a number, or one with half the width of its interval, in Python's format."""
    if isinstance(value, list) and len(value) == 2 and value[0] is not None:
        return shown(value[0], how) + (f" ± {shown(value[1], how)}" if value[1] is not None else "")
    if isinstance(value, list):  # a median with quartiles, or nothing
        value = value[0]
    if value is None or isinstance(value, str):
        return value or ""
    return format(value, how).replace("%", " %")


def _cell(stars: Sequence[str], value: Any, column: Column) -> str:
    if callable(column):
        return column(stars, value)
    path, _, how = column.rpartition(":")
    found = [x for _, x in find(value, path.split(" > "))] if path else [value]
    return shown(found[0], how) if found else ""


def rows_of(table: Table, results: Results) -> list[list[str]]:
    """Return the head of a table and its rows."""
    matches = list(find(results, table.rows.split(" > ")))
    if not table.spread:
        return [
            [*table.heads, *table.columns],
            *(
                [*map(_name, stars), *(_cell(stars, value, c) for c in table.columns.values())]
                for stars, value in matches
            ),
        ]
    (column,) = table.columns.values()
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for stars, value in matches:
        lines.setdefault(stars[:-1], {})[stars[-1]] = _cell(stars, value, column)
    across = list(dict.fromkeys(stars[-1] for stars, _ in matches))
    return [
        [*table.heads, *map(_name, across)],
        *([*map(_name, at), *(line.get(x, "") for x in across)] for at, line in lines.items()),
    ]


def _name(key: str) -> str:
    return NAMES.get(key, key)


def _markdown(name: str, results: Results) -> str:
    table = TABLES[name]
    rows = rows_of(table, results) if isinstance(table, Table) else [*table(results)]
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def _number(path: str, results: Results) -> str:
    """Return the one number at a path, or the least or most of several."""
    where, _, how = path.rpartition(":")
    choose = {"least": min, "most": max}.get(where.partition(" ")[0])
    keys = (where.partition(" ")[2] if choose else where).split(" > ")
    found = [x[0] if isinstance(x, list) else x for _, x in find(results, keys)]
    if not found or (len(found) > 1 and not choose):
        raise ValueError(f"{path} must lead to one number, got {len(found)}")
    return shown(choose(found) if choose else found[0], how)


def fill(text: str, results: Results) -> str:
    """Return a README with its tables and numbers generated anew."""

    def block(match: re.Match[str]) -> str:
        start, kind, what, end = match.groups()
        if kind == "value":
            return f"{start}{_number(what, results)}{end}"
        return f"{start}\n{_markdown(what, results)}\n{end}"

    marked = r"(<!-- (table|value): (.*?) -->).*?(<!-- end -->)"
    return re.sub(marked, block, text, flags=re.DOTALL)


def pages(results: Results) -> dict[str, str]:
    """Return the pages of long tables, by file name."""
    made = {}
    for name, page in PAGES.items():
        text = [f"# {page.title}\n", f"{page.text}\n"]
        text += [f"![{about}](../../benchmarks/results/{x}.png)\n" for x, about in page.pictures]
        for table, about in page.tables.items():
            text += [f"## {about}\n", f"{_markdown(table, results)}\n"]
        made[f"{name}.md"] = "\n".join(text)
    return made


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results = load_results()
    for path in READMES:
        path.write_text(fill(path.read_text(), results))
    for name, text in pages(results).items():
        (MEASUREMENTS / name).write_text(text)
    for name, draw in PICTURES.items():
        draw(results).savefig(RESULTS / f"{name}.png", dpi=80, pil_kwargs={"optimize": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
