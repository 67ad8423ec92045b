r"""Scores of answers against the module's own, and the comparison of schemes by them.

Answers are ``[..., C]``: the last dimension is one answer, all others count rows. An error is a
norm over all C numbers of an answer.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arguments import check, dense, shown
from ..codes import Code
from ..input_space._finite_mean import student_t

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Interval = list[float | None]  # a number, and half the width of its 95 % interval

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLIPS = 20_000  # random signs of a paired test, enough for two digits of a p-value of .01
_WIDE = 0.5  # half an interval over its number, above which it is one of the logarithm
_WIDTHS = 28, 16, 18, 0  # characters of a table's columns, at least; with wider text they grow
# The scores that a comparison draws, and what its axes call them.
_DRAWN = {"mse": "normalised MSE", "rmse": "RMSE", "relative_accuracy": "relative accuracy"}
_EXACT = 1e-6  # the share of the variance below which an error is rounding, and is not drawn


class Setting(NamedTuple):
    """The numbers of a comparison. A tuple (N, K, S) says the same."""

    num_workers: int  #: N, the workers, each of which computes a coded input of every group
    num_data: int  #: K, the inputs of a group
    num_stragglers: int  #: S, the workers that are lost


class Score(NamedTuple):
    """The numbers of a scheme's answers, means over rows."""

    mse: float  #: the squared norm of an answer's error; NaN if an answer is missing
    error: float  #: the norm of an answer's error; NaN if an answer is missing
    variance: float  #: the squared norm of an exact answer less their mean
    right: float  #: the accuracy of the answers; NaN without labels
    exact_right: float  #: the accuracy of the module; NaN without labels
    agreement: float  #: the share of rows that have the class of the module's own answer


def score(decoded: Tensor, exact: Tensor, labels: Tensor | None = None) -> Score:
    """Return the scores of answers ``[..., C]``, floating-point, against the model's own answers.

    A row with NaN is missing and wrong. ``labels`` are the true classes, integers, ``[...]``.
    """
    for argument, value in (("decoded", decoded), ("exact", exact)):
        dense("score", argument, value)
    if decoded.shape != exact.shape or not exact.dim() or not exact.numel():
        raise ValueError(
            "score: decoded must have the shape [..., C] of exact and hold at least one answer, "
            f"got {shown(([*decoded.shape], [*exact.shape]))}"
        )
    decoded = decoded.detach().double()
    exact = exact.detach().double()
    answered = decoded.isfinite().all(-1)
    found = torch.where(answered, decoded.argmax(-1), -1)
    own = exact.argmax(-1)
    squares = (decoded - exact).square().sum(-1)
    spread = exact - exact.reshape(-1, exact.shape[-1]).mean(0)
    right = own_right = math.nan
    if labels is not None:
        check_labels("score", labels, exact)
        labels = labels.to(exact.device)  # loaders have labels on the host
        right, own_right = ((x == labels).double().mean().item() for x in (found, own))
    variance = spread.square().sum(-1).mean()
    agreement = (found == own).double().mean()
    return Score(
        squares.mean().item(),
        squares.sqrt().mean().item(),
        variance.item(),
        right,
        own_right,
        agreement.item(),
    )


def check_labels(owner: str, labels: Any, exact: Tensor) -> None:
    """Raise an error unless labels are one class, 0 to C - 1, for each answer ``[..., C]``."""
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        got = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"{owner}: labels must be an integer tensor, got {got}")
    got = tuple(labels.shape)
    wanted = tuple(exact.shape[:-1])
    check(owner, got == wanted, f"labels must have shape {wanted}", got)
    wrong = labels[(labels < 0) | (labels >= exact.shape[-1])].tolist()
    check(owner, not wrong, f"labels must be from 0 to {exact.shape[-1] - 1}", wrong[:1])


def rmse(decoded: Tensor, exact: Tensor) -> float:
    """Return the root of the mean squared norm of an answer's error; see :func:`score`."""
    return math.sqrt(score(decoded, exact).mse)


def relative_accuracy(decoded: Tensor, exact: Tensor, labels: Tensor) -> float:
    """Return the accuracy of decoded answers over the model's own; see :func:`score`."""
    found = score(decoded, exact, labels)
    if not found.exact_right:
        raise ValueError("relative_accuracy: the model must be right at least once, got never")
    return found.right / found.exact_right


