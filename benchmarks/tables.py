"""The tables of the results, from the JSON alone; ``report.py`` puts them into the pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from coded_torch.input_space.distances import METRICS

from . import tables_beyond
from .plots import LABELS, NAMES, STYLES, Results

__all__ = ["TABLES"]

KEPT = 0.99
# The gains of the spline over Berrut's code that the paper states, averaged over stragglers: by how
# many percent RMSE is lower, and by how many points RelAcc is higher. RepVGG on CIFAR-10 and a ViT
# on ImageNet there, on Fashion-MNIST here.
PAPER = {"lenet5": (15, 2), "repvgg": (17, 5), "vit": (9, 4)}

# Waiting policies, from one that asks once to one that predicts, and their columns.
WAITING = {
    "wait for all": "wait for all",
    "one hedge": "one hedge",
    "three re-asks, split": "three re-asks",
    "predict at 3 medians of whole calls": "`Waiting()`",
    "predict at 3 medians of a part": "`Waiting(deadline=3)`",
}

Table = Callable[[Results], Iterable[Sequence[str]]]


def pm(interval: Sequence[float | None], digits: int = 3, scale: float = 1) -> str:
    """A number and half the width of its interval."""
    value, half = interval
    if value is None:
        return ""
    text = f"{scale * value:.{digits}f}"
    return text if half is None else f"{text} ± {abs(scale) * half:.{digits}f}"


def of(code: str) -> str:
    return LABELS.get(code, code)


def main_table(results: Results) -> Iterable[Sequence[str]]:
    yield (
        "(N, K, S)",
        "the paper's scheme",
        "replication, batch mean",
        "`KernelCode`",
        "squared error",
    )
    for setting, case in results["batches"]["lenet5"]["main"].items():
        codes = case["codes"]
        shown = ("paper", "replication, batch mean", "KernelCode")
        cells = [pm(codes[x]["relative_accuracy"]) for x in shown]
        yield setting, *cells, f"{codes['KernelCode']['against paper']['mse'][0]:.3f}"


def kept(results: Results) -> Iterable[Sequence[str]]:
    """The most stragglers, of those measured, up to which a code keeps 99 % of the accuracy."""
    curves = [
        (name, case, found)
        for name, cases in results["accuracy"].items()
        for case, found in cases.items()
        if name in PAPER
    ]
    yield "", *(f"{NAMES[name]} {case}" for name, case, _ in curves)
    for code in STYLES:
        if not all(code in found["logits"]["uniform"] for *_, found in curves):
            continue
        cells = []
        for *_, found in curves:
            values = found["logits"]["uniform"][code]["relative_accuracy"]
            most = 0
            for s, (value, _) in zip(found["stragglers"], values, strict=True):
                if value < KEPT:
                    break
                most = s
            cells.append(str(most) if most else f"< {found['stragglers'][0]}")
        yield of(code), *cells


def fidelity(results: Results) -> Iterable[Sequence[str]]:
    yield (
        "",
        "S",
        "RMSE lower by, %",
        "at single S",
        "the paper",
        "the other RMSE",
        "RelAcc higher by, points",
        "at single S",
        "the paper",
    )
    for name, (rmse, points) in PAPER.items():
        for case, found in results["accuracy"][name].items():
            root, mean, accuracy = (gain["averaged"] for gain in found["fidelity"].values())
            at_root, _, at_accuracy = (
                [value for value, _ in gain["by stragglers"]] for gain in found["fidelity"].values()
            )
            yield (
                f"{NAMES[name]} {case}",
                f"{found['stragglers'][0]} to {found['stragglers'][-1]}",
                pm(root, 1),
                f"{min(at_root):.0f} to {max(at_root):.0f}",
                str(rmse),
                pm(mean, 1),
                pm(accuracy, 1),
                f"{min(at_accuracy):.1f} to {max(at_accuracy):.1f}",
                str(points),
            )


def settings_table(name: str) -> Table:
    """Every code at the six settings: RelAcc, and the squared error relative to the paper's."""

    def table(results: Results) -> Iterable[Sequence[str]]:
        cases = results["batches"][name]["main"]
        yield "", *cases
        for code in next(iter(cases.values()))["codes"]:
            each = [case["codes"][code] for case in cases.values()]
            errors = [x.get("against paper", {"mse": [1.0]})["mse"][0] for x in each]
            yield (
                code,
                *(
                    f"{pm(x['relative_accuracy'])}, {error:.3f}"
                    for x, error in zip(each, errors, strict=True)
                ),
            )

    return table


def predicted(results: Results) -> Iterable[Sequence[str]]:
    """What KernelCode expects of its error, over what is measured; how far off a batch is."""
    networks = {name: results["batches"][name]["main"] for name in PAPER}
    yield "", *next(iter(networks.values()))
    for name, cases in networks.items():
        each = [case["codes"]["KernelCode"] for case in cases.values()]
        yield (
            NAMES[name],
            *(
                f"{pm(x['predicted_to_measured'], 2)}, {100 * x['prediction_off_by']:.0f} %"
                for x in each
            ),
        )


