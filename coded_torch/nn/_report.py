r"""The report of one call of a wrapper."""

import dataclasses
import functools
import math
import time
from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import between_0_and_1, real, sparing_logger
from .._table import GOOD, OPEN, Hedge, Part, Table, WorkerError
from .._torch import outside
from ..input_space._error_bounds import ErrorBounds
from ..input_space.metrics import Choice
from ..verification._verifier import Verifier

_CUT_SHORT = {
    "deadline": "the deadline was over",
    "estimate_after": "most calls have ended by then",
    "error": "the module fails on them",
    "failed": "no more results could come",
}

#: The columns of :meth:`Report.rows`: the field of the report that has each, and its dtype.
_COLUMNS = {
    "estimated": ("estimated", torch.bool),
    "error_bound": ("error_bounds", torch.float64),
    "label_p_value": ("label_p_values", torch.float64),
    "source": ("source", torch.uint8),
    "verified": ("verified", torch.bool),
    "unverified": ("unverified", torch.bool),
    "corrected": ("corrected", torch.bool),
}

logger = sparing_logger("coded_torch.nn")


@dataclasses.dataclass(kw_only=True)
class Report:
    """The report of one call of a :class:`~coded_torch.CodedWrapper`, also of one that raised.

    ``print`` shows it in five lines. Workers are named by their places in the pool. On
    :class:`~coded_torch.workers.LocalWorkers` every part of the call has a worker of its own.
    """

    # What every call needs.

    #: uint8 ``[B]``, on the host: 0 for answers from a part that was asked first, 1 from a hedge, 2
    #: if no worker computed the row: its answer is decoded or estimated. None before there are
    #: answers.
    source: Tensor | None = dataclasses.field(default=None, repr=False)
    #: by rows, the rows that no worker computed.
    missing_rows: tuple[int, ...] = ()
    #: by missing row, the error of the last part that held it, if there was one.
    errors: dict[int, WorkerError] = dataclasses.field(default_factory=dict, repr=False)
    #: the rows on which the module itself fails: it raised alike on two workers, or three times
    #: where no other worker computes them, or ended its workers, each row alone.
    module_failed_rows: tuple[int, ...] = ()
    #: why the call stopped waiting. "complete": every result is there; "enough_results": the first
    #: N - S results of a code are; "deadline": the deadline was over; "estimate_after": as many
    #: medians of calls were over; "error": all rows are answered but those on which the module
    #: itself fails; "failed": no worker could give more results.
    ended: str = ""
    #: whether the call raised.
    failed: bool = True
    #: further remarks for the caller.
    notes: tuple[str, ...] = ()

    # Workers and parts.

    #: the workers that began a part of the call, increasing
    asked: tuple[int, ...] = ()
    #: the workers whose results count, increasing
    received: tuple[int, ...] = ()
    #: by worker, seconds from the end of encoding to the worker's last reply, in the order of these
    #: replies. Workers that had to load the module are left out.
    latencies: dict[int, float] = dataclasses.field(default_factory=dict)
    #: by worker, the version of the model that its server named in its last reply.
    versions: dict[int, str] = dataclasses.field(default_factory=dict)
    #: by worker, the fault of its last result that does not count.
    rejected: dict[int, str] = dataclasses.field(default_factory=dict)
    #: rows that workers began to compute, per row of the batch; 1.0 if each is once.
    work_ratio: float = 0.0
    #: the parts that stood in for late or failed ones.
    hedges: tuple[Hedge, ...] = ()
    #: G, the number of groups; 0 by rows.
    num_groups: int = 0

    # Times.

    #: seconds from the call to the first ask: encoding, and at first, sending workers the module.
    encode_seconds: float = 0.0
    #: seconds of waiting for the workers and checking their results.
    compute_seconds: float = 0.0
    #: seconds of decoding and estimating.
    decode_seconds: float = 0.0
    #: seconds after its begin at which a part of the first ask is late; None if not known yet.
    hedging_threshold: float | None = None
    #: seconds from the call after which it was to end; None if there was none.
    deadline: float | None = None

    # Verification.

    #: bool ``[B]``, on the host: the rows that two workers computed alike, up to rounding. None
    #: without verification, as is ``unverified``.
    verified: Tensor | None = dataclasses.field(default=None, repr=False)
    #: bool ``[B]``, on the host: the rows whose check failed or came too late; of workers in
    #: undecided disputes, the rows that are not verified; all, if it has stopped.
    unverified: Tensor | None = dataclasses.field(default=None, repr=False)
    #: how often the results of two workers differed.
    disputes: int = 0
    #: the rows whose first result was wrong, and was replaced.
    corrected: tuple[int, ...] = ()
    #: by worker, how many wrong results it was found to return.
    wrong_results: dict[int, int] = dataclasses.field(default_factory=dict)
    #: with ``adversaries`` of a code, the workers whose results did not fit the others, and were
    #: not decoded.
    suspects: tuple[int, ...] = ()
    #: bool ``[B]``, on the host: with ``adversaries`` of a code, the rows that wrong results may
    #: have changed: no other worker confirms the result, or more workers look wrong than the code
    #: bears. None without ``adversaries``.
    undefended: Tensor | None = dataclasses.field(default=None, repr=False)
    #: the workers that this call excluded, until they are restarted.
    excluded: tuple[int, ...] = ()

    # Estimates.

    #: the level of the error bounds; None if there are none.
    coverage: float | None = None
    #: whether parts that came late, in this and earlier calls, look odder than others: bounds and
    #: p-values hold less often than they say. A false alarm has a probability of .01. Rows that
    #: never arrive because of their content are not seen.
    missing_not_at_random: bool = False
    #: for every decoded output, of each surrogate; 0 if the surrogate failed or did not improve the
    #: estimate. Empty if nothing was estimated.
    surrogate_weights: tuple[tuple[float, ...], ...] = ()
    #: for each decoded output, and each block of a large batch, the metric and length that
    #: estimated missing answers, and how well they estimate results from each other.
    distances: tuple[Choice, ...] = ()

    #: When the call began, by :func:`time.perf_counter`.
    since: float = dataclasses.field(default_factory=time.perf_counter, repr=False)
    _phase: str = dataclasses.field(default="encode", init=False, repr=False)
    # Arguments, so that :func:`dataclasses.replace` keeps them.
    _bounds: ErrorBounds | None = dataclasses.field(default=None, repr=False)
    _has_labels: bool = dataclasses.field(default=False, repr=False)
    #: By rows, the parts with unanswered rows that workers are still at, or have ended at.
    _unfinished: list[Part] = dataclasses.field(default_factory=list, repr=False)

    # Most callers read few of these tensors, so each is made when it is first read. The mode of the
    # reader has no influence on it.

    @functools.cached_property
    @outside()
    @torch.inference_mode(False)
    def estimated(self) -> Tensor | None:
        """The answers that are not the module's own result of their input.

        They are bool ``[B]``, on the host; None before there are answers.
        """
        if self.source is not None:
            return self.source == 2
        return None

    @functools.cached_property
    @outside()
    @torch.inference_mode(False)
    def error_bounds(self) -> Tensor | None:
        """The bounds of errors of the first decoded output, float64 ``[B]``, on the host.

        The norm of an answer's error is at most its bound with the probability ``coverage`` of the
        :class:`~coded_torch.Regression`. This excludes rows on which the module fails. A bound is 0
        if the answer is computed, and infinite if its input is not finite, or too few results
        arrived. There are none under a link, or without a regression.
        """
        if self._bounds and self.coverage:
            return self._bounds.at(self.coverage)
        return None

    @functools.cached_property
    @outside()
    @torch.inference_mode(False)
    def label_p_values(self) -> Tensor | None:
        """The p-values of classes, float64 ``[B]``, on the host, of a first output ``[B, C]``.

        Each is the conformal p-value of the hypothesis that an answer's largest number is not the
        module's. For each p, an answer both is wrong and has a value of at most p with a
        probability of at most p. Of the answers with such values, more may be wrong; see
        :meth:`certified`. A value is 0 if the answer is computed. There are none for other outputs,
        or without a regression.
        """
        if self._bounds and self._has_labels:
            return self._bounds.label_p_values
        return None

    @property
    def missing_workers(self) -> tuple[int, ...]:
        """The workers that began a part and have no result that counts."""
        return tuple(sorted(set(self.asked) - set(self.received)))

    def __str__(self) -> str:
        """Return five lines to read: rows, workers, seconds, the end of the call, and remarks."""
        words = ("prepare", "estimate", "estimated")
        if self.num_groups:
            words = ("encode", "decode", "decoded")
        begin, end, others = words
        rows = "no answers"
        if self.source is not None:
            first, hedged, rest = self.source.long().bincount(minlength=3).tolist()
            rows = f"{first + hedged} of {len(self.source)} computed, {hedged} of them by hedges; "
            rows += f"{rest} {others}, {len(self.corrected)} corrected"
            if self.verified is not None:
                rows += f", {int(self.verified.sum())} verified"
        seconds = {
            begin: self.encode_seconds,
            "compute": self.compute_seconds,
            end: self.decode_seconds,
        }
        total = sum(seconds.values())
        phases = ", ".join(f"{phase} {1e3 * x:.1f}" for phase, x in seconds.items())
        few = {"without a result": self.missing_workers, "rejected": self.rejected}
        few |= {"excluded": self.excluded}
        named = [f"{what}: {str(sorted(some))[1:-1]}" for what, some in few.items() if some]
        lines = {
            "rows": rows,
            "workers": "; ".join([f"{len(self.asked)} began a part", *named]),
            "time": f"{1e3 * total:.1f} ms: {phases}; work ratio {self.work_ratio:.3g}",
            "ended": f"{self.ended or 'early'}; hedges: {len(self.hedges)}",
            "notes": "; ".join(self.notes) or "none",
        }
        return "\n".join(f"{head:<9}{text}" for head, text in lines.items())

    def _attributes(self) -> dict[str, Any]:
        """Return the facts of a span of OpenTelemetry."""
        facts: dict[str, Any] = {"hedges": len(self.hedges), "ended": self.ended}
        facts["work_ratio"] = self.work_ratio
        if self.estimated is not None:
            facts["rows"] = len(self.estimated)
            facts["estimated"] = int(self.estimated.sum())
        return {f"coded_torch.{name}": value for name, value in facts.items()}

    @outside()
    @torch.inference_mode(False)
    def rows(self, *names: str, coverage: float | None = None) -> dict[str, Tensor]:
        """Return the facts of each row as columns ``[B]`` by name, all or some.

        They are ``estimated``, ``error_bound``, ``label_p_value``, ``source``, ``verified``,
        ``unverified`` and ``corrected``. Unknown values are 0, or NaN for estimated rows.
        Error bounds are at the level ``coverage``. Defaults to the level of the report.

        Raises a ValueError for another name, or if the call has no answers.
        """
        for name in names:
            if name not in _COLUMNS:
                raise ValueError(f"rows: names must be of {', '.join(_COLUMNS)}, got {name!r}")
        estimated = self.estimated
        if estimated is None:
            raise ValueError("rows: the report must be of a call with answers, got one without")
        columns = dict[str, Tensor]()
        for name in names or _COLUMNS:
            field, dtype = _COLUMNS[name]
            values = getattr(self, field)
            if name == "error_bound" and coverage and self.coverage:
                values = self.error_bounds_at(coverage)
            if not isinstance(values, Tensor):
                rows = [*(values or ())]
                values = torch.zeros(len(estimated), dtype=dtype)
                values[rows] = True
                if dtype.is_floating_point:
                    values.masked_fill_(estimated, math.nan)
            columns[name] = values
        return columns

    def error_bounds_at(self, coverage: float, odds: float = 1.0) -> Tensor | None:
        """Return the error bounds at another level, between 0 and 1, or None if there are none.

        With ``odds`` above 1 they hold as often although rows are not equally likely to be missing,
        as long as the odds of any two of them to be missing differ by at most this factor.
        """
        between_0_and_1("error_bounds_at", "coverage", coverage)
        real("error_bounds_at", "odds", odds, "at least 1 and finite", lambda x: 1 <= x < math.inf)
        level = odds * coverage / (1 - coverage + odds * coverage)
        if self.error_bounds is not None and self._bounds is not None:
            return self._bounds.at(level)
        return None

    @outside()
    def certified(self, rate: float) -> Tensor | None:
        """Return the rows whose classes are certified, bool ``[B]``; None without p-values.

        Computed rows are. Of the estimated ones, Benjamini and Hochberg's rule selects as many as
        possible at the false discovery ``rate``, in (0, 1): the expected share of selected rows
        whose class is not the module's is at most that.

        Reference:
            Jin, Candes, "Selection by Prediction with Conformal p-values", JMLR 2023.
        """
        between_0_and_1("certified", "rate", rate)
        if self.label_p_values is None or self.estimated is None:
            return None
        values = self.label_p_values[self.estimated].sort().values
        ranks = torch.arange(1, len(values) + 1, dtype=torch.float64)
        few = values <= rate * (ranks / max(1, len(values)))
        most = values[few].max() if few.any() else -1.0
        return ~self.estimated | (self.label_p_values <= most)

    def _note_table(self, table: Table, size: int, rejected: Sequence[WorkerError]) -> None:
        """Note who was asked, which results count, and how the policy ended the call, if it did."""
        begun = 0
        asked = set[int]()
        received = set[int]()
        for worker, _, ended in sorted(table.times, key=itemgetter(2)):
            self.latencies.pop(worker, None)
            self.latencies[worker] = ended
        if table.times:
            begun = table.num_asked
            asked = received = {*self.latencies}
        for part in table.ended if not begun else ():
            self.latencies.pop(part.worker, None)
            if part.worker >= 0 and not part.fresh:
                self.latencies[part.worker] = part.ended
            if part.outcome is GOOD:
                received.add(part.worker)
        for part in table.parts if not begun else ():
            if part.began < math.inf:
                begun += len(part.units)
                asked.add(part.worker)
                is_unfinished = False
                if table.spare is None:
                    is_unfinished = part.outcome is OPEN or part.kind == "died"
                if is_unfinished and not table.answered.keys() >= {*part.units}:
                    self._unfinished.append(part)
        self.asked = tuple(sorted(asked))
        self.received = tuple(sorted(received))
        self.work_ratio = begun * table.unit_rows / size
        for error in rejected:
            if error.kind != "died":  # the pool has logged that
                logger.warning("CodedWrapper: a result was rejected: %s", error)
            if error.worker >= 0:
                self.rejected[error.worker] = error.reason
        self.ended = table.end
        if self.ended and table.has_later:
            self.hedges = table.hedges
        for name in ("hedging_threshold", "deadline"):
            seconds = getattr(table, name)
            setattr(self, name, None if seconds == math.inf else seconds)

    @outside()
    def _note_verdict(self, verdict: Verifier, size: int) -> None:
        """Note the findings of verification."""
        for name in ("verified", "unverified"):
            rows = torch.zeros(size, dtype=torch.bool)
            rows[sorted(getattr(verdict, name))] = True
            setattr(self, name, rows)
        self.corrected = tuple(sorted(verdict.corrected))
        self.notes += tuple(verdict.notes)
        self.disputes = len(verdict.disputes)
        self.wrong_results = verdict.faults
        self.excluded = verdict.excluded
        why = "CodedWrapper: worker %d returned wrong results, by a majority: %d in one call"
        for worker, count in verdict.faults.items():
            logger.warning(why, worker, count)
        why = "CodedWrapper: worker %d is excluded until it is restarted, as it is often wrong"
        for worker in verdict.excluded:
            logger.error(why, worker)

    @outside()
    def _note_trust(
        self, suspects: Collection[int], excluded: Sequence[int], undefended: Tensor
    ) -> None:
        """Note the workers whose results were dropped, and the rows that are not defended."""
        self.suspects = tuple(sorted(suspects))
        self.excluded = tuple(excluded)
        self.undefended = undefended
        count = int(undefended.sum())
        if count:
            self.notes += (f"wrong results may have changed {count} of {len(undefended)} answers",)
        if suspects:
            logger.warning("CodedWrapper: results of workers %s were dropped", [*self.suspects])
        for worker in excluded:
            why = "CodedWrapper: worker %d is excluded until it is restarted: its results did not"
            logger.error(f"{why} fit the others' in half of its calls", worker)

    @outside()
    def _note_source(
        self, source: Tensor | None, later: Sequence[bool] | np.ndarray, unit_rows: int = 1
    ) -> None:
        """Note the result of each answer, ``[B]``, -1 if estimated, and which a hedge gave.

        None says that each row has its own result.
        """
        kinds = np.append(np.asarray(later, np.uint8), np.uint8(2))  # at -1, estimates
        self.source = torch.from_numpy(
            kinds[:-1] if source is None else kinds[source.numpy() // unit_rows]
        )

    def _note_whole(self, size: int, coverage: float, answers: Tensor | None) -> None:
        """Note that the first parts gave all answers, of which these are the first output's."""
        self.source = torch.zeros(size, dtype=torch.uint8, device="cpu")
        self._note_bounds(ErrorBounds(size), coverage, None, answers)

    def _note_bounds(
        self, bounds: ErrorBounds, coverage: float, link: str | None, answers: Tensor | None
    ) -> None:
        """Note how far off answers ``[B, ...]`` may be; under a link, only their labels."""
        self._has_labels = answers is not None and answers.dim() == 2 and answers.shape[1] > 1
        self._bounds = bounds
        self.coverage = None
        if link is None:
            self.coverage = coverage

    def _warn(self, why: str) -> None:
        """Log how many answers were estimated, and why, unless no more results were wanted."""
        if self.estimated is not None and self.ended in _CUT_SHORT and self.estimated.any():
            count = int(self.estimated.sum())
            size = len(self.estimated)
            because = why or _CUT_SHORT[self.ended]
            logger.warning("CodedWrapper: %d of %d answers are estimated: %s", count, size, because)

    def _enter(self, phase: str = "") -> None:
        """Begin a phase of the call, and add the seconds of the one before to its field."""
        if self._phase:  # all phases together take as long as the call so far
            phases = self.encode_seconds + self.compute_seconds + self.decode_seconds
            name = f"{self._phase}_seconds"
            since = self.since + phases
            setattr(self, name, getattr(self, name) + time.perf_counter() - since)
        self._phase = phase
