"""Results that can be compared, and what is made of them before machines are judged."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._predictions import Predictions, residuals, spread_of
from .regression import KernelRegression

__all__ = ["COPIES", "Evidence", "predictions", "twins"]

#: Copies differ if they are so far apart, in the outputs' spread: more than float16, bfloat16 and
#: float32 machines do among each other.
COPIES = 0.1
_VARIED = 0.98  # different results to an input, at least, of modules that give few the same
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


def twins(evidence: Sequence[Evidence], most: int) -> set[frozenset[int]]:
    """Pairs of machines with the same results, to the bit, for inputs of which two are different.

    One of them returned what the other did. It says nothing where more machines are alike than
    ``most`` liars explain, or the results of the others are no more different: the module gives the
    same for many inputs.
    """
    rows: defaultdict[int, list[bytes]] = defaultdict(list)  # of each machine
    points: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for which, part in enumerate(evidence):
        columns = part.values.numpy(), part.machine.tolist(), part.point.tolist()
        for values, machine, point in zip(*columns, strict=True):
            rows[machine].append(values.tobytes())
            points[machine].append((which, point))
    alike: defaultdict[tuple[bytes, ...], list[int]] = defaultdict(list)
    for machine, results in rows.items():
        alike[tuple(results)].append(machine)
    pairs = {
        frozenset((a, b))
        for same in alike.values()
        if len(same) <= 2 * most
        for a, b in itertools.combinations(same, 2)
        if sum(x != y for x, y in zip(points[a], points[b], strict=True)) > 1
    }
    if not pairs:
        return pairs
    named = frozenset().union(*pairs)
    others = rows.keys() - named
    num_inputs = len({point for machine in others for point in points[machine]})
    num_results = len({row for machine in others for row in rows[machine]})
    if len(named) > 2 * most or num_results < _VARIED * num_inputs:
        return set()
    return pairs


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
    plain = _predictions(evidence, [part.values for part in evidence], centre, spread, unit)
    if not any(part.guesses for part in evidence):
        return plain
    rest = [residuals(part.values, part.machine, part.guesses) for part in evidence]
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