def levers(results: Results) -> Iterable[Sequence[str]]:
    cases = [(n, case, x) for n, y in results["levers"].items() for case, x in y.items()]
    yield "", *(f"{NAMES[n]} {case}" for n, case, _ in cases)
    for code in cases[0][2]["codes"]:
        if code != "KernelCode":
            against = (x["codes"][code]["against KernelCode"]["mse"] for *_, x in cases)
            yield code, *(pm(mse, 2) for mse in against)


def distances(results: Results) -> Iterable[Sequence[str]]:
    yield (
        "data",
        "(N, K, S)",
        "error / outputs' variance",
        "the mean in place of a prediction",
        "one metric and length for all",
        "a stem competing",
        "accuracy over replication's",
        "expected error / measured",
    )
    for name, cases in results["distances"].items():
        for case, found in cases.items():
            codes = found["codes"]
            chosen, stem = codes["chosen"], codes.get("with a stem")
            yield (
                NAMES.get(name, name),
                case,
                pm(chosen["mse_to_variance"], 4),
                pm(codes["mean"]["against chosen"]["mse"], 1),
                pm(codes["before"]["against chosen"]["mse"], 2),
                pm(stem["against chosen"]["mse"], 2) if stem else "",
                pm(chosen["against replication"]["relative_accuracy"]),
                f"{chosen['expected_to_measured']:.2f}",
            )


def alone(results: Results) -> Iterable[Sequence[str]]:
    """Squared error of each metric alone, its length chosen, at (24, 20, 4)."""
    found = {
        name: cases["(24, 20, 4)"]["codes"]
        for name, cases in results["distances"].items()
        if "(24, 20, 4)" in cases
    }
    yield "data", *METRICS, "a stem alone"
    for name, codes in found.items():
        errors = (codes.get(x, {}).get("against chosen") for x in (*METRICS, "a stem alone"))
        yield NAMES.get(name, name), *(f"{e['mse'][0]:.2f}" if e else "" for e in errors)


def sizes(results: Results) -> Iterable[Sequence[str]]:
    """Squared error relative to that of replication with the batch's mean, at (24, 20, 4)."""
    codes = ("paper", "replication, regression", "KernelCode")
    yield "", "batch", *codes
    for name, sections in results["batches"].items():
        for batch, found in sections["batch"].items():
            errors = [found["codes"][x]["against replication, batch mean"]["mse"] for x in codes]
            yield NAMES[name], batch, *(pm(error, 2) for error in errors)


def contiguous(results: Results) -> Iterable[Sequence[str]]:
    """Points of RelAcc by which a block of neighbours costs more than as many others."""
    codes = ("KernelCode", "paper")
    yield "", "(N, K, S)", *(f"{code}{law}" for code in codes for law in ("", ", shuffled"))
    for name, sections in results["batches"].items():
        for case, found in sections.get("contiguous", {}).items():
            cells = []
            for code in codes:
                for law in ("contiguous", "contiguous, shuffled"):
                    change = found[law].get(code, {}).get("against uniform")
                    cells.append(pm(change["relative_accuracy"], 2, -100) if change else "")
            yield NAMES[name], case, *cells


def convergence(results: Results) -> Iterable[Sequence[str]]:
    def lost(law: str, counts: Sequence[float]) -> str:
        if law.startswith("each"):
            return f"{counts[0] / workers[0]:.0%} of N".replace("%", " %")
        return f"{counts[0]:g}" if counts[0] == counts[-1] else f"{counts[0]:g} to {counts[-1]:g}"

    workers = results["settings"]["convergence"]["workers"]
    yield "", "lost", "noise", "spline", "its bound", "Berrut", "its bound"
    for task, laws in results["convergence"].items():
        for law, noises in laws.items():
            for noise, found in noises.items():
                yield (
                    NAMES.get(task, task),
                    lost(law, found["stragglers"]),
                    "" if noise == "no noise" else "yes",
                    *slope(found["spline"]),
                    *slope(found["Berrut"]),
                )


def slope(found: Mapping[str, Any]) -> tuple[str, str]:
    """That of a code's error, and that of its bound, if there is one."""
    bound = found.get("slope of the bound")
    return pm(found["slope"], 2), "" if bound is None else f"{bound:.2f}"


def smoothing(results: Results) -> Iterable[Sequence[str]]:
    def cell(found: Mapping[str, Any], part: str) -> str:
        """The best smoothing, and what a tenth of it and ten times of it add to the RMSE."""
        off = found["a factor of ten off"][part]
        costs = [
            f"{100 * off[x][0] - 100:+.0f} %" if x in off else "-" for x in ("a tenth", "ten times")
        ]
        return f"{found['best'][part]:g}" + (f" ({', '.join(costs)})" if off else "")

    yield "", "(N, K, S)", "outputs", "noise", "encoder", "decoder"
    for name, cases in results["smoothing"].items():
        for case, measured in cases.items():
            for output, noises in measured["surfaces"].items():
                for noise, found in noises.items():
                    cells = [cell(found, part) for part in ("encoder", "decoder")]
                    yield NAMES[name], case, output, noise.split()[1], *cells


