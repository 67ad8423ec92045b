"""Do intervals of ``CodedWrapper.mean`` hold, and how wide are they? ``python -m benchmarks mean``.

The outputs of up to 2,000 held-out rows are computed once. Each draw then takes some of the rows at
random, and gives their outputs to the code that makes the intervals. So a draw runs all of it but
the module. Plain sampling has an interval of the same construction, from the same rows.

What is averaged ("of"):

- outputs;
- classes: whether a class has the largest output, or an only output exceeds one of five quantiles;
- right: whether the largest output is the label's.

Measurements:

- fixed: coverage over columns and draws, that of the worst column, and the mean width over that of
  sampling, at some numbers of rows;
- looks: draws that go on, look by look. Of five targets, the median widths at five looks, each
  column stops at the first look that reaches one; and all looks together, plain and "anytime";
- curve: half the width over the spread of a column, against the share of rows computed;
- student: the same as fixed, with a student as a surrogate;
- rare: data with rare, large or few values, which inputs do not explain. "Infinite" is the share
  of draws that say nothing, as all numbers drawn are equal; they count as covered. With bounds of
  three times the range of the data, and with "anytime" at all looks together;
- processes: six worker processes that sleep 5 ms a row, and are killed. The end is where no half
  width exceeds that of 2,000 sampled rows.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from coded_torch import CodedWrapper
from coded_torch.demo import digits, lenet5
from coded_torch.experiments.scores import half_width, rounded
from coded_torch.input_space._betting import bounded
from coded_torch.input_space._finite_mean import intervals
from coded_torch.nn._mean import Looks
from coded_torch.workers import LocalWorkers, ProcessWorkers

from . import tasks
from .runs import Measurement, progress
from .subjects import AT_ONCE, student_of

SEED, LEVEL = 0, 0.95
ROWS = 2000  # of a data set, at most
QUICK = "shipped digits"
SETS = ("digits", "friedman1", "power", "appliances", "speeches", "lenet5")
SIZES = 60, 120, 240
TARGETS = slice(2, 7)  # the looks whose median widths are targets
MOST = 290  # rows at the last look
PAUSE, WORKERS, SAMPLED = 5e-3, 6, 2000


def shipped() -> tasks.Task:
    x, labels = digits()
    return tasks.Task(lenet5(), x, x, labels)


@functools.cache
def data(name: str, most: int = ROWS) -> tuple[Tensor, dict[str, Tensor], nn.Module]:
    """Return inputs, the numbers of their rows by kind, ``[N, C]`` each, and the module."""
    task = shipped() if name == QUICK else tasks.task(name)
    model, x, labels = task.model, task.inputs, task.labels
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))[:most]
    x, labels = x[rows], None if labels is None else labels[rows]
    with torch.no_grad():
        y = torch.cat([model(part) for part in x.split(AT_ONCE)]).double()
    if labels is None:
        quantiles = y.quantile(torch.tensor([0.2, 0.5, 0.8, 0.9, 0.98]).double())
        return x, {"outputs": y, "classes": y > quantiles}, model
    found = y.argmax(1)
    classes = nn.functional.one_hot(found, y.shape[1]).bool()
    right = (found == labels)[:, None]
    return x, {"outputs": y, "classes": classes, "right": right}, model


def looks_at(x: Tensor, y: Tensor, order: Tensor, cheap: Tensor | None = None) -> Looks:
    """Return looks at rows in some order, whose numbers ``[N, C]`` are known."""
    rows = torch.arange(len(x))  # integers are no features
    surrogate = () if cheap is None else (lambda _, rows: cheap[rows])
    coded = CodedWrapper(nn.Identity(), workers=LocalWorkers(), parts=1, surrogate=surrogate)
    looks = Looks(coded, (x, rows), level=LEVEL, seed=SEED)
    looks.drawn = looks.order = order
    return given(looks, y)


def given(looks: Looks, y: Tensor) -> Looks:
    """Give looks other numbers; features of rows that were looked at stay."""
    columns = y.shape[1]
    looks._seen = [(z, torch.zeros(0, len(z[0]), columns).double()) for z, _ in looks._seen]
    looks.numbers = [y[looks.order].double()]
    looks.shares = torch.full(y.shape[1:], y.dtype is torch.bool)
    return looks


def orders(total: int, count: int) -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    every = (torch.randperm(total, generator=generator) for _ in range(count))
    return progress(every, "draws", count)


def summary(found: list[tuple[Tensor, Tensor]], truth: Tensor) -> dict[str, Any]:
    """Return coverage, and the mean width over that of sampling, of intervals of many draws."""
    numbers: dict[str, Any] = {"draws": len(found)}
    both = [torch.stack(each) for each in zip(*found, strict=True)]  # [draws, 2, C]
    for name, drawn in zip(("ours", "sampling"), both, strict=True):
        held = ((drawn[:, 0] - truth).abs() <= drawn[:, 1]).double()
        each = held.mean(1).numpy()
        numbers[name] = {
            "covered": rounded(each.mean(), half_width(each)),
            "worst column": rounded(float(held.mean(0).min()))[0],
        }
    widths = [drawn[:, 1].mean(0) for drawn in both]
    numbers["width over sampling's"] = rounded(float((widths[0] / widths[1]).mean()))[0]
    return numbers


def fixed(name: str, sizes: tuple[int, ...], count: int) -> dict[str, Any]:
    """Return the coverage at some numbers of rows."""
    x, kinds, _ = data(name)
    found: dict[str, dict[str, Any]] = {kind: {str(n): [] for n in sizes} for kind in kinds}
    for order in orders(len(x), count):
        looks = looks_at(x, kinds["outputs"], order)
        for n in sizes:
            for kind, y in kinds.items():
                found[kind][str(n)].append(given(looks, y).look(n))
    return {
        kind: {n: summary(each, kinds[kind].double().mean(0)) for n, each in by_rows.items()}
        for kind, by_rows in found.items()
    }


def student(name: str, sizes: tuple[int, ...], count: int) -> dict[str, Any]:
    """Return the coverage with a student, whose outputs are known, too."""
    x, kinds, _ = data(name)
    with torch.no_grad():
        model = student_of("lenet5" if name == QUICK else name, quick=name == QUICK)
        s = torch.cat([model(part) for part in x.split(AT_ONCE)]).double()
    found: dict[str, Any] = {}
    for kind in ("outputs", "classes"):
        cheap = s if kind == "outputs" else nn.functional.one_hot(s.argmax(1), s.shape[1]).bool()
        by_rows: dict[str, Any] = {str(n): [] for n in sizes}
        for order in orders(len(x), count):
            looks = looks_at(x, kinds[kind], order, cheap)
            for n in sizes:
                by_rows[str(n)].append(looks.look(n))
        truth = kinds[kind].double().mean(0)
        found[kind] = {n: summary(each, truth) for n, each in by_rows.items()}
    return found


def looks(name: str, count: int) -> dict[str, Any]:
    """Return how often intervals hold where the width ends the looks, and at all looks."""
    x, kinds, _ = data(name)
    sizes = [n for n in looks_at(x, kinds["outputs"], torch.arange(len(x))).sizes if n <= MOST]
    levels = LEVEL, 1 - (1 - LEVEL) / len(sizes)
    found: dict[str, Any] = {kind: [] for kind in kinds}
    for order in orders(len(x), count):
        every = looks_at(x, kinds["outputs"], order)
        path: dict[str, Any] = {kind: [] for kind in kinds}
        for n in sizes:
            for kind, y in kinds.items():
                facts = given(every, y).estimated(n)
                pairs = [intervals(*facts, level=level) for level in levels]
                path[kind].append(torch.stack([*pairs[0], *pairs[1]]))
        for kind, each in path.items():
            found[kind].append(torch.stack(each))  # [looks, 4, 2, C]
    return {
        kind: ended(torch.stack(paths), kinds[kind].double().mean(0))
        for kind, paths in found.items()
    }


def ended(paths: Tensor, truth: Tensor) -> dict[str, Any]:
    """Return coverages of intervals ``[draws, looks, 4, 2, C]``.

    These are ours, sampling's, and both again at the level at which all looks hold together.
    """
    numbers: dict[str, Any] = {}
    held = (paths[:, :, :, 0] - truth).abs() <= paths[:, :, :, 1]  # [draws, looks, 4, C]
    for at, name in enumerate(("ours", "sampling")):
        widths, stopped = paths[:, :, at, 1], []
        for target in widths[:, TARGETS].median(0).values:  # [C], of a look
            below = widths <= target
            below[:, -1] = True
            first = below.double().argmax(1, keepdim=True)
            stopped.append(held[:, :, at].gather(1, first)[:, 0].double().mean(1))
        each = torch.stack(stopped).mean(0).numpy()
        everywhere = [held[:, :, i].all(1).double().mean(1).numpy() for i in (at, at + 2)]
        numbers[name] = {
            "stopped": rounded(each.mean(), half_width(each)),
            "at every look": rounded(everywhere[0].mean(), half_width(everywhere[0])),
            "anytime": rounded(everywhere[1].mean(), half_width(everywhere[1])),
        }
    return numbers


def curve(name: str, count: int) -> dict[str, Any]:
    """Return half widths over the spread of each column, on average, at shares of the rows."""
    x, kinds, _ = data(name)
    y, found = kinds["outputs"], list[list[Tensor]]()
    for order in orders(len(x), count):
        every = looks_at(x, y, order)
        sizes = [n for n in every.sizes if n < 0.9 * len(x)]
        spread = y.std(0, correction=0)
        found.append([torch.stack(every.look(n))[:, 1] / spread for n in sizes])
    halves = torch.stack([torch.stack(each) for each in found]).mean((0, 3))  # [looks, 2]
    return {
        "share": rounded(*(n / len(x) for n in sizes)),
        "ours": rounded(*halves[:, 0].tolist()),
        "sampling": rounded(*halves[:, 1].tolist()),
    }


def rare_data() -> tuple[Tensor, dict[str, Tensor]]:
    """Return inputs that explain nothing, and the numbers ``[N]`` of rows by kind."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(share: float) -> Tensor:
        return (torch.rand(ROWS, generator=generator) < share).double()

    normal = torch.randn(ROWS, generator=generator).double()
    lognormal = torch.randn(ROWS, generator=generator).double().exp()
    kinds = {
        "1 % ones, as floats": drawn(0.01),
        "0, or 10 in 2 %": 10 * drawn(0.02),
        "0, or 1000 in .2 %": 1000 * drawn(0.002),
        "0, or lognormal in 2 %": lognormal * drawn(0.02),
        "3 in all rows": torch.full((ROWS,), 3.0).double(),
        "normal": normal,
        "normal, and 100 in 1 %": torch.where(drawn(0.01) > 0, 100.0, normal),
        "lognormal": lognormal,
    }
    return torch.randn(ROWS, 2, generator=generator), kinds


