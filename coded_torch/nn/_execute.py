"""Carries out a policy's decisions on one request to a pool, and names missing results."""

import contextlib
import functools
import math
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import _tracing
from .._arguments import sparing_logger
from .._table import DROPPED, OPEN, Began, Reply, Table, WorkerError
from ..codes._base import DeadlineExceeded, NotEnoughResults
from ..input_space._error_bounds import Exchangeability
from ..scheduling._latency_history import History
from ..scheduling.policy import Waiting
from ..verification._verifier import Verifier
from ..workers._base import Request, Workers
from ._division import Division
from ._report import Report
from ._result_checks import Checks

logger = sparing_logger("coded_torch.nn")
_SHOWN = 8  # rows in a message
_NOTE = "raised by the module on"


def seconds_left(pool: Workers, waiting: Waiting, report: Report) -> float:
    """Return the seconds to the deadline; infinite without a deadline, or if time is simulated."""
    if waiting.deadline is None or pool.simulated:
        return math.inf
    return waiting.deadline - (time.perf_counter() - report.since)


class Execution:
    """The asking and waiting of one call, and its verification if there is a ``check``."""

    table: Table
    why = ""  #: the reason why there are no more results, in words

    def __init__(self, division: Division, report: Report, check: Any, prepare: Any) -> None:
        self._division = division
        self._report = report
        self._check: Verifier | None = check
        # for estimates from results so far
        self.checks = Checks(division)
        self._prepare = prepare

    def run(self, pool: Workers, module: nn.Module, waiting: Waiting, history: History) -> None:
        """Ask and wait until the policy ends the call, and verify the results."""
        division = self._division
        check = self._check
        report = self._report
        with pool.open(module, division.task) as request:
            # On a simulated clock, only the simulation takes time.
            began = 0.0
            if not pool.simulated:
                began = request.now() + report.since - time.perf_counter()
            table = self.table = self.checks.table = Table(
                first=division.first,
                needed=division.needed,
                least=division.least,
                unit_rows=division.task.unit_rows,
                spare=division.spare,
                since=began,
                idle=lambda: request.idle,
                reserve=division.reserve,
                judge=self.checks.judge,
            )
            policies: list[Any] = [waiting]
            if check is not None:
                check.begin(table)
                policies.append(check)
            try:
                try:
                    self._follow(policies, history, request)
                except Exception:  # the module may have raised because of inputs that are mixed
                    division.inputs.read()
                    raise
                division.inputs.read()
                self.why = "" if table.reason == "complete" else request.status()
                # Of a pool without places, all workers have left.
                if self.why and pool.places and pool.num_ready == pool.num_restarts == 0:
                    first = "workers are still starting; call pool.start(model, example) first"
                    self.why = f"{first}; {self.why}"
            finally:
                table.judge = table.policy = None  # no cycle keeps results until it is collected
                report.versions = dict(request.versions)
                report._note_table(table, division.batch_size, self.checks.rejected)
                _tracing.note_parts(table, request.now(), pool.names)
                # A worker keeps its part until it has computed it.
                for part in table.parts if table.has_later else ():
                    if part.outcome in (OPEN, DROPPED):
                        part.of = None
        report.num_groups = division.num_groups
        report.notes += self._raised_together()
        if check is not None:
            report._note_verdict(check, division.batch_size)
        if table.reason == "deadline":
            what = "no more" if table.num_answered else "nothing"
            late = f"{what} arrived within the deadline of {table.deadline:g} s"
            self.why = f"{self.why}; {late}" if self.why else late

    def _follow(self, policies: Sequence[Any], history: History, request: Request) -> None:
        """Carry out the decisions of policies, and write what happens, until the call ends."""
        table = self.table
        asked = 0
        while True:
            until = min([policy.decide(history, table) for policy in policies])
            if table.end:
                return
            if table.unwanted:
                request.drop(table.unwanted)
                table.unwanted.clear()
            wanted = self._division.needed - table.num_answered
            # Until a part of the first round fails or is late, there is nothing to decide.
            is_first = not table.has_later and table.late < math.inf
            request.together, request.late = (wanted, table.late) if is_first else (0, math.inf)
            if is_first and not asked and self._may_round:
                # Results that are verified stay apart.
                join = self.checks.join if self._check is None else None
                times = request.round(table.first, until, join)
                if times:
                    # No cycle keeps results.
                    joined = functools.partial(_joined, weakref.ref(self.checks))
                    table.end_first(times, joined)
                    continue
                if request.parts:
                    table.take(request.parts)
                    asked = len(request.parts)
            if asked < len(table.parts):
                request.ask(table.parts[asked:])
                asked = len(table.parts)
            if table.prepares and table.num_answered:
                table.prepares = False
                self._report._enter("decode")  # now, while the call would wait anyway
                self._prepare(self.checks.stack())
                self._report._enter("compute")
            events = list[Began | Reply]()
            try:
                request.gather(events, until, wanted)
            finally:  # the report has these events even if waiting raised
                for event in events if self._check is not None else ():
                    if isinstance(event, Reply):  # a faulty worker may share its memory
                        event.value = _copied(event.value)
                table.hear(events, until)

    @property
    def _may_round(self) -> bool:
        """Whether the first parts may be asked for together, to decide once all have ended."""
        if self._check is None:
            return self.checks.may_join
        # A regression is fitted while workers compute, and parts of a round have any worker.
        return not (self._check.is_scored or self.table.avoid)

    def _raised_together(self) -> tuple[str, ...]:
        """Return a note of the first part that raised although smaller parts computed its rows.

        Memory may have been too small, or the module depends on the number of rows.
        """
        if not self._division.by_rows:
            return ()
        for failed in self.checks.rejected:
            rows = self.table.parts[failed.part].units
            by = {self.table.answered.get(row) for row in rows}
            if failed.kind == "raised" and all(part and len(part.units) < len(rows) for part in by):
                return (f"{_shown(rows)} raised together, and not in smaller parts: {failed}",)
        return ()

    def notes_of_rows(self) -> tuple[str, ...]:
        """Return notes of rows that are infinite, not proved, or depend on others."""
        notes = list[str]()
        inputs = self._division.inputs
        if self._division.infinite:
            rows = _shown(sorted(self._division.infinite))
            notes.append(
                f"{rows}: infinite alike on two workers, so returned as computed, and used for no "
                "estimates"
            )
        if inputs.layout is not None and inputs.layout.note:
            notes.append(inputs.layout.note)
        elif self.checks.whole is None and inputs.batch_size > 1:
            good = self.table.good
            if len(good) > 1 and not good[0].result.proved:
                why = inputs.unproved or "the output has another structure than before"
                notes.append(f"it is not proved that outputs follow the rows of parts: {why}")
        return tuple(notes)

    def compare(
        self, known: Exchangeability, units: Sequence[int], oddness: Sequence[tuple[int, float]]
    ) -> None:
        """Report whether late parts look odder than others, given the oddness of results."""
        found = list[tuple[int, float, float]]()
        of_units = defaultdict[int, list[float]](list)
        for place, odd in oddness:
            of_units[units[place // self.table.unit_rows]].append(odd)
        for part in self.table.good:
            values = list[float]()
            for unit in part.units:
                values += of_units[unit]
            if values and part.why == "first" and not part.fresh:
                found.append((len(part.units), part.seconds, sum(values) / len(values)))
        calls = known.add(found) if found else 0
        if calls:
            self._report.missing_not_at_random = True
            self._report.notes += (
                f"late parts looked odder than others, over {calls} calls, so rows are not "
                "missing at random, and bounds hold less often than they say; see error_bounds_at",
            )

    # Missing results.

    def failure(self, waiting: Waiting) -> Exception | None:
        """Return the exception if some rows may not, or cannot, be estimated, and report these."""
        division = self._division
        table = self.table
        report = self._report
        misfit = self.checks.misfit
        if misfit is None and division.is_whole(table.num_answered):
            return None
        answered = table.answered.keys()
        if division.by_rows:
            last = dict[int, WorkerError]()
            for rejected in self.checks.rejected:
                last |= dict.fromkeys(table.parts[rejected.part].units, rejected)
            report.missing_rows = tuple(sorted(set(range(division.batch_size)) - answered))
            report.errors = {row: last[row] for row in report.missing_rows if row in last}
            report.module_failed_rows = tuple(sorted(table.refused.keys() - answered))
        required = waiting._least(division.needed, division.least, division.by_rows)
        if report.ended == "failed" and waiting.estimate and not division.by_rows:
            required = division.least  # no more could come
        enough = len(answered) >= required
        blamed = [part for unit, part in table.refused.items() if unit not in answered]
        if blamed and (waiting.on_error == "raise" or not enough):
            first = min(blamed, key=attrgetter("units")).error
            return self.failed(self._raised_by_module(first), division.needed, "")
        if not enough or misfit is not None:
            return self.failed(misfit, required, self.why)
        why = self._why_not_estimated()
        if not why:
            return None
        return self.failed(None, division.needed, why)

    def not_floating(self) -> str:
        """Return which output cannot be estimated, and a remedy; "" if all can."""
        for part in self.table.good[:1]:
            result = part.result
            for i in result.lists:
                kind = type(result.leaves[i]).__name__
                remedy = "take Waiting(estimate=False), or return tensors instead"
                return f"{result.name(i)} is a {kind} and cannot be estimated; {remedy}"
            for i in result.divided:
                leaf = result.leaves[i]
                if not leaf.dtype.is_floating_point:
                    remedy = "take Waiting(estimate=False), or return logits instead"
                    return f"{result.name(i)} is {leaf.dtype} and cannot be estimated; {remedy}"
        return ""

    def _why_not_estimated(self) -> str:
        """Return why rows without a result cannot be estimated; "" if they can, or all have one."""
        division = self._division
        why = self.not_floating()
        received = sorted(self.table.answered)
        left_out = division.left_out
        if left_out is not None and bool(division.spread(left_out)[received].all()):
            why = "no row with finite inputs has a result that is finite, which estimates need"
        if not why or division.is_whole(len(received)):
            return ""
        if division.by_rows or bool((division.plan.source(received) < 0).any()):
            return why
        return ""

    def failed(self, error: Exception | None, required: int = 0, why: str = "") -> Exception:
        """Return an exception with the report and the rows that were computed, NaN elsewhere.

        If ``error`` is None, the exception says that ``required`` results did not arrive, and
        ``why``.
        """
        division = self._division
        report = self._report
        if error is None:
            rejected = self.checks.rejected
            reasons = []
            if rejected:
                reasons = [str(rejected[0]).partition("\n")[0]]
            if division.by_rows:
                causes = defaultdict[str, list[int]](list)
                for row in report.missing_rows:
                    cause = str(report.errors.get(row, "")).partition("\n")[0] or "no reply"
                    causes[cause].append(row)
                reasons = [f"{_shown(rows)}: {cause}" for cause, rows in causes.items()]
            kind = DeadlineExceeded if report.ended == "deadline" else NotEnoughResults
            reason = "; ".join(filter(None, [why, *reasons]))
            error = kind([*self.table.answered], required, division.task.num_units, reason)
            error.__cause__ = next(iter([*report.errors.values(), *rejected]), None)
        facts: Any = error
        try:
            facts.report = report
            given_up = report.missing_rows if report.ended == "failed" else ()
            facts.rows = report.module_failed_rows or given_up
            facts.answers = None
            if division.by_rows and self.table.num_answered:
                facts.answers = self.checks.stack().whole(division.batch_size)
        except Exception:  # a class may refuse attributes, and memory may run out
            logger.warning(
                "CodedWrapper: computed answers could not be added to %r", error, exc_info=True
            )
        return error

    def _raised_by_module(self, error: WorkerError | None) -> Exception | None:
        """Return the exception that the module raised, with a note of the rows; None if it did not.

        Python 3.10 has no ``add_note``. The module may raise one exception again and again.
        """
        cause = error and error.__cause__
        if error is None or error.kind != "raised" or not isinstance(cause, Exception):
            return None
        if isinstance(cause, StopIteration):  # futures cannot hold it (PEP 479)
            stopped = cause
            cause = RuntimeError(f"the module raised {stopped!r}")
            cause.__cause__ = stopped
        rows = self._report.module_failed_rows
        notes = []
        if rows:
            notes = [f"{_NOTE} {_shown(rows)} of the batch; {error}"]
        with contextlib.suppress(Exception):  # a class may have slots
            old = [note for note in getattr(cause, "__notes__", ()) if not note.startswith(_NOTE)]
            cause.__notes__ = [*old, *notes]
        return cause


def _joined(checks: Callable[[], Checks | None]) -> Any:
    found = checks()
    return found and found.joined


def _copied(value: Any) -> Any:
    """Return an output in memory of its own."""
    if type(value) is Tensor:
        return value.clone()
    return pytree.tree_map_only(Tensor, Tensor.clone, value)


def _shown(rows: Sequence[int]) -> str:
    more = ""
    if len(rows) > _SHOWN:
        more = f" and {len(rows) - _SHOWN} more"
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_SHOWN]))}{more}"
