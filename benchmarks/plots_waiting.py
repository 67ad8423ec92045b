"""The pictures of waiting and serving, from the JSON alone."""

from __future__ import annotations

from matplotlib.figure import Figure

from .plots import Results

__all__ = ["FIGURES"]


def work(results: Results) -> Figure:
    """The tail of requests against the work that it costs, for few parts and for many."""
    styles = {
        "wait for all": ("wait for all", "0.6", "."),
        "one hedge": ("one hedge", "tab:orange", "s"),
        "three re-asks, split": ("up to three re-asks", "tab:green", "^"),
        "coded at once": ("the paper's way: all at once", "tab:red", "X"),
        "predict at 3 medians of whole calls": ("Waiting()", "tab:blue", "o"),
        "predict at 3 medians of a part": ("Waiting(deadline=...)", "black", "D"),
    }
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    points = results["waiting"]["fan-out"]
    for axes, parts in zip(figure.subplots(1, 2, sharey=True), ("4", "128"), strict=True):
        for policy, (label, color, marker) in styles.items():
            found = points[parts]["policies"][policy]
            at = 1 + found["extra work"], found["p99.9"]
            axes.plot(*at, marker, color=color, label=label, markersize=8)
            if found["predicted"] > 1e-3:
                text = f"{100 * found['predicted']:.1f} % predicted"
                axes.annotate(text, at, xytext=(8, -3), textcoords="offset points", fontsize=7)
        axes.set_yscale("log")
        axes.set_xlabel("work (1: every input is computed once)", fontsize=8)
        axes.set_title(f"a request waits for {parts} parts", fontsize=9)
        axes.margins(x=0.25)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("p99.9, in medians of a part", fontsize=8)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), fontsize=7, ncols=3, loc="outside lower center"
    )
    return figure


def fan_out(results: Results) -> Figure:
    """The tail of requests of more and more parts, a line for each waiting policy."""
    lines = {  # the policies; what is exact is green, what predicts is blue
        "wait for all": ("wait for all", "0.6", "."),
        "one hedge": ("one hedge, the best of five", "tab:orange", "s"),
        "three re-asks, split": ("up to three re-asks, split", "tab:green", "^"),
        "coded at once": ("coded at once, the paper's way", "tab:red", "x"),
        "predict at 3 medians of whole calls": ("Waiting(), the default", "tab:blue", "o"),
        "predict at 3 medians of a part": ("Waiting(deadline=3 medians)", "black", "o"),
    }
    points = results["waiting"]["fan-out"]
    widest = points[max(points, key=int)]["policies"]
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for policy, (label, color, marker) in lines.items():
        tails = [found["policies"][policy]["p99.9"] for found in points.values()]
        work = 100 * widest[policy]["extra work"]
        predicted = 100 * widest[policy]["predicted"]
        label = f"{label}: {work:.1f} % more work, {predicted:.2g} % predicted"
        axes.plot([int(n) for n in points], tails, marker=marker, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([int(n) for n in points], list(points))
    axes.set_xlabel("parts that a request waits for")
    axes.set_ylabel("p99.9 of latency, medians of a part")
    axes.grid(alpha=0.3, which="both")
    title = f"more work and predicted answers at {max(points, key=int)} parts"
    place = "outside lower center"
    figure.legend(fontsize=7, title=title, title_fontsize=7, loc=place, ncols=2)
    return figure


def latency(results: Results) -> Figure:
    """Percentiles of every policy, a panel for each case."""
    cases, at = results["latency"], ("p50", "p99", "p99.9")
    rows = list(dict.fromkeys(name for found in cases.values() for name in found["policies"]))
    figure = Figure(figsize=(2.6 * len(cases) + 1.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, (case, found) in zip(panels, cases.items(), strict=True):
        policies = found["policies"]
        for percentile, marker in zip(at, (".", "s", "o"), strict=True):
            times = [policies[name][percentile] for name in rows if name in policies]
            where = [row for row, name in enumerate(rows) if name in policies]
            axes.plot(times, where, marker, label=percentile, markersize=5)
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_title(case, fontsize=8)
        axes.set_xlabel("latency from arrival, ms", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3, which="both")
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=7)
    return figure


def serving(results: Results) -> Figure:
    """Through HTTP, under kills: the share of requests that take longer than a time."""
    found = results["serving"]["redundancy"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    styles = {"coded": "tab:blue", "uncoded": "0.5", found["best hedge"]: "tab:orange"}
    for policy, colour in styles.items():
        axes.plot(found["latencies"][policy], found["slower shares"], color=colour, label=policy)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("latency through HTTP from when a request was due, ms")
    axes.set_ylabel("share of requests that take longer")
    axes.set_title("6 processes, 3 % of calls delayed by 50 ms, one killed every 5 s")
    axes.grid(which="major", alpha=0.3)
    axes.legend(frameon=False)
    return figure


FIGURES = {
    "work": work,
    "fan-out": fan_out,
    "latency": latency,
    "serving": serving,
}
