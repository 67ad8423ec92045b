r"""Codes side by side on one's own model: the same batches, the same lost workers, each tuned."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._arguments import count, instance, shown
from .._torch import on_host
from ..codes import BerrutCode, Code, LagrangeCode, RegressionCode, ReplicationCode, SplineCode
from ..stragglers import Stragglers, Uniform
from .scores import Interval, Scores
from .trial import Trial, calls_of
from .tune import SETS, chosen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["Comparison", "Row", "compare", "peers", "received_by"]

# Okabe and Ito's colours, which the colour-blind can distinguish, and a marker each for print.
_COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#000000")
_STYLES = tuple(zip(_COLOURS, "os^vPDX", strict=True))
_ERROR = "mean squared error / variance of the outputs"
_EXACT = 1e-6  # of the variance: below is rounding, for which a logarithmic axis has no place


@dataclasses.dataclass(frozen=True)
class Row:
    """The scores of one code at one setting, each with half the width of its 95 % interval.

    Attributes:
        setting: N, K and S.
        name: the name of the code.
        code: the code with the numbers that were chosen.
        rmse: the root of the mean squared distance of decoded from exact answers.
        mse: the mean squared distance, in units of the outputs' variance.
        relative_accuracy: right answers over those of the bare module; None without labels.
    """

    setting: tuple[int, int, int]
    name: str
    code: Code
    rmse: Interval
    mse: Interval
    relative_accuracy: Interval | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`; ``print`` shows it as a table in 80 columns.

    Attributes:
        rows: code by code, setting by setting.
    """

    rows: Sequence[Row]

    def __str__(self) -> str:
        lines = []
        for (n, k, s), rows in _grouped(self.rows, lambda row: row.setting).items():
            accuracies = "RelAcc" if rows[0].relative_accuracy else ""
            lines += [
                "",
                f"N = {n} workers, K = {k} inputs a group, S = {s} workers lost",
                f"  {'':<25} {'RMSE':<18}{'MSE / variance':<18}{accuracies}".rstrip(),
            ]
            for row in rows:
                accuracy = _text(row.relative_accuracy) if row.relative_accuracy else ""
                error, mse = _text(row.rmse), _text(row.mse)
                lines.append(f"  {row.name:<25} {error:<18}{mse:<18}{accuracy}".rstrip())
        return "\n".join(lines[1:])

    def draw(self) -> Figure:
        """Draw the squared errors: against S for each N and K, or as bars if there is one S.

        Raises:
            ImportError: matplotlib is missing.
        """
        from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

        width = 6.5 * len(_grouped(self.rows, lambda row: row.setting[:2]))
        figure = Figure(figsize=(width, 4.2), layout="constrained")
        self.draw_on(figure)
        return figure

    def draw_on(self, figure: Figure | SubFigure) -> None:
        """Draw on an existing figure, or on a part of one."""
        panels = _grouped(self.rows, lambda row: row.setting[:2])
        places = figure.subplots(1, len(panels), squeeze=False).flat
        for axes, ((n, k), rows) in zip(places, panels.items(), strict=True):
            axes.set_title(f"{k} inputs a group on {n} workers", fontsize=10)
            one = len({row.setting for row in rows}) == 1
            (_draw_bars if one else _draw_lines)(axes, rows)


def _draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
    for row, (color, _) in zip(rows, itertools.cycle(_STYLES), strict=False):
        axes.barh(row.name, row.mse[0] or 0.0, xerr=row.mse[1], color=color)
    axes.invert_yaxis()
    axes.set_xlabel(_ERROR)


def _draw_lines(axes: Axes, rows: Sequence[Row]) -> None:
    curves = _grouped(rows, lambda row: row.name)
    styled = zip(curves.items(), itertools.cycle(_STYLES), strict=False)
    for (name, each), (color, marker) in styled:
        inexact = [row for row in each if (row.mse[0] or 0) > _EXACT]
        x, y = [row.setting[2] for row in inexact], [row.mse[0] or 0.0 for row in inexact]
        axes.plot(x, y, label=name, color=color, marker=marker, markersize=4)
    axes.set_yscale("log")
    axes.set_xlabel("workers lost")
    axes.set_ylabel(_ERROR)
    axes.grid(which="major", alpha=0.3)
    axes.legend(title="exact answers are not drawn", frameon=False, fontsize=8)


