"""What a CUDA card shows: its kernels tried, timed beside a copy and cuBLAS, and the tests.

Every step has a process of its own, since a kernel that fails may end CUDA there, and a bound on
its time. All that was found is written after each step.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import coded_torch

from .. import _extension, linear
from .._extension import seconds_on_device
from ..linear import SplineMap
from . import CommandError, say, usage
from ._files import replace

Record = dict[str, Any]

# Seconds that all may take, less than the ten minutes for which a card is often lent; and those of
# each step. The first process also reads torch from a disk.
_MOST_SECONDS = 540.0
_SECONDS = {"environment": 90.0, "kernels": 150.0, "borders": 45.0, "times": 60.0, "tests": 300.0}
_AT_ONCE = 6  # processes that try kernels: a context takes some 500 MB of a card's memory
_KERNELS = 30
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Knots and points of encoders and decoders; columns from logits to images of 224 x 224 x 3.
_SIZES = ((20, 24), (24, 20), (20, 100), (96, 20), (100, 120))
_COLUMNS = (1, 10, 128, 1_000, 10_000, 50_176, 150_528)
_QUICK_SIZES, _QUICK_COLUMNS = ((20, 24), (24, 20)), (1, 12)
_CALLS, _RUNS = 10, 5  # calls between two events, of which the median of some runs counts
_MOST_BUFFERS = 16  # that calls take in turn, so that the card's cache does not hold their values
# The most that results may differ from a product in float64, relative to the largest.
_TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 3e-5,
    torch.bfloat16: 2.0**-8 + 3e-5,
    torch.float16: 2.0**-11 + 3e-5,
}
# Numbers of CUfunction_attribute.
_ATTRIBUTES = {"registers": 4, "local_bytes": 3, "ptx_version": 5, "binary_version": 6}
_VARIABLES = re.compile("CODED_TORCH_|CUDA_|CUBLAS_|NVIDIA_|PYTORCH_|TORCH_")
_OUTCOMES = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


class Card:
    """What has been found on a card, kept in a file after each step.

    Args:
        path: the file; None keeps nothing.
        quick: whether to time few and small sizes.
    """

    def __init__(self, path: Path | None, quick: bool) -> None:
        self._path = path
        self._quick = quick
        self._begin = time.monotonic()
        self.problems: list[str] = []
        self.found: Record = {
            "command": "coded-torch info --device cuda",
            "quick": quick,
            "seconds": 0.0,
            "finished": False,
            "problems": self.problems,
            "environment": {},
            "kernels": [],
            "borders": {},
            "times": [],
            "tests": "not run",
        }

    def keep(self) -> None:
        """Write the findings to the file, whole or not at all."""
        self.found["seconds"] = round(time.monotonic() - self._begin, 1)
        if self._path is not None:
            with usage("--json cannot be written"):
                replace(self._path, (json.dumps(self.found, indent=1) + "\n").encode())

    def note(self, text: str) -> None:
        """Say on standard error how far the work is."""
        print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", file=sys.stderr, flush=True)

    def blame(self, problem: str) -> None:
        self.problems.append(problem)
        self.note(problem)

    def end_of(self, step: str) -> float:
        """Return when a step that begins now has to end."""
        return min(time.monotonic() + _SECONDS[step], self._begin + _MOST_SECONDS)

    def examine(self, tests: Path | None) -> bool:
        """Examine the GPU in all steps; return True if no problem was found."""
        self.keep()
        with tempfile.TemporaryDirectory() as scratch:
            self._look(scratch)
            self._try_kernels(scratch)
            self._find_borders(scratch)
            self._time(scratch)
        if tests is not None:
            self._test(tests)
        self.found["finished"] = True
        self.keep()
        return not self.problems

    def _look(self, scratch: str) -> None:
        """Find the versions, the card and the driver, and print them."""
        self.note("the environment")
        failure = _in_process(
            environment, (), scratch, self.end_of("environment"), self.found["environment"].update
        )
        if failure:
            self.blame(f"the environment is not known: {failure}")
        self.keep()
        for name, value in self.found["environment"].items():
            say(f"{name:<20}{value}")

    def _try_kernels(self, scratch: str) -> None:
        """Try each kernel in a process of its own, some at once, and print a table."""
        end = self.end_of("kernels")

        def try_one(number: int) -> tuple[Record, str | None]:
            record: Record = {"number": number, "name": _name(number)}
            folder = Path(scratch) / f"kernel {number}"
            return record, _in_process(try_kernel, (number,), str(folder), end, record.update)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            tries = [pool.submit(try_one, number) for number in range(_KERNELS)]
            for done, future in enumerate(as_completed(tries), start=1):
                record, failure = future.result()
                if failure is not None:
                    record |= {"right": False, "reason": failure}
                self.found["kernels"].append(record)
                self.found["kernels"].sort(key=lambda kernel: kernel["number"])
                if not record["right"]:
                    self.blame(f"kernel {record['name']} is not right: {record['reason']}")
                self.note(f"kernels: {done} of {_KERNELS} tried")
                self.keep()
        say(f"\n{'kernel':<36}error     registers  spilled bytes")
        for kernel in self.found["kernels"]:
            text = kernel["reason"]
            if kernel["right"]:
                text = f"{kernel['error']:<10.1e}{kernel['registers']:<11}{kernel['local_bytes']}"
            say(f"{kernel['name']:<36}{text}")

    def _find_borders(self, scratch: str) -> None:
        """Find the knots from which cuBLAS is faster than the kernels, and print them."""
        self.note("where cuBLAS takes over")
        found = self.found["borders"]
        end = self.end_of("borders")
        failure = _in_process(find_borders, (self._quick,), scratch, end, found.update)
        if failure is not None:
            self.blame(f"where cuBLAS takes over is known of {[*found]} only: {failure}")
        say(f"\n{'cuBLAS takes over':<20}(kernel / cuBLAS, by knots)")
        for name, border in found.items():
            ratios = ", ".join(f"{k}: {ratio:.2f}" for k, ratio in border["ratios"].items())
            ranges = [
                f"from {first}" + (f" to {last}" if last in range(1024) else "")
                for first, last in border["knots"]
            ]
            say(f"{name:<20}{' and '.join(ranges) or 'nowhere'} knots ({ratios})")
        self.keep()

    def _time(self, scratch: str) -> None:
        """Time the kernels of each dtype, and print the times of the largest tensors."""
        sizes = _QUICK_SIZES if self._quick else _SIZES
        columns = _QUICK_COLUMNS if self._quick else _COLUMNS
        for dtype in _DTYPES:
            cells: list[Record] = []
            wanted = len(sizes) * len(columns) * 4
            name = str(dtype).removeprefix("torch.")
            self.note(f"times of {name}: {wanted} cells")

            def add(cell: Record, cells: list[Record] = cells) -> None:
                cells.append(cell)
                self.found["times"].append(cell)

            arguments = (dtype, sizes, columns)
            failure = _in_process(time_dtype, arguments, scratch, self.end_of("times"), add)
            if failure is not None:
                self.blame(f"{len(cells)} of {wanted} cells of {name} were timed: {failure}")
            self._judge(name, cells)
            self.keep()
        say(f"\n{'microseconds':<44}  copy matmul kernel  graph   host")
        for cell in self.found["times"]:
            if cell["columns"] == columns[-1] and not cell["indices"]:
                arrow = "<-" if cell["transpose"] else "->"
                shape = f"{cell['knots']} {arrow} {cell['points']} x {cell['columns']:,}"
                numbers = (cell[x] for x in ("copy", "matmul", "kernel", "graph", "host"))
                said = " ".join(
                    f"{x * 1e6:6.1f}" if isinstance(x, float) else "     -" for x in numbers
                )
                say(f"{cell['dtype']:<9} {shape:<34}{said}")

    def _judge(self, name: str, cells: list[Record]) -> None:
        """Note cells of a dtype that timed a fallback, a wrong result or a failed graph."""
        for what, is_bad in (
            ("fallback", lambda cell: cell["fallback"]),
            ("wrong result", lambda cell: not cell["right"]),
            ("graph that failed", lambda cell: isinstance(cell["graph"], str)),
        ):
            bad = [cell for cell in cells if is_bad(cell)]
            if bad:
                first = {x: bad[0][x] for x in ("knots", "points", "transpose", "indices")}
                first["columns"] = bad[0]["columns"]
                why = bad[0]["reason"] or bad[0]["graph"]
                text = f"{name}: {len(bad)} of {len(cells)} cells timed a {what}"
                self.blame(f"{text}, first {first}, kernels {bad[0]['kernels']}: {why}")

    def _test(self, folder: Path) -> None:
        """Run the tests marked cuda in a folder of sources, and note their outcomes."""
        if importlib.util.find_spec("pytest") is None:
            self.found["tests"] = "not run: pytest is not installed"
            self.blame("the tests were not run: pytest is not installed")
            return
        self.note(f"the tests marked cuda in {folder}")
        command = [
            sys.executable, "-P", "-m", "pytest", "-m", "cuda", "-v", "--tb=short", "--color=no",
            # The package that is installed, not the folder's, which is not built.
            "-p", "coded_torch", "-p", "no:cacheprovider",
            "-c", str(folder / "pyproject.toml"), f"--rootdir={folder}", str(folder / "tests"),
        ]  # fmt: skip
        if sys.version_info < (3, 11):
            command.remove("-P")  # the scratch folder, in which it runs, holds nothing to import
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "output.txt"
            with output.open("w") as file:
                process = subprocess.Popen(
                    command,
                    cwd=scratch,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"CODED_TORCH_REQUIRE_CUDA": "1"},
                    start_new_session=True,
                )
            ended = False
            end = self.end_of("tests")
            while not ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(5.0, max(end - time.monotonic(), 0.0)))
                ended = process.poll() is not None or time.monotonic() >= end
                here = f"{os.path.relpath(folder, os.path.realpath(scratch))}/"
                said = output.read_text(errors="replace").replace(here, "")
                self.found["tests"] = _read_tests(said)
                self.found["tests"]["exit"] = process.poll()
                self.keep()
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        tests = self.found["tests"]
        counts = {x: n for x, n in tests.items() if isinstance(n, int) and x != "exit"}
        if tests["exit"] is None:
            self.blame(f"the tests did not end within {_SECONDS['tests']:.0f} s: {counts}")
        elif tests["exit"] != 0:
            failed = ", ".join(tests["failures"][:5]) or tests["output"][-200:]
            self.blame(f"the tests failed: {counts}: {failed}")
        say(f"\ntests  {counts}")


def _read_tests(output: str) -> Record:
    """Return the counts of outcomes in the output of pytest, and the names of failed tests."""
    outcomes = _OUTCOMES.findall(output)
    record: Record = {
        kind.lower(): sum(outcome == kind for _, outcome in outcomes)
        for kind in ("PASSED", "SKIPPED", "FAILED", "ERROR")
    }
    record["failures"] = [test for test, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    record["output"] = output[-20_000:]
    return record


def _name(number: int) -> str:
    return str(torch.ops.coded_torch._kernel_name(number))


# ---- processes -------------------------------------------------------------------------------


def _in_process(
    function: Callable[..., Iterator[Record]],
    arguments: tuple[Any, ...],
    cache: str,
    end: float,
    hear: Callable[[Record], object],
) -> str | None:
    """Run a step in a process; hear each of its records. Return why it failed, None if it ended."""
    begin = time.monotonic()
    if begin >= end:
        return "there was no time left"
    # Imports of torch take seconds. They do not begin to use CUDA, so a fork of them may.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_step, args=(there, cache, function, arguments), daemon=True)
    process.start()
    there.close()
    failure = f"it did not end within {end - begin:.0f} s"
    with here, contextlib.suppress(EOFError):
        while here.poll(max(end - time.monotonic(), 0.0)):
            failure = "its process ended"
            message = here.recv()
            if message is None:
                failure = ""
                break
            if isinstance(message, str):
                failure = message
                break
            hear(message)
            failure = f"it did not end within {end - begin:.0f} s"
    process.join(5.0)
    if process.exitcode is None:
        process.kill()
        process.join()
    elif process.exitcode < 0:
        failure = f"its process was ended by signal {-process.exitcode}"
    elif process.exitcode > 0 and failure == "its process ended":
        failure = f"its process ended with exit code {process.exitcode}"
    return failure or None


def _step(
    pipe: Connection, cache: str, function: Callable[..., Iterator[Record]], arguments: Any
) -> None:
    """Send the records of a step, and None at its end, or a line that says why it failed."""
    os.environ["XDG_CACHE_HOME"] = cache
    try:
        for record in function(*arguments):
            pipe.send(record)
        pipe.send(None)
    except Exception as error:  # the parent process reports it, whatever it is
        traceback.print_exc()
        pipe.send((str(error) or repr(error)).splitlines()[0])


def environment() -> Iterator[Record]:
    """Yield versions, the card, the driver and the compiler of kernels."""
    driver = Path("/proc/driver/nvidia/version")
    card = torch.cuda.get_device_properties(0)
    major, minor = ctypes.c_int(), ctypes.c_int()
    yield {
        "coded_torch": coded_torch.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "card": card.name,
        "cards": torch.cuda.device_count(),
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "cache_bytes": card.L2_cache_size,
        "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "variables": {x: y for x, y in sorted(os.environ.items()) if _VARIABLES.match(x)},
    }
    nvrtc = ctypes.CDLL("nvrtc", handle=_extension._nvrtc())
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    yield {"nvrtc": f"{major.value}.{minor.value}"}


def try_kernel(number: int) -> Iterator[Record]:
    """Yield whether a kernel is right, and what the compiler made of it."""
    begin = time.perf_counter()
    try:
        error = _extension._trial(0, number)
        attribute = partial(torch.ops.coded_torch._kernel_attribute, 0, number)
        facts = {name: attribute(which) for name, which in _ATTRIBUTES.items()}
        yield {"right": True, "reason": None, "error": error, **facts}
    except Exception as failure:  # whatever NVRTC, the driver or torch raise
        why = (str(failure) or repr(failure)).splitlines()[0]
        yield {"right": False, "reason": why}
    yield {"seconds": round(time.perf_counter() - begin, 2)}


def find_borders(quick: bool) -> Iterator[Record]:
    """Yield, by dtype, from how many knots cuBLAS is faster, and the times that say so."""
    if quick:
        linear._TIMED_BYTES, linear._TIMED_COLUMNS = 1 << 12, 8
    for dtype in _DTYPES:
        times = linear.times_on_card(0, dtype)
        if not times:
            raise RuntimeError(f"kernels of {dtype} could not be timed beside cuBLAS")
        sizes = [knots for knots, _ in linear._TIMED[: len(times)]]
        yield {
            str(dtype).removeprefix("torch."): {
                "seconds": dict(zip(sizes, times, strict=True)),
                "ratios": {
                    x: kernel / cublas for x, (kernel, cublas) in zip(sizes, times, strict=True)
                },
                "knots": linear.slower_kernels(times),
            }
        }


# ---- times -----------------------------------------------------------------------------------


def time_dtype(
    dtype: torch.dtype, sizes: tuple[tuple[int, int], ...], columns: tuple[int, ...]
) -> Iterator[Record]:
    """Yield the times of kernels of a dtype and of their rivals, by sizes of maps."""
    torch.manual_seed(0)
    for (knots, points), transpose in itertools.product(sizes, (False, True)):
        spline = SplineMap(np.linspace(-1, 1, knots), np.linspace(-1, 1, points), smoothing=1e-6)
        for indices, number in itertools.product((False, True), columns):
            where = {"knots": knots, "points": points, "transpose": transpose}
            cell = Cell(spline, dtype, transpose, indices, number)
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                **where,
                "indices": indices,
                "columns": number,
                **cell.measure(),
            }


class Cell:
    """One size of a map, whose kernel is timed beside a copy of as many bytes and a product.

    Buffers take turns, as many as fill the card's cache twice.
    """

    def __init__(
        self, spline: SplineMap, dtype: torch.dtype, transpose: bool, indices: bool, columns: int
    ) -> None:
        accumulated = torch.promote_types(dtype, torch.float32)
        full = spline._operands(torch.empty(0, dtype=accumulated))
        self._product, self._schedule = (x.cuda() for x in full)
        self._sweep = self._product[:, : spline._sweeps]
        self._plan = self._product if spline._prefers_matrix else self._sweep
        self._transpose = transpose
        exact = spline.matrix().cuda()
        self._exact = exact.T if transpose else exact
        self._matrix = self._exact.to(dtype)
        others, rows = self._matrix.shape
        moved = dtype.itemsize * (rows + others) * columns
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = min(max(2, -(-2 * cache // moved)), _MOST_BUFFERS)
        shape = (rows, columns) if indices else (rows, 1, columns)
        self._values = [torch.randn(shape, device="cuda").to(dtype) for _ in range(count)]
        half = moved // 2 // dtype.itemsize
        self._halves = [torch.zeros(2, half, dtype=dtype, device="cuda") for _ in range(count)]
        self._turn = itertools.cycle(range(count))
        self._gather: Tensor | None = None
        self._scatter: Tensor | None = None
        if indices:
            self._gather = torch.randperm(rows).view(rows, 1).cuda()
            self._scatter = torch.randperm(others).view(others, 1).cuda()

    def copy(self) -> None:
        source, target = self._halves[next(self._turn)]
        target.copy_(source)

    def matmul(self) -> Tensor:
        """Apply the matrix to the next buffer by torch, with its rows read and written by index."""
        values = self._values[next(self._turn)]
        if self._gather is None or self._scatter is None:
            return torch.matmul(self._matrix, values[:, 0])
        result = torch.matmul(self._matrix, values.index_select(0, self._gather[:, 0]))
        return torch.empty_like(result).index_copy_(0, self._scatter[:, 0], result)

    def kernel(self, plan: Tensor | None = None, at: int | None = None) -> Tensor:
        """Apply the map as it would be, or by a plan, to the next buffer, or to one by number."""
        result: Tensor = torch.ops.coded_torch.spline_apply(
            self._values[next(self._turn) if at is None else at],
            self._plan if plan is None else plan,
            self._schedule,
            self._transpose,
            self._gather,
            self._scatter,
        )
        return result

    def measure(self) -> Record:
        """Return seconds per call, which kernels ran, and the error of the results."""
        names = {"product": self._product, "sweep": self._sweep}
        before = _extension.launches(0)
        errors = {name: self._error(self.kernel(plan, at=0)) for name, plan in names.items()}
        calls: list[Callable[[], object]] = [self.copy, self.matmul]
        calls += [partial(self.kernel, plan) for plan in names.values()]
        seconds = seconds_on_device(calls, _CALLS, _RUNS)
        times: Record = dict(zip(("copy", "matmul", *names), seconds, strict=True))
        times["kernel"] = times["product" if self._plan is self._product else "sweep"]
        times["host"] = self._on_host()
        made = len(names) * (1 + _RUNS * _CALLS + _extension.WARM_CALLS) + _CALLS * _RUNS
        after = _extension.launches(0)
        grown = {name: after[name] - before[name] for name in after if after[name] > before[name]}
        fallback = sum(grown.values()) < made
        reasons = "; ".join(_extension.CUDA_FAILURES) or None
        if fallback and reasons is None:
            reasons = f"{sum(grown.values())} of {made} calls launched a kernel"
        tolerance = _TOLERANCES[self._matrix.dtype]
        return {
            **times,
            "graph": self._replayed(),
            "kernels": sorted(grown),
            "errors": errors,
            "right": all(error <= tolerance for error in errors.values()),
            "fallback": fallback,
            "reason": reasons,
        }

    def _error(self, got: Tensor) -> float:
        """Return the largest error of a result, relative to the largest number of the exact one."""
        values = self._values[0].double()
        if self._gather is None or self._scatter is None:
            want = self._exact @ values[:, 0]
            got = got[:, 0]
        else:
            product = self._exact @ values[self._gather[:, 0]]
            want = torch.empty_like(product).index_copy_(0, self._scatter[:, 0], product)
        return float((got.double() - want).abs().max() / want.abs().max())

    def _on_host(self) -> float:
        """Return the seconds that a call takes on the host, which does not wait for its end."""
        times = []
        for _ in range(_RUNS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(_CALLS):
                self.kernel()
            times.append((time.perf_counter() - begin) / _CALLS)
        torch.cuda.synchronize()
        return float(np.median(times))

    def _replayed(self) -> float | str:
        """Return the seconds per call of a graph that is replayed, or why there is none."""
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(_CALLS):
                    self.kernel()
            (seconds,) = seconds_on_device([graph.replay], 1, _RUNS)
            return seconds / _CALLS
        except RuntimeError as error:
            return str(error).splitlines()[0]


def examine(path: Path | None, tests: Path | None, quick: bool) -> bool:
    """Try and time the kernels on the first card; return whether no problem was found."""
    if not torch.cuda.device_count():
        raise CommandError("torch has no CUDA device here")
    if tests is not None and not (tests / "tests").is_dir():
        raise CommandError(f"--tests must be the folder of the sources, with tests, got {tests}")
    card = Card(path, quick)
    found = card.examine(None if tests is None else tests.resolve())
    for problem in card.problems:
        print(f"coded-torch info: {problem}", file=sys.stderr)
    return found
