"""The result of a comparison: raw data, their statistics, a table and a picture."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..codes import Code
from .scores import Interval, Score, paired_p, ratio, root

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .scores import Array

__all__ = ["Comparison", "Record", "Row", "Setting"]

Setting = tuple[int, int, int]  # N, K and S

# Okabe and Ito's colours, which the colour-blind can distinguish, and a marker each for print.
_COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#000000")
_STYLES = tuple(zip(_COLOURS, "os^vPDX", strict=True))
_ERROR = "mean squared error / variance of the outputs"
_EXACT = 1e-6  # the share of the variance below which an error is rounding, and is not drawn


class Record(NamedTuple):
    """The numbers of one scheme on one batch, means over received sets: a line of the raw data.

    Attributes:
        workers, inputs, lost: N, K and S.
        scheme, code: the name of the scheme, and its code with the tuned numbers, as text.
        seed, batch: the seed of the lost workers, and the number of the batch.
        rows: the number of rows, over all received sets.
        work: the rows that workers compute, over the rows of the batch.
        score: the means of the scores.
    """

    workers: int
    inputs: int
    lost: int
    scheme: str
    code: str
    seed: int
    batch: int
    rows: int
    work: float
    score: Score


class Row(NamedTuple):
    """The scores of one scheme at one setting, each with half the width of its 95 % interval.

    Attributes:
        setting, name: N, K and S, and the name of the scheme.
        rmse: the root of the mean squared distance of answers from exact ones.
        mse: the mean squared distance, in units of the outputs' variance.
        relative_accuracy: the accuracy over the accuracy of the bare module; None without labels.
        changed: the number of rows whose class is not the module's own, and the number of rows.
        work: the rows that workers compute, over the rows of the batches.
        mse_ratio: the mean squared error over the reference's; None without a reference.
        gain: the relative accuracy less the reference's; None without a reference, or labels.
        p: the p-value of a sign-flip test on the batches' differences of squared errors, times the
            number of comparisons (Bonferroni), at most 1; None without a reference, or answers.
    """

    setting: Setting
    name: str
    rmse: Interval
    mse: Interval
    relative_accuracy: Interval | None
    changed: tuple[int, int]
    work: float
    mse_ratio: Interval | None = None
    gain: Interval | None = None
    p: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`; ``print`` shows it as a table in 80 columns.

    Intervals are Student's, at 95 %, over batches; seeds are averaged first.

    Attributes:
        records: the raw data.
        codes: the tuned codes, by setting and scheme; empty if the data come from a file.
    """

    records: Sequence[Record]
    codes: Mapping[tuple[Setting, str], Code] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The scores, setting by setting and scheme by scheme."""
        return self.against()

    def against(self, reference: str = "") -> list[Row]:
        """Return the scores, each also relative to the scheme of this name, batch by batch."""
        grouped = _grouped(self.records, lambda x: (x[:3], x.scheme))
        schemes = {key: (records, _by_batch(records)) for key, records in grouped.items()}
        names = dict.fromkeys(name for _, name in schemes)
        if reference and reference not in names:
            must = f"reference must be one of {', '.join(names)}"
            raise ValueError(f"against: {must}, got {reference!r}")
        number = sum(name != reference for _, name in schemes)
        rows = []
        for (setting, name), (records, ours) in schemes.items():
            mse, _, variance, right, exact, _ = ours
            labelled = not np.isnan(right).any()
            changed = sum(x.rows * (1 - x.score.agreement) for x in records)
            row = Row(
                setting,
                name,
                root(mse),
                ratio(mse, variance),
                ratio(right, exact) if labelled else None,
                (round(changed), sum(x.rows for x in records)),
                float(np.mean([x.work for x in records])),
            )
            if name != reference and (setting, reference) in schemes:
                theirs = schemes[setting, reference][1]
                p = number * paired_p(mse - theirs[0])
                row = row._replace(
                    mse_ratio=ratio(mse, theirs[0]),
                    gain=ratio(right - theirs[3], exact) if labelled else None,
                    p=None if math.isnan(p) else min(1.0, p),
                )
            rows.append(row)
        return rows

    def save(self, path: str | Path) -> None:
        """Write the raw data to a CSV file, one line for each record."""
        with open(path, "w", newline="") as file:
            head = [*Record._fields[:-1], *Score._fields]
            csv.writer(file).writerows([head, *([*x[:-1], *x.score] for x in self.records)])

    @classmethod
    def read(cls, path: str | Path) -> Comparison:
        """Return the comparison whose raw data :meth:`save`, or another program, has written."""
        kinds = (int, int, int, str, str, int, int, int, *[float] * 7)
        with open(path, newline="") as file:
            lines = list(csv.reader(file))[1:]
        rows = [[kind(x) for kind, x in zip(kinds, line, strict=True)] for line in lines]
        return cls([Record(*(*row[:9], Score(*row[9:]))) for row in rows])

    def __str__(self) -> str:
        lines = []
        for (n, k, s), rows in _grouped(self.rows, lambda row: row.setting).items():
            accuracies = "RelAcc" if rows[0].relative_accuracy else ""
            lines += ["", f"N = {n} workers, K = {k} inputs a group, S = {s} workers lost"]
            lines.append(f"  {'':<27} {'RMSE':<16}{'MSE / variance':<18}{accuracies}".rstrip())
            for row in rows:
                scores = f"{_text(row.rmse):<16}{_text(row.mse):<18}{_text(row.relative_accuracy)}"
                lines.append(f"  {row.name:<27} {scores}".rstrip())
        return "\n".join(lines[1:])

    def draw(self) -> Figure:
        """Draw the squared errors, against S or N if there are several; it needs matplotlib."""
        from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

        by_n = _grouped(self.rows, lambda row: row.setting[1:])
        by_s = _grouped(self.rows, lambda row: row.setting[:2])
        along, panels = (0, by_n) if len(by_n) < len(by_s) else (2, by_s)
        across, down = min(2, len(panels)), math.ceil(len(panels) / 2)
        figure = Figure(figsize=(6.5 * across, 4.2 * down), layout="constrained")
        every = figure.subplots(down, across, squeeze=False).flat
        for axes, (fixed, rows) in zip(every, panels.items(), strict=False):
            data, other = fixed if along == 0 else fixed[::-1]
            of_lost = f", {other} workers lost" if along == 0 else f" on {other} workers"
            axes.set_title(f"{data} inputs a group{of_lost}", fontsize=10)
            (_draw_lines if len({x.setting for x in rows}) > 1 else _draw_bars)(axes, rows, along)
        return figure


def _by_batch(records: Sequence[Record]) -> Array:
    """Return the scores of each batch, means over seeds, ``[6, batches]``."""
    batches = _grouped(records, lambda x: x.batch).values()
    return np.array([np.mean([x.score for x in some], axis=0) for some in batches]).T


def _draw_bars(axes: Axes, rows: Sequence[Row], along: int) -> None:
    for row, (color, _) in zip(rows, itertools.cycle(_STYLES), strict=False):
        axes.barh(row.name, row.mse[0] or 0.0, xerr=row.mse[1], color=color)
    axes.invert_yaxis()
    axes.set_xlabel(_ERROR)


def _draw_lines(axes: Axes, rows: Sequence[Row], along: int) -> None:
    styled = zip(_grouped(rows, lambda x: x.name).items(), itertools.cycle(_STYLES), strict=False)
    for (name, each), (color, marker) in styled:
        points = [(x.setting[along], *x.mse) for x in each if (x.mse[0] or 0) > _EXACT]
        at, mse, half = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(
            at, mse, [x or 0.0 for x in half], label=name, color=color, marker=marker, markersize=4
        )
    axes.set_yscale("log")
    axes.set_xlabel("workers" if along == 0 else "workers lost")
    axes.set_ylabel(_ERROR)
    axes.grid(which="major", alpha=0.3)
    axes.legend(title="exact answers are not drawn", frameon=False, fontsize=8)


def _grouped(items: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _text(interval: Interval | None) -> str:
    """Format a number and half the width of its interval, with the digits that this leaves."""
    value, half = interval or (None, None)
    if value is None:
        return ""
    if not half:
        return f"{value:.3g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    if digits > 5:
        return f"{value:.1e} ± {half:.0e}"
    return f"{value:.{digits}f} ± {half:.{digits}f}"
