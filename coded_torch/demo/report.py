"""The comparison as a table in 80 columns, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .comparison import Row, Setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LEGEND", "SUFFIXES", "draw_picture", "format_table"]

SUFFIXES = (".pdf", ".png", ".svg")

LEGEND = """\
RelAcc    right answers, relative to those of the bare network; 95 % interval
RMSE      root of the mean squared distance of decoded from exact logit vectors
answered  inputs that a worker in time computed; the rest get the mean of these;
          a code that has mixed the inputs answers all of them, if not exactly
kernel    predicts the rest from similar inputs; the more of them it can see
          together, the better
Lagrange  adapted to a network, which is no polynomial: least squares of the
          degree that is best, for RMSE or for RelAcc, on digits not used here"""

_EXACT = 1e-4
_UNMIXED = ("replication", "uncoded")

# Okabe and Ito's colours, told apart by the colour-blind, and a marker each for print.
_STYLES = {
    "kernel on 5 batches": ("#E69F00", "v"),
    "kernel": ("#56B4E9", "P"),
    "spline": ("#0072B2", "o"),
    "Berrut": ("#D55E00", "s"),
    "Lagrange for RMSE": ("#CC79A7", "^"),
    "replication": ("#009E73", "D"),
    "uncoded": ("#555555", "x"),
}


def format_table(setting: Setting, rows: Sequence[Row]) -> str:
    """The rows of one setting, at most 80 columns wide."""
    lines = [
        f"N = {setting.num_workers} workers, K = {setting.num_data} inputs coded together, "
        f"S = {setting.num_stragglers} workers late",
        f"  {'':<34}{'RelAcc':<15}{'RMSE':>10}{'answered':>14}",
    ]
    for code, note, outcome in rows:
        line = f"  {f'{code}, {note}' if note else code:<34}"
        if outcome is not None:
            rmse = f"{outcome.rmse:.2f}" if outcome.rmse < 1e6 else f"{outcome.rmse:.1e}"
            answered = f"{outcome.answered:.1%}" if code in _UNMIXED else "mixed"
            answered = "predicted" if outcome.answered is None else answered
            line += (
                f"{outcome.relative_accuracy:.3f} ± {outcome.interval:.3f}{rmse:>12}{answered:>14}"
            )
        lines.append(line.rstrip())
    return "\n".join(lines)


def draw_picture(setting: Setting, sweep: Mapping[int, Sequence[Row]]) -> Figure:
    """The error of every code against the number of late workers.

    Args:
        setting: N and K.
        sweep: per number of late workers, the rows of :func:`~.comparison.compare`.
    """
    from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for code, (colour, marker) in _STYLES.items():
        errors = {
            late: row.outcome.rmse
            for late, rows in sweep.items()
            for row in rows
            # A logarithmic axis has no place for an answer that is exact but for rounding.
            if row.code == code and row.outcome is not None and row.outcome.rmse > _EXACT
        }
        axes.plot(
            list(errors), list(errors.values()), label=code, color=colour, marker=marker, ms=4
        )
    axes.set_yscale("log")
    axes.set_xlabel(f"late workers, of {setting.num_workers} (uncoded: at the same rate)")
    axes.set_ylabel("RMSE of the logit vectors")
    axes.set_title(f"LeNet-5 on MNIST, {setting.num_data} digits on {setting.num_workers} workers")
    axes.grid(which="major", alpha=0.3)
    axes.legend(title="exact answers are not drawn", frameon=False)
    return figure
