r"""Pools of workers that may hang and die, and their supervisors: for processes and Ray actors."""

import abc
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from .._arguments import MOST_WORKERS, count, positive, warn
from .._table import Began, Failure, Part, Reply, WorkerError
from .._torch import refuse_derivatives
from ._base import Request, Task, logger
from ._dispatch import DispatchedWorkers, Dispatcher, Worker
from ._live import Ambient, LiveRequest
from ._untuned import (
    BEATS,
    CLOSING_SECONDS,
    FAILED_STARTS,
    LONGEST_BEAT,
    LONGEST_PAUSE,
    RECENT,
)
from ._worker_main import ModuleStore, PackedModule

# Seconds that the first worker has to start: importing torch from a cold disk takes tens of them.
# Later ones have as many times what the first one took, and at least the seconds below. If one was
# ended for it, the others have twice the time, up to that of the first. Not tuned.
START_SECONDS = 120.0
_STARTS, _LEAST_START = 10.0, 10.0
_LONGEST_WAIT = 3600.0  # seconds to wait for news: poll counts milliseconds in 31 bits
_REPAIR_SECONDS = 1.0  # a pause after an unexpected exception, so that the thread does not spin
_LOOK_SECONDS = 0.1  # between looks whether a call was cancelled while a module is packed
_launches = itertools.count()


class WatchedWorker(Worker):
    """A process or an actor: starting, loading a module, at a part, or idle."""

    loading = False  #: true until it has loaded the module of its part
    launched = 0.0  #: the time when it was launched
    life = -math.inf  #: the time of its last sign of life
    modules: frozenset[int] = frozenset()  #: the numbers of its modules
    latest = -1  #: the number of the module of its last part
    kills = 0  #: the times that a worker was ended at a row of its part, before it began

    def is_new_to(self, module: PackedModule) -> bool:
        return module.number not in self.modules

    @property
    def is_abandoned(self) -> bool:
        """Whether it is at a part of a call that the caller interrupted."""
        part = self.part
        request = None if part is None else part.request  # another thread may end the part now
        return request is not None and request.abandoned

    def load(self, part: Part) -> None:
        """Note that the worker gets a part, and forgets all modules that are not alive."""
        module = part.request.module
        kills = part.request.kills
        self.modules = self.modules & module.alive | {module.number}
        self.latest = module.number
        self.kills = max([kills.get(unit, 0) for unit in part.units]) if kills else 0

    def look(self) -> None:
        """Look for a sign of life that the worker does not give itself."""

    def end_by(
        self, start_timeout: float, hang_timeout: float, timeout: float
    ) -> tuple[float, str]:
        """Return when the worker is to be ended, and why, in words that continue its name."""
        if self.unwanted:
            return -math.inf, self.unwanted
        if self.is_abandoned:
            return -math.inf, "was at a call that was interrupted"
        if self.loading or not self.ready:
            what = "loading a module" if self.ready else "starting"
            how = (
                f"for more than {start_timeout:.3g} s, and was ended; start_timeout sets this time"
            )
            return self.since + start_timeout, f"was {what} {how}"
        if self.part is None:
            return math.inf, ""
        awaited = self.part.request.awaits(self.part)
        longest = max(hang_timeout, timeout)
        hang_timeout *= 2.0 ** min(self.kills, 9)
        due = self.since + longest
        what = ""
        option = "timeout"
        last_sign = max(self.since, self.life) if awaited else self.since
        silent = last_sign + hang_timeout
        if silent <= due:
            what = " without a sign of life" if awaited else " that no call waits for"
            due = silent
            longest = hang_timeout
            option = "hang_timeout (--hang-timeout)"
        how = f"for more than {longest:g} s{what}, and was ended; {option} sets this time"
        return due, f"was at one part {how}"


