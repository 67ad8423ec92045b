"""How numbers of the results become text: cells, and the rows of tables that no path describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from coded_torch.experiments.scores import of_logarithm

from .names import NAMES

SETTING = "(N, K, S)"
KINDS = ("table", "neighbours", "adversarial")  # of tables of accuracy, by the lost workers
JOBS = {  # what happens to the workers of a job
    "calm": "all healthy",
    "five times slower": "one five times slower",
    "killed every 5 s": "one killed every 5 s",
    "two drained": "two taken away",
}


def shown(value: Any, how: str, positive: bool = False) -> str:
    """Return a number, or one with half the width of its interval, in Python's format.

    A wide interval of a positive number is of its logarithm.
    """
    if isinstance(value, list) and len(value) == 2 and value[0] is not None:
        factor = of_logarithm(*value) if positive and value[1] is not None else None
        if factor is not None:
            return f"{shown(value[0], how)} ×/÷ {factor:.2g}"
        return shown(value[0], how) + (f" ± {shown(value[1], how)}" if value[1] is not None else "")
    if isinstance(value, list):  # a median with quartiles, or nothing
        value = value[0]
    if value is None or isinstance(value, str):
        return value or ""
    return format(value, how).replace("%", " %")


def tail(stars: Sequence[str], found: Mapping[str, Any]) -> str:
    """Return the p99.9 of latency, and the share of estimated answers."""
    share = f", {100 * found['estimated']:.2g} %" if found["estimated"] else ""
    return f"{found['p99.9']:.1f}{share}"


def _paired(found: Mapping[str, Any]) -> Mapping[str, Any]:
    return found.get("against regression") or {"mse": None, "relative_accuracy": None}


def changed(found: Mapping[str, Any]) -> str:
    """Return the rate of rows whose class is not the module's own, a rare one with its interval."""
    if not (rate := found.get("changed")):
        return ""
    ends = f" ({rate[1]:.2%} to {rate[2]:.2%})" if len(rate) == 3 else ""
    return f"{rate[0]:.2%}{ends}".replace("%", " %")


def local(stars: Sequence[str], found: Mapping[str, Any]) -> str:
    """Return the slopes between neighbouring numbers of workers, with their intervals."""
    pairs = found["spline"].get("local slopes", [])
    return ", ".join(f"{x:.1f} ± {half:.1f}" for x, half in pairs)


def counts(stars: Sequence[str], found: Mapping[str, Any]) -> str:
    """Return the numbers of lost workers."""
    return ", ".join(f"{x:.0f}" for x in found["stragglers"])


def several(key: str) -> Callable[[Sequence[str], Any], str]:
    """Return a column of all numbers at a key."""
    return lambda _, found: ", ".join(map(str, found[key]))


def fitted(code: str = "") -> Callable[[Sequence[str], Any], str]:
    """Return a column of a code's slopes, with the interval of the fit."""

    def column(stars: Sequence[str], found: Mapping[str, Any]) -> str:
        slope = found.get(code, {}).get("fitted slope") if code else found["slope"]
        return shown(slope, ".2f") if slope else ""

    return column


