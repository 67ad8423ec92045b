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
        heads: the headings of its stars' keys.
        columns: the columns by their headings.
        across: the number of the star whose matches are columns, of the only column's values.
            Defaults to None, none of them.
    """

    rows: str
    heads: tuple[str, ...]
    columns: Mapping[str, Column]
    across: int | None = None


class Page(NamedTuple):
    """A page of long tables, each with its heading, and pictures, each with its description."""

    title: str
    text: str
    tables: Mapping[str, str]
    pictures: Sequence[tuple[str, str]] = ()


#: Keys of the results as readers know them.
NAMES = {
    "lenet5": "LeNet-5, MNIST",
    "lenet5-tanh": "LeNet-5 with tanh, MNIST",
    "vit": "ViT, Fashion-MNIST",
    "repvgg": "RepVGG, Fashion-MNIST",
    "digits": "perceptron, table of digits",
    "speeches": "transformer, speeches",
    "table": "uniformly",
    "regression": "`RegressionCode`",
    "no redundancy, surrogate": "no redundancy, student on missing rows",
    "replication, surrogate": "replication, student on missing rows",
    "surrogate alone": "student alone, no worker",
    "regression, residuals": "`RegressionCode` on the student's residuals",
    "no redundancy, residuals": "no redundancy, regression on residuals",
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
#: The trivial baselines, of which no table of answers lacks one.
BASELINES = ("no redundancy, regression", "no redundancy, surrogate", "surrogate alone")
#: The spline's gains over Berrut's code that the paper states, averaged over stragglers: by how
#: many percent RMSE is lower, by how many points accuracy is higher. There, RepVGG is trained on
#: CIFAR-10 and the ViT on ImageNet.
PAPER = {"lenet5": (15, 2), "repvgg": (17, 5), "vit": (9, 4)}

Cell = Callable[[Sequence[str], Any], str]


def tail(stars: Sequence[str], found: Mapping[str, Any]) -> str:
    """Return the p99.9 of latency, and the share of predicted answers."""
    share = f", {100 * found['predicted']:.2g} %" if found["predicted"] else ""
    return f"{found['p99.9']:.1f}{share}"


def found_wrong(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield the share of wrong rows that reach the caller, and the work of honest requests."""
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


def changed(stars: Sequence[str], found: Mapping[str, Any]) -> str:
    """Return the rate of rows whose class is not the module's own, a rare one with its interval."""
    if not (rate := found.get("changed")):
        return ""
    ends = f" ({rate[1]:.2%} to {rate[2]:.2%})" if len(rate) == 3 else ""
    return f"{rate[0]:.2%}{ends}".replace("%", " %")


def local(stars: Sequence[str], found: Mapping[str, Any]) -> str:
    """Return the slopes between neighbouring numbers of workers, with their intervals."""
    pairs = found["spline"].get("local slopes", [])
    return ", ".join(f"{x:.1f} ± {half:.1f}" for x, half in pairs)


def number(stars: Sequence[str], found: Any) -> str:
    """Return a number, beside its bar if it has one."""
    pair = found if isinstance(found, list) else [found]
    return ", bar ".join(f"{x:g}" for x in pair) if isinstance(pair[0], int | float) else ""


def missed(stars: Sequence[str], pair: Any) -> str:
    """Return "missed" if a number misses its bar; minus signs turn a bar around."""
    return "missed" if pair[0] > pair[1] else ""


