r"""What became of one call of a wrapper."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._logging import sparing_logger
from ..input_space.distances import Choice
from ..scheduling.waiting import Hedge
from ..workers.base import WorkerError

if TYPE_CHECKING:
    from ._results import Results

__all__ = ["Report"]

_CUT_SHORT = {
    "deadline": "the deadline was over",
    "patience": "the patience was over",
    "error": "the module fails on them",
    "failed": "no more results could come",
}

logger = sparing_logger("coded_torch.nn")


@dataclasses.dataclass(kw_only=True)
class Report:
    """How one call of a :class:`~coded_torch.nn.CodedWrapper` went.

    Where the call raised, it says how far the call had come. A machine is named by its place in the
    pool, ``0 .. num_machines - 1``; on :class:`~coded_torch.workers.LocalWorkers` every part of the
    call has a machine of its own.

    Attributes:
        asked: the machines that began a part of the call, in increasing order.
        received: the machines whose results count, in increasing order.
        latencies: seconds from the opening of the request, after encoding, until each machine that
            replied or failed had done so, in that order; of several times the last. A machine that
            had to load the module is left out: that time is no measure of its speed.
        rejected: what was wrong with the results that do not count, by machine; of several the
            last asked for.
        work: rows that machines began to compute, per row of the batch: 1.0 is every input once.
        hedges: what was asked again, when, and which reply won.
        predicted: bool ``[B]``, on the host: the answers that are not the module's own result of
            their input. None before there are answers.
        expected_errors: ``[B]``, float64, on the host: how far each answer may be off, in root mean
            square: the norm of the error over all numbers of the answer (of the first decoded
            output, where there are several); 0 where it is exact, infinite where the input is not
            finite. Codes other than ``KernelCode``
            cannot say: None; nor can any under a link, whose errors are in no unit of the answers.
        surrogate_weights: of each surrogate, for every decoded output; 0 where it was not used: it
            was left out, or results are predicted as well without. Empty where nothing had to be
            predicted, and of a wrapper without surrogates.
        ended: why the call waited no longer. "complete": every result that was wanted is there;
            "first": the first N - S are; "deadline"; "patience"; "error": all is there but what the
            module itself fails on; "failed": nothing more could come.
        fence: seconds after its begin at which a part of the first ask would be asked again; None:
            not known yet.
        median: of whole calls, in seconds; None: not known yet.
        deadline: seconds from the call after which it was to end; None: there was none.
        decodable: seconds from the call after which enough results were there to predict the rest,
            which may be after the deadline; None: never.
        num_groups: G, into how many groups the batch was cut; 0 where it was asked for by rows.
        distances: by which metric, of which length, lost answers were predicted, and how well that
            predicted the results from each other; of each decoded output, in their order (and of
            each chunk of a large batch). Empty where nothing was lost or the code has no choice.
        missing_rows: the rows that no worker computed, where the batch is asked for by rows: they
            are predicted, or the call raised.
        errors: by missing row, what went wrong with the last part that held it, if anything did.
        refused: the rows on which the module itself fails: it raised alike on two workers, or ended
            its workers when the row was alone.
        notes: what else the caller should know, such as what the code could not look at.
        encode_seconds: time spent on checking, ordering, planning and encoding before the first
            part was asked.
        compute_seconds: time spent on waiting for the machines and checking their results.
        decode_seconds: time spent on decoding.
        failed: whether the call raised.
    """

    asked: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    latencies: dict[int, float] = dataclasses.field(default_factory=dict)
    rejected: dict[int, str] = dataclasses.field(default_factory=dict)
    work: float = 0.0
    hedges: tuple[Hedge, ...] = ()
    predicted: Tensor | None = dataclasses.field(default=None, repr=False)
    expected_errors: Tensor | None = dataclasses.field(default=None, repr=False)
    surrogate_weights: tuple[tuple[float, ...], ...] = ()
    ended: str = ""
    fence: float | None = None
    median: float | None = None
    deadline: float | None = None
    decodable: float | None = None
    num_groups: int = 0
    distances: tuple[Choice, ...] = ()
    missing_rows: tuple[int, ...] = ()
    errors: dict[int, WorkerError] = dataclasses.field(default_factory=dict, repr=False)
    refused: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    encode_seconds: float = 0.0
    compute_seconds: float = 0.0
    decode_seconds: float = 0.0
    failed: bool = True

    def note(self, results: Results) -> None:
        """Note whose results count, and what is wrong with the others."""
        self.received = tuple(sorted({result.machine for result in results.good}))
        self.rejected = {  # -1: no machine had the part
            error.machine: error.reason for error in results.rejected if error.machine >= 0
        }

    @property
    def missing(self) -> tuple[int, ...]:
        """The machines that began a part and have no result that counts."""
        return tuple(sorted(set(self.asked) - set(self.received)))

    @property
    def expected_rmse(self) -> float | None:
        """The root mean squared error to expect of the answers.

        Comparable to :func:`coded_torch.evaluation.scores.rmse` of the first decoded output; None
        where :attr:`expected_errors` is.
        """
        if self.expected_errors is None:
            return None
        squares = self.expected_errors.square()
        return float(squares.mean().sqrt()) if len(squares) else 0.0

    def note_exact(self, size: int) -> None:
        """Note that all answers are the module's own."""
        self.predicted = torch.zeros(size, dtype=torch.bool)
        self.expected_errors = torch.zeros(size, dtype=torch.float64)

    def warn(self, why: str) -> None:
        """Log which answers were predicted, unless the policy wanted no more results.

        Args:
            why: there were no more results, in words.
        """
        if self.predicted is None or self.ended not in _CUT_SHORT:
            return
        if (count := int(self.predicted.sum())) > 0:
            because, size = why or _CUT_SHORT[self.ended], len(self.predicted)
            logger.warning("CodedWrapper: %d of %d answers are predicted: %s", count, size, because)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds that a block takes to ``{phase}_seconds``, even if it raises."""
        start, name = time.perf_counter(), f"{phase}_seconds"
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)
