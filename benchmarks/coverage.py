"""Do error bounds hold as often as they say? ``python -m benchmarks coverage``.

Batches of held-out rows go through a wrapper that loses some of 24 parts. The errors of estimated
rows are compared with their bounds at three levels, and labels with their p-values.
The oracle's constant is the bound that contains just as many of all errors of the data set. Half
the width of a 95 % interval of the mean over batches stands beside every coverage.

Settings: 4, 8 or 12 parts missing of 240 rows, 8 of 64 rows, 12 of 40; a code that repeats inputs
unevenly; batches sorted by the module's outputs, as dealt and in contiguous parts; a student, a
linear map fitted to earlier rows; a memory of these rows; a memory of other classes; and requests
of four rows, where the memory calibrates the only missing one.

Rivals, at 95 %: split conformal prediction, which estimates from half of the results and calibrates
on the others; the regression's standard deviation times the constant that contains 95 % of the
left-out errors; and, of one output, MAPIE's jackknife+ with the same regression.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coded_torch import CodedWrapper, Regression, Waiting
from coded_torch.codes import NotEnoughResults, RegressionCode
from coded_torch.experiments.scores import half_width, rounded
from coded_torch.input_space._gaussian_process import GaussianProcess
from coded_torch.input_space.metrics import Choice, Distances, Sources
from coded_torch.nn._division import dealt
from coded_torch.stragglers import Uniform
from coded_torch.surrogates import Memory
from coded_torch.workers import LocalWorkers

from . import tasks
from .runs import Measurement, MissingDataError, progress
from .tasks import Task

SEED, PARTS = 0, 24
LEVELS = (0.9, 0.95, 0.99)  # the levels of bounds that are compared
JACKKNIFE = 10  # the batches of jackknife+, which fits a regression for every result


class Setting(NamedTuple):
    """A way to make and answer batches."""

    rows: int = 240
    missing: int = 8
    arrival: str = "uniform"  # or "sorted", "contiguous"
    helper: str = ""  # or "copies", "student", "memory", "drift"
    parts: int = PARTS


SETTINGS = {
    "B 240": Setting(),
    "B 240, 4 missing": Setting(missing=4),
    "B 240, 12 missing": Setting(missing=12),
    "B 64": Setting(rows=64),
    "B 40, 12 missing": Setting(rows=40, missing=12),
    "uneven copies": Setting(missing=4, helper="copies"),
    "sorted": Setting(arrival="sorted"),
    "sorted, contiguous": Setting(arrival="contiguous"),
    "student": Setting(helper="student"),
    "memory": Setting(helper="memory"),
    "drift": Setting(helper="drift"),
    "B 4, memory": Setting(rows=4, missing=1, helper="memory", parts=4),
    "B 4, drift": Setting(rows=4, missing=1, helper="drift", parts=4),
}


def linear(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the linear map of rows ``[B, ...]`` that fits outputs best."""

    def flat(x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1)

    rows = flat(x).double()
    ridge = 1e-2 * rows.square().sum(0).mean() * torch.eye(rows.shape[1])
    weight = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ y.double()).float()
    return lambda x: flat(x) @ weight


def summary(batches: list[dict[str, Tensor]], classes: bool = False) -> dict[str, Any]:
    """Return coverages with half their intervals, and bounds over the oracle's constant.

    Each batch has the errors, bounds and p-values of its missing rows, in all received sets.
    """
    errors, found = torch.cat([of["error"] for of in batches]), {}
    for level in (key for key in batches[0] if key.startswith("0.")):
        inside = [of["error"] <= of[level] for of in batches]
        radii, hits = torch.cat([of[level] for of in batches]), torch.cat(inside)
        thirds = radii.argsort().tensor_split(3)
        constant = errors.quantile(float(level), interpolation="higher")
        found[level] = {
            "covered": mean(inside),
            "terciles": rounded(*(float(hits[third].double().mean()) for third in thirds)),
            "bound to constant": rounded(float(radii.median() / constant))[0],
            "infinite": rounded(float(radii.isinf().double().mean()))[0],
        }
    if classes:
        sure = [(of["risk"][0] <= 0.05, of["risk"][1] > 0) for of in batches]
        found["certified"] = mean([low for low, _ in sure])
        found["certified and wrong"] = mean([low & wrong for low, wrong in sure])
    found["rmse"] = rounded(float(errors.square().mean().sqrt()))[0]
    return found


