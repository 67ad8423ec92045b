"""LeNet-5's answers while all workers reply, and while some are lost."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..codes import Code, RegressionCode, ReplicationCode
from ..nn import CodedWrapper, Waiting
from ..stragglers import Uniform
from ..workers import LocalWorkers

__all__ = ["HEADER", "Situation", "situations"]

#: The columns of a situation.
HEADER = f"  {'':<29}{'exact':>7}{'predicted':>11}{'radius':>10}{'error':>8}{'right':>8}"


class Situation(NamedTuple):
    """The answers of all batches in one situation."""

    name: str
    exact: int  #: the number of exact answers
    predicted: int  #: the number of predicted answers
    radius: float  #: the median radius of predicted answers in the reports, or NaN
    error: float  #: the root mean squared error of predicted answers, or NaN
    right: float  #: the share of all answers that name the true class

    def __str__(self) -> str:
        radius, error = ("" if math.isnan(x) else f"{x:.2f}" for x in (self.radius, self.error))
        counts = f"{self.exact:>7,}{self.predicted:>11,}"
        return f"  {self.name:<29}{counts}{radius:>10}{error:>8}{self.right:>8.1%}"


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
    regression = RegressionCode(k, n)
    cases: list[tuple[str, Code, int]] = [("all answer", regression, 0)]
    if s:
        cases += [
            (f"{s} lost", regression, s),
            (f"{s} lost, replication", ReplicationCode(k, n), s),
        ]
    count = sum(map(len, labels))
    for name, code, lost in cases:
        predicted = right = 0
        squares, radii = 0.0, []
        for i, (batch, classes) in enumerate(zip(batches, labels, strict=True), seed):
            coded = CodedWrapper(
                model,
                code.replace(shuffle=random.Random(i)),
                workers=LocalWorkers(Uniform(lost, seed=i)),
                waiting=Waiting.first(lost),
            )
            answers, report = coded.run(batch)
            flagged = report.predicted
            assert flagged is not None  # there are answers
            predicted += int(flagged.sum())
            right += int((answers.argmax(-1) == classes).sum())
            radii += [] if report.radii is None else report.radii[flagged].tolist()
            squares += float((answers - model(batch)).cpu()[flagged].square().sum())
        radius = statistics.median(radii) if radii else math.nan
        error = math.sqrt(squares / (predicted or math.nan))
        yield Situation(name, count - predicted, predicted, radius, error, right / count)
