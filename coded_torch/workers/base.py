r"""The contract of all pools: workers compute parts of a task, each on one worker."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Collection, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .task import Arguments, Task

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..stragglers import Stragglers
    from .faults import Fault

__all__ = ["Began", "Part", "Reply", "Request", "Task", "WorkerError", "Workers"]


class WorkerError(RuntimeError):
    """The reason why a part has no value. If the module raised, its exception is the cause.

    Attributes:
        part: the number of the part.
        worker: the place of the worker that had the part, or -1 if no worker had it.
        reason: the event, in words that continue "worker 3" or "part 3".
        kind: "raised" if the module, its arguments or its result raised; "died" if the worker ended
            while it computed; "" for anything else.
    """

    def __init__(self, part: int, worker: int, reason: str, kind: str = "") -> None:
        self.part, self.worker, self.reason, self.kind = part, worker, reason, kind
        super().__init__(f"part {part} {reason}" if worker < 0 else f"worker {worker} {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.part, self.worker, self.reason, self.kind)


@dataclasses.dataclass(frozen=True)
class Part:
    """The units of a task that one worker is asked for. Comparisons ignore ``fault``, ``avoid``."""

    number: int  #: 0, 1, 2, ... within the request, in the order of asking
    units: tuple[int, ...]  #: at least one, increasing
    fault: Fault | None = dataclasses.field(default=None, compare=False)  #: an injected fault
    #: The places of workers that must not compute this part.
    avoid: frozenset[int] = dataclasses.field(default=frozenset(), compare=False)


class Began(NamedTuple):
    """A worker has begun a part."""

    part: Part
    worker: int  #: the place of the worker in the pool
    at: float  #: seconds on the clock of the request
    fresh: bool = False  #: true if the worker has to load the module, so that its time is longer


@dataclasses.dataclass(eq=False, slots=True)
class Reply:
    """The end of a part: a value or an error."""

    part: Part
    worker: int  #: the place of the worker that had the part, or -1 if no worker had it
    at: float  #: seconds on the clock of the request
    latency: float  #: seconds since the worker began the part; infinite if no worker did
    value: Any = None  #: the module's output for the part, a pytree, on the device of the task
    error: WorkerError | None = None


class Request(abc.ABC):
    """A task that is open at a pool: parts are asked for, and events arrive.

    If a worker gets a part, that causes :class:`Began`, and then one :class:`Reply`. If no worker
    gets it, that causes only a reply with an error. A part that is dropped before it begins causes
    nothing. A part that its worker hands back begins again. A reply arrives at most the pool's
    ``timeout`` seconds after the part was asked for. One thread uses a request, and closes it.
    """

    @abc.abstractmethod
    def ask(self, parts: Sequence[Part]) -> None:
        """Have parts computed, in this order, each by the next idle worker, without waiting.

        Parts are numbered on from the last ones, and may share units. A closed request raises a
        RuntimeError. If the pool is closed, the parts fail.
        """

    @abc.abstractmethod
    def wait(self, until: float = math.inf) -> Began | Reply | None:
        """Return the next event, or None at the time ``until`` of the request's clock.

        Events that have already happened are returned even later. None also means that nothing
        more can happen before another part is asked for.
        """

    @abc.abstractmethod
    def drop(self, parts: Iterable[Part]) -> None:
        """Drop parts. Parts that have begun go on, and reply. The others never begin."""

    @abc.abstractmethod
    def now(self) -> float:
        """Return the seconds since the request was opened."""

    @property
    @abc.abstractmethod
    def idle(self) -> int:
        """The number of workers that would begin a part at once."""

    def status(self) -> str:
        """Return why parts have not begun, as "6 of 6 processes are at earlier tasks", or ""."""
        return ""

    @abc.abstractmethod
    def close(self) -> None:
        """Drop all parts that have not begun, and every later event. May be called twice."""

    def abandon(self) -> None:
        """Close the request, and end even the workers that compute its parts, if the pool can."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # After Ctrl-C, nothing may be left that keeps the next call waiting.
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.abandon()
        else:
            self.close()


