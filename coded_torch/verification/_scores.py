"""The results of one call: by how much they differ, and how odd they look.

A result looks odd if a regression on the batch and on recent rows estimates it badly.
"""

import contextlib
import itertools
import math
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import sparing_logger
from .._table import Part
from .._torch import as_real, exactly, on_host
from ..input_space._gaussian_process import LENGTH, GaussianProcess
from ..input_space.metrics import DEFAULT, Distances, Leaf, Sources, added_up
from ._untuned import LEAST_SPREAD, LEAST_SPREAD_OF_HALF, MOST_SPREAD, RIDGE, SAMPLE, SAMPLE_EACH

logger = sparing_logger("coded_torch.nn")

# Results of one row in batches of other sizes differ by 2.5e-6 of the outputs' spread in float32,
# and by some .01 in half precision (measured once; no benchmark keeps it). TF32 is learnt.
_EXACT = 1e-3
_LOOSE = 0.03
_OWN_SPREAD = 1024  # outputs of a tensor, such as an image, above which all have one spread
_QUARTILE = 1.15  # standard deviations, within which three quarters of normal numbers lie
# Rows of one regression, at most and at least. A fit of 240 takes 5 ms while workers compute, and
# more rows find little more (benchmarks verification, left).
_ROWS = 240
_LEAST = 30
_COLUMNS = 64  # outputs of a row that are scored, evenly spaced: they take .2 ms
# The shares of rows and of parts that are odd. In 24 parts of 12 rows they add .07 medians of a
# part to the mean latency; rows of .001 add .12, and find no more (measured once).
ODD_ROWS = 0.0005
ODD_PARTS = 0.003
# Scoring takes this share of the time of calls at most, after so many seconds that it may take at
# once: it takes some 3 ms, so that each call of 15 ms or more is scored. Calls of 64 rows of an
# identity on four processes take 1.8 times as long with a tenth of the rows checked, and 4.2 times
# if each is scored (benchmarks against, "verified calls").
_SHARE = 0.2
_SAVED = 1.0
_KEPT = 4096  # scores that a bar is found from: a bar for one of 1,000 takes some thousand
_ANEW = 16  # times that a bar is found anew until all scores are new ones


class Recent(NamedTuple):
    """Rows of recent calls. They serve scores only, never answers."""

    features: Tensor  # [n, d]
    outputs: Tensor  # [n, C]
    workers: Tensor  # [n]


class Scores:
    """The thresholds above which the scores of one module are odd, and its recent rows.

    A score says how much a row or a part differs from recent rows. Any thread may call any method.
    """

    def __init__(self) -> None:
        self.rows = _Bar(ODD_ROWS)
        self.parts = _Bar(ODD_PARTS)
        self.recent: Recent | None = None
        # Rows of calls, scores of their rows and parts, and whether all odd rows were checked: they
        # are learnt while workers compute.
        self.left: deque[tuple[Recent, Sequence[Sequence[float]], bool]] = deque()
        self._seconds = _SAVED  # that scoring may take
        self._lock = threading.RLock()

    @property
    def has_time(self) -> bool:
        """Whether scoring has taken so little of the time of calls that this call may be scored."""
        return self._seconds > 0

    def spend(self, scoring: float, call: float) -> None:
        """Note the seconds of a call, and those that scoring has taken."""
        with self._lock:
            earned = _SHARE * (call - scoring) / (1 - _SHARE)
            self._seconds = min(self._seconds + earned - scoring, _SAVED)

    @on_host()
    def learn(self) -> None:
        """Learn from the calls so far."""
        with self._lock:
            while self.left:
                now, scores, is_checked = self.left.popleft()
                for bar, seen in zip((self.rows, self.parts), scores, strict=False):
                    # Odd scores of what may be wrong count as the bar, and leave it where it is.
                    bar.add(seen if is_checked else [min(score, bar.at) for score in seen])
                pairs = list(zip(self.recent or now, now, strict=True))
                if self.recent is not None and all(a.shape[1:] == b.shape[1:] for a, b in pairs):
                    now = Recent(*[torch.cat(pair)[-_ROWS:] for pair in pairs])
                self.recent = now

    def forget(self, worker: int) -> None:
        """Remove the rows of one worker."""
        with _scoring(), self._lock:
            self.learn()
            if self.recent is not None:
                kept = self.recent.workers != worker
                self.recent = Recent(*[x[kept] for x in self.recent])


