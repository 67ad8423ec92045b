"""The kernels that apply splines on a GPU: their times by a model of an H100, and on a card.

The model is of csrc/README.md: a kernel takes as long as its memory or its instructions, whichever
is longer. It decides nothing by itself: ``coded_torch.linear`` chooses, by its instructions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coded_torch import ops
from coded_torch.codes.curves import chebyshev_first, chebyshev_second
from coded_torch.linear import SplineMap, instructions, prefers_matrix

from .timing import last_level_cache, measure, rotate

# Knots, points, columns: encoders, a decoder of images, a decoder of logits, large codes.
SIZES = (
    (20, 100, 150_528),
    (64, 128, 65_536),
    (100, 20, 150_528),
    (96, 20, 120),
    (256, 320, 32_768),
    (1024, 1280, 8_192),
)
# A bar for the better of copy and product up to so many knots, and for the product beyond.
KNOTS, BARS = 128, (1.5, 1.0)
# The least seconds that count: so few columns only show the time of a launch.
SHORTEST = 5e-6
# An H100 SXM: multiprocessors, cycles a second at work, bytes a second that Tensor.copy_ reaches,
# and float32 multiplications a second of cuBLAS, 132 * 128 a cycle.
MULTIPROCESSORS, CLOCK, BANDWIDTH, PRODUCT = 132, 1.7e9, 3.1e12, 2.24e13
# Instructions a cycle of a multiprocessor: of one warp, and at most. Sums of a product depend on
# nothing but each other; a sweep's instructions on the one before, 5 cycles long.
DENSE_RATE, SWEEP_RATE = (0.7, 3.4), (0.2, 2.4)
# Warps of a multiprocessor at 128 registers a thread.
RESIDENT = 16
# Results of a dense kernel's thread, and its columns, 4 or where these are few 1.
ROWS, WIDE = 16, 4


def model_seconds(num_knots: int, num_points: int, columns: int) -> dict[str, float]:
    """Return the model's times: to read and write once, of the product, and of both kernels."""
    copy = (num_knots + num_points) * columns * 4 / BANDWIDTH
    wide = columns // (32 * WIDE) >= MULTIPROCESSORS
    dense_warps = -(-num_points // ROWS) * -(-columns // (32 * WIDE if wide else 32))
    dense, sweep = instructions(num_knots, num_points)
    sweep_warps = -(-columns // 32)
    return {
        "copy": copy,
        "matmul": max(copy, num_knots * num_points * columns / PRODUCT),
        "dense": max(copy, _seconds(dense * columns / 32, dense_warps, DENSE_RATE)),
        "sweep": max(copy, _seconds(sweep * sweep_warps, sweep_warps, SWEEP_RATE)),
    }


def _seconds(total: float, warps: int, rate: tuple[float, float]) -> float:
    used = min(MULTIPROCESSORS, warps)
    return total / (used * min(rate[0] * min(warps / used, RESIDENT), rate[1])) / CLOCK


def model() -> list[dict[str, Any]]:
    """Print each choice with the model's times."""
    return [_row(size, model_seconds(*size)) for size in SIZES]


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
    bars = {"the better of copy and product": [ratio, bar]}
    return {**sizes, "what": chosen, "seconds": seconds, "bars": bars}


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
    schedule, matrix, cache = schedule.cuda(), matrix.float().cuda(), last_level_cache("cuda")

    def make() -> list[Tensor]:  # values, and memory that a later result takes
        values = torch.randn(num_knots, columns, device="cuda")
        return [values, torch.empty(num_points, columns, device="cuda")]

    def halves() -> tuple[Tensor, Tensor]:
        half = (num_knots + num_points) * columns // 2
        return torch.randn(half, device="cuda"), torch.empty(half, device="cuda")

    moved = 4 * (num_knots + num_points) * columns
    buffers, copies = rotate(make, moved, cache), rotate(halves, moved, cache)

    def copy() -> None:
        source, target = next(copies)
        target.copy_(source)

    def multiply() -> None:
        buffer = next(buffers)
        buffer[1] = matrix @ buffer[0]

    def apply(name: str) -> None:
        buffer = next(buffers)
        buffer[1] = ops.spline_apply(buffer[0][:, None], plan[name], schedule)

    values, _ = make()
    want = matrix.double() @ values.double()
    for coefficients in plan.values():  # correct before timed
        out = ops.spline_apply(values[:, None], coefficients, schedule)[:, 0]
        torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-5 * want.abs().max().item())
    functions = {"copy": copy, "matmul": multiply, **{k: lambda k=k: apply(k) for k in plan}}
    timings = measure(functions, runs=runs, device="cuda", calls=10)
    return _row(size, {name: timing["median"] for name, timing in timings.items()})
