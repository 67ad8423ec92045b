r"""Workers on a virtual clock: the queue of all such pools, and workers in this process."""

import heapq
import itertools
import math
import operator
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import instance
from .._table import OPEN, Began, Part, Reply, WorkerError
from .._torch import broadcast_dims, check_batch, flatten, unflatten
from ..stragglers import Stragglers
from ._base import Request, Task, Workers


class VirtualPool:
    """Workers on a virtual clock, which take the parts of all requests from one queue.

    A subclass says in :meth:`begin` what a worker does with a part. An idle worker takes the first
    part that is open and need not avoid it. A part that failed on some workers waits for another.
    """

    def __init__(self, num_workers: int = 0) -> None:
        self.clock = 0.0  #: seconds, which only events move
        self.up = set(range(num_workers))  #: the places of workers that take parts
        self.idle = deque(range(num_workers))  #: of them, in the order in which they became idle
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._waiting = deque[tuple[Any, Part]]()

    def begin(self, worker: int, request: Any, part: Part) -> None:
        """Begin a part of a request on an idle worker, and plan its end with :meth:`at`."""
        raise NotImplementedError

    def at(self, time: float, do: Callable[..., None], *what: Any) -> None:
        """Plan an event. Of events at one time, the one that was planned first comes first."""
        heapq.heappush(self._events, (time, next(self._order), do, what))

    def ask(self, request: Any, parts: Iterable[Part]) -> None:
        """Let parts wait for workers. Events are given to the request's ``hear``."""
        self._waiting.extend([(request, part) for part in parts])

    def num_idle(self) -> int:
        """Return the number of workers that would begin a part at once."""
        return max(0, len(self.idle) - len(self._waiting))

    def go_on(self, until: float = math.inf) -> bool:
        """Have the next event happen, and parts begin. Return False if there is none by a time."""
        if not self._events or self._events[0][0] > max(until, self.clock):
            if until < math.inf:
                self.clock = max(until, self.clock)
            return False
        self.clock, _, do, what = heapq.heappop(self._events)
        do(*what)
        if self._waiting:
            self.assign()
        return True

    def assign(self) -> None:
        """Have idle workers begin parts."""
        passed = []
        while self._waiting and (self.idle or not self.up):
            request, part = entry = self._waiting.popleft()
            if request.closed or part.outcome is not OPEN:
                continue
            barred = part.avoid | part.tried
            if self.up <= barred:  # no other worker is up
                barred = part.avoid
            worker = next((worker for worker in self.idle if worker not in barred), None)
            if worker is not None:
                self.idle.remove(worker)
                self.begin(worker, request, part)
            elif self.up <= barred:
                request.hear(_avoiding(part, self.clock))
            else:
                passed.append(entry)
        self._waiting.extendleft(reversed(passed))


def _avoiding(part: Part, at: float) -> Reply:
    why = "did not start: it avoids all workers that are left"
    return Reply(part, -1, at, math.inf, error=WorkerError(part.number, -1, why))


class VirtualRequest(Request):
    """A task that is open at a virtual pool."""

    def __init__(self, pool: VirtualPool, module: nn.Module, task: Task) -> None:
        self.module: Any = module
        self.task: Any = task
        self.closed = False
        self._pool = pool
        self._opened = pool.clock
        self._events = deque[Began | Reply]()

    def ask(self, parts: Sequence[Part]) -> None:
        if self.closed:
            raise RuntimeError("LocalWorkers: the request is closed")
        self._pool.ask(self, parts)
        self._pool.assign()

    def hear(self, *events: Began | Reply) -> None:
        """Take events of the pool."""
        self._events += events

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        end = self._opened + until
        while not self._events:
            if not self._pool.go_on(end):
                return None
        return self._events.popleft()

    def drop(self, parts: Iterable[Part]) -> None:
        """Do nothing: the pool begins no part whose outcome is not open."""

    def now(self) -> float:
        return self._pool.clock - self._opened

    @property
    def idle(self) -> int:
        return self._pool.num_idle()

    def close(self) -> None:
        self.closed = True
        self.module = None  # the pool may hold the request until its workers have ended their parts
        self.task = None
        self._events.clear()


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
        return VirtualRequest(_EachItsOwn(self.stragglers), module, task)


