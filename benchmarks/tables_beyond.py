"""Tables of what goes beyond the paper: surrogates, and machines that lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .plots import NAMES, Results

__all__ = ["TABLES"]

Table = Callable[[Results], Iterable[Sequence[str]]]

# Lies that are to be found; of the others the page says what they cost.
STRONG = (
    "noise",
    "sign flip",
    "constant",
    "replay, earlier batch",
    "replay, other machine",
    "x 1.5",
    "x 0.5",
    "permuted rows",
    "swapped outputs",
    "shifted inputs",
    "offset, common",
)
SCHEMES = {
    "located": "ours",
    "undefended": "nobody looks",
    "oracle": "liars known",
    "ApproxIFER": "ApproxIFER",
    "spline, reweighted": "spline, reweighted",
    "spline, larger lambda": "spline, larger lambda",
    "copies, median": "copies, median",
}


def settings(results: Results) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Networks, settings and what was found, at batches of 240."""
    for name, kinds in results["adversaries"].items():
        for case, found in kinds["main"].items():
            yield name, case, found


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def liars(results: Results) -> Iterable[Sequence[str]]:
    """Of every lie, over the settings: found at least, and lost at most against the oracle."""
    networks = list(results["adversaries"])
    yield "", *(NAMES[name] for name in networks)
    lies = next(settings(results))[2]["lies"]
    for lie in lies:
        cells = []
        for name in networks:
            each = [found["lies"][lie] for of, _, found in settings(results) if of == name]
            quiet = [
                found["lies"]["nobody lies"] for of, _, found in settings(results) if of == name
            ]
            if "detected" not in each[0]["located"]:
                falsely = max(x["located"]["dropped falsely, per request"][0] for x in each)
                cells.append(f"{falsely:.2g} dropped falsely")
                continue
            found = 100 * min(x["located"]["detected"][0] for x in each)
            behind = 100 * max(
                x["oracle"]["relative accuracy"][0] - x["located"]["relative accuracy"][0]
                for x in each
            )
            damage = max(
                x["located"]["mse to variance"][0] / q["located"]["mse to variance"][0]
                for x, q in zip(each, quiet, strict=True)
            )
            cells.append(f"{found:.0f} %, {behind:+.2f}, {damage:.2f}")
        yield lie, *cells


def liars_in_few(results: Results) -> Iterable[Sequence[str]]:
    """The same in batches of 80 inputs, where copies are few."""
    small = {name: of["small batches"] for name, of in results["adversaries"].items()}
    yield "", *(f"{NAMES[name]}, {next(iter(cases))}" for name, cases in small.items())
    each = [next(iter(cases.values()))["lies"] for cases in small.values()]
    for lie in each[0]:
        cells = []
        for lies in each:
            located, known = lies[lie]["located"], lies[lie]["oracle"]
            if "detected" not in located:
                cells.append(f"{located['dropped falsely, per request'][0]:.2g} dropped falsely")
                continue
            behind = 100 * (known["relative accuracy"][0] - located["relative accuracy"][0])
            cells.append(f"{100 * located['detected'][0]:.0f} %, {behind:+.2f}")
        yield lie, *cells


def lying_peers(results: Results) -> Iterable[Sequence[str]]:
    """RelAcc where nobody lies, and its mean over the strong lies; work."""
    yield "", "(N, K, S, A)", *SCHEMES.values()
    for name, case, found in settings(results):
        cells = []
        for scheme in SCHEMES:
            quiet = found["lies"]["nobody lies"][scheme]["relative accuracy"][0]
            lied = mean(found["lies"][lie][scheme]["relative accuracy"][0] for lie in STRONG)
            work = found["work"][scheme]
            more = "" if work == found["work"]["located"] else f" ({work:.3g} times the work)"
            cells.append(f"{quiet:.3f}, {lied:.3f}{more}")
        yield NAMES[name], case, *cells


