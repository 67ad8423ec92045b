"""The pictures of the results.

All are five inches wide, so that 9 points are 10 pixels where a telephone shows 400. Their ground
is white, also on dark pages.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from coded_torch.codes import SplineCode
from coded_torch.demo import digits, lenet5

from .names import NAMES

STYLES = {  # one style for a scheme in every picture
    "spline": {"color": "tab:red", "linestyle": ":"},
    "the paper's scheme": {"color": "tab:red", "linestyle": ":"},
    "Berrut": {"color": "tab:purple", "linestyle": ":"},
    "the paper's, ordered": {"color": "tab:red", "linestyle": "--"},
    "Lagrange": {"color": "tab:green", "linestyle": "-.", "marker": "^"},
    "replication": {"color": "tab:olive", "marker": "x"},
    "no redundancy, surrogate": {"color": "tab:brown", "marker": "v"},
    "surrogate alone": {"color": "0.5", "linestyle": "-."},
    "no redundancy, regression": {"color": "tab:orange", "marker": "s"},
    "regression": {"color": "tab:blue", "marker": "o"},
    "regression, residuals": {"color": "black", "marker": "."},
}
HIDDEN = ("Berrut", "spline")  # Berrut's line would hide the paper's
LEAST_LOSS = 1e-4  # drawn where nothing is lost, as a logarithm has no zero
MARKERS = "os^DXv."
WIDTH, DPI = 5.0, 160  # inches, and pixels per inch
FAULTS = "hung, corrupted, killed"
# Requests by client (benchmarks/fleet.py). Of fewer answers, latencies are not shown.
REQUESTS = {"ours": 4000, "Ray Serve": 300}
MOST_ANSWERED = 0.99
FIRST_DIGIT, LOST = 13, (3, 9, 14, 21)

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


def panels(
    titles: Sequence[str], across: int, height: float, lines: int
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each title, so many side by side, all of one style.

    A panel is so many inches high; so many lines of a legend stand below.
    """
    rows = -(-len(titles) // across)
    size = WIDTH, height * rows + 0.18 * lines + 0.2
    figure = Figure(figsize=size, layout="constrained")
    every = list(figure.subplots(rows, across, squeeze=False).flat)
    for axes, title in zip(every, titles, strict=False):
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=9)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
    for axes in every[len(titles) :]:
        axes.axis("off")
    return figure, every[: len(titles)]


def legend(figure: Figure, columns: int, of: int = 0) -> Figure:
    handles = figure.axes[of].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=9)
    return figure


def accuracy(results: Results) -> Figure:
    """Draw the accuracy that is lost against lost workers."""
    of = {
        f"{name_of(name)}, (N, K) = {case}": found
        for name, cases in results["accuracy"].items()
        for case, found in cases.get("curve", {}).items()
    }
    figure, every = panels(list(of), 1, 2.3, 8)
    for axes, found in zip(every, of.values(), strict=True):
        for scheme in shown(found["schemes"]):
            values = found["schemes"][scheme]["relative_accuracy"]
            lost = [[max(1 - value, LEAST_LOSS), half] for value, half in values]
            curve(axes, found["stragglers"], lost, scheme)
        axes.set_yscale("log")
        axes.set_ylim(0.8 * LEAST_LOSS, 1.2)
        axes.set_yticks([1, 0.1, 0.01, 0.001, LEAST_LOSS], ["all", "10 %", "1 %", "0.1 %", "none"])
        axes.set_xlabel("workers lost")
        axes.set_ylabel("accuracy lost")
    return legend(figure, 1)


def requests(client: str) -> int:
    """Return the number of requests that a client sent."""
    return next((n for name, n in REQUESTS.items() if client.startswith(name)), 1000)


def fleet(results: Results) -> Figure:
    """Draw how many requests of 1,000 were answered while servers fail, and how soon.

    Latencies are of answered requests, so those of a client that lost many would mislead.
    """
    clients = results["fleet"]["faults"][FAULTS]
    answered = {client: 1 - found["lost"] / requests(client) for client, found in clients.items()}
    order = sorted(clients, key=lambda x: (answered[x] >= MOST_ANSWERED, -clients[x]["p99.9"]))
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([name_of(client) for client in order], [answered[x] for x in order])
    for bar, client in zip(bars, order, strict=True):
        bar.set_color("tab:blue" if client.startswith("ours") else "0.7")
        said = f" {1000 * answered[client]:,.0f}"
        if answered[client] >= MOST_ANSWERED:
            said += f", {clients[client]['p99.9']:.0f} ms"
        axes.text(answered[client], bar.get_y() + bar.get_height() / 2, said, va="center", size=9)
    axes.set_xlim(0, 1.5)
    axes.set_title("answered of 1,000 requests, and p99.9 of their latency", size=9.5, loc="right")
    axes.tick_params(labelsize=9)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def decoded_digits() -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Return digits, their coded inputs, the classes decoded without four, and the model's."""
    model = lenet5()
    images, _ = digits()
    distances = (images - images[FIRST_DIGIT]).flatten(1).norm(dim=1)
    batch = images[distances.argsort()[:20]]
    code = SplineCode(20, 24)
    received = [n for n in range(24) if n not in LOST]
    with torch.no_grad():
        plan = code.plan([batch])
        coded = plan.encode(batch)
        answers = plan.decode(torch.stack([model(coded[n]) for n in received]), received)
        computed = model(batch).argmax(1).tolist()
    return batch, coded, answers.argmax(1).tolist(), computed