def lagrange(results: Results) -> Iterable[Sequence[str]]:
    yield "", "inputs", "results", "Lagrange", "spline"
    for case, kinds in results["lagrange"].items():
        for kind, found in kinds.items():
            middle = found["received"].index(found["threshold"])
            for i in sorted({0, middle - 1, middle, middle + 1, len(found["received"]) - 1}):
                errors = [found["median error"][x][i][0] for x in ("Lagrange", "spline")]
                texts = ["does not apply" if e is None else f"{e:.1e}" for e in errors]
                yield case, kind, str(found["received"][i]), *texts


def times(results: Results) -> Iterable[Sequence[str]]:
    measured = results["end_to_end"]
    parts = next(iter(measured["cpu"]["lenet5"].values()))["codes"]["KernelCode"]
    yield "", "(N, K, S)", "", *parts
    for device, networks in measured.items():
        for case, found in networks["lenet5"].items():
            for code, spent in found["codes"].items():
                yield device, case, code, *(f"{spent[part][0]:.2f}" for part in parts)


def network_times(results: Results) -> Iterable[Sequence[str]]:
    whats = ("the batch", "one worker's inputs", "all workers' inputs", "distances", "path")
    yield "", "", "(N, K, S)", *whats
    for device, networks in results["end_to_end"].items():
        for name, cases in networks.items():
            for case, found in cases.items():
                if "network" in found:
                    spent = [f"{found['network'][what][0]:.1f}" for what in whats]
                    yield device, NAMES[name], case, *spent


def waiting(results: Results) -> Iterable[Sequence[str]]:
    """Latencies that one in a thousand requests exceeds, and what is predicted; simulated."""
    yield "machines / parts", *WAITING.values()
    for regime, found in results["waiting"]["regimes"].items():
        yield regime, *(_tail(found["policies"][name]) for name in WAITING)


def fan_out(results: Results) -> Iterable[Sequence[str]]:
    """The same for requests of more and more parts."""
    names = {"coded at once": "coded at once", **WAITING}
    yield "parts", *names.values()
    for parts, found in results["waiting"]["fan-out"].items():
        yield parts, *(_tail(found["policies"][name]) for name in names)


def _tail(numbers: Mapping[str, Any]) -> str:
    predicted = numbers["predicted"]
    shown = f"{numbers['p99.9']:.1f}"
    return f"{shown}, {100 * predicted:.2g} %" if predicted else shown


def latency(results: Results) -> Iterable[Sequence[str]]:
    yield "", "", "p50, ms", "p99, ms", "p99.9, ms", "work", "predicted", "right answers"
    for case, found in results["latency"].items():
        for policy, numbers in found["policies"].items():
            times = (f"{numbers[at]:.1f}" for at in ("p50", "p99", "p99.9"))
            shares = (f"{100 * numbers[what]:.2f} %" for what in ("predicted", "accuracy"))
            yield case, policy, *times, f"{numbers['work']:.3f}", *shares


def resilience(results: Results) -> Iterable[Sequence[str]]:
    """What was to be at most its bar; minus signs turn it around."""
    yield "", "", "measured", "bar", ""
    for scenario, found in results["resilience"].items():
        for name, (value, most) in found["bars"].items():
            numbers = f"{abs(value):g}", f"{abs(most):g}"
            yield scenario, name, *numbers, "" if value <= most else "missed"


AT_LEAST = ("exact rows", "answered a second", "refused within 10 ms")


def serving(results: Results) -> Iterable[Sequence[str]]:
    yield "", "", "measured", "bar", ""
    cases = dict(results["serving"])
    overload = {f"overload, {rate}": found for rate, found in cases.pop("overload").items()}
    for case, found in (cases | overload).items():
        for name, numbers in found.items():
            if isinstance(numbers, list) and len(numbers) == 2:
                value, bar = numbers
                missed = value < bar if name in AT_LEAST else value > bar
                yield case, name, f"{value:g}", f"{bar:g}", "missed" if missed else ""


TABLES: dict[str, Table] = {
    "main": main_table,
    "kept": kept,
    "fidelity": fidelity,
    **{name: settings_table(name) for name in PAPER},
    "predicted": predicted,
    "levers": levers,
    "distances": distances,
    "alone": alone,
    "sizes": sizes,
    "contiguous": contiguous,
    "convergence": convergence,
    "smoothing": smoothing,
    "lagrange": lagrange,
    "times": times,
    "network_times": network_times,
    "waiting": waiting,
    "serving": serving,
    "fan_out": fan_out,
    "latency": latency,
    "resilience": resilience,
    **tables_beyond.TABLES,
}
