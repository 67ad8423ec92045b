"""Results that can be compared, and what is made of them before machines are judged."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._predictions import Predictions, residuals, spread_of
from .input_space.gaussian_process import KernelRegression

__all__ = [
    "COPIES",
    "Evidence",
    "are_classes",
    "logarithms",
    "predictions",
    "rows_of",
    "same_results",
]

#: Copies differ if they are so far apart, in the outputs' spread: more than float16, bfloat16 and
#: float32 machines do among each other.
COPIES = 0.1
_TELLING = 3  # different results that two machines must have in common
_PROBABLE = 1e-7  # half precision rounds smaller probabilities away
_CLASSES = 0.5  # of the results that are those of several inputs
_REPEATED = 0.02  # of the others' results may be those of several inputs
_HELPFUL = 0.9  # of the error of predictions, at most what surrogates leave


class Evidence(NamedTuple):
    """Results of a request, one a row, that can be compared.

    Attributes:
        values: ``[n, C]``, float64 on the host.
        machine: ``[n]``, whose each result is: a place in the list of machines.
        group: ``[n]``; rows of one group are compared with each other.
        point: ``[n]``, what was computed: rows of the same number are results of one input.
        at: ``[n]``, its place among the M inputs of the regression; -1: it has none.
        regression: of the distinct inputs; None: there are no distances.
        tolerance: how far apart copies may be, in the outputs' spread.
        curve: whether a machine has the same place on a curve in every group, so that what is
            special of the place cannot be separated from what is of the machine.
        guesses: ``[n, C]`` each, what surrogates say of the values, honestly.
        probable: ``[C]``, bool: columns of probabilities, which are predicted as logarithms; None:
            there are none. Guesses are on that scale.
    """

    values: Tensor
    machine: Tensor
    group: Tensor
    point: Tensor
    at: Tensor
    regression: KernelRegression | None
    tolerance: float = COPIES
    curve: bool = False
    guesses: Sequence[Tensor] = ()
    probable: Tensor | None = None

    @property
    def to_predict(self) -> Tensor:
        """The values on the scale on which they are predicted."""
        return self.values if self.probable is None else logarithms(self.values, self.probable)


def logarithms(values: Tensor, columns: Tensor) -> Tensor:
    """Values ``[..., C]`` with the logarithms of some columns ``[C]``, bool."""
    return torch.where(columns, values.clamp(min=_PROBABLE).log(), values)


class Row(NamedTuple):
    """A result, to the bit, of a machine, at a point of a part of the evidence."""

    machine: int
    result: bytes
    part: Evidence
    point: int
    at: int

    def is_apart(self, other: Row) -> bool:
        """Whether these are results of inputs of which some distance is known."""
        regression = self.part.regression
        if self.part is not other.part or regression is None or min(self.at, other.at) < 0:
            return False
        return regression.squared_distance(self.at, other.at) > 0


def rows_of(evidence: Sequence[Evidence]) -> list[Row]:
    """Every result, as it came."""
    rows = []
    for part in evidence:
        columns = part.machine.tolist(), part.point.tolist(), part.at.tolist()
        values = (part.values + 0.0).numpy()  # of -0.0 and 0.0 one
        for result, machine, point, at in zip(values, *columns, strict=True):
            rows.append(Row(machine, result.tobytes(), part, point, at))
    return rows


def same_results(rows: Sequence[Row], most: int) -> set[frozenset[int]]:
    """Pairs of machines with the same results, to the bit, for different inputs.

    One of the two returned what the other did. It takes three different results, each at inputs
    that are some distance apart and of no more inputs than ``most`` liars explain; and the other
    machines' results must differ from input to input, or it is the module that repeats them.
    """
    of: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        of[row.machine].append(row)
    alike: defaultdict[tuple[bytes, ...], list[int]] = defaultdict(list)
    for machine, of_machine in of.items():
        alike[tuple([row.result for row in of_machine])].append(machine)
    classes = [same for same in alike.values() if 1 < len(same) <= max(2, most + 1)]
    if not classes:
        return set()
    inputs, pairs = _inputs(rows), set()
    for a, b in itertools.chain(*(itertools.combinations(same, 2) for same in classes)):
        telling = {x.result for x, y in zip(of[a], of[b], strict=True) if x.is_apart(y)}
        if sum(len(inputs[result]) <= max(2, most + 1) for result in telling) >= _TELLING:
            pairs.add(frozenset((a, b)))
    named = frozenset().union(*pairs)
    others = [row for row in rows if row.machine not in named]
    return pairs if others and _repeated(others) < _REPEATED else set()


def are_classes(rows: Sequence[Row]) -> bool:
    """Whether most results are those of several inputs: the next one says little of a result."""
    return bool(rows) and _repeated(rows) > _CLASSES


def connected(partners: dict[int, set[int]]) -> list[list[int]]:
    """The machines that differ from each other, directly or through others."""
    clusters: list[list[int]] = []
    seen: set[int] = set()
    for machine in partners:
        cluster, new = [], {machine} - seen
        while new:
            seen |= new
            cluster += sorted(new)
            new = set().union(*(partners[i] for i in new)) - seen
        if cluster:
            clusters.append(cluster)
    return clusters


def _inputs(rows: Iterable[Row]) -> dict[bytes, set[tuple[int, int]]]:
    """The inputs of each result."""
    inputs: defaultdict[bytes, set[tuple[int, int]]] = defaultdict(set)
    for row in rows:
        inputs[row.result].add((id(row.part), row.point))
    return inputs


def _repeated(rows: Sequence[Row]) -> float:
    """The share of results that are those of several inputs."""
    inputs = _inputs(rows)
    return sum(len(inputs[row.result]) > 1 for row in rows) / len(rows)


def predictions(
    evidence: Sequence[Evidence], centre: Tensor, spread: Tensor, share: float
) -> list[Predictions]:
    """Of the results whose distances are known, or of what guesses leave, if that is less.

    Args:
        evidence: of one request.
        centre, spread: ``[C]``, of the results.
        share: of the results may be lies.
    """
    unit = torch.ones_like(spread)
    values = [part.to_predict for part in evidence]
    plain = _predictions(evidence, values, centre, spread, unit)
    if not any(part.guesses for part in evidence):
        return plain
    rest = [
        residuals(of_part, part.machine, part.guesses)
        for of_part, part in zip(values, evidence, strict=True)
    ]
    own = spread_of(torch.cat(rest), share)
    others = _predictions(evidence, rest, *own, own[1] / spread)
    return others if _error(others) < _HELPFUL * _error(plain) else plain


def _predictions(
    evidence: Sequence[Evidence],
    values: Sequence[Tensor],
    centre: Tensor,
    spread: Tensor,
    unit: Tensor,
) -> list[Predictions]:
    """Of values ``[n, C]``, one for each part of the evidence, whose distances are known."""
    found = []
    for part, of_part in zip(evidence, values, strict=True):
        if part.regression is not None:
            known = part.at >= 0
            columns = part.machine[known], part.group[known], part.at[known]
            scaled = (of_part[known] - centre) / spread
            found.append(Predictions(scaled, unit, *columns, part.regression, part.curve))
    return found


def _error(parts: Sequence[Predictions]) -> float:
    return sum(part.typical_error() for part in parts)
