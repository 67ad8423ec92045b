"""What all benchmarks share: timing side by side, the environment, JSON, runs that go on."""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from data import MissingDataError
from torch.utils.benchmark import Timer
from tqdm import tqdm

from coded_torch import _extension

__all__ = [
    "RESULTS",
    "Measurement",
    "Timing",
    "environment",
    "last_level_cache",
    "measure",
    "progress",
    "read_results",
    "reuse_memory",
    "rotate",
    "run_measurements",
    "write_json",
    "write_results",
]

RESULTS = Path(__file__).resolve().parent / "results"
_T = TypeVar("_T")
#: Where its numbers go in the file, and what makes them.
Measurement = tuple[tuple[str, ...], Callable[[], dict[str, Any]]]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


class Timing(NamedTuple):
    """Seconds a call took, over all runs."""

    median: float
    iqr: float
    best: float
    runs: int


def measure(
    functions: dict[str, Callable[[], object]],
    *,
    runs: int,
    device: str = "cpu",
    calls: int = 1,
) -> dict[str, Timing]:
    """Time functions in turns, so that what slows the machine down slows all of them alike.

    Args:
        functions: called without arguments; they must do their work on ``device``.
        runs: times per function.
        device: on "cuda", time passes between two events of the current stream.
        calls: calls per run, of which the mean counts.
    """
    time_once = _time_cuda if device == "cuda" else _time_cpu
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            seconds[name].append(time_once(function, calls))
    timings = {}
    for name, times in seconds.items():
        lower, median, upper = np.quantile(times, [0.25, 0.5, 0.75])
        timings[name] = Timing(float(median), float(upper - lower), min(times), runs)
    return timings


def _time_cpu(function: Callable[[], object], calls: int) -> float:
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return float(timer.timeit(calls).median)


def _time_cuda(function: Callable[[], object], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    function()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls


def rotate(make: Callable[[], _T], size: int, cache: int) -> Iterator[_T]:
    """Endlessly, one of as many buffers of ``size`` bytes as fill twice the cache."""
    return itertools.cycle([make() for _ in range(max(2, math.ceil(2 * cache / size)))])


def reuse_memory() -> None:
    """Keep freed memory in the process, where glibc would return large results to the system.

    Getting them back costs a page fault every 4 KiB, more than any of the work measured here, and
    all contestants allocate their results.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def last_level_cache(device: str = "cpu") -> int:
    """Bytes; 64 MiB where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [
        int(path.read_text().strip().removesuffix("K")) << 10
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=64 << 20)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on besides the code."""
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
    """What :func:`write_results` wrote; empty if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all, with lists of numbers on one line."""
    text = re.sub(
        r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), json.dumps(results, indent=1)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)


def write_json(name: str, device: str, results: dict[str, Any]) -> Path:
    """Write results beside their environment, as ``benchmarks/results/<name>.json``."""
    path = RESULTS / f"{name}.json"
    write_results(path, {"environment": environment(device), **results})
    return path


def progress(items: Iterable[_T], what: str, total: int | None = None) -> Iterator[_T]:
    """A progress bar over ``items``, on terminals only."""
    return iter(tqdm(items, desc=what, total=total, leave=False, disable=None))


def run_measurements(
    script: str,
    settings: Callable[[bool], dict[str, Any]],
    measurements: Callable[[bool, str], Iterable[Measurement]],
    argv: Sequence[str] | None = None,
    *,
    devices: Sequence[str] = ("cpu",),
) -> int:
    """Run what a script measures, one after the other, and keep the numbers of each as it is done.

    A run that was stopped is gone on with by the next one: what is in the file is not measured
    again. What needs data that are not installed is left out, and the message says how to get them.

    Args:
        script: the ``__file__`` of the script; its results go to ``results/<its name>.json``, or
            ``<its name>-cuda.json``.
        settings: what the numbers depend on beside the code; given whether the run is quick.
        measurements: given whether the run is quick, and the device.
        argv: the arguments; by default those of the process.
        devices: what it can be run on.

    Returns:
        The exit code: 0, or 130 if the run was interrupted.
    """
    name = Path(script).stem
    parser = argparse.ArgumentParser(prog=f"python benchmarks/{name}.py")
    parser.add_argument(
        "--quick", action="store_true", help="small and rough, with data that ship in the package"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="of what is measured")
    parser.add_argument(
        "--output", type=Path, help=f"default: results/{name}.json; nothing if --quick"
    )
    parser.add_argument("--device", choices=devices, default="cpu")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="[%(default)s]"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    file = name if args.device == "cpu" else f"{name}-{args.device}"
    path = args.output or (None if args.quick else RESULTS / f"{file}.json")
    head = {
        "command": parser.prog + (" --quick" if args.quick else ""),
        "settings": settings(args.quick),
        "environment": environment(args.device),
    }
    results = read_results(path) if path else {}
    if results and (others := [key for key in head if results.get(key) != head[key]]):
        parser.error(f"{path} was measured with other {others[0]}; move it away or name another")
    todo = [
        (key, measurement)
        for key, measurement in measurements(args.quick, args.device)
        if set(args.only) <= set(key) and not _found(results.get("measured", {}), key)
    ]
    try:
        for key, measurement in progress(todo, name):
            start = time.perf_counter()
            try:
                numbers = measurement()
            except MissingDataError as error:
                print(f"{', '.join(key)}: left out. {error}", file=sys.stderr)
                continue
            numbers["seconds"] = round(time.perf_counter() - start, 1)
            print(f"{name}: {', '.join(key)} in {numbers['seconds']} s", flush=True)
            # Read again: another run may have added to the file meanwhile.
            results = {
                **head,
                "measured": {},
                **(read_results(path) if path else results),
            }
            place = functools.reduce(lambda at, x: at.setdefault(x, {}), key, results["measured"])
            place.update(numbers)
            if path:
                write_results(path, results)
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, and a second run goes on from there")
        return 130
    return 0


def _found(measured: dict[str, Any], key: tuple[str, ...]) -> dict[str, Any]:
    """What is in the results under a key; empty if nothing is."""
    for part in key:
        measured = measured.get(part, {})
    return measured
