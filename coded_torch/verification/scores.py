"""The scores of results: how badly a regression on the batch and on recent rows predicts them."""

from __future__ import annotations

import dataclasses
import math
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import exactly, on_host
from ..input_space.gaussian_process import GaussianProcess
from ..input_space.geometry import added_up
from ..input_space.metrics import DEFAULT, Distances, Leaf, Sources
from ..input_space.selection import LENGTH

__all__ = ["ODD_PARTS", "ODD_ROWS", "Fit", "Scores", "columns", "flat_rows"]

# Rows of one regression, at most and at least. A fit of 240 takes 5 ms while workers compute, and
# more rows find little more (benchmarks verification, left).
_ROWS, _LEAST = 240, 30
_COLUMNS = 64  # outputs of a row that are scored, evenly spaced: they take .2 ms
# Added to the correlations of outputs, so that they can be inverted. Not tuned.
_RIDGE = 0.05
# The shares of rows and of parts that are odd. In 24 parts of 12 rows they add .07 medians of a
# part to the mean latency; rows of .001 add .12, and find no more (benchmarks verification).
ODD_ROWS, ODD_PARTS = 0.0005, 0.003
_KEPT = 4096  # scores that a bar is found from: a bar for one of 1,000 takes some thousand
_ANEW = 16  # times that a bar is found anew until all scores are new ones


class Recent(NamedTuple):
    """Rows of recent calls: features ``[n, d]``, outputs ``[n, C]`` and workers ``[n]``.

    They serve scores only, never answers.
    """

    features: Tensor
    outputs: Tensor
    workers: Tensor


class Scores:
    """The bars above which scores are odd, and the recent rows, of one module. Thread-safe."""

    def __init__(self) -> None:
        self.rows, self.parts = _Bar(ODD_ROWS), _Bar(ODD_PARTS)
        self.recent: Recent | None = None
        # Functions that calls leave, to learn while workers compute for a later call.
        self.left: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()

    @on_host()
    def fit(self, inputs: Sequence[Tensor]) -> Fit | None:
        """Return the regression of a batch, or None if there are no inputs.

        Args:
            inputs: floating-point tensors, ``[B, ...]`` each. Of more than 240 rows, some are
                drawn.
        """
        self.learn()
        if not inputs:
            return None
        step = -(-len(inputs[0]) // _ROWS)
        rows = range(secrets.randbelow(step), len(inputs[0]), step)
        leaves = [added_up(x.detach()[rows.start :: step]).cpu() for x in inputs]
        features, past, recent = torch.cat(leaves, 1), None, self.recent
        some = features
        if recent is not None and recent.features.shape[1] == features.shape[1]:
            first = max(0, len(recent.features) - (_ROWS - len(rows)))
            some, past = torch.cat([features, recent.features[first:]]), recent.outputs[first:]
        if len(some) < _LEAST:
            return Fit(rows, features)
        widths = [x.shape[1] for x in leaves]
        distances = Distances(
            Sources((), [Leaf(x, None) for x in some.split(widths, 1)]), (DEFAULT,)
        )
        squared, step_length = distances.by(DEFAULT)
        usable = distances.usable.nonzero().flatten()
        process = GaussianProcess(squared, LENGTH * step_length, usable)
        residuals = process.leave_one_out_residuals(torch.eye(len(usable), dtype=torch.float64))
        residuals /= process.leave_one_out_variances.sqrt()[:, None]
        return Fit(rows, features, usable, residuals.float(), past)

    @on_host()
    def learn(self) -> None:
        """Learn from the calls so far."""
        with self._lock:
            while self.left:
                self.left.popleft()()

    def add(self, now: Recent, rows: Sequence[float], parts: Sequence[float]) -> None:
        """Add the rows of a call, and the scores of its rows and parts."""
        with self._lock:
            self.rows.add(rows)
            self.parts.add(parts)
            pairs = list(zip(self.recent or now, now, strict=True))
            if self.recent is not None and all(a.shape[1:] == b.shape[1:] for a, b in pairs):
                now = Recent(*[torch.cat(pair)[-_ROWS:] for pair in pairs])
            self.recent = now

    def forget(self, worker: int) -> None:
        """Remove the rows of one worker."""
        self.learn()
        with self._lock:
            if self.recent is not None:
                kept = self.recent.workers != worker
                self.recent = Recent(*[x[kept] for x in self.recent])


@dataclasses.dataclass(frozen=True)
class Fit:
    """A regression before there are results.

    Args:
        rows: the rows of the batch that are in it.
        features: ``[n, d]``, of these rows.
        usable: ``[k]``, the places of the rows that are scored, among them and recent rows. None
            if there are too few.
        residuals: ``[k, k]``, maps outputs to leave-one-out residuals in standard deviations.
        past: the outputs of the recent rows, ``[m, C]``, or None.
    """

    rows: Sequence[int]
    features: Tensor
    usable: Tensor | None = None
    residuals: Tensor | None = None
    past: Tensor | None = None

    @exactly()
    def scores(self, outputs: Tensor) -> dict[int, float]:
        r"""Score the rows: the sum of the logarithms of the energy and the peak of their residuals.

        With leave-one-out residuals z in robust standard deviations, and S their robust correlation
        between outputs, the energy is :math:`z^T S^{-1} z`, and the peak the largest of
        :math:`S^{-1} z`, standardised. Whole rows show in the first, single outputs in the second.

        Args:
            outputs: ``[n, C]``. If some are not finite, nothing is scored.
        """
        if (
            self.usable is None
            or self.residuals is None
            or not outputs.shape[1]
            or not bool(outputs.isfinite().all())
        ):
            return {}
        some = outputs if self.past is None else torch.cat([outputs, self.past])
        some = some[self.usable]
        z = self.residuals @ (some - some.mean(0))
        z /= z.abs().kthvalue((len(z) + 1) // 2, 0).values.clamp_(min=1e-12)
        signs = z.sign()
        correlation = signs.T @ signs / len(z)
        correlation.diagonal().add_(_RIDGE)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
        u = z @ inverse
        energy = (z * u).mean(1).clamp_(min=1e-12).sqrt()
        peak = (u.abs() / inverse.diagonal().sqrt()).amax(1).clamp_(min=1e-12)
        pairs = zip(self.usable.tolist(), (energy * peak).log().tolist(), strict=True)
        return {self.rows[i]: score for i, score in pairs if i < len(self.rows)}


class _Bar:
    """A quantile of the last scores, found anew from time to time."""

    def __init__(self, share: float) -> None:
        self.at, self._share, self._new = math.inf, share, 0
        self._scores: deque[float] = deque(maxlen=_KEPT)

    def add(self, scores: Sequence[float]) -> None:
        self._scores.extend(scores)
        self._new += len(scores)
        if len(self._scores) >= 1 / self._share and self._new >= len(self._scores) / _ANEW:
            self.at = sorted(self._scores)[-math.ceil(len(self._scores) * self._share)]
            self._new = 0


def columns(outputs: Sequence[Tensor]) -> Tensor:
    """Return the outputs that are scored, ``[n, C]``, of leaves ``[n, ...]``, on the host."""
    flat = torch.cat([flat_rows(x).float() for x in outputs], 1)
    return flat[:, :: max(1, -(-flat.shape[1] // _COLUMNS))].cpu()


def flat_rows(values: Tensor) -> Tensor:
    """Return ``[n, C]`` of ``[n, ...]``, where a row may be a single number."""
    return values.flatten(1) if values.dim() > 1 else values[:, None]
