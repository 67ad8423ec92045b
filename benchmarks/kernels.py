"""How fast maps are applied: against a copy of the same bytes, a matrix product, and SciPy.

Large results go to memory that is there, and, ``fresh``, to new memory.
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

from . import choices
from .runs import RESULTS, environment, write_results
from .timing import Timing, last_level_cache, measure, reuse_memory, rotate

# (K, N, columns)
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
# Of the copy, what a wrapper's `encode_seconds` may be at the second size.
ENCODE_BAR = 1.3
# A layout or dtype and what it is compared with: times slower at most.
RELATIVE_BARS = {
    "transpose": ("forward", 1.3),
    "bfloat16": ("forward", 1.0),
    "float16": ("forward", 1.0),
    "strided": ("forward", 1.15),
    "indexed": ("forward", 1.15),
}
# Times faster than SciPy's map, a new received set at least.
SCIPY_BAR = 20
# A bar missed by this factor is a regression, whatever else the machine was doing.
REGRESSION = 1.6
SMOOTHING = 1e-6
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 2.0**-8 + 3e-5, torch.float16: 2.0**-11 + 3e-5}


def check(what: str, got: Tensor, want: Tensor) -> None:
    """Correctness first: relative to the largest value, on the columns that ``want`` has."""
    got = got[..., : want.shape[-1]]
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    if not error <= TOLERANCES[got.dtype]:
        raise AssertionError(f"{what}: the error is {error:.1e}")


def contestants(num_data: int, num_workers: int, columns: int) -> dict[str, Any]:
    """By name, functions that apply the map, or do what it is compared with, to the next buffer."""
    spline = SplineMap(
        chebyshev_first(num_data), chebyshev_second(num_workers), smoothing=SMOOTHING
    )
    matrix = spline.matrix()
    dense = matrix.float()
    cache = last_level_cache()
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def over(
        apply: Callable[..., Tensor], operator: Tensor, make: Callable[[], Tensor]
    ) -> Callable[[], Tensor]:
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

    return {
        "copy": copy,
        "forward": over(spline, matrix, lambda: randn(num_data, columns)),
        "matmul": over(
            functools.partial(torch.mm, dense), matrix, lambda: randn(num_data, columns)
        ),
        "transpose": over(spline.adjoint, matrix.T, lambda: randn(num_workers, columns)),
        "bfloat16": over(spline, matrix, lambda: randn(num_data, columns, dtype=torch.bfloat16)),
        "float16": over(spline, matrix, lambda: randn(num_data, columns, dtype=torch.float16)),
        "strided": over(spline, matrix, lambda: randn(num_data, columns + 64)[:, :columns]),
        "indexed": over(indexed, permuted, lambda: randn(2 * num_data, columns)),
    }


def scipy_seconds_per_column(num_data: int, num_workers: int, runs: int) -> float:
    """``make_smoothing_spline`` and its evaluation, float64, 64 columns at once, from C order."""
    knots, points = chebyshev_first(num_data), chebyshev_second(num_workers)
    values = np.random.default_rng(0).standard_normal((num_data, 64))

    def run() -> Any:
        spline = scipy.interpolate.make_smoothing_spline(knots, values, lam=num_data * SMOOTHING)
        return spline(points)

    return measure({"scipy": run}, runs=runs)["scipy"].median / values.shape[1]


def fresh(runs: int, shrink: int, threads: int) -> list[dict[str, Any]]:
    """Results that are new in every call, from the allocator as it is; filling them plainly."""
    torch.set_num_threads(threads)
    setting = HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""
    on_request, always = "[madvise]" in setting, "[always]" in setting
    rows = []
    for (num_data, num_workers, all_columns), bar in zip(SIZES, FRESH_BARS, strict=True):
        columns = all_columns // shrink
        spline = SplineMap(
            chebyshev_first(num_data), chebyshev_second(num_workers), smoothing=SMOOTHING
        )
        inputs = rotate(
            lambda shape=(num_data, columns): torch.randn(shape),
            num_data * columns * 4,
            last_level_cache(),
        )
        timings = measure(
            {
                "spline": lambda apply=spline, inputs=inputs: apply(next(inputs)),
                "fill": lambda shape=(num_workers, columns): torch.empty(shape).fill_(1.0),
            },
            runs=runs,
        )
        row = {
            "num_data": num_data,
            "num_workers": num_workers,
            "columns": columns,
            "seconds": {name: timing._asdict() for name, timing in timings.items()},
            "over_fill": timings["spline"].median / timings["fill"].median,
            "over_fill_bar": bar if on_request else 1.2 if always and bar else None,
        }
        rows.append(row)
        print(
            f"{num_data:5d} -> {num_workers:<5d} x {columns:<7d} fresh: "
            f"{row['over_fill']:.2f}x filling (<= {row['over_fill_bar']})",
            flush=True,
        )
    return rows


def large(runs: int, shrink: int) -> list[dict[str, Any]]:
    rows = []
    wide = "avx512" in torch.ops.coded_torch.cpu_capabilities()
    for (num_data, num_workers, all_columns), over_copy, faster in zip(
        SIZES, COPY_BARS[wide], MATMUL_BARS, strict=True
    ):
        over_matmul = faster if wide else faster / 2
        columns = all_columns // shrink
        functions = contestants(num_data, num_workers, columns)
        timings = measure(functions, runs=runs)
        medians = {name: timing.median for name, timing in timings.items()}
        moved = (num_data + num_workers) * columns * 4
        row: dict[str, Any] = {
            "num_data": num_data,
            "num_workers": num_workers,
            "columns": columns,
            "bytes": moved,
            "copy_gb_per_s": moved / medians["copy"] / 1e9,
            "seconds": {name: timing._asdict() for name, timing in timings.items()},
            "over_copy": medians["forward"] / medians["copy"],
            "over_copy_bar": over_copy,
            # Of the fastest runs: what the machine can do when it does nothing else.
            "over_copy_best": timings["forward"].best / timings["copy"].best,
            "faster_than_matmul": medians["matmul"] / medians["forward"],
            "faster_than_matmul_bar": over_matmul,
            "relative": {
                name: {"ratio": medians[name] / medians[base], "bar": bar}
                for name, (base, bar) in RELATIVE_BARS.items()
            },
        }
        scipy = scipy_seconds_per_column(num_data, num_workers, runs)
        row["faster_than_scipy"] = scipy / (medians["forward"] / columns)
        rows.append(row)
        print(
            f"{num_data:5d} -> {num_workers:<5d} x {columns:<7d} "
            f"copy {row['copy_gb_per_s']:6.1f} GB/s | "
            f"{row['over_copy']:5.2f}x copy (<= {over_copy}, best {row['over_copy_best']:.2f}) | "
            f"{row['faster_than_matmul']:6.1f}x matmul (>= {over_matmul}) | "
            + " ".join(f"{n} {r['ratio']:.2f}" for n, r in row["relative"].items())
            + f" | {row['faster_than_scipy']:.0f}x SciPy",
            flush=True,
        )
    return rows


def encode(runs: int, shrink: int) -> dict[str, float]:
    """What encoding costs a call of a wrapper, all checks included, against the same copy."""
    num_data, num_workers, columns = SIZES[1]
    columns //= shrink
    coded = CodedWrapper(
        _First(),
        SplineCode(num_data, num_workers, encoder_smoothing=SMOOTHING),
        workers=LocalWorkers(),
        ordering="arrival",
    )
    halves = (num_data + num_workers) * columns // 2
    source, target = torch.randn(halves), torch.zeros(halves)
    x = torch.randn(num_data, columns)
    coded(x)  # its memory is there from then on
    seconds, copies = [], []
    for _ in range(runs):
        coded(x)
        assert coded.last_run is not None
        seconds.append(coded.last_run.encode_seconds)
        copies.append(
            measure({"copy": lambda: target.copy_(source)}, runs=1)["copy"].median  # in turns
        )
    row = {
        "seconds": float(np.median(seconds)),
        "over_copy": float(np.median(seconds) / np.median(copies)),
        "over_copy_bar": ENCODE_BAR,
    }
    print(f"encode in a wrapper: {row['over_copy']:.2f}x copy (<= {ENCODE_BAR})", flush=True)
    return row


class _First(nn.Module):
    """Takes no time, so that encoding is most of the call."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


