r"""Finds received results that are wrong, if at most some of the workers may be compromised.

Results of codes that mix inputs lie near a smooth function of the worker points, in every group of
a call at once. Results of codes with copies should be alike where workers compute the same input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._torch import plain
from ._untuned import MOST_PAIRS, MOST_SIZE, NEIGHBOURS, ROUNDING

Floats = NDArray[np.float64]

# A worker is dropped if its residual is so many times as large as its neighbours', plus so many
# spreads of the logarithm of that ratio among the others; plus more spreads where few numbers tell.
# Chosen on four small networks on digits and friedman1 (once; no benchmark keeps it), where 480
# honest calls dropped nobody. What they find on LeNet-5 is in benchmarks adversaries.
_RATIO = 1.9
_SPREADS = 2.0
_FEW = 15.0
_MOST_SPREADS = 3.0
#: The fourth root of the smoothing by which wrong results are found, times their number. With .8
#: times as much, more honest workers were dropped, with 1.2 times fewer wrong ones were found (on
#: four small networks, once; no benchmark keeps it).
WAVELENGTH = np.pi
#: The same for the smoothing by which kept workers are doubted. The model's own bends leave less of
#: a residual there, so that smaller changes stand out, unless neighbours make them.
DOUBTED_WAVELENGTH = np.pi / 2
# Answers are marked if two other workers stand out by more than so much of what drops one, on
# average, or one by all of it, or if fewer numbers tell. Chosen on friedman1, power, appliances,
# vowels, breast cancer, diabetes, digits (other splits) and LeNet-5 with tanh: of 928 honest calls
# 3.3 % were marked, and of 66 calls with five wrong workers, of whom nobody was dropped, and wrong
# answers, all. With .8 of it for one worker, at WAVELENGTH, it was 2.3 %, and all but 15.
_DOUBT = 0.7
# On friedman1, power, appliances, vowels and digits (other splits), with codes that mix for 24, 40
# and 100 workers (once; no benchmark keeps it), of calls whose wrong workers return .7 or 1.5 times
# their results, or minus these: 11 % were wrong and not marked at 12 to 30 numbers, 4 % at 36 to
# 100, and 1 % above.
_LEAST_NUMBERS = 36
# Answers are marked, too, if workers look scaled by one factor by more spreads than this, where
# nobody was found. Chosen on friedman1, power, breast cancer, digits (another split), appliances,
# vowels, LeNet-5 with tanh, sentences and formulas (once; no benchmark keeps it): of 480 honest
# calls less than 1 % were above it, and of calls with five results x 1.5 that nothing else marks,
# half were above 23, and the least was at 14.8.
_SCALED_ALIKE = 12.5
_ROUNDS = 10  # of exchanges between dropped and kept workers; two are usual
_HALF_ROUNDING = 2e-2  # ROUNDING for results in half precision
_LESS = 1e-9  # the least fall of the logarithm of the energy for which workers are exchanged
_RANK = 1e-10  # of a diagonal, below which a worker's result is not compared with others'


class Trust(NamedTuple):
    """The results of a call that are decoded."""

    places: list[int]  #: their places among the received results, increasing
    #: The rows whose answers nothing confirms, bool ``[B]``: all if more workers look wrong than
    #: the code bears.
    undefended: Tensor


def numbers_of(results: Sequence[Tensor]) -> list[Floats]:
    """Return results ``[F, G, ...]``, one for each output, as float64 ``[F, G, C]`` on the host.

    Complex numbers are pairs, and integers their bytes, as float64 does not hold all of them.
    """
    found = list[Floats]()
    for result in results:
        numbers = plain("CodedWrapper", "a result", result).cpu().contiguous()
        if numbers.dtype.is_complex:
            numbers = torch.view_as_real(numbers.resolve_conj())
        elif not numbers.dtype.is_floating_point:
            numbers = numbers[..., None].view(torch.uint8)
        found.append(numbers.double().reshape(*numbers.shape[:2], -1).numpy())
    return found


def residual_operator(smoother: Floats) -> Floats:
    """Return ``I - H`` for a smoother H ``[F, F]``, made symmetric to the bit."""
    operator = np.eye(len(smoother)) - smoother
    return np.asarray((operator + operator.T) / 2)


class Residuals:
    r"""The residuals of a linear smoother when some workers are left out.

    With the smoother's :math:`Q = I - H`, leaving out a set D changes :math:`Q` to its Schur
    complement, and the residuals :math:`r = Q y` along with it. A worker's studentised residual is
    :math:`r_i / \sqrt{Q_{ii}}`; its square is what leaving the worker out takes from the energy
    :math:`y^T Q y`. So the set that leaves the least energy is found without another fit.

    Args:
        operator: Q, ``[F, F]``, symmetric.
        values: the results ``[F, G, C]`` of each output.
    """

    def __init__(self, operator: Floats, values: Sequence[Floats]) -> None:
        self.operator = operator
        count = len(operator)
        groups = list[Floats]()
        for results in values:
            for rows in results.transpose(1, 0, 2):  # [F, C]
                group = _clipped(rows)
                groups.append(group if group.shape[1] <= count else _compressed(group))
        width = max(group.shape[1] for group in groups)
        #: The numbers that residuals are made of, in all groups.
        self.count = sum(group.shape[1] for group in groups)
        padded = np.zeros((count, len(groups), width))
        for i, group in enumerate(groups):
            padded[:, i, : group.shape[1]] = group
        self._shape = padded.shape
        flat = padded.reshape(count, -1)
        self._values = flat
        self.residuals = operator @ flat
        #: The squared residuals that rounding errors may leave.
        self.rounding = 1e-24 * float((flat**2).sum()) + float(np.finfo(np.float64).tiny)
        products = (flat * self.residuals).reshape(self._shape)
        self.energy = products.sum((0, 2))  # [G]

    def _swept(self, dropped: Sequence[int]) -> tuple[Floats, Floats, Floats]:
        """Return the operator, the residuals and the energy without some workers."""
        operator = self.operator.copy()
        residuals = self.residuals.copy()
        energy = self.energy.copy()
        for worker in dropped:
            pivot = operator[worker, worker]
            if pivot <= _RANK:
                continue
            own = residuals[worker].copy()
            energy -= (own.reshape(self._shape[1:]) ** 2).sum(1) / pivot
            column = operator[:, worker] / pivot
            residuals -= np.outer(column, own)
            operator -= np.outer(column, operator[worker])
        return operator, residuals.reshape(self._shape), energy

    @property
    def tell(self) -> bool:
        """Whether there are enough numbers to tell wrong results from others."""
        return bool(self.count >= _LEAST_NUMBERS)

    def without(self, dropped: Sequence[int]) -> tuple[Floats, Floats]:
        """Return each worker's squared studentised residuals ``[F, G]``, and the energy ``[G]``."""
        operator, residuals, energy = self._swept(dropped)
        diagonal = operator.diagonal()
        squares = (residuals**2).sum(2)
        compared = diagonal > _RANK
        compared[[*dropped]] = False
        scale = np.where(compared, diagonal, 1.0)
        return np.where(compared[:, None], squares / scale[:, None], 0.0), energy

    def factors(self) -> Floats:
        """Return how much of the others' estimate each result exceeds it by, over all groups.

        It is .5 for a result that is 1.5 times what the others let expect. Workers that cannot be
        compared with others are left out.
        """
        diagonal = self.operator.diagonal()
        compared = diagonal > _RANK
        off = self.residuals[compared] / diagonal[compared, None]
        estimated = self._values[compared] - off
        squares = np.maximum((estimated**2).sum(1), np.finfo(np.float64).tiny)
        return np.asarray((off * estimated).sum(1) / squares)

    def remaining(self, dropped: Sequence[int]) -> float:
        """Return the sum over groups of the logarithm of the energy without some workers."""
        return float(np.log(self._bounded(self.without(dropped)[1])).sum())

    def best(self, dropped: Sequence[int]) -> tuple[int, float]:
        """Return the further worker without whom the least energy is left, and its logarithm."""
        squares, energy = self.without(dropped)
        left = np.log(self._bounded(energy - squares)).sum(1)
        left[[*dropped]] = math.inf
        worker = int(left.argmin())
        return worker, float(left[worker])

    def best_pair(self, dropped: Sequence[int]) -> tuple[list[int], float]:
        """Return the two neighbouring workers without whom the least energy is left."""
        operator, residuals, energy = self._swept(dropped)
        found: list[int] = []
        least = math.inf
        free = np.ones(len(operator), bool)
        free[[*dropped]] = False
        for step in range(1, min(NEIGHBOURS, len(operator) - 1) + 1):
            first = np.arange(len(operator) - step)
            second = first + step
            both = operator[first, second]
            one = operator[first, first]
            other = operator[second, second]
            determinant = one * other - both**2
            usable = free[first] & free[second] & (determinant > _RANK)
            inner = (residuals[first] * residuals[second]).sum(2)
            squares = (residuals**2).sum(2)
            taken = squares[first] * other[:, None] - 2 * inner * both[:, None]
            taken = taken + squares[second] * one[:, None]
            taken = taken / np.where(usable, determinant, 1.0)[:, None]
            left = np.log(self._bounded(energy - taken)).sum(1)
            left[~usable] = math.inf
            at = int(left.argmin())
            if left[at] < least:
                least = float(left[at])
                found = [int(first[at]), int(second[at])]
        return found, least

    def _bounded(self, energy: Floats) -> Floats:
        least = np.maximum(1e-14 * self.energy, np.finfo(np.float64).tiny)
        return np.asarray(np.maximum(energy, least))