def bounds(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield measured errors beside the bound with its constant."""
    yield ["", "", "N", "S", "squared error", "the bound", "the error over the bound"]
    for name, of in results["convergence"].items():
        for how, found in of.get("bound", {}).items():
            keys = ("workers", "stragglers", "mse", "bound")
            for workers, lost, mse, bound in zip(*(found[x] for x in keys), strict=True):
                head = NAMES.get(name, name), how, f"{workers}", f"{lost:.0f}"
                yield [*head, f"{mse[0]:.1e}", f"{bound:.1e}", f"{mse[0] / bound:.1e}"]


def letcc(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield how LeTCC differs from Berrut's code, beside the paper's numbers."""
    from .letcc import PAPER

    yield [
        "network", "(N, K)", "its accuracy", "RMSE lower, %", "in the paper",
        "relative accuracy higher, points", "in the paper",
    ]  # fmt: skip
    for name, of in results["letcc"]["networks"].items():
        for setting, found in of.items():
            rmse, points = PAPER[name]
            ours = found["against Berrut"]
            yield [
                name,
                setting,
                f"{found['accuracy']:.1%}".replace("%", " %"),
                f"{ours['RMSE lower, %']:.1f}",
                str(rmse),
                f"{ours['accuracy higher, points']:.1f}",
                str(points),
            ]


def number(stars: Sequence[str], found: Any) -> str:
    """Return a number, without the bar that a developer has set for it."""
    first = found[0] if isinstance(found, list) else found
    return f"{first:g}" if isinstance(first, int | float) else ""


def finished(stars: Sequence[str], found: Mapping[str, Any]) -> str:
    """Return the seconds of a job, or how it ended before its end."""
    if found["ended"] != "complete":
        return f"{found['ended']}, {found['lost']:,} rows lost"
    faults = [f", {n:,} rows {what}" for what in ("lost", "repeated") if (n := found[what])]
    return f"{found['wall']:.1f} s" + "".join(faults)


SCORES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "normalised MSE": lambda of: shown(of["mse"], ".4f", positive=True),
    "median and 90 % quantile": lambda of: " and ".join(f"{x:.2g}" for x in of["quantiles"][1:]),
    "accuracy kept": lambda of: shown(of["relative_accuracy"], ".3f"),
    "work": lambda of: f"{of['work']:.2f}",
    "over `RegressionCode`'s": lambda of: shown(_paired(of)["mse"], ".2f", positive=True),
    "accuracy less `RegressionCode`'s": lambda of: shown(_paired(of)["relative_accuracy"], ".4f"),
    "classes changed": changed,
}
#: A number of each peer's paper, its source, and the same number here.
PEERS: tuple[tuple[str, str, str, str, Callable[[Any], Any]], ...] = (
    (
        "LeTCC",
        "RMSE below Berrut's code, mean over S, %",
        "15",
        "results on LeNet-5 in arXiv 2406.00300; S not named",
        lambda of: of["NeRCC"]["mean"],
    ),
    (
        "LeTCC, probabilities",
        "accuracy above Berrut's code, mean over S, points",
        "2",
        "the same",
        lambda of: of["NeRCC"]["accuracy above, points"],
    ),
    (
        "LeTCC, logits",
        "the same",
        "2",
        "the same",
        lambda of: of["NeRCC, logits"]["accuracy above, points"],
    ),
    (
        "NeRCC",
        "error below Berrut's code, at most, %",
        "23",
        "abstract of arXiv 2402.04377; metric and S not named",
        lambda of: of["NeRCC"]["most"],
    ),
    (
        "ParM, (3, 2, 1)",
        "accuracy of decoded answers below the network's, points",
        "at most 6.5",
        "evaluation of accuracy in the SOSP 2019 paper, as a review quotes it",
        lambda of: of["ParM"]["lower by points"],
    ),
    (
        "ApproxIFER, K = 12, A = 1",
        "accuracy on MNIST, one worker wrong, %",
        "97",
        "`error_123` in `Bar_plots.py` of github.com/Mahdi-Soleymani/Approxifer",
        lambda of: [100 * x for x in of["ApproxIFER"]["accuracy"]["ApproxIFER"]],
    ),
)


