"""Which results look odd, as others and recent ones predict them badly."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import exactly, on_host
from ..input_space.gaussian_process import GaussianProcess
from ..input_space.geometry import added_up
from ..input_space.metrics import DEFAULT, Distances, Leaf, Sources
from ..input_space.selection import LENGTH

__all__ = ["ODD_PARTS", "ODD_ROWS", "Fit", "Scores", "columns", "features"]

_ROWS, _LEAST = 240, 30  # of a fit: 4 ms, while workers compute; more rows find little more
_COLUMNS = 64  # outputs that are looked at, evenly spaced
_RIDGE = 0.05  # of the correlation between the residuals of outputs
# The share of rows that are odd, and of parts by the mean of their rows: at 240 rows together .15 %
# of the work (benchmarks/verification.py). A bar for one of 1,000 takes some thousand scores.
ODD_ROWS, ODD_PARTS, _KEPT = 0.001, 0.003, 4096


class Scores:
    """The scores and the last rows of many calls. Thread-safe."""

    def __init__(self) -> None:
        self.rows, self.parts = _Running(ODD_ROWS), _Running(ODD_PARTS)
        # Features, outputs and workers of the last rows. They serve scores only, never answers.
        self._recent: tuple[Tensor, ...] | None = None
        # What calls left to learn, which is done while workers compute for a later call.
        self._pending: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # rows of users are in no copy
        return type(self), ()

    @on_host()
    def fit(self, inputs: Sequence[Tensor]) -> list[Fit]:
        """Return the regressions of a batch, of at most 240 rows each; they need no results yet.

        Args:
            inputs: floating-point, ``[B, ...]`` each.
        """
        self.settle()
        if not inputs:
            return []
        leaves, recent, fits = features(inputs), self._recent, []
        widths = [x.shape[1] for x in leaves]
        step = -(-len(inputs[0]) // _ROWS)
        for i in range(step):
            some, past = torch.cat(leaves, 1)[i::step], None
            if recent is not None and recent[0].shape[1] == sum(widths) and len(some) < _ROWS:
                earlier, past = (x[len(some) - _ROWS :] for x in recent[:2])
                some = torch.cat([some, earlier])
            if len(some) >= _LEAST:
                rows = list(range(i, len(inputs[0]), step))
                fits.append(Fit(rows, some.split(widths, 1), past))
        return fits

    def later(self, learn: Callable[[], None]) -> None:
        """Have something learnt before the next fit."""
        self._pending.append(learn)

    def settle(self) -> None:
        """Learn what calls have left."""
        while self._pending:
            try:
                learn = self._pending.popleft()
            except IndexError:  # another thread was faster
                return
            learn()

    def odd(
        self, scores: Mapping[int, float], parts: Sequence[Sequence[int]]
    ) -> tuple[set[int], list[float]]:
        """Return the rows that are odd by the scores so far, and the scores of parts of rows."""
        if not scores:
            return set(), []
        top = sorted(scores, key=scores.__getitem__, reverse=True)
        few = top[: max(1, round(3 * ODD_ROWS * len(top)))]  # of one call
        odd, of_parts = {row for row in few if scores[row] > self.rows.bar}, []
        for part in parts:
            mean = sum(scores[row] for row in part) / len(part) - scores[top[len(top) // 2]]
            of_parts.append(mean * math.sqrt(len(part)))
            if of_parts[-1] > self.parts.bar:
                odd.add(max(part, key=scores.__getitem__))
        return odd, of_parts

    def learn(self, rows: Sequence[float], parts: Sequence[float]) -> None:
        """Add the scores of a call without wrong results."""
        with self._lock:
            self.rows.add(rows)
            self.parts.add(parts)

    @on_host()
    def remember(self, features: Tensor, outputs: Tensor, workers: Tensor) -> None:
        """Keep rows of a call for later fits.

        Args:
            features: ``[B, d]``, of its inputs.
            outputs: ``[B, C]``, those that are looked at.
            workers: ``[B]``, whose results they are; -1 for rows that are not kept.
        """
        kept = (workers >= 0).nonzero().flatten()[-_ROWS:]
        now: tuple[Tensor, ...] = features[kept], outputs[kept], workers[kept]
        with self._lock:
            if self._recent is not None:
                pairs = list(zip(self._recent, now, strict=True))
                if all(a.shape[1:] == b.shape[1:] for a, b in pairs):
                    now = tuple(torch.cat(pair)[-_ROWS:] for pair in pairs)
            self._recent = now

    def forget(self, worker: int | None = None) -> None:
        """Let go of the rows of one worker, or of all, as those of other weights."""
        self.settle()
        with self._lock:
            if self._recent is not None:
                kept = self._recent[2] != worker if worker is not None else slice(0)
                self._recent = tuple(x[kept] for x in self._recent)


class Fit:
    """A regression of some rows of a batch and of recent rows, as predictions have it by default.

    Args:
        rows: of the batch.
        features: ``[n, d]`` each, those of recent rows last.
        recent: outputs of the recent rows, or None.
    """

    def __init__(self, rows: list[int], features: Sequence[Tensor], recent: Tensor | None) -> None:
        self._rows, self._recent = rows, recent
        distances = Distances(Sources((), [Leaf(x, None) for x in features]), (DEFAULT,))
        squared, step = distances.by(DEFAULT)
        self._usable = distances.usable.nonzero().flatten()
        self._process = GaussianProcess(squared, LENGTH * step, self._usable)
        self._deviations = self._process.leave_one_out_variances.sqrt()[:, None]

    @exactly()
    def scores(self, outputs: Tensor) -> dict[int, float]:
        r"""Score the rows: the sum of the logarithms of the energy and the peak of their residuals.

        With leave-one-out residuals z in robust standard deviations, and S their robust correlation
        between outputs, the energy is :math:`z^T S^{-1} z`, and the peak the largest of
        :math:`S^{-1} z`, standardised. Whole rows show in the first, single outputs in the second.

        Args:
            outputs: ``[B, C]``, of all rows of the batch.
        """
        some = outputs[self._rows]
        some = some if self._recent is None else torch.cat([some, self._recent])
        z = self._process.leave_one_out_residuals(some[self._usable].double()) / self._deviations
        z /= z.abs().median(0).values.clamp_(min=1e-12)
        correlation = z.sign().T @ z.sign() / len(z)
        correlation.diagonal().add_(_RIDGE)
        inverse = torch.linalg.inv(correlation)
        u = z @ inverse
        energy = (z * u).mean(1).clamp_(min=1e-12).sqrt()
        peak = (u.abs() / inverse.diagonal().sqrt()).amax(1).clamp_(min=1e-12)
        pairs = zip(self._usable.tolist(), (energy * peak).log().tolist(), strict=True)
        return {self._rows[i]: score for i, score in pairs if i < len(self._rows)}


def columns(outputs: Sequence[Tensor]) -> Tensor:
    """Return the outputs that are looked at, ``[B, C]``, of leaves ``[B, ...]``, on the host."""
    flat = torch.cat([flat_rows(x.detach()).float() for x in outputs], 1)
    return flat[:, :: max(1, -(-flat.shape[1] // _COLUMNS))].cpu()


def flat_rows(values: Tensor) -> Tensor:
    """Return ``[n, C]`` of ``[n, ...]``, where a row may be a single number."""
    return values.flatten(1) if values.dim() > 1 else values[:, None]


def features(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return what distances between inputs ``[B, ...]`` are measured on, on the host."""
    return [added_up(x.detach()).cpu() for x in inputs]


class _Running:
    """A quantile of the last values, found anew from time to time."""

    def __init__(self, share: float) -> None:
        self.bar, self._share, self._fresh = math.inf, share, 0
        self._values: deque[float] = deque(maxlen=_KEPT)

    def add(self, values: Sequence[float]) -> None:
        self._values.extend(values)
        self._fresh += len(values)
        if len(self._values) >= 1 / self._share and self._fresh >= len(self._values) / 16:
            self.bar = sorted(self._values)[-math.ceil(len(self._values) * self._share)]
            self._fresh = 0