class Workers(abc.ABC):
    """A pool of workers that run a module, each on one part of a task at a time.

    A pool must keep these rules:

    1. :meth:`open` returns at once. It raises an error that makes the whole task impossible. The
       caller's grad mode, inference mode and autocast at that moment hold where the module runs.
    2. Parts of all requests wait in one queue, in the order of asking. An idle worker takes the
       first part whose request is open, that is not dropped, and that need not avoid this worker.
       If a part must avoid all workers that are left, it fails.
    3. A worker ends its part, wanted or not, before it takes another one.
    4. Each part that has begun ends in one reply, at the latest after the ``timeout`` of the pool.
       If the module raises, the worker dies, or the result cannot be sent, the reply has an error
       with that cause. Other parts go on.
    5. The value of a reply is the module's output for :meth:`Task.payload` of the part's units,
       unchanged, on the device of the task. Call the module by :func:`~.faults.compute`, which
       applies :attr:`Part.fault`.
    6. The places of workers are 0, 1, 2, ... A worker that replaces another one, or comes after one
       that was drained, has its place.
    7. Pools may be shared between threads and wrappers, copied and pickled, without their workers.
       :meth:`close`, and the end of a pool that is not closed, release everything. The missing
       parts of open requests fail.
    """

    stragglers: Stragglers | None = None  #: the law by which the pool delays its workers
    simulated: bool = False  #: true if time is virtual, so that waiting and computing take none
    num_workers: int | None = None  #: the number of workers; None if there is one for each part

    @property
    def places(self) -> Collection[int]:
        """The places of the workers; empty if there is one for each part."""
        return range(self.num_workers or 0)

    @property
    def num_ready(self) -> int | None:
        """The number of workers that are up now; None if :attr:`num_workers` is."""
        return self.num_workers

    @property
    def num_restarts(self) -> int:
        """The number of workers that have ended and were replaced."""
        return 0

    @abc.abstractmethod
    def open(self, module: nn.Module, task: Task) -> Request:
        """Open a request for a module and its inputs. Its clock starts."""

    @final
    def run(
        self, module: nn.Module, task: Task, *, deadline: float = math.inf
    ) -> Generator[Reply, None, None]:
        """Ask for each unit as a part of its own, and yield replies in the order of arrival.

        Waits at most ``deadline`` seconds. Closing the generator closes the request.
        """
        with self.open(module, task) as request:
            request.ask([Part(n, (n,)) for n in range(task.num_units)])
            while (event := request.wait(deadline)) is not None:
                if isinstance(event, Reply):
                    yield event

    def start(
        self, module: nn.Module | None = None, example: Any = None, *, timeout: float = 120.0
    ) -> Self:
        """Start all workers and have them load a module, which else the first request does.

        Args:
            module: the module that every worker loads before this returns. Defaults to none.
            example: an input, or a tuple of positional arguments, that every worker calls the
                module with, so that no later call warms up. Defaults to None: no call.
            timeout: seconds.

        Raises:
            RuntimeError: not all workers loaded the module in time.
            WorkerError: a worker could not load or call the module.
        """
        if module is None or self.num_workers is None:
            return self
        args = example if isinstance(example, tuple) else (example,)
        leaves, spec = pytree.tree_flatten((args, {}))
        kind = _Loading if example is None else Task
        task = kind(leaves, [None] * len(leaves), spec, 1, 1, torch.device("cpu"))
        loaded, numbers = set[int](), itertools.count()
        with torch.no_grad(), self.open(module, task) as request:
            # Idle workers take a part each. A busy one gets its part in a later round.
            while (missing := self.num_workers - len(loaded)) > 0:
                request.ask([Part(next(numbers), (0,)) for _ in range(missing)])
                while missing:
                    event = request.wait(timeout)
                    if event is None:
                        many = f"only {len(loaded)} of {self.num_workers} workers loaded the module"
                        why = request.status() or "the others are still loading"
                        what = f"{many} within {timeout:g} s; {why}"
                        raise RuntimeError(f"{type(self).__name__}: {what}")
                    if isinstance(event, Reply):
                        if event.error is not None:
                            raise event.error
                        loaded.add(event.worker)
                        missing -= 1
        return self

    def resize(self, num_workers: int) -> None:
        """Let the pool have another number of workers, at least 1, while calls are open.

        Returns at once. New workers take free places. Workers at the last places are drained. A
        pool that cannot start or end workers raises a NotImplementedError.
        """
        raise NotImplementedError(f"{type(self).__name__}: the pool cannot be resized")

    def drain(self, worker: int) -> None:
        """Let the worker at a place end its part, take no other, and leave, without a successor.

        Returns at once. If no worker is left, parts wait until there is one again. A pool that
        cannot end workers raises a NotImplementedError.
        """
        raise NotImplementedError(f"{type(self).__name__}: workers cannot be drained")

    def close(self) -> None:  # noqa: B027 - most pools hold nothing
        """Release everything that the pool holds. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Loading(Task):
    """No call at all, since a module cannot be called without known arguments."""

    def payload(self, units: Sequence[int]) -> Arguments | None:  # type: ignore[override]
        return None
