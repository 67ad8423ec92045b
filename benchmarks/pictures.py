"""The pictures of the results."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from .tables import NAMES

__all__ = ["PICTURES", "curve", "shown"]

STYLES = {  # of a code, the same in every picture
    "uncoded": {"color": "0.6", "linestyle": ":"},
    "spline": {"color": "tab:red", "linestyle": ":"},
    "Berrut": {"color": "tab:purple", "linestyle": ":"},
    "Lagrange (adapted), ordered": {"color": "tab:brown", "linestyle": "--"},
    "Floater-Hormann, ordered": {"color": "tab:pink", "linestyle": "--"},
    "Berrut, ordered": {"color": "tab:purple", "linestyle": "--"},
    "spline, ordered": {"color": "tab:red", "linestyle": "--"},
    "replication": {"color": "tab:olive", "marker": "x"},
    "replication, batch mean": {"color": "tab:orange", "marker": "s"},
    "replication, regression": {"color": "tab:green", "marker": "^"},
    "KernelCode": {"color": "tab:blue", "marker": "o"},
    "KernelCode, tuned": {"color": "black", "marker": "."},
}
HIDDEN = ("Berrut",)  # it would hide the spline of the paper
LEAST_LOSS = 1e-4  # drawn where nothing is lost, as a logarithm has no zero
FEWEST_ROWS = 30  # of which a share is drawn
MARKERS = "os^DXv."
ON_PROCESSES = {  # policies of the latency benchmark in the README's picture
    "wait for all": "no redundancy",
    "hedge at 1.5 medians": "one hedge",
    "three re-asks": "three hedges",
    "hedge, predict": "three hedges, then predicted",
    "hedge, deadline": "the same by a deadline",
}

Results = Mapping[str, Any]


def name_of(key: str) -> str:
    return NAMES.get(key, key).replace("`", "")


def shown(codes: Any) -> list[str]:
    """Return the codes that pictures show, in the order of their styles."""
    return [code for code in STYLES if code in set(codes) - set(HIDDEN)]


def curve(axes: Axes, x: Any, intervals: Any, name: str) -> None:
    """Draw a line with its interval, ``[n, 2]``, as a band."""
    value, half = np.array(intervals, dtype=float).T
    style = {"markersize": 4, "linewidth": 1.3, **STYLES.get(name, {"marker": "o"})}
    (line,) = axes.plot(x, value, label=name_of(name), **style)
    low = np.maximum(value - half, value / 10)  # a logarithm has no zero
    axes.fill_between(x, low, value + half, color=line.get_color(), alpha=0.12, linewidth=0)


def panels(titles: Sequence[str], rows: int = 1, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each title, all of one style."""
    across = -(-len(titles) // rows)
    figure = Figure(figsize=(10, height * rows), layout="constrained")
    every = list(figure.subplots(rows, across, squeeze=False).flat)
    for axes, title in zip(every, titles, strict=False):
        axes.set_title(title, fontsize=8)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    for axes in every[len(titles) :]:
        axes.axis("off")
    return figure, every[: len(titles)]


def legend(figure: Figure, columns: int) -> Figure:
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def plain(axis: Axis) -> None:
    """Label a logarithmic axis of any span with plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def dots(of: Mapping[str, Mapping[str, Mapping[str, float]]], label: str) -> Figure:
    """Draw numbers by panel, series and row, on a logarithmic axis; a series is a marker."""
    rows = list(dict.fromkeys(row for p in of.values() for s in p.values() for row in s))
    figure, every = panels(list(of), height=1.3 + 0.2 * len(rows))
    for axes, series in zip(every, of.values(), strict=True):
        for marker, (name, numbers) in zip(MARKERS, series.items(), strict=False):
            places = [rows.index(row) for row in numbers]
            axes.plot(numbers.values(), places, marker, label=name_of(name), markersize=5)
        axes.set_yticks(range(len(rows)), [name_of(row) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xscale("log")
        plain(axes.xaxis)
        axes.set_xlabel(label)
        if axes is not every[0]:
            axes.set_yticklabels([])
    return legend(figure, len(MARKERS))


def accuracy(results: Results, output: str = "logits", law: str = "uniform") -> Figure:
    """The accuracy that is lost, against lost workers."""
    of = {
        (name, case): found
        for name, cases in results["accuracy"].items()
        for case, found in cases.items()
        if name in NAMES
    }
    figure, every = panels([f"{NAMES[name]}, (N, K) = {case}" for name, case in of], rows=2)
    for axes, found in zip(every, of.values(), strict=True):
        for code in shown(found[output][law]):
            values = found[output][law][code]["relative_accuracy"]
            lost = [[max(1 - value, LEAST_LOSS), half] for value, half in values]
            curve(axes, found["stragglers"], lost, code)
        axes.set_yscale("log")
        axes.set_ylim(0.8 * LEAST_LOSS, 1.2)
        axes.set_yticks([1, 0.1, 0.01, 0.001, LEAST_LOSS], ["all", "10 %", "1 %", "0.1 %", "none"])
        axes.set_xlabel("workers lost")
        axes.set_ylabel("accuracy lost")
    return legend(figure, 4)


def batches(results: Results) -> Figure:
    """Squared error over the paper's: a row for each code, a marker for each setting."""
    return dots(
        {
            NAMES[name]: {
                case: {
                    code: found["codes"][code]["against paper"]["mse"][0]
                    for code in [*shown(found["codes"]), "paper, ordered"]
                }
                for case, found in results["batches"][name]["main"].items()
            }
            for name in ("lenet5", "vit", "repvgg")
        },
        "squared error over the paper's",
    )


def distances(results: Results) -> Figure:
    """Squared error over the outputs' variance at (24, 20, 4), a row for each data set."""
    cases = {name: of["(24, 20, 4)"]["codes"] for name, of in results["distances"].items()}
    series = {
        code: {n: codes[code]["mse_to_variance"][0] for n, codes in cases.items() if code in codes}
        for code in ("mean", "before", "chosen", "with a stem")
    }
    return dots({"(N, K, S) = (24, 20, 4)": series}, "squared error over the variance of outputs")


def surrogates(results: Results) -> Figure:
    """Squared error over the paper's, without a student and with it, a row for each code."""
    found = {name: of["errors"]["(6, 4, 2)"]["64"] for name, of in results["surrogates"].items()}
    return dots(
        {
            NAMES[name]: {
                f"{how} a student": {
                    code: each[how]["against paper"][0]
                    for code, each in of["codes"].items()
                    if how in each
                }
                for how in ("without", "with")
            }
            for name, of in found.items()
        },
        "squared error over the paper's",
    )


def work(results: Results) -> Figure:
    """The tail of requests against the work that it costs, for few parts and for many."""
    points = results["waiting"]["fan-out"]
    figure, every = panels([f"a request waits for {parts} parts" for parts in ("4", "128")])
    for axes, parts in zip(every, ("4", "128"), strict=True):
        for marker, (policy, found) in zip(MARKERS, points[parts]["policies"].items(), strict=True):
            at = 1 + found["extra work"], found["p99.9"]
            axes.plot(*at, marker, label=name_of(policy), markersize=8)
            if found["predicted"] > 1e-3:
                text = f"{100 * found['predicted']:.1f} % predicted"
                axes.annotate(text, at, xytext=(8, -3), textcoords="offset points", fontsize=7)
        axes.set_yscale("log")
        axes.set_xlabel("work (1: every row is computed once)")
        axes.margins(x=0.25)
    every[0].set_ylabel("p99.9, in medians of a part")
    return legend(figure, 4)


def latency(results: Results) -> Figure:
    """Percentiles of every policy, a panel for each case."""
    return dots(
        {
            case: {
                at: {policy: numbers[at] for policy, numbers in found["policies"].items()}
                for at in ("p50", "p99", "p99.9")
            }
            for case, found in results["latency"].items()
        },
        "latency from arrival, ms",
    )


def processes(results: Results) -> Figure:
    """The p99.9 of latency against extra work, on processes, with the share of exact answers."""
    measured = results["latency"]["load 0.4, 3 % delayed"]["policies"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for marker, (key, name) in zip(MARKERS, ON_PROCESSES.items(), strict=False):
        found = measured[key]
        exact = f"{name}: {1 - found['predicted']:.1%} exact"
        axes.plot(found["work"] - 1, found["p99.9"], marker, label=exact, markersize=8)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("extra work")
    axes.set_ylabel("p99.9 of latency, ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    return figure


def convergence(results: Results) -> Figure:
    """Squared error against workers, each beside the theorem's bound through its first point."""
    laws = (("S fixed", "no noise"), ("S fixed", "noise"), ("each with p = 0.05", "no noise"))
    of = {
        f"{name_of(task)}, {law}, {noise}": found[law][noise]
        for task, found in results["convergence"].items()
        for law, noise in laws
    }
    figure, every = panels(list(of), rows=2, height=2.6)
    for axes, each in zip(every, of.values(), strict=True):
        for code in ("spline", "Berrut"):
            curve(axes, each["workers"], each[code]["mse"], code)
            if "bound" in each[code]:
                bound = each[code]["mse"][0][0] * np.array(each[code]["bound"])
                axes.plot(each["workers"], bound, "--", color=STYLES[code]["color"])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("N; dashed: the theorem's rate")
    return legend(figure, 2)


def verification(results: Results) -> Figure:
    """Wrong rows that reach the caller against extra work, all of them and those that do harm."""
    measured = results["verification"]
    points = {share: (measured["work"][share], of) for share, of in measured["left"].items()}
    points |= {
        name: (of["work"], of) for name, of in measured["peers"].items() if name != "seconds"
    }
    methods = [(work - 1, of["faults"]) for work, of in points.values()]
    methods.sort(key=operator.itemgetter(0))
    faults = ("noise .3", "noise .05", "block", "one row", "one output", "exponent")
    figure, every = panels(["all wrong rows", "harmful rows: another class, or off by .1"])
    for axes, key in zip(every, ("", "harmful "), strict=True):
        for n, fault in enumerate(faults):
            made = [of[fault][key.strip() or "wrong"] for _, of in methods]
            if min(made) < FEWEST_ROWS:
                continue
            shares = [of[fault][f"{key}left"] / x for (_, of), x in zip(methods, made, strict=True)]
            extra = [work for work, _ in methods]
            style = {"marker": MARKERS[n], "color": f"C{n}", "markersize": 5, "linewidth": 1}
            axes.plot(extra, shares, label=fault, **style)
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xticks([0, 0.01, 0.1, 1, 2], ["0", "1 %", "10 %", "100 %", "200 %"])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("extra work (up to 10 %: verify=.01 to .1; from 100 %: votes)")
        axes.set_ylabel("left")
    return legend(figure, len(faults))


PICTURES = {
    "accuracy": accuracy,
    "accuracy-softmax": functools.partial(accuracy, output="softmax"),
    "accuracy-contiguous": functools.partial(accuracy, law="contiguous"),
    "batches": batches,
    "distances": distances,
    "surrogates": surrogates,
    "work": work,
    "latency": latency,
    "processes": processes,
    "convergence": convergence,
    "verification": verification,
}
