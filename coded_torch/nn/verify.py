"""Verification of the calls of one wrapper."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import verification
from .._logging import sparing_logger
from ..scheduling.protocol import Decision, Event
from ..verification import Drawn, Scores, Strikes, Trials, Verdict, draw

if TYPE_CHECKING:
    from ..workers.base import Workers
    from .division import Inputs
    from .report import Report
    from .result_checks import Result

__all__ = ["Check", "Verifier"]

logger = sparing_logger("coded_torch.nn")


class Verifier:
    """What verification has learnt of one module on one pool.

    Args:
        pool: that computes.
        share: of the rows that are checked.
    """

    def __init__(self, pool: Workers, share: float) -> None:
        assert pool.num_workers is not None
        self.pool, self.strikes = pool, Strikes(pool.num_workers, share)
        self.scores = Scores()
        self.told: set[int] = set()  # the workers that the pool has been told to exclude


class Check:
    """The verification of one call.

    Args:
        verifier: of the wrapper.
        inputs: of the call.
    """

    def __init__(self, verifier: Verifier, inputs: Inputs) -> None:
        self.strikes, self._scores = verifier.strikes, verifier.scores
        self._told = verifier.told
        self._size, self._inputs = inputs.batch_size, inputs.floating()
        self._exclude: Any = getattr(verifier.pool, "exclude", None)
        self._out = frozenset(self._told)
        self._drawn = Drawn(())
        self._results = verification.Results(self._size, self._scores)
        self._trials: Trials | None = None

    @property
    def avoid(self) -> frozenset[int]:
        """The workers that must get no part, where the pool itself cannot exclude them."""
        return frozenset() if self._exclude is not None else frozenset(self.strikes.excluded)

    def first(self, parts: Sequence[Sequence[int]], idle: int) -> tuple[tuple[int, ...], ...]:
        """Return the parts to ask for first, with secret check rows."""
        self.strikes.count_call()
        self._drawn = draw(parts, self.strikes, idle)
        return self._drawn.parts

    def prepare(self) -> None:
        """Fit the regressions that score results, while workers compute."""
        fits = [] if self.strikes.stopped else self._scores.fit(self._inputs)
        self._results = verification.Results(self._size, self._scores, fits, loose=_is_loose())

    def add(self, result: Result) -> None:
        """Add a good result, before the trials hear of its part."""
        leaves = zip(result.leaves, result.dims, strict=True)
        self._results.add(
            result.part.number,
            result.part.units,
            [x.movedim(dim, 0) for x, dim in leaves if dim is not None and isinstance(x, Tensor)],
        )

    def decisions(
        self,
        asked: Sequence[tuple[int, ...]],
        good: Sequence[Result],
        fresh: set[int],
        **times: float,
    ) -> Generator[Decision, Event, Verdict]:
        """Return the decisions that follow those of the waiting policy.

        Args:
            asked: the rows of all parts so far.
            good: the good results, in the order in which they arrived.
            fresh: workers that ran the module for the first time.
            times: of :class:`~coded_torch.verification.Trials`.
        """
        for result in good:
            self.add(result)
        replies = [(result.part.number, result.worker) for result in good]
        # A worker that the pool excluded before the call, and that has a part, has been restarted.
        renewed = fresh | (self._out & {worker for _, worker in replies})
        self._told -= renewed
        self.strikes.renew(renewed)
        self._trials = Trials(self.strikes, self._results, asked, replies, self._drawn, **times)
        return self._trials.decisions()

    def conclude(self, verdict: Verdict, report: Report) -> Tensor:
        """Exclude workers, report what was found, and learn for later calls.

        Returns:
            int64 ``[B]``: by row the worker that computed the answer; -1 if it is in doubt, or
            there is none.
        """
        assert self._trials is not None
        for worker, count in verdict.strikes.items():
            logger.warning(
                "CodedWrapper: worker %d returned wrong results, as others computed them again; "
                "strikes in this call: %d",
                worker,
                count,
            )
        for worker in verdict.excluded:
            logger.error(
                "CodedWrapper: worker %d is excluded until it is restarted, as its results are "
                "wrong again and again",
                worker,
            )
            if self._exclude is not None:
                self._exclude(worker)
            self._told.add(worker)
        report.note_verdict(verdict, self._size)
        if not self.strikes.stopped:  # else nothing is scored any more
            self._results.conclude(verdict, self._inputs, self._trials.worker)
        owners = torch.full((self._size,), -1)
        for row, part in verdict.answers.items():
            if (worker := self._trials.worker[part]) not in verdict.doubted:
                owners[row] = worker
        return owners


def _is_loose() -> bool:
    """Return whether matrix products may be of less precision than float32."""
    if torch.is_autocast_enabled("cpu"):
        return True
    if not torch.cuda.is_available():
        return False
    backends = torch.backends
    tf32 = backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32
    return bool(tf32) or torch.is_autocast_enabled("cuda")
