r"""The report of one call of a wrapper, and the exception that it raises instead of answering."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._arguments import real, sparing_logger
from .._torch import outside
from ..codes.plans import DeadlineExceeded, NotEnoughResults
from ..input_space.error_bars import ErrorBars
from ..scheduling import Ended, Hedge
from ..workers.base import WorkerError, unflatten

if TYPE_CHECKING:
    from ..input_space.metrics import Choice
    from ..scheduling.waiting import Waiting
    from ..verification import Trials
    from .division import Division
    from .execute import Execution
    from .result_checks import Results

__all__ = ["Report", "error_of", "holding"]

_CUT_SHORT = {
    "deadline": "the deadline was over",
    "predict_after": "most calls have ended by then",
    "error": "the module fails on them",
    "failed": "no more results could come",
}
_NOTE = "raised by the module on"

logger = sparing_logger("coded_torch.nn")


@dataclasses.dataclass(kw_only=True)
class Report:
    """The report of one call of a :class:`~coded_torch.CodedWrapper`, also of one that raised.

    A worker is named by its place in the pool, 0, 1, 2, ... On
    :class:`~coded_torch.workers.LocalWorkers` every part of the call has a worker of its own.

    Attributes:
        asked: the workers that began a part of the call, increasing.
        received: the workers whose results count, increasing.
        latencies: by worker, seconds from the opening of the request, after encoding, to its last
            reply, in that order; without workers that had to load the module.
        rejected: by worker, the fault of its last result that does not count.
        work: rows that workers began to compute, per row of the batch: 1.0 is every input once.
        hedges: the parts that stood in for late or failed ones.
        predicted: bool ``[B]``, on the host: the answers that are not the module's own result of
            their input. None before there are answers.
        radii: float64 ``[B]``, on the host: bounds of errors of the first decoded output. The norm
            of an answer's error is at most its radius with the probability ``coverage`` of the
            :class:`~coded_torch.Regression`. 0 if the answer is exact, infinite if its input is not
            finite, or too few results arrived. None under a link, or if the code mixes inputs.
        coverage: the level of the radii; None if there are none.
        label_risks: float64 ``[B]``, on the host: for a first decoded output ``[B, C]``, the
            estimated probability that an answer's largest number is not the module's. 0 if the
            answer is exact. None for other outputs, or if the code mixes inputs.
        surrogate_weights: for every decoded output, of each surrogate; 0 if the surrogate failed or
            did not improve the prediction. Empty if nothing was predicted.
        ended: why the call waited no longer. "complete": every result is there; "first": the first
            N - S are; "deadline"; "predict_after": as many medians of calls were over; "error": all
            is there but the rows that the module itself fails on; "failed": nothing more could
            come.
        hedging_threshold: seconds after its begin at which a part of the first ask is late; None if
            not known yet.
        deadline: seconds from the call after which it was to end; None if there was none.
        num_groups: G, the number of groups; 0 if the batch was divided by rows.
        distances: for each decoded output, and each block of a large batch, the metric and length
            that predicted missing answers. Each says how well it predicts results from each other.
            Empty if nothing was missing or the code has no choice.
        missing_rows: the rows that no worker computed, if the batch was divided by rows.
        errors: by missing row, the error of the last part that held it, if there was one.
        refused: the rows on which the module itself fails: it raised alike on two workers, or ended
            its workers when the row was alone.
        verified: bool ``[B]``, on the host: the rows that two workers computed alike. None without
            ``verify``.
        unverified: bool ``[B]``, on the host: the rows whose check did not come in time, or could
            not be decided. None without ``verify``.
        disputes: how often the results of two workers differed.
        corrected: the rows whose first result was wrong, and was replaced.
        strikes: by worker, how many wrong results it was found to return.
        excluded: the workers that get no more parts until they are restarted.
        notes: further remarks for the caller.
        encode_seconds: from the call to the first ask: checking, ordering, planning and encoding.
        compute_seconds: of waiting for the workers and checking their results.
        decode_seconds: of decoding and predicting.
        failed: whether the call raised.
    """

    asked: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    latencies: dict[int, float] = dataclasses.field(default_factory=dict)
    rejected: dict[int, str] = dataclasses.field(default_factory=dict)
    work: float = 0.0
    hedges: tuple[Hedge, ...] = ()
    predicted: Tensor | None = dataclasses.field(default=None, repr=False)
    radii: Tensor | None = dataclasses.field(default=None, repr=False)
    coverage: float | None = None
    label_risks: Tensor | None = dataclasses.field(default=None, repr=False)
    surrogate_weights: tuple[tuple[float, ...], ...] = ()
    ended: str = ""
    hedging_threshold: float | None = None
    deadline: float | None = None
    num_groups: int = 0
    distances: tuple[Choice, ...] = ()
    missing_rows: tuple[int, ...] = ()
    errors: dict[int, WorkerError] = dataclasses.field(default_factory=dict, repr=False)
    refused: tuple[int, ...] = ()
    verified: Tensor | None = dataclasses.field(default=None, repr=False)
    unverified: Tensor | None = dataclasses.field(default=None, repr=False)
    disputes: int = 0
    corrected: tuple[int, ...] = ()
    strikes: dict[int, int] = dataclasses.field(default_factory=dict)
    excluded: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    encode_seconds: float = 0.0
    compute_seconds: float = 0.0
    decode_seconds: float = 0.0
    failed: bool = True
    #: When the call began, by :func:`time.perf_counter`.
    since: float = dataclasses.field(default_factory=time.perf_counter, init=False, repr=False)
    _bars: ErrorBars | None = dataclasses.field(default=None, init=False, repr=False)
    _origin: tuple[Any, ...] = dataclasses.field(default=(), init=False, repr=False)

    @property
    def missing(self) -> tuple[int, ...]:
        """The workers that began a part and have no result that counts."""
        return tuple(sorted(set(self.asked) - set(self.received)))

    def radii_at(self, coverage: float | Tensor) -> Tensor | None:
        """Return the radii at a level of one's own, or None if there are none.

        Args:
            coverage: the probability, between 0 and 1; or one for each row, ``[B]``.

        Raises:
            TypeError, ValueError: it is no number, or not between 0 and 1, or has another shape.
        """
        if not isinstance(coverage, Tensor):
            real("radii_at", "coverage", coverage, "between 0 and 1", lambda x: 0 < x < 1)
        elif self.radii is not None:
            shape, size = list(coverage.shape), len(self.radii)
            if shape not in ([], [size]) or not bool(((coverage > 0) & (coverage < 1)).all()):
                must = f"coverage must be between 0 and 1, of shape [] or [{size}]"
                raise ValueError(f"radii_at: {must}, got {coverage} of shape {shape}")
        return None if self.radii is None or self._bars is None else self._bars.radii(coverage)

    def note_end(self, ended: Ended) -> None:
        """Note how the policy ended the call."""
        self.ended, self.hedges = ended.reason, ended.hedges
        for name in ("hedging_threshold", "deadline"):
            seconds = getattr(ended, name)
            setattr(self, name, None if seconds == math.inf else seconds)

    @outside()
    def note_verdict(self, verdict: Trials, size: int) -> None:
        """Note the findings of verification."""
        for name in ("verified", "unverified"):
            rows = torch.zeros(size, dtype=torch.bool)
            rows[sorted(getattr(verdict, name))] = True
            setattr(self, name, rows)
        self.corrected = tuple(sorted(verdict.corrected))
        self.disputes, self.strikes = verdict.disputes, verdict.strikes
        self.excluded = verdict.excluded
        self.notes += verdict.notes
        for worker, count in verdict.strikes.items():
            what = "CodedWrapper: worker %d returned wrong results, as others found: %d in one call"
            logger.warning(what, worker, count)
        for worker in verdict.excluded:
            what = "CodedWrapper: worker %d is excluded until it is restarted, as it is often wrong"
            logger.error(what, worker)

    @property
    def source(self) -> Tensor | None:
        """The sources of answers: uint8 ``[B]``, on the host; None before there are answers.

        0 is a part that was asked first, 1 a hedge or another later part, 2 a prediction.
        """
        if not self._origin:
            return None
        source, parts, num_first, unit_rows = self._origin
        units = torch.where(source < 0, -1, source // unit_rows)
        codes = torch.tensor([*(part >= num_first for part in parts), 2], dtype=torch.uint8)
        return codes[units]

    @outside()
    def note_source(
        self, source: Tensor, parts: Sequence[int], num_first: int, unit_rows: int = 1
    ) -> None:
        """Note the result of each answer, ``[B]``, -1 if predicted, and the part of each unit."""
        self.predicted, self._origin = source < 0, (source, parts, num_first, unit_rows)

    def note_empty(self) -> None:
        """Note that there are no answers."""
        self.note_source(torch.zeros(0, dtype=torch.int64), (), 0)
        self.radii = self.label_risks = torch.zeros(0, dtype=torch.float64)

    @outside()
    def note_bars(self, bars: ErrorBars, coverage: float, link: str | None, labels: bool) -> None:
        """Note how far off answers may be; under a link, only which ``labels`` may be wrong."""
        self._bars, self.label_risks = bars, bars.label_risks if labels else None
        if link is None:
            self.radii, self.coverage = bars.radii(coverage), coverage

    def warn(self, why: str) -> None:
        """Log how many answers were predicted, and why, unless no more results were wanted."""
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


def error_of(
    waiting: Waiting, division: Division, results: Results, report: Report, execution: Execution
) -> Exception | None:
    """Return the exception if some rows may not, or cannot, be predicted, and report these."""
    errors = {error.part: error for error in results.rejected}
    blamed = [errors[number] for number in execution.refused if number in errors]
    if division.by_rows:
        good, last, refused = results.units, dict[int, WorkerError](), set[int]()
        for part in execution.parts:
            if part.number in errors:
                last |= dict.fromkeys(part.units, errors[part.number])
            if part.number in execution.refused:
                refused |= set(part.units) - good
        report.missing_rows = tuple(sorted(set(range(division.batch_size)) - good))
        report.errors = {row: last[row] for row in report.missing_rows if row in last}
        report.refused = tuple(sorted(refused))
    # As many results as others may be predicted from.
    required = max(division.least, -(-division.needed // 2))
    if not waiting.predict:
        required = division.needed
    elif waiting.at_once or (report.ended == "failed" and not division.by_rows):
        required = division.least  # no more could come
    why, error = execution.why, results.misfit
    enough = len(results.units) >= required
    if blamed and (waiting.on_error == "raise" or not enough):
        required, why = division.needed, ""
        error = _of_module(min(blamed, key=lambda e: execution.parts[e.part].units), report.refused)
    elif enough:
        required, error = division.needed, None
        if not (why := _unpredictable(division, results)):
            return None
    if error is None:
        error = _too_few(required, division, results, report, why)
    return holding(error, division, results, report)


def _unpredictable(division: Division, results: Results) -> str:
    """Return why rows without a result cannot be predicted; "" if they can, or all have one."""
    received, first = sorted(results.units), results.good[0]
    odd = division.not_finite
    why = ""
    if odd is not None and bool(odd[received].all()):
        why = "there is no result of finite inputs to predict others from"
    for i, (leaf, dim) in enumerate(zip(first.leaves, first.dims, strict=True)):
        if dim is not None and isinstance(leaf, Tensor) and not leaf.is_floating_point():
            remedy = "take Waiting(predict=False), or return logits instead"
            why = why or f"{first.name(i)} is {leaf.dtype} and cannot be predicted; {remedy}"
    if not why or division.is_whole(received):
        return ""
    return why if division.by_rows or bool((division.plan().source(received) < 0).any()) else ""


def _of_module(first: WorkerError, refused: Sequence[int]) -> Exception | None:
    """Return the exception of the module; None if it raised none."""
    cause = first.__cause__
    if first.kind != "raised" or not isinstance(cause, Exception):
        return None
    if isinstance(cause, StopIteration):  # futures cannot hold it (PEP 479)
        cause, stopped = RuntimeError(f"the module raised {cause!r}"), cause
        cause.__cause__ = stopped
    if refused:
        note = f"{_NOTE} {_shown(refused)} of the batch; {first}"
        with contextlib.suppress(Exception):  # a class may have slots, or refuse attributes
            # `add_note` is not in Python 3.10. The module may raise one object again and again.
            others = [n for n in getattr(cause, "__notes__", ()) if not n.startswith(_NOTE)]
            cause.__notes__ = [*others, note]
            cause.rows = refused  # type: ignore[attr-defined]
    return cause


def _too_few(
    required: int, division: Division, results: Results, report: Report, why: str
) -> NotEnoughResults:
    rejected = results.rejected
    reasons = [str(rejected[0]).partition("\n")[0]] if rejected else []
    total = len(division.first)
    received = [r.part.number for r in results.good if r.part.number < total]
    if division.by_rows:
        received, total = sorted(results.units), division.batch_size
        causes: dict[str, list[int]] = {}
        for row in report.missing_rows:
            cause = str(report.errors.get(row, "")).partition("\n")[0] or "no reply"
            causes.setdefault(cause, []).append(row)
        reasons = [f"{_shown(rows)}: {cause}" for cause, rows in causes.items()]
    kind = DeadlineExceeded if report.ended == "deadline" else NotEnoughResults
    error = kind(received, required, total, "; ".join([*reasons, *([why] if why else [])]))
    error.__cause__ = next(iter([*report.errors.values(), *rejected]), None)
    return error


def _shown(rows: Sequence[int]) -> str:
    """Show rows, runs of them as their ends."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][-1] + 1:
            runs[-1][1:] = [row]
        else:
            runs.append([row])
    shown = ", ".join(" to ".join(map(str, run)) for run in runs)
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}"


def holding(error: Exception, division: Division, results: Results, report: Report) -> Exception:
    """Return the exception with the report and the answers that came."""
    with contextlib.suppress(Exception):  # a class may refuse attributes
        error.report = report  # type: ignore[attr-defined]
        error.answers = _computed(division, results)  # type: ignore[attr-defined]
    return error


def _computed(division: Division, results: Results) -> Any:
    """Return the rows that were computed, in the structure of the answers, NaN elsewhere."""
    if not (division.by_rows and results.units):
        return None
    stacked, leaves = results.stack(), []
    for leaf, dim in zip(stacked.leaves, stacked.dims, strict=True):
        if dim is not None and isinstance(leaf, Tensor):
            fill = math.nan if leaf.is_floating_point() else 0
            whole = leaf.new_full((division.batch_size, *leaf.shape[2:]), fill)
            whole[list(stacked.units)] = leaf.squeeze(1)
            leaf = whole.movedim(0, dim)
        leaves.append(leaf)
    return unflatten(leaves, stacked.spec)