class Supervisor(Dispatcher):
    """The workers of a pool, of whom lost ones are replaced, and late ones ended.

    A worker hangs if it computes a part that a call waits for, and shows no sign of life for
    ``hang_timeout`` seconds. Where workers report that they load a module, the time of loading does
    not count: loading takes at most ``start_timeout``, and so does starting. No part takes longer
    than ``timeout``. Subclasses
    report to :meth:`ready`, :meth:`loaded`, :meth:`settle` and :meth:`lost`, and note each
    :attr:`~WatchedWorker.life`. One thread runs :meth:`serve`; any thread calls the rest.
    """

    def __init__(
        self,
        size: int,
        hang_timeout: float,
        timeout: float,
        start_timeout: float | None = None,
        clock: Any = time.monotonic,
    ) -> None:
        super().__init__(size, clock)
        self.start_timeout = START_SECONDS if start_timeout is None else start_timeout
        self._sets_start_timeout = start_timeout is None
        self._has_started = False
        self.hang_timeout = hang_timeout
        self.timeout = timeout
        self.beat = min(self.hang_timeout / BEATS, LONGEST_BEAT)  # seconds between signs of life
        self.modules = ModuleStore(self.pack)
        self.thread = threading.Thread(target=self.serve, name=f"coded_torch-{size}", daemon=True)
        self.num_lost = 0  # workers, while the pool is open
        self._woken = True  # there may be something for the thread to do
        self._failed_starts = 0
        self._start_again = -math.inf
        self._beginning = threading.Lock()
        self._first: Any = None  # the Work that packs the module that new workers load first

    def set_up(self) -> None:
        """Prepare for the thread, which starts next."""

    @abc.abstractmethod
    def pack(self, module: nn.Module) -> Any:
        """Return a module in the form in which workers get it."""

    @abc.abstractmethod
    def launch(self, index: int) -> WatchedWorker:
        """Begin to start the worker at a place."""

    @abc.abstractmethod
    def end(self, worker: Any) -> str | None:
        """End a worker at once, in any state; return how it had ended before, if it had."""

    @abc.abstractmethod
    def wait(self, seconds: float) -> None:
        """Wait until workers send something, or :meth:`ring` is called, and hand it to the pool."""

    @abc.abstractmethod
    def ring(self) -> None:
        """End :meth:`wait`, or the next one. Any thread may call it, at any time."""

    def wake(self) -> None:
        self._woken = True
        self.ring()

    def let_go(self) -> None:
        """Release everything but the workers, which have ended."""

    def begin(self, module: nn.Module) -> None:
        with self._beginning:
            if not self.process:
                self.set_up()
                self.process = os.getpid()
            if self.thread.ident is None:
                try:
                    self._first = self.modules.pack(module, Ambient.here()).package
                finally:  # the thread releases all that was prepared
                    self.thread.start()

    def seed(self) -> int:
        """Return the seed of the next worker of this process, different from all others."""
        key = torch.initial_seed() % 2**64, next(_launches)
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])

    def ready(self, worker: Any) -> None:
        self._failed_starts = 0
        if self._sets_start_timeout and not self._has_started:
            took = self._clock() - worker.launched
            self.start_timeout = max(_STARTS * took, _LEAST_START)
            self.wake()  # the others are due earlier
        self._has_started = True
        super().ready(worker)

    def loaded(self, worker: Any) -> None:
        """Note that a worker has loaded a module: of its part or, before it is up, the last one."""
        with self.lock:
            worker.loading, worker.fresh, worker.since = False, False, self._clock()
            self._assign() if worker.ready else self.ready(worker)

    def may_load(self, module: PackedModule) -> bool:
        """Return whether one more worker may load a module, which stops calls of others there."""
        since = self._clock() - RECENT
        used = [each for each in self._workers if each.part is not None or each.since > since]
        is_loaded = any(w.fresh and w.part and w.latest == module.number for w in used)
        others = module.alive - {module.number}
        return not is_loaded or others.isdisjoint(worker.latest for worker in used)

    def lost(self, worker: Any, reason: str) -> None:
        """Replace a worker that has ended, or end it first. Messages are "<worker> <reason>"."""
        with self.lock:
            if worker not in self._workers:
                return
            self._workers.remove(worker)  # it gets no part any more
            self.num_lost += not (self.closed or worker.left or worker.is_abandoned)
        try:
            reason = self.end(worker) or reason
        except Exception:  # the other workers must be ended, too
            logger.exception("%s could not be ended", worker)
        self._replace(worker, reason)

    def _replace(self, worker: Any, reason: str) -> None:
        """Fail the part of a worker that was taken out, and have a new one started."""
        what = f"{worker} {reason}"
        now = self._clock()
        if not (self.closed or worker.left or worker.is_abandoned):
            logger.warning("a worker was lost and is replaced: %s", what)
        with self.lock:
            if not (worker.ready or worker.left):
                self.trouble = what
                if now >= self._start_again:  # workers that fail together fail once
                    self._failed_starts += 1
                    pause = 0.1 * 2 ** min(self._failed_starts, 9)
                    self._start_again = now + min(pause, LONGEST_PAUSE)
            part = worker.part
            if part is not None:
                failure = Failure(f"was lost: {what}", "died")
                self.reply(part, failure)
                # The thread of the call does not write it if the call has ended.
                part.error = WorkerError(part.number, worker.index, *failure)
                part.request = None
                worker.part = None
        hopeless = not (worker.ready or worker.left) and self._failed_starts >= FAILED_STARTS
        self.refuse(what if hopeless else "")  # a part may have waited for this worker
        self.wake()

    def retire(self, worker: Any) -> None:
        worker.unwanted = "has left"
        self.wake()  # the thread ends the worker

    def restart(self, index: int) -> None:
        with self.lock:
            for worker in self.at(index):
                if not (worker.left or worker.unwanted):
                    worker.unwanted = "was to be restarted"
            self._assign()
        self.wake()

    def round(
        self,
        request: Any,
        units: Sequence[Any],
        until: float,
        join: Callable[[Any], bool] | None,
    ) -> Sequence[tuple[int, float, float]]:
        """Do as :meth:`Request.round`."""
        return ()

    def tend(self) -> float:
        """End late workers, start missing ones, and return when there is more to do."""
        # A part that begins meanwhile is due no earlier than the least timeout from now.
        now = self._clock()
        again = now + min(self.start_timeout, self.hang_timeout, _LONGEST_WAIT)
        limits = self.start_timeout, self.hang_timeout, self.timeout
        self.hear()
        self._assign()
        for worker in list(self._workers):
            with self.lock:  # a worker that gets its next part meanwhile is not overdue
                if worker.end_by(*limits)[0] <= now:
                    worker.look()
                due, why = worker.end_by(*limits)
                if due <= now:
                    worker.unwanted = why
                    if due > -math.inf and worker.part is not None:
                        kills = worker.part.request.kills
                        kills |= {unit: kills.get(unit, 0) + 1 for unit in worker.part.units}
            again = min(again, due)
            if due <= now:
                if due == worker.since + limits[0] and self._sets_start_timeout:
                    twice = min(2 * limits[0], START_SECONDS)
                    self.start_timeout = max(self.start_timeout, twice)
                self.lost(worker, why)
        for index in self.vacant():
            if now < self._start_again:
                return min(again, self._start_again)
            try:
                worker = self.launch(index)
            except Exception as cause:  # too many processes or files: later it may succeed
                reason = f"could not be started: {type(cause).__name__}: {cause}"
                self._replace(WatchedWorker(index), reason)
                continue  # until the time of the next try
            worker.launched = worker.since = self._clock()
            self.add(worker, ready=False)
        return float(again)

    def serve(self) -> None:
        due = -math.inf
        try:
            while self._first is not None and not (self.closed or self._first.done()):
                self._first.wait(_LOOK_SECONDS)
            self._first = None
            while not self.closed:
                try:
                    # Signs of life may have come while this process was stopped.
                    self.wait(max(0.0, due - self._clock()))
                    if self._woken or self._clock() >= due:  # replies alone take no care
                        self._woken = False
                        due = self.tend()
                except Exception as cause:  # workers and requests are as they were
                    logger.exception("%s: the thread of the pool goes on", self.thread.name)
                    self.trouble = f"{type(cause).__name__}: {cause}"
                    due = -math.inf
                    time.sleep(_REPAIR_SECONDS)
        finally:
            self.stop()
            for worker in list(self._workers):
                self.lost(worker, "was ended: the pool was closed")
            self.modules = ModuleStore(self.pack)
            self.let_go()

    def close(self) -> None:
        self.closed = True
        if self.thread.ident is not None:
            self.wake()
            if self.thread is not threading.current_thread():
                self.thread.join(CLOSING_SECONDS)


