r"""Workers in local processes."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import nn

from .._arguments import find_devices
from .._extension import lane
from .._table import Began, Failure, Part, Reply, WorkerError
from . import _worker_main
from ._live import LiveRequest
from ._shared_memory import PartsInMemory, Pickled, joined, pack, unpack
from ._supervisor import SupervisedRequest, SupervisedWorkers, Supervisor, WatchedWorker
from ._worker_main import ALIVE, ENDED, FORKED, LOADED, MODULE, PART, READY, RESULT, PackedModule

# The share of a processor above which a process is alive. A hung one uses .4 %, by its thread that
# waits for Python's global lock; compiled code uses 6 % of a processor that 16 processes share.
_BUSY = 0.02
# Seconds between two looks of a thread that waits whether another one has raised in it. Not tuned.
_LOOK_SECONDS = 0.1
# Seconds that a killed process may take to end. Not tuned.
_DYING_SECONDS = 0.5
_BROKEN = OSError, ValueError, OverflowError  # processes may send anything
_DIED = errno.EPIPE, errno.ECONNRESET  # of a worker, which is heard next
_UNREADABLE = 3  # what cannot be read has come from a worker, as csrc/lane/lane.h says


class ProcessWorkers(SupervisedWorkers):
    r"""A process per worker, each with the module. An idle process takes the next part.

    Inputs and results pass through shared memory, gradients do not pass. A process that dies or
    hangs is replaced at once. Its part has failed, and the request goes on. The module is sent
    once, and again when a change is seen: call :meth:`forget` after others. Changes that a call
    makes to the module stay in its process. The guide to pools says which changes are seen, what
    counts as a hang, and how random numbers are drawn.

    Args:
        num_workers: the number of processes, at least 1.
        devices: the devices of the processes, in turn, which this process never touches. Defaults
            to the CPU.
        threads: the number of threads that each process uses for one operation. Defaults to 1.
        hang_timeout: seconds without a sign of life after which a process at work is ended; doubled
            for a row at each end of a process that computed it. Defaults to 30.
        timeout: seconds after which a part that was asked for and has not replied has failed, and
            its process is ended. Defaults to 600.
        start_timeout: seconds that a process may take to start, or to load a module, before it is
            ended. Defaults to None: ten times what the first one took, and at least 10.

    Opening raises:
        RuntimeError: the pool is closed, an input requires gradients, this process was forked from
            the process that started the pool, or it is importing a main script without a guard.
        TypeError: the module cannot be pickled.

    Note:
        Scripts must guard their main part by ``if __name__ == "__main__":``.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        devices: Sequence[torch.device | str] | None = None,
        threads: int = 1,
        hang_timeout: float = 30.0,
        timeout: float = 600.0,
        start_timeout: float | None = None,
    ) -> None:
        self.devices = find_devices(self, ("cpu",) if devices is None else devices, torch.device)
        self.mixed = len({device.type for device in self.devices}) > 1
        super().__init__(
            num_workers,
            threads=threads,
            hang_timeout=hang_timeout,
            timeout=timeout,
            start_timeout=start_timeout,
        )

    def _make(self) -> Supervisor:
        return _Processes(self.devices, self.threads, *self._limits())


@dataclasses.dataclass(eq=False, kw_only=True)
class _Process(WatchedWorker):
    """A process and the connection to it, by which its server tells of its begin and its end."""

    lane: Any
    connection: Any
    server: _worker_main.Server
    packages: frozenset[str]  #: the packages that its server has imported
    fork_by: float  #: the time until which the server has to tell its process id
    descriptor = -1  #: of the process; ready to read once it has ended, whoever lives
    key = -1  #: the number by which the lane knows it
    takes = False  #: whether the lane was told to give it parts of rounds
    gone = False  #: true if it has ended
    code: int | None = None  #: the exit code, if its server has told it
    #: The parts that it was sent and has not replied to, or whose replies are not handled yet.
    sent: dict[int, Part] = dataclasses.field(default_factory=dict)

    def look(self) -> None:
        now = time.monotonic()
        used = self.lane.look_at(self.key)  # since it began its part, or the last look
        if used > _BUSY * (now - max(self.since, self.life)):
            self.life = now

    def end_by(self, *limits: float) -> tuple[float, str]:
        due, why = super().end_by(*limits)
        if self.pid or due <= self.fork_by:
            return due, why
        return self.fork_by, "was not forked in time, so that its server was ended"

    def __str__(self) -> str:
        if self.pid:
            return f"process {self.pid}"
        return f"process {self.index} of the pool"


