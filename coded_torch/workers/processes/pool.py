r"""Workers in processes of this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import selectors
import signal
import socket
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..._arguments import find_devices
from ..dispatch import Job, Worker
from .fork_server import ForkServer
from .pickles import Pickled
from .shared_memory import Block, Connection
from .supervised import SupervisedWorkers
from .supervisor import Supervisor, WatchedWorker
from .worker_main import HELLO, JOB, LOADED, MODULE, READY, RESULT, check_guard

__all__ = ["ProcessWorkers"]

# Descriptors that must be free to start a process: its socket, and memory for messages. Not tuned.
_SPARE_DESCRIPTORS = 16
_DYING_SECONDS = 0.5  # that the kernel may take to end a process, while others wait; not tuned


class ProcessWorkers(SupervisedWorkers):
    r"""A process per worker, each with the module. An idle process takes the next part.

    Inputs and results pass through shared memory. A process that dies is replaced at once, a
    process that takes longer than ``grace`` for a part is killed and replaced; the part has failed,
    the request goes on. Ctrl-C ends the processes that compute parts of the interrupted call.

    The module is sent to each process once, and again when a parameter or buffer was replaced or
    changed in place, or ``train`` or ``eval`` was called. All processes share one copy of its
    weights. Changes of other attributes, in-place changes through ``.data`` and of tensors made in
    inference mode go unnoticed until :meth:`forget` is called. Changes that a call makes to the
    module stay in its process. Gradients do not pass through processes.

    Each process draws its own random numbers, from torch, NumPy and :mod:`random`, by a seed that
    depends on :func:`torch.initial_seed`, the pool, the place of the process and its restarts.
    Answers of a module that draws numbers cannot be repeated, as time decides which process takes a
    part. A generator that the module holds draws the same numbers in every process.

    Args:
        num_workers: the number of processes, at least 1.
        devices: the devices of the processes, in turn. This process never touches them. Defaults to
            the CPU.
        threads: the number of threads that each process uses for one operation.
        grace: seconds that a part may take, without loading the module. It finds hung processes,
            not late ones, so it follows no deadline: replacing a process takes time. A few times
            the module's slowest run is a good choice.
        timeout: seconds after which a part that was asked for and has not replied has failed.
        preload: the names of packages that the processes find imported, beside the packages of the
            module's classes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is not positive, a device is missing or unknown, or a package of
            ``preload`` is not installed.

    Opening raises:
        RuntimeError: the pool is closed, an input requires gradients, this process was forked from
            the process that started the pool, or the main script has no guard.
        TypeError: the module cannot be pickled.

    Warns:
        UserWarning: once, if a parameter requires gradients while gradients are recorded.

    Note:
        Scripts must guard their main part by ``if __name__ == "__main__":``, as processes import
        the module's class from there. Classes of an interactive session are sent by value, if
        cloudpickle is installed. The pool needs Unix domain sockets, so it does not run on Windows.

        Processes are forked, in some 50 ms, from a server, which takes seconds to start and serves
        all pools of this process. It imports torch, the main script, ``preload`` and the packages
        of the modules that are sent, but for packages that start threads or initialise CUDA. A new
        process loads the module that was sent last before it counts as up.

    Example:
        .. code-block:: python

            import torch
            from coded_torch.workers import ProcessWorkers

            if __name__ == "__main__":
                module = torch.nn.Linear(3, 2)
                with ProcessWorkers(6).start(module) as workers, torch.no_grad():
                    print(workers.pids)
    """

    def __init__(
        self,
        num_workers: int,
        *,
        devices: Sequence[torch.device | str] | None = None,
        threads: int = 1,
        grace: float = 30.0,
        timeout: float = 600.0,
        preload: Iterable[str] = (),
    ) -> None:
        self.preload = _importable(preload)
        self.devices = find_devices(self, ("cpu",) if devices is None else devices, torch.device)
        super().__init__(num_workers, threads=threads, grace=grace, timeout=timeout)

    def _make_supervisor(self) -> Supervisor:
        check_guard()
        return _Processes(self.num_workers, self.grace, self.devices, self.threads, self.preload)


class _Process(WatchedWorker):
    """A process, and the connection to it."""

    def __init__(self, index: int, connection: Connection) -> None:
        super().__init__(index)
        self.connection = connection

    def kill(self) -> None:
        """End the process, though the server that forked it may have ended."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid else f"process {self.index} of the pool"


