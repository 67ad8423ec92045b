"""Codes and how they are used, tried on the same batches with the same received sets.

Intervals are 95 % over batches, paired where codes are compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coded_torch.codes import BatchPlan, Code, KernelCode, ReplicationCode
from coded_torch.evaluation.compare import received_by
from coded_torch.evaluation.scores import Scores
from coded_torch.evaluation.trial import Trial
from coded_torch.evaluation.tune import SETS, chosen
from coded_torch.input_space.ordering import Grouping
from coded_torch.stragglers import Uniform

from .subjects import AT_ONCE, SEED, Batch

__all__ = [
    "BATCH_SIZE",
    "Case",
    "Scheme",
    "Uncoded",
    "decode",
    "equal_copies",
    "evaluate",
    "summaries",
    "trial",
    "tuned",
    "uniform",
    "unmixed",
]

#: One metric and one length for all networks; ``distances.py`` measures what it is worth that the
#: results choose them, which is the default.
FIXED: dict[str, Any] = {"metric": "shrunk", "length": 2.0}
BATCH_SIZE = 240

Case = tuple[int, int, int]  # N, K, S


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A code, the ordering of the batch, and the S that the code expects, if it is another."""

    code: Code
    ordering: str = "similarity"
    num_stragglers: int | None = None

    def __post_init__(self) -> None:
        if self.code.ordering != self.ordering:
            object.__setattr__(self, "code", self.code.replace(ordering=self.ordering))


class Uncoded(Code):
    """The first K of the N workers compute an input each; one whose worker is late has no answer.

    Missing answers are NaN, which counts as wrong.
    """

    mixes = False

    def fit(self, grouping: Grouping, geometry: Any = None, num_stragglers: int = 0) -> BatchPlan:
        return _Uncoded(self, grouping)


class _Uncoded(BatchPlan):
    def __init__(self, code: Uncoded, grouping: Grouping) -> None:
        self.code, self._grouping = code, grouping
        self.batch_size, self.num_groups = grouping.batch_size, grouping.num_groups

    def encode(self, values: Tensor) -> Tensor:
        copies = torch.arange(self.code.num_workers) % self.code.num_data
        return self._grouping.gather(values)[copies]

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        answers = results.new_full((self.code.num_data, *results.shape[1:]), math.nan)
        workers = [worker for worker in received if worker < self.code.num_data]
        answers[workers] = results[: len(workers)]
        return self._grouping.scatter(answers)


def trial(model: nn.Module, batch: Batch, received: Iterable[Sequence[int]]) -> Trial:
    """A batch through a network: it runs once on it, and once for each encoder that mixes."""
    return Trial(model, (batch.images,), received, max_batch_size=AT_ONCE)


def decode(
    tried: Trial,
    scheme: Scheme,
    received: Sequence[int],
    num_stragglers: int,
    stage: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, float | None]:
    """The answers ``[B, C]`` of a scheme, of outputs after a stage, and the error it expects."""
    lost = num_stragglers if scheme.num_stragglers is None else scheme.num_stragglers
    (answers,), expected = tried.decode(scheme.code, received, num_stragglers=lost, stage=stage)
    return answers, expected


def uniform(case: Case) -> Callable[[int], dict[str, list[int]]]:
    """Each batch's received set, S of N lost uniformly."""
    n, _, s = case
    law = Uniform(s, seed=SEED)
    return lambda index: {"uniform": received_by(law, n)}


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    schemes: Mapping[str, Scheme],
    num_stragglers: int,
    received: Callable[[int], Mapping[str, list[int]]],
) -> dict[str, dict[str, Scores]]:
    """Scores by law and scheme; ``received`` gives each batch's received set under every law."""
    scores: dict[str, dict[str, Scores]] = {}
    for index, batch in enumerate(batches):
        sets = received(index)
        tried = trial(model, batch, sets.values())
        for law, workers in sets.items():
            for name, scheme in schemes.items():
                answers, expected = decode(tried, scheme, workers, num_stragglers)
                of_scheme = scores.setdefault(law, {}).setdefault(name, Scores())
                of_scheme.add(answers, tried.exact[0], batch.labels, expected)
    return scores


def summaries(scores: Mapping[str, Scores], references: Sequence[str]) -> dict[str, Any]:
    """The summary of every scheme, against those of the references that are among them."""
    others = {name: scores[name] for name in references if name in scores}
    return {name: s.summary(others) for name, s in scores.items()}


def unmixed(case: Case) -> dict[str, Scheme]:
    """The schemes that mix nothing."""
    n, k, _ = case
    return {
        "replication": Scheme(ReplicationCode(k, n), "arrival"),
        # A regression that reaches no other input fills in the mean of all results of the batch,
        # which is better than the mean of a group's, ReplicationCode's.
        "replication, batch mean": equal_copies(KernelCode(k, n, **FIXED | {"length": 1e-9})),
        "replication, regression": equal_copies(KernelCode(k, n, **FIXED)),
        "KernelCode": Scheme(KernelCode(k, n, **FIXED)),
    }


def equal_copies(code: KernelCode) -> Scheme:
    """Replication with lost answers predicted by the code: where none is late, no input is
    preferred."""
    return Scheme(code, num_stragglers=0)


def tuned(
    model: nn.Module, batches: Iterable[Batch], scheme: Scheme, num_stragglers: int
) -> Scheme:
    """The scheme with the numbers that answer these batches best, S lost uniformly."""
    law, trials = Uniform(num_stragglers, seed=SEED + 1), []
    for batch in batches:
        sets = [received_by(law, scheme.code.num_workers) for _ in range(SETS)]
        trials.append((trial(model, batch, sets), sets))
    return dataclasses.replace(scheme, code=chosen(scheme.code, trials, num_stragglers))
