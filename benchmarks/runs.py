"""The list of the benchmarks, their runs, which continue after a stop, and results as JSON."""

from __future__ import annotations

import functools
import json
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from coded_torch import _extension

from .timing import last_level_cache

QUESTIONS = (
    "accuracy", "distances", "gradients", "surrogates", "coverage", "convergence", "waiting",
    "verification", "latency", "resilience", "serving", "peers", "fleet", "job", "exchangeability",
    "midpoints", "mixtures", "bound", "mean", "adversaries", "letcc",
)  # fmt: skip
RESULTS = Path(__file__).resolve().parent / "results"
_T = TypeVar("_T")
#: The place of its numbers in the file, and the function that makes them.
Measurement = tuple[tuple[str, ...], Callable[[], dict[str, Any]]]
_LINE = 1000  # characters: the record of a code fits


class MissingDataError(RuntimeError):
    """A data package is not installed; the message says how to get it."""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return the processor and the versions on which numbers depend."""
    return {
        "processor": _processor(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name.replace(" ", "_"): what for name, what in _extension.build_info().items()},
    }


def read_results(path: Path) -> dict[str, Any]:
    """Return the results in a file; empty if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def expected_seconds(name: str) -> float | None:
    """Return how long the measurements of the committed results took; None if there are none.

    The file itself may be gone, because its numbers are to be measured anew.
    """
    command = ["git", "-C", str(RESULTS), "show", f"HEAD:./{name}.json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if done.returncode:
        return None
    return _seconds(json.loads(done.stdout)["measured"])


def _seconds(measured: Mapping[str, Any]) -> float:
    """Return the sum of the seconds of measurements, which are nested by their names."""
    if isinstance(measured.get("seconds"), (int, float)):
        return measured["seconds"]
    return sum(_seconds(below) for below in measured.values() if isinstance(below, Mapping))


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all, one record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(_format(results) + "\n")
    unfinished.replace(path)


def _format(value: Any, indent: str = "") -> str:
    """Return JSON with an object or a list on one line if it fits, else a line for each item."""
    text = json.dumps(value)
    if not isinstance(value, (Mapping, list)) or (len(text) <= _LINE and indent):
        return text
    inner = indent + " "
    if isinstance(value, list):
        items, (start, end) = [_format(item, inner) for item in value], "[]"
    else:
        items = [f"{json.dumps(str(key))}: {_format(item, inner)}" for key, item in value.items()]
        start, end = "{}"
    lines = f",\n{inner}".join(items)
    return f"{start}\n{inner}{lines}\n{indent}{end}"


def progress(items: Iterable[_T], what: str, total: int | None = None) -> Iterator[_T]:
    """Show a progress bar over ``items``, on terminals only."""
    return iter(tqdm(items, desc=what, total=total, leave=False, disable=None))


def keep(
    name: str,
    benchmark: Any,
    *,
    quick: bool,
    only: Iterable[str] = (),
    again: bool = False,
    path: Path | None,
    rows: Path | None = None,
) -> None:
    """Run a benchmark, and write the numbers of each measurement once done.

    Measurements that are in the file are not repeated, so a run that was stopped goes on. One whose
    data are not installed is left out, and a message says how to get them.

    A module has ``settings(quick)``, all on which its numbers depend, and ``measurements(quick)``.
    The options are those of ``python -m benchmarks``. Without a path, nothing is kept.

    Raises:
        ValueError: the file was measured with other settings, or in another environment; no
            measurement has all the words among its names.
    """
    command = f"{name}{' --quick' if quick else ''}"
    every = list(benchmark.measurements(quick))
    chosen = [x for x in every if set(only) <= set(x[0])]
    if not chosen:
        names = "\n  ".join(shlex.join(key) for key, _ in every)
        must = f"--only must be names of what {command} measures, got {' '.join(only)}; one of"
        raise ValueError(f"{must}\n  {names}")
    head = {
        "command": f"python -m benchmarks {command}",
        "settings": benchmark.settings(quick),
        "environment": environment(),
    }
    results = read_results(path) if path else {}
    if results and (others := [key for key in head if results.get(key) != head[key]]):
        raise ValueError(f"{path} was measured with other {others[0]}; move it away")
    measured = results.get("measured", {})
    kept = [x for x in chosen if functools.reduce(lambda at, y: at.get(y, {}), x[0], measured)]
    todo = [x for x in chosen if again or x not in kept]
    if not todo:
        done = textwrap.shorten("; ".join(", ".join(key) for key, _ in chosen), 300)
        print(f"{name}: already measured: {done}; with --only, --again measures anew")
    for key, measurement in progress(todo, name):
        start = time.perf_counter()
        try:
            numbers = measurement()
        except MissingDataError as error:
            print(f"{', '.join(key)}: left out. {error}", file=sys.stderr)
            continue
        if (records := numbers.pop("records", None)) is not None and rows:
            rows.mkdir(parents=True, exist_ok=True)
            records.save(rows / f"{name}, {', '.join(key)}.csv")
        numbers["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{name}: {', '.join(key)} in {numbers['seconds']} s", flush=True)
        # Read again: another run may have added to the file meanwhile.
        results = {**head, "measured": {}, **(read_results(path) if path else results)}
        place = functools.reduce(lambda at, x: at.setdefault(x, {}), key, results["measured"])
        place.clear()
        place.update(numbers)
        if path:
            write_results(path, results)