def ratio(a: Array, b: Array) -> Interval:
    """Return the ratio of two means over batches, None if both are 0, and half its interval."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = a.mean() / b.mean()
        return rounded(value, half_width(a - value * b) / b.mean())


def root(squares: Array) -> Interval:
    """Return the root of the mean of squares, and half the width of its interval."""
    value = math.sqrt(squares.mean())
    return rounded(value, half_width(squares) / (2 * value) if value else 0.0)


def of_logarithm(value: float, half: float) -> float | None:
    """Return the factor of an interval of the logarithm, by the delta method; None if ± will do."""
    if not half > _WIDE * abs(value):
        return None
    if not value:
        return math.inf
    return math.exp(min(half / abs(value), 99.0))


def half_width(a: Array) -> float:
    """Return half the width of Student's 95 % interval of the mean, NaN of fewer than two."""
    n = len(a) - 1
    if n < 1:
        return math.nan
    return float(student_t(0.95, n) * a.std(ddof=1) / math.sqrt(n + 1))


def paired_p(differences: Array) -> float:
    """Return the two-sided p-value of paired differences, one per batch, under a mean of 0.

    The test flips the signs of the differences, in all ways for up to 14 batches, else at random.
    The p-value is NaN if a difference is.
    """
    if np.isnan(differences).any():
        return math.nan
    n = len(differences)
    signs: Any
    if 2**n <= _FLIPS:
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (_FLIPS, n))
        signs[0] = 1.0
    return float((np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-12)).mean())


def rounded(*values: float) -> Interval:
    """Round to four digits; NaN becomes None."""
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values]


class Record(NamedTuple):
    """The numbers of one scheme on one batch and seed: a line of the raw data."""

    workers: int  #: N
    inputs: int  #: K
    lost: int  #: S
    scheme: str  #: the scheme's name
    code: str  #: the code with the tuned numbers as text, or empty
    seed: int  #: the seed of the lost workers
    batch: int  #: the number of the answered batch
    rows: int  #: the number of answered rows, over all received sets
    work: float  #: the rows that workers compute, over the rows of the batch
    score: Score  #: means over received sets


