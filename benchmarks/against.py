"""Is this version slower than another? ``python -m benchmarks against REVISION``.

The revision is compiled in a folder of its own, ``build/against``. For each question, a process of
each version measures in turns with the other one, so that a slow spell slows both: the wall time of
a call, and the processor time of the process that calls. ``yardstick.py`` has the questions. The
table and the JSON have medians, and the median ratio of this version to the other in a round.
"REVISION" may be "." for this version itself, which shows the noise.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import coded_torch

from . import yardstick
from .runs import Measurement, read_results

ROOT = Path(__file__).resolve().parents[1]
THIS = Path(coded_torch.__file__).resolve().parents[1]  # perhaps not in the repository
SECONDS, LEAST, MOST = 15.0, 5, 41  # rounds of a question: for so long, at least, at most
LONGEST = 300.0  # seconds that a process may take for one round, or to come up


def git(*arguments: str) -> bytes:
    line = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(line, capture_output=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def commit(revision: str) -> str:
    """Return the hash of a revision; "." is this version, with what is not committed."""
    if revision == ".":
        return git("describe", "--always", "--dirty").decode().strip()
    return git("rev-parse", "--short=12", "--verify", f"{revision}^{{commit}}").decode().strip()


def installed(revision: str) -> Path:
    """Return the folder of a revision, compiled once."""
    if revision == ".":
        return THIS
    folder = ROOT / "build" / "against" / commit(revision)
    if not (folder / "compiled").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run(["tar", "x", "-C", folder], input=git("archive", revision), check=True)
        print(f"compiling {revision} in {folder}", flush=True)
        line = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        if subprocess.run(line, cwd=folder).returncode:
            raise ValueError(f"{revision} does not compile")
        (folder / "compiled").touch()
    return folder


class Side:
    """A process that measures one question with the package in a folder."""

    def __init__(self, name: str, folder: Path) -> None:
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, yardstick.__file__, name, str(folder)],
            env=os.environ | {"PYTHONPATH": path}, cwd=folder, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.asked: Any = self.process.stdin
        self.told: Any = self.process.stdout

    def line(self) -> str:
        """Return the next line, or raise if none comes."""
        ready, _, _ = select.select([self.told], [], [], LONGEST)
        line = self.told.readline().decode() if ready else ""
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} ended or hangs")
        return line

    def measure(self, calls: int) -> list[float]:
        """Return the wall time and the processor time of a call, in milliseconds."""
        self.asked.write(f"{calls}\n".encode())
        return [1e3 * x for x in json.loads(self.line())]

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.asked.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.process.kill()
        self.process.wait()
        self.told.close()


def compare(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """Measure a question in both versions, in turns; return times in milliseconds, and ratios."""
    _, calls, _ = yardstick.QUESTIONS[name]
    least, most, calls = (1, 1, 1) if quick else (LEAST, MOST, calls)
    rounds = []
    with Side(name, THIS) as ours, Side(name, folder) as others:
        for side in (ours, others):
            side.line()  # it is ready
        until = time.monotonic() + SECONDS
        while len(rounds) < least or (len(rounds) < most and time.monotonic() < until):
            order = (ours, others)[:: -1 if len(rounds) % 2 else 1]
            found = {side: side.measure(calls) for side in order}
            rounds.append([found[ours], found[others]])
    times = np.array(rounds)  # [rounds, 2 versions, wall and processor]
    ratios = times[:, 0] / times[:, 1]
    return {"rounds": len(rounds)} | {
        what: {
            "this": round(float(np.median(times[:, 0, i])), 4),
            "other": round(float(np.median(times[:, 1, i])), 4),
            "ratio": round(float(np.median(ratios[:, i])), 4),
            "quartiles": np.quantile(ratios[:, i], [0.25, 0.75]).round(4).tolist(),
        }
        for i, what in enumerate(("wall", "processor"))
    }


class Benchmark:
    """The questions about one revision, as ``runs.keep`` takes them."""

    def __init__(self, revision: str) -> None:
        self.revision = revision
        self.path = ROOT / "build" / "against" / f"{commit(revision)}.json"

    def settings(self, quick: bool) -> dict[str, Any]:
        return {"this": commit("."), "other": commit(self.revision)}

    def measurements(self, quick: bool) -> Iterator[Measurement]:
        folder = functools.cache(functools.partial(installed, self.revision))
        for name in yardstick.QUESTIONS:
            words = tuple(name.split(", "))
            yield words, lambda name=name: compare(name, folder(), quick)


def table(path: Path) -> str:
    """Return the table of a file's results."""
    results = read_results(path)
    head = "milliseconds a call", *(f"{x} {y}" for x in ("wall", "processor") for y in HEAD)
    rows = [head, *_rows((), results["measured"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"this: {results['settings']['this']}", *lines])


HEAD = ("this", "other", "ratio", "quartiles")


def _rows(name: Sequence[str], found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    if "rounds" not in found:
        for word, inner in found.items():
            yield from _rows((*name, word), inner)
        return
    cells = [found[x][y] for x in ("wall", "processor") for y in HEAD]
    shown = (f"{x:.3f}" if isinstance(x, float) else "-".join(f"{y:.2f}" for y in x) for x in cells)
    yield ", ".join(name), *shown
