"""Codes and how they are used, tried on the same batches with the same received sets.

Where coded inputs are inputs of the batch as they are, their results are looked up among the
model's own outputs, as the networks are deterministic; mixed ones are run through the network,
once a batch, in large batches. Intervals are 95 % over batches, paired where codes are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn

from coded_torch import metrics
from coded_torch.codes import BatchPlan, Code, KernelCode, SplineCode
from coded_torch.grouping import Grouping
from coded_torch.linear import SplineMap
from coded_torch.nn import CodedWrapper
from coded_torch.points import chord_length
from coded_torch.stragglers import Stragglers, Uniform
from coded_torch.tuning import tune

from .subjects import SEED, Batch, Subject, run

__all__ = [
    "BATCH_SIZE",
    "SMOOTHINGS",
    "TUNING_SETS",
    "Case",
    "Round",
    "Scheme",
    "Scores",
    "Uncoded",
    "best_spline",
    "equal_copies",
    "evaluate",
    "half_width",
    "ratio",
    "received_by",
    "rounded",
    "splines",
    "student",
    "summaries",
    "tuned_kernel",
    "uniform",
    "unmixed",
]

BATCH_SIZE = 240
TUNING_SETS = 5  # received sets per batch: rare ones decide the squared error
# Of the paper's encoder and decoder.
SMOOTHINGS = {
    "encoder": (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
    "decoder": (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
}

Case = tuple[int, int, int]  # N, K, S
Interval = list[float | None]  # a number and half the width of its interval


class Scheme(NamedTuple):
    """A code and how it is used."""

    code: Code
    ordering: str = "similarity"
    num_stragglers: int | None = None  # what the code is told; None: the truth
    spline: bool = False  # decode along the path instead

    @property
    def mixes(self) -> bool:
        """Whether coded inputs are mixtures, which the network has to be run on."""
        if isinstance(self.code, KernelCode):
            return self.code.placement > 0
        return not isinstance(self.code, Uncoded)

    def fit(self, batch: Batch, num_stragglers: int) -> BatchPlan:
        code = self.code
        if not code.uses_geometry and self.ordering == "arrival":
            return code.fit(Grouping.arrival(len(batch.images), code.num_data))
        grouping = Grouping(batch.order(self.ordering, code.shrinkage), code.num_data)
        geometry = batch.geometry(code.shrinkage)
        told = num_stragglers if self.num_stragglers is None else self.num_stragglers
        plan = code.fit(grouping, geometry, told)
        return _AlongThePath(plan, grouping, geometry.squared_distances()) if self.spline else plan


class _AlongThePath(BatchPlan):
    """A plan that mixes nothing, decoded by each group's spline instead of the kernel."""

    def __init__(self, plan: BatchPlan, grouping: Grouping, squared_distances: Tensor) -> None:
        self.code, self.num_groups = plan.code, plan.num_groups
        self._plan, self._grouping = plan, grouping
        rows = grouping.rows.T  # [G, K]
        steps = squared_distances[rows[:, :-1], rows[:, 1:]].sqrt()
        self._knots = [chord_length(s.numpy()) for s in steps]

    def encode(self, values: Tensor) -> Tensor:
        return self._plan.encode(values)

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        grouping = self._grouping
        inputs = self._plan.encode(torch.arange(grouping.batch_size))[received]  # [F, G]
        answers = []
        for g, knots in enumerate(self._knots):
            place = {int(row): k for k, row in reversed(list(enumerate(grouping.rows[:, g])))}
            at, first = np.unique([place[int(row)] for row in inputs[:, g]], return_index=True)
            answers.append(SplineMap(knots[at], knots)(results[torch.from_numpy(first), g]))
        return grouping.scatter(torch.stack(answers, dim=1))


class Uncoded(Code):
    """The first K of the N workers compute an input each; one whose worker is late has no answer.

    Missing answers are NaN, which counts as wrong.
    """

    def fit(self, grouping: Grouping, geometry: Any = None, num_stragglers: int = 0) -> BatchPlan:
        return _Uncoded(self, grouping)


class _Uncoded(BatchPlan):
    def __init__(self, code: Uncoded, grouping: Grouping) -> None:
        self.code, self.num_groups, self._grouping = code, grouping.num_groups, grouping

    def encode(self, values: Tensor) -> Tensor:
        copies = torch.arange(self.code.num_workers) % self.code.num_data
        return self._grouping.gather(values)[copies]

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        answers = results.new_full((self.code.num_data, *results.shape[1:]), math.nan)
        workers = [worker for worker in received if worker < self.code.num_data]
        answers[workers] = results[: len(workers)]
        return self._grouping.scatter(answers)