def false_alarms(results: Results) -> Iterable[Sequence[str]]:
    yield (
        "(N, K, S, A)",
        "machines",
        "requests",
        "with a machine dropped",
        "with suspects",
        "z above 3; largest",
        "CUSUM alarms in 300,000 scores",
    )
    for cases in results["false_alarms"].values():
        for case, kinds in cases.items():
            for kind, found in kinds.items():
                if "requests" not in found:
                    continue
                z = found["z: mean, deviation, largest"]
                yield (
                    case,
                    kind,
                    str(found["requests"]),
                    str(found["with a machine dropped"]),
                    str(found["with suspects"]),
                    f"{100 * found['of z, above 2, 3, 4'][1]:.2f} %; {z[2]:.1f}",
                    str(found["CUSUM alarms in 300,000 of honest scores"]),
                )


def audits(results: Results) -> Iterable[Sequence[str]]:
    """Which liars an audit row shows: the share that is dropped."""
    columns = [
        (name, code, how, found)
        for name, codes in results["audits"].items()
        for code, kinds in codes.items()
        for how, found in kinds.items()
    ]
    yield "", *(f"{NAMES[name]}, {code}, {how}" for name, code, how, _ in columns)
    for lie in results["settings"]["audits"]["lies"]:
        cells = []
        for *_, found in columns:
            share, falsely = found[lie].get("detected"), found[lie]["dropped falsely"]
            shown = f"{100 * share[0]:.0f} %" if share else f"{found[lie]['calls']} calls"
            cells.append(f"{shown}, {falsely} dropped falsely" if falsely or not share else shown)
        yield lie, *cells


def small_lies(results: Results) -> Iterable[Sequence[str]]:
    """Requests until a reputation names a machine that lies a little."""
    yield "(N, K, S, A)", "lie", "dropped in a request", "requests until named: median, most"
    for cases in results["false_alarms"].values():
        for case, kinds in cases.items():
            for lie, found in kinds.get("small lies", {}).items():
                if isinstance(found, Mapping):
                    median, most = found["requests until named: median, most"]
                    share = f"{100 * found['dropped in a request']:.0f} %"
                    yield case, lie, share, f"{median:g}, {most:g}"


def students(results: Results) -> Iterable[Sequence[str]]:
    """Squared error of KernelCode with a student over the paper's without, and RelAcc."""
    each = {name: found["errors"] for name, found in results["surrogates"].items()}
    cases = list(next(iter(each.values())))
    yield "", "student's error", "batch", *cases
    for name, found in each.items():
        for size in next(iter(found.values())):
            cells = []
            for case in cases:
                codes = found.get(case, {}).get(size, {}).get("codes")
                if codes is None:
                    cells.append("")
                    continue
                helped = codes["default"]["with"]
                error, accuracy = helped["against paper"][0], helped["relative_accuracy"][0]
                cells.append(f"{error:.4f}, {accuracy:.4f}")
            about = next(iter(found.values()))[size]["student"]
            yield NAMES[name], f"{about['error']:.3f}", size, *cells


def helped(results: Results) -> Iterable[Sequence[str]]:
    """Every code with the student and without: squared error over the paper's without, RelAcc."""
    found = [
        (name, case, size, sizes[size]["codes"])
        for name, of in results["surrogates"].items()
        for case, sizes in of["errors"].items()
        for size in sizes
        if "Berrut, ordered" in sizes[size]["codes"]
    ]
    yield "", "(N, K, S), batch", *found[0][3]
    for name, case, size, codes in found:
        cells = []
        for each in codes.values():
            pair = (each["without"], each["with"])
            errors = " → ".join(f"{x['against paper'][0]:.3f}" for x in pair)
            cells.append(f"{errors}, {each['with']['relative_accuracy'][0]:.3f}")
        yield NAMES[name], f"{case}, {size}", *cells