def mean_curves(values: Sequence[Floats]) -> list[Floats]:
    """Return the means over groups, ``[F, 1, C]``, of results ``[F, G, C]``.

    Honest residuals of many groups cancel, but a shift that is alike in all of them stays.
    """
    return [
        np.mean([_clipped(rows) for rows in results.transpose(1, 0, 2)], 0)[:, None]
        for results in values
    ]


def _clipped(rows: Floats) -> Floats:
    """Return results ``[F, C]``, scaled down where they are far larger than usual.

    Otherwise, rounding errors of one huge result would hide all other results.
    """
    sizes = np.abs(rows).max(1)
    usual = float(np.median(sizes))
    if usual == 0:
        return np.asarray(np.clip(rows, -1, 1))
    factors = np.minimum(1, MOST_SIZE * usual / np.maximum(sizes, usual))
    return np.asarray(rows * factors[:, None])


def _compressed(group: Floats) -> Floats:
    """Return ``[F, F]`` with the inner products of ``[F, C]``."""
    values, vectors = np.linalg.eigh(group @ group.T)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)), np.float64)


def outliers(residuals: Residuals, encoder: Residuals, most: int) -> list[int]:
    """Return the workers whose results do not fit the others: at most ``most``, or one more.

    ``encoder`` has the residuals of the encoder's own rows: a worker whose coded inputs bend more
    than others' has larger residuals, too.

    First, ``most + 1`` workers are dropped, one after the other. After each step, dropped workers
    are exchanged for others as long as that leaves less energy, because neighbouring wrong results
    hide each other. Then workers whose residuals do not stand out are taken back.

    Reference:
        The residuals of left-out results are those of Craven and Wahba, *Smoothing noisy data with
        spline functions*, Numer. Math. 31 (1979).
    """
    dropped: list[int] = []
    for _ in range(most + 1):  # one more: then they are more than can be told from the others
        worker, left = residuals.best(dropped)
        dropped = _exchanged(residuals, [*dropped, worker], left)
    dropped = _standing_out(residuals, encoder, dropped)
    for _ in range(_ROUNDS):
        others = _neighbours_instead(residuals, dropped, most)
        if not others:
            break
        dropped = _standing_out(residuals, encoder, others)
    return dropped


