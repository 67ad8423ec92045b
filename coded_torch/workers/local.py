r"""Workers in this process, simulated on a virtual clock."""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import count, instance
from ..stragglers import Stragglers
from . import base
from .base import Began, Part, Reply, Request, Task, WorkerError, Workers

__all__ = ["LocalWorkers"]

# A time, an event, and the values of its ask.
_Event = tuple[float, Began | Reply, Callable[[], dict[int, Any]] | None]


class LocalWorkers(Workers):
    r"""Simulated workers: one for each part, all idle.

    Part n begins on worker n as soon as it is asked for, and takes as long as the law says. Times
    are on a virtual clock, which only :meth:`Request.wait` moves. The module itself takes no time.
    An exception of the module is raised to the caller, since all parts run the same code.

    If the first ask has n parts, each draw of the law is for n workers. Part p of the request takes
    entry p modulo n of draw p // n, whenever it is asked for.

    Args:
        stragglers: the law of the latencies. Defaults to None: all latencies are 0.
        max_batch_size: the largest number of rows in one call of the module, to bound memory.
            Defaults to None: all parts that are asked for together take one call.

    Note:
        The parts that are asked for together are one batch, in the order of their units. The
        batch is computed when the first of their replies is due. So the bits of the results depend
        on which parts reply, not on when. Parts that never reply are not computed.
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
        return f"LocalWorkers({self.stragglers!r}, max_batch_size={self.max_batch_size!r})"


class _LocalRequest(Request):
    """A request on a clock of its own."""

    def __init__(self, pool: LocalWorkers, module: nn.Module, task: Task) -> None:
        self._pool, self._module, self._task = pool, module, task
        self._clock = 0.0
        self._events: list[_Event] = []  # the next event is the last
        self._first = 0  # the number of parts of the first ask
        self._latencies: list[float] = []  # latencies by the number of the part
        self._closed = False

    def ask(self, parts: Sequence[Part]) -> None:
        if self._closed:
            raise RuntimeError("LocalWorkers: the request is closed")
        # The first ask says for how many workers the law draws.
        law, self._first = self._pool.stragglers, self._first or len(parts)
        last = max((part.number for part in parts), default=-1)
        while len(self._latencies) <= last:
            drawn = [0.0] * self._first if law is None else law.sample(self._first).tolist()
            self._latencies += drawn
        now, events = self._clock, self._events[::-1]
        computed: list[Part] = []
        values = functools.cache(lambda: self._compute(computed))  # called when the first is needed
        replies: list[_Event] = []
        for part in parts:
            number, fault = part.number, part.fault
            if number in part.avoid:
                why = "did not start: it avoids all workers that are left"
                error = WorkerError(number, -1, why)
                events.append((now, Reply(part, -1, now, math.inf, error=error), None))
                continue
            events.append((now, Began(part, number, now), None))
            latency = self._latencies[number] + (0.0 if fault is None else fault.delay)
            if latency == math.inf:
                continue
            reply = Reply(part, number, now + latency, latency)
            if fault is not None and fault.kind == "crash":
                reply.error = WorkerError(number, number, "died of an injected crash", "died")
            else:
                computed.append(part)
            replies.append((reply.at, reply, values))
        # Sorting keeps the order of asking, and takes linear time if all parts take as long.
        self._events = sorted(events + replies, key=operator.itemgetter(0))[::-1]

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        bound = until if until > self._clock else self._clock
        if self._events and self._events[-1][0] <= bound:
            self._clock, event, values = self._events.pop()
            if values is not None and isinstance(event, Reply) and event.error is None:
                value, fault = values().pop(event.part.number), event.part.fault
                event.value = value if fault is None else fault.spoil(value)
            return event
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

    def _compute(self, parts: list[Part]) -> dict[int, Any]:
        """Return the values of parts that are asked for together, by number."""
        parts.sort(key=operator.attrgetter("units"))
        units = [unit for part in parts for unit in part.units]
        try:
            payloads = self._task.payloads(units, self._pool.max_batch_size, copied=True)
            outputs = [self._module(*args, **kwargs) for args, kwargs in payloads]
        except Exception as error:
            if sys.version_info >= (3, 11):
                rows = f"units {units}, {self._task.unit_rows} rows each"
                error.add_note(f"LocalWorkers: raised by the module on {rows}")
            raise
        values = cut(self._task, outputs, [len(part.units) for part in parts])
        return {part.number: value for part, value in zip(parts, values, strict=True)}


def cut(task: Task, outputs: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """Cut the outputs for the batches of :meth:`Task.payloads` into parts of ``counts`` units.

    Raises a ValueError if they differ in structure, kind or a constant, or lack rows.
    """
    flat, specs = zip(*map(base.flatten, outputs), strict=True)
    if any(spec != specs[0] for spec in specs):
        got = " and ".join(sorted(set(map(str, specs))))
        must = "the module must return the same structure for every batch"
        raise ValueError(f"Task: {must}, got {got}")
    sizes = [count * task.unit_rows for count in counts]
    columns: list[Sequence[Any]] = []
    for i, dim in enumerate(base.broadcast_dims("out_dims", task.out_dims, specs[0])):
        pieces = [leaves[i] for leaves in flat]
        if dim is not None and any(base.kind(piece) != base.kind(pieces[0]) for piece in pieces):
            name = base.leaf_name("output", outputs[0], i)
            got = " and ".join(sorted({base.show(piece) for piece in pieces}))
            must = "must be the same for every batch, or a tensor of one dtype"
            raise ValueError(f"CodedWrapper: {name} {must}, got {got}")
        if dim is None or not isinstance(pieces[0], Tensor):
            columns.append(pieces[:1] * len(counts))
            continue
        base.check_batch(outputs[0], i, pieces[0], dim)
        leaf = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        base.check_batch(outputs[0], i, leaf, dim, sum(sizes))
        columns.append(leaf.split(sizes, dim))
    return [base.unflatten([column[n] for column in columns], specs[0]) for n in range(len(counts))]
