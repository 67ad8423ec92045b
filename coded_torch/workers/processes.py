r"""Workers in processes of this machine, which may hang and die."""

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
from torch import Tensor, nn

from .._arguments import find_devices
from ._supervised.fork_server import ForkServer, check_guard, meet
from ._supervised.machine import Job, Machine
from ._supervised.pickles import Pickled
from ._supervised.pool import SupervisedWorkers
from ._supervised.shared_inputs import SharedInputs
from ._supervised.shared_memory import Block, Connection
from ._supervised.supervisor import Supervisor
from ._supervised.worker_main import JOB, LOADED, MODULE, READY

__all__ = ["ProcessWorkers"]

_SPARE_DESCRIPTORS = 16
_UNFORKED = "was not forked, as the server that forks processes failed or ended"
_DYING_SECONDS = 0.5  # that the kernel may take to end a process, while others wait


class ProcessWorkers(SupervisedWorkers):
    r"""A process per worker, each with the module; each takes the next part when it is free.

    Inputs and results pass through shared memory; what a wrapper encodes is written there, and not
    again. A process that dies is replaced at once, one that is at a part for longer than ``grace``
    is killed and replaced; the part has failed, the request goes on. Ctrl-C ends the processes that
    are at parts of the interrupted call. Since any process takes any part, those that are slow,
    stopped or starting hold up none of the later requests while others are free.

    The module is sent to each process once, and again when a parameter or buffer has been replaced
    or changed in place, or ``train`` or ``eval`` was called; all processes share one copy of its
    weights. Changes of other attributes, and in-place ones through ``.data`` or of tensors made in
    inference mode, go unnoticed, until :meth:`forget` is called; what a call changes in its process
    stays there. Gradients do not pass through processes.

    Each process draws random numbers of its own, from torch, NumPy and :mod:`random`. Its seed is
    made of :func:`torch.initial_seed` when the process starts, the number of the pool in this
    process, the place of the process in the pool and how often that place was taken. So the numbers
    of a process can be repeated. Which process takes a part depends on time, so answers of a module
    that draws numbers cannot be, other than on :class:`~coded_torch.workers.LocalWorkers`. A
    generator that the module holds is copied as it is and draws the same in every process.

    Args:
        num_workers: how many processes; the code may divide a batch more finely.
        devices: where each process computes, in turn; None: on the CPU. Devices are first touched
            by the processes, never by this one.
        threads: how many threads each process uses for one operation.
        grace: seconds that a part may take. It says what hangs, not what is late: it follows no
            deadline, since a process that is late for one call may still be right for the next,
            and one that is killed takes time to come back. A few times the module's slowest run is
            a good choice: until the grace is over, a module that hangs keeps its process from later
            requests. Loading the module is not counted, and may take two minutes.
        timeout: seconds after which a part that was asked for and has not replied has failed.
        max_requests: how many requests may be served at once; the parts of others wait for room.
        preload: names of packages that the processes find imported, beside those of the module's
            classes.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: a number is not positive, no device is given, or there is none of that name; a
            package of ``preload`` is not installed.

    Opening raises:
        RuntimeError: the pool is closed, an input requires gradients, this process was forked from
            the one that started the pool, or the main script has no guard.
        TypeError: the module cannot be pickled.

    Warns:
        UserWarning: once, where gradients would be expected: a parameter requires them.

    Note:
        Scripts must guard their main part by ``if __name__ == "__main__":``, as processes import
        the module's class from there. Classes of a notebook or an interactive session go by value,
        if cloudpickle is installed. Needs sockets of the Unix domain, so not Windows.

        Processes are forked from a server, which all pools of this process share. It imports torch,
        the main script, ``preload`` and the packages of the modules that are sent; a package that
        starts threads or initialises CUDA when it is imported is left to the processes. The server
        takes seconds to start, a process then some 50 ms. One that replaces another loads the
        module that was sent last before it counts as up; ``start(module, example)`` has all of them
        load it.

    Example:
        .. code-block:: python

            import torch
            from coded_torch.codes import KernelCode
            from coded_torch.nn import CodedWrapper
            from coded_torch.workers import ProcessWorkers

            if __name__ == "__main__":
                module = torch.nn.Linear(3, 2)
                with ProcessWorkers(6).start(module) as workers, torch.no_grad():
                    coded = CodedWrapper(module, KernelCode(4, 6), workers=workers)
                    print(coded(torch.randn(8, 3)).shape)
    """

    def __init__(
        self,
        num_workers: int,
        *,
        devices: Sequence[torch.device | str] | None = None,
        threads: int = 1,
        grace: float = 30.0,
        timeout: float = 600.0,
        max_requests: int = 64,
        preload: Iterable[str] = (),
    ) -> None:
        self.preload = _importable(preload)
        self.devices = find_devices(self, ("cpu",) if devices is None else devices, torch.device)
        super().__init__(
            num_workers, threads=threads, grace=grace, timeout=timeout, max_requests=max_requests
        )

    def _make_supervisor(self) -> Supervisor:
        check_guard()
        return _Processes(self.num_workers, self.grace, self.devices, self.threads, self.preload)


