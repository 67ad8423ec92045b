"""The page of the kernels on a GPU, made of what ``coded-torch info --json`` has found there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coded_torch import linear

PAGE = Path(__file__).resolve().parents[1] / "notebooks" / "measurements" / "kernels.md"
_TIMES = ("copy", "matmul", "product", "sweep", "graph", "host")


def page(card: Mapping[str, Any]) -> str:
    """Return the page as Markdown. Raise a ValueError unless the file is that of the command."""
    missing = {"environment", "kernels", "borders", "times", "tests", "problems", "finished"} - set(
        card
    )
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return "\n".join([*_lines(card), ""])


def _lines(card: Mapping[str, Any]) -> Iterator[str]:
    about = card["environment"]
    yield "# Kernels on a GPU"
    yield ""
    yield (
        f"Measured on {about.get('card')} with torch {about.get('torch')}, CUDA "
        f"{about.get('cuda')}, NVRTC {about.get('nvrtc')} and Python {about.get('python')}, by "
        f"`{card['command']}` in {card['seconds']:.0f} s."
    )
    yield ""
    if not card["finished"]:
        yield "The command did not come to its end, so the tables may lack rows."
        yield ""
    yield "## Problems"
    yield ""
    yield from [f"- {problem}" for problem in card["problems"]] or ["None was found."]
    yield ""
    yield "## Kernels"
    yield ""
    yield "The error is the largest one of the trial, relative to the largest result."
    yield ""
    facts = ("error", "registers", "local_bytes")
    yield from _table(
        ["kernel", "right", "error", "registers", "spilled bytes"],
        [
            [kernel["name"], "yes" if kernel["right"] else "no"]
            + [_fact(kernel.get(fact)) for fact in facts]
            for kernel in card["kernels"]
        ],
    )
    yield ""
    yield from _borders(card["borders"])
    yield from _times(card["times"])
    yield "## Tests"
    yield ""
    tests = card["tests"]
    counts = ("passed", "failed", "error", "skipped")
    if isinstance(tests, str):
        yield f"{tests.capitalize()}."
    else:
        yield f"{', '.join(f'{tests[x]} {x}' for x in counts)}."


def _borders(borders: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "## Where cuBLAS takes over"
    yield ""
    if not borders:
        yield "It was not timed."
        yield ""
        return
    yield "The kernel's time over that of cuBLAS, by knots, and the knots that cuBLAS multiplies."
    yield ""
    sizes = list(dict.fromkeys(knots for border in borders.values() for knots in border["ratios"]))
    rows = []
    for dtype, border in borders.items():
        ratios = [_ratio(border["ratios"].get(knots)) for knots in sizes]
        rows.append([dtype, *ratios, ", ".join(map(_range, border["knots"])) or "none"])
    yield from _table(["dtype", *map(str, sizes), "cuBLAS"], rows)
    yield ""


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _range(knots: Sequence[int]) -> str:
    first, last = knots
    return f"from {first}" if last == linear._ANY_NUMBER else f"{first} to {last}"


def _times(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Times"
    yield ""
    yield (
        "Times are microseconds per call, medians between events of the device. The copy moves as "
        "many bytes. A graph replays the kernel that the map uses; the host's time is that of its "
        "call."
    )
    for dtype in dict.fromkeys(cell["dtype"] for cell in cells):
        for indices in (False, True):
            chosen = [x for x in cells if x["dtype"] == dtype and x["indices"] == indices]
            yield ""
            yield f"### {dtype}, {'rows by index' if indices else 'whole rows'}"
            yield ""
            yield from _table(
                ["map", "columns", *_TIMES, "kernels"],
                [
                    [
                        _map(cell),
                        f"{cell['columns']:,}",
                        *(_micro(cell[x]) for x in _TIMES),
                        ", ".join(cell["kernels"]),
                    ]
                    for cell in chosen
                ],
            )
    yield ""


def _fact(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.1e}"


def _map(cell: Mapping[str, Any]) -> str:
    arrow = "<-" if cell["transpose"] else "->"
    return f"{cell['knots']} {arrow} {cell['points']}"


def _micro(seconds: float | str) -> str:
    return "" if isinstance(seconds, str) else f"{seconds * 1e6:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