class _EachItsOwn(VirtualPool):
    """The workers of one request to :class:`LocalWorkers`."""

    def __init__(self, stragglers: Stragglers | None) -> None:
        super().__init__()
        self._stragglers = stragglers
        self._first = 0  # the number of parts of the first ask
        self._latencies: list[float] = []  # latencies by the number of the part

    def num_idle(self) -> int:
        return sys.maxsize

    def ask(self, request: VirtualRequest, parts: Iterable[Part]) -> None:
        """Begin parts at once, each on its own worker, and plan their ends."""
        # The first ask says for how many workers delays are drawn.
        parts = list(parts)
        delays = self._stragglers
        self._first = self._first or len(parts)
        last = max((part.number for part in parts), default=-1)
        while len(self._latencies) <= last:
            drawn = [0.0] * self._first if delays is None else delays.sample(self._first).tolist()
            self._latencies += drawn
        now = self.clock
        computed: list[Part] = []
        values: dict[int, Any] = {}  # of these parts, once the first is needed
        begins = list[Began | Reply]()
        ends = defaultdict[float, list[Reply]](list)
        for part in parts:
            number = part.number
            fault = part.fault
            if number in part.avoid:
                begins.append(_avoiding(part, now))
                continue
            begins.append(Began(part, number, now))
            latency = self._latencies[number] + (0.0 if fault is None else fault.delay)
            if latency == math.inf:
                continue
            reply = Reply(part, number, now + latency, latency)
            if fault is not None and fault.kind == "crash":
                reply.error = WorkerError(number, number, "died of an injected crash", "died")
            else:
                computed.append(part)
            ends[reply.at].append(reply)
        self.at(now, request.hear, *begins)
        for at, replies in ends.items():
            self.at(at, self._end, request, replies, computed, values)

    def _end(
        self,
        request: VirtualRequest,
        replies: Sequence[Reply],
        computed: list[Part],
        values: dict[int, Any],
    ) -> None:
        """End parts that are due together, and compute all of one ask if they are the first."""
        for reply in replies:
            if reply.error is None:
                if not values:
                    values.update(_compute(request.module, request.task, computed))
                value = values.pop(reply.part.number)
                fault = reply.part.fault
                reply.value = value if fault is None else fault.spoil(value)
        request.hear(*replies)


def _compute(module: nn.Module, task: Task, parts: list[Part]) -> dict[int, Any]:
    """Return the values of parts that are asked for together, by number."""
    parts.sort(key=operator.attrgetter("units"))
    units = [unit for part in parts for unit in part.units]
    args, kwargs = task.payload(units, copied=True)
    output = module(*args, **kwargs)
    if len(parts) > 1 and task.layout is not None and task.layout.differs(output):
        # Only parts that are computed alone tell whether a leaf is the same in all of them.
        task.layout.is_doubted = True
        values = list[Any]()
        for part in parts:
            args, kwargs = task.payload(part.units, copied=True)
            values.append(module(*args, **kwargs))
    else:
        values = cut(task, output, [len(part.units) for part in parts])
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
        is_tensor = isinstance(leaf, Tensor)
        is_dense = is_tensor and leaf.layout is torch.strided and not leaf.is_nested
        if dim is None or not is_dense or i in constants:
            columns.append([leaf] * len(counts))
        else:
            check_batch(output, i, leaf, dim, sum(sizes))
            columns.append(leaf.split(sizes, dim))
    if spec.is_leaf():
        return list(columns[0])
    return [unflatten([column[n] for column in columns], spec) for n in range(len(counts))]
