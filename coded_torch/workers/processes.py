r"""Workers in processes of this machine, which may hang and die."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import os
import selectors
import signal
import socket
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._arguments import find_devices
from ._supervised.machine import Job, Machine
from ._supervised.pool import SupervisedWorkers
from ._supervised.shared_inputs import SharedInputs
from ._supervised.shared_memory import Block, Connection, Pickled
from ._supervised.supervisor import Supervisor
from ._supervised.worker_main import JOB, LOADED, MODULE, READY, serve

__all__ = ["ProcessWorkers"]

_SPARE_DESCRIPTORS = 16
_DYING_SECONDS = 0.5  # that the kernel may take to end a process, while others wait


class ProcessWorkers(SupervisedWorkers):
    r"""A process per worker, each with the module; each takes the next part when it is free.

    Inputs and results pass through shared memory; what a wrapper encodes is written there, and not
    again. A process that dies is replaced at once, one that
    is at a part for longer than ``grace`` is killed and replaced; the part has failed, the request
    goes on. Since any process takes any part, those that are slow, stopped or starting hold up none
    of the later requests while others are free.

    The module is sent to each process once, and again when a parameter or buffer has been replaced
    or changed in place, or ``train`` or ``eval`` was called; all processes share one copy of its
    weights. Changes of other attributes, and in-place ones through ``.data`` or of tensors made in
    inference mode, go unnoticed, until :meth:`forget` is called; what a call changes in its process
    stays there. Gradients do not pass through processes.

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

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: a number is not positive, no device is given, or there is none of that name.

    Opening raises:
        RuntimeError: the pool is closed, an input requires gradients, or this process was forked
            from the one that started the pool.
        TypeError: the module cannot be pickled, or is of a class of an interactive session.

    Warns:
        UserWarning: once, where gradients would be expected: a parameter requires them.

    Note:
        Scripts must guard their main part by ``if __name__ == "__main__":``, as processes import
        the module's class from there; a class that was defined in a notebook or an interactive
        session cannot be found. Needs sockets of the Unix domain, so not Windows. The first process
        takes seconds to start, later ones some 20 ms (they are forked from a server that has
        imported torch, which Python keeps until this process ends). One that replaces another loads
        the module that was sent last before it counts as up.

    Example:
        .. code-block:: python

            import torch
            from coded_torch.codes import KernelCode
            from coded_torch.nn import CodedWrapper
            from coded_torch.workers import ProcessWorkers

            if __name__ == "__main__":
                with ProcessWorkers(6).start() as workers, torch.no_grad():
                    coded = CodedWrapper(
                        torch.nn.Linear(3, 2), KernelCode(4, 6), workers=workers
                    )
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
    ) -> None:
        self.devices = find_devices(self, ("cpu",) if devices is None else devices, torch.device)
        super().__init__(
            num_workers, threads=threads, grace=grace, timeout=timeout, max_requests=max_requests
        )

    def _make_supervisor(self) -> Supervisor:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # Else the last line of all that multiprocessing says of it would be an empty one.
            raise RuntimeError(
                "ProcessWorkers: a process that imports this script must not start workers; put "
                'its main part under: if __name__ == "__main__":'
            )
        return _Processes(self.num_workers, self.grace, self.devices, self.threads)


class _Process(Machine):
    """One process, and what it has been sent."""

    def __init__(
        self, index: int, process: multiprocessing.process.BaseProcess, connection: Connection
    ) -> None:
        super().__init__(index)
        self.process, self.connection = process, connection
        self.pid = process.pid or 0

    def __str__(self) -> str:
        return f"process {self.pid}"


class _Processes(Supervisor):
    """The processes of a pool."""

    noun = "processes"

    def __init__(
        self, size: int, grace: float, devices: Sequence[torch.device], threads: int
    ) -> None:
        super().__init__(size, grace)
        self._devices = devices
        self._threads = threads
        methods = multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        self._inputs = SharedInputs()
        self._selector = selectors.DefaultSelector()
        self._alarm, self._bell = socket.socketpair()
        for end in (self._alarm, self._bell):
            end.setblocking(False)
        self._selector.register(self._alarm, selectors.EVENT_READ)

    def pack(self, module: nn.Module) -> tuple[Block, int]:
        return Block.of(module)

    def launch(self, index: int) -> Machine:
        if self._context.get_start_method() == "forkserver":
            self._context.set_forkserver_preload([serve.__module__])
        self._check_descriptors()
        ours, theirs = socket.socketpair()
        device = self._devices[index % len(self._devices)]
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.enter_context(ours)
            # Daemonic, so that it outlives us in no case.
            process = self._context.Process(  # type: ignore[attr-defined]
                target=serve, args=(theirs, device, self._threads), daemon=True
            )
            process.start()
            unless_started.pop_all()
        machine = _Process(index, process, Connection(ours))
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
        self._kill(machine)
        self._bury(machine)

    def wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    while self._alarm.recv(4096):
                        pass
            else:
                self._hear(key.data)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # rung already, or closed
            self._bell.send(b"!")

    def let_go(self) -> None:
        self._inputs.clear()
        self._selector.close()
        self._alarm.close()
        self._bell.close()

    def _hear(self, machine: _Process) -> None:
        try:
            message = machine.connection.receive()
            if message is not None and message.kind == READY:
                self._welcome(machine)
        except OSError as error:
            self.end(machine)
            self.lost(machine, f"was killed, as nothing could be exchanged with it: {error}")
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
        """Raise an OSError unless there are enough of them to start a process and to ask it.

        The server that processes are forked from dies, noisily, where they run out on the way.
        """
        spare: list[int] = []
        try:
            while len(spare) < _SPARE_DESCRIPTORS:
                spare.append(os.dup(self._bell.fileno()))
        finally:
            for descriptor in spare:
                os.close(descriptor)

    def _kill(self, machine: _Process) -> None:
        # Not process.kill(), which does nothing where the server that forked it has died.
        with contextlib.suppress(ProcessLookupError):
            os.kill(machine.pid, signal.SIGKILL)

    def _bury(self, machine: _Process) -> str:
        """Let go of a process that ends, and say how it did."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(machine.connection)
        machine.process.join(_DYING_SECONDS)
        code = machine.process.exitcode
        machine.connection.close()
        if code is None:
            self._kill(machine)  # it has closed its end, and lives: it is of no use
            return "closed its connection, and was killed"
        machine.process.close()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        if machine.ready or machine.modules:
            return f"ended with exit code {code}"
        return (
            f"ended with exit code {code} before it was up; its output says why (does the script "
            'guard its main part by: if __name__ == "__main__"?)'
        )