SETTING = "(N, K, S)"
LATENCY = {f"{at}, ms": f"{at}:.1f" for at in ("p50", "p99", "p99.9")}
LATENCIES = LATENCY | {
    "work": "work:.3f",
    "predicted": "predicted:.2%",
    "right answers": "accuracy:.2%",
}
ACCURACY = "relative_accuracy:.3f"
#: Columns of accuracies by scheme, with the baselines.
SCHEMES = {
    NAMES.get(name, name): f"schemes > {name} > {ACCURACY}"
    for name in ("the paper's scheme", "replication", "regression", *BASELINES)
}
SCORES = {
    "work": "work:.2f",
    "accuracy kept": ACCURACY,
    "squared error / variance": "mse:.4f",
    "over `RegressionCode`'s": "against regression > mse:.2f",
    "accuracy less `RegressionCode`'s": "against regression > relative_accuracy:.4f",
    "classes changed": changed,
}
BARS = {"measured": "0:g", "bar": "1:g", "": missed}
TABLES: dict[str, Table | Callable[[Mapping[str, Any]], Iterable[list[str]]]] = {
    "coverage": Table(
        "coverage > * > B 240",
        ("data",),
        {
            "covered": "0.95 > covered:.3f",
            "lowest tercile": lambda _, of: f"{min(of['0.95']['terciles']):.3f}",
            "radius over the oracle's": "0.95 > radius to constant:.2f",
            "split conformal's radius over ours": "split > radius to ours:.2f",
            "certified": "certified:.3f",
            "certified and wrong": "certified and wrong:.3f",
        },
    ),
    "main": Table(
        "accuracy > lenet5 > table > B = 240 > *",
        (SETTING,),
        SCHEMES
        | {"squared error": "schemes > the paper's scheme > against regression > mse > 0:.0f"},
    ),
    "fidelity": Table(
        "accuracy > * > fidelity > *",
        ("", "(N, K)"),
        {
            "RMSE lower by, %": "rmse lower by %:.1f",
            "in the paper": claimed(0),
            "mean error lower by, %": "rmse_mean lower by %:.1f",
            "accuracy higher by, points": "relative accuracy higher by points:.1f",
            "there": claimed(1),
        },
    ),
    "subjects": Table(
        "accuracy > * > table > B = 240 > (24, 20, 4) > schemes > *", ("",), {"": "mse:.4f"}, 0
    ),
    "regimes": Table(
        "accuracy > lenet5 > table > * > (24, 20, 4) > schemes > *", ("",), {"": ACCURACY}, 0
    ),
    "codes": Table(
        "accuracy > * > table|neighbours > * > * > schemes > *",
        ("", "", "batch", SETTING, ""),
        SCORES,
    ),
    "distances": Table(
        "distances > * > (24, 20, 4)",
        ("data",),
        {
            "error / variance": "schemes > chosen > mse:.4f",
            "the batch's mean": "schemes > mean > against chosen > mse > 0:.1f",
            "one metric for all": "schemes > one metric > against chosen > mse > 0:.2f",
            "a stem competing": "schemes > with a stem > against chosen > mse > 0:.2f",
        }
        | {
            NAMES.get(name, name): f"schemes > {name} > against chosen > mse > 0:.2f"
            for name in BASELINES
        },
    ),
    "metrics": Table(
        "distances > * > * > schemes > *",
        ("data", SETTING),
        {"": "against chosen > mse > 0:.2f"},
        2,
    ),
    "memories": Table("surrogates > * > memory > *", ("",), {"": "against without:.3f"}, 1),
    "drift": Table("surrogates > * > drift > *", ("", ""), {"error": "against without:.3f"}),
    "useless": Table("surrogates > * > useless > * > *", ("", "batch"), {"": "0:.4f"}, 2),
    "waiting": Table("waiting > regimes > * > policies > *", ("workers / parts",), {"": tail}, 1),
    "fan_out": Table("waiting > fan-out > * > policies > *", ("parts",), {"": tail}, 1),
    "latency": Table(
        "latency > * > policies > *",
        ("", ""),
        LATENCIES,
    ),
    "verification": found_wrong,
    "resilience": Table("resilience > * > bars > *", ("", ""), BARS),
    "serving": Table("serving > faults > *", ("LeNet-5, under faults",), {"measured": number}),
    "convergence": Table(
        "convergence > * > * > *",
        ("", "lost", ""),
        {
            "spline": "spline > slope:.2f",
            "its bound": "spline > slope of the bound:.2f",
            "between neighbouring N": local,
            "Berrut": "Berrut > slope:.2f",
            "Berrut's bound": "Berrut > slope of the bound:.2f",
            "error at the largest N": "spline > mse > -1 > 0:.1e",
            "floor of float32": "floor:.0e",
        },
    ),
}
PAGES = {
    "codes": Page(
        "Codes",
        "All schemes answer the same batches from the same received sets. Intervals are Student's, "
        "at 95 %: over five trainings of LeNet-5 and five splits of the table, else over batches, "
        "and paired where schemes are compared. They are not corrected for the number of "
        "comparisons, one for each row but `RegressionCode`'s. Rates below 1 % have exact "
        "intervals, as if rows were independent.",
        {
            "fidelity": "The gain of the paper's scheme over Berrut's code, as the paper has it",
            "codes": "All settings",
        },
    ),
    "coverage": Page(
        "Error bars",
        "Wrappers answer held-out batches of 240 rows, with 8 of 24 parts missing: 50 batches, "
        "20 received sets each. The oracle's constant contains as many errors of a data set as are "
        "wanted. A label is certified at a risk of at most .05.",
        {"coverage": "Radii at a nominal coverage of .95, and labels"},
        [("coverage", "coverage against its nominal level, and radii, by data set")],
    ),
    "metrics": Page(
        "Metrics",
        "Squared error relative to the choice among all metrics on the results.",
        {"distances": "The choice, and the baselines, (24, 20, 4)", "metrics": "Each metric alone"},
    ),
    "surrogates": Page(
        "Surrogates",
        "The wrapper at (6, 4, 2) on batches of 64. Squared errors are relative to the same code "
        "without a surrogate.",
        {
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
        "Rates that papers state, measured. Slopes are of the logarithm of the error over that of "
        "N, for all N, and between 32, 64, 128, 256 and 512 workers. Near the floor of float32 a "
        "slope says nothing of the code.",
        {"convergence": "Slopes"},
    ),
}