def _neighbours_instead(residuals: Residuals, dropped: list[int], most: int) -> list[int]:
    """Return a set of workers without whom less energy is left, or an empty set.

    In one stretch of neighbouring workers, dropped and kept ones change places. If wrong workers
    shift results alike, the honest ones between them look wrong. No exchange of one or two workers
    leads from the honest to the wrong ones.
    """
    if not dropped:
        return []
    grown = [*dropped]
    least = {len(grown): residuals.remaining(grown)}  # by the number of dropped workers
    while len(grown) < most:
        worker, left = residuals.best(grown)
        grown.append(worker)
        least[len(grown)] = left
    near = {worker + step for worker in dropped for step in (-1, 0, 1)}
    count = len(residuals.operator)
    found: list[int] = []
    gain = _LESS
    for first in range(count):
        for last in range(first, min(first + 2 * most, count)):
            if first not in near and last not in near:
                continue
            others = sorted({*dropped}.symmetric_difference(range(first, last + 1)))
            if len(others) not in least:
                continue
            less = least[len(others)] - residuals.remaining(others)
            if less > gain:
                gain = less
                found = others
    return found


def _standing_out(residuals: Residuals, encoder: Residuals, dropped: list[int]) -> list[int]:
    """Return the dropped workers whose residuals stand out; others are taken back, least first."""
    while dropped:
        excess, cut = _excess(residuals, encoder, dropped)
        least = min(range(len(dropped)), key=excess.__getitem__)
        if excess[least] >= cut:
            break
        dropped.pop(least)
        if dropped:
            dropped = _exchanged(residuals, dropped, residuals.remaining(dropped))
    return dropped


