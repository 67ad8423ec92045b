"""The pictures of the results, from the JSON alone; ``report.py`` writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["FIGURES", "LABELS", "NAMES", "STYLES", "curve", "shown"]

NAMES = {
    "lenet5": "LeNet-5, MNIST",
    "vit": "ViT, Fashion-MNIST",
    "repvgg": "RepVGG, Fashion-MNIST",
    "efficientnet-lite0": "EfficientNet-Lite0, 20 photographs",
}
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
LABELS = {
    "spline": "spline, as in the paper",
    "Berrut": "Berrut, as in the paper",
    "KernelCode": "KernelCode, recommended",
}
HIDDEN = ("Berrut",)  # which would hide the spline of the paper
LEAST_LOSS = 1e-4  # shown where nothing is lost, as a logarithm has no zero
LEAST_ERROR = 1e-5  # likewise

Results = Mapping[str, Any]


def shown(codes: Iterable[str]) -> list[str]:
    """Those of the codes that pictures show, in the order of :data:`STYLES`."""
    return [code for code in STYLES if code in set(codes) - set(HIDDEN)]


def curve(
    axes: Axes, x: Any, intervals: list[list[float | None]], name: str, label: str | None = None
) -> None:
    """A code's line, with its interval as a band."""
    value, half = np.array(intervals, dtype=float).T
    style = {"markersize": 4, "linewidth": 1.3, **STYLES[name]}
    axes.plot(x, value, label=label or LABELS.get(name, name), **style)
    axes.fill_between(x, value - half, value + half, color=style["color"], alpha=0.12, linewidth=0)


