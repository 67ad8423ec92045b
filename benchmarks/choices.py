"""The kernel that a GPU applies splines with: its time by a model of an H100, and on a card.

The model is of csrc/README.md: a kernel takes as long as its memory or its instructions, whichever
is longer. It decides nothing by itself: ``coded_torch.linear._cost`` chooses, by its instructions.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch import ops
from coded_torch.codes.nodes import chebyshev_first, chebyshev_second
from coded_torch.linear import SplineMap
from coded_torch.linear._cost import dense_instructions, prefers_matrix, sweep_instructions

from .timing import last_level_cache, measure, rotate

# (knots, points, columns): encoders, a decoder of images, a decoder of logits, large codes.
SIZES = (
    (20, 100, 150_528),
    (64, 128, 65_536),
    (100, 20, 150_528),
    (96, 20, 120),
    (256, 320, 32_768),
    (1024, 1280, 8_192),
)
# Of the better of copy and product up to so many knots, and of the product beyond.
KNOTS, BARS = 128, (1.5, 1.0)
# The least time that counts: so few columns only show what a launch takes, some 5 us.
SHORTEST = 5e-6
# An H100 SXM: multiprocessors, cycles a second at work, what Tensor.copy_ reaches of its memory's
# bytes a second, and cuBLAS of its float32 multiplications, 132 * 128 a cycle.
MULTIPROCESSORS, CLOCK, BANDWIDTH, PRODUCT = 132, 1.7e9, 3.1e12, 2.24e13
# Instructions a cycle of a multiprocessor: of one warp, and at most. Sums of a product depend on
# nothing but each other; a sweep's instructions on the one before, 5 cycles long.
DENSE_RATE, SWEEP_RATE = (0.7, 3.4), (0.2, 2.4)
# Warps of a multiprocessor at 128 registers a thread.
RESIDENT = 16
# Of a dense kernel's thread: results, and columns, 4 or where these are few 1.
ROWS, WIDE = 16, 4


def copy_seconds(num_knots: int, num_points: int, columns: int) -> float:
    """Return the time to read the values and write the results once, float32."""
    return (num_knots + num_points) * columns * 4 / BANDWIDTH


def product_seconds(num_knots: int, num_points: int, columns: int) -> float:
    """Return the time of ``torch.matmul`` without TF32."""
    return max(
        copy_seconds(num_knots, num_points, columns),
        num_knots * num_points * columns / PRODUCT,
    )


def dense_seconds(num_knots: int, num_points: int, columns: int) -> float:
    """Return the time of the kernel that multiplies by the plan's matrix."""
    groups = -(-num_points // ROWS)
    wide = columns // (32 * WIDE) >= MULTIPROCESSORS
    warps = groups * -(-columns // (32 * WIDE if wide else 32))
    total = dense_instructions(num_knots, num_points) * columns / 32
    return _seconds(total, warps, DENSE_RATE, copy_seconds(num_knots, num_points, columns))


def sweep_seconds(num_knots: int, num_points: int, columns: int) -> float:
    """Return the time of the kernel that sweeps a column a thread."""
    warps = -(-columns // 32)
    total = sweep_instructions(num_knots, num_points) * warps
    return _seconds(total, warps, SWEEP_RATE, copy_seconds(num_knots, num_points, columns))


def _seconds(total: float, warps: int, rate: tuple[float, float], memory: float) -> float:
    used = min(MULTIPROCESSORS, warps)
    a_cycle = used * min(rate[0] * min(warps / used, RESIDENT), rate[1])
    return max(memory, total / a_cycle / CLOCK)


def model() -> list[dict[str, Any]]:
    """Print each choice with the model's times."""
    kinds = {
        "copy": copy_seconds,
        "matmul": product_seconds,
        "dense": dense_seconds,
        "sweep": sweep_seconds,
    }
    rows = []
    for size in SIZES:
        seconds = {name: of(*size) for name, of in kinds.items()}
        rows.append(_row(size, seconds))
    return rows


def _row(size: tuple[int, int, int], seconds: dict[str, float]) -> dict[str, Any]:
    num_knots, num_points, columns = size
    chosen = "dense" if prefers_matrix(num_knots, num_points) else "sweep"
    small = num_knots <= KNOTS
    rival = min(seconds["copy"], seconds["matmul"]) if small else seconds["matmul"]
    ratio, bar = seconds[chosen] / max(rival, SHORTEST), BARS[not small]
    times = ", ".join(f"{name} {time * 1e6:.0f}" for name, time in seconds.items())
    print(
        f"{num_knots:5d} -> {num_points:<5d} x {columns:<7d} {chosen}: {times} us | "
        f"{ratio:.2f} of the rival (<= {bar})",
        flush=True,
    )
    sizes = {"num_knots": num_knots, "num_points": num_points, "columns": columns}
    return {**sizes, "chosen": chosen, "seconds": seconds, "ratio": ratio, "ratio_bar": bar}


def crossover(runs: int) -> list[dict[str, Any]]:
    """Measure on the CPU from which size on sweeps beat a product, columns in and out of cache."""
    rows = []
    for columns, n in itertools.product((256, 65_536), (2, 3, 4, 6, 8, 12, 16)):
        spline = SplineMap(np.linspace(-1, 1, n), np.linspace(-1, 1, n + max(1, n // 4)))
        dense = spline.matrix(torch.float32)
        values = torch.ones(n, columns)
        timings = measure(
            {"sweeps": lambda s=spline, v=values: s(v), "matmul": lambda d=dense, v=values: d @ v},
            runs=runs, calls=50,
        )  # fmt: skip
        ratio = timings["matmul"].median / timings["sweeps"].median
        rows.append({"num_data": n, "columns": columns, "faster_than_matmul": ratio})
        print(f"{n:5d} x {columns}: {ratio:.2f}x matmul", flush=True)
    return rows


def regressions(rows: list[dict[str, Any]]) -> list[str]:
    """Return what misses its bar."""
    return [
        f"{row['num_knots']} -> {row['num_points']}, {row['chosen']}: {row['ratio']:.2f} times"
        for row in rows
        if not row["ratio"] <= row["ratio_bar"]
    ]


def measured(runs: int, shrink: int) -> list[dict[str, Any]]:
    """Time both kernels, a copy of as many bytes and ``torch.matmul`` on the card."""
    return [_measured(runs, (n, points, max(columns // shrink, 8))) for n, points, columns in SIZES]


def _measured(runs: int, size: tuple[int, int, int]) -> dict[str, Any]:
    num_knots, num_points, columns = size
    spline = SplineMap(chebyshev_first(num_knots), chebyshev_second(num_points), smoothing=1e-6)
    sweeps, schedule = spline._operands(torch.empty(0))
    matrix = spline.matrix()
    plan = {"sweep": sweeps, "dense": ops.with_matrix(sweeps, schedule)}
    plan = {name: coefficients.cuda() for name, coefficients in plan.items()}
    schedule, matrix = schedule.cuda(), matrix.float().cuda()

    def make() -> tuple[Tensor, Tensor]:
        values = torch.randn(num_knots, columns, device="cuda")
        return values, torch.empty(num_points, columns, device="cuda")

    moved = 4 * (num_knots + num_points) * columns
    buffers = rotate(make, moved, last_level_cache("cuda"))
    half = moved // 8
    copies = rotate(
        lambda: (torch.randn(half, device="cuda"), torch.empty(half, device="cuda")),
        2 * 4 * half, last_level_cache("cuda"),
    )  # fmt: skip

    def copy() -> None:
        source, target = next(copies)
        target.copy_(source)

    def multiply() -> None:
        values, out = next(buffers)
        torch.mm(matrix, values, out=out)

    def apply(name: str) -> None:
        values, out = next(buffers)
        ops.spline_apply(values[:, None], plan[name], schedule, out=out[:, None])

    want, (values, out) = None, make()
    for coefficients in plan.values():  # correct before timed
        ops.spline_apply(values[:, None], coefficients, schedule, out=out[:, None])
        want = matrix.double() @ values.double() if want is None else want
        torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-5 * want.abs().max().item())
    timings = measure(
        {"copy": copy, "matmul": multiply, **{k: lambda k=k: apply(k) for k in plan}},
        runs=runs, device="cuda", calls=10,
    )  # fmt: skip
    return _row(size, {name: timing.median for name, timing in timings.items()})