def peers(num_data: int, num_workers: int) -> dict[str, Code]:
    """Return the codes of the paper and of its peers, as published and with the batch in order.

    Args:
        num_data: K.
        num_workers: N, at least K.
    """
    k, n = num_data, num_workers
    return {
        "the paper's scheme": SplineCode(k, n, ordering="arrival"),
        "Berrut": BerrutCode(k, n, ordering="arrival"),
        "the paper's, ordered": SplineCode(k, n),
        "Berrut, ordered": BerrutCode(k, n),
        "Lagrange, ordered": LagrangeCode(k, n, decoder_degree=k - 1),
        "replication": ReplicationCode(k, n, ordering="arrival"),
        "regression": RegressionCode(k, n),
    }


@on_host()
def compare(
    module: nn.Module,
    batches: Iterable[Any],
    settings: Sequence[tuple[int, int, int]] = ((24, 20, 4),),
    *,
    labels: Iterable[Tensor] | None = None,
    more: Callable[[int, int], Mapping[str, Code]] | None = None,
    in_dims: Any = 0,
    out_dims: Any = 0,
    law: Callable[..., Stragglers] = Uniform,
    seed: int = 0,
) -> Comparison:
    r"""Compare the codes on a model of one's own.

    The paper's scheme, Berrut's and Lagrange's code, replication and
    :class:`~coded_torch.codes.RegressionCode` answer the same batches from the same workers, S of N
    lost uniformly. On the first quarter of the batches, at least one, every code's numbers are
    chosen as :func:`~coded_torch.tune` does, without labels; the others are answered.

    Args:
        module: the module, in evaluation mode.
        batches: at least two, of one size, such as will be answered. Each is what the module is
            called with: an input, or a tuple of positional arguments.
        settings: N, K and S of each: workers, inputs a group, workers lost.
        labels: for every batch the true classes, ``[B]``, integers; the module's output is then
            ``[B, classes]``. Defaults to None: errors only.
        more: called with K and N of every setting, it returns further codes by their names, which
            are tuned and drawn like the others.
        in_dims, out_dims: as for :class:`~coded_torch.CodedWrapper`.
        law: called with S and ``seed=``, it returns the law of the lost workers, whose latency is
            infinite: a class of :mod:`coded_torch.stragglers`, or a callable. Defaults to
            ``Uniform``.
        seed: the seed of the lost workers.

    Returns:
        A table and a picture. Codes that mix inputs are left out if an input is not floating-point.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are too few batches, or not as many labels; a setting violates
            K <= N or S < N.

    Note:
        For every setting the module runs some N / K times on all batches, and for each encoder that
        is tried on the first quarter.

    Example:
        >>> import torch
        >>> import coded_torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> batches = [torch.randn(60, 2, generator=generator) for _ in range(4)]
        >>> found = coded_torch.compare(torch.nn.Tanh(), batches, settings=[(15, 10, 4)])
        >>> error = {row.name: row.mse[0] for row in found.rows}
        >>> error["regression"] < error["the paper's, ordered"] < error["the paper's scheme"]
        True
    """
    instance("compare", "module", module, nn.Module)
    calls = calls_of("compare", module, batches)
    if len(calls) < 2:
        raise ValueError(
            "compare: batches must hold at least two, one to tune on and one to answer, "
            f"got {len(calls)}"
        )
    truth = _labels(labels, len(calls))
    instance("compare", "more", more, Callable, optional=True)
    instance("compare", "law", law, Callable)
    instance("compare", "settings", settings, Sequence)
    settings = [_setting(setting) for setting in settings]
    if not settings:
        raise ValueError("compare: settings must hold at least one (N, K, S), got none")
    seed = count("compare", "seed", seed, least=0)

    def tried(args: Any, law: Stragglers, n: int, count: int) -> tuple[Trial, list[list[int]]]:
        sets = [received_by(law, n) for _ in range(count)]
        return Trial(module, args, sets, in_dims=in_dims, out_dims=out_dims), sets

    tuning = max(1, len(calls) // 4)
    rows = []
    for n, k, s in settings:
        lost = _law(law, s, seed + 1)  # not the workers that are lost later
        trials = [tried(args, lost, n, SETS) for args in calls[:tuning]]
        mixable = trials[0][0].mixable
        codes = {
            name: chosen(code, trials, s)
            for name, code in _all(k, n, more).items()
            if mixable or not code.mixes
        }
        scores = {name: Scores() for name in codes}
        lost = _law(law, s, seed)
        for args, classes in zip(calls[tuning:], truth[tuning:], strict=True):
            trial, (received,) = tried(args, lost, n, 1)
            if classes is not None:
                _check_labels(classes, trial.exact)
            for name, code in codes.items():
                answers = trial.decode(code, received, num_stragglers=s)
                scores[name].add(_flat(answers), _flat(trial.exact), classes)
        rows += [_row((n, k, s), name, codes[name], x) for name, x in scores.items()]
    return Comparison(rows)


def _labels(labels: Any, count: int) -> list[Any]:
    """Return the labels of each batch, None where there are none."""
    if labels is None:
        return [None] * count
    if isinstance(labels, Tensor) or not isinstance(labels, Sequence):
        got = type(labels).__name__
        raise TypeError(f"compare: labels must be a sequence of integer tensors, got {got}")
    if len(labels) != count:
        raise ValueError(f"compare: labels must be given for all {count}, got {len(labels)}")
    for x in labels:
        if not isinstance(x, Tensor) or x.dtype == torch.bool or torch.is_floating_point(x):
            got = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"compare: labels must be integer tensors, one for each, got {got}")
    return list(labels)