def rivals(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield the coverage of every rival, and the median of its bounds over ours."""
    yield ["data", "batch", "", "covered", "lowest tercile", "bound over ours"]
    for name, settings in results["coverage"].items():
        for setting in (x for x in settings if x.endswith(", rivals")):
            for rival, of in settings[setting].items():
                if rival != "seconds":
                    numbers = shown(of["covered"], ".3f"), f"{min(of['terciles']):.3f}"
                    head = NAMES.get(name, name), setting.removesuffix(", rivals"), rival
                    yield [*head, *numbers, f"{of['bound to ours']:.2f}"]


def clients(kind: str, case: str, heads: Mapping[str, str]) -> Callable[[Any], Any]:
    """Return the table of the clients of a fleet under one of its cases."""

    def rows(results: Mapping[str, Any]) -> Iterable[list[str]]:
        yield ["", *heads]
        found = results["fleet"][kind][case]
        for name, of in found.get("clients", found).items():
            cells = []
            for column in heads.values():
                at, _, how = column.partition(":")
                none = at == "error of estimates" and not of["estimated"]
                cells.append("-" if none else shown(of[at], how))
            yield [NAMES.get(name, name), *cells]

    return rows


def jobs(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield the seconds of a job on six processes, by who runs it, and by what goes wrong."""
    cases = results["job"]["cases"]
    yield ["", *(JOBS[case] for case in cases)]
    for name in cases["calm"]:
        each = (of.get(name) for of in cases.values())
        cells = (finished((), found) if found else "not measured" for found in each)
        yield [NAMES.get(name, name), *cells]


def coverages(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield the worst data set of every setting: least coverage, most wrong with a small p."""
    yield [
        "setting",
        "at .90",
        "at .95",
        "at .99",
        "mean of sets at .95",
        "p at most .05, and wrong",
    ]
    found = [sets for sets in results["coverage"].values() if "B 64" in sets]
    for setting in (x for x in dict.fromkeys(key for sets in found for key in sets)):
        each = [sets[setting] for sets in found if setting in sets]
        if setting.endswith(", rivals"):
            continue
        worst = [_worst_covered([of[level] for of in each]) for level in ("0.9", "0.95", "0.99")]
        mean = sum(of["0.95"]["covered"][0] for of in each) / len(each)
        wrong = max(of["certified and wrong"][0] for of in each if "certified" in of)
        yield [setting, *worst, f"{mean:.3f}", f"{wrong:.3f}"]


def _worst_covered(sets: Sequence[Mapping[str, Any]]) -> str:
    """Return the least coverage of data sets, with the shares of their infinite bounds."""
    covered = shown(min(of["covered"] for of in sets), ".3f")
    percents = [round(100 * of["infinite"], 1) for of in sets]
    if max(percents) == 0:
        return covered
    if min(percents) == 100:
        return f"{covered}, all infinite"
    return f"{covered}, up to {max(percents):g} % infinite"


def means(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield the coverage of means over all sets, and of the worst set, by kind and rows."""
    yield ["of", "rows", "covered", "least", "sampling", "least", "width over sampling's", "most"]
    sets = [found["fixed"] for found in results["mean"].values() if "fixed" in found]
    for kind in ("outputs", "classes", "right"):
        for rows in ("60", "120", "240"):
            cells = [found[kind][rows] for found in sets if kind in found]
            row = [kind, rows]
            for of in ("ours", "sampling"):
                covered = [cell[of]["covered"][0] for cell in cells]
                row += [f"{sum(covered) / len(covered):.3f}", f"{min(covered):.3f}"]
            widths = [cell["width over sampling's"] for cell in cells]
            yield [*row, f"{sum(widths) / len(widths):.2f}", f"{max(widths):.2f}"]


def _error(item: tuple[str, Any]) -> float:
    return float("inf") if item[1]["mse"][0] is None else item[1]["mse"][0]


def leaderboard(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield a row for each setting and scheme, the least squared error first."""
    yield ["network, data", "lost", "batch", SETTING, "scheme", *SCORES, "command"]
    for name, kinds in results["accuracy"].items():
        for kind in (x for x in KINDS if x in kinds):
            for batch, cases in kinds[kind].items():
                for case, found in cases.items():
                    command = f'`accuracy --only {name} {kind} "{batch}" "{case}"`'
                    head = [NAMES.get(name, name), NAMES[kind], batch, case]
                    for scheme, of in sorted(found["schemes"].items(), key=_error):
                        cells = [show(of) for show in SCORES.values()]
                        yield [*head, NAMES.get(scheme, scheme), *cells, command]


def leaders(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield the rows of the leaderboard at (24, 20, 4)."""
    head, *rows = leaderboard(results)
    setting = head.index(SETTING)
    yield head
    yield from (row for row in rows if row[setting] == "(24, 20, 4)")


def peers(results: Mapping[str, Any]) -> Iterable[list[str]]:
    """Yield a number of each peer's paper, with its source, beside ours."""
    yield ["", "number", "in the paper", "source", "here"]
    for name, what, theirs, source, ours in PEERS:
        value, half = ours(results["peers"])
        yield [name, what, theirs, source, f"{value:.3g} ± {half:.2g}"]


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