class Row(NamedTuple):
    """The scores of one scheme at one setting, intervals as ``[value, half the 95 % width]``.

    The fields with a default are None without a reference, and for the reference itself. ``p`` is
    the p-value of paired sign flips of the batches' differences of squared distances, times the
    number m of all schemes but the reference, at all settings (Bonferroni), and at most 1. With b
    answered batches, p is at least m 2^(1-b) if b is at most 14, else m / 20,000.
    """

    setting: Setting
    name: str  #: the name of the scheme
    rmse: Interval  #: the root of the mean squared distance of answers from exact ones
    mse: Interval  #: the mean squared distance, in units of the outputs' variance
    relative_accuracy: Interval | None  #: the accuracy over the module's; None without labels
    changed: tuple[int, int]  #: rows whose class is not the module's own, and all rows
    work: float  #: the rows that workers compute, over the rows of the batches
    mse_ratio: Interval | None = None  #: the mean squared distance over the reference's
    mse_difference: Interval | None = None  #: ``mse`` less the reference's
    gain: Interval | None = None  #: ``relative_accuracy`` less the reference's
    p: float | None = None  #: a p-value; None if an answer is missing


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`; ``print`` shows it as a table in 80 columns.

    Intervals are Student's, at 95 %, over batches; seeds are averaged first. If half the width is
    more than half of the number, it is printed as a factor: 0.3 ×/÷ 2 is from 0.15 to 0.6.
    """

    records: Sequence[Record]  #: the raw data
    #: the tuned codes, by setting and scheme
    codes: Mapping[tuple[Setting, str], Code] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The scores, setting by setting and scheme by scheme."""
        return self.against()

    def against(self, reference: str = "") -> list[Row]:
        """Return the scores, each also relative to the scheme of this name, batch by batch."""
        schemes = grouped(self.records, lambda x: (Setting(*x[:3]), x.scheme))
        names = dict.fromkeys(name for _, name in schemes)
        if reference and reference not in names:
            raise ValueError(
                f"against: reference must be one of {', '.join(names)}, got {shown(reference)}"
            )
        number = sum(name != reference for _, name in schemes)
        rows = []
        for (setting, name), records in schemes.items():
            mse, _, variance, right, exact, _ = _by_batch(records)
            labelled = not np.isnan(right).any()
            kept = None
            if labelled:
                kept = ratio(right, exact)
            changed = round(sum(x.rows * (1 - x.score.agreement) for x in records))
            counts = changed, sum(x.rows for x in records)
            work = float(np.mean([x.work for x in records]))
            row = Row(setting, name, root(mse), ratio(mse, variance), kept, counts, work)
            if name != reference and (setting, reference) in schemes:
                theirs = _by_batch(schemes[setting, reference])
                p = number * paired_p(mse - theirs[0])
                row = row._replace(
                    mse_ratio=ratio(mse, theirs[0]),
                    mse_difference=ratio(mse - theirs[0], variance),
                    gain=ratio(right - theirs[3], exact) if labelled else None,
                    p=None if math.isnan(p) else min(1.0, p),
                )
            rows.append(row)
        return rows

    def save(self, path: str | Path) -> None:
        """Write the raw data to a CSV file: the fields of :class:`Record` and its score."""
        with open(path, "w", newline="") as file:
            head = [*Record._fields[:-1], *Score._fields]
            csv.writer(file).writerows([head, *([*x[:-1], *x.score] for x in self.records)])

    def __str__(self) -> str:
        lines: list[str] = []
        for (n, k, s), rows in grouped(self.rows, lambda row: row.setting).items():
            accuracies = "RelAcc" if rows[0].relative_accuracy else ""
            lines += ["", f"N = {n} workers, K = {k} inputs per group, S = {s} workers lost"]
            table = [("", "RMSE", "normalised MSE", accuracies)]
            for row in rows:
                scores = [_text(score) for score in (row.rmse, row.mse, row.relative_accuracy)]
                table.append((row.name, *scores))
            widths = []
            for least, column in zip(_WIDTHS, zip(*table, strict=True), strict=True):
                widths.append(max(least, *(len(text) + 2 for text in column)))
            for cells in table:
                padded = [f"{text:<{width}}" for text, width in zip(cells, widths, strict=True)]
                lines.append(f"  {''.join(padded)}".rstrip())
        return "\n".join(lines[1:])

    def verdict(self) -> str:
        """Return, for each setting, the scheme of the least squared error as code to write.

        Schemes are named, too, if the 95 % interval of the ratio of their error to the least one,
        batch by batch, includes 1. There is no verdict on one answered batch.
        """
        lines: list[str] = []
        for setting, rows in grouped(self.rows, lambda row: row.setting).items():
            complete = [row for row in rows if row.mse[0] is not None]
            if not complete or all(row.mse[1] is None for row in complete):
                continue
            best = min(complete, key=lambda row: row.mse[0] or 0.0)
            code = self.codes.get((setting, best.name))
            written = best.name
            if code is not None:
                written = f"{best.name}, CodedWrapper(model, codes.{code!r})"
            n, k, s = setting
            num_batches = len({record.batch for record in self.records if record[:3] == setting})
            lines.append(f"Best on {num_batches} batches at N = {n}, K = {k}, S = {s}: {written}")
            alike = []
            for row in self.against(best.name):
                if row.setting != setting or row.mse[0] is None or row.mse_ratio is None:
                    continue
                times = row.mse_ratio[0]
                is_larger = times is not None and times - _bars(row.mse_ratio)[0] > 1
                if not is_larger:
                    alike.append(row.name)
            if alike:
                lines.append(f"Not clearly worse: {'; '.join(alike)}")
        wrap = functools.partial(textwrap.fill, width=80, subsequent_indent="  ")
        return "\n".join(map(wrap, lines))

    def draw(self, score: str = "mse") -> Figure:
        """Draw a score, against S or N if there are several; it needs matplotlib.

        Axes of errors are logarithmic. Intervals are drawn as ``print`` shows them: a wide one is
        a factor.

        Args:
            score: a field of :class:`Row`: "mse", "rmse" or "relative_accuracy". The last needs
                labels. Defaults to "mse".
        """
        if score not in _DRAWN:
            raise ValueError(f"draw: score must be one of {str([*_DRAWN])[1:-1]}, got {score!r}")
        if any(getattr(row, score) is None for row in self.rows):
            raise ValueError(f"draw: score {score!r} needs labels in compare, got none")
        from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

        by_n = grouped(self.rows, lambda row: row.setting[1:])
        by_s = grouped(self.rows, lambda row: row.setting[:2])
        along, panels = (0, by_n) if len(by_n) < len(by_s) else (2, by_s)
        figure = Figure(figsize=(6, 3.2 * len(panels)), layout="constrained")
        every = figure.subplots(len(panels), squeeze=False).flat
        lines = {}
        title = _DRAWN[score]
        is_error = score != "relative_accuracy"
        scale = "log" if is_error else "linear"
        exact = _EXACT if is_error else -1.0  # all accuracies are drawn
        for axes, rows in zip(every, panels.values(), strict=True):
            n, k, s = rows[0].setting
            of_lost = f", {s} workers lost" if along == 0 else f" on {n} workers"
            axes.set_title(f"{k} inputs per group{of_lost}", fontsize=10)
            if len({row.setting for row in rows}) == 1:
                axes.set(xscale=scale, xlabel=f"{title}, {s} workers lost", xmargin=0.2)
                best_last = -1 if is_error else 1
                for row in sorted(rows, key=lambda x: best_last * (getattr(x, score)[0] or 0.0)):
                    interval = getattr(row, score)
                    found = interval[0]
                    value = max(found or 0.0, exact)
                    below, above = _bars(interval)
                    axes.errorbar(value, row.name, xerr=[[below], [above]], fmt="C0o")
                    said = "missing answers" if found is None else "exact"
                    if value > exact:
                        said = f"{value:.{2 if is_error else 3}g}"
                    axes.annotate(f"  {said}", (value + above, row.name), va="center", fontsize=9)
                continue
            for i, (name, each) in enumerate(grouped(rows, lambda x: x.name).items()):
                values = [(x.setting[along], getattr(x, score)) for x in each]
                drawn = [x for x in values if x[1][0] is not None and x[1][0] > exact]
                if missing := any(interval[0] is None for _, interval in values):
                    name += ", some missing"
                if not (drawn or missing):
                    continue
                at = [place for place, _ in drawn]
                value = [interval[0] for _, interval in drawn]
                bars = np.array([_bars(interval) for _, interval in drawn]).reshape(-1, 2).T
                # Hollow markers of falling size: a line that another one covers stays visible.
                lines[name] = axes.errorbar(
                    at, value, bars, marker="os^vPDX"[i % 7], fillstyle="none", ms=max(3, 9 - i / 2)
                )
            axes.set(yscale=scale, ylabel=title, xlabel="workers" if along == 0 else "workers lost")
            axes.locator_params("x", integer=True)
        if lines:
            figure.legend(
                lines.values(),
                lines,
                loc="outside right upper",
                title="not exact:" if is_error else "",
            )
        return figure


def _by_batch(records: Sequence[Record]) -> Array:
    """Return the scores of each batch, means over seeds, ``[6, batches]``."""
    batches = grouped(records, lambda x: x.batch).values()
    return np.array([np.mean([x.score for x in some], axis=0) for some in batches]).T


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Return the items of each key, in order."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _bars(interval: Interval) -> tuple[float, float]:
    """Return how far an interval reaches below and above its number: 0 if that is not known."""
    value, half = interval
    if not value or not half or value <= _EXACT:
        return 0.0, 0.0
    factor = of_logarithm(value, half)
    if factor is None:
        return half, half
    return value - value / factor, value * factor - value


def _text(interval: Interval | None) -> str:
    """Format a number and half the width of its interval, with the digits that this leaves."""
    value, half = interval or (None, None)
    if value is None or not half:
        return "" if value is None else f"{value:.3g}"
    factor = of_logarithm(value, half)
    if factor is not None:
        return f"{value:.2g} ×/÷ {factor:.2g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    if digits > 5:
        return f"{value:.1e} ± {half:.0e}"
    return f"{value:.{digits}f} ± {half:.{digits}f}"