def is_doubtful(
    residuals: Residuals, encoder: Residuals, dropped: Collection[int], most: int
) -> bool:
    """Return whether further workers stand out, but too little to be dropped.

    The further workers are the ones without whom the least energy is left: as many as make ``most``
    together with the ``dropped`` ones, and at least one.
    """
    suspects = [*dropped]
    while len(suspects) < max(most, len(dropped) + 1):
        suspects.append(residuals.best(suspects)[0])
    excess, cut = _excess(residuals, encoder, suspects)
    others = sorted(excess[len(dropped) :], reverse=True)[:2]
    return others[0] > cut or sum(others) / len(others) > _DOUBT * cut


def are_scaled_alike(residuals: Residuals, most: int) -> bool:
    """Return whether ``most`` workers look scaled by one factor, though none of them stands out.

    If five results are 1.5 times too large, the answers of a single row change little, but the
    answers of all rows change alike.
    """
    factors = residuals.factors()
    if len(factors) < 2:
        return False
    above, spread = _above_neighbours(factors)
    if spread == 0:
        return False
    scores = above / spread
    largest = scores[np.abs(scores).argsort()[-most:]]
    return abs(float(largest.sum())) > _SCALED_ALIKE * math.sqrt(len(largest))


def _exchanged(residuals: Residuals, dropped: list[int], left: float) -> list[int]:
    """Exchange dropped workers for others, one or two, as long as that leaves less energy."""
    for _ in range(_ROUNDS):
        before = left
        for worker in [*dropped]:
            others = [x for x in dropped if x != worker]
            other, found = residuals.best(others)
            if other != worker and found < left - _LESS:
                dropped = [*others, other]
                left = found
        if left == before:
            for pair in _pairs(dropped):
                others = [x for x in dropped if x not in pair]
                two, found = residuals.best_pair(others)
                if found < left - _LESS:
                    dropped = [*others, *two]
                    left = found
                    break
        if left == before:
            break
    return dropped