class SupervisedRequest(LiveRequest):
    """A request that reads results, a worker and a function, in its own thread.

    Until its module is packed, parts are held back, and :meth:`wait` keeps to its time.
    """

    def __init__(self, task: Task, timeout: float, dispatcher: Any, module: Any) -> None:
        super().__init__(task, timeout, dispatcher, module)
        self._packed: PackedModule | None = None  # the module, until its package is there
        self._held = list[Part]()
        #: The units of the parts of a round, and when it began.
        self.begun: tuple[Sequence[Any], float] = (), 0.0
        self.num_taken = 0  #: of its parts, the ones that the dispatcher has taken over

    def parts_of_round(self) -> Sequence[Part]:
        """Return the parts of the round, which become objects now."""
        units, asked = self.begun
        if not self.parts:
            parts = [Part(number, each) for number, each in enumerate(units)]
            for part in parts:
                part.request = self
                part.asked = asked
            self.parts = parts
        return self.parts

    def send_when_packed(self, packed: PackedModule) -> None:
        self._packed = packed
        self._submit_if_packed()

    def _submit_if_packed(self) -> bool:
        """Submit the parts that were held back, and return whether the module is packed."""
        if self._packed is not None and self._packed.package.done():
            self.module = self._packed._replace(package=self._packed.package.result())
            self._packed = None
            if self._held:
                held = self._held
                self._held = []
                super().ask(held)
        return self._packed is None

    def ask(self, parts: Sequence[Part]) -> None:
        if self._submit_if_packed():
            super().ask(parts)
            return
        for part in parts:
            part.asked = self.now()
        self._held += parts

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        # The common case at once: a caller waits twice for each part.
        while self._packed is not None and not self._submit_if_packed():
            seconds = until - self.now()
            if self.interrupted:
                raise CancelledError(f"{type(self).__name__}: the call was cancelled")
            if seconds <= 0 or not self._held:
                return None
            self._packed.package.wait(min(seconds, _LOOK_SECONDS))
        return super().wait(until)

    def round(
        self, units: Sequence[Any], until: float, join: Callable[[Any], bool] | None
    ) -> Sequence[tuple[int, float, float]]:
        if not self._submit_if_packed():
            return ()
        found: Sequence[tuple[int, float, float]] = self.dispatcher.round(self, units, until, join)
        return found

    def drop(self, parts: Iterable[Part]) -> None:
        numbers = {part.number for part in parts}
        self._held = [part for part in self._held if part.number not in numbers]
        self.dispatcher.drop(self, numbers)

    def status(self) -> str:
        return super().status() if self._packed is None else "the module is being packed"

    def close(self) -> None:
        self._held = []
        super().close()

    def receive(self, reply: Reply) -> None:
        if reply.error is not None:
            return
        (worker, read) = reply.value
        reply.value = None
        try:
            succeeded, reply.value = read()
            if succeeded:
                super().receive(reply)
                return
            (what, cause) = reply.value
            reply.value = None
            why = f"failed in {worker}: {what}", "raised", cause
        except Exception as error:  # unpickling may raise anything
            why = f"sent what cannot be read, from {worker}: {error}", "", error
        reply.error = WorkerError(reply.part.number, reply.worker, *why)
        # The traceback of the cause holds this frame, and so the memory of the result.
        del read, why