def _check_labels(labels: Tensor, exact: Sequence[Tensor]) -> None:
    shapes = [tuple(leaf.shape) for leaf in exact]
    if len(shapes) != 1 or len(shapes[0]) != 2 or labels.shape != shapes[0][:1]:
        raise ValueError(
            "compare: labels must be [B] for a module that returns [B, classes], got "
            f"{list(labels.shape)} for {' and '.join(map(str, map(list, shapes)))}"
        )


def _all(num_data: int, num_workers: int, more: Any) -> dict[str, Code]:
    """Return the peers, and the codes that the caller adds to them."""
    found = peers(num_data, num_workers)
    added = {} if more is None else more(num_data, num_workers)
    instance("compare", "what more returns", added, Mapping)
    for name, code in added.items():
        instance("compare", f"what more returns as {name!r}", code, Code)
        if name in found or (code.num_data, code.num_workers) != (num_data, num_workers):
            raise ValueError(
                f"compare: more must return codes of K = {num_data} and N = {num_workers} under "
                f"names that are not taken, got {code} as {name!r}"
            )
        found[name] = code
    return found


def _law(law: Callable[..., Stragglers], lost: int, seed: int) -> Stragglers:
    found = law(lost, seed=seed)
    instance("compare", "the result of law", found, Stragglers)
    return found


def received_by(law: Stragglers, num_workers: int) -> list[int]:
    """Return the workers that one draw of a law does not lose."""
    return law.sample(num_workers).isfinite().nonzero().flatten().tolist()


def _setting(setting: Any) -> tuple[int, int, int]:
    try:
        n, k, s = (count("compare", "settings", value, least=None) for value in setting)
    except (TypeError, ValueError):
        n, k, s = 0, 0, 0
    if not (1 <= k <= n and 0 <= s < n):
        raise ValueError(
            "compare: settings must be triples (N, K, S) of integers with 1 <= K <= N and "
            f"0 <= S < N, got {shown(setting)}"
        )
    return n, k, s


def _row(setting: tuple[int, int, int], name: str, code: Code, scores: Scores) -> Row:
    found = scores.summary()
    accuracy = found["relative_accuracy"]
    known = None if accuracy[0] is None else accuracy
    return Row(setting, name, code, found["rmse"], found["mse_to_variance"], known)


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    """Put all outputs of an input side by side, ``[B, C]``."""
    return torch.cat([leaf[..., None].flatten(1) for leaf in leaves], 1)


def _grouped(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _text(interval: Interval) -> str:
    """Format a number and half the width of its interval, with the digits that this leaves."""
    value, half = interval
    if value is None:
        return ""
    if half is None or not half:
        return f"{value:.3g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    if digits > 5:
        return f"{value:.1e} ± {half:.0e}"
    return f"{value:.{digits}f} ± {half:.{digits}f}"
