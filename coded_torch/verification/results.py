"""The results of one call: by how much they differ, and how odd they look."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._logging import sparing_logger
from .scores import ODD_ROWS, Fit, Recent, Scores, columns, flat_rows

if TYPE_CHECKING:
    from .trials import Trials

__all__ = ["Results"]

# Results of one row in batches of other sizes differ by 2.5e-6 of the outputs' spread in float32,
# and by some .01 in half precision and TF32 (benchmarks verification, modules).
_EXACT, _LOOSE = 1e-3, 0.03
_SAMPLE = 64  # rows from which the spread of outputs is taken
_QUARTILE = 1.15  # standard deviations, within which three quarters of normal numbers lie

logger = sparing_logger("coded_torch.nn")


class Results:
    """The results of one call by rows.

    Args:
        scores: the scores of earlier calls.
        inputs: floating-point tensors, ``[B, ...]`` each. Defaults to none: nothing is scored.

    Attributes:
        tolerance: results of a row agree if they differ by no more, in spreads of the outputs.
    """

    def __init__(self, scores: Scores, inputs: Sequence[Tensor] = ()) -> None:
        self._scores, self.tolerance = scores, _LOOSE if _is_loose() else _EXACT
        self._places: dict[int, dict[int, int]] = {}  # the place of a row's result, by part
        self._leaves: dict[int, list[Tensor]] = {}  # [rows, ...] each, by part
        self._scored: dict[int, Tensor] = {}  # the outputs that are scored, by part
        self._differences: dict[tuple[int, int], dict[int, float]] = {}
        self._spreads: list[float] = []
        self._learnt: tuple[Sequence[float], Sequence[float]] = (), ()  # scores of rows, and parts
        self._fit: Fit | None = None
        with _scoring():
            self._fit = scores.fit(inputs)

    def add(self, part: int, rows: Sequence[int], leaves: Iterable[Tensor]) -> None:
        """Add a good result: its leaves ``[rows, ...]``."""
        self._places[part] = {row: i for i, row in enumerate(rows)}
        own = self._leaves[part] = [leaf.detach() for leaf in leaves]
        if any(leaf.dtype in (torch.float16, torch.bfloat16) for leaf in own):
            self.tolerance = _LOOSE
        some = [leaf for leaf in own if leaf.is_floating_point()]
        if some and self._fit is not None:
            self._scored[part] = columns(some)
        if not self._spreads and sum(map(len, self._places.values())) >= _SAMPLE:
            self._spreads = self._spread(own)  # while others compute

    def differences(self, pairs: Collection[tuple[int, int]]) -> list[Mapping[int, float]]:
        """Return, for pairs of parts, by how much the results of each common row differ.

        The unit is the spread of the outputs. The largest difference of any output counts: 0 for
        equal bits, infinite for NaN.
        """
        new = [pair for pair in pairs if pair not in self._differences]
        starts, at = dict[int, int](), 0
        for part in dict.fromkeys(part for pair in new for part in pair):
            starts[part], at = at, at + len(self._places[part])
        found = [(pair, row) for pair in new for row in self._places[pair[0]]]
        found = [(pair, row) for pair, row in found if row in self._places[pair[1]]]
        one, other = ([starts[p[i]] + self._places[p[i]][row] for p, row in found] for i in (0, 1))
        largest = torch.zeros(len(found))
        if new:
            some = self._leaves[new[0][0]]
            if len(self._spreads) != len(some):
                self._spreads = self._spread(some)
            columns_of = zip(*[self._leaves[part] for part in starts], strict=True)
            for leaves, spread in zip(columns_of, self._spreads, strict=True):
                stacked = torch.cat([leaf.to(leaves[0].device) for leaf in leaves])
                largest = torch.maximum(largest, _apart(stacked[one], stacked[other], spread))
        self._differences |= {pair: {} for pair in new}
        for (pair, row), difference in zip(found, largest.tolist(), strict=True):
            self._differences[pair][row] = difference
        return [self._differences[pair] for pair in pairs]

    def _spread(self, like: Sequence[Tensor]) -> list[float]:
        """Return the spread of every leaf: robust, as some results may be wrong."""
        spreads, form = [], [leaf.shape[1:] for leaf in like]
        alike = [own for own in self._leaves.values() if [x.shape[1:] for x in own] == form]
        for leaves in zip(*alike, strict=True):
            some = flat_rows(torch.cat([leaf.to(leaves[0].device) for leaf in leaves]))
            values = columns([some[:: -(-len(some) // _SAMPLE)]])
            away = (values - values.median(0).values).abs_().nan_to_num_(nan=math.inf).flatten()
            spread = float(away.kthvalue(1 + len(away) * 3 // 4).values) if len(away) > 1 else 0.0
            if not 0 < spread < math.inf:
                finite = away[away.isfinite()]
                spread = float(finite.max()) if len(finite) else 0.0
            spreads.append(spread / _QUARTILE or 1.0)
        return spreads

    def odd(self, answers: Mapping[int, int]) -> set[int]:
        """Return the rows that look so odd that they should be computed again.

        Args:
            answers: by row, the part whose result counts.
        """
        scores, parts = self.scores(answers), defaultdict[int, list[int]](list)
        if not scores:
            return set()
        top = sorted(scores, key=scores.__getitem__, reverse=True)
        few = top[: max(1, round(3 * ODD_ROWS * len(top)))]
        odd, middle = {row for row in few if scores[row] > self._scores.rows.at}, len(top) // 2
        for row in scores:
            parts[answers[row]].append(row)
        means = []
        for rows in parts.values():
            mean = sum(scores[row] for row in rows) / len(rows) - scores[top[middle]]
            means.append(mean * math.sqrt(len(rows)))
            if means[-1] > self._scores.parts.at:
                odd.add(max(rows, key=scores.__getitem__))
        self._learnt = list(scores.values()), means
        return odd

    def scores(self, answers: Mapping[int, int]) -> dict[int, float]:
        """Return scores by row, larger if others predict its result worse; empty if not known."""
        if self._fit is None or not self._scored or not answers.keys() >= set(self._fit.rows):
            return {}
        with _scoring():
            return self._fit.scores(self.outputs({row: answers[row] for row in self._fit.rows}))
        return {}

    def outputs(self, answers: Mapping[int, int]) -> Tensor:
        """Return the outputs that are scored, ``[n, C]``, of n rows."""
        starts, at = dict[int, int](), 0
        for part in dict.fromkeys(answers.values()):
            starts[part], at = at, at + len(self._places[part])
        places = [starts[part] + self._places[part][row] for row, part in answers.items()]
        return torch.cat([self._scored[part] for part in starts])[places]

    def conclude(self, trials: Trials) -> None:
        """Keep credible results, for later calls to learn."""
        with _scoring():
            for worker in trials.excluded:
                self._scores.forget(worker)
        if self._fit is not None and self._scored:
            self._leaves.clear()  # large, perhaps
            self._scores.left.append(functools.partial(self._learn, self._fit, trials))

    def _learn(self, fit: Fit, trials: Trials) -> None:
        kept = {i: row for i, row in enumerate(fit.rows) if row in trials.owners}
        if kept:
            outputs = self.outputs({row: trials.answers[row] for row in kept.values()})
            owners = torch.tensor([trials.owners[row] for row in kept.values()])
            finite = outputs.isfinite().all(1)
            recent = Recent(*[x[finite] for x in (fit.features[list(kept)], outputs, owners)])
            # Wrong results make those beside them look odd.
            self._scores.add(recent, *(((), ()) if trials.doubted else self._learnt))


@contextlib.contextmanager
def _scoring() -> Iterator[None]:
    """Let an exception in scoring lose no answers: rows are still checked at random."""
    try:
        yield
    except Exception as error:
        logger.warning("CodedWrapper: results are not scored, as scoring raised", exc_info=error)


def _apart(a: Tensor, b: Tensor, spread: float) -> Tensor:
    """Return by how much the rows of two results differ, on the host."""
    if not (a.is_floating_point() and a.numel()):
        return torch.where(flat_rows(a == b).all(1), 0.0, math.inf).cpu()
    wide = torch.promote_types(a.dtype, torch.float32)
    apart = flat_rows((a.to(wide) - b.to(wide)).abs_()).div_(spread).float()
    if not bool(apart.isfinite().all()):
        alike = flat_rows((a == b) | (a.isnan() & b.isnan()))
        apart = apart.nan_to_num_(nan=math.inf).masked_fill_(alike, 0.0)
    return apart.amax(1).cpu()


def _is_loose() -> bool:
    """Return whether matrix products may have less precision than float32, as in TF32."""
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    on_cuda = torch.cuda.is_available() and (tf32 or torch.is_autocast_enabled("cuda"))
    return bool(on_cuda) or torch.is_autocast_enabled("cpu")