def rare(sizes: tuple[int, ...], count: int, paths: int) -> dict[str, Any]:
    """Return the coverage on data that samples represent badly."""
    x, kinds = rare_data()
    y, truth = torch.stack([*kinds.values()], 1), torch.stack([z.mean() for z in kinds.values()])
    lowest, highest = y.amin(0), y.amax(0)
    more = (highest - lowest).clamp(min=1.0)
    bounds = torch.stack([lowest - more, highest + more])
    # Where the bounds are natural, they are known.
    bounds[:, :3] = torch.tensor([[0.0, 0.0, 0.0], [1.0, 10.0, 1000.0]])
    is_share = torch.zeros(len(kinds), dtype=torch.bool)
    looked = [n for n in looks_at(x, y, torch.arange(ROWS)).sizes if n <= MOST]
    at_looks = 1 - (1 - LEVEL) / len(looked)
    found: dict[int, list[Tensor]] = {n: [] for n in sizes}
    everywhere = list[Tensor]()

    def at(looks: Looks, n: int, level: float) -> Tensor:
        """Return intervals without and with bounds, ``[2, 2, C]``."""
        plain, _ = intervals(*looks.estimated(n), level=level)
        rows = y[looks.order[:n]]
        how = {"level": LEVEL, "at_looks": level}
        return torch.stack([plain, bounded(plain, rows, is_share, bounds, ROWS, **how)])

    for number, order in enumerate(orders(ROWS, count)):
        looks = looks_at(x, y, order)
        for n in sizes:
            found[n].append(at(looks, n, LEVEL))
        if number < paths:
            looks = looks_at(x, y, order)
            every = torch.stack([at(looks, n, at_looks) for n in looked])  # [looks, 2, 2, C]
            everywhere.append(((every[:, :, 0] - truth).abs() <= every[:, :, 1]).all(0))
    together = torch.stack(everywhere).double()  # [paths, 2, C]
    numbers: dict[str, Any] = {kind: {} for kind in kinds}
    for n, each in found.items():
        drawn = torch.stack(each)  # [draws, 2, 2, C]
        held = ((drawn[:, :, 0] - truth).abs() <= drawn[:, :, 1] + 1e-12).double()
        for column, kind in enumerate(kinds):
            width = drawn[:, :, 1, column]
            plain = width[width[:, 0].isfinite()]
            numbers[kind][str(n)] = {
                "draws": count,
                "covered": coverage(held[:, 0, column]),
                "infinite": rounded(float(width[:, 0].isinf().double().mean()))[0],
                "with bounds": coverage(held[:, 1, column]),
                "times as wide": rounded(float((plain[:, 1] / plain[:, 0]).median()))[0]
                if len(plain)
                else None,
                "anytime": coverage(together[:, 0, column]),
                "anytime, with bounds": coverage(together[:, 1, column]),
            }
    return numbers