def beside(batches: list[dict[str, Tensor]], ours: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return a rival's numbers at 95 %, and the median of its bounds over the median of ours."""
    theirs, own = (torch.cat([of["0.95"] for of in x]).median() for x in (batches, ours))
    return summary(batches)["0.95"] | {"bound to ours": rounded(float(theirs / own))[0]}


def mean(flags: list[Tensor]) -> list[float | None]:
    """Return the mean over batches of a share, and half its 95 % interval."""
    each = torch.stack([x.double().mean() for x in flags]).numpy()
    return rounded(each.mean(), half_width(each))


def batches(setting: Setting, outputs: Tensor, count: int) -> Iterator[Tensor]:
    """Yield the rows of batches out of those with these outputs."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(count):
        rows = torch.randperm(len(outputs), generator=generator)[: setting.rows]
        if setting.arrival != "uniform":
            values = outputs[rows]
            values = values.argmax(1) if values.shape[1] > 1 else values[:, 0]
            rows = rows[values.argsort()]
        if setting.arrival == "contiguous":  # so that a part is a block
            places = torch.tensor(sum(dealt(len(rows), PARTS), ()))
            back = torch.empty_like(places)
            back[places] = torch.arange(len(rows))
            rows = rows[back]
        yield rows


def wrapped(model: nn.Module, setting: Setting, surrogate: Any, seed: int) -> CodedWrapper:
    how: dict[str, Any] = {"waiting": Waiting(estimate_after=3.0)}
    how["parts"] = min(setting.parts, setting.rows)
    if setting.helper == "copies":
        how = {"code": RegressionCode(20, PARTS)}
    pool = LocalWorkers(Uniform(setting.missing, seed=seed))
    return CodedWrapper(model, workers=pool, surrogate=surrogate, **how)


def surrogate_of(setting: Setting, model: nn.Module, x: Tensor, y: Tensor) -> Any:
    if setting.helper == "student":
        return linear(x, y)
    if setting.helper in ("memory", "drift"):
        memory = Memory()
        memory.follow(model)
        memory.observe([x], [y])
        memory.rebuild()
        memory.observe = lambda *_: None  # batches share rows, which it must not know
        return memory
    return ()


def split_conformal(x: Tensor, y: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Return errors of missing rows estimated from half of the results, and bounds at 95 %."""
    known = (~missing).nonzero().flatten()
    calibrating, half = known[::2], known[1::2].tolist()
    off = (Regression().plan([x]).decode(y[half, None], half) - y).norm(dim=1).double()
    k = math.floor(0.05 * (len(calibrating) + 1) + 1e-9)
    radius = off[calibrating].topk(k).values[-1] if k else off.new_tensor(math.inf)
    return off[missing], radius.expand(int(missing.sum()))


def times_sigma(x: Tensor, y: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Return errors of missing rows, and their standard deviations times a constant."""
    known, lost = (~missing).nonzero().flatten(), missing.nonzero().flatten()
    answers, choice = chosen(x, y, known)
    squared, step = Distances(Sources([x]), (choice.metric,)).by(choice.metric)
    process = GaussianProcess(squared, choice.length * step, known, lost)
    left_out = process.leave_one_out_residuals(y[known].double()).norm(dim=1)
    off = left_out / process.leave_one_out_variances.sqrt()
    constant = off.quantile(0.95, interpolation="higher")
    errors = (answers - y).norm(dim=1)[missing].double()
    return errors, constant * process.variances.sqrt()


def jackknife(x: Tensor, y: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances of missing numbers from MAPIE's intervals' middles, and half the widths."""
    try:
        from mapie.regression import CrossConformalRegressor
        from sklearn.base import BaseEstimator, RegressorMixin
    except ImportError:
        raise MissingDataError("MAPIE is not installed; get it with: pip install mapie") from None
    known = (~missing).nonzero().flatten()
    _, choice = chosen(x, y, known)

    class Rows(RegressorMixin, BaseEstimator):  # type: ignore[misc]
        def fit(self, rows: Any, numbers: Any) -> Rows:
            self.rows_, self.numbers_ = torch.tensor(rows), torch.tensor(numbers)[:, None, None]
            return self

        def predict(self, rows: Any) -> Any:
            plan = Regression(choice.metric, choice.length).plan(
                [torch.cat([self.rows_, torch.tensor(rows)])]
            )
            found = plan.decode(self.numbers_, range(len(self.rows_)))
            return found[len(self.rows_) :, 0].numpy()

    rows = x.flatten(1).numpy()
    conformal = CrossConformalRegressor(Rows(), confidence_level=0.95, method="plus", cv=-1)
    conformal.fit_conformalize(rows[known], y[known, 0].numpy())
    _, ends = conformal.predict_interval(rows[missing])
    low, high = torch.from_numpy(ends[:, :, 0]).T
    return (y[missing, 0] - (low + high) / 2).abs().double(), (high - low).double() / 2


def chosen(x: Tensor, y: Tensor, known: Tensor) -> tuple[Tensor, Choice]:
    """Return the answers of a batch, and how they were estimated."""
    plan = Regression().plan([x])
    return plan.decode(y[known, None], known.tolist()), plan.choices[0]


@torch.no_grad()
def rivals(make: Callable[[], Task], setting: Setting, quick: bool) -> dict[str, Any]:
    """Return coverages and bounds of the rivals at 95 %, on one received set a batch."""
    task, counts = make(), settings(quick)
    model, found = task.model.eval(), defaultdict[str, list[dict[str, Tensor]]](list)
    every = {"split conformal": split_conformal, "sigma times a constant": times_sigma}
    y = torch.cat([model(x) for x in task.inputs.split(512)])
    if y.shape[1] == 1:
        every["jackknife+"] = jackknife
    for number, rows in enumerate(batches(setting, y, counts["batches"])):
        coded = wrapped(model, setting, (), 1000 * number)
        answers, report = coded.run(task.inputs[rows])
        missing, exact = report.estimated, y[rows]
        error = (answers - exact).norm(dim=1)[missing].double()
        found["ours"].append({"error": error, "0.95": report.error_bounds_at(0.95)[missing]})
        if number == JACKKNIFE:
            every.pop("jackknife+", None)
        for name, rival in every.items():
            off, radii = rival(task.inputs[rows], exact, missing)
            found[name].append({"error": off, "0.95": radii})
    ours = found["ours"]  # compared on the same batches
    return {name: beside(some, ours[: len(some)]) for name, some in found.items()}


@torch.no_grad()
def coverage(make: Callable[[], Task], setting: Setting, quick: bool) -> dict[str, Any]:
    task, counts = make(), settings(quick)
    model, run, split = task.model.eval(), [], []
    y = torch.cat([model(x) for x in task.inputs.split(512)])
    earlier = torch.arange(len(y)) % 3 == 0
    if setting.helper == "drift" and y.shape[1] > 1:  # of other classes than those asked
        earlier = y.argmax(1) < y.shape[1] // 2
    surrogate = surrogate_of(setting, model, task.inputs[earlier], y[earlier])
    x, y = task.inputs[~earlier], y[~earlier]
    seconds = []
    drawn = batches(setting, y, counts["batches"])
    for number, rows in enumerate(progress(drawn, "batches", counts["batches"])):
        inputs, exact, found = x[rows], y[rows], []
        for repeat in range(counts["received sets a batch"]):
            coded = wrapped(model, setting, surrogate, 1000 * number + repeat)
            try:
                answers, report = coded.run(inputs)
            except NotEnoughResults:  # 12 of 24 parts may hold more than half of few rows
                continue
            missing = report.estimated
            if missing.any():
                risks = (
                    report.error_bounds if report.label_p_values is None else report.label_p_values
                )
                wrong = (answers.argmax(1) != exact.argmax(1))[missing].double()
                found.append(
                    {
                        "error": (answers - exact).norm(dim=1)[missing].double(),
                        "risk": torch.stack([risks[missing], wrong]),
                        **{str(level): report.error_bounds_at(level)[missing] for level in LEVELS},
                    }
                )
                seconds.append(report.decode_seconds)
        if found:
            run.append({key: torch.cat([of[key] for of in found], -1) for key in found[0]})
            if not setting.helper:
                off, radii = split_conformal(inputs, exact, missing)
                split.append({"error": off, "0.95": radii})
    numbers = summary(run, classes=y.shape[1] > 1)
    numbers["decode seconds"] = rounded(float(torch.tensor(seconds).median()))[0]
    return numbers | ({"split": beside(split, run)} if split else {})


def measurements(quick: bool) -> Iterable[Measurement]:
    names = (*tasks.TABLES, *tasks.SEQUENCES, "lenet5")
    for name in names[: 1 if quick else None]:
        make = functools.partial(tasks.task, name, raw=name in tasks.RAW)
        for key, setting in SETTINGS.items():
            yield (name, key), functools.partial(coverage, make, setting, quick)
        for key in ("B 240", "B 64"):
            measure = functools.partial(rivals, make, SETTINGS[key], quick)
            yield (name, f"{key}, rivals"), measure


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "parts": PARTS,
        "levels": [*LEVELS],
        "batches": 5 if quick else 50,
        "received sets a batch": 2 if quick else 20,
    }
