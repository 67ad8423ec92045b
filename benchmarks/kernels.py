"""How fast are maps applied, against a copy, a matrix product and SciPy? Run as a module.

``python -m benchmarks.kernels``. Large results go to memory that is there, and, ``fresh``, to new
memory. Bars that are missed by more than noise are printed, and the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.interpolate
import torch
from torch import Tensor, nn

from coded_torch import ops
from coded_torch.codes import SplineCode
from coded_torch.codes.nodes import chebyshev_first, chebyshev_second
from coded_torch.linear import SplineMap
from coded_torch.nn import CodedWrapper
from coded_torch.workers import LocalWorkers

from . import gpu_model
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
# Of each size, into memory that is there: of the time of the copy at most, with AVX-512 and
# without; times faster than torch.matmul at least, of which half is enough without.
COPY_BARS = {True: (1.2, 0.9, 1.1, 1.3, 1.6), False: (1.3, 1.2, 1.5, 1.8, 2.1)}
MATMUL_BARS = (1.2, 2.0, 7.0, 12.0, 35.0)
# Of the time that filling new memory takes, where huge pages are granted on request; where the
# system grants them by itself, 1.2. The first is too small: its memory is soon an old one's.
FRESH_BARS = (None, 0.5, 0.5, 0.7, 0.7)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ENCODE_BAR = 1.3  # of the copy, what a wrapper's `encode_seconds` may be at the second size
# A layout or dtype: times slower than "forward" at most.
RELATIVE_BARS = {
    "transpose": 1.3,
    "bfloat16": 1.0,
    "float16": 1.0,
    "strided": 1.15,
    "indexed": 1.15,
}
SCIPY_BAR = 20  # times faster than SciPy's map, a new received set at least
SMALL_BARS = {"seen": 30e-6, "new": 80e-6, "plan of 1000": 100e-6}  # seconds
REGRESSION = 1.6  # a bar missed by this factor is a regression, whatever else the machine did
SMOOTHING = 1e-6
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 2.0**-8 + 3e-5, torch.float16: 2.0**-11 + 3e-5}


def spline_of(num_data: int, num_workers: int) -> SplineMap:
    knots, points = chebyshev_first(num_data), chebyshev_second(num_workers)
    return SplineMap(knots, points, smoothing=SMOOTHING)


def check(what: str, got: Tensor, want: Tensor) -> None:
    """Raise an error if the columns that ``want`` has differ, relative to its largest value."""
    error = ((got[..., : want.shape[-1]].double() - want).abs().max() / want.abs().max()).item()
    if not error <= TOLERANCES[got.dtype]:
        raise AssertionError(f"{what}: the error is {error:.1e}")


def contestants(num_data: int, num_workers: int, columns: int) -> dict[str, Any]:
    """Return functions that apply the map, or its rivals, to the next buffer."""
    spline = spline_of(num_data, num_workers)
    matrix = spline.matrix()
    dense, cache = matrix.float(), last_level_cache()
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def over(apply: Callable[..., Tensor], operator: Tensor, make: Callable[[], Tensor]) -> Any:
        values = make()
        out = values.new_zeros(len(operator), values.shape[1])
        want = operator @ values[:, :512].double()
        check(f"{num_data} -> {num_workers}", apply(values, out=out), want)
        buffers = rotate(lambda: (make(), torch.zeros_like(out)), values.nbytes + out.nbytes, cache)

        def run() -> Tensor:
            values, out = next(buffers)
            return apply(values, out=out)

        return run

    # Rows of two groups in any order, in a batch with as many rows again between them.
    order = torch.randperm(2 * num_data, generator=generator)
    gather = order[:num_data, None].contiguous()
    scatter = torch.randperm(num_workers, generator=generator)[:, None].contiguous()
    plan = spline._operands(dense)

    def indexed(batch: Tensor, out: Tensor) -> Tensor:
        rows = {"gather": gather, "scatter": scatter, "num_rows": num_workers}
        return ops.spline_apply(batch, *plan, **rows, out=out)

    permuted = torch.zeros(num_workers, 2 * num_data, dtype=torch.float64)
    permuted[scatter, gather.T] = matrix
    halves = (num_data + num_workers) * columns // 2
    copies = rotate(lambda: (randn(halves), randn(halves)), 4 * halves, cache)

    def copy() -> Tensor:
        source, target = next(copies)
        return target.copy_(source)

    def inputs(dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
        return lambda: randn(num_data, columns, dtype=dtype)

    return {
        "copy": copy,
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

    return measure({"scipy": run}, runs=runs)["scipy"].median / values.shape[1]


def sizes(shrink: int) -> list[dict[str, int]]:
    names = ("num_data", "num_workers", "columns")
    return [dict(zip(names, (k, n, c // shrink), strict=True)) for k, n, c in SIZES]


def fresh(runs: int, shrink: int, threads: int) -> list[dict[str, Any]]:
    """Time results that are new in every call, from the allocator as it is, and plain filling."""
    torch.set_num_threads(threads)
    setting = HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""
    rows = []
    for size, bar in zip(sizes(shrink), FRESH_BARS, strict=True):
        num_data, num_workers, columns = size.values()
        inputs = rotate(
            lambda shape=(num_data, columns): torch.randn(shape),
            num_data * columns * 4,
            last_level_cache(),
        )
        spline = spline_of(num_data, num_workers)
        functions = {
            "spline": lambda apply=spline, inputs=inputs: apply(next(inputs)),
            "fill": lambda shape=(num_workers, columns): torch.empty(shape).fill_(1.0),
        }
        timings = measure(functions, runs=runs)
        given = bar if "[madvise]" in setting else 1.2 if "[always]" in setting and bar else None
        ratio = timings["spline"].median / timings["fill"].median
        seconds = {name: timing._asdict() for name, timing in timings.items()}
        rows.append({**size, "seconds": seconds, "over_fill": ratio, "over_fill_bar": given})
        print(f"{num_data:5d} -> {num_workers:<5d} fresh: {ratio:.2f}x filling (<= {given})")
    return rows


def large(runs: int, shrink: int) -> list[dict[str, Any]]:
    rows = []
    wide = "avx512" in torch.ops.coded_torch.cpu_capabilities()
    for size, over_copy, faster in zip(sizes(shrink), COPY_BARS[wide], MATMUL_BARS, strict=True):
        num_data, num_workers, columns = size.values()
        timings = measure(contestants(**size), runs=runs)
        medians = {name: timing.median for name, timing in timings.items()}
        moved = (num_data + num_workers) * columns * 4
        scipy = scipy_seconds_per_column(num_data, num_workers, runs)
        row: dict[str, Any] = {
            **size,
            "bytes": moved,
            "copy_gb_per_s": moved / medians["copy"] / 1e9,
            "seconds": {name: timing._asdict() for name, timing in timings.items()},
            "over_copy": medians["forward"] / medians["copy"],
            "over_copy_bar": over_copy,
            # Of the fastest runs: what the machine can do when it does nothing else.
            "over_copy_best": timings["forward"].best / timings["copy"].best,
            "faster_than_matmul": medians["matmul"] / medians["forward"],
            "faster_than_matmul_bar": faster if wide else faster / 2,
            "relative": {
                name: {"ratio": medians[name] / medians["forward"], "bar": bar}
                for name, bar in RELATIVE_BARS.items()
            },
            "faster_than_scipy": scipy / (medians["forward"] / columns),
        }
        rows.append(row)
        print(
            f"{num_data:5d} -> {num_workers:<5d} copy {row['copy_gb_per_s']:6.1f} GB/s | "
            f"{row['over_copy']:5.2f}x copy (<= {over_copy}, best {row['over_copy_best']:.2f}) | "
            f"{row['faster_than_matmul']:6.1f}x matmul (>= {row['faster_than_matmul_bar']}) | "
            + " ".join(f"{n} {r['ratio']:.2f}" for n, r in row["relative"].items())
            + f" | {row['faster_than_scipy']:.0f}x SciPy",
            flush=True,
        )
    return rows


class _First(nn.Module):
    """Takes no time, so that encoding is most of the call."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


