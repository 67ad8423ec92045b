"""How fast are maps applied, against a copy, a matrix product and SciPy? Run as a module.

``python -m benchmarks kernels``. Results go to memory that the process keeps, with the kernels of
each instruction set, and, ``fresh``, to new memory. Bars that are missed by more than noise are
printed, and the exit code is 1 then. With ``--device cuda`` nothing is measured: the page of
kernels is made of the file that ``coded-torch info --device cuda --json`` has left.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.interpolate
import torch
from torch import Tensor

from coded_torch import ops
from coded_torch.codes import SplineCode
from coded_torch.codes.curves import chebyshev_first, chebyshev_second
from coded_torch.linear import SplineMap

from . import card
from .runs import RESULTS, environment, write_results
from .timing import last_level_cache, measure, reuse_memory, rotate

# K, N, columns
SIZES = (
    (8, 10, 150_528),
    (20, 100, 150_528),
    (64, 128, 65_536),
    (256, 320, 32_768),
    (1024, 1280, 8_192),
)
# The bars of each size, into memory in use: the most times the copy's time, with each instruction
# set; the least times faster than torch.matmul, of which half is enough with AVX2, a quarter with
# the baseline. The baseline has no aim: its bars are its own times on one thread, rounded up.
COPY_BARS = {"avx512": (1.2, 0.9, 1.1, 1.3, 1.6), "avx2": (1.3, 1.2, 1.5, 1.8, 2.1)}
COPY_BARS["baseline"] = (4.0, 3.0, 8.0, 5.0, 9.0)
MATMUL_BARS = (1.2, 2.0, 7.0, 12.0, 35.0)
# The most times the time of filling new memory, with huge pages on request; elsewhere 1.2 at
# least. The first is small: its memory is soon an old one's.
FRESH_BARS = (2.0, 0.5, 0.5, 0.7, 0.7)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# A layout or dtype: times slower than "forward" at most.
RELATIVE_BARS = {
    "transpose": 1.3,
    "bfloat16": 1.0,
    "float16": 1.0,
    "strided": 1.15,
    "indexed": 1.15,
}
SCIPY_BAR = 20  # times faster than SciPy's map, a new received set at least
SMALL_BARS = {"seen": 30.0, "new": 80.0, "plan of 1000": 100.0}  # microseconds
REGRESSION = 1.6  # a bar missed by this factor is a regression even on a busy machine
SMOOTHING = 1e-6
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 2.0**-8 + 3e-5, torch.float16: 2.0**-11 + 3e-5}

Apply = Callable[[Tensor], Tensor]
Bars = dict[str, list[float]]  # the measured number, and its bound


def spline_of(num_data: int, num_workers: int) -> SplineMap:
    knots, points = chebyshev_first(num_data), chebyshev_second(num_workers)
    return SplineMap(knots, points, smoothing=SMOOTHING)


def check(what: str, got: Tensor, want: Tensor) -> None:
    """Raise an error if the columns that ``want`` has differ, relative to its largest value."""
    error = ((got[..., : want.shape[-1]].double() - want).abs().max() / want.abs().max()).item()
    if not error <= TOLERANCES[got.dtype]:
        raise AssertionError(f"{what}: the error is {error:.1e}")


def into_kept(apply: Apply, make: Callable[[], Tensor], size: int) -> Callable[[], None]:
    """Return a function whose result replaces an old one, of ``size`` bytes with its input.

    The allocator gives the old one's memory to a later result.
    """

    def buffer() -> list[Tensor]:
        return [values := make(), apply(values)]

    buffers = rotate(buffer, size, last_level_cache())

    def run() -> None:
        kept = next(buffers)
        kept[1] = apply(kept[0])

    return run


def contestants(num_data: int, num_workers: int, columns: int) -> dict[str, Any]:
    """Return functions that apply the map, or its rivals, to the next buffer."""
    spline = spline_of(num_data, num_workers)
    matrix = spline.matrix()
    dense = matrix.float()
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def over(apply: Apply, operator: Tensor, make: Callable[[], Tensor]) -> Any:
        values = make()
        want, got = operator @ values[:, :512].double(), apply(values)
        check(f"{num_data} -> {num_workers}", got, want)
        return into_kept(apply, make, values.nbytes + got.nbytes)

    # Rows of two groups in any order, in a batch with as many rows again between them.
    order = torch.randperm(2 * num_data, generator=generator)
    gather = order[:num_data, None].contiguous()
    scatter = torch.randperm(num_workers, generator=generator)[:, None].contiguous()
    plan = spline._operands(dense)

    def indexed(batch: Tensor) -> Tensor:
        rows = {"gather": gather, "scatter": scatter, "num_rows": num_workers}
        return ops.spline_apply(batch, *plan, **rows)

    permuted = torch.zeros(num_workers, 2 * num_data, dtype=torch.float64)
    permuted[scatter, gather.T] = matrix
    halves = (num_data + num_workers) * columns // 2

    def inputs(dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
        return lambda: randn(num_data, columns, dtype=dtype)

    return {
        "copy": into_kept(torch.clone, lambda: randn(halves), 8 * halves),
        "forward": over(spline, matrix, inputs()),
        "matmul": over(functools.partial(torch.mm, dense), matrix, inputs()),
        "transpose": over(spline.adjoint, matrix.T, lambda: randn(num_workers, columns)),
        "bfloat16": over(spline, matrix, inputs(torch.bfloat16)),
        "float16": over(spline, matrix, inputs(torch.float16)),
        "strided": over(spline, matrix, lambda: randn(num_data, columns + 64)[:, :columns]),
        "indexed": over(indexed, permuted, lambda: randn(2 * num_data, columns)),
    }


def scipy_seconds_per_column(num_data: int, num_workers: int, runs: int) -> float:
    """Time ``make_smoothing_spline`` and its evaluation, float64, 64 columns at once."""
    knots, points = chebyshev_first(num_data), chebyshev_second(num_workers)
    values = np.random.default_rng(0).standard_normal((num_data, 64))

    def run() -> Any:
        spline = scipy.interpolate.make_smoothing_spline(knots, values, lam=num_data * SMOOTHING)
        return spline(points)

    return measure({"scipy": run}, runs=runs)["scipy"]["median"] / values.shape[1]


def sizes(shrink: int) -> list[tuple[int, int, int]]:
    return [(k, n, columns // shrink) for k, n, columns in SIZES]


def row_of(threads: int, size: tuple[int, int, int], what: str, bars: Bars) -> dict[str, Any]:
    """Return a record of ratios beside their bars, and print it."""
    text = ", ".join(f"{name} {ratio:.2f} (<= {bar:.2f})" for name, (ratio, bar) in bars.items())
    print(f"{threads} threads, {size}, {what}: {text}", flush=True)
    names = ("num_data", "num_workers", "columns")
    return {"threads": threads, **dict(zip(names, size, strict=True)), "what": what, "bars": bars}


def fresh(runs: int, shrink: int, threads: int) -> Iterator[dict[str, Any]]:
    """Time results that are new in every call, from the allocator as it is, and plain filling."""
    setting = HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""
    for size, bar in zip(sizes(shrink), FRESH_BARS, strict=True):
        shape, out = (size[0], size[2]), (size[1], size[2])
        inputs = rotate(lambda: torch.randn(shape), 4 * shape[0] * shape[1], last_level_cache())  # noqa: B023
        spline = spline_of(*size[:2])
        functions = {
            "spline": lambda apply=spline, inputs=inputs: apply(next(inputs)),
            "fill": lambda out=out: torch.empty(out).fill_(1.0),
        }
        timings = measure(functions, runs=runs)
        given = bar if "[madvise]" in setting else max(1.2, bar)
        ratio = timings["spline"]["median"] / timings["fill"]["median"]
        yield row_of(threads, size, "new memory", {"filling": [ratio, given]})


def large(runs: int, shrink: int, threads: int) -> Iterator[dict[str, Any]]:
    """Time results in memory in use, and layouts and dtypes against the plain case."""
    operators = torch.ops.coded_torch
    fastest, *others = operators.cpu_capabilities().split()
    reuse_memory()
    for (i, size), capability in itertools.product(enumerate(sizes(shrink)), (*others, fastest)):
        operators._use_cpu_capability(capability)
        timings = measure(contestants(*size), runs=runs)
        medians = {name: timing["median"] for name, timing in timings.items()}
        best = {name: timing["best"] for name, timing in timings.items()}
        forward, enough = medians["forward"], {"avx512": 1, "avx2": 2}.get(capability, 4)
        scipy = scipy_seconds_per_column(*size[:2], runs) * size[2]
        bars = {
            # The fastest runs show the machine without other work.
            "copy": [best["forward"] / best["copy"], COPY_BARS[capability][i]],
            "matmul": [forward / medians["matmul"], enough / MATMUL_BARS[i]],
            **{name: [medians[name] / forward, bar] for name, bar in RELATIVE_BARS.items()},
        }
        row = row_of(threads, size, f"memory in use, {capability}", bars)
        yield row | {"seconds": timings, "faster_than_scipy": scipy / forward}


def small(runs: int, calls: int) -> dict[str, Any]:
    """Time a decode of logits, as serving pays it: 80 of 100 results, 20 answers, 10 columns."""
    code, rng = SplineCode(20, 100), np.random.default_rng(0)
    sets = [sorted(rng.choice(100, 80, replace=False).tolist()) for _ in range(4096)]
    new = itertools.cycle(sets)  # far more than are kept
    results = torch.randn(80, 10, generator=torch.Generator().manual_seed(0))
    knots, points = code.worker_points[sets[0]], code.data_points
    values, thousand = results.double().numpy(), np.sort(rng.uniform(-1, 1, 1000))

    def scipy_map() -> Any:
        return scipy.interpolate.make_smoothing_spline(knots, values, lam=0.0)(points)

    check("decode", code.decode(results, sets[0]), torch.from_numpy(scipy_map()))
    ours = {
        "seen": lambda: code.decode(results, sets[0]),
        "new": lambda: code.decode(results, next(new)),
        "plan of 1000": lambda: SplineMap(thousand, thousand),
    }
    timings = measure(ours, runs=runs, calls=calls)
    seconds = {name: timings[name]["median"] for name in ours}
    scipys = measure({"": scipy_map}, runs=runs, calls=max(1, calls // 20))[""]["median"]
    bars = {f"{name}, us": [1e6 * seconds[name], bar] for name, bar in SMALL_BARS.items()}
    bars["a new set, over SciPy's map"] = [seconds["new"] / scipys, 1 / SCIPY_BAR]
    return row_of(1, (20, 100, 10), "decode", bars)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--card", type=Path, default=RESULTS / "card.json", help="[%(default)s]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="[%(default)s]")
    parser.add_argument("--runs", type=int, default=21, help="[%(default)s]")
    parser.add_argument("--quick", action="store_true", help="small and rough; writes nothing")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        try:
            page = card.page(json.loads(args.card.read_text()))
        except (OSError, ValueError) as error:
            how = "make it by: coded-torch info --device cuda --json FILE"
            parser.error(f"--card cannot be read ({error}); {how}")
        card.PAGE.write_text(page)
        print(f"wrote {card.PAGE}")
        return 0
    runs, shrink = (3, 16) if args.quick else (args.runs, 1)
    rows: list[dict[str, Any]] = []
    for measured in (fresh, large):  # new memory first: later, freed memory is kept
        for threads in args.threads:
            torch.set_num_threads(threads)
            rows += measured(runs, shrink, threads)
    torch.set_num_threads(1)
    rows.append(small(runs, calls=1000 // shrink))
    if args.quick:
        return 0
    path = RESULTS / "kernels-cpu.json"
    write_results(path, {"environment": environment(), "measured": rows})
    # Absolute times depend on the machine.
    ratios = [(x["what"], bar, *x["bars"][bar]) for x in rows for bar in x["bars"]]
    missed = [x for x in ratios if "us" not in x[1] and not x[2] <= REGRESSION * x[3]]
    print("\n".join([f"wrote {path.name}", *(f"missed: {x}" for x in missed)]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
