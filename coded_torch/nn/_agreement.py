r"""Which results can be believed, beyond their form: whether they agree with each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._evidence import logarithms
from .._logging import sparing_logger
from .._transforms import outside, plain
from ..adversaries import Evidence, Verdict, locate
from ..codes.base import FixedCode
from ..codes.batch_plan import Sites
from ..codes.errors import NotEnoughResults
from ..codes.kernel import KernelCode
from ..codes.plans import plan_batch
from ..workers.base import Part
from ._guesses import Guesses
from ._inputs import Inputs
from ._leaves import decodable, improbable
from ._results import Result, Results
from ._units import Units
from .report import Report

__all__ = ["Agreement", "TooManyAdversaries"]

logger = sparing_logger("coded_torch.nn")

_COLUMNS = 64
_AUDIT = 0.03  # how far apart results of the audit row may be, in the outputs' spread


class TooManyAdversaries(NotEnoughResults):
    """Results contradict each other even without as many machines as may be dropped."""

    def __init__(
        self, received: Sequence[int], required: int, num_workers: int, reason: str = ""
    ) -> None:
        super().__init__(received, required, num_workers, reason)
        self.args = (f"more machines than max_adversaries lie: {reason}",)


class _Columns(NamedTuple):
    """What is looked at of one leaf of the results: some columns, or, None, all."""

    leaf: int
    some: Tensor | None
    probabilities: bool


class Agreement:
    """Whether the results of one call agree.

    Args:
        inputs: of the call.
        units: that were asked for.
        guesses: of the surrogates; machines are judged by what these leave of their results.
        most: how many machines may be dropped.
        link: of the wrapper.
        dealer: draws the outputs that are looked at, 64 at most.

    """

    def __init__(
        self,
        inputs: Inputs,
        units: Units,
        guesses: Guesses,
        most: int,
        link: str | None,
        dealer: random.Random,
    ) -> None:
        self._inputs, self._units, self._link, self._dealer = inputs, units, link, dealer
        self._guesses = guesses
        self._most = most
        self._seen = 0  # results that have been judged
        self._liars: list[int] = []
        self._verdict: Verdict | None = None
        self._notes: tuple[str, ...] = ()

    def check(self, results: Results) -> list[tuple[Part, bool]]:
        """Distrust the machines that lie; returns the parts whose results have become bad by it."""
        good = results.good
        if len(good) == self._seen or not good:
            return []
        with outside():
            evidence, machines = self._evidence(results)
            if not evidence:  # no result that is floating-point and of finite inputs
                return []
            self._verdict = locate(evidence, machines, self._most - len(self._liars))
        self._liars += self._verdict.liars
        gone = [
            entry
            for machine, why in self._verdict.liars.items()
            for entry in results.distrust(machine, why)
        ]
        self._seen = len(results.good)
        return gone

    def conclude(self, results: Results, report: Report) -> None:
        """Judge what has arrived in the end, and report it.

        Args:
            results: of the call.
            report: of the call.
        """
        self.check(results)
        known = report.rejected
        report.note(results)
        for machine in report.rejected.keys() - known:
            why = report.rejected[machine]
            logger.warning("CodedWrapper: a result was rejected: machine %d %s", machine, why)
        report.adversaries = tuple(sorted(self._liars))
        report.notes += self._notes
        if self._verdict is None:
            return
        report.suspects, report.scores = self._verdict.suspects, self._verdict.scores
        if self._verdict.left:
            units = self._units
            raise TooManyAdversaries(
                results.of_first(len(units.first)),
                units.least,
                len(units.first),
                self._verdict.left,
            )

    def _evidence(self, results: Results) -> tuple[list[Evidence], list[int]]:
        good, units, rows = results.good, self._units, self._units.task.unit_rows
        machines = sorted({result.machine for result in good})
        received = sorted({unit for result in good for unit in result.part.units})
        place = {unit: i for i, unit in enumerate(received)}
        at = torch.tensor([place[unit] for result in good for unit in result.part.units])
        whose = torch.tensor([machines.index(r.machine) for r in good for _ in r.part.units])
        at, whose = at.repeat_interleave(rows), whose.repeat_interleave(rows)
        group = torch.arange(rows).repeat(len(at) // rows)
        columns = self._columns(good[0])
        if not columns:
            return [], machines
        values, probable = self._values(good, columns)
        if units.not_finite is not None:
            judged = ~units.not_finite[received][at, group]
            values, whose, at, group = (x[judged] for x in (values, whose, at, group))
        if not len(values):
            return [], machines
        guesses = self._guessed(results, columns)  # of the units received
        evidence = []
        if units.audit is not None:
            audited = group == units.audit
            zeros = torch.zeros(int(audited.sum()), dtype=torch.int64)
            same = values[audited], whose[audited], zeros, zeros, zeros - 1
            if len(zeros):
                evidence.append(Evidence(*same, None, _AUDIT, probable=probable))
            values, whose, at, group = (x[~audited] for x in (values, whose, at, group))
            group = group - (group > units.audit).long()
        sites = self._sites(received)
        if not units.num_groups:
            self._notes = (
                "asked by rows: there are no copies, only predictions show which machine lies",
            )
        elif not any(of.regression for of in sites):
            self._notes = ("no distances: machines are judged by their copies only",)
        for of in sites:
            point, where = of.point[at, group], of.at[at, group]
            mine = point >= 0
            evidence.append(
                Evidence(
                    values[mine],
                    whose[mine],
                    group[mine],
                    point[mine],
                    where[mine],
                    of.regression,
                    curve=self._units.plan.code.mixes,
                    guesses=tuple(guess[at[mine], group[mine]] for guess in guesses),
                    probable=probable,
                )
            )
        return evidence, machines

    def _sites(self, received: Sequence[int]) -> list[Sites]:
        plan, inputs = self._units.plan, self._inputs
        if not isinstance(plan.code, FixedCode) or plan.order is None:  # rows have no order
            return plan.sites(received)
        # Decoded along a curve, but judged in input space.
        judge = plan_batch(
            KernelCode(encoder=plan.code),
            plan.order,
            inputs.floating(),
            0,
            batch_size=inputs.batch_size,
        )
        return judge.sites(received)

    def _columns(self, result: Result) -> list[_Columns]:
        """What is looked at of each leaf."""
        divided = [
            i
            for i, (leaf, dim) in enumerate(zip(result.leaves, result.dims, strict=True))
            if decodable(leaf, dim)
        ]
        most = max(1, _COLUMNS // max(1, len(divided)))
        columns = []
        for i in divided:
            rows = result.judged(i)
            size = rows.shape[1:].numel()
            some = sorted(self._dealer.sample(range(size), most)) if size > most else None
            probabilities = self._link == "softmax" or improbable(rows) is None
            columns.append(_Columns(i, None if some is None else torch.tensor(some), probabilities))
        return columns

    def _values(
        self, good: Sequence[Result], columns: Sequence[_Columns]
    ) -> tuple[Tensor, Tensor | None]:
        """Some columns of the results, ``[n, C]``, and which are of probabilities, ``[C]``."""
        parts, probable = [], []
        for i, some, probabilities in columns:
            dim: Any = good[0].dims[i]
            leaves = [plain("Agreement", "results", r.leaves[i]).movedim(dim, 0) for r in good]
            rows = torch.cat([leaf.flatten(1) for leaf in map(_wide, leaves)])
            parts.append(_chosen(rows, some))
            probable += [probabilities] * parts[-1].shape[1]
        return torch.cat(parts, dim=1), torch.tensor(probable) if any(probable) else None

    def _guessed(self, results: Results, columns: Sequence[_Columns]) -> list[Tensor]:
        """The same of what surrogates make of the units with a result, ``[F, R, C]`` each."""
        if not self._guesses.surrogates:
            return []
        guessed = []
        for guesses in self._guesses.of(results.stack()):
            used = [(guesses[of.leaf], of) for of in columns]
            if any(guess is None for guess, _ in used):
                continue
            parts = []
            for guess, of in used:
                assert guess is not None
                rows = _wide(plain("Agreement", "guess", guess.coded), 2).flatten(2)
                rows = _chosen(rows, of.some)
                if of.probabilities:
                    rows = rows.exp() if self._link == "softmax" else rows  # it is on that scale
                    rows = logarithms(rows, torch.tensor(True))
                parts.append(rows)
            guessed.append(torch.cat(parts, dim=2))
        return guessed


def _wide(leaf: Tensor, dim: int = 1) -> Tensor:
    """A leaf with at least one column after ``dim`` dimensions."""
    return leaf.unsqueeze(-1) if leaf.dim() == dim else leaf


def _chosen(rows: Tensor, columns: Tensor | None) -> Tensor:
    """Some columns, float64 on the host."""
    if columns is not None:
        rows = rows.index_select(-1, columns.to(rows.device))
    return rows.to("cpu", torch.float64)