class SupervisedWorkers(DispatchedWorkers):
    """A pool whose :class:`Supervisor` starts, watches and replaces the workers."""

    starts_late = True

    def __init__(
        self,
        num_workers: int,
        *,
        threads: int,
        hang_timeout: float,
        timeout: float,
        start_timeout: float | None,
    ) -> None:
        self._size = count(self, "num_workers", num_workers, most=MOST_WORKERS)
        self.threads = count(self, "threads", threads)
        self.hang_timeout = positive(self, "hang_timeout", hang_timeout)
        self.timeout = positive(self, "timeout", timeout)
        if start_timeout is not None:
            start_timeout = positive(self, "start_timeout", start_timeout)
        self.start_timeout = start_timeout
        self._warned = False
        self._open()

    def open(self, module: nn.Module, task: Task) -> Request:
        self._check_gradients(module, task)
        supervisor = self._dispatcher()
        supervisor.begin(module)
        request = SupervisedRequest(task, self.timeout, supervisor, None)
        request.send_when_packed(supervisor.modules.pack(module, request.ambient))
        return request

    def _limits(self) -> tuple[int, float, float, float | None]:
        """Return the arguments of a :class:`Supervisor`."""
        return self._size, self.hang_timeout, self.timeout, self.start_timeout

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that are up, on their computers."""
        return [pid for _, pid in self.states.values() if pid]

    def forget(self, module: nn.Module) -> None:
        """Send ``module`` to the workers again when it is needed next."""
        self._queue.modules.forget(module)

    num_restarts: Any = property(attrgetter("_queue.num_lost"))

    def _check_gradients(self, module: nn.Module, task: Task) -> None:
        refuse_derivatives(type(self).__name__, task.leaves, module)
        may_train = torch.is_grad_enabled() and not self._warned
        if may_train and any(p.requires_grad for p in module.parameters()):
            self._warned = True
            how = "call under torch.no_grad(), or use DeviceWorkers to train"
            warn(f"{type(self).__name__}: answers have no gradients from its processes; {how}")