class _Processes(Supervisor):
    """The processes of a pool. A selector hears them, the fork server, and :meth:`wake`."""

    kind = "processes"

    def __init__(
        self,
        size: int,
        grace: float,
        devices: Sequence[torch.device],
        threads: int,
        preload: Sequence[str],
    ) -> None:
        super().__init__(size, grace)
        self._devices = devices
        self._threads = threads
        self._selector = selectors.DefaultSelector()
        self._server = ForkServer(self._selector, preload)
        self._alarm, self._bell = socket.socketpair()
        for end in (self._alarm, self._bell):
            end.setblocking(False)
        self._selector.register(self._alarm, selectors.EVENT_READ)

    def pack(self, module: nn.Module) -> tuple[Block, int]:
        pickled = Pickled(module)
        if self._server.want(_foreign(pickled.packages)):
            self.wake()  # so that later processes need not import them
        return Block.of(pickled)

    def launch(self, index: int) -> WatchedWorker:
        self._check_descriptors()
        ours, theirs = socket.socketpair()
        device = self._devices[index % len(self._devices)]
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.enter_context(ours)
            self._server.fork(theirs, device, self._threads, self.seed(index))
            unless_started.pop_all()
        worker = _Process(index, Connection(ours))
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)
        return worker

    def send(self, worker: Worker, job: Job) -> None:
        assert isinstance(worker, _Process)
        contents = Pickled(job.module.job(job.request.task, job.part))
        with contextlib.suppress(ConnectionError):  # it has died, which the thread hears
            if worker.is_new_to(job.module):
                worker.loading = True
                worker.connection.send_block(MODULE, job.module.number, *job.module.package)
            worker.load(job.module)
            worker.connection.send(JOB, job.number, contents)

    def end(self, worker: WatchedWorker) -> None:
        assert isinstance(worker, _Process)
        # All pools share the server. Only a server that is too slow to fork is ended.
        if not worker.pid and not self.closed and not worker.unwanted:
            self._server.discard()
        worker.kill()
        self._bury(worker)

    def wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    while self._alarm.recv(4096):
                        pass
            elif key.data is self._server:
                self._server.hear()
            elif key.data in self._workers:  # else it has been ended meanwhile
                self._hear(key.data)
        if self._server.refusal:
            self.refuse(self._server.refusal)
        with contextlib.suppress(OSError):  # the server has ended, which is heard next
            self._server.preload()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # rung already, or closed
            self._bell.send(b"!")

    def let_go(self) -> None:
        self._server.close()
        self._selector.close()
        self._alarm.close()
        self._bell.close()

    def _hear(self, worker: _Process) -> None:
        try:
            message = worker.connection.receive()
            if message is not None and message.kind == READY:
                self._welcome(worker)
        except Exception as error:  # a broken process may send anything
            self.end(worker)
            what = f"{type(error).__name__}: {error}"
            self.lost(worker, f"was killed, as nothing could be exchanged with it: {what}")
            return
        if message is None:
            self.lost(worker, self._bury(worker))
        elif message.kind == HELLO:
            worker.pid = worker.pid or message.number
        elif message.kind == LOADED:
            self.loaded(worker)
        elif message.kind != READY:
            self.take(worker, message.number, message.kind == RESULT, message.value)

    def _welcome(self, worker: _Process) -> None:
        """Have a new process load the last module, which will probably be wanted, first."""
        last = self.modules.last()
        if last is None or self._failed_starts:  # loading it may be why they failed
            self.ready(worker)
        else:
            number, package = last
            worker.modules, worker.since = frozenset([number]), self._clock()
            with contextlib.suppress(ConnectionError):  # it has died, which is heard next
                worker.connection.send_block(MODULE, number, *package)

    def _check_descriptors(self) -> None:
        """Raise an OSError unless there are enough descriptors for a process and its messages."""
        spare: list[int] = []
        try:
            while len(spare) < _SPARE_DESCRIPTORS:
                spare.append(os.dup(self._bell.fileno()))
        finally:
            for descriptor in spare:
                os.close(descriptor)

    def _bury(self, worker: _Process) -> str:
        """Release a process that ends, and return how it ended."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.connection)
        code = self._server.exit_code(worker.pid, _DYING_SECONDS) if worker.pid else None
        if code is None:
            worker.kill()  # it has closed its end, and may live: it is of no use
        worker.connection.close()
        if code is None:
            if worker.pid:
                return "closed its connection, and was killed"
            return "was not forked, as the server that forks processes failed or ended"
        if code < 0:
            return f"was killed by {_signal_name(-code)}"
        up = "" if worker.ready or worker.modules else " before it was up; its output says why"
        return f"ended with exit code {code}{up}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Most real-time signals have no name.
        return f"signal {number}"


def _foreign(packages: Iterable[str]) -> list[str]:
    """Return the packages that may not be imported wherever torch is."""
    known = {"__main__", "torch", *sys.stdlib_module_names}
    return sorted(name for name in packages if name.partition(".")[0] not in known)


def _importable(names: Iterable[str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"ProcessWorkers: preload must be a list of names, got {names!r}")
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"ProcessWorkers: preload must hold names, got {name!r}")
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise ValueError(f"ProcessWorkers: preload must name installed packages, got {name!r}")
    return names
