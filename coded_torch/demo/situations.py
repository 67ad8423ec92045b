"""LeNet-5's answers while all workers reply, and while some are lost."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..codes import Code, RegressionCode, ReplicationCode
from ..evaluation.compare import Comparison
from ..nn import CodedWrapper, Waiting
from ..nn.report import Report
from ..stragglers import Uniform
from ..workers import LocalWorkers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Situation", "draw", "situations"]

_DRAWN = 40  # predicted answers


class Situation(NamedTuple):
    """The answers of all batches in one situation."""

    name: str
    exact: int  # answers that a worker computed
    predicted: int  # the other answers
    radius: float  # the median radius of the reports, or NaN
    error: float  # their root mean squared error, or NaN
    right: float  # the share of right answers among all

    @staticmethod
    def header(n: int, k: int, count: int) -> str:
        """Return the lines above the table of ``count`` answers a situation."""
        return (
            f"N = {n} workers, K = {k} inputs a group: {count:,} answers\n"
            f"  {'':<29}{'exact':>7}{'predicted':>11}{'radius':>10}{'error':>8}{'right':>8}"
        )

    def __str__(self) -> str:
        radius, error = ("" if math.isnan(x) else f"{x:.2f}" for x in (self.radius, self.error))
        counts = f"{self.exact:>7,}{self.predicted:>11,}"
        return f"  {self.name:<29}{counts}{radius:>10}{error:>8}{self.right:>8.1%}"


@torch.no_grad()
def _answered(
    model: nn.Module, batch: Tensor, code: Code, num_stragglers: int, seed: int
) -> tuple[Tensor, Report]:
    """Answer a batch on simulated workers, some of which are lost."""
    coded = CodedWrapper(
        model,
        code.replace(shuffle=random.Random(seed)),
        workers=LocalWorkers(Uniform(num_stragglers, seed=seed)),
        waiting=Waiting.first(num_stragglers),
    )
    return coded.run(batch)


@torch.no_grad()
def situations(
    model: nn.Module,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    case: tuple[int, int, int],
    seed: int = 0,
) -> Iterator[Situation]:
    """Answer all batches while all workers reply, and while S of N, in ``case``, are lost."""
    n, k, s = case
    lost = [
        (f"{s} lost", RegressionCode(k, n), s),
        (f"{s} lost, replication", ReplicationCode(k, n), s),
    ]
    count = sum(map(len, labels))
    for name, code, num_stragglers in [
        ("all answer", RegressionCode(k, n), 0),
        *(lost if s else ()),
    ]:
        predicted = right = 0
        squares, radii = 0.0, []
        for i, (batch, classes) in enumerate(zip(batches, labels, strict=True)):
            answers, report = _answered(model, batch, code, num_stragglers, seed + i)
            flagged = report.predicted
            assert flagged is not None  # there are answers
            predicted += int(flagged.sum())
            right += int((answers.argmax(-1) == classes).sum())
            radii += [] if report.radii is None else report.radii[flagged].tolist()
            squares += float((answers - model(batch)).cpu()[flagged].square().sum())
        known = predicted or math.nan
        yield Situation(
            name,
            count - predicted,
            predicted,
            statistics.median(radii) if radii else math.nan,
            math.sqrt(squares / known),
            right / count,
        )


@torch.no_grad()
def draw(
    sweep: Comparison, model: nn.Module, batch: Tensor, case: tuple[int, int, int], seed: int = 0
) -> Figure:
    """Draw every code's error against lost workers, and predicted logits beside exact ones.

    One logit of each predicted answer is drawn, every logit in turn.
    """
    from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

    n, k, s = case
    answers, report = _answered(model, batch, RegressionCode(k, n), s, seed)
    assert report.predicted is not None  # there are answers
    rows = report.predicted.nonzero().flatten()[:_DRAWN]
    which = torch.arange(len(rows)) % answers.shape[1]
    exact, predicted = model(batch).cpu()[rows, which], answers.cpu()[rows, which]
    order = exact.argsort()
    bars = report.radii
    if bars is not None:  # of a whole answer; here of one of its logits
        bars = bars[rows][order] / math.sqrt(answers.shape[1])

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    sweep.draw_on(left)
    axes = right.subplots()
    axes.plot(exact[order], "_", color="black", markersize=9, label="computed by the model")
    axes.errorbar(
        range(len(rows)), predicted[order], bars, fmt="o", color="#0072B2", markersize=4,
        linewidth=1, label="predicted, with its radius",
    )  # fmt: skip
    axes.set_title(f"{k} inputs a group on {n} workers, {s} lost", fontsize=10)
    axes.set_xlabel("answers whose workers were all lost")
    axes.set_ylabel("a logit of each")
    axes.grid(which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure
