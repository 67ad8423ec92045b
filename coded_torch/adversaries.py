r"""Which machines lie: results that are well formed, finite and wrong.

Two things give a liar away. Where two machines computed the same input, their results are equal up
to rounding, and to the bit only there; and every result is predicted by those at inputs nearby, by
the regression that decodes what is lost,
:class:`~coded_torch.input_space.gaussian_process.KernelRegression`. Neither
says much of one row, but a machine answers a row of every group.

What stays hidden: lies of less than a tenth of the outputs' spread, which cost less than dropping
an honest machine would; one wrong row of an input without a copy; all copies of one input answered
alike and wrong; and more liars than may be dropped, where it is an error if they are noticed. Fewer
than 40 results, and results most of which are those of several inputs, as classes are, are not
predicted well enough: there only copies show a liar.
Machines that know their places can choose such lies: deal them in secret. Where there is a
surrogate, what it leaves of the results is judged, which shows smaller lies.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ._evidence import (
    COPIES,
    Evidence,
    are_classes,
    connected,
    predictions,
    rows_of,
    same_results,
)
from ._predictions import spread_of, student_quantile, tails

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["COPIES", "Evidence", "Verdict", "locate"]

_ALPHA = 1e-3  # of a false alarm for any machine of a request, before the margins for heavy tails
_ROUNDING = 0.03  # in the outputs' spread, root mean square: bfloat16 machines are less far off
_DECISIVE = 1.5  # by how much the z of two machines that differ must, to show which one lies
_RARE = 2.0  # the z that makes a liar as likely as an honest machine
_CONVINCING = 6.0  # a higher z says no more
_CLUSTER = 24  # more machines that differ are not explained, but dropped one by one
_HONEST = 1.5  # a machine of less z is taken back
_REFITS = 3
_ENOUGH = 40  # results: fewer are predicted too badly to judge by that
_APART = 1.5  # times as badly predicted as any of another machine a single row must be
_SUSPICIOUS = 2.5  # the least z for which a refit is worth its time
_PREDICTIONS = "differs from what the other results predict"


@dataclasses.dataclass
class Verdict:
    """What the results say of the machines.

    Attributes:
        liars: why, in words that go on after "machine 3", by machine.
        suspects: some of these lie, but which cannot be determined.
        scores: z by machine: how much worse its results are predicted than those of the others, in
            standard deviations; of honest machines about standard normal. Empty without distances.
        left: what is wrong without the liars, where no more may be dropped; "": nothing.
    """

    liars: dict[int, str]
    suspects: tuple[int, ...]
    scores: dict[int, float]
    left: str = ""


def locate(evidence: Sequence[Evidence], machines: Sequence[int], most: int) -> Verdict:
    r"""Find the machines whose results contradict those of the others.

    1. *Copies*: results of one input that are too far apart. The machine that differs from most
       lies, beyond doubt if these are more than may lie. Of two that differ from each other only,
       the one whose z is higher by 1.5 does; else both are suspects. So it is with two that
       return the same, to the bit, for different inputs.
    2. *Predictions*: with :math:`P = C^{-1} - m m^\top / 1^\top m`, :math:`m = C^{-1} 1`, the
       residual of a result left out is :math:`(P y)_i / P_{ii}`, its variance :math:`1 / P_{ii}`.
       What counts is its log-energy over the whitened outputs, less a slope times the log of that
       variance, which is nearly normal where residuals are not. The mean over groups of its
       difference to the other machines', in standard deviations, is z. The three machines of
       largest z are looked at again with all of their results left out together.
       Along a curve, where liars hide each other, a noise variance for each machine is estimated
       first, and the A noisiest are looked at together. How large an honest machine's z may be
       follows from the number of machines, and the skewness and kurtosis of the others' rows.
    3. *Single rows* that are predicted worse by half than any of another machine.

    One machine is dropped at a time, then all of it is done again; in the end a machine is taken
    back that looks honest without the others.

    Args:
        evidence: one or more parts, which say nothing of each other's inputs.
        machines: their names.
        most: A, how many may be dropped.

    Note:
        :math:`O(M^2 C)` a round, beside the inverse of the regression, which decoding needs too.
    """
    trial = _Trial(evidence, len(machines), most)
    suspects: set[int] = set()
    look = trial.look(())
    scores = look.z
    liars = {found.machine: found.why(machines) for found in trial.accuse_together()}
    if liars:
        look = trial.look(tuple(liars))
    while (found := trial.accuse(look, suspects)) is not None and len(liars) < most:
        liars |= {found.machine: found.why(machines)}
        look = trial.look(tuple(liars))
    if len(liars) > 1:
        for machine in [i for i in liars if not trial.differs(i)]:
            others = tuple(i for i in liars if i != machine)
            if (again := trial.look(others)).z[machine] < _HONEST:
                del liars[machine]
                look, found = again, None
    scores = np.where(np.isfinite(look.z), look.z, scores)
    return Verdict(
        {machines[i]: why for i, why in liars.items()},
        tuple(sorted(machines[i] for i in suspects - liars.keys())),
        {m: z for m, z in zip(machines, scores.tolist(), strict=True) if math.isfinite(z)},
        "" if found is None else f"machine {machines[found.machine]} {found.why(machines)}",
    )


class _Found(NamedTuple):
    """A machine, and what speaks against it: partners and a number of copies, or what and z."""

    machine: int
    excess: float
    what: str = ""
    partners: tuple[int, ...] = ()  # that it disagrees with
    same: tuple[int, ...] = ()  # that returned the same for other inputs

    def why(self, machines: Sequence[int]) -> str:
        reasons = []
        if self.partners:
            copies = "1 copy" if self.excess == 1 else f"{self.excess:.0f} copies"
            reasons.append(f"disagrees with {_listed(self.partners, machines)} on {copies}")
        if self.same:
            whom = _listed(self.same, machines)
            reasons.append(f"returned for other inputs the same as {whom}")
        return " and ".join(reasons) or f"{self.what} (z = {self.excess:.1f})"


def _listed(some: Sequence[int], machines: Sequence[int]) -> str:
    names = [str(machines[i]) for i in some]
    if len(names) > 4:
        names = [*names[:3], f"{len(names) - 3} others"]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"machine{'s' * (len(names) > 1)} {listed}"


class _Look(NamedTuple):
    """The evidence without some machines.

    Attributes:
        out: the machines that are left out.
        z: ``[F]``, NaN where nothing can be said; of those left out, too.
        row: ``[F]``, the same of the row of each machine that is predicted worst.
        tails: ``[F]``, by how much farther out than a normal number's the tail of z is.
        machines, rows: how many are compared.
        freedom: degrees of freedom of z.
    """

    out: tuple[int, ...]
    z: NDArray[np.float64]
    row: NDArray[np.float64]
    tails: NDArray[np.float64]
    machines: int
    rows: int
    freedom: int

    def bar(self, margin: float) -> float:
        """What an honest machine's z stays below, where its tail is a normal number's."""
        if self.machines < 3 or self.freedom < 4 or self.rows < _ENOUGH:
            return math.inf
        level = _ALPHA / (2 * self.machines)
        return student_quantile(level, self.freedom) * (1 + margin / math.sqrt(self.machines))

    def bar_of_rows(self) -> float:
        if self.machines < 3 or self.freedom < 4 or self.rows < _ENOUGH:
            return math.inf
        return student_quantile(_ALPHA / (2 * self.rows), self.freedom) * 1.25


class _Trial:
    """The evidence, ready to be looked at without some machines."""

    def __init__(self, evidence: Sequence[Evidence], num_machines: int, most: int) -> None:
        self.num_machines, self.most = num_machines, most
        share = most / num_machines
        scale = spread_of(torch.cat([part.to_predict for part in evidence]), share)
        _, spread = scale
        if any(part.probable is not None for part in evidence):
            _, spread = spread_of(torch.cat([part.values for part in evidence]), share)
        self.pairs: Counter[frozenset[int]] = Counter()
        for part in evidence:
            self._compare_copies(part, spread)
        rows = rows_of(evidence)
        self.contradictory = self.pairs.keys() | same_results(rows, most)
        predicted = [] if are_classes(rows) else evidence
        self.parts = predictions(predicted, *scale, share)
        self._curve = any(part.curve for part in predicted)
        # Where each result is counted, [F G]; groups of different parts are different ones.
        sizes = [part.num_groups for part in self.parts]
        self._num_groups = sum(sizes)
        self._cell = np.concatenate(
            [
                (part.machine * self._num_groups + part.group).numpy() + sum(sizes[:i])
                for i, part in enumerate(self.parts)
            ]
            or [np.zeros(0, dtype=np.int64)]
        )
        shape = num_machines, self._num_groups
        self._count = np.bincount(self._cell, minlength=math.prod(shape)).reshape(shape)

    def _compare_copies(self, part: Evidence, spread: torch.Tensor) -> None:
        """Count, of every two machines, the copies that differ."""
        order = part.point.argsort(stable=True)
        points, machines = part.point[order], part.machine[order]
        scaled = (part.values / spread)[order]
        for step in range(1, len(points)):
            same = (points[step:] == points[:-step]).nonzero().squeeze(1)
            if not len(same):
                break
            distances = (scaled[same + step] - scaled[same]).square().mean(1).sqrt()
            for row in same[distances > part.tolerance].tolist():
                pair = frozenset((int(machines[row]), int(machines[row + step])))
                if len(pair) > 1:
                    self.pairs[pair] += 1

    def differs(self, machine: int) -> bool:
        return any(machine in pair for pair in self.contradictory)

    def look(self, out: tuple[int, ...]) -> _Look:
        """The z of every machine, without what some of them say."""
        f = self.num_machines
        alive = np.ones((f, 1))
        alive[list(out)] = 0
        if not (self._count.sum(1) * alive[:, 0]).any():  # nothing to predict from
            unknown = np.full(f, math.nan)
            return _Look(out, unknown, unknown, unknown, 0, 0, 0)
        gone = torch.from_numpy(alive[:, 0] == 0)
        each = [part.log_energies(gone) for part in self.parts]
        logs, sizes = (np.concatenate([x.numpy() for x in one]) for one in zip(*each, strict=True))

        def summed(weights: NDArray[np.float64]) -> NDArray[np.float64]:  # [F, G]
            sums = np.bincount(self._cell, weights, f * self._num_groups)
            return sums.reshape(f, self._num_groups).astype(np.float64, copy=False)

        count, total = self._count, summed(logs)
        # Of all other machines, [F, G].
        others, totals, squares = (
            (alive * x).sum(0) - alive * x for x in (count, total, summed(logs**2))
        )
        some, few = np.maximum(others, 1), np.maximum(count, 1)
        mean = totals / some
        freedom = np.maximum(others - 1, 0).sum(1)
        variance = np.maximum((squares - totals * mean).sum(1), 0) / np.maximum(freedom, 1)  # [F]
        known = (count > 0) & (others > 0)
        with np.errstate(
            invalid="ignore", divide="ignore"
        ):  # NaN where there is nothing to compare
            difference = np.where(known, total / few - mean, 0).sum(1)
            z = difference / np.sqrt(variance * np.where(known, 1 / few + 1 / some, 0).sum(1))
            machine, group = np.divmod(self._cell, self._num_groups)
            rows = logs - mean[machine, group]
            rows /= np.sqrt(variance[machine] * (1 + 1 / some[machine, group]))
        usual = np.nan_to_num(rows, posinf=0, neginf=0) * alive[machine, 0]
        if self._curve:  # places differ more than chance has them
            finite = z[(alive[:, 0] > 0) & np.isfinite(z)]
            finite = finite if len(finite) else np.zeros(1)
            centre = np.median(finite)
            z = (z - centre) / max(1.4826 * np.median(np.abs(finite - centre)), 1)
        # What is off by no more than rounding is no lie, however well the others are predicted, and
        # nor is what there is nothing to compare with.
        rows[np.isnan(rows) | (sizes < _ROUNDING**2)] = -math.inf
        exact = summed(sizes).sum(1) < _ROUNDING**2 * count.sum(1)
        z[exact] = np.minimum(z[exact], 0)
        worst = np.full(f, -math.inf)
        np.maximum.at(worst, machine, rows)
        compared = (count.sum(1) > 0) & (alive[:, 0] > 0)
        return _Look(
            out,
            z,
            worst,
            tails(usual, machine, f),
            int(compared.sum()),
            int(count[compared].sum()),
            int(freedom[compared].min(initial=0 if not compared.any() else 2**31)),
        )

    def _oddness(self, out: tuple[int, ...]) -> NDArray[np.float64]:
        """The z of every machine, or how odd the size of its results is, whichever is more.

        Half a result may be as near to its prediction as the result, as predictions are shrunk.
        """
        look = self.look(out)
        z = np.nan_to_num(look.z)
        if not look.machines:
            return z
        gone = torch.zeros(self.num_machines, dtype=torch.bool)
        gone[list(out)] = True
        machine = torch.cat([part.machine for part in self.parts]).numpy()
        along = torch.cat([part.alignments(gone) for part in self.parts]).numpy()
        usual = along[~gone.numpy()[machine]]
        count = np.bincount(machine, minlength=self.num_machines)
        sums = np.bincount(machine, along, self.num_machines)
        spread = np.sqrt(count * (np.square(usual).mean() if len(usual) else 0.0))
        return np.maximum(z, np.abs(sums) / np.maximum(spread, 1e-30))

    def accuse_together(self) -> list[_Found]:
        """The noisiest machines, as along a curve liars hide each other, if all z say so, too."""
        if not (self._curve and self.most > 1):
            return []
        noise = torch.stack([part.noise(self.num_machines) for part in self.parts]).sum(0)
        together = tuple(noise.topk(min(self.most, self.num_machines)).indices.tolist())
        look = self.look(together)
        found = [_Found(i, float(look.z[i]), _PREDICTIONS) for i in together]
        return [one for one in found if one.excess > look.bar(2) * look.tails[one.machine]]

    def accuse(self, look: _Look, suspects: set[int]) -> _Found | None:
        """The machine against which most speaks, if enough does; others go to ``suspects``."""
        return (
            self._accuse_by_copies(look, suspects)
            or self._accuse_by_predictions(look)
            or self._accuse_by_row(look)
        )

    def _accuse_by_copies(self, look: _Look, suspects: set[int]) -> _Found | None:
        partners: dict[int, set[int]] = {}
        for pair in self.contradictory:
            if pair.isdisjoint(look.out):
                for machine in pair:
                    partners.setdefault(machine, set()).update(pair - {machine})

        def found(machine: int) -> _Found:
            copies = {i: self.pairs[frozenset((machine, i))] for i in sorted(partners[machine])}
            differ, same = (tuple(i for i in copies if bool(copies[i]) is x) for x in (True, False))
            return _Found(machine, sum(copies.values()), partners=differ, same=same)

        def many(machine: int) -> tuple[int, float]:
            return len(partners[machine]), float(np.nan_to_num(look.z[machine], nan=-math.inf))

        budget = self.most - len(look.out)
        worst = max(partners, key=many, default=None)
        if worst is not None and len(partners[worst]) > max(1, budget):
            return found(worst)
        for cluster in connected(partners):
            # Predicted from others only: each may have spoilt what its partners are predicted from.
            odd = self._oddness((*look.out, *cluster))
            ranked = self._explanations(cluster, partners, odd, budget)
            if not ranked:
                return found(max(cluster, key=many))
            best, cover = ranked[0]
            suspect = max(cover, key=many)
            other = next((score for score, c in ranked if suspect not in c), -math.inf)
            if best - other > _DECISIVE:
                return found(suspect)
            suspects |= set(cluster)
        return None

    @staticmethod
    def _explanations(
        cluster: Sequence[int], partners: dict[int, set[int]], odd: NDArray[np.float64], budget: int
    ) -> list[tuple[float, tuple[int, ...]]]:
        """The sets of liars that explain all that differs among some machines, the likeliest first.

        Each has a score: what the oddness of its machines speaks for it, less what each liar more
        speaks against it.
        """
        explanations = []
        for size in range(1, budget + 1 if len(cluster) <= _CLUSTER else 1):
            for liars in itertools.combinations(cluster, size):
                if all(i in liars or partners[i] <= {*liars} for i in cluster):
                    score = sum(min(float(odd[i]), _CONVINCING) - _RARE for i in liars)
                    explanations.append((score, liars))
        return sorted(explanations, reverse=True)

    def _accuse_by_predictions(self, look: _Look) -> _Found | None:
        z = np.nan_to_num(look.z, nan=-1)
        z[list(look.out)] = -1
        worst = int((z / look.tails).argmax())
        if z[worst] > look.bar(1) * look.tails[worst]:
            return _Found(worst, float(z[worst]), _PREDICTIONS)
        best: _Found | None = None
        for machine in z.argsort()[: -1 - _REFITS : -1].tolist():
            if z[machine] > _SUSPICIOUS:
                again = self.look((*look.out, machine))
                score = float(again.z[machine])
                bar = look.bar(2) * again.tails[machine]
                if score > bar and (best is None or score > best.excess):
                    best = _Found(machine, score, _PREDICTIONS)
        return best

    def _accuse_by_row(self, look: _Look) -> _Found | None:
        row = np.nan_to_num(look.row, nan=-1, neginf=-1)
        row[list(look.out)] = -1
        worst = int(row.argmax())
        more = max(1, self.most - len(look.out))  # may have such a row
        usual = float(np.sort(row)[::-1][more]) if more < len(row) else 0.0
        if row[worst] > max(look.bar_of_rows(), _APART * usual):
            return _Found(worst, float(row[worst]), "differs from all predictions in one row")
        return None