def coverage(held: Tensor) -> list[float]:
    return rounded(float(held.mean()), half_width(held.numpy()))


class Slow(nn.Module):
    """A module that takes some time for each row."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(PAUSE * len(x))
        found: Tensor = self.module(x)
        return found


def processes(name: str) -> dict[str, Any]:
    """Return rows and seconds until each half width is that of 2,000 sampled rows."""
    x, kinds, model = data(name, 10**9)
    y, total = kinds["outputs"], len(x)
    rows = min(SAMPLED, total // 2)
    target = 1.96 * y.std(0) * math.sqrt(1 / rows - 1 / total)
    with ProcessWorkers(WORKERS).start(Slow(model), x[:2], timeout=120) as pool:
        coded = CodedWrapper(Slow(model), workers=pool)
        begin, every = time.perf_counter(), []
        for number, each in enumerate(coded.mean(x, half_width=target, seed=SEED)):
            every.append(each)
            if number % 3 == 1:
                os.kill(pool.pids[number % WORKERS], signal.SIGKILL)
        seconds, found = time.perf_counter() - begin, every[-1]
        restarts = pool.num_restarts
    right = ((found.value - y.mean(0)).abs() <= found.half_width).double().mean()
    return {
        "rows": found.rows,
        "total": total,
        "sampled rows": rows,
        "wall seconds": rounded(seconds)[0],
        "least seconds of sampling": rounded(rows * PAUSE / WORKERS)[0],
        "columns that held": rounded(float(right))[0],
        "workers killed": restarts,
    }


def measurements(quick: bool) -> Iterable[Measurement]:
    counts = settings(quick)
    for name in (QUICK,) if quick else SETS:
        yield (name, "fixed"), functools.partial(fixed, name, SIZES, counts["draws"])
    for name in (QUICK,) if quick else SETS:
        yield (name, "looks"), functools.partial(looks, name, counts["paths"])
        yield (name, "curve"), functools.partial(curve, name, counts["curves"])
    yield ("rare", "rare"), functools.partial(rare, SIZES, counts["draws"], counts["paths"])
    name, taught = (QUICK, QUICK) if quick else ("lenet5", "digits")
    count = counts["draws with a student"]
    yield (taught, "student"), functools.partial(student, taught, SIZES, count)
    yield (name, "processes"), functools.partial(processes, name)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "level": LEVEL,
        "rows": ROWS,
        "draws": 3 if quick else 1000,
        "paths": 2 if quick else 40,
        "curves": 1 if quick else 3,
        "draws with a student": 2 if quick else 100,
        "pause": PAUSE,
        "workers": WORKERS,
    }
