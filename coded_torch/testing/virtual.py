"""A pool of workers on a virtual clock, whose every act is a script."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..table import Began, Part, Reply, WorkerError
from ..workers.base import Request, Task, Workers

#: An act of a worker with one part, and its seconds, which may be infinite: "ok" returns the
#: module's result, and "twice" returns it twice; "die" ends the worker; "nan", "rows" and "lie"
#: return values that are not finite, that lack a row, and that are wrong. A callable returns what
#: the worker makes of the module's result.
Act = tuple[str | Callable[[Tensor], Tensor], float]


class _Worker:
    def __init__(self, place: int, script: Iterable[Act]) -> None:
        self.place = place
        acts = list(script)
        #: The acts with the parts to come; the last one is repeated.
        self.acts: Iterator[Act] = itertools.chain(acts, itertools.repeat(acts[-1]))
        self.free_at = 0.0  # the time from which it takes a part
        self.fresh, self.excluded, self.drained = True, False, False

    def takes(self, part: Part, now: float, avoid: frozenset[int]) -> bool:
        able = not (self.excluded or self.drained) and self.free_at <= now
        return able and self.place not in avoid


class VirtualWorkers(Workers):
    """Workers that follow scripts, on one clock for all calls, which only waiting moves.

    A worker that died is there again, without the module, after a second.

    Args:
        scripts: for each worker its acts with one part after the other; the last one is repeated.
        drains: times and places of workers that leave, on the clock of the pool.
        kills: returns whether inputs end the worker that gets them. Defaults to none.

    Attributes:
        clock: seconds since the pool was made.
        begun: the begins: the time, the worker and the part of each.
    """

    simulated = True

    def __init__(
        self,
        scripts: Sequence[Sequence[Act]],
        drains: Sequence[tuple[float, int]] = (),
        kills: Callable[..., bool] = lambda *inputs: False,
    ) -> None:
        self.num_workers, self.kills = len(scripts), kills
        self.drains = sorted(drains)
        self.clock = 0.0
        self.begun: list[tuple[float, int, Part]] = []
        self._scripts = scripts
        self._workers = [_Worker(place, script) for place, script in enumerate(scripts)]

    def __reduce__(self) -> tuple[Any, ...]:  # a copy begins anew, as that of every pool
        return type(self), (self._scripts, self.drains, self.kills)

    def open(self, module: nn.Module, task: Task) -> Request:
        return _VirtualRequest(self, module, task)

    @property
    def states(self) -> dict[int, tuple[str, int]]:
        return {w.place: ("excluded" if w.excluded else "idle", 0) for w in self._workers}

    def exclude(self, worker: int) -> None:
        self._workers[worker].excluded = True

    def restart(self, worker: int) -> None:
        self._workers[worker].excluded, self._workers[worker].fresh = False, True

    def at(self, now: float) -> list[_Worker]:
        """Return the workers as they are at a time, with those that were drained by then."""
        for time, place in self.drains:
            if time <= now and place < len(self._workers):
                self._workers[place].drained = True
        return self._workers


class _VirtualRequest(Request):
    def __init__(self, pool: VirtualWorkers, module: nn.Module, task: Task) -> None:
        self._pool, self._module, self._task = pool, module, task
        self._opened = pool.clock
        self._queue: deque[Part] = deque()
        self._coming: list[tuple[float, int, Reply]] = []  # ends by time, in the order of begins
        self._events: deque[Began | Reply] = deque()
        self._count = itertools.count()

    def ask(self, parts: Sequence[Part]) -> None:
        self._queue.extend(parts)
        self._assign()

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        pool, end = self._pool, self._opened + until
        self._assign()
        while not self._events:
            # A part ends or, while parts wait, a worker is free again or leaves.
            times = [worker.free_at for worker in pool.at(pool.clock) if not worker.drained]
            times = [*times, *(time for time, _ in pool.drains)] if self._queue else []
            at = min((time for time in times if time > pool.clock), default=math.inf)
            at = min(at, self._coming[0][0]) if self._coming else at
            if at == math.inf or at > end:
                pool.clock = max(pool.clock, end) if end < math.inf else pool.clock
                return None
            pool.clock = max(pool.clock, at)
            while self._coming and self._coming[0][0] <= pool.clock:
                self._events.append(heapq.heappop(self._coming)[2])
            self._assign()
        return self._events.popleft()

    def drop(self, parts: Iterable[Part]) -> None:
        unwanted = {part.number for part in parts}
        self._queue = deque(part for part in self._queue if part.number not in unwanted)

    def now(self) -> float:
        return self._pool.clock - self._opened

    @property
    def idle(self) -> int:
        now = self._pool.clock
        return sum(w.takes(Part(0, (0,)), now, frozenset()) for w in self._pool.at(now))

    def close(self) -> None:
        self._queue.clear()
        self._events.clear()
        self._coming.clear()

    def _assign(self) -> None:
        """Give waiting parts to idle workers, in the order of asking."""
        pool, waiting = self._pool, list(self._queue)
        workers = pool.at(pool.clock)
        for part in waiting:
            able = [w for w in workers if w.takes(part, pool.clock, part.avoid)]
            others = {w.place for w in workers if not (w.drained or w.excluded)} - part.avoid
            preferred = [w for w in able if w.place not in part.tried]
            if not others:
                why = "did not start: it avoids all workers that are left"
                error = WorkerError(part.number, -1, why)
                self._events.append(Reply(part, -1, self.now(), math.inf, error=error))
            elif preferred or (able and others <= part.tried):
                self._begin((preferred or able)[0], part)
            else:
                continue
            self._queue.remove(part)

    def _begin(self, worker: _Worker, part: Part) -> None:
        pool, now = self._pool, self.now()
        act, seconds = next(worker.acts)
        fresh, worker.fresh = worker.fresh, False
        pool.begun.append((pool.clock, worker.place, part))
        part = dataclasses.replace(part)  # a pool may report copies
        self._events.append(Began(part, worker.place, now, fresh))
        worker.free_at = end = pool.clock + seconds
        if end == math.inf:
            return
        reply = Reply(part, worker.place, now + seconds, seconds)
        args, kwargs = self._task.payload(part.units, copied=True)
        if act == "die" or pool.kills(*args):
            reply.error = WorkerError(part.number, worker.place, "was lost", "died")
            worker.free_at, worker.fresh = end + 1.0, True
        else:
            try:
                value = self._module(*args, **kwargs)
                spoil = _SPOILS.get(act, lambda x: x) if isinstance(act, str) else act
                reply.value = pytree.tree_map_only(Tensor, spoil, value)
            except Exception as cause:
                reply.error = WorkerError(
                    part.number, worker.place, f"failed: {cause!r}", "raised", cause
                )
        heapq.heappush(self._coming, (end, next(self._count), reply))
        if act == "twice" and reply.error is None:
            again = Reply(part, worker.place, now + seconds, seconds, reply.value)
            heapq.heappush(self._coming, (end, next(self._count), again))


_SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda x: torch.full_like(x, math.nan) if x.dtype.is_floating_point else x,
    "rows": lambda x: x[1:],
    "lie": lambda x: x + 1,
}
