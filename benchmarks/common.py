"""What all benchmarks share: timing side by side, the environment, JSON."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.benchmark import Timer

from coded_torch import _extension

__all__ = [
    "RESULTS",
    "Timing",
    "environment",
    "last_level_cache",
    "measure",
    "read_results",
    "reuse_memory",
    "rotate",
    "write_json",
    "write_results",
]

RESULTS = Path(__file__).resolve().parent / "results"
_T = TypeVar("_T")
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