def small(runs: int, calls: int) -> dict[str, Any]:
    """What serving pays per decode of logits: 80 of 100 results, 20 answers, 10 columns."""
    code = SplineCode(20, 100)
    rng = np.random.default_rng(0)
    sets = [sorted(rng.choice(100, 80, replace=False).tolist()) for _ in range(4096)]
    new = itertools.cycle(sets)  # far more than are kept
    results = torch.randn(80, 10, generator=torch.Generator().manual_seed(0))
    knots, points = code.worker_points[sets[0]], code.data_points
    values = results.double().numpy()

    def scipy_map() -> Any:
        return scipy.interpolate.make_smoothing_spline(knots, values, lam=0.0)(points)

    def scipy_interpolation() -> Any:  # what it has for no smoothing only
        return scipy.interpolate.CubicSpline(knots, values, bc_type="natural")(points)

    check("decode", code.decode(results, sets[0]), torch.from_numpy(scipy_map()))
    thousand = np.sort(rng.uniform(-1, 1, 1000))
    timings: dict[str, Timing] = measure(
        {
            "seen": lambda: code.decode(results, sets[0]),
            "new": lambda: code.decode(results, next(new)),
            "plan of 1000": lambda: SplineMap(thousand, thousand),
        },
        runs=runs, calls=calls,
    )  # fmt: skip
    timings |= measure(
        {"scipy": scipy_map, "scipy interpolation": scipy_interpolation},
        runs=runs, calls=max(1, calls // 20),
    )  # fmt: skip
    bars = {"seen": 30e-6, "new": 80e-6, "plan of 1000": 100e-6}
    for name, bar in bars.items():
        print(f"{name}: {timings[name].median * 1e6:.1f} us (<= {bar * 1e6:.0f})")
    faster = {
        name: timings[name].median / timings["new"].median
        for name in ("scipy", "scipy interpolation")
    }
    print(
        f"new: {faster['scipy']:.1f}x make_smoothing_spline (>= {SCIPY_BAR}), "
        f"{faster['scipy interpolation']:.1f}x CubicSpline",
        flush=True,
    )
    return {
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "bars": bars,
        "new_faster_than_scipy": faster["scipy"],
        "new_faster_than_scipy_bar": SCIPY_BAR,
        "new_faster_than_scipy_interpolation": faster["scipy interpolation"],
    }


def regressions(results: dict[str, Any]) -> list[str]:
    """Which ratios miss their bars by more than noise; absolute times depend on the machine."""
    found = []

    def compare(what: str, times_slower: float) -> None:
        if not times_slower <= REGRESSION:
            found.append(f"{what}: {times_slower:.2f} times its bar")

    for threads, rows in results["fresh"].items():
        for row in rows:
            if row["over_fill_bar"]:
                what = f"{threads} threads, {row['num_data']} -> {row['num_workers']}, fresh"
                compare(what, row["over_fill"] / row["over_fill_bar"])
    for threads, row in results["encode"].items():
        compare(f"{threads} threads, encode", row["over_copy"] / row["over_copy_bar"])
    for threads, rows in results["large"].items():
        for row in rows:
            what = f"{threads} threads, {row['num_data']} -> {row['num_workers']}"
            compare(f"{what}, of the copy", row["over_copy_best"] / row["over_copy_bar"])
            matmul = row["faster_than_matmul_bar"] / row["faster_than_matmul"]
            compare(f"{what}, against matmul", matmul)
            for name, relative in row["relative"].items():
                compare(f"{what}, {name}", relative["ratio"] / relative["bar"])
    small = results["small"]
    compare("a new set, SciPy", small["new_faster_than_scipy_bar"] / small["new_faster_than_scipy"])
    return found


def on_cpu(numbers_of_threads: list[int], runs: int, shrink: int) -> dict[str, Any]:
    results: dict[str, Any] = {"large": {}, "fresh": {}, "encode": {}}
    for threads in numbers_of_threads:
        torch.set_num_threads(threads)
        print(f"{threads} threads", flush=True)
        # In a process of its own: this one keeps memory that was freed.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = process.submit(fresh, runs, shrink, threads).result()
        results["fresh"][threads] = found
        results["encode"][threads] = encode(runs, shrink)
        results["large"][threads] = large(runs, shrink)
    torch.set_num_threads(1)
    reuse_memory()
    results["crossover"] = choices.crossover(runs)
    results["small"] = small(runs, calls=1000 // shrink)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="default: %(default)s"
    )
    parser.add_argument("--runs", type=int, default=21, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small and rough; writes nothing")
    parser.add_argument(
        "--model", action="store_true", help="print what an H100 would do, by a model, and end"
    )
    args = parser.parse_args()
    if args.model:
        choices.model()
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    runs, shrink = (3, 16) if args.quick else (args.runs, 1)
    if args.device == "cuda":
        results: dict[str, Any] = {"choices": choices.measured(runs, shrink)}
        missed = choices.regressions(results["choices"])
    else:
        results = on_cpu(args.threads, runs, shrink)
        missed = regressions(results)
    if args.quick:
        return 0
    path = RESULTS / f"kernels-{args.device}.json"
    write_results(path, {"environment": environment(args.device), **results})
    print("wrote", path.name)
    print("\n".join(missed), end="\n" if missed else "")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
