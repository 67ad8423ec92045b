"""Bounds of rows that are not missing at random: ``python -m benchmarks exchangeability``.

Batches of a table of 4,000 rows of five features go through a wrapper; outputs are the sine of the
first feature and noise: even, uneven (its size depends on the second feature), or heavy-tailed.
Lost are: parts by chance; always the worker of one place, of batches sorted by their outputs; the
parts whose rows' outputs are furthest from the mean, which takes time ("content"); or a third of
the rows, half of which have odds of 3 or 5 to be lost. Sequences of 50 calls of a wrapper tell how
often it reports that rows are not missing at random, which is wrong by chance and with the worker.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch import CodedWrapper, Waiting
from coded_torch.experiments.scores import half_width, rounded
from coded_torch.workers import Fault, LocalWorkers, Part

from .runs import Measurement, progress

SEED, PARTS, LEVEL = 0, 24, 0.95
NOISES = "even", "uneven", "heavy"
#: What is lost, with the sizes of batches.
LOSSES: dict[str, tuple[int, ...]] = {
    "chance": (48, 240),
    "worker": (24, 48, 72, 240),
    "content": (48, 240),
    "odds 3": (240,),
    "odds 5": (240,),
}


class Table(nn.Module):
    """Looks up the outputs of rows, which their numbers name beside their features."""

    def __init__(self, noise: str, rows: int = 4000) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.x = torch.randn(rows, 5, generator=generator)
        z = torch.randn(rows, 4, generator=generator)
        noises = {"even": z[:, 0], "uneven": (1.2 * self.x[:, 1]).exp() * z[:, 0]}
        noises["heavy"] = z[:, 0] / z[:, 1:].square().mean(1).sqrt()  # Student's t with 3 degrees
        self.y = (self.x[:, 0].sin() + 0.3 * noises[noise])[:, None]

    def forward(self, _: Tensor, rows: Tensor) -> Tensor:
        return self.y[rows]


class Pool(LocalWorkers):
    """Loses the parts that take longest. A row takes as many seconds as ``seconds`` says."""

    seconds: list[float]
    lost = 0  #: the number of parts that take longest, and are lost
    worker = -1  #: the place of a worker whose parts are lost

    def open(self, module: nn.Module, task: Any) -> Any:
        request = super().open(module, task)
        ask = request.ask

        def ask_late(parts: Sequence[Part]) -> None:
            took = {part: sum(self.seconds[unit] for unit in part.units) for part in parts}
            late = sorted(parts, key=took.__getitem__)[len(parts) - self.lost :]
            for part in parts:
                gone = part in late or part.number == self.worker
                part.fault = Fault(delay=math.inf if gone else took[part])
            ask(parts)

        request.ask = ask_late  # type: ignore[method-assign]
        return request


@torch.no_grad()
def covered(noise: str, lost: str, size: int, quick: bool) -> dict[str, Any]:
    table, generator = Table(noise), torch.Generator().manual_seed(SEED)
    odds, pool, parts = float(lost.removeprefix("odds ")) if "odds" in lost else 1.0, Pool(), PARTS
    if odds > 1:
        parts, pool.lost = size, size // 3
    elif lost == "worker":
        pool.worker = 0
    else:
        pool.lost = PARTS // 3
    counts = settings(quick)
    inside_odds, plain, infinite, alarms = [], [], [], []
    for seed in progress(range(counts["sequences"]), "sequences"):
        waiting = Waiting(estimate_after=math.inf, hedge_budget=0.0)
        coded = CodedWrapper(table, workers=pool, parts=parts, waiting=waiting)
        coded._dealer.seed(seed)  # which part is asked first
        alarm = 0
        for call in range(1, counts["calls"] + 1):
            rows = torch.randperm(len(table.y), generator=generator)[:size]
            if lost == "worker":
                rows = rows[table.y[rows, 0].argsort()]
            y, seconds = table.y[rows], torch.rand(size, generator=generator)
            far = (y - y.mean()).abs().flatten()
            if lost == "content":
                seconds = far
            elif odds > 1:  # the first of exponential times are lost, at odds that are their rates
                rates = torch.where(far > far.median(), odds, 1.0)
                seconds = rates / torch.empty(size).exponential_(generator=generator)
            pool.seconds = seconds.tolist()
            answers, report = coded.run(table.x[rows], rows)
            errors, missing = (answers - y).abs().flatten().double(), report.estimated
            for found, at in ((inside_odds, odds), (plain, 1.0)):
                inside = errors <= report.error_bounds_at(LEVEL, odds=at)
                found.append(float(inside[missing].double().mean()))
            radii = report.error_bounds_at(LEVEL, odds=odds)[missing]
            infinite.append(float(radii.isinf().double().mean()))
            alarm = alarm or call * report.missing_not_at_random
        alarms.append(alarm)
    found = {"covered": inside_odds} | ({"without odds": plain} if odds > 1 else {})
    return {
        **{key: rounded(statistics.mean(x), half_width(np.array(x))) for key, x in found.items()},
        "infinite": rounded(statistics.mean(infinite))[0],
        "alarms": [sum(alarm > 0 for alarm in alarms), len(alarms)],
        "calls to an alarm": statistics.median_low(alarms) or None,
    }


def measurements(quick: bool) -> Iterable[Measurement]:
    for noise in NOISES[: 1 if quick else None]:
        for lost, sizes in LOSSES.items():
            for size in sizes[: 1 if quick else None]:
                yield (
                    (noise, lost, f"B {size}"),
                    functools.partial(covered, noise, lost, size, quick),
                )


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "parts": PARTS,
        "level": LEVEL,
        "calls": 4 if quick else 50,
        "sequences": 2 if quick else 10,
    }
