"""A pool of workers on a virtual clock, whose every act is a script."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._table import Began, Part, Reply, WorkerError
from ..workers._base import Request, Task, Workers
from ..workers._local import VirtualPool, VirtualRequest

#: An act of a worker with one part, and its seconds, which may be infinite: "ok" returns the
#: module's result, and "twice" returns it twice; "die" ends the worker; "nan", "rows" and "lie"
#: return values that are not finite, that lack a row, and that are wrong. A callable returns what
#: the worker makes of the module's result.
Act = tuple[str | Callable[[Tensor], Tensor], float]


class VirtualWorkers(VirtualPool, Workers):
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
        super().__init__(len(scripts))
        self.num_workers = len(scripts)
        self.kills = kills
        self.drains = sorted(drains)
        self.begun: list[tuple[float, int, Part]] = []
        self._scripts = scripts
        self._acts = [itertools.chain(acts, itertools.repeat(acts[-1])) for acts in scripts]
        self._fresh = set(self.up)
        self._busy = set[int]()
        for time, place in self.drains:
            self.at(time, self.exclude, place)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy begins anew, as that of every pool
        return type(self), (self._scripts, self.drains, self.kills)

    def open(self, module: nn.Module, task: Task) -> Request:
        return VirtualRequest(self, module, task)

    @property
    def states(self) -> dict[int, tuple[str, int]]:
        places = range(len(self._scripts))
        return {place: ("idle" if place in self.up else "excluded", 0) for place in places}

    def exclude(self, worker: int) -> None:
        self.up.discard(worker)
        if worker in self.idle:
            self.idle.remove(worker)
        self.assign()

    def restart(self, worker: int) -> None:
        self._fresh.add(worker)
        self.up.add(worker)
        if worker not in self._busy:
            self.free(worker)
        self.assign()

    def free(self, worker: int) -> None:
        """Let a worker be idle, whatever it was doing."""
        self._busy.discard(worker)
        if worker in self.up and worker not in self.idle:
            self.idle = deque(sorted([*self.idle, worker]))  # as scripts expect it

    def begin(self, worker: int, request: Any, part: Part) -> None:
        act, seconds = next(self._acts[worker])
        is_fresh = worker in self._fresh
        self._fresh.discard(worker)
        self._busy.add(worker)
        self.begun.append((self.clock, worker, part))
        part = dataclasses.replace(part)  # a pool may report copies
        now = request.now()
        request.hear(Began(part, worker, now, is_fresh))
        end = self.clock + seconds
        if end == math.inf:
            return
        reply = Reply(part, worker, now + seconds, seconds)
        args, kwargs = request.task.payload(part.units, copied=True)
        if act == "die" or self.kills(*args):
            reply.error = WorkerError(part.number, worker, "was lost", "died")
            self._fresh.add(worker)
            self.at(end, request.hear, reply)
            self.at(end + 1.0, self.free, worker)
            return
        try:
            value = request.module(*args, **kwargs)
            spoil = _SPOILS.get(act, lambda x: x) if isinstance(act, str) else act
            reply.value = pytree.tree_map_only(Tensor, spoil, value)
        except Exception as cause:
            why = f"failed: {cause!r}"
            reply.error = WorkerError(part.number, worker, why, "raised", cause)
        again = act == "twice" and reply.error is None
        self.at(end, self._end, request, [reply, dataclasses.replace(reply)][: 1 + again])

    def _end(self, request: Any, replies: Sequence[Reply]) -> None:
        self.free(replies[0].worker)
        for reply in replies:
            request.hear(reply)


_SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda x: torch.full_like(x, math.nan) if x.dtype.is_floating_point else x,
    "rows": lambda x: x[1:],
    "lie": lambda x: x + 1,
}
