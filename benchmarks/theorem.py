"""The theorem's bound with a constant, and the rate with adversaries; of ``convergence.py``.

Bound: without noise and smoothing, the error e of an interpolating natural cubic spline is 0 at the
received worker points. On a gap of length h between two of them, Wirtinger's inequality for e, and
for its derivative, gives e^2 <= (h / pi)^3 times the integral of g''^2. There g is the module along
the encoder's curve; the spline has the least such integral of all functions with its values. Beyond
the last point, at a distance d, e^2 <= (d h^(1/2) + (d^3 / 3)^(1/2))^2 times that integral. With S
workers lost and equidistant points, h is at most 2 (S + 1) / (N - 1): the paper's S^3 N^-3.

Adversaries (arXiv 2502.08058): the number A of compromised workers is N to the power a. They return
anything within the range of the outputs. At a smoothing of c (A / N)^(8/5), the paper bounds the
error by a multiple of (A / N)^(6/5). The attack here is a search: the A neighbours of each data
point return the largest outputs, or the least. No result is dropped, and no worker is lost. The
bound with its constant: an answer is a sum of results, with weights that reproduce lines. So its
honest error is the integral of g'' times Peano's kernel, at most the product of their norms; and A
results that are off by at most the range R move it by at most R times the A largest weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from coded_torch.codes import SplineCode
from coded_torch.experiments.scores import half_width, rounded
from coded_torch.linear import SplineMap

from .networks import SEED
from .runs import progress

if TYPE_CHECKING:
    from .convergence import Point, Task

POWERS = (0.25, 0.5, 0.75)  # a
SMOOTH = ("x sin x", "lenet5-tanh")  # have second derivatives that differences find
FACTORS = tuple(10.0**x for x in range(-6, 2))  # c
DRAWS = 5  # batches under attack
STEPS = 1500  # of the differences by which second derivatives are found
BOUND_DRAWS = 5  # the draws of a bound, whose second derivatives take the time


def blocks(code: SplineCode) -> list[int]:
    """Return the number of the worker that is nearest to each data point."""
    distances = np.abs(np.subtract.outer(code.data_points, code.worker_points))
    return [int(x) for x in distances.argmin(1)]


def bound(task: Task, points: Sequence[Point]) -> dict[str, Any]:
    """Return measured errors beside the bound with its constant, means over draws.

    A point's error is the largest of its received sets, and its bound is of that set.
    """
    errors, limits = [], []
    for draw in progress(range(min(task.draws, BOUND_DRAWS)), "draws"):
        inputs = task.inputs("held_out", SEED + draw).double()
        exact = task.exactly(inputs)
        bending = _bending(task, inputs)
        outputs: dict[int, Tensor] = {}  # by the number of workers
        found = []
        for point in points:
            code = SplineCode(task.k, point.workers)
            if point.workers not in outputs:
                outputs[point.workers] = task.exactly(code.encode(inputs))
            results = outputs[point.workers]
            pairs = []
            for received in point.received(SEED + draw):
                answers = code.decode(results[received], received)
                error = float((answers - exact).square().mean())
                pairs.append((error, bending * _constant(code, received)))
            found.append(max(pairs))
        errors.append([error for error, _ in found])
        limits.append([limit for _, limit in found])
    measured, limit = np.array(errors), np.array(limits)
    return {
        "workers": [point.workers for point in points],
        "stragglers": [point.stragglers for point in points],
        "mse": [rounded(x.mean(), half_width(x)) for x in measured.T],
        "bound": [rounded(x.mean())[0] for x in limit.T],
        "most of the bound": rounded((measured / limit).max())[0],
    }


def _bending(task: Task, inputs: Tensor) -> float:
    """Return the integral of the squared second derivative, a mean over groups and outputs."""
    points = np.linspace(-1, 1, STEPS + 1)
    curve = SplineMap(SplineCode(task.k, task.k).data_points, points)(inputs)
    values = task.exactly(curve)
    step = 2 / STEPS
    second = (values[2:] - 2 * values[1:-1] + values[:-2]) / step**2
    return float((second.square().sum(0) * step).mean())


def _constant(code: SplineCode, received: Sequence[int]) -> float:
    """Return the mean over data points of the factor of the integral of the squared bend."""
    nodes = code.worker_points.take([*received])
    factors = []
    for point in code.data_points:
        after = int(np.searchsorted(nodes, point))
        if 0 < after < len(nodes):
            factors.append(((nodes[after] - nodes[after - 1]) / math.pi) ** 3)
            continue
        end, next_one = (nodes[0], nodes[1]) if after == 0 else (nodes[-1], nodes[-2])
        away = abs(point - end)
        factors.append((away * abs(next_one - end) ** 0.5 + (away**3 / 3) ** 0.5) ** 2)
    return float(np.mean(factors))


def adversaries(task: Task, power: float) -> dict[str, Any]:
    """Return the errors under the worst attack found, and their slope over log N."""
    workers = [(128 if task.is_function else 32) * n for n in task.workers]
    counts = [round(n**power) for n in workers]
    draws = 1 if task.is_function else min(task.draws, DRAWS)  # nothing is drawn for a function
    found = {part: _attacked(task, workers, counts, part, draws) for part in ("held_out", "tuning")}
    best = int(np.log(found["tuning"][:, :, 1:].mean(0)).mean(0).argmin()) + 1
    rates = [(count / n) ** 1.2 for count, n in zip(counts, workers, strict=True)]
    spline, trusting = found["held_out"][:, :, best], found["held_out"][:, :, 0]
    factor = FACTORS[best - 1]
    exact = [task.outputs(task.inputs("held_out", SEED + draw)) for draw in range(draws)]
    variance = float(np.mean([float((x - x.mean(0)).square().mean()) for x in exact]))
    table = {
        "workers": workers,
        "adversaries": counts,
        "c": factor,
        "mse": [rounded(x.mean(), half_width(x)) for x in spline.T],
        "mse without smoothing": [rounded(x.mean(), half_width(x)) for x in trusting.T],
        "variance": rounded(variance)[0],
        "slope": fitted_slope(workers, spline),
        "slope without smoothing": fitted_slope(workers, trusting),
        "slope of the bound": fitted_slope(workers, np.array([rates]))[0],
    }
    if task.name in SMOOTH:
        limits = _attacked_bounds(task, workers, counts, factor, draws)
        table["bound"] = [rounded(x.mean())[0] for x in limits.T]
        table["most of the bound"] = rounded((spline / limits).max())[0]
        table["slope of the bound with its constant"] = fitted_slope(workers, limits)
    return table


def _attacked_bounds(
    task: Task, workers: Sequence[int], counts: Sequence[int], factor: float, draws: int
) -> np.ndarray:
    """Return the bounds ``[draws, N]`` of squared errors under any attack within the range."""
    grid = np.linspace(-1, 1, 2 * STEPS + 1)
    table = []
    for draw in range(draws):
        inputs = task.inputs("held_out", SEED + draw)
        exact = task.outputs(inputs)
        bending = _bending(task, inputs.double())
        row = []
        for n, wrong in zip(workers, counts, strict=True):
            code = SplineCode(task.k, n, decoder_smoothing=factor * (wrong / n) ** 1.6)
            identity = torch.eye(task.k, dtype=torch.float64)
            weights = code.decoder(range(n)).adjoint(identity).numpy()  # [N, K]
            nodes = code.worker_points
            kernel = np.maximum(nodes - grid[:, None], 0) @ weights
            kernel -= np.maximum(code.data_points - grid[:, None], 0)
            honest_error = np.sqrt((kernel**2).sum(0) * (grid[1] - grid[0]) * bending)
            honest = _honest(task.name, task.quick, "held_out", SEED + draw, n)
            most = max(exact.max() - honest.min(), honest.max() - exact.min())
            largest = np.sort(np.abs(weights), 0)[n - wrong :].sum(0)
            row.append(float(np.mean((honest_error + float(most) * largest) ** 2)))
        table.append(row)
    return np.array(table)


def fitted_slope(at: Sequence[float], squares: np.ndarray) -> list[float | None]:
    """Return the slope of the mean over draws of log ``squares [draws, n]`` over those of numbers.

    The interval is that of the fit by least squares, at 95 %.
    """
    fit = scipy.stats.linregress(np.log(at), np.log(squares).mean(0))
    quantile = scipy.stats.t.ppf(0.975, len(at) - 2)
    return rounded(float(fit.slope), float(quantile * fit.stderr))


def _attacked(
    task: Task, workers: Sequence[int], counts: Sequence[int], part: str, draws: int
) -> np.ndarray:
    """Return squared errors ``[draws, N, smoothings]`` under the worst attack; the first is 0."""
    seed = SEED + (10_000 if part == "tuning" else 0)
    table = []
    for draw in progress(range(draws), "draws"):
        inputs = task.inputs(part, seed + draw)
        exact = task.outputs(inputs)
        extremes = exact.min(), exact.max()
        rows = []
        for n, wrong in zip(workers, counts, strict=True):
            honest = _honest(task.name, task.quick, part, seed + draw, n)
            attacks: list[Tensor] = []
            for worker in blocks(SplineCode(task.k, n)):
                first = min(max(0, worker - wrong // 2), n - wrong)
                for extreme in extremes:
                    results = honest.clone()
                    results[first : first + wrong] = extreme
                    attacks.append(results)
            results = torch.stack(attacks, 1)  # [N, attacks, G, ...]
            smoothings = [0.0, *(c * (wrong / n) ** 1.6 for c in FACTORS)]
            found = []
            for smoothing in smoothings:
                code = SplineCode(task.k, n, decoder_smoothing=smoothing)
                answers = code.decode(results, range(n))
                squares = (answers - exact[:, None]).square().flatten(2).mean((0, 2))
                found.append(float(squares.max()))
            rows.append(found)
        table.append(rows)
    return np.array(table)


@functools.lru_cache(128)  # for all powers of one network
def _honest(name: str, quick: bool, part: str, draw: int, workers: int) -> Tensor:
    """Return the results of honest workers, ``[N, 1, ...]``."""
    from .convergence import Task

    task = Task(name, quick, 1)
    return task.outputs(SplineCode(task.k, workers).encode(task.inputs(part, draw)))
