r"""Workers in this process, simulated on a virtual clock."""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .._arguments import count, instance
from ..stragglers import Stragglers
from .base import Began, Part, Reply, Request, WorkerError, Workers
from .task import Task

__all__ = ["LocalWorkers"]


class LocalWorkers(Workers):
    r"""Simulated workers: one for each part, all idle.

    Part n begins on worker n as soon as it is asked for, and takes as long as the law says. Times
    are on a virtual clock, which only :meth:`Request.wait` moves; the module itself takes none. An
    exception of the module is raised to the caller, since all parts run the same code.

    The first ask, of n parts, takes one draw of the law for n workers. Part p of the request takes
    entry p modulo n of draw p // n, whenever it is asked for.

    Args:
        stragglers: the law of the latencies. Defaults to None, no latencies.
        max_batch_size: the most rows in one call of the module, to bound memory. Defaults to None,
            one call.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``max_batch_size`` is less than 1.

    Note:
        The parts that are asked for together are computed together, in one batch in the order of
        their units, when the first of their replies is due. So the bits of the results depend on
        which parts reply, not on when. Parts that never reply are not computed.

    Example:
        >>> from coded_torch.workers import LocalWorkers
        >>> LocalWorkers(max_batch_size=256)
        LocalWorkers(stragglers=None, max_batch_size=256)
    """

    simulated = True

    def __init__(
        self, stragglers: Stragglers | None = None, *, max_batch_size: int | None = None
    ) -> None:
        instance(self, "stragglers", stragglers, Stragglers, optional=True)
        if max_batch_size is not None:
            max_batch_size = count(self, "max_batch_size", max_batch_size)
        self.stragglers = stragglers
        self.max_batch_size = max_batch_size

    def open(self, module: nn.Module, task: Task) -> Request:
        return _LocalRequest(self, module, task)

    def __repr__(self) -> str:
        return (
            f"LocalWorkers(stragglers={self.stragglers!r}, max_batch_size={self.max_batch_size!r})"
        )


class _LocalRequest(Request):
    """A request on a clock of its own."""

    def __init__(self, pool: LocalWorkers, module: nn.Module, task: Task) -> None:
        self._pool, self._module, self._task = pool, module, task
        self._clock = 0.0
        # The time and order of an event, its part, and the batch of a reply.
        self._events: list[tuple[float, int, Part, _Batch | None]] = []
        self._order = itertools.count()
        self._first = 0  # the number of parts of the first ask
        self._latencies: list[float] = []  # by the number of the part
        self._closed = False

    def ask(self, parts: Sequence[Part]) -> None:
        if self._closed:
            raise RuntimeError("LocalWorkers: the request is closed")
        self._first = self._first or len(parts)
        ends = [self._clock + self._latency(part) for part in parts]
        finite = [(end, part) for end, part in zip(ends, parts, strict=True) if end < math.inf]
        batch = _Batch(self._module, self._task, [part for _, part in finite])
        self._events += [
            (self._clock, next(self._order), part, None) for part in parts if not _stuck(part)
        ]
        self._events += [(end, next(self._order), part, batch) for end, part in finite]
        heapq.heapify(self._events)  # in no time, if all take as long

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        bound = until if until > self._clock else self._clock
        if self._events and self._events[0][0] <= bound:
            self._clock, _, part, batch = heapq.heappop(self._events)
            if batch is None:
                return Began(part, part.number, self._clock)
            if _stuck(part):
                reason = "did not start: it avoids all workers that are left"
                error = WorkerError(part.number, -1, reason)
                return Reply(part, -1, self._clock, math.inf, None, error)
            value, failed = batch.reply(part, self._pool.max_batch_size)
            return Reply(part, part.number, self._clock, self._latency(part), value, failed)
        if bound < math.inf:
            self._clock = bound
        return None

    def drop(self, parts: Iterable[Part]) -> None:
        """Do nothing: all parts begin when they are asked for."""

    def now(self) -> float:
        return self._clock

    @property
    def idle(self) -> int:
        return sys.maxsize

    def close(self) -> None:
        self._closed = True
        self._events.clear()

    def _latency(self, part: Part) -> float:
        law, drawn = self._pool.stragglers, self._latencies
        while law is not None and len(drawn) <= part.number:
            drawn += law.sample(self._first).tolist()
        if _stuck(part):
            return 0.0
        latency = 0.0 if law is None else drawn[part.number]
        return latency if part.fault is None else latency + part.fault.delay


def _stuck(part: Part) -> bool:
    """Return whether a part must avoid the worker that it would have."""
    return part.number in part.avoid


class _Batch:
    """Parts that are computed together, when the first of their values is needed."""

    def __init__(self, module: nn.Module, task: Task, parts: Sequence[Part]) -> None:
        self._module, self._task = module, task
        self._parts = sorted(
            (
                part
                for part in parts
                if not (_stuck(part) or (part.fault is not None and part.fault.kind == "crash"))
            ),
            key=lambda part: part.units,
        )
        self._values: dict[int, Any] | None = None

    def reply(self, part: Part, max_rows: int | None) -> tuple[Any, WorkerError | None]:
        """Return the value of a part, which is released here, or its error."""
        if part.fault is not None and part.fault.kind == "crash":
            return None, WorkerError(part.number, part.number, "died of an injected crash", "died")
        if self._values is None:
            self._values = self._compute(max_rows)
        value = self._values.pop(part.number)
        return (value if part.fault is None else part.fault.spoil(value)), None

    def _compute(self, max_rows: int | None) -> dict[int, Any]:
        units = [unit for part in self._parts for unit in part.units]
        try:
            outputs = [self._module(*a, **k) for a, k in self._task.payloads(units, max_rows)]
        except Exception as error:
            if sys.version_info >= (3, 11):
                error.add_note(
                    f"LocalWorkers: raised by the module on units {units}, "
                    f"{self._task.unit_rows} rows each"
                )
            raise
        values = self._task.cut(outputs, [len(part.units) for part in self._parts])
        return {part.number: value for part, value in zip(self._parts, values, strict=True)}