def accuracy(results: Results, output: str = "logits", law: str = "uniform") -> Figure:
    """The accuracy that is lost, against stragglers, a line a code."""
    panels = [
        (name, case, found)
        for name, cases in results["accuracy"].items()
        for case, found in cases.items()
    ]
    figure = Figure(figsize=(10, 3.1 * -(-len(panels) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
    for axes, (name, case, found) in zip(grid, panels, strict=False):
        photographs = name not in ("lenet5", "vit", "repvgg")
        measure = "agreement" if photographs else "relative_accuracy"
        for code in shown(found[output][law]):
            values = found[output][law][code][measure]
            lost = [[max(1 - value, LEAST_LOSS), half] for value, half in values]
            curve(axes, found["stragglers"], lost, code)
        axes.set_yscale("log")
        axes.set_ylim(0.8 * LEAST_LOSS, 1.2)
        axes.set_yticks([1, 0.1, 0.01, 0.001, LEAST_LOSS], ["all", "10 %", "1 %", "0.1 %", "none"])
        axes.set_title(f"{NAMES[name]}, (N, K) = {case}", fontsize=9)
        axes.set_xlabel("workers lost", fontsize=8)
        axes.set_ylabel("answers changed" if photographs else "accuracy lost", fontsize=8)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    for axes in list(grid):
        axes.axis("off")  # more places than panels
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(panels) % 2:
        figure.axes[-1].axis("off")
        figure.axes[-1].legend(handles, labels, loc="center", fontsize=9)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def convergence(results: Results) -> Figure:
    """Squared error against workers, each beside the theorem's bound through its first point."""
    found = results["convergence"]
    cases = (
        ("S fixed", "no noise", "{:g} lost"),
        ("S fixed", "noise", "{:g} lost, noise"),
        ("each with p = 0.05", "no noise", "lost with p = .05"),
        ("each with p = 0.2", "no noise", "lost with p = .2"),
    )
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    grid = figure.subplots(len(found), len(cases))
    for row, (task, laws) in zip(grid, found.items(), strict=True):
        for axes, (law, noise, title) in zip(row, cases, strict=True):
            each = laws[law][noise]
            n = np.array(each["workers"])
            for code in ("spline", "Berrut"):
                mse, half = np.array(each[code]["mse"], dtype=float).T
                color = STYLES[code]["color"]
                axes.plot(n, mse, "o-", color=color, markersize=3, label=code)
                least = np.maximum(mse - half, mse / 10)  # a logarithm has no zero
                axes.fill_between(n, least, mse + half, color=color, alpha=0.12, linewidth=0)
                if "bound" in each[code]:
                    bound = mse[0] * np.array(each[code]["bound"])
                    axes.plot(n, bound, color=color, linestyle=":", label=f"bound of {code}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            lost = title.format(each["stragglers"][0])
            axes.set_title(f"{NAMES.get(task, task)}, {lost}", fontsize=8)
            axes.set_xlabel("N", fontsize=8)
            axes.tick_params(labelsize=7)
        row[0].set_ylabel("mean squared error", fontsize=8)
    labels = figure.axes[2].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def smoothing(results: Results) -> Figure:
    """Error relative to the best on the grid of encoder and decoder smoothing."""
    grid = results["settings"]["smoothing"]["grid"]
    labels = ["0", *(f"{value:.0e}".replace("e-0", "e-") for value in grid[1:])]
    cases = results["smoothing"]["lenet5"]
    panels = [(case, noise) for case in cases for noise in ("noise 0.0", "noise 0.01")]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, (case, noise) in zip(figure.subplots(2, len(cases)).T.flat, panels, strict=True):
        surface = np.array(cases[case]["surfaces"]["logits"][noise]["rmse to best"])
        image = axes.imshow(
            np.log10(surface), vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto"
        )
        axes.set_title(f"(N, K, S) = {case}, {noise}", fontsize=8)
        axes.set_xticks(range(len(grid)), labels, rotation=90, fontsize=6)
        axes.set_yticks(range(len(grid)), labels, fontsize=6)
    figure.supxlabel("smoothing of the decoder", fontsize=8)
    figure.supylabel("of the encoder", fontsize=8)
    bar = figure.colorbar(image, ax=figure.axes, ticks=[0, np.log10(2), np.log10(5), 1])
    bar.set_ticklabels(["best", "2 x", "5 x", "10 x or more"], fontsize=7)
    return figure


def lagrange(results: Results) -> Figure:
    """Error against the number of results, for polynomial models."""
    panels = [
        (case, kind, found)
        for case, kinds in results["lagrange"].items()
        for kind, found in kinds.items()
    ]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axes, (case, kind, found) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for code, color in (("Lagrange", "tab:brown"), ("spline", "tab:red")):
            median, low, high = np.array(found["median error"][code], dtype=float).T
            axes.plot(found["received"], median, label=code, color=color, marker=".")
            axes.fill_between(found["received"], low, high, color=color, alpha=0.15, linewidth=0)
        axes.axvline(found["threshold"], color="0.5", linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(1e-16, 1e3)
        axes.set_title(f"{case}\n{kind} inputs", fontsize=8)
        axes.set_xlabel("results; dotted: Lagrange's threshold", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.axes[0].set_ylabel("relative error", fontsize=8)
    return figure


def adversaries(results: Results) -> Figure:
    """The accuracy that every lie costs, a panel for each network, at its first setting."""
    panels = [
        (name, *next(iter(kinds["main"].items()))) for name, kinds in results["adversaries"].items()
    ]
    styles = {
        "undefended": ("nobody looks", "0.6", "o"),
        "ApproxIFER": ("ApproxIFER", "tab:purple", "s"),
        "spline, reweighted": ("spline, reweighted", "tab:red", "s"),
        "spline, larger lambda": ("spline, larger lambda", "tab:pink", "s"),
        "oracle": ("liars known", "black", "|"),
        "located": ("ours", "tab:blue", "o"),
    }
    lies = list(panels[0][2]["lies"])
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, case, found) in zip(grid, panels, strict=True):
        for scheme, (label, color, marker) in styles.items():
            lost = [100 * (1 - found["lies"][x][scheme]["relative accuracy"][0]) for x in lies]
            size = 11 if marker == "|" else 6
            axes.plot(lost, range(len(lies)), marker, color=color, label=label, markersize=size)
        for y, lie in enumerate(lies):
            share = found["lies"][lie]["located"].get("detected")
            if share:
                place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
                axes.text(0.99, y, f"{100 * share[0]:.0f} % found", fontsize=7, **place)
        axes.set_yticks(range(len(lies)), lies, fontsize=8)
        axes.set_xlim(0, 1.25 * axes.get_xlim()[1])
        axes.set_title(f"{NAMES[name]}, (N, K, S, A) = {case}", fontsize=9)
        axes.set_xlabel("accuracy lost, %", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(alpha=0.3)
    grid[0].invert_yaxis()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def surrogates(results: Results) -> Figure:
    """Squared error over the paper's, without a student and with it, a row for each code."""
    case, size = "(6, 4, 2)", "64"
    panels = {
        name: found["errors"][case][size]["codes"] for name, found in results["surrogates"].items()
    }
    codes = list(next(iter(panels.values())))
    names = {"default": "KernelCode", "paper": "the paper's scheme"}
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(grid, panels.items(), strict=True):
        for y, code in enumerate(codes):
            start, end = (found[code][x]["against paper"][0] for x in ("without", "with"))
            color = "tab:blue" if code == "default" else "0.5"
            axes.plot([start, end], [y, y], color=color, linewidth=1.5)
            axes.plot(start, y, "o", color=color, markerfacecolor="white", markersize=7)
            axes.plot(end, y, "o", color=color, markersize=7)
            accuracy = f"{100 * found[code]['with']['relative_accuracy'][0]:.1f} %"
            axes.text(end, y - 0.28, accuracy, fontsize=7, ha="center", color=color)
        axes.set_yticks(range(len(codes)), [names.get(code, code) for code in codes], fontsize=8)
        axes.set_xscale("log")
        axes.set_title(f"{NAMES[name]}, (N, K, S) = {case}, batches of {size}", fontsize=8)
        axes.set_xlabel("squared error over the paper's", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(alpha=0.3)
    grid[0].invert_yaxis()
    return figure


def lost(results: Results) -> Figure:
    """Squared error against lost workers, a line a code; dashed: with a student."""
    cases = results["surrogates"]["lenet5"]["lost"]
    styles = {
        "paper": ("the paper's scheme", "tab:red"),
        "Berrut, ordered": ("Berrut, ordered", "tab:purple"),
        "Lagrange, ordered": ("Lagrange (adapted), ordered", "tab:brown"),
        "replication": ("replication", "tab:olive"),
        "default": ("KernelCode, recommended", "tab:blue"),
    }
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    at = [int(case.strip("()").split(", ")[2]) for case in cases]
    for code, (label, color) in styles.items():
        for how, line, marker in (("without", "-", "o"), ("with", "--", "^")):
            errors = [
                max(x["codes"][code][how]["mse"][0] / x["variance"], LEAST_ERROR)
                for x in cases.values()
            ]
            text = label if how == "without" else f"{label}, with a student"
            axes.plot(at, errors, line, marker=marker, color=color, label=text, markersize=4)
    axes.set_yscale("log")
    axes.set_xlabel("workers lost, of 60; 20 inputs a group")
    axes.set_ylabel("squared error over the outputs' variance")
    axes.set_title("LeNet-5 on MNIST, batches of 240", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    return figure


def distances(results: Results) -> Figure:
    """Squared error over the outputs' variance at (24, 20, 4), a row for each data set."""
    found = {
        NAMES.get(name, name): cases["(24, 20, 4)"]["codes"]
        for name, cases in results["distances"].items()
        if "(24, 20, 4)" in cases
    }
    styles = {
        "mean": ("the mean in place of a prediction", "tab:orange", "s"),
        "before": ("one metric and length for all", "0.6", "o"),
        "chosen": ("metric and length chosen", "tab:blue", "o"),
        "with a stem": ("a stem competing", "tab:green", "^"),
    }
    figure = Figure(figsize=(8, 0.6 + 0.26 * len(found)), layout="constrained")
    axes = figure.subplots()
    for code, (label, color, marker) in styles.items():
        rows = [
            (codes[code]["mse_to_variance"][0], y)
            for y, codes in enumerate(found.values())
            if code in codes
        ]
        axes.plot(*zip(*rows, strict=True), marker, color=color, label=label, markersize=5)
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("squared error over the variance of the outputs, (N, K, S) = (24, 20, 4)")
    axes.xaxis.label.set_size(8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


FIGURES = {
    "adversaries": adversaries,
    "surrogates": surrogates,
    "lost": lost,
    "accuracy": accuracy,
    "accuracy-softmax": lambda results: accuracy(results, output="softmax"),
    "accuracy-contiguous": lambda results: accuracy(results, law="contiguous"),
    "distances": distances,
    "convergence": convergence,
    "smoothing": smoothing,
    "lagrange": lagrange,
}