class _Process(Machine):
    """One process, and what it has been sent."""

    def __init__(self, index: int, connection: Connection) -> None:
        super().__init__(index)
        self.connection = connection
        self._handle: int | None = None

    def meet(self) -> bool:
        """Read which process it is; whether it is any."""
        self.pid, self._handle = meet(self.connection.socket)
        return self.pid > 0

    def kill(self) -> None:
        """End the process, though the server that forked it may have ended."""
        with contextlib.suppress(ProcessLookupError):
            if self._handle is not None:
                try:
                    signal.pidfd_send_signal(self._handle, signal.SIGKILL)
                    return
                except ProcessLookupError:
                    return
                except (AttributeError, OSError):
                    pass  # Python, the kernel or a sandbox lacks the call.
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of all that is held for the process."""
        self.connection.close()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid else f"process {self.index} of the pool"


class _Processes(Supervisor):
    """The processes of a pool."""

    noun = "processes"

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
        self._inputs = SharedInputs()
        self._selector = selectors.DefaultSelector()
        self._server = ForkServer(self._selector, preload)
        self._alarm, self._bell = socket.socketpair()
        for end in (self._alarm, self._bell):
            end.setblocking(False)
        self._selector.register(self._alarm, selectors.EVENT_READ)

    def pack(self, module: nn.Module) -> tuple[Block, int]:
        pickled = Pickled(module)
        if self._server.want(_foreign(pickled.packages)):
            self.wake()  # what replaces a process later need not import them
        return Block.of(pickled)

    def launch(self, index: int) -> Machine:
        self._check_descriptors()
        ours, theirs = socket.socketpair()
        device = self._devices[index % len(self._devices)]
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.enter_context(ours)
            self._server.fork(theirs, device, self._threads, self.seed(index))
            unless_started.pop_all()
        machine = _Process(index, Connection(ours))
        self._selector.register(machine.connection, selectors.EVENT_READ, machine)
        return machine

    def memory(self, num_bytes: int) -> Tensor | None:
        return self._inputs.take(num_bytes)

    def send(self, machine: Machine, job: Job) -> None:
        assert isinstance(machine, _Process)
        contents = Pickled(job.contents(), find=self._inputs.find)
        with contextlib.suppress(ConnectionError):  # it has died, which the other thread hears
            if job.module.number not in machine.modules:
                machine.loading = True
                machine.connection.send_block(MODULE, job.module.number, *job.module.package)
            machine.load(job.module)
            machine.connection.send(JOB, job.number, contents)

    def end(self, machine: Machine) -> None:
        assert isinstance(machine, _Process)
        # All pools share the server. Only a server that is too slow to fork is ended.
        if not machine.pid and not self.closed and not machine.unwanted:
            self._server.discard()
        machine.kill()
        self._bury(machine)

    def wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    while self._alarm.recv(4096):
                        pass
            elif key.data is self._server:
                self._server.hear()
            elif key.data in self._machines:  # else it has been ended meanwhile
                self._hear(key.data)
        if self._server.refusal:
            self.refuse(self._server.refusal)
        with contextlib.suppress(OSError):  # it has ended, which is heard next
            self._server.preload()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # rung already, or closed
            self._bell.send(b"!")

    def let_go(self) -> None:
        self._inputs.clear()
        self._server.close()
        self._selector.close()
        self._alarm.close()
        self._bell.close()

    def _hear(self, machine: _Process) -> None:
        try:
            if not machine.pid and machine.meet():
                return
            message = machine.connection.receive() if machine.pid else None
            if message is not None and message.kind == READY:
                self._welcome(machine)
        except Exception as error:  # whatever what a broken process sends causes
            self.end(machine)
            what = f"{type(error).__name__}: {error}"
            self.lost(machine, f"was killed, as nothing could be exchanged with it: {what}")
            return
        if message is None:
            self.lost(machine, self._bury(machine))
        elif message.kind == LOADED:
            self.loaded(machine)
        elif message.kind != READY:
            self.take(machine, message.number, message.kind, message.value)

    def _welcome(self, machine: _Process) -> None:
        """Have a new process load what will probably be wanted of it, before it is up."""
        last = self.modules.last()
        if last is None or self._failed_starts:  # which loading it may have caused
            self.ready(machine)
        else:
            number, package = last
            machine.modules, machine.since = frozenset([number]), self._clock()
            with contextlib.suppress(ConnectionError):  # it has died, which is heard next
                machine.connection.send_block(MODULE, number, *package)
                machine.connection.flush()

    def _check_descriptors(self) -> None:
        """Raise an OSError unless there are enough of them to start a process and to ask it."""
        spare: list[int] = []
        try:
            while len(spare) < _SPARE_DESCRIPTORS:
                spare.append(os.dup(self._bell.fileno()))
        finally:
            for descriptor in spare:
                os.close(descriptor)

    def _bury(self, machine: _Process) -> str:
        """Let go of a process that ends, and say how it did."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(machine.connection)
        code = self._server.exit_code(machine.pid, _DYING_SECONDS) if machine.pid else None
        if code is None:
            machine.kill()  # it has closed its end, and may live: it is of no use
        machine.close()
        if code is None:
            return _UNFORKED if not machine.pid else "closed its connection, and was killed"
        if code < 0:
            return f"was killed by {_signal_name(-code)}"
        up = "" if machine.ready or machine.modules else " before it was up; its output says why"
        return f"ended with exit code {code}{up}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Most real-time signals have no name.
        return f"signal {number}"


def _foreign(packages: Iterable[str]) -> list[str]:
    """Of the packages of a module, those that may not be imported wherever torch is."""
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