def coded_digits(_: Results) -> Figure:
    """Draw digits, their coded inputs of which four are lost, and the classes decoded."""
    batch, coded, decoded, computed = decoded_digits()
    figure = Figure(figsize=(WIDTH, 1.75), layout="constrained")
    blocks = figure.subfigures(1, 3, width_ratios=(5, 6, 5))
    wrong = sum(map(operator.ne, decoded, computed))
    titles = "20 digits", "24 workers, four lost", f"20 answers, {wrong} wrong"
    for block, title, columns in zip(blocks, titles, (5, 6, 5), strict=True):
        block.suptitle(title, fontsize=9)
        for axes in block.subplots(4, columns, gridspec_kw={"wspace": 0, "hspace": 0}).flat:
            axes.set_axis_off()
    for axes, image in zip(blocks[0].axes, batch, strict=True):
        axes.imshow(image[0].numpy(), cmap="gray_r")
    for n, axes in enumerate(blocks[1].axes):
        axes.imshow(coded[n, 0, 0].numpy(), cmap="gray_r", alpha=0.3 if n in LOST else 1.0)
        if n in LOST:
            axes.plot([4, 23], [4, 23], "tab:red", linewidth=1.5)
            axes.plot([4, 23], [23, 4], "tab:red", linewidth=1.5)
    for axes, found, own in zip(blocks[2].axes, decoded, computed, strict=True):
        colour = "black" if found == own else "tab:red"
        axes.text(0.5, 0.5, str(found), size=13, color=colour, ha="center", va="center")
    return figure


def convergence(results: Results) -> Figure:
    """Draw squared errors against workers, beside the theorem's bound through the first point."""
    of = {
        f"{name_of(task)}{', ' if len(name_of(task)) < 12 else chr(10)}{noise}": found["S fixed"][
            noise
        ]
        for task, found in results["convergence"].items()
        for noise in ("no noise", "noise")
    }
    figure, every = panels(list(of), 2, 1.9, 3)
    for axes, each in zip(every, of.values(), strict=True):
        for code in ("spline", "Berrut", "replication"):
            curve(axes, each["workers"], each[code]["mse"], code)
            if "bound" in each[code]:
                bound = each[code]["mse"][0][0] * np.array(each[code]["bound"])
                label = f"{name_of(code)}, the theorem's rate"
                axes.plot(each["workers"], bound, "--", color=STYLES[code]["color"], label=label)
        if each["floor"]:
            axes.axhline(each["floor"], color="0.5", linewidth=1, label="floor of float32")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("workers")
        axes.set_ylabel("squared error")
    return legend(figure, 2, of=-1)


def letcc(results: Results) -> Figure:
    """Draw the RMSE of each scheme over S, by network, N and K."""
    of = {
        f"{name}, (N, K) = {setting}": found["lost"]
        for name, settings in results["letcc"]["networks"].items()
        for setting, found in settings.items()
    }
    figure, every = panels(list(of), 2, 2.0, 4)
    for axes, by_lost in zip(every, of.values(), strict=True):
        lost = [int(key.removeprefix("S = ")) for key in by_lost]
        for name in next(iter(by_lost.values())):
            intervals = [schemes[name]["rmse"] for schemes in by_lost.values()]
            if max(value for value, _ in intervals) < LEAST_LOSS:  # a logarithm has no zero
                continue
            curve(axes, lost, [[max(x, LEAST_LOSS), half] for x, half in intervals], name)
        axes.set_yscale("log")
        axes.set_xlabel("workers lost, S")
        axes.set_ylabel("RMSE")
    return legend(figure, 2)


def coverage(results: Results) -> Figure:
    """Coverage against its nominal level, and bounds against the oracle's, by data set."""
    titles = "errors within their bound", "median bound over the oracle's"
    figure, every = panels(titles, 1, 2.3, 6)
    for n, (name, settings) in enumerate(results["coverage"].items()):
        found = {level: of for level, of in settings["B 240"].items() if level[:2] == "0."}
        nominal = [float(level) for level in found]
        style = {"marker": MARKERS[n % len(MARKERS)], "color": f"C{n}", "markersize": 4}
        covered = [of["covered"][0] for of in found.values()]
        every[0].plot(nominal, covered, label=name_of(name), linewidth=1, **style)
        ratios = [of["bound to constant"] for of in found.values()]
        every[1].plot(nominal, ratios, linewidth=1, **style)
    every[0].plot([0.9, 0.99], [0.9, 0.99], color="0.6", linestyle=":", label="as nominal")
    every[0].set_ylabel("share of errors")
    every[1].set_ylabel("ratio")
    for axes in every:
        axes.set_xlabel("nominal coverage")
        axes.set_xticks([0.9, 0.95, 0.99])
    return legend(figure, 2)


def mean(results: Results) -> Figure:
    """Draw half widths of means against the share of computed rows, beside sampling's."""
    found = {name: of["curve"] for name, of in results["mean"].items() if "curve" in of}
    figure, every = panels([name_of(name) for name in found], 2, 1.9, 1)
    for axes, of in zip(every, found.values(), strict=True):
        for key, label in (("sampling", "sampling"), ("ours", "CodedWrapper.mean")):
            colour = {"color": "tab:blue" if key == "ours" else "0.5"}
            axes.plot(of["share"], of[key], "o-", markersize=3, label=label, **colour)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([0.03, 0.1, 0.3, 0.9], ["3 %", "10 %", "30 %", "90 %"])
        axes.minorticks_off()
        axes.set_xlabel("rows computed")
        axes.set_ylabel("half width / spread")
    return legend(figure, 2)


PICTURES = {
    "coded_digits": coded_digits,
    "accuracy": accuracy,
    "fleet": fleet,
    "convergence": convergence,
    "letcc": letcc,
    "coverage": coverage,
    "mean": mean,
}
