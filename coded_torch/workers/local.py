r"""Workers in this process, simulated on a virtual clock."""

import functools
import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import instance
from .._torch import broadcast_dims, check_batch, flatten, unflatten
from ..stragglers import Stragglers
from ..table import Began, Part, Reply, WorkerError
from .base import Request, Task, Workers

# A time, an event, and the values of its ask.
_Event = tuple[float, Began | Reply, Callable[[], dict[int, Any]] | None]


class LocalWorkers(Workers):
    r"""Simulated workers: one for each part, all idle.

    Part n begins on worker n as soon as it is asked for, and takes as long as its delay says. Times
    are on a virtual clock, which only :meth:`Request.wait` moves. The module itself takes no time.
    An exception of the module is raised to the caller, since all parts run the same code.

    If the first ask has n parts, each draw of delays is for n workers. Part p of the request takes
    entry p modulo n of draw p // n, whenever it is asked for. Without a deadline, a part that never
    replies is hedged only where earlier calls tell how long parts take.

    Args:
        stragglers: the delay distribution. Defaults to None: all latencies are 0.

    Note:
        The parts that are asked for together are one batch, in the order of their units, and take
        one call of the module, when the first of their replies is due. So the bits of the results
        depend on which parts reply, not on when. Parts that never reply are not computed.
    """

    simulated = True

    def __init__(self, stragglers: Stragglers | None = None) -> None:
        instance(self, "stragglers", stragglers, Stragglers, optional=True)
        self.stragglers = stragglers

    def open(self, module: nn.Module, task: Task) -> Request:
        return _LocalRequest(self, module, task)


class _LocalRequest(Request):
    def __init__(self, pool: LocalWorkers, module: nn.Module, task: Task) -> None:
        self._pool = pool
        self._module = module
        self._task = task
        self._clock = 0.0
        self._events: list[_Event] = []  # the next event is the last
        self._first = 0  # the number of parts of the first ask
        self._latencies: list[float] = []  # latencies by the number of the part
        self._closed = False

    def ask(self, parts: Sequence[Part]) -> None:
        if self._closed:
            raise RuntimeError("LocalWorkers: the request is closed")
        # The first ask says for how many workers delays are drawn.
        delays = self._pool.stragglers
        self._first = self._first or len(parts)
        last = max((part.number for part in parts), default=-1)
        while len(self._latencies) <= last:
            drawn = [0.0] * self._first if delays is None else delays.sample(self._first).tolist()
            self._latencies += drawn
        now = self._clock
        events = self._events[::-1]
        computed: list[Part] = []
        values = functools.cache(lambda: self._compute(computed))  # called when the first is needed
        replies: list[_Event] = []
        for part in parts:
            number = part.number
            fault = part.fault
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
                value = values().pop(event.part.number)
                fault = event.part.fault
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
        args, kwargs = self._task.payload(units, copied=True)
        values = cut(self._task, self._module(*args, **kwargs), [len(part.units) for part in parts])
        return {part.number: value for part, value in zip(parts, values, strict=True)}


def cut(task: Task, output: Any, counts: Sequence[int]) -> list[Any]:
    """Cut an output into parts of ``counts`` units; a ValueError if a divided leaf lacks rows."""
    sizes = [count * task.unit_rows for count in counts]
    leaves, spec = task.layout.flatten(output) if task.layout else flatten(output)
    constants = task.layout.constants if task.layout and spec == task.layout.spec else ()
    dims = broadcast_dims("out_dims", task.out_dims, spec)
    columns: list[Sequence[Any]] = []
    for i, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is not None and task.layout and task.layout.lists and isinstance(leaf, list | tuple):
            ends = itertools.accumulate(sizes)
            columns.append([leaf[end - n : end] for n, end in zip(sizes, ends, strict=True)])
            continue
        is_dense = isinstance(leaf, Tensor) and leaf.layout is torch.strided
        if dim is None or not is_dense or i in constants:
            columns.append([leaf] * len(counts))
        else:
            check_batch(output, i, leaf, dim, sum(sizes))
            columns.append(leaf.split(sizes, dim))
    if spec.is_leaf():
        return list(columns[0])
    return [unflatten([column[n] for column in columns], spec) for n in range(len(counts))]
