r"""Codes side by side on one's own model: the same batches, the same lost workers, each tuned."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._arguments import count, instance, shown
from .._law import Law, law_of
from .._transforms import on_host
from ..codes import BerrutCode, Code, KernelCode, LagrangeCode, ReplicationCode, SplineCode
from ..nn import CodedWrapper
from ..stragglers import Stragglers, Uniform
from .scores import Interval, Scores
from .trial import Trial, calls_of
from .tune import tune

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["Comparison", "Row", "Scheme", "compare", "received_by", "schemes"]

# Okabe and Ito's colours, which the colour-blind can distinguish, and a marker each for print.
_COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#000000")
_STYLES = tuple(zip(_COLOURS, "os^vPDX", strict=True))
_ERROR = "mean squared error / variance of the outputs"
_EXACT = 1e-6  # of the variance: below is rounding, for which a logarithmic axis has no place


class Scheme(NamedTuple):
    """A code, the ordering of the batch, and the S that the code expects, if it is another."""

    code: Code
    ordering: Any = "similarity"
    num_stragglers: int | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """How one scheme did at one setting; every number with half the width of its 95 % interval.

    Attributes:
        setting: N, K and S.
        name: of the scheme.
        code: with the numbers that :func:`~coded_torch.evaluation.tune.tune` has chosen.
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
    """What :func:`compare` found; ``print`` shows it as a table in 80 columns.

    Attributes:
        rows: scheme by scheme, setting by setting.
    """

    rows: Sequence[Row]

    def __str__(self) -> str:
        lines = []
        for setting, rows in _grouped(self.rows, lambda row: row.setting).items():
            n, k, s = setting
            lines += [
                "",
                f"N = {n} workers, K = {k} inputs a group, S = {s} workers lost",
                f"  {'':<25} {'RMSE':<18}{'MSE / variance':<18}"
                f"{'RelAcc' if rows[0].relative_accuracy else ''}".rstrip(),
            ]
            for row in rows:
                accuracy = _text(row.relative_accuracy) if row.relative_accuracy else ""
                error, mse = _text(row.rmse), _text(row.mse)
                lines.append(f"  {row.name:<25} {error:<18}{mse:<18}{accuracy}".rstrip())
        return "\n".join(lines[1:])

    def draw(self) -> Figure:
        """The squared errors: against S for each N and K, or as bars where there is one S.

        Raises:
            ImportError: matplotlib is missing.
        """
        from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

        width = 6.5 * len(_grouped(self.rows, lambda row: row.setting[:2]))
        figure = Figure(figsize=(width, 4.2), layout="constrained")
        self.draw_on(figure)
        return figure

    def draw_on(self, figure: Figure | SubFigure) -> None:
        """What :meth:`draw` draws, on a figure that is there, or on a part of one."""
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
    for (name, each), (color, marker) in zip(
        curves.items(), itertools.cycle(_STYLES), strict=False
    ):
        inexact = [row for row in each if (row.mse[0] or 0) > _EXACT]
        x, y = [row.setting[2] for row in inexact], [row.mse[0] or 0.0 for row in inexact]
        axes.plot(x, y, label=name, color=color, marker=marker, markersize=4)
    axes.set_yscale("log")
    axes.set_xlabel("workers lost")
    axes.set_ylabel(_ERROR)
    axes.grid(which="major", alpha=0.3)
    axes.legend(title="exact answers are not drawn", frameon=False, fontsize=8)


def schemes(num_data: int, num_workers: int) -> dict[str, Scheme]:
    """The codes of the paper and of its peers, as published and with the batch in order; and ours.

    Args:
        num_data: K
        num_workers: N, at least K.
    """
    k, n = num_data, num_workers
    return {
        "the paper's scheme": Scheme(SplineCode(k, n), "arrival"),
        "Berrut": Scheme(BerrutCode(k, n), "arrival"),
        "the paper's, ordered": Scheme(SplineCode(k, n)),
        "Berrut, ordered": Scheme(BerrutCode(k, n)),
        "Lagrange, ordered": Scheme(LagrangeCode(k, n, decoder_degree=k - 1)),
        "replication": Scheme(ReplicationCode(k, n), "arrival"),
        "KernelCode": Scheme(KernelCode(k, n)),
    }


