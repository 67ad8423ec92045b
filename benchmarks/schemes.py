"""What all questions of accuracy share: schemes, and one loop that tries them.

All schemes answer the same batches from the same received sets. Intervals are 95 % over batches,
paired where schemes are compared. This is the only file here that knows how trials are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from coded_torch.codes import BatchPlan, Code, RegressionCode, ReplicationCode
from coded_torch.evaluation.compare import received_by
from coded_torch.evaluation.scores import Scores, half_width, ratio, rounded, student
from coded_torch.evaluation.trial import Trial
from coded_torch.evaluation.tune import SETS, chosen
from coded_torch.input_space.ordering import Grouping
from coded_torch.stragglers import Uniform

from .subjects import AT_ONCE, SEED, Batch

__all__ = [
    "BATCH_SIZE",
    "FIXED",
    "OUTPUTS",
    "Case",
    "Scheme",
    "Scores",
    "Uncoded",
    "evaluate",
    "half_width",
    "ratio",
    "received_by",
    "rounded",
    "student",
    "summaries",
    "tuned",
    "uniform",
    "unmixed",
]

#: One metric and one length for all networks. The distances benchmark measures the gain of choosing
#: them by the results, which is the default of RegressionCode.
FIXED: dict[str, Any] = {"metric": "shrunk", "length": 2.0}
BATCH_SIZE = 240
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "logits": lambda x: x,
}

Case = tuple[int, int, int]  # N, K, S
_Key = TypeVar("_Key", bound=Hashable)
Sets = Mapping[_Key, Sequence[Sequence[int]]]  # received sets by a law, a count of lost workers...


class Scheme(NamedTuple):
    """A code, how many late workers it expects, and which outputs are decoded."""

    code: Code
    lost: int = 0
    output: str = "logits"


class Uncoded(Code):
    """No redundancy: the first K of N workers compute an input each.

    An input whose worker is late has no answer. Missing answers are NaN, which counts as wrong.
    """

    mixes = False

    def _plan(self, inputs: Sequence[Tensor], size: int, *_: Any) -> BatchPlan:
        return _Uncoded(self, Grouping.arrival(size, self.num_data))


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


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    sets: Callable[[int], Sets[_Key]],
    schemes: Callable[[_Key], Mapping[Any, Scheme]],
    scores: dict[_Key, dict[Any, Scores]] | None = None,
) -> dict[_Key, dict[Any, Scores]]:
    """Try schemes on batches.

    Args:
        model: the network; it runs once on a batch, and once for each encoder that mixes.
        batches: the batches.
        sets: received sets by keys, given the number of the batch.
        schemes: what is tried where a key's sets are received.
        scores: scores to add to. Defaults to none.
    """
    scores = {} if scores is None else scores
    for index, batch in enumerate(batches):
        drawn = [(key, received) for key, some in sets(index).items() for received in some]
        trials = _Trials(model, batch, [received for _, received in drawn])
        for key, received in drawn:
            answers: dict[Scheme, tuple[Tensor, Tensor]] = {}  # several names may share one
            for name, scheme in schemes(key).items():
                if len(_within(received, scheme.code.num_workers)) < scheme.code.min_received:
                    continue
                if scheme not in answers:
                    answers[scheme] = trials.decode(scheme, received)
                found, exact = answers[scheme]
                of_scheme = scores.setdefault(key, {}).setdefault(name, Scores())
                of_scheme.add(found, exact, batch.labels)
    return scores


class _Trials:
    """A batch through a network, for codes of any N: workers beyond a code's N do nothing."""

    def __init__(self, model: nn.Module, batch: Batch, sets: Sequence[Sequence[int]]) -> None:
        self._model, self._batch, self._sets = model, batch, sets
        self._of: dict[int, Trial] = {}

    def decode(self, scheme: Scheme, received: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the scheme's answers ``[B, C]``, and the exact ones."""
        n, stage = scheme.code.num_workers, OUTPUTS[scheme.output]
        if n not in self._of:
            sets = [_within(x, n) for x in self._sets]
            images = (self._batch.images,)
            self._of[n] = Trial(self._model, images, sets, max_batch_size=AT_ONCE)
        (answers,) = self._of[n].decode(
            scheme.code, _within(received, n), num_stragglers=scheme.lost, stage=stage
        )
        return answers, stage(self._of[n].exact[0])


def _within(received: Sequence[int], n: int) -> list[int]:
    return [worker for worker in received if worker < n]


def uniform(case: Case) -> Callable[[int], dict[str, list[list[int]]]]:
    """Return a function that draws a batch's received set, S of N workers lost uniformly."""
    n, _, s = case
    law = Uniform(s, seed=SEED)
    return lambda index: {"uniform": [received_by(law, n)]}


def summaries(scores: Mapping[str, Scores], references: Sequence[str]) -> dict[str, Any]:
    """Return the summary of every scheme, against those of the references that are among them."""
    others = {name: scores[name] for name in references if name in scores}
    return {name: s.summary(others) for name, s in scores.items()}


def unmixed(case: Case) -> dict[str, Scheme]:
    """Return the schemes that mix nothing, trivial baselines first."""
    n, k, s = case
    return {
        "uncoded": Scheme(Uncoded(k, n, ordering="arrival")),
        "no redundancy, regression": Scheme(RegressionCode(k, k, **FIXED)),
        "replication": Scheme(ReplicationCode(k, n, ordering="arrival")),
        # A regression that reaches no other input predicts the mean of the batch's results, which
        # is better than the mean of a group's. If none is expected to be late, copies are equal.
        "replication, batch mean": Scheme(RegressionCode(k, n, **FIXED | {"length": 1e-9})),
        "replication, regression": Scheme(RegressionCode(k, n, **FIXED)),
        "KernelCode": Scheme(RegressionCode(k, n, **FIXED), s),
    }


def tuned(model: nn.Module, batches: Iterable[Batch], code: Code, lost: int) -> Code:
    """Return the code with the parameters that answer these batches best, S lost uniformly."""
    law, trials = Uniform(lost, seed=SEED + 1), []
    for batch in batches:
        sets = [received_by(law, code.num_workers) for _ in range(SETS)]
        trials.append((Trial(model, (batch.images,), sets, max_batch_size=AT_ONCE), sets))
    return chosen(code, trials, lost)
