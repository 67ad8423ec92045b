"""How far results of a call are apart, and how odd they look."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .scores import Fit, Scores, columns, features, flat_rows

if TYPE_CHECKING:
    from .trials import Verdict

__all__ = ["Results"]

# Results of one row in batches of other sizes differ by 2.5e-6 of the outputs' spread in float32,
# and by some .01 in half precision and TF32 (benchmarks/verification.py).
_EXACT, _LOOSE = 1e-3, 0.03
_SAMPLE = 64  # rows from which the spread of outputs is taken
_QUARTILE = 1.15  # standard deviations, within which three quarters of normal numbers lie


class Results:
    """The results of one call by rows.

    Args:
        size: B
        scores: of earlier calls.
        fits: of the batch; none if nothing is scored.
        loose: whether the module computes in less than its outputs' precision, as TF32 does.

    Attributes:
        tolerance: results of a row that differ by no more agree, in spreads of the outputs.
    """

    def __init__(
        self, size: int, scores: Scores, fits: Sequence[Fit] = (), *, loose: bool = False
    ) -> None:
        self._size, self._scores, self._fits = size, scores, fits
        self.tolerance = _LOOSE if loose else _EXACT
        self._places: dict[int, dict[int, int]] = {}  # by part and row, where its result is
        self._leaves: dict[int, list[Tensor]] = {}  # by part, [rows, ...] each
        self._differences: dict[tuple[int, int], dict[int, float]] = {}
        self._spreads: list[float] = []
        self._looked: tuple[Mapping[int, int], Tensor] | None = None
        self._scored: tuple[list[float], list[float]] = [], []

    def add(self, part: int, rows: Sequence[int], leaves: Iterable[Tensor]) -> None:
        """Add a good result: its leaves ``[rows, ...]``."""
        self._places[part] = {row: i for i, row in enumerate(rows)}
        self._leaves[part] = [leaf.detach() for leaf in leaves]
        if any(leaf.dtype in (torch.float16, torch.bfloat16) for leaf in self._leaves[part]):
            self.tolerance = _LOOSE

    def differences(self, part: int, other: int) -> Mapping[int, float]:
        """Return by how much two results of every common row differ, in spreads of the outputs.

        The largest difference of any output counts: 0 for equal bits, infinite for NaN.
        """
        pair = min(part, other), max(part, other)
        if pair not in self._differences:
            mine, its = self._places[pair[0]], self._places[pair[1]]
            rows = [row for row in mine if row in its]
            at, there = [mine[row] for row in rows], [its[row] for row in rows]
            largest = torch.zeros(len(rows))
            self._spreads = self._spreads or self._spread()
            both = zip(self._leaves[pair[0]], self._leaves[pair[1]], self._spreads, strict=True)
            for x, y, spread in both:
                largest = torch.maximum(largest, _apart(x[at], y.to(x.device)[there], spread))
            self._differences[pair] = dict(zip(rows, largest.tolist(), strict=True))
        return self._differences[pair]

    def _spread(self) -> list[float]:
        """Return the spread of every leaf: robust, as some results may be wrong."""
        spreads = []
        for leaves in zip(*self._leaves.values(), strict=True):
            some = torch.cat([flat_rows(leaf) for leaf in leaves])
            values = columns([some[:: -(-len(some) // _SAMPLE)]])
            away = (values - values.median(0).values).abs().flatten()
            away = away[away.isfinite()].sort().values
            quartile = float(away[len(away) * 3 // 4]) if len(away) else 0.0
            spreads.append(quartile / _QUARTILE or (float(away[-1]) if len(away) else 0) or 1.0)
        return spreads

    def odd(self, answers: Mapping[int, int]) -> set[int]:
        """Return the rows that look so odd that they should be computed again.

        Args:
            answers: by row, the part whose result counts.
        """
        scores, parts = self.scores(answers), dict[int, list[int]]()
        for row in scores:
            parts.setdefault(answers[row], []).append(row)
        rows, of_parts = self._scores.odd(scores, list(parts.values()))
        self._scored = list(scores.values()), of_parts
        return rows

    def scores(self, answers: Mapping[int, int]) -> dict[int, float]:
        """Return the score of every row, larger if others predict its result worse; or nothing."""
        if not self._fits or len(answers) < self._size:
            return {}
        outputs, scores = self.outputs(answers), dict[int, float]()
        if outputs.shape[1] and bool(outputs.isfinite().all()):
            for fit in self._fits:
                scores |= fit.scores(outputs)
        return scores

    def outputs(self, answers: Mapping[int, int]) -> Tensor:
        """Return the outputs that are looked at, ``[B, C]``; NaN where there is no answer."""
        if self._looked is not None and self._looked[0] == answers:
            return self._looked[1]
        starts, columns_of = dict[int, int](), list[list[Tensor]]()
        at = 0
        for part in dict.fromkeys(answers.values()):
            starts[part] = at
            at += len(self._places[part])
            columns_of.append([x for x in self._leaves[part] if x.is_floating_point()])
        leaves = [torch.cat(some) for some in zip(*columns_of, strict=True)]
        looked = columns(leaves) if leaves else torch.empty(at, 0)
        outputs = torch.full((self._size, looked.shape[1]), math.nan)
        places = [starts[part] + self._places[part][row] for row, part in answers.items()]
        outputs[list(answers)] = looked[places]
        self._looked = dict(answers), outputs
        return outputs

    def conclude(
        self, verdict: Verdict, inputs: Sequence[Tensor], workers: Mapping[int, int]
    ) -> None:
        """Learn for later calls from what can be believed.

        Args:
            verdict: on the call.
            inputs: of the call, floating-point, ``[B, ...]`` each; none if nothing is scored.
            workers: by part.
        """
        for worker in verdict.excluded:
            self._scores.forget(worker)
        if not verdict.doubted:  # wrong results make those beside them look odd
            self._scores.later(functools.partial(self._scores.learn, *self._scored))
        if inputs and verdict.answers:
            outputs, owners = self.outputs(verdict.answers), torch.full((self._size,), -1)
            for row, part in verdict.answers.items():
                if workers[part] not in verdict.doubted:
                    owners[row] = workers[part]
            owners[~outputs.isfinite().all(1)] = -1
            seen = torch.cat(features(inputs), 1)  # a copy, as the inputs may change
            self._scores.later(functools.partial(self._scores.remember, seen, outputs, owners))


def _apart(a: Tensor, b: Tensor, spread: float) -> Tensor:
    """Return by how much the rows of two results differ, on the host."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return torch.full((len(a),), math.inf)
    if not (a.is_floating_point() and a.numel()):
        return torch.where(flat_rows(a == b).all(1), 0.0, math.inf).cpu()
    wide = torch.promote_types(a.dtype, torch.float32)
    apart = flat_rows((a.to(wide) - b.to(wide)).abs_()).div_(spread).float()
    if not bool(apart.isfinite().all()):
        alike = flat_rows((a == b) | (a.isnan() & b.isnan()))
        apart = apart.nan_to_num_(nan=math.inf).masked_fill_(alike, 0.0)
    return apart.amax(1).cpu()
