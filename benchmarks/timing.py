"""Times of functions side by side, with nothing in a cache that would not be there in use."""

from __future__ import annotations

import ctypes
import itertools
import math
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.utils.benchmark import Timer

_T = TypeVar("_T")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def measure(
    functions: dict[str, Callable[[], object]], *, runs: int, calls: int = 1
) -> dict[str, dict[str, float]]:
    """Time functions in turns, so that a slow spell slows all of them alike.

    Each is run ``runs`` times, and the mean of ``calls`` calls counts. Return the median,
    the range between the quartiles and the least of the seconds that a call took, by function.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            seconds[name].append(_time_cpu(function, calls))
    timings = {}
    for name, times in seconds.items():
        lower, median, upper = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
        timings[name] = {"median": median, "iqr": upper - lower, "best": min(times), "runs": runs}
    return timings


def _time_cpu(function: Callable[[], object], calls: int) -> float:
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return float(timer.timeit(calls).median)


def rotate(make: Callable[[], _T], size: int, cache: int) -> Iterator[_T]:
    """Yield, endlessly, one of as many buffers of ``size`` bytes as fill twice the cache."""
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
    """Return the bytes of the last cache, 64 MiB where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [
        int(path.read_text().strip().removesuffix("K")) << 10
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=64 << 20)