class _Bar:
    """A threshold, ``at``: a quantile of the last scores, found again from time to time."""

    def __init__(self, share: float) -> None:
        self.at = math.inf
        self._share = share
        self._new = 0
        self._scores: deque[float] = deque(maxlen=_KEPT)

    def add(self, scores: Sequence[float]) -> None:
        """Add scores, and find the quantile again if enough scores are new."""
        self._scores.extend(scores)
        self._new += len(scores)
        if len(self._scores) >= 1 / self._share and self._new >= len(self._scores) / _ANEW:
            self.at = sorted(self._scores)[-math.ceil(len(self._scores) * self._share)]
            self._new = 0


def _few_columns(rows: Tensor) -> Tensor:
    """Return 64 columns of ``[n, C]`` at most, evenly spaced."""
    return rows[:, :: max(1, -(-rows.shape[1] // _COLUMNS))]


def _flat_rows(values: Tensor) -> Tensor:
    """Return ``[n, C]`` of ``[n, ...]``, where a row may be a single number."""
    return values.unsqueeze(1).flatten(1)


class Results:
    """The results of one call by rows, which agree up to a tolerance, in spreads of outputs.

    Args:
        scores: the scores of earlier calls.
        inputs: floating-point tensors, ``[B, ...]`` each. Defaults to none: nothing is scored.
    """

    def __init__(self, scores: Scores, inputs: Sequence[Tensor] = ()) -> None:
        self._scores = scores
        self.learnt_tolerance = 0.0  #: the tolerance that earlier calls have found
        self._doubted = frozenset[int]()  # the workers whose results tell nothing of the spread
        self._places: dict[Part, dict[int, int]] = {}  # the place of a row's result
        self._leaves: dict[Part, list[Tensor]] = {}  # [rows, ...] each
        self._forms: dict[Part, tuple[torch.Size, ...]] = {}  # the shapes of a row
        self._scored: dict[Part, Tensor] = {}  # the outputs that are scored
        self._half = list[Part]()  # the parts with outputs in half precision
        self._differences: dict[tuple[Part, Part], dict[int, float]] = {}
        self._spreads = dict[tuple[torch.Size, ...], list[tuple[Tensor, Tensor]]]()
        self._learnt: Sequence[Sequence[float]] = ()  # the scores of rows, and of parts
        self._odd = set[int]()
        self._rows: Sequence[int] = ()  # of the batch, that are scored
        self._features: Tensor  # [n, d], of these rows
        self._past: Tensor | None = None  # the outputs of recent rows, [m, C]
        # The places [k] of scored rows, among these and recent rows, and the matrix from their
        # outputs to residuals in standard deviations. None if there are too few.
        self._known: Tensor | None = None
        self._residuals: Tensor
        self._since = time.perf_counter()
        with _scoring():
            scores.learn()
            if inputs:
                self._fit(inputs)
        self._scoring = time.perf_counter() - self._since  # seconds so far

    @on_host()
    def _fit(self, inputs: Sequence[Tensor]) -> None:
        """Fit the regression of 240 drawn rows of the batch, at most, and of recent rows."""
        step = -(-len(inputs[0]) // _ROWS)
        first = secrets.randbelow(step)
        leaves = [added_up(x.detach()[first::step]).cpu() for x in inputs]
        self._features = torch.cat(leaves, 1)
        self._rows = range(first, len(inputs[0]), step)
        features = self._features
        recent = self._scores.recent
        if recent is not None and recent.features.shape[1] == features.shape[1]:
            oldest = max(0, len(recent.features) - (_ROWS - len(self._rows)))
            features = torch.cat([features, recent.features[oldest:]])
            self._past = recent.outputs[oldest:]
        if len(features) < _LEAST:
            return
        columns = map(Leaf, features.split([x.shape[1] for x in leaves], 1))
        distances = Distances(Sources((), [*columns]), [DEFAULT])
        (squared, unit) = distances.by(DEFAULT)
        known = (~distances.far).nonzero()[:, 0]
        process = GaussianProcess(squared, LENGTH * unit, known)
        self._residuals = process.standardised.float()
        self._known = known

    def add(self, part: Part) -> None:
        """Add a good result."""
        self._places[part] = dict(zip(part.units, itertools.count(), strict=False))
        leaves = list[Tensor]()
        if part.result is not None:  # simulated parts have none
            leaves = [as_real(part.result.rows(i).detach()) for i in part.result.divided]
        self._leaves[part] = leaves
        self._forms[part] = tuple(leaf.shape[1:] for leaf in leaves)
        floating = [leaf for leaf in leaves if leaf.dtype.is_floating_point]
        if any(leaf.dtype.itemsize == 2 for leaf in floating):
            self._half.append(part)
        numbers = [_flat_rows(leaf).float() for leaf in floating if leaf.numel()]
        if numbers and self._rows:
            self._scored[part] = _few_columns(torch.cat(numbers, 1)).cpu()

    @property
    def tolerance(self) -> float:
        """The difference up to which results of a row agree, in spreads of outputs."""
        is_half = any(not part.failed for part in self._half)
        return max(self.learnt_tolerance, _LOOSE if is_half else _EXACT)

    def doubt(self, workers: Collection[int]) -> None:
        """From now on, measure the spread of outputs without the results of these workers."""
        if not self._doubted.issuperset(workers):
            self._doubted = frozenset(workers)
            self._spreads.clear()
            self._differences.clear()

    def differences(self, pairs: Collection[tuple[Part, Part]]) -> list[Mapping[int, float]]:
        """Return, for each pair of parts, the largest difference of an output in each common row.

        It is 0 for equal bits, and infinite for NaN and for outputs of different shapes.
        """
        alike = defaultdict[tuple[torch.Size, ...], list[tuple[Part, Part, int]]](list)
        for a, b in pairs:
            if (a, b) not in self._differences:
                rows = sorted(self._places[a].keys() & self._places[b].keys())
                self._differences[a, b] = dict.fromkeys(rows, math.inf)
                if rows and self._forms[a] == self._forms[b]:
                    alike[self._forms[a]] += zip(itertools.repeat(a), itertools.repeat(b), rows)
        for form, found in alike.items():
            ones, others, both = zip(*found, strict=True)
            parts, at = self._placed(zip(ones + others, 2 * both, strict=True))
            largest = torch.zeros(len(found))
            leaves_of = zip(*map(self._leaves.__getitem__, parts), strict=True)
            for place, leaves in enumerate(leaves_of):
                one, other = torch.cat(leaves)[at].chunk(2)
                if not torch.equal(one, other):  # else no spread is needed, which takes longer
                    largest = torch.maximum(largest, _apart(one, other, self._spread(form)[place]))
            for (a, b, row), difference in zip(found, largest.tolist(), strict=True):
                self._differences[a, b][row] = difference
        return [*map(self._differences.__getitem__, pairs)]

    def _spread(self, form: tuple[torch.Size, ...]) -> list[tuple[Tensor, Tensor]]:
        """Return the medians and the spreads of each leaf's outputs.

        Each worker counts alike, whatever it returned and however many rows it had.
        """
        if form not in self._spreads:
            every = defaultdict[int, list[tuple[Part, int]]](list)
            for part, places in self._places.items():
                if self._forms[part] == form:
                    every[part.worker] += zip(itertools.repeat(part), places)
            trusted = [rows for worker, rows in every.items() if worker not in self._doubted]
            by_worker = trusted or [*every.values()]
            num = max(SAMPLE_EACH, -(-SAMPLE // len(by_worker)))
            num = min(num, max(map(len, by_worker)))
            sample = [rows[i * len(rows) // num] for rows in by_worker for i in range(num)]
            parts, at = self._placed(sample)
            leaves = zip(*map(self._leaves.__getitem__, parts), strict=True)
            self._spreads[form] = [_spreads(torch.cat(x)[at], len(by_worker)) for x in leaves]
        return self._spreads[form]

    def odd(self, answers: Mapping[int, Part]) -> set[int]:
        """Return the rows that look so odd that they should be computed again."""
        since = time.perf_counter()
        scores = self.scores(answers)
        self._scoring += time.perf_counter() - since
        parts = defaultdict[Part, list[int]](list)
        if not scores:
            return set()
        oddest = max(scores, key=scores.__getitem__)
        odd = {oddest} if scores[oddest] > self._scores.rows.at else set[int]()
        means = []
        for row in scores:
            parts[answers[row]].append(row)
        for rows in parts.values():
            means.append(sum(map(scores.__getitem__, rows)) / math.sqrt(len(rows)))
            if means[-1] > self._scores.parts.at:
                odd.add(max(rows, key=scores.__getitem__))
        self._learnt = (list(scores.values()), means)
        self._odd = odd
        return odd

    def scores(self, answers: Mapping[int, Part]) -> dict[int, float]:
        """Return a score by row: the larger, the worse other rows estimate its result.

        Return no scores if they cannot be computed.
        """
        if self._known is None or not self._scored or not answers.keys() >= {*self._rows}:
            return {}
        with _scoring(), exactly():
            outputs = self._outputs(answers, self._rows)
            if not bool(outputs.isfinite().all()):
                return {}
            if self._past is not None:
                outputs = torch.cat([outputs, self._past])
            scores = _scores(self._residuals, outputs[self._known])
            is_now = self._known < len(self._rows)
            rows = map(self._rows.__getitem__, self._known[is_now].tolist())
            return dict(zip(rows, scores[is_now].tolist(), strict=True))
        return {}

    def _outputs(self, answers: Mapping[int, Part], rows: Sequence[int]) -> Tensor:
        """Return the scored outputs of n rows, ``[n, C]``."""
        parts, places = self._placed(zip(map(answers.__getitem__, rows), rows, strict=True))
        return torch.cat([*map(self._scored.__getitem__, parts)])[places]

    def _placed(self, results: Iterable[tuple[Part, int]]) -> tuple[list[Part], list[int]]:
        """Return the parts in pairs of a part and a row, and each row's place among their rows."""
        starts = dict[Part, int]()
        size = 0
        places = list[int]()
        for part, row in results:
            if part not in starts:
                starts[part] = size
                size += len(self._places[part])
            places.append(starts[part] + self._places[part][row])
        return list(starts), places

    def conclude(self, answers: Mapping[int, Part], unverified: Collection[int] | None) -> None:
        """Keep credible answers for later calls to learn, and their scores.

        Args:
            unverified: the rows whose checks are missing. None if a worker is doubted: then no
                scores are learnt, as wrong results make right ones look odd.
        """
        with _scoring():
            self._scores.spend(self._scoring, time.perf_counter() - self._since)
            rows = []
            if self._scored:
                rows = sorted(answers.keys() & self._rows)
            if rows:
                outputs = self._outputs(answers, rows)
                at = [*map(self._rows.index, rows)]
                workers = [*map(attrgetter("worker"), map(answers.__getitem__, rows))]
                every = self._features[at], outputs, torch.tensor(workers)
                recent = Recent(*map(itemgetter(outputs.isfinite().all(1)), every))
                is_checked = self._odd.isdisjoint(unverified or ())
                learnt = () if unverified is None else self._learnt
                self._scores.left.append((recent, learnt, is_checked))


@contextlib.contextmanager
def _scoring() -> Iterator[None]:
    """Let an exception in scoring lose no answers: rows are still checked at random."""
    try:
        yield
    except Exception as error:
        logger.warning(
            "CodedWrapper: looking for odd results failed; rows are checked at random only",
            exc_info=error,
        )


def _scores(residuals: Tensor, outputs: Tensor) -> Tensor:
    r"""Score rows ``[k, C]`` by the energy and the peak of their residuals.

    Let z be leave-one-out residuals in robust standard deviations, and S their robust correlation
    between outputs. The energy is :math:`z^T S^{-1} z`, and the peak is the largest entry of
    :math:`S^{-1} z`, standardised. A row that is wrong as a whole has a large energy, and a row
    with one wrong output has a large peak. The score is the sum of the logarithms of both, less
    the median of these sums over all k rows. Recent rows are among them, so the median is steady.
    """
    z = residuals @ (outputs - outputs.mean(0))
    z /= z.abs().kthvalue((len(z) + 1) // 2, 0).values.clamp_(min=1e-12)
    signs = z.sign()
    correlation = signs.T @ signs / len(z)
    correlation.diagonal().add_(RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
    u = z @ inverse
    energy = (z * u).mean(1).clamp_(min=1e-12).sqrt()
    peak = (u.abs() / inverse.diagonal().sqrt()).amax(1).clamp_(min=1e-12)
    scores = (energy * peak).log()
    return scores - scores.median()


def _spreads(rows: Tensor, num_workers: int) -> tuple[Tensor, Tensor]:
    """Return medians and spreads, on the host: ``[C]`` of ``[n, ...]``, or one for all.

    The rows of a worker are side by side, and each worker has equally many. A worker whose outputs
    are spread far wider than usual does not count, so that half of the workers may be wrong.
    """
    values = _flat_rows(rows)
    columns = values.shape[1]
    if columns > _OWN_SPREAD:
        values = _few_columns(values)
        columns = 1
    values = values.to("cpu", torch.promote_types(values.dtype, torch.float32))
    values = values.reshape(num_workers, -1, columns)
    if not values.numel():
        return values.sum((0, 1)), values.sum((0, 1))
    values = values.where(values.isfinite(), math.nan)
    medians = values.flatten(0, 1).nanmedian(0).values.nan_to_num_(nan=0.0)
    away = (values - medians).abs_().nan_to_num_(nan=math.inf)  # [W, n / W, C]
    wholes = _quartiles(away.flatten(1).T)
    whole = wholes.median()
    if not whole > 0:  # most workers returned one value: the spread is that of the others, if any
        whole = wholes.where(wholes > 0, math.inf).amin()
        whole = whole.where(whole.isfinite(), 0.0)
    of_workers = _quartiles(away.transpose(0, 1).flatten(1)).view(num_workers, columns)
    varies = of_workers > 0
    usual = of_workers.where(varies, math.nan).nanmedian(0).values
    # An output that varies on few workers may have its spread from a wrong one.
    is_rare = 2 * varies.sum(0) <= num_workers
    usual = usual.where(~is_rare, usual.clamp(max=whole))
    away.masked_fill_((of_workers > MOST_SPREAD * usual)[:, None], math.inf)
    spreads = _quartiles(away.flatten(0, 1))
    spreads = spreads.where(spreads > 0, whole)  # of an output that is constant here
    least = LEAST_SPREAD_OF_HALF if rows.dtype.itemsize == 2 else LEAST_SPREAD
    spreads = spreads.clamp(min=least * whole) / _QUARTILE
    return medians, spreads.where(spreads > 0, 1.0)


def _quartiles(away: Tensor) -> Tensor:
    """Return the third quartiles of finite numbers other than 0, by column; 0 if there are none."""
    ordered = away.sort(0).values
    equal = (ordered == 0).sum(0)  # may be most: of values that differ from the median
    known = ordered.isfinite().sum(0)
    at = (equal + (known - equal) * 3 // 4).clamp(max=known - 1).clamp(min=0)
    found = ordered.gather(0, at[None])[0]
    return found.where(found.isfinite(), 0.0)


def _apart(a: Tensor, b: Tensor, usual: tuple[Tensor, Tensor]) -> Tensor:
    """Return by how much the rows of two results differ, in spreads of an output, on the host."""
    if not (a.dtype.is_floating_point and a.numel()):
        return torch.where(_flat_rows(a == b).all(1), 0.0, math.inf).cpu()
    kind = torch.finfo(a.dtype)
    rounded = 4 * kind.eps / (_LOOSE if a.dtype.itemsize == 2 else _EXACT)
    wide = torch.promote_types(a.dtype, torch.float32)
    a = _flat_rows(a.to(wide))
    b = _flat_rows(b.to(wide))
    medians, spreads = (x.to(a.device) for x in usual)
    # A spread grows by a tenth of an unusual value, such as a large one of a probability that
    # is mostly small, and so that four roundings of any value are within the tolerance. Not tuned.
    unusual = torch.maximum((a - medians).abs_(), (b - medians).abs_())
    most = torch.maximum(a.abs(), b.abs()).clamp_(kind.smallest_normal)
    scales = most.mul_(rounded).add_(unusual, alpha=0.1).add_(spreads)
    apart = (a - b).abs_().div_(scales).float()
    if not bool(apart.isfinite().all()):
        alike = (a == b) | (a.isnan() & b.isnan())
        apart = apart.nan_to_num_(nan=math.inf).masked_fill_(alike, 0.0)
    return apart.amax(1).cpu()
