"""The tables of READMEs and pages: which numbers of the results they hold; cells.py shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import cells
from .cells import KINDS, SETTING
from .names import NAMES

#: A path below a row's with the format of its number, or a function of the stars and the value.
Column = str | Callable[[Sequence[str], Any], str]


class Table(NamedTuple):
    """A table with a row for every match of a path."""

    rows: str  #: the path
    heads: tuple[str, ...]  #: the headings of its stars' keys
    columns: Mapping[str, Column]  #: the columns by their headings
    #: The number of the star whose matches are columns, of the only column's values.
    across: int | None = None


#: The trivial baselines, of which no table of answers lacks one.
BASELINES = ("no redundancy, regression", "no redundancy, surrogate", "surrogate alone")
LATENCY = {f"{at}, ms": f"{at}:.1f" for at in ("p50", "p99", "p99.9")}
LATENCIES = LATENCY | {"no answer": "failed:.0f", "work": "work:.3f"}
LATENCIES |= {"estimated": "estimated:.2%", "right estimates": "right estimates:.0%"}
LATENCIES |= {"right answers": "accuracy:.2%"}
#: How workers are lost where N grows.
OVER_WORKERS = "S fixed|S as the square root of N|each with p = 0.05|each with p = 0.2"
ACCURACY = "relative_accuracy:.3f"
#: Columns of accuracies by scheme, with the baselines.
SCHEMES = {
    NAMES.get(name, name): f"schemes > {name} > {ACCURACY}"
    for name in ("the paper's scheme", "replication", "regression", *BASELINES)
}
CLIENTS = LATENCY | {
    "lost": "lost:d",
    "wrong": "wrong:d",
    "estimated": "estimated:.2%",
    "extra requests": "extra requests:.1%",
    "extra work": lambda _, found: f"{100 * (found['work'] - 1):.1f} %",
}
#: Columns of README's tables of clients.
SLOW = {"p99, ms": "p99:.0f", "p99.9, ms": "p99.9:.0f"}
SLOW |= {"extra requests": "extra requests:.1%", "estimated": "estimated:.1%"}
SLOW |= {"error of estimates": "error of estimates:.0%"}
FAULTY = {"lost": "lost:d", "wrong": "wrong:d"} | SLOW | {"estimated": "estimated:.2%"}
INTERVALS: Mapping[str, Column] = {
    "covered": "ours > covered:.3f",
    "worst column": "ours > worst column:.3f",
    "sampling": "sampling > covered:.3f",
    "its worst column": "sampling > worst column:.3f",
    "width over sampling's": "width over sampling's:.2f",
    "draws": "draws:d",
}
TABLES: dict[str, Table | Callable[[Mapping[str, Any]], Iterable[list[str]]]] = {
    "coverage": Table(
        "coverage > *",
        ("data",),
        {
            "covered": "B 240 > 0.95 > covered:.3f",
            "infinite": "B 240 > 0.95 > infinite:.3f",
            "lowest tercile": lambda _, of: f"{min(of['B 240']['0.95']['terciles']):.3f}",
            "bound over the oracle's": "B 240 > 0.95 > bound to constant:.2f",
            "split conformal's bound over ours": "B 240 > split > bound to ours:.2f",
            "p at most .05": "B 240 > certified:.3f",
            "p at most .05, and wrong": "B 240 > certified and wrong:.3f",
        },
    ),
    "coverages": cells.coverages,
    "exchangeability": Table(
        "exchangeability > * > * > *",
        ("noise", "lost", "batch"),
        {
            "covered": "covered:.3f",
            "without the odds": lambda _, of: cells.shown(of.get("without odds"), ".3f"),
            "infinite": "infinite:.3f",
            "alarms in 50 calls": lambda _, of: "{} of {}".format(*of["alarms"]),
        },
    ),
    "rivals": cells.rivals,
    "midpoints": Table(
        "midpoints > * > * > *",
        ("network", "batch", SETTING),
        {
            "copies": "mse > copies:.4f",
            "midpoints": "mse > midpoints:.4f",
            "over copies'": lambda _, of: "{:.2f} ({:.2f} to {:.2f})".format(*of["mse ratio"]),
            "class kept, copies": "class kept > copies:.3f",
            "midpoints ": "class kept > midpoints:.3f",
            "`tune` takes": lambda _, of: of["chosen"],
        },
    ),
    "mixtures": Table(
        "mixtures > * > * > *",
        ("network", "batch", SETTING),
        {
            "the better of copies and midpoints": "today:",
            "mixtures over it": lambda _, of: "{:.2f} ({:.2f} to {:.2f})".format(
                *of["over today's"]
            ),
            "taken": "chosen:",
            "its cost": lambda _, of: "{:.2f} ({:.2f} to {:.2f})".format(*of["cost"]),
        },
    ),
    "adversaries": Table(
        "adversaries > lenet5 > B = 240 > * > codes > *",
        ("attack", "scheme"),
        {
            "trusting": "trusting:.2g",
            "defended": "defended:.2g",
            "without them": "oracle:.2g",
            "found of 5": "found:.1f",
            "honest ones dropped": "innocent:.2f",
            "rows marked": "undefended:.0%",
            "wrong in silence": "silent:.2f",
        },
    ),
    "adversaries_networks": Table(
        "adversaries > * > * > * > codes > the paper's, ordered|Berrut, ordered|"
        "Floater-Hormann, ordered|Lagrange, ordered|replication|regression",
        ("network", "batch", "attack", "scheme"),
        {
            "defended": "defended:.2g",
            "without them": "oracle:.2g",
            "rows marked": "undefended:.0%",
            "wrong in silence": "silent:.2f",
            "calls": "calls:d",
        },
    ),
    "adversaries_calls": Table(
        "adversaries > calls > * > *",
        ("scheme", "attack"),
        {
            "calls": "calls:d",
            "compromised": "compromised workers:d",
            "of them excluded": "of them excluded:d",
            "others excluded": "others excluded:d",
            "others dropped, in all calls": "others dropped:d",
            "calls with marked rows": "calls with marked rows:d",
        },
    ),
    "gradients": Table(
        "gradients > * > * > *",
        ("network", "batch", SETTING),
        {
            "copies, normalised MSE": "schemes > chosen > mse:.4f",
            "with gradients, over it": "copies:.2f",
            "with outputs, over it": "copies by outputs:.2f",
            "splines, ordered": "schemes > splines > mse:.4f",
            "ordered by gradients, over it": "splines:.2f",
        },
    ),
    "bound": Table(
        "bound > * > * > * > schemes > *",
        ("network", "batch", SETTING, "scheme"),
        {"normalised MSE": "mse:.4f", "least under the prior": "bound:.4f", "ratio": "over:.2f"},
    ),
    "main": Table(
        "accuracy > lenet5 > table > B = 240 > *",
        (SETTING,),
        SCHEMES
        | {"squared error": "schemes > the paper's scheme > against regression > mse > 0:.0f"},
    ),
    "subjects": Table(
        "accuracy > * > table > B = 240 > (24, 20, 4) > schemes > *", ("",), {"": "mse:.4f"}, 0
    ),
    "regimes": Table(
        "accuracy > lenet5 > table > * > (24, 20, 4) > schemes > *", ("",), {"": ACCURACY}, 0
    ),
    "lost": Table(
        f"accuracy > lenet5 > {'|'.join(KINDS)} > B = 240 > (24, 20, 4) > schemes > *",
        ("",),
        {"": "mse:.4f"},
        0,
    ),
    "parm": Table(
        "peers > ParM > schemes > *",
        ("",),
        {"normalised MSE": "mse:.4f", "accuracy kept": ACCURACY, "work": "work:.2f"},
    ),
    "leaderboard": cells.leaders,
    "peers": cells.peers,
    "distances": Table(
        "distances > * > (24, 20, 4)",
        ("data",),
        {
            "normalised MSE": "schemes > chosen > mse:.4f",
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
    "memories": Table(
        "surrogates > * > memory > third 1|third 2|third 3", ("",), {"": "against without:.3f"}, 1
    ),
    "useless": Table("surrogates > * > useless > * > *", ("", "batch"), {"": "0:.4f"}, 2),
    "waiting": Table(
        "waiting > regimes > * > policies > *", ("workers / parts",), {"": cells.tail}, 1
    ),
    "fan_out": Table("waiting > fan-out > * > policies > *", ("parts",), {"": cells.tail}, 1),
    "latency": Table("latency > * > policies > *", ("", ""), LATENCIES),
    "verification": cells.found_wrong,
    "resilience": Table("resilience > * > bars > *", ("", ""), {"measured": cells.number}),
    "serving": Table(
        "serving > faults > *", ("LeNet-5, under faults",), {"measured": cells.number}
    ),
    "saturation": Table(
        "serving > saturation > servers > *",
        ("connections",),
        {at: f"{at} > rows a second:.0f" for at in ("1", "8", "32", "64")},
    ),
    "clients": cells.clients("workloads", "5 % ten times slower, one part", SLOW),
    "clients_faults": cells.clients("faults", "hung, corrupted, killed", FAULTY),
    "fleet": Table("fleet > workloads > * > clients > *", ("", ""), CLIENTS),
    "fleet_faults": Table("fleet > faults > * > *", ("at one server, or at several", ""), CLIENTS),
    "jobs": cells.jobs,
    "job_memory": Table("job > memory > *", ("",), {"MB": ":.0f"}),
    "means": cells.means,
    **{
        f"means_{name}": Table(f"mean > * > {name} > * > *", ("data", "of", "rows"), INTERVALS)
        for name in ("fixed", "student")
    },
    "means_rare": Table(
        "mean > rare > rare > * > *",
        ("data", "rows"),
        {
            "covered": "covered:.3f",
            "infinite": "infinite:.3f",
            "with bounds": "with bounds:.3f",
            "times as wide": "times as wide:.1f",
            "`anytime`, with bounds": "anytime, with bounds:.3f",
            "draws": "draws:d",
        },
    ),
    "means_looks": Table(
        "mean > * > looks > *",
        ("data", "of"),
        {
            "stopped by width": "ours > stopped:.3f",
            "sampling": "sampling > stopped:.3f",
            "every look, `anytime`": "ours > anytime:.3f",
            "sampling, wider alike": "sampling > anytime:.3f",
            "every look": "ours > at every look:.3f",
        },
    ),
    "means_processes": Table(
        "mean > * > processes",
        ("data",),
        {
            "rows": "rows:d",
            "of": "total:d",
            "rows of sampling": "sampled rows:d",
            "seconds": "wall seconds:.1f",
            "sampling, at least": "least seconds of sampling:.1f",
            "workers killed": "workers killed:d",
        },
    ),
    "convergence": Table(
        f"convergence > * > {OVER_WORKERS} > *",
        ("", "lost", ""),
        {
            "spline": "spline > slope:.2f",
            "its bound": "spline > slope of the bound:.2f",
            "between neighbouring N": cells.local,
            "Berrut": "Berrut > slope:.2f",
            "Berrut's bound": "Berrut > slope of the bound:.2f",
            "error at the largest N": "spline > mse > -1 > 0:.1e",
            "floor of float32": "floor:.0e",
        },
    ),
    "convergence_lost": Table(
        "convergence > * > lost uniformly|lost side by side > *",
        ("", "lost", ""),
        {
            "N": "workers > 0:d",
            "S": cells.counts,
            "spline": cells.fitted("spline"),
            "its bound": "spline > slope of the bound:.2f",
            "between neighbouring S": cells.local,
            "Berrut": cells.fitted("Berrut"),
            "error at the least S": "spline > mse > 0 > 0:.1e",
            "at the most": "spline > mse > -1 > 0:.1e",
        },
    ),
    "letcc_rmse": Table(
        "letcc > networks > * > * > lost > * > *",
        ("network", "(N, K)", "lost"),
        {"": "rmse:.3f"},
        3,
    ),
    "letcc_accuracy": Table(
        "letcc > networks > * > * > lost > * > *",
        ("network", "(N, K)", "lost"),
        {"": ACCURACY},
        3,
    ),
    "letcc": cells.letcc,
    "letcc_sizes": Table(
        "letcc > sizes > *",
        ("model",),
        {
            SETTING: "setting:",
            "numbers per input": "numbers per input:d",
            "encode, ms": "encode, ms:.2g",
            "decode, ms": "decode, ms:.2g",
        },
    ),
    "letcc_slopes": Table(
        "letcc > slopes > * > * > *",
        ("", "lost", ""),
        {"slope": "fitted slope:.2f", "the theorem's": "slope of the bound:.2f"},
    ),
    "letcc_compromised_slopes": Table(
        "letcc > slopes with adversaries > * > *",
        ("", "compromised workers: N to the power"),
        {
            "slope": "slope:.2f",
            "the paper's rate": "slope of the bound:.2f",
            "slope without smoothing": "slope without smoothing:.2f",
        },
    ),
    "letcc_adversaries": Table(
        "letcc > adversaries > * > codes > *",
        ("attack", "scheme"),
        {
            "trusting": "trusting:.2g",
            "with `adversaries=5`": "defended:.2g",
            "without them": "oracle:.2g",
            "found of 5": "found:.1f",
        },
    ),
    "convergence_bound": cells.bounds,
    "convergence_adversaries": Table(
        "convergence > * > adversaries > *",
        ("", "compromised workers: N to the power"),
        {
            "N": cells.several("workers"),
            "compromised": cells.several("adversaries"),
            "slope": cells.fitted(),
            "the paper's rate": "slope of the bound:.2f",
            "slope of the bound with its constant": "slope of the bound with its constant:.2f",
            "error at the least N": "mse > 0 > 0:.2e",
            "at the largest": "mse > -1 > 0:.2e",
            "the bound there": "bound > -1:.2e",
            "without smoothing": "mse without smoothing > -1 > 0:.2e",
            "variance of the outputs": "variance:.3g",
        },
    ),
}
