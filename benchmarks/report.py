"""Put the results into pictures and READMEs: ``python -m benchmarks.report``.

Every table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and is made from the JSON
in ``results``; a test holds that the READMEs are what this script makes of them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from . import plots, plots_waiting
from .plots import Results
from .runs import ERRORS, RESULTS, TIMES
from .tables import TABLES

__all__ = ["FIGURES", "READMES", "fill", "load_results"]

FOLDER = Path(__file__).resolve().parent
FIGURES = plots.FIGURES | plots_waiting.FIGURES
READMES = (FOLDER.parent / "README.md", FOLDER / "README.md")


def load_results(folder: Path = RESULTS) -> dict[str, Any]:
    """What every script measured, by its name, and the settings of all of them."""
    paths = {name: folder / f"{name}.json" for name in ERRORS + TIMES}
    files = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    results = {name: file["measured"] for name, file in files.items()}
    on_gpu = folder / "end_to_end-cuda.json"  # where there was one
    if on_gpu.exists():
        results["end_to_end"] |= json.loads(on_gpu.read_text())["measured"]
    return {**results, "settings": {name: file["settings"] for name, file in files.items()}}


def fill(text: str, results: Results) -> str:
    """A README with its tables made anew."""

    def block(match: re.Match[str]) -> str:
        head, *rows = (f"| {' | '.join(row)} |" for row in TABLES[match[2]](results))
        rule = "|---" * (head.count("|") - 1) + "|"
        return "\n".join([match[1], head, rule, *rows, match[3]])

    return re.sub(r"(<!-- table: (\w+) -->).*?(<!-- end -->)", block, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    results = load_results()
    for path in READMES:
        path.write_text(fill(path.read_text(), results))
    for name, draw in FIGURES.items():
        draw(results).savefig(RESULTS / f"{name}.png", dpi=80, pil_kwargs={"optimize": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