def memories(results: Results) -> Iterable[Sequence[str]]:
    """Squared error over that without a memory, by thirds of a stream, and after a drift."""
    yield "", "first third", "second", "last", "RelAcc, last", "classes never seen"
    for name, found in results["surrogates"].items():
        if "memory" in found:
            thirds = [found["memory"][f"third {i}"] for i in (1, 2, 3)]
            errors = [
                f"{x['against without'][0]:.3f} ± {x['against without'][1]:.3f}" for x in thirds
            ]
            drift = found.get("drift", {}).get("never seen classes")
            cell = f"{drift['against without'][0]:.3f}" if drift else ""
            yield NAMES[name], *errors, f"{thirds[-1]['relative_accuracy'][0]:.4f}", cell


def useless(results: Results) -> Iterable[Sequence[str]]:
    """Squared error with surrogates that do not fit over that without, at (6, 4, 2)."""
    first = next(iter(next(iter(results["surrogates"].values()))["useless"].values()))
    kinds = list(next(iter(first.values())))
    yield "", "batch", "code", *kinds
    for name, found in results["surrogates"].items():
        for size, codes in found.get("useless", {}).items():
            for code, errors in codes.items():
                if isinstance(errors, Mapping):
                    yield NAMES[name], size, code, *(f"{errors[kind][0]:.4f}" for kind in kinds)


def learning(results: Results) -> Iterable[Sequence[str]]:
    yield (
        "surrogate",
        "p50, ms",
        "p99, ms",
        "predicted",
        "right",
        "the network's own",
        "of those predicted, lost",
    )
    for what, found in results["learning"]["answers"]["surrogates"].items():
        shares = (found["predicted"], found["right"], found["right of the network"])
        yield (
            what,
            f"{found['p50']:.1f}",
            f"{found['p99']:.1f}",
            *(f"{100 * share:.2f} %" for share in shares),
            f"{100 * found['right answers lost, of those predicted']:.1f} %",
        )


def surrogates_main(results: Results) -> Iterable[Sequence[str]]:
    """Accuracy kept at (6, 4, 2) in batches of 64, a third of the workers lost."""
    yield (
        "",
        "the paper's scheme",
        "`KernelCode`",
        "with a memory",
        "with a student",
        "squared error",
    )
    for name, found in results["surrogates"].items():
        codes = found["errors"]["(6, 4, 2)"]["64"]["codes"]
        paper, ours = (codes[x]["without"]["relative_accuracy"][0] for x in ("paper", "default"))
        known = found["memory"]["third 3"]["relative_accuracy"][0] if "memory" in found else None
        helped = codes["default"]["with"]
        kept = (paper, ours, known, helped["relative_accuracy"][0])
        error = f"{codes['default']['without']['against paper'][0]:.3f}"
        error += f" → {helped['against paper'][0]:.3f}"
        yield NAMES[name], *("" if x is None else f"{x:.3f}" for x in kept), error


def liars_main(results: Results) -> Iterable[Sequence[str]]:
    """One of 24 machines lies, two are late: accuracy kept by LeNet-5."""
    found = results["adversaries"]["lenet5"]["main"]["(24, 20, 2, 1)"]["lies"]
    yield "one of 24 machines", "nobody looks", "`max_adversaries=1`", "if it were known", "found"
    for lie in (
        "nobody lies",
        "sign flip",
        "replay, earlier batch",
        "swapped outputs",
        "noise x .3",
    ):
        kept = (found[lie][x]["relative accuracy"][0] for x in ("undefended", "located", "oracle"))
        share = found[lie]["located"].get("detected")
        yield lie, *(f"{x:.3f}" for x in kept), f"{100 * share[0]:.0f} %" if share else ""


TABLES: dict[str, Table] = {
    "surrogates_main": surrogates_main,
    "liars_main": liars_main,
    "liars": liars,
    "liars_in_few": liars_in_few,
    "lying_peers": lying_peers,
    "false_alarms": false_alarms,
    "small_lies": small_lies,
    "audits": audits,
    "students": students,
    "helped": helped,
    "memories": memories,
    "useless": useless,
    "learning": learning,
}