def encode(runs: int, shrink: int) -> dict[str, float]:
    """Time what encoding costs a call of a wrapper, all checks included, against the same copy."""
    num_data, num_workers, columns = sizes(shrink)[1].values()
    code = SplineCode(num_data, num_workers, encoder_smoothing=SMOOTHING, ordering="arrival")
    coded = CodedWrapper(_First(), code, workers=LocalWorkers())
    halves = (num_data + num_workers) * columns // 2
    source, target = torch.randn(halves), torch.zeros(halves)
    x = torch.randn(num_data, columns)
    seconds, copies = [], []
    for _ in range(runs + 1):  # in turns
        seconds.append(coded.run(x)[1].encode_seconds)
        copies.append(measure({"": lambda: target.copy_(source)}, runs=1)[""].median)
    median = float(np.median(seconds[1:]))
    ratio = median / float(np.median(copies[1:]))
    print(f"encode in a wrapper: {ratio:.2f}x copy (<= {ENCODE_BAR})", flush=True)
    return {"seconds": median, "over_copy": ratio, "over_copy_bar": ENCODE_BAR}


def crossover(runs: int) -> list[dict[str, Any]]:
    """Measure on the CPU from which size on sweeps beat a product, columns in and out of cache."""
    rows = []
    for columns, n in itertools.product((256, 65_536), (2, 3, 4, 6, 8, 12, 16)):
        spline = SplineMap(np.linspace(-1, 1, n), np.linspace(-1, 1, n + max(1, n // 4)))
        dense, values = spline.matrix(torch.float32), torch.ones(n, columns)
        functions = {
            "sweeps": lambda s=spline, v=values: s(v),
            "matmul": lambda d=dense, v=values: d @ v,
        }
        timings = measure(functions, runs=runs, calls=50)
        ratio = timings["matmul"].median / timings["sweeps"].median
        rows.append({"num_data": n, "columns": columns, "faster_than_matmul": ratio})
        print(f"{n:5d} x {columns}: {ratio:.2f}x matmul", flush=True)
    return rows


def small(runs: int, calls: int) -> dict[str, Any]:
    """Time what serving pays per decode of logits: 80 of 100 results, 20 answers, 10 columns."""
    code, rng = SplineCode(20, 100), np.random.default_rng(0)
    sets = [sorted(rng.choice(100, 80, replace=False).tolist()) for _ in range(4096)]
    new = itertools.cycle(sets)  # far more than are kept
    results = torch.randn(80, 10, generator=torch.Generator().manual_seed(0))
    knots, points = code.worker_points[sets[0]], code.data_points
    values, thousand = results.double().numpy(), np.sort(rng.uniform(-1, 1, 1000))

    def scipy_map() -> Any:
        return scipy.interpolate.make_smoothing_spline(knots, values, lam=0.0)(points)

    def scipy_interpolation() -> Any:  # what it has for no smoothing only
        return scipy.interpolate.CubicSpline(knots, values, bc_type="natural")(points)

    check("decode", code.decode(results, sets[0]), torch.from_numpy(scipy_map()))
    ours = {
        "seen": lambda: code.decode(results, sets[0]),
        "new": lambda: code.decode(results, next(new)),
        "plan of 1000": lambda: SplineMap(thousand, thousand),
    }
    scipys = {"scipy": scipy_map, "scipy interpolation": scipy_interpolation}
    timings = measure(ours, runs=runs, calls=calls)
    timings |= measure(scipys, runs=runs, calls=max(1, calls // 20))
    for name, bar in SMALL_BARS.items():
        print(f"{name}: {timings[name].median * 1e6:.1f} us (<= {bar * 1e6:.0f})")
    map_ratio, interpolation = (timings[x].median / timings["new"].median for x in scipys)
    print(
        f"new: {map_ratio:.1f}x make_smoothing_spline (>= {SCIPY_BAR}), {interpolation:.1f}x other"
    )
    return {
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "bars": SMALL_BARS,
        "new_faster_than_scipy": map_ratio,
        "new_faster_than_scipy_bar": SCIPY_BAR,
        "new_faster_than_scipy_interpolation": interpolation,
    }


def regressions(results: dict[str, Any]) -> list[str]:
    """Return the ratios that miss their bars by more than noise."""
    slower: dict[str, float] = {}
    for threads, rows in results["fresh"].items():
        for row in filter(lambda row: row["over_fill_bar"], rows):
            name = f"{threads} threads, {row['num_data']} -> {row['num_workers']}, fresh"
            slower[name] = row["over_fill"] / row["over_fill_bar"]
    for threads, row in results["encode"].items():
        slower[f"{threads} threads, encode"] = row["over_copy"] / row["over_copy_bar"]
    for threads, rows in results["large"].items():
        for row in rows:
            name = f"{threads} threads, {row['num_data']} -> {row['num_workers']}"
            slower[f"{name}, of the copy"] = row["over_copy_best"] / row["over_copy_bar"]
            matmul = row["faster_than_matmul_bar"] / row["faster_than_matmul"]
            slower[f"{name}, against matmul"] = matmul
            for kind, relative in row["relative"].items():
                slower[f"{name}, {kind}"] = relative["ratio"] / relative["bar"]
    of = results["small"]
    slower["a new set, SciPy"] = of["new_faster_than_scipy_bar"] / of["new_faster_than_scipy"]
    every = slower.items()
    return [f"{what}: {x:.2f} times its bar" for what, x in every if not x <= REGRESSION]


def on_cpu(numbers_of_threads: list[int], runs: int, shrink: int) -> dict[str, Any]:
    results: dict[str, Any] = {"large": {}, "fresh": {}, "encode": {}}
    for threads in numbers_of_threads:
        torch.set_num_threads(threads)
        print(f"{threads} threads", flush=True)
        # In a process of its own: this one keeps memory that was freed.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            results["fresh"][threads] = process.submit(fresh, runs, shrink, threads).result()
        results["encode"][threads] = encode(runs, shrink)
        results["large"][threads] = large(runs, shrink)
    torch.set_num_threads(1)
    reuse_memory()
    results["crossover"] = crossover(runs)
    results["small"] = small(runs, calls=1000 // shrink)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="[%(default)s]")
    parser.add_argument("--runs", type=int, default=21, help="[%(default)s]")
    parser.add_argument("--quick", action="store_true", help="small and rough; writes nothing")
    what = "print what an H100 would do, by a model, and end"
    parser.add_argument("--model", action="store_true", help=what)
    args = parser.parse_args()
    if args.model:
        gpu_model.model()
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    runs, shrink = (3, 16) if args.quick else (args.runs, 1)
    if args.device == "cuda":
        rows = gpu_model.measured(runs, shrink)
        results: dict[str, Any] = {"choices": rows}
        missed = [str(row) for row in rows if not row["ratio"] <= row["ratio_bar"]]
    else:
        results = on_cpu(args.threads, runs, shrink)
        missed = regressions(results)
    if args.quick:
        return 0
    path = RESULTS / f"kernels-{args.device}.json"
    write_results(path, {"environment": environment(args.device), **results})
    print("\n".join([f"wrote {path.name}", *missed]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