def _pairs(dropped: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of dropped workers; only neighbouring ones if these are many."""
    if len(dropped) <= MOST_PAIRS:
        return [*itertools.combinations(dropped, 2)]
    return [*itertools.pairwise(sorted(dropped))]


def _excess(
    residuals: Residuals, encoder: Residuals, dropped: Sequence[int]
) -> tuple[list[float], float]:
    """Return by how much the residual of each dropped worker stands out, and the threshold.

    Both are logarithms of ratios of residuals, averaged over groups.
    """
    squares = _relative(residuals, encoder, dropped)
    kept = [i for i in range(len(squares)) if i not in dropped and squares[i].any()]
    if len(kept) < 2:
        return [0.0] * len(dropped), math.inf
    tiny = np.finfo(np.float64).tiny
    usual = np.maximum(np.median(squares[kept], axis=0), tiny)  # [G]

    def score(of_groups: Floats) -> Floats:
        return np.asarray(np.log(np.maximum(of_groups / usual, tiny)).mean(-1) / 2)

    scores = score(squares[kept])
    places = np.array(kept)
    _, spread = _above_neighbours(scores)
    excess = list[float]()
    for worker in dropped:
        others = [x for x in dropped if x != worker]
        score_of_worker = float(score(_relative(residuals, encoder, others)[worker]))
        at = int(np.searchsorted(places, worker))
        around = scores[max(0, at - NEIGHBOURS) : at + NEIGHBOURS]
        excess.append(score_of_worker - float(np.median(around)))
    spreads = _SPREADS + min(_FEW / residuals.count, _MOST_SPREADS)
    return excess, math.log(_RATIO) + spreads * spread


def _above_neighbours(scores: Floats) -> tuple[Floats, float]:
    """Return each score less the median of its neighbours, and the spread of the differences."""
    nearby = [
        np.median(scores[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1]) for i in range(len(scores))
    ]
    above = np.asarray(scores - nearby)
    return above, 1.4826 * float(np.median(np.abs(above)))


def _relative(residuals: Residuals, encoder: Residuals, dropped: Sequence[int]) -> Floats:
    """Return squared studentised residuals ``[F, G]`` over the size that the encoder explains."""
    squares, _ = residuals.without(dropped)
    bends = encoder.without(dropped)[0][:, 0]
    usual = 0.0
    if (bends > 0).any():
        usual = np.median(bends[bends > 0])
    # An encoder that the smoother reproduces leaves rounding errors, which tell nothing.
    usual = max(float(usual), encoder.rounding)
    return np.asarray(squares / (1 + bends / usual)[:, None])


class Copies:
    """Compares the results of workers that compute the same inputs.

    Args:
        rows: the input of each result, ``[F, G]``.
        results: the results ``[F, G, ...]`` of each output.
    """

    def __init__(self, rows: Tensor, results: Sequence[Tensor]) -> None:
        count = len(rows)
        self.rows = rows.numpy()
        self.differ = np.zeros((count, count))  # results of the same input that differ, by pair
        self.agree = np.zeros((count, count))
        self.undecided = set[int]()  # workers that differ from as many others as some other worker
        values = numbers_of(results)
        limits = list[float]()  # the differences up to which two results are alike
        for result, numbers in zip(results, values, strict=True):
            dtype = result.dtype
            limit = 0.0
            if dtype.is_floating_point or dtype.is_complex:
                rounding = _HALF_ROUNDING if dtype.itemsize == 2 else ROUNDING
                limit = rounding * _spread(numbers)
            limits.append(limit)
        flat = self.rows.ravel()
        order = flat.argsort(kind="stable")
        groups = self.rows.shape[1]
        for cells in np.split(order, np.flatnonzero(np.diff(flat[order])) + 1):
            for i, first in enumerate(cells):
                for second in cells[i + 1 :]:
                    a = divmod(int(first), groups)
                    b = divmod(int(second), groups)
                    if a[0] == b[0]:  # a group that is filled up
                        continue
                    alike = all(
                        _close(x[a], x[b], limit) for x, limit in zip(values, limits, strict=True)
                    )
                    table = self.agree if alike else self.differ
                    table[a[0], b[0]] += 1
                    table[b[0], a[0]] += 1

    def wrong(self, most: int, doubt: Callable[[list[int]], Sequence[float]]) -> list[int] | None:
        """Return the places of the fewest workers that explain all differences.

        First, the worker is dropped that differs from the largest share of the results that it is
        compared with. If several workers have this share, ``doubt`` estimates their results from
        the results of the other workers, and returns the errors; the worker with the largest error
        is dropped. If several workers have this error, too, all of them are dropped.
        Returns None if more than ``most`` workers would have to be wrong.
        """
        differ = self.differ.copy()
        dropped = list[int]()
        least = 0
        while differ.any():
            compared = np.maximum(differ.sum(1) + self.agree.sum(1), 1)
            shares = differ.sum(1) / compared
            first = np.flatnonzero(shares >= shares.max() - 1e-12)
            counts = differ[first].sum(1)
            equals = first[counts == counts.max()].tolist()
            beyond = [x for x in equals if differ[x].sum() > differ[x, equals].sum()]
            if beyond:  # it differs from workers that differ less
                equals = beyond[:1]
            if len(equals) > 1:
                self.undecided.update(equals)
                errors = doubt(equals)
                equals = [
                    x for x, error in zip(equals, errors, strict=True) if error == max(errors)
                ]
            least += max(1, len(equals) // 2)
            if least > most:
                return None
            dropped += equals
            differ[equals] = 0
            differ[:, equals] = 0
        return sorted(dropped)

    def undefended(self, dropped: Sequence[int], most: int, size: int) -> Tensor:
        """Return the rows whose results may all be of wrong workers, bool ``[size]``.

        At most ``most`` workers are wrong. So if some of them were not found, they are at most
        ``most`` minus the number of workers that were certainly wrong. A row is defended if more
        workers than this limit computed it alike, or if one of its workers agreed with more other
        workers than this limit, on any rows. Each worker that was dropped because it differed from
        a worker of the row adds 1 to the limit, because it may be right if the other is wrong.
        A worker that is wrong in few rows only may pass.
        """
        certain = sorted({*dropped} - self.undecided)
        left = most - len(certain)
        agree = self.agree > 0
        agree[[*dropped]] = False
        agree[:, [*dropped]] = False
        blamed = (self.differ[:, certain] > 0).sum(1)
        confirmed = agree.sum(1) > left + blamed
        counts = np.zeros(size, np.int64)
        blamed_by_row = np.zeros(size, np.int64)
        defended = np.zeros(size, bool)
        for place in certain:
            blamed_by_row[np.unique(self.rows[place])] += 1
        for place, rows in enumerate(self.rows):
            if place in dropped:
                continue
            defended[rows] |= confirmed[place]
            if place not in self.undecided:
                counts[np.unique(rows)] += 1
        return torch.from_numpy(~defended & (counts <= left + blamed_by_row))


def _spread(values: Floats) -> float:
    """Return a spread of outputs that a minority of wrong results does not change much."""
    with np.errstate(over="ignore"):  # a wrong result may be huge
        centre = np.median(values, axis=(0, 1))
        return float(np.median(np.sqrt(((values - centre) ** 2).sum(-1))))


def _close(a: Floats, b: Floats, limit: float) -> bool:
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return True
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.sqrt((np.where(same, 0, a - b) ** 2).sum()) <= limit)
