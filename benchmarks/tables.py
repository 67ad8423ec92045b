"""The tables of READMEs and pages: which numbers of the results they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["NAMES", "PAGES", "TABLES", "Column", "Page", "Table"]

#: A path below a row's with the format of its number, or a function of the stars and the value.
Column = str | Callable[[Sequence[str], Any], str]


class Table(NamedTuple):
    """A table with a row for every match of a path.

    Attributes:
        rows: the path.
        heads: the headings of what its stars stand for.
        columns: the columns by their headings.
        spread: whether the last star's matches are columns, of the only column's values.
    """

    rows: str
    heads: tuple[str, ...]
    columns: Mapping[str, Column]
    spread: bool = False


class Page(NamedTuple):
    """A page of long tables, each with its heading, and pictures, each with its description."""

    title: str
    text: str
    tables: Mapping[str, str]
    pictures: Sequence[tuple[str, str]] = ()


#: Keys of the results as readers know them. Results of version 0.2 have the names of then.
NAMES = {
    "lenet5": "LeNet-5, MNIST",
    "vit": "ViT, Fashion-MNIST",
    "repvgg": "RepVGG, Fashion-MNIST",
    "spline": "spline, as in the paper",
    "Berrut": "Berrut, as in the paper",
    "KernelCode": "RegressionCode",
    "KernelCode, tuned": "RegressionCode, tuned",
    "default": "RegressionCode",
    "before": "one metric and length for all",
    "chosen": "metric and length chosen",
    "three re-asks, split": "up to three hedges, split",
    "three re-asks, whole": "up to three hedges, whole",
    "three re-asks": "up to three hedges",
    "predict at 3 medians of a part": "`Waiting(deadline=3)`",
    "predict at 3 medians of whole calls": "`Waiting()`",
    "hedge, predict": "`Waiting()`",
    "hedge, deadline": "`Waiting(deadline=...)`",
    "hedge at the fence": "hedge at the hedging threshold",
    "coded at once": "all N at once, the paper's way",
}
#: The spline's gains over Berrut's code that the paper states, averaged over stragglers: by how
#: many percent RMSE is lower, by how many points accuracy is higher. There, RepVGG is trained on
#: CIFAR-10 and the ViT on ImageNet.
PAPER = {"lenet5": (15, 2), "repvgg": (17, 5), "vit": (9, 4)}
KEPT = 0.99  # of the network's accuracy

Cell = Callable[[Sequence[str], Any], str]


def kept(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """The most lost workers, of those measured, up to which a code keeps the accuracy."""
    curves = {
        f"{NAMES[name]} {case}": (found["stragglers"], found["logits"]["uniform"])
        for name, cases in results["accuracy"].items()
        for case, found in cases.items()
        if name in PAPER
    }
    yield ["", *curves]
    for code in next(iter(curves.values()))[1]:
        cells = []
        for counts, codes in curves.values():
            accuracy = (value for value, _ in codes[code]["relative_accuracy"])
            lost = next((i for i, value in enumerate(accuracy) if value < KEPT), len(counts))
            cells.append(str(counts[lost - 1]) if lost else f"< {counts[0]}")
        yield [NAMES.get(code, code), *cells]


def tail(stars: Sequence[str], found: Mapping[str, Any]) -> str:
    """The latency that one request in a thousand exceeds, and the share of predicted answers."""
    share = f", {100 * found['predicted']:.2g} %" if found["predicted"] else ""
    return f"{found['p99.9']:.1f}{share}"


def found_wrong(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """The share of wrong rows that reach the caller, by fault, and the work of honest requests."""
    measured = results["verification"]
    checked = {
        f"`verify={share}`": {"work": measured["work"][share], **found}
        for share, found in measured["left"].items()
    }
    peers = {name: found for name, found in measured["peers"].items() if name != "seconds"}
    methods = {"nothing": peers.pop("nothing"), **checked, **peers}
    yield ["", "work", *methods["nothing"]["faults"]]
    for method, found in methods.items():
        shares = (f"{100 * each['share left']:.3g} %" for each in found["faults"].values())
        yield [method, f"{found['work']:.3f}", *shares]


def claimed(which: int) -> Cell:
    return lambda stars, found: str(PAPER[stars[0]][which]) if stars[0] in PAPER else ""


def off(part: str) -> Cell:
    """The best smoothing, and what a tenth of it and ten times of it add to the RMSE."""

    def cell(stars: Sequence[str], found: Mapping[str, Any]) -> str:
        costs = found["a factor of ten off"][part].values()
        added = ", ".join(f"{100 * ratio - 100:+.0f} %" for ratio, _ in costs)
        return f"{found['best'][part]:g}" + (f" ({added})" if added else "")

    return cell


def number(stars: Sequence[str], found: Any) -> str:
    """A number, beside its bar if it has one."""
    pair = found if isinstance(found, list) else [found]
    return ", bar ".join(f"{x:g}" for x in pair) if isinstance(pair[0], int | float) else ""


def missed(stars: Sequence[str], pair: Any) -> str:
    """Whether a number misses its bar; minus signs turn a bar around."""
    return "missed" if pair[0] > pair[1] else ""


SETTING = "(N, K, S)"
FEW = "errors > (6, 4, 2) > 64 > codes"
GAIN = "fidelity > relative accuracy higher by points > averaged:.1f"
LATENCY = {f"{at}, ms": f"{at}:.1f" for at in ("p50", "p99", "p99.9")}
LATENCIES = LATENCY | {
    "work": "work:.3f",
    "predicted": "predicted:.2%",
    "right answers": "accuracy:.2%",
}
PARTS = {part: f"{part} > 0:.2f" for part in ("plan", "encode", "decode", "decode again")}
MAIN = {
    name: f"codes > {code} > relative_accuracy:.3f"
    for name, code in (
        ("the paper's scheme", "paper"),
        ("replication, batch mean", "replication, batch mean"),
        ("`RegressionCode`", "KernelCode"),
    )
} | {"squared error": "codes > KernelCode > against paper > mse > 0:.3f"}
SCORES = {
    "accuracy kept": "relative_accuracy:.3f",
    "squared error / variance": "mse_to_variance:.4f",
    "over the paper's": "against paper > mse:.3f",
    "over replication's with the batch mean": "against replication, batch mean > mse:.3f",
}
BARS = {"measured": "0:g", "bar": "1:g", "": missed}
TABLES: dict[str, Table | Callable[[Mapping[str, Any]], Iterable[list[str]]]] = {
    "main": Table("batches > lenet5 > main > *", (SETTING,), MAIN),
    "kept": kept,
    "fidelity": Table(
        "accuracy > * > *",
        ("", "(N, K)"),
        {
            "RMSE lower by, %": "fidelity > rmse lower by % > averaged:.1f",
            "in the paper": claimed(0),
            "mean error lower by, %": "fidelity > rmse_mean lower by % > averaged:.1f",
            "accuracy higher by, points": GAIN,
            "there": claimed(1),
        },
    ),
    "batches": Table(
        "batches > * > main > (24, 20, 4) > codes > *",
        ("",),
        {"": "relative_accuracy > 0:.3f"},
        spread=True,
    ),
    "codes": Table("batches > * > main > * > codes > *", ("", SETTING, ""), SCORES),
    "expected": Table(
        "batches > * > main > *",
        ("", SETTING),
        {
            "expected over measured RMSE": "codes > KernelCode > predicted_to_measured:.2f",
            "a batch is off by": "codes > KernelCode > prediction_off_by:.0%",
        },
    ),
    "sizes": Table("batches > * > batch > * > codes > *", ("", "batch", ""), SCORES),
    "distances": Table(
        "distances > * > (24, 20, 4)",
        ("data",),
        {
            "error / variance": "codes > chosen > mse_to_variance:.4f",
            "the batch's mean": "codes > mean > against chosen > mse > 0:.1f",
            "one metric for all": "codes > before > against chosen > mse > 0:.2f",
            "a stem competing": "codes > with a stem > against chosen > mse > 0:.2f",
            "expected error / measured": "codes > chosen > expected_to_measured:.2f",
        },
    ),
    "metrics": Table(
        "distances > * > * > codes > *",
        ("data", SETTING),
        {"": "against chosen > mse > 0:.2f"},
        True,
    ),
    "surrogates_main": Table(
        "surrogates > *",
        ("",),
        {
            "the paper's scheme": f"{FEW} > paper > without > relative_accuracy > 0:.3f",
            "`RegressionCode`": f"{FEW} > default > without > relative_accuracy > 0:.3f",
            "with a memory": "memory > third 3 > relative_accuracy > 0:.3f",
            "with a student": f"{FEW} > default > with > relative_accuracy > 0:.3f",
            "replication with a student": f"{FEW} > replication > with > relative_accuracy > 0:.3f",
        },
    ),
    "students": Table(
        "surrogates > * > errors > * > * > codes > *",
        ("", SETTING, "batch", ""),
        {
            "error over the paper's": "without > against paper > 0:.4f",
            "with the student": "with > against paper > 0:.4f",
            "accuracy kept": "without > relative_accuracy:.4f",
            "with the student, too": "with > relative_accuracy:.4f",
        },
    ),
    "memories": Table(
        "surrogates > * > memory > *", ("",), {"": "against without:.3f"}, spread=True
    ),
    "drift": Table("surrogates > * > drift > *", ("", ""), {"error": "against without:.3f"}),
    "useless": Table(
        "surrogates > * > useless > * > * > *", ("", "batch", "code"), {"": "0:.4f"}, spread=True
    ),
    "waiting": Table(
        "waiting > regimes > * > policies > *", ("workers / parts",), {"": tail}, spread=True
    ),
    "fan_out": Table("waiting > fan-out > * > policies > *", ("parts",), {"": tail}, spread=True),
    "latency": Table(
        "latency > * > policies > *",
        ("", ""),
        LATENCIES,
    ),
    "failed": Table("resilience > * > bars > failed", ("",), {"calls failed": "0:g", "bar": "1:g"}),
    "verification": found_wrong,
    "resilience": Table("resilience > * > bars > *", ("", ""), BARS),
    "serving": Table("serving > faults > *", ("LeNet-5, under faults",), {"measured": number}),
    "convergence": Table(
        "convergence > * > * > *",
        ("", "lost", ""),
        {
            "spline": "spline > slope:.2f",
            "its bound": "spline > slope of the bound:.2f",
            "Berrut": "Berrut > slope:.2f",
            "Berrut's bound": "Berrut > slope of the bound:.2f",
        },
    ),
    "smoothing": Table(
        "smoothing > * > * > surfaces > * > *",
        ("", SETTING, "outputs", ""),
        {"encoder": off("encoder"), "decoder": off("decoder")},
    ),
    "times": Table("end_to_end > * > * > * > codes > *", ("", "", SETTING, "code"), PARTS),
    "network_times": Table(
        "end_to_end > * > * > * > network > *",
        ("", "", SETTING),
        {"": "0:.1f"},
        spread=True,
    ),
}
PAGES = {
    "codes": Page(
        "Codes",
        "All codes answer the same held-out batches of 240 from the same received sets. Intervals "
        "are 95 % over batches, paired where codes are compared.",
        {
            "fidelity": "The spline's gain over Berrut's code, as the paper measures it",
            "codes": "Six settings",
            "expected": "The error that RegressionCode expects",
            "sizes": "Batches of other sizes and kinds, (24, 20, 4)",
        },
        [
            ("accuracy-softmax", "accuracy lost, softmax outputs"),
            ("accuracy-contiguous", "accuracy lost, neighbouring workers"),
        ],
    ),
    "metrics": Page(
        "Metrics",
        "Squared error of the regression with each metric alone, relative to the choice among all.",
        {"distances": "The choice among all, (24, 20, 4)", "metrics": "Each metric alone"},
    ),
    "surrogates": Page(
        "Surrogates",
        "Squared errors are relative to those of the paper's scheme without a surrogate. Below, to "
        "those of the same code without one.",
        {
            "students": "Students",
            "memories": "A memory, by thirds of a stream that starts cold",
            "drift": "A memory that knows five classes, asked about the other five",
            "useless": "Surrogates that do not fit",
        },
    ),
    "waiting": Page(
        "Waiting",
        "Latencies that one request in a thousand exceeds, in medians of a part, and the share of "
        "predicted answers, simulated. Then percentiles on real processes.",
        {"waiting": "By regime", "fan_out": "By the number of parts", "latency": "Real processes"},
    ),
    "resilience": Page(
        "Resilience",
        "Times are milliseconds. A minus sign turns a bar around.",
        {"resilience": "Bars"},
    ),
    "theory": Page(
        "Theory",
        "Rates and smoothings that papers state, measured.",
        {
            "convergence": "Slopes of the logarithm of the error over that of N",
            "smoothing": "The best smoothing, and the cost of a tenth and of ten times of it",
        },
    ),
    "time": Page(
        "Time",
        "Milliseconds of one batch of 240, medians. All codes start with nothing cached.",
        {"times": "Codes", "network_times": "The networks, and the two parts of ordering"},
    ),
}
