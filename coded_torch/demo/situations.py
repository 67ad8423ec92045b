"""What becomes of LeNet-5's answers: all workers answer, or some are lost."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..codes import Code, KernelCode, ReplicationCode
from ..evaluation.compare import Comparison
from ..nn import CodedWrapper, Waiting
from ..nn.report import Report
from ..stragglers import Uniform
from ..workers import LocalWorkers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Situation", "answered", "draw", "situations"]

_DRAWN = 40  # predicted answers
_ROUNDING = 1e-3  # of answers in batches of other sizes


class Situation(NamedTuple):
    """What became of the answers of all batches.

    Attributes:
        name: what happened.
        own: how many answers are the module's own.
        predicted: how many are not, and are flagged so.
        expected: the root mean squared error to expect of those that are predicted; None: none is,
            or the code cannot say.
        error: theirs, as it turns out; None: none is predicted.
        wrong: how many answers are not the module's own, and not flagged.
        right: the share of right answers.
    """

    name: str
    own: int
    predicted: int
    expected: float | None
    error: float | None
    wrong: int
    right: float

    @staticmethod
    def header(n: int, k: int, count: int) -> str:
        """The lines above those of all situations; ``count`` is the number of answers."""
        return (
            f"N = {n} workers, K = {k} inputs a group: what becomes of {count:,} answers\n"
            f"  {'':<29}{'own':>6}{'predicted':>11}{'expected':>10}{'error':>7}{'wrong':>7}"
            f"{'right':>7}"
        )

    def __str__(self) -> str:
        expected, error = (
            "" if value is None else f"{value:.2f}" for value in (self.expected, self.error)
        )
        return (
            f"  {self.name:<29}{self.own:>6,}{self.predicted:>11,}{expected:>10}{error:>7}"
            f"{self.wrong:>7,}{self.right:>7.1%}"
        )


@torch.no_grad()
def answered(
    model: nn.Module,
    batch: Tensor,
    code: Code,
    num_stragglers: int,
    *,
    seed: int = 0,
) -> tuple[Tensor, Report]:
    """Answer a batch on simulated workers, some of which are late.

    Args:
        model: what is run.
        batch: its inputs.
        code: the code.
        num_stragglers: S, how many are late.
        seed: of late machines.
    """
    coded = CodedWrapper(
        model,
        code,
        workers=LocalWorkers(Uniform(num_stragglers, seed=seed)),
        waiting=Waiting.first(num_stragglers),
        shuffle=random.Random(seed),
    )
    return coded.run(batch)


def situations(
    model: nn.Module,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    case: tuple[int, int, int],
    seed: int = 0,
) -> Iterator[Situation]:
    """Answer all batches while nothing goes wrong, and while workers are lost.

    Args:
        model: what is run.
        batches: of inputs.
        labels: of their true classes.
        case: N, K and S.
        seed: of late machines.
    """
    n, k, s = case
    kernel, replication = KernelCode(k, n), ReplicationCode(k, n)
    lost = f"{s} lost" if s else "none lost"
    yield _situation("all answer", model, batches, labels, kernel, 0, seed)
    if s:
        yield _situation(lost, model, batches, labels, kernel, s, seed)
        name = f"{lost}, replication"
        yield _situation(name, model, batches, labels, replication, s, seed)


@torch.no_grad()
def _situation(
    name: str,
    model: nn.Module,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    code: Code,
    num_stragglers: int,
    seed: int,
) -> Situation:
    own = predicted = wrong = right = 0
    expected = squares = 0.0
    for i, batch in enumerate(batches):
        answers, report = answered(
            model,
            batch,
            code,
            num_stragglers,
            seed=seed + i,
        )
        flagged, errors = report.predicted, report.expected_errors
        assert flagged is not None  # there are answers
        answers, exact = answers.cpu(), model(batch).cpu()
        same = torch.isclose(answers, exact, rtol=_ROUNDING, atol=_ROUNDING).all(-1)
        own += int((same & ~flagged).sum())
        predicted += int(flagged.sum())
        wrong += int((~same & ~flagged).sum())
        right += int((answers.argmax(-1) == labels[i].cpu()).sum())
        expected += math.nan if errors is None else float(errors[flagged].square().sum())
        squares += float((answers - exact)[flagged].square().sum())
    return Situation(
        name=name,
        own=own,
        predicted=predicted,
        expected=_root(expected, predicted),
        error=_root(squares, predicted),
        wrong=wrong,
        right=right / sum(map(len, labels)),
    )


def _root(squares: float, count: int) -> float | None:
    return math.sqrt(squares / count) if count and not math.isnan(squares) else None


@torch.no_grad()
def draw(
    sweep: Comparison, model: nn.Module, batch: Tensor, case: tuple[int, int, int], seed: int = 0
) -> Figure:
    """Every code's error against lost workers; and predicted logits beside the model's own.

    Args:
        sweep: the former.
        model: what is run.
        batch: its inputs; logits of answers that are predicted are drawn, one of each in turn.
        case: N, K and S.
        seed: of late machines.
    """
    from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

    n, k, s = case
    answers, report = answered(model, batch, KernelCode(k, n), s, seed=seed)
    assert report.predicted is not None  # there are answers
    rows = report.predicted.nonzero().flatten()[:_DRAWN]
    which = torch.arange(len(rows)) % answers.shape[1]
    own, predicted = model(batch).cpu()[rows, which], answers.cpu()[rows, which]
    order = own.argsort()
    bars = report.expected_errors
    if bars is not None:  # of a whole answer; here of one of its logits
        bars = bars[rows][order] / math.sqrt(answers.shape[1])

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    sweep.draw_on(left)
    axes = right.subplots()
    axes.plot(own[order], "_", color="black", markersize=9, label="the model's own")
    axes.errorbar(
        range(len(rows)),
        predicted[order],
        bars,
        fmt="o",
        color="#0072B2",
        markersize=4,
        linewidth=1,
        label="predicted, with the error to expect",
    )
    axes.set_title(f"{k} inputs a group on {n} workers, {s} lost", fontsize=10)
    axes.set_xlabel("answers whose workers were all lost")
    axes.set_ylabel("a logit of each")
    axes.grid(which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure
