r"""Error bounds by leave-one-out conformal prediction, and a test of their assumption.

A missing row i and the n results are exchangeable. With row i among the results, each of the n + 1
has a residual e and a variance v that leave it out, and the score :math:`|e| / v^{3/8}`. The score
of result j is at least the score of row i if the error of row i is at most

.. math:: \frac{h_{ij} |e_j|}{q_{ij}^{3/8} - |w_{ij}| q_{ij}}, \qquad
    h_{ij} = \frac{1}{1 + w_{ij}^2 v_j / v_i}, \quad q_{ij} = h_{ij} v_j / v_i,

its threshold, or infinity if the denominator is not positive; shrinkage adds terms. If k - 1
thresholds are larger than a bound, the error of row i exceeds it with probability
:math:`k / (n + 1)` at most. Thresholds of one output are exact, others by triangle inequality.
"""

from __future__ import annotations

import bisect
import math
import operator
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ._gaussian_process import GaussianProcess, evenly, off_mean
from ._untuned import TIGHTEST

# If more rows are missing, 200 results calibrate, so that 1,024 rows take some ms. (benchmarks
# coverage)
_MISSING = 256
_CALIBRATING = 200
_BLOCK = 8192  # outputs whose residuals are in memory together
_CLASSES = 32768  # outputs that may be scores of classes, which have p_values of labels
_FEW = 128  # with fewer outputs, one operator takes all at once
_FALSE_ALARM = 0.01  # the probability of a false alarm, ever


class Bounds(NamedTuple):
    """The error bounds of rows that are estimated from the same results."""

    rows: Tensor  # [L], of the batch
    thresholds: Tensor  # [S, L, n]
    odd: Tensor  # [n], numbers that rank how odd results look if left out; or [0]
    p_values: Tensor | None  # [L], of labels; None if outputs are not [B, C]
    results: Tensor | None = None  # [n], the places of the results that calibrate


def bounds_of(
    rows: Tensor,
    results: Tensor,
    estimated: Tensor,
    process: GaussianProcess | None = None,
    trust: float = 0.0,
    labels: tuple[Tensor, Tensor] | None = None,
    residuals: Tensor | None = None,
) -> Bounds:
    """Return the error bounds of missing rows ``[L]``, by the thresholds that this module explains.

    Args:
        rows: ``[L]``, the missing rows.
        results, estimated: ``[M, C]``, and estimates of the missing rows, ``[L, C]``, floating.
        process: the regression, which has a trust in (0, 1]. None if estimates are the mean.
        trust: the trust of the regression.
        labels: results and estimates with their surrogates, if they are scores of classes.
        residuals: of less than 128 outputs, results less their estimates from all others. Defaults
            to the regression's.
    """
    count = len(results)
    most = count
    if len(rows) > _MISSING:
        most = _CALIBRATING
    if results.shape[1] < _FEW:
        y, answers, *scores = [
            x.double().contiguous() for x in (results, estimated, *(labels or ()))
        ]
        if residuals is None:
            residuals = y
            if process is not None:
                residuals = process.leave_one_out_residuals(y)
        of_labels = scores if y.shape[1] > 1 and scores else (None, None)
        tensors = []
        if process is not None:
            tensors = process.tensors
        thresholds, odd, p_values = ops.error_bounds(
            tensors, residuals, y, answers, *of_labels, trust, most
        )
        return Bounds(rows, thresholds, odd, None if of_labels[0] is None else p_values)
    variances = torch.ones(len(rows)).double()
    of_left_out = torch.ones(count).double()
    weights = None
    if process is not None:
        variances = process.variances
        of_left_out = process.leave_one_out_variances
        weights = process.weights_of_left_out
    left_out = evenly(torch.arange(count), len(of_left_out)).to(results.device)
    norms = torch.zeros(3, len(left_out)).double()
    moved = torch.zeros(len(rows)).double()
    blocks = zip(results.split(_BLOCK, 1), estimated.split(_BLOCK, 1), strict=True)
    errors = []
    keeps = labels is not None and results.shape[1] <= _CLASSES
    for y, answers in blocks:
        deviations = off_mean(y)[left_out]
        off = answers - y.mean(0)
        residuals = deviations if process is None else process.leave_one_out_residuals(y).to(y)
        sizes = [torch.linalg.vector_norm(x, dim=1) for x in (residuals, deviations, off)]
        error = deviations
        if process is not None:
            error = deviations.lerp_(residuals, trust)
        sizes.insert(1, torch.linalg.vector_norm(error, dim=1))
        *of_results, of_rows = (x.double().square_().cpu() for x in sizes)
        norms += torch.stack(of_results)
        moved += of_rows
        if keeps:
            errors.append(error)
    p_values = None
    if labels is not None and errors:
        outputs = labels[0][left_out]
        answered = labels[1]
        found = outputs - torch.cat(errors, 1)
        wrong = (found.argmax(1) != outputs.argmax(1)).cpu()
        gaps = [x.topk(2, 1).values.diff(dim=1)[:, 0] for x in (answered, found)]
        margins, left = (-x.double().cpu() for x in gaps)
        p_values = label_p_values(margins / variances.sqrt(), left / of_left_out.sqrt(), wrong)
    known = torch.cat([of_left_out[None], norms.sqrt_()])
    if weights is None:  # only of results that calibrate, as all weights around a mean are 0
        known = evenly(known.T, most).T.contiguous()
        weights = known.new_zeros(len(rows), known.shape[1])
    thresholds, odd = ops.error_thresholds(
        weights, variances, moved.sqrt_(), known, trust, count, most, False
    )
    return Bounds(rows, thresholds, odd, p_values)