class _Processes(Supervisor):
    """The processes of a pool, whose messages come through one lane.

    The threads that wait for replies handle the messages of all workers, one by one. The lane keeps
    a message until it has been handled, so that no interrupt loses one. An interrupt ends the
    processes to which parts were being sent.
    """

    kind = "processes"

    def __init__(self, devices: Sequence[Any], threads: int, *size_and_limits: Any) -> None:
        super().__init__(*size_and_limits)
        self._devices, self._threads = devices, threads
        self._packages: frozenset[str] = frozenset()
        self._blocks: Any = None
        self._lane: Any = None
        self._heard: dict[int, _Process] = {}  # by key
        self._keys = itertools.count()
        self._numbers = itertools.count()  # of parts at their workers
        self._wants_replies = False  # what the lane was told
        # The requests with a round, and the one whose parts are being taken over.
        self._rounds = set[SupervisedRequest]()
        self._taken: SupervisedRequest | None = None
        self._loaded = b""  # the head of a module that all workers have

    def set_up(self) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            why = "workers import the main script, which must not start workers then"
            how = 'put its main part under: if __name__ == "__main__":'
            raise RuntimeError(f"ProcessWorkers: {why}; {how}")
        self._blocks = lane.Blocks()
        self._lane = lane.Lane(PART, RESULT)

    def pack(self, module: nn.Module) -> Any:
        package = Pickled(module, has_storages=True).message()
        self._packages |= _packages_of(module)
        return package

    def launch(self, index: int) -> _Process:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        link = lane.Connection(ours.detach(), self._blocks)
        packages = self._packages - _worker_main.REFUSED
        device = self._devices[index % len(self._devices)]
        with theirs, contextlib.ExitStack() as on_error:
            on_error.callback(link.close)
            options = device, self._threads, self.seed(), self.beat
            server, fork_by = _worker_main.fork(theirs, packages, *options)
            worker = _Process(
                index,
                lane=self._lane,
                connection=link,
                server=server,
                packages=packages,
                fork_by=fork_by,
            )
            # The last module will probably be wanted, but loading it may be why starts failed.
            last = self.modules.last()
            if last is not None and not self._failed_starts:
                worker.modules = frozenset(last[:1])
                link.send(MODULE, *last)
            on_error.pop_all()
        return worker

    def add(self, worker: Any, ready: bool = True) -> None:
        super().add(worker, ready)
        with self.lock:
            worker.key = next(self._keys)
            self._heard[worker.key] = worker
            self._lane.add(worker.key, worker.index, worker.connection)

    def prepare(self, request: LiveRequest, parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
        module = request.module
        in_memory = PartsInMemory(request.task, module.head)
        ready = list[Part]()
        for part in parts:
            try:
                content = in_memory.message(part, self._blocks)
                part.content = content or pack(module.contents(part), self._blocks)
            except Exception as cause:  # such as of pickling: it fails the part, and is reported
                self.reply(part, Failure(f"could not be asked: {cause}", "", cause))
                continue
            ready.append(part)
            if part.content.is_long:  # it took time, and workers may be idle
                self._lane.look()
                self.hear_news()
                yield ready
                ready = []
        yield ready

    def send_all(self) -> None:
        asked = list[tuple[int, int, Any, Any]]()
        workers = list[_Process]()
        for worker in self.told:
            part = worker.part
            assert part is not None
            module = part.request.module
            if worker.fresh:
                try:
                    worker.connection.send(MODULE, module.number, module.package)
                except ConnectionError:  # it has died, which is heard next
                    pass
                except OSError as cause:
                    self.fail(worker, cause)
                    continue
                worker.loading = True
            number = next(self._numbers)
            worker.sent = {number: part}
            workers.append(worker)
            asked.append((worker.key, number, part.content, part.request.bell))
        # An interrupt comes before or after all of it.
        errors = self._lane.ask(asked)
        self.told = []
        for worker, error in zip(workers, errors, strict=True):
            if error and error not in _DIED:
                self.fail(worker, OSError(error, os.strerror(error)))
            elif worker.part is not None:
                worker.part.content = None

    def send(self, worker: _Process, part: Part) -> None:
        raise NotImplementedError  # all parts are sent together

    # Rounds: the lane gives their parts to workers, and Python is entered once. While parts wait in
    # the queue, or a worker changes, there are none: those that have begun are taken over.

    def round(
        self,
        request: SupervisedRequest,
        units: Sequence[Any],
        until: float,
        join: Callable[[Any], bool] | None,
    ) -> Sequence[tuple[int, float, float]]:
        in_memory = PartsInMemory(request.task, request.module.head)
        if in_memory.batch is None or not in_memory.may_look:
            return ()
        rows = in_memory.rows(units)
        asked = request.now()
        with self.lock:
            self.recover()
            if self.closed or self._parts or not self._is_loaded(request.module):
                return ()
            request.begun = units, asked
            self._rounds.add(request)
        call = request.bell
        is_finite = False
        try:
            is_finite = self._lane.add_rows(call, in_memory.batch, rows, self._blocks)
        except OSError:  # memory is short: parts that are not there yet are asked for alone
            self._lane.freeze(call)
        last = min(until, asked + request.timeout)
        wanted = min(request.together, len(units))
        is_done = None
        while is_done is None and not request.interrupted:
            seconds = last - request.now()
            is_done = self._lane.run(call, wanted, min(seconds, _LOOK_SECONDS), request.late)
            if is_done is None:
                self.hear_news()
                is_done = False if seconds <= 0 else None
        is_done = is_done and wanted == len(units)  # else no more results count than are wanted
        value = None
        if is_done and is_finite and join is not None:
            value = joined(call.replies, units, request.task)
        if value is not None and join is not None and join(value):
            self._rounds.discard(request)
            times: Sequence[tuple[int, float, float]] = call.times(request.opened)
            return times
        with self.lock:
            self._take_over(request)
            self._assign()
        return ()

    def _is_loaded(self, module: PackedModule) -> bool:
        """Return whether all workers that are up have a module, and forget none for its parts."""
        if self._loaded == module.head:
            return True
        up = [worker for worker in self._workers if worker.ready]
        for worker in up:
            if module.number not in worker.modules or not worker.modules <= module.alive:
                return False
        if any(worker.takes for worker in up):
            self._loaded = module.head
        return bool(self._loaded)

    def _take_over(self, request: SupervisedRequest) -> None:
        """Take over the parts of a round, as something has to be decided.

        If an interrupt ends this, :meth:`recover` goes on.
        """
        self._taken = request
        self._lane.freeze(request.bell)
        rows = self._lane.rows(request.bell)
        parts = request.parts_of_round()
        for part, row in zip(parts[request.num_taken :], rows[request.num_taken :], strict=False):
            place, key, number, began, ended, error, message, unsent = row
            worker = self._heard.get(key)
            began -= request.opened
            ended -= request.opened
            request.open[part.number] = part
            if key >= 0:
                event = Began(part, place, began)
                request.began[part.number] = request.events[~part.number] = event
            if ended < math.inf:
                reply = Reply(part, place, ended, ended - began)
                reply.value = worker or f"worker {place}", functools.partial(unpack, message)
                if error:
                    cause = OSError(error, os.strerror(error))
                    why = f"could not be asked: {cause}"
                    reply.error = WorkerError(part.number, place, why, "", cause)
                    request.urgent = True
                request.replied.add(part.number)
                request.events[part.number] = reply
                part.request = None
            elif worker is not None:
                worker.load(part)
                worker.since = began + request.opened
                worker.sent[number] = part
                worker.part = part
            elif key < 0:
                part.content = unsent
                self._parts.append(part)
            else:
                self.reply(part, Failure("was lost with its worker", "died"))
            request.num_taken += 1
        in_order = sorted(request.events.items(), key=lambda item: item[1].at)
        request.events = dict(in_order)  # a call may end before it has heard all
        self._rounds.discard(request)
        self._taken = None
        self.notify(request)

    def _take_over_all(self) -> None:
        for request in [*self._rounds]:
            self._take_over(request)

    def drop(self, request: LiveRequest, numbers: Collection[int] | None = None) -> None:
        if request in self._rounds:
            with self.lock:
                self._take_over(request)
        super().drop(request, numbers)

    def refuse(self, why: str = "") -> None:
        with self.lock:
            if why or self.closed:
                self._take_over_all()
            super().refuse(why)

    def end(self, worker: _Process) -> str | None:
        self.hear()  # how it has ended, perhaps
        self._ignore(worker)
        has_ended = worker.gone  # by itself
        if worker.pid:
            has_ended = has_ended or bool(wait([worker.descriptor], 0))
            with contextlib.suppress(*_BROKEN):  # it has ended
                signal.pidfd_send_signal(worker.descriptor, signal.SIGKILL)
                wait([worker.descriptor], _DYING_SECONDS)
            with contextlib.suppress(*_BROKEN):  # it may send anything
                if has_ended and worker.code is None:
                    worker.code = worker.server.told(worker.connection)
            os.close(worker.descriptor)
        elif time.monotonic() >= min(worker.fork_by, worker.since + self.start_timeout):
            worker.server.kill()
        worker.connection.close()  # ends one that is not up
        if not has_ended:
            return None
        code = worker.code
        if code is None and worker.pid:
            return "ended, and its server did not tell how"
        if code is None:
            if not (self.closed or worker.server.was_killed()):
                _worker_main.REFUSED.update(worker.packages)
            return "was not forked, as its server ended, or has threads or CUDA"
        if code < 0:
            names = {each.value: each.name for each in signal.Signals}  # not of all real-time ones
            why = ""
            if -code == signal.SIGKILL:
                why = "; perhaps memory is short"
            return f"was killed by {names.get(-code, f'signal {-code}')}{why}"
        up = " before it was up; its output says why"
        if worker.ready or worker.loading:
            up = ""
        return f"ended with exit code {code}{up}"

    # Waiting.

    def bell(self) -> Any:
        return lane.Call()

    def notify(self, request: LiveRequest) -> None:
        self._lane.notify(request.bell)

    def wait_for(self, request: LiveRequest, seconds: float) -> None:
        with self.lock:
            self.hear_news()
            if self.closed or request.is_notified():
                return
            lacking = min(request.together, len(request.open)) - len(request.replied)
            target = self._lane.settled(request.bell) + max(lacking, 1)
        self._lane.wait(request.bell, target, min(seconds, _LOOK_SECONDS), math.inf)
        self.hear_news()

    def wait(self, seconds: float) -> None:
        self._lane.stand_by(seconds)
        self.hear_news()
        self._assign()  # recovers from an interrupt

    def ring(self) -> None:
        if self._lane is not None:  # else there is no thread to hear it
            self._lane.ring()

    def let_go(self) -> None:
        with self.lock:
            self._lane.close()
            self.hear()
            self._blocks = lane.Blocks()

    def _assign(self) -> None:
        with self.lock:
            if self._lane is None:
                return
            self._loaded = b""
            changed = [worker for worker in self._workers if worker.takes != worker.is_wanted]
            if self._parts or changed:
                self._take_over_all()
            super()._assign()
            for worker in changed:
                self._lane.let_take(worker.key, worker.is_wanted)
                worker.takes = worker.is_wanted
            wants = bool(self._parts) or any(worker.left for worker in self._workers)
            if wants != self._wants_replies:
                self._lane.want_replies(wants)
                self._wants_replies = wants

    # Messages.

    def hear(self) -> None:
        with self.lock:
            self._take_over_all()
            self.hear_news()

    def hear_news(self) -> None:
        with self.lock:
            self.recover()  # else a part that was not sent could get the result of another
            if self._lane is None:
                return
            news = self._lane.front()
            if news is None and not self._parts:
                return
            while news is not None:
                key, *what = news
                worker = self._heard.get(key)
                if worker is not None and not self.closed:
                    self._hear(worker, *what)
                self._lane.pop()
                news = self._lane.front()
            self._assign()

    def _hear(self, worker: _Process, what: int, message: Any, error: str, has_ended: bool) -> None:
        """Handle a message of a worker. If an interrupt ends this, it is handled again."""
        if has_ended:
            worker.unwanted = worker.unwanted or "has ended"  # it gets no part
        kind = ENDED if message is None else message.kind
        if kind == RESULT:
            part = worker.sent.get(message.number)
            value = worker, functools.partial(unpack, message)
            if part is worker.part:
                self.end_part(worker, part, value)
            elif part is not None and part.request is not None:  # the lane has given it another one
                self.reply(part, value)
                part.request = None
            worker.sent.pop(message.number, None)
            return
        if kind in (FORKED, READY) and not worker.pid:
            try:
                worker.descriptor = os.pidfd_open(message.number)
                self._lane.watch(worker.key, worker.descriptor, message.number)
                worker.pid = message.number
            except ProcessLookupError:
                pass  # it has ended, and been waited for, which its server tells next
            except _BROKEN as cause:
                what, error = _UNREADABLE, f"{type(cause).__name__}: {cause}"
        if what == _UNREADABLE:
            self._doom(worker, f"was killed, as nothing could be exchanged with it: {error}")
        elif kind == ENDED:
            worker.gone = True
            if message is not None:
                worker.code = message.number
            self._doom(worker, "has ended")
        elif kind == READY:
            worker.since = time.monotonic()
            worker.loading = bool(worker.modules)
            if not worker.loading:
                self.ready(worker)
        elif kind == LOADED:
            self.loaded(worker)
        elif kind == ALIVE:
            worker.life = time.monotonic()
            worker.look()

    def recover(self) -> None:
        if self._taken is not None:
            self._take_over(self._taken)
        while self.told:
            self._doom(self.told[-1], "was ended, as an interrupt came while it was served")
            self.told.pop()

    def _doom(self, worker: _Process, why: str) -> None:
        """Have the pool's own thread end a worker."""
        worker.unwanted = worker.unwanted or why
        self._ignore(worker)
        self.wake()

    def is_idle(self, worker: _Process) -> bool:
        return worker.part is None and not self._lane.has_part(worker.key)

    def _ignore(self, worker: _Process) -> None:
        """Hear a worker no more."""
        with self.lock:
            if worker.key in self._heard:
                self._lane.let_take(worker.key, False)
                self._take_over_all()
            if self._heard.pop(worker.key, None) is not None:
                self._lane.remove(worker.key)


def _packages_of(module: nn.Module) -> set[str]:
    """Return the packages of a module's classes, and the imports of the main script for its own."""
    found: set[Any] = {type(part).__module__ for part in module.modules()}
    if "__main__" in found:
        for value in list(vars(sys.modules["__main__"]).values()):  # other threads may add some
            attribute = "__name__" if isinstance(value, types.ModuleType) else "__module__"
            found.add(getattr(value, attribute, None))
    known = {"__main__", "torch", "coded_torch", *sys.stdlib_module_names}
    return {x for x in found if isinstance(x, str) and x and x.partition(".")[0] not in known}