@on_host()
def compare(
    module: nn.Module,
    batches: Iterable[Any],
    settings: Sequence[tuple[int, int, int]] = ((24, 20, 4),),
    *,
    labels: Iterable[Tensor] | None = None,
    more: Callable[[int, int], Mapping[str, Code | Scheme]] | None = None,
    in_dims: Any = 0,
    out_dims: Any = 0,
    law: Callable[..., Law] = Uniform,
    seed: int = 0,
) -> Comparison:
    r"""Compare the codes on a model of one's own.

    The paper's scheme, Berrut's and Lagrange's code, replication and
    :class:`~coded_torch.codes.KernelCode` answer the same batches from the same workers, S of N
    lost uniformly. The first quarter of the batches, at least one, is what
    :func:`~coded_torch.evaluation.tune.tune` chooses every code's numbers on, without labels; the
    others are answered.

    Args:
        module: the module, in evaluation mode.
        batches: at least two, of one size, such as will be answered. Each is what the module is
            called with: an input, or a tuple of positional arguments.
        settings: N, K and S of each: workers, inputs a group, workers lost.
        labels: for every batch the true classes, ``[B]``, integers; the module's output is then
            ``[B, classes]``. None: errors only.
        more: called with K and N of every setting: further codes by their names, tuned and drawn
            like the others. A :class:`Scheme` says how the batch is ordered, too.
        in_dims, out_dims: as for :class:`~coded_torch.nn.CodedWrapper`.
        law: called with S and ``seed=``, it returns the law of the lost workers, whose latency is
            infinite. Defaults to ``Uniform``; other classes of
            :mod:`coded_torch.stragglers` will do, and so will a callable that returns one.
        seed: of the lost workers.

    Returns:
        A table and a picture. Schemes that mix inputs are not in it where an input is not
        floating-point.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: there are too few batches, or not as many labels; a setting violates
            K <= N or S < N.

    Note:
        For every setting the module runs some N / K times on all batches, and for each encoder that
        is tried on those for tuning.

    Example:
        >>> import torch
        >>> import coded_torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> batches = [torch.randn(60, 2, generator=generator) for _ in range(4)]
        >>> found = coded_torch.compare(torch.nn.Tanh(), batches, settings=[(15, 10, 4)])
        >>> error = {row.name: row.mse[0] for row in found.rows}
        >>> error["KernelCode"] < error["the paper's, ordered"] < error["the paper's scheme"]
        True
    """
    instance("compare", "module", module, nn.Module)
    calls = calls_of("compare", module, batches)
    if len(calls) < 2:
        raise ValueError(
            "compare: batches must hold at least two, one to tune on and one to answer, "
            f"got {len(calls)}"
        )
    if isinstance(labels, Tensor) or not (labels is None or isinstance(labels, Sequence)):
        got = type(labels).__name__
        raise TypeError(f"compare: labels must be a sequence of integer tensors, got {got}")
    truth = [None] * len(calls) if labels is None else list(labels)
    if len(truth) != len(calls):
        raise ValueError(f"compare: labels must be given for all {len(calls)}, got {len(truth)}")
    for classes in truth:
        if labels is not None and not _integers(classes):
            got = getattr(classes, "dtype", type(classes).__name__)
            raise TypeError(f"compare: labels must be integer tensors, one for each, got {got}")
    instance("compare", "more", more, Callable, optional=True)
    instance("compare", "law", law, Callable)
    instance("compare", "settings", settings, Sequence)
    settings = [_setting(setting) for setting in settings]
    if not settings:
        raise ValueError("compare: settings must hold at least one (N, K, S), got none")
    seed = count("compare", "seed", seed, least=0)
    tuning = max(1, len(calls) // 4)
    rows = []
    for setting in settings:
        n, k, s = setting
        coded = CodedWrapper(module, KernelCode(k, n), in_dims=in_dims, out_dims=out_dims)
        lost = _law(law, s, seed + 1)  # not the workers that are lost later
        tried = _tuned(coded, calls[:tuning], _all(k, n, more), lost)
        scores = {name: Scores() for name in tried}
        drawn = _law(law, s, seed)
        for args, classes in zip(calls[tuning:], truth[tuning:], strict=True):
            received = received_by(drawn, n)
            trial = Trial(coded, args, [received])
            if classes is not None:
                _check_labels(classes, trial.exact)
            for name, scheme in tried.items():
                answers, _ = trial.decode(
                    scheme.code, received, ordering=scheme.ordering, num_stragglers=s
                )
                scores[name].add(_flat(answers), _flat(trial.exact), classes)
        rows += [_row(setting, name, tried[name].code, x) for name, x in scores.items()]
    return Comparison(rows)


def _all(num_data: int, num_workers: int, more: Any) -> dict[str, Scheme]:
    """The schemes, and what the caller adds to them."""
    found = schemes(num_data, num_workers)
    added = {} if more is None else more(num_data, num_workers)
    instance("compare", "what more returns", added, Mapping)
    for name, given in added.items():
        scheme = given if isinstance(given, Scheme) else Scheme(given)
        instance("compare", f"what more returns as {name!r}", scheme.code, Code)
        sizes = scheme.code.num_data, scheme.code.num_workers
        if name in found or sizes != (num_data, num_workers):
            raise ValueError(
                f"compare: more must return codes of K = {num_data} and N = {num_workers} under "
                f"names that are not taken, got {scheme.code} as {name!r}"
            )
        found[name] = scheme
    return found


def _law(law: Callable[..., Law], lost: int, seed: int) -> Stragglers:
    found = law_of("compare", "what law returns", law(lost, seed=seed))
    if found is None:
        raise TypeError("compare: what law returns must be a law, got None")
    return found


def received_by(law: Stragglers, num_workers: int) -> list[int]:
    """The workers that one draw of a law does not lose."""
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


def _integers(labels: Any) -> bool:
    if not isinstance(labels, Tensor):
        return False
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _check_labels(labels: Tensor, exact: Sequence[Tensor]) -> None:
    shapes = [tuple(leaf.shape) for leaf in exact]
    if len(shapes) != 1 or len(shapes[0]) != 2 or labels.shape != shapes[0][:1]:
        raise ValueError(
            "compare: labels must be [B] for a module that returns [B, classes], got "
            f"{list(labels.shape)} for {' and '.join(map(str, map(list, shapes)))}"
        )


def _tuned(
    coded: CodedWrapper, calls: list[Any], every: dict[str, Scheme], lost: Stragglers
) -> dict[str, Scheme]:
    """The schemes that apply, with the best numbers."""
    if not Trial(coded, calls[0]).mixable:
        every = {name: scheme for name, scheme in every.items() if not scheme.code.mixes}
    tuned = {}
    for name, scheme in every.items():
        wrapper = CodedWrapper(
            coded.module,
            scheme.code,
            stragglers=copy.deepcopy(lost),  # the same for every scheme
            ordering=scheme.ordering,
            shuffle=False,
            in_dims=coded.in_dims,
            out_dims=coded.out_dims,
        )
        tuned[name] = scheme._replace(code=tune(wrapper, calls))
    return tuned


def _row(setting: tuple[int, int, int], name: str, code: Code, scores: Scores) -> Row:
    summary = scores.summary()
    accuracy = summary["relative_accuracy"]
    return Row(
        setting=setting,
        name=name,
        code=code,
        rmse=summary["rmse"],
        mse=summary["mse_to_variance"],
        relative_accuracy=None if accuracy[0] is None else accuracy,
    )


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    """All outputs of an input side by side, ``[B, C]``."""
    return torch.cat([leaf[..., None].flatten(1) for leaf in leaves], 1)


def _grouped(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _text(interval: Interval) -> str:
    """A number and half the width of its interval, to the digits that the latter leaves."""
    value, half = interval
    if value is None:
        return ""
    if half is None or not half:
        return f"{value:.3g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    if digits > 5:
        return f"{value:.1e} ± {half:.0e}"
    return f"{value:.{digits}f} ± {half:.{digits}f}"