def label_p_values(margins: Tensor, left_out: Tensor, wrong: Tensor) -> Tensor:
    """Return the p-values of labels, ``[L]``, from the ``margins`` of their estimates, ``[L]``.

    ``left_out``, ``[n]``, are the margins of results as all others estimate them. ``wrong`` says
    which of these estimates have a wrong label.
    """
    worse = left_out[wrong].sort().values
    larger = len(worse) - torch.searchsorted(worse, margins)
    return (1.0 + larger.double()) / (len(wrong) + 1)


class ErrorBounds:
    """The error bounds of a batch, at any level. Rows in none of the ``bounds`` are computed.

    ``by``, ``[B]``, is added to the bounds, for errors that the thresholds do not include.
    """

    def __init__(
        self, batch_size: int, bounds: Sequence[Bounds] = (), by: Tensor | None = None
    ) -> None:
        self.batch_size = batch_size
        self._bounds = bounds
        self._by = by

    @classmethod
    def unknown(cls, missing: Tensor) -> ErrorBounds:
        """Return infinite error bounds for missing rows, bool ``[B]``."""
        rows = missing.nonzero().flatten()
        p = torch.ones(len(rows), dtype=torch.float64)
        return cls(len(missing), [Bounds(rows, p.new_empty(1, len(rows), 0), p[:0], p)])

    def at(self, coverage: float) -> Tensor:
        """Return the bounds at one level: ``[B]``, float64, 0 for computed rows."""
        bounds = torch.zeros(self.batch_size, dtype=torch.float64)
        for rows, found, *_ in self._bounds:
            by = None
            if self._by is not None:
                by = self._by.index_select(0, rows)
            bounds.index_copy_(0, rows, ops.error_radii(found, coverage, by))
        return bounds

    def oddness(self) -> list[tuple[int, float]]:
        """Return pairs of the place of a result and a number, larger if the result looks odder."""
        pairs = list[tuple[int, float]]()
        for each in self._bounds:
            results = []
            if each.results is not None:
                results = each.results.tolist()
            pairs += zip(results, each.odd.tolist(), strict=False)
        return pairs

    def enough(self, coverage: float) -> bool:
        """Return whether there are as many results as the level needs."""
        return all((1 - coverage) * (x.thresholds.shape[2] + 1) >= 1 - 1e-9 for x in self._bounds)

    def calibrated(self, thresholds: Tensor, off: Tensor) -> ErrorBounds:
        """Return error bounds from the thresholds ``[B, m]`` of other estimates.

        ``off``, ``[B]``, is the distance of these estimates from the answers.
        """
        limits = (thresholds + off[:, None])[None]
        own = ((x, limits[:, x.rows]) for x in self._bounds)
        bounds = [Bounds(x.rows, each, x.odd, self._of_labels(x)) for x, each in own]
        return ErrorBounds(self.batch_size, bounds)

    def widened(self, by: Tensor) -> ErrorBounds:
        """Return bounds that are larger by float64 ``[B]``, which is infinite where unknown."""
        return ErrorBounds(self.batch_size, self._bounds, by if self._by is None else self._by + by)

    def _of_labels(self, bounds: Bounds) -> Tensor | None:
        if bounds.p_values is None or self._by is None:
            return bounds.p_values
        return bounds.p_values.masked_fill(self._by[bounds.rows].isinf(), 1.0)

    @property
    def label_p_values(self) -> Tensor | None:
        """The p-values of the labels, ``[B]``, float64; 0 for computed rows."""
        values = torch.zeros(self.batch_size, dtype=torch.float64)
        for each in self._bounds:
            found = self._of_labels(each)
            if found is None:
                return None
            values.index_copy_(0, each.rows, found)
        return values


class Exchangeability:
    """Tests whether rows that are hard to estimate come later than others.

    In each call, parts are ranked by latency, and by how odd their results look when all others
    estimate them. As long as latencies do not depend on content, every order of the latencies
    among parts of one size is equally likely. So the rank correlation has mean 0 and a known
    variance. The sum over calls is compared with the boundary of a normal mixture, which it exceeds
    with a probability of about .01, however many calls there are. Threads may share a test. A copy,
    or a test that was pickled, knows no calls.

    Reference:
        Robbins, "Statistical methods related to the law of the iterated logarithm", 1970.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._sum = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return Exchangeability, ()

    def add(self, parts: Iterable[tuple[int, float, float]]) -> int:
        """Take the rows, seconds and oddness of the parts of a call.

        Return the number of calls if rows are not missing at random, else 0.
        """
        groups = defaultdict[int, list[tuple[float, float]]](list)
        for rows, *pair in parts:
            groups[rows].append((pair[0], pair[1]))
        product = variance = 0.0
        for pairs in groups.values():
            late, odd = map(_ranks, zip(*pairs, strict=True))
            product += sum(map(operator.mul, late, odd))
            squares = sum(map(operator.mul, late, late)) * sum(map(operator.mul, odd, odd))
            variance += squares / max(1, len(pairs) - 1)
        with self._lock:
            if variance > 0:
                self._calls += 1
                self._sum += product / math.sqrt(variance)
            total = self._calls + TIGHTEST
            # On one side, twice the probability of both.
            boundary = math.log(total / TIGHTEST) - 2 * math.log(2 * _FALSE_ALARM)
            if self._sum > math.sqrt(total * boundary):
                return self._calls
            return 0


def _ranks(values: Sequence[float]) -> list[int]:
    """Return twice the ranks of values less their mean; equal values have equal ranks."""
    order = sorted(values)
    size = len(order)
    return [bisect.bisect_left(order, x) + bisect.bisect_right(order, x) - size for x in values]
