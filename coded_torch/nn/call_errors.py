"""The exceptions that a call raises instead of answering, and the answers that they hold."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..codes.plans import DeadlineExceeded, NotEnoughResults
from ..scheduling.waiting import Waiting
from ..workers.base import WorkerError
from ..workers.pytrees import unflatten
from .division import Division
from .execute import Executed
from .report import Report
from .result_checks import Results

__all__ = ["error_of", "holding"]

_NOTE = "raised by the module on"


def error_of(
    waiting: Waiting, division: Division, results: Results, report: Report, executed: Executed
) -> Exception | None:
    """Return what to raise if some rows may not, or cannot, be predicted; None if all may.

    The report says which rows are missing, and why.
    """
    errors = {error.part: error for error in results.rejected}
    if division.by_rows:
        _note_rows(division, results, report, executed, errors)
    enough = len(results.units) >= _required(waiting, division, report)
    blamed = [errors[number] for number in executed.refused if number in errors]
    error: Exception
    if blamed and (waiting.on_error == "raise" or not enough):
        error = _of_module(division, results, report, executed, blamed)
    elif enough:
        why = _unpredictable(division, results)
        if not why:
            return None
        error = _too_few(Waiting(predict=False), division, results, report, why)
    else:
        error = results.misfit or _too_few(waiting, division, results, report, executed.why)
    return holding(error, division, results, report)


def _required(waiting: Waiting, division: Division, report: Report) -> int:
    """Return how many results the others may be predicted from."""
    if not waiting.predict:
        return division.needed
    if waiting.at_once or (report.ended == "failed" and not division.by_rows):  # no more could come
        return division.least
    return max(division.least, -(-division.needed // 2))


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


def _note_rows(
    division: Division,
    results: Results,
    report: Report,
    executed: Executed,
    errors: dict[int, WorkerError],
) -> None:
    good = results.units
    last: dict[int, WorkerError] = {}
    refused: set[int] = set()
    for part in executed.parts:
        if part.number in errors:
            last |= dict.fromkeys(part.units, errors[part.number])
        if part.number in executed.refused:
            refused |= set(part.units) - good
    report.missing_rows = tuple(sorted(set(range(division.batch_size)) - good))
    report.errors = {row: last[row] for row in report.missing_rows if row in last}
    report.refused = tuple(sorted(refused))


def _of_module(
    division: Division,
    results: Results,
    report: Report,
    executed: Executed,
    blamed: Sequence[WorkerError],
) -> Exception:
    """Return the exception of the module for the first row that it fails on."""
    first = min(blamed, key=lambda error: executed.parts[error.part].units)
    cause = first.__cause__
    if first.kind != "raised" or not isinstance(cause, Exception):
        return _too_few(Waiting(predict=False), division, results, report, "")
    if isinstance(cause, StopIteration):  # futures cannot hold it (PEP 479)
        cause, stopped = RuntimeError(f"the module raised {cause!r}"), cause
        cause.__cause__ = stopped
    if report.refused:
        note = f"{_NOTE} {_shown(report.refused)} of the batch; {first}"
        with contextlib.suppress(Exception):  # a class may have slots, or refuse attributes
            # What add_note does, which Python 3.10 does not have. The module may raise one object
            # again and again.
            others = [n for n in getattr(cause, "__notes__", ()) if not n.startswith(_NOTE)]
            cause.__notes__ = [*others, note]
            cause.rows = report.refused  # type: ignore[attr-defined]
    return cause


def _too_few(
    waiting: Waiting, division: Division, results: Results, report: Report, why: str
) -> NotEnoughResults:
    kind = DeadlineExceeded if report.ended == "deadline" else NotEnoughResults
    rejected = results.rejected
    if division.by_rows:
        received, total = sorted(results.units), division.batch_size
        causes: dict[str, list[int]] = {}
        for row in report.missing_rows:
            cause = str(report.errors.get(row, "")).partition("\n")[0] or "no reply"
            causes.setdefault(cause, []).append(row)
        reasons = [f"{_shown(rows)}: {cause}" for cause, rows in causes.items()]
    else:
        total = len(division.first)
        numbers = (result.part.number for result in results.good)
        received = [number for number in numbers if number < total]
        reasons = [str(rejected[0]).partition("\n")[0]] if rejected else []
    required = _required(waiting, division, report)
    error = kind(received, required, total, "; ".join([*reasons, *([why] if why else [])]))
    error.__cause__ = report.errors[min(report.errors)] if report.errors else None
    if error.__cause__ is None and rejected:
        error.__cause__ = rejected[0]
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
    with contextlib.suppress(Exception):  # as above
        error.report = report  # type: ignore[attr-defined]
        error.answers = _computed(division, results)  # type: ignore[attr-defined]
    return error


def _computed(division: Division, results: Results) -> Any:
    """Return the rows that were computed, in the structure of the answers, NaN elsewhere."""
    if not (division.by_rows and results.good):
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