class Round:
    """One batch and the sets of workers that answer it; nothing is run or fitted twice.

    Args:
        model: the network.
        batch: the batch.
        sets: the received set of every law.
    """

    def __init__(self, model: nn.Module, batch: Batch, sets: Mapping[Any, list[int]]) -> None:
        self.batch = batch
        self._model, self._sets = model, sets
        self._workers = sorted(set().union(*sets.values()))
        self._at = {worker: i for i, worker in enumerate(self._workers)}
        self._plans: dict[tuple[Scheme, int], tuple[BatchPlan, Tensor]] = {}
        self._results: dict[int, Tensor] = {}

    def answers(
        self,
        scheme: Scheme,
        num_stragglers: int,
        law: Any,
        output: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> tuple[Tensor, float | None]:
        """The decoded answers of the batch, and the root mean squared error the code expects.

        Args:
            scheme: the code and its use.
            num_stragglers: how many the code is told will be late.
            law: whose received set.
            output: of the network's outputs, what is decoded.
        """
        key = scheme, num_stragglers if scheme.code.uses_geometry else 0
        if key not in self._plans:
            plan = scheme.fit(self.batch, num_stragglers)
            self._plans[key] = plan, self._run(scheme, plan)
        plan, results = self._plans[key]
        received = self._sets[law]
        arrived = output(results[[self._at[worker] for worker in received]])
        return plan.decode(arrived, received), plan.expected_rmse(received, arrived)

    @torch.no_grad()
    def _run(self, scheme: Scheme, plan: BatchPlan) -> Tensor:
        """What the workers answer, ``[|F|, G, C]``."""
        if not scheme.mixes:
            return plan.encode(self.batch.exact)[self._workers]
        coded = plan.encode(self.batch.images)[self._workers]
        content = hash(coded.numpy().tobytes())  # of one encoder, whatever its decoder
        if content not in self._results:
            self._results[content] = run(self._model, coded.flatten(0, 1))
        return self._results[content].unflatten(0, coded.shape[:2])


class Scores:
    """What one code did, batch by batch."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []

    def add(self, answers: Tensor, exact: Tensor, labels: Tensor, expected: float | None) -> None:
        """Add a batch: decoded answers, the model's own ``[B, C]``, and true classes."""
        answered = answers.isfinite().all(-1)
        found = torch.where(answered, answers.argmax(-1), -1)
        own = exact.argmax(-1)
        error = mean = spread = math.nan
        if bool(answered.all()):
            error, mean = metrics.rmse(answers, exact), metrics.rmse_mean(answers, exact)
            spread = metrics.rmse(exact.mean(0).expand_as(exact), exact)
        told = expected if expected is not None and error > 0 else math.nan
        hits = [(a == b).double().mean().item() for a, b in ((found, labels), (own, labels))]
        agreement = (found == own).double().mean().item()
        self._rows.append((*hits, agreement, error**2, mean, spread**2, told**2))

    def __iadd__(self, other: Scores) -> Scores:
        self._rows += other._rows
        return self

    @property
    def columns(self) -> np.ndarray:
        """Right, right by the model itself, agreement, MSE, mean error, variance, expected MSE."""
        return np.array(self._rows).T  # [7, batches]

    def summary(self, others: Mapping[str, Scores] | None = None) -> dict[str, Any]:
        """Numbers with half the width of their interval, also relative to those of others.

        Errors are norms over all outputs of one input.
        """
        right, own, agreement, mse, mean, variance, expected = self.columns
        root = math.sqrt(mse.mean())
        summary: dict[str, Any] = {
            "relative_accuracy": ratio(right, own),
            "agreement": ratio(agreement, np.ones_like(agreement)),
            "rmse": rounded(root, half_width(mse) / (2 * root) if root else 0.0),
            "rmse_mean": rounded(mean.mean(), half_width(mean)),
            "mse_to_variance": ratio(mse, variance),
        }
        told = ~np.isnan(expected)
        if told.any():
            each = np.sqrt(expected[told] / mse[told])
            summary["predicted_to_measured"] = ratio(each, np.ones_like(each))
            summary["prediction_off_by"] = rounded(float(np.abs(each - 1).mean()))[0]
        for name, scores in (others or {}).items():
            if scores is not self:
                their_right, _, _, their_mse, *_ = scores.columns
                summary[f"against {name}"] = {
                    "mse": ratio(mse, their_mse) if their_mse.any() else None,
                    "relative_accuracy": ratio(right - their_right, own),
                }
        return summary


def ratio(a: np.ndarray, b: np.ndarray) -> Interval:
    """The ratio of two means over batches, and half the width of its interval."""
    value = a.mean() / b.mean()
    return rounded(value, half_width(a - value * b) / b.mean())


def half_width(a: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean, Student's."""
    if len(a) < 2:
        return math.nan
    return float(student(len(a)) * a.std(ddof=1) / math.sqrt(len(a)))


def student(count: int) -> float:
    """How many standard errors a 95 % interval reaches to each side, of so many numbers."""
    return float(scipy.stats.t.ppf(0.975, count - 1))


def rounded(*values: float) -> Interval:
    """Four digits; None for what cannot be told."""
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values]


def received_by(law: Stragglers, num_workers: int) -> list[int]:
    """The workers that are not lost."""
    return (~law.sample(num_workers).isinf()).nonzero().flatten().tolist()


def uniform(case: Case) -> Callable[[int], dict[str, list[int]]]:
    """Each batch's received set, S of N lost uniformly."""
    n, _, s = case
    law = Uniform(s, seed=SEED)
    return lambda index: {"uniform": received_by(law, n)}


def evaluate(
    subject: Subject,
    batches: Iterable[Batch],
    schemes: Mapping[str, Scheme],
    num_stragglers: int,
    received: Callable[[int], Mapping[str, list[int]]],
) -> dict[str, dict[str, Scores]]:
    """Scores by law and scheme; ``received`` gives each batch's received set under every law."""
    scores: dict[str, dict[str, Scores]] = {}
    for index, batch in enumerate(batches):
        sets = received(index)
        trial = Round(subject.model, batch, sets)
        for law in sets:
            for name, scheme in schemes.items():
                answers, expected = trial.answers(scheme, num_stragglers, law)
                of_scheme = scores.setdefault(law, {}).setdefault(name, Scores())
                of_scheme.add(answers, batch.exact, batch.labels, expected)
    return scores


def summaries(scores: Mapping[str, Scores], references: Sequence[str]) -> dict[str, Any]:
    """The summary of every scheme, against those of the references that are among them."""
    others = {name: scores[name] for name in references if name in scores}
    return {name: s.summary(others) for name, s in scores.items()}


def unmixed(case: Case) -> dict[str, Scheme]:
    """The schemes that mix nothing."""
    n, k, _ = case
    return {
        # A kernel that reaches nobody fills in the mean of all results of the batch, which is
        # better than the mean of a group's, ReplicationCode's.
        "replication": equal_copies(KernelCode(k, n, length=1e-9)),
        "replication + fill": equal_copies(KernelCode(k, n)),
        "default": Scheme(KernelCode(k, n)),
    }


def equal_copies(code: KernelCode) -> Scheme:
    """Replication with lost answers predicted by the code's kernel."""
    fill = KernelCode(code.num_data, code.num_workers, shrinkage=code.shrinkage, length=code.length)
    return Scheme(fill, num_stragglers=0)  # who expects no stragglers prefers no input


def splines(n: int, k: int) -> list[SplineCode]:
    """The paper's code with all its smoothings, encoder by encoder."""
    return [
        SplineCode(k, n, encoder_smoothing=encoder, decoder_smoothing=decoder)
        for encoder in SMOOTHINGS["encoder"]
        for decoder in SMOOTHINGS["decoder"]
    ]


def best_spline(subject: Subject, batches: Iterable[Batch], case: Case, ordering: str) -> Scheme:
    """The paper's code with the smoothings of least squared error on these batches."""
    n, k, s = case
    law = Uniform(s, seed=SEED + 1)
    schemes = [Scheme(code, ordering) for code in splines(n, k)]
    errors = np.zeros(len(schemes))
    for batch in batches:
        sets = {str(i): received_by(law, n) for i in range(TUNING_SETS)}
        trial = Round(subject.model, batch, sets)
        for i in sets:
            answers = [trial.answers(scheme, s, i)[0] for scheme in schemes]
            errors += [metrics.rmse(answer, batch.exact) ** 2 for answer in answers]
    return schemes[int(errors.argmin())]


def tuned_kernel(subject: Subject, batches: Iterable[Batch], case: Case) -> KernelCode:
    """The default code with shrinkage, length and placement tuned on these batches."""
    n, k, s = case
    wrapper = CodedWrapper(
        subject.model, KernelCode(k, n), stragglers=Uniform(s, seed=SEED + 1), shuffle=False
    )
    return tune(wrapper, [batch.images for batch in batches])
