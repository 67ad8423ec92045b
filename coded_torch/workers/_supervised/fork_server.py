r"""The process that workers on this machine are forked from.

It has imported torch, the main script and the packages of the modules that workers run, so a new
worker has nothing to import. The fork server of :mod:`multiprocessing` would do, but its list of
packages is a setting of the whole process, and so not ours to change.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing import Pipe, reduction, spawn
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import torch

from .worker_main import serve

__all__ = ["ForkServer", "check_guard", "main", "meet"]

_PID = struct.Struct("<q")
_SEND_SECONDS = 10.0  # A server that reads nothing for so long counts as lost.
_MAIN = "__main__"


class UnguardedError(RuntimeError):
    """The main script starts workers while it is imported."""


def check_guard() -> None:
    """Raise an :class:`UnguardedError` in a process that is importing the main script."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UnguardedError(
            "ProcessWorkers: workers import the main script, which must not start workers then; "
            'put its main part under: if __name__ == "__main__":'
        )


class ForkServer:
    """The line of a pool to the server of this process; one thread uses it, except :meth:`want`.

    Args:
        selector: where the line is registered, with this object as its data.
        names: packages to import in the server, beside the main script.

    Attributes:
        refusal: why the main script cannot be imported; "" if it can be.
    """

    def __init__(self, selector: selectors.BaseSelector, names: Iterable[str] = ()) -> None:
        self.refusal = ""
        self._selector = selector
        self._names = dict.fromkeys((_MAIN, *names))  # in the order of asking
        self._known: set[str] = set()  # asked for, confirmed or not
        self._importing = ""  # the package that the server imports for this line
        self._prepared: dict[str, Any] = {}  # the last preparation that was sent
        self._codes: dict[int, int] = {}  # exit codes by process id
        self._server: _Server | None = None
        self._line: Connection[Any, Any] | None = None

    def want(self, names: Iterable[str]) -> bool:
        """Note more packages to import; whether there are any. From any thread."""
        new = [name for name in names if name not in self._names]
        self._names = {**self._names, **dict.fromkeys(new)}
        return bool(new)

    def fork(self, sock: socket.socket, *arguments: Any) -> None:
        """Have a worker forked that calls ``serve(sock, *arguments)``.

        Raises:
            OSError: there is no server, and none can be started.
        """
        if self._line is None:
            self._server, self._line = _Server.connect()
            self._selector.register(self._line, selectors.EVENT_READ, self)
        self.preload()
        self._send("fork", arguments, sock)

    def preload(self) -> None:
        """Ask the server, if there is one, for the packages that it has not been asked for."""
        for name in self._names:
            if self._line is not None and name not in self._known | _Server.refused:
                self._known.add(name)
                self._send("import", name)

    def _send(self, what: str, asked: Any, sock: socket.socket | None = None) -> None:
        """Send a message, with the preparation if it has changed; on failure, end the server."""
        assert self._line is not None
        assert self._server is not None
        preparation = _preparation()
        changed = preparation if preparation != self._prepared else None
        try:
            self._line.send((what, changed, asked))
            if sock is not None:
                reduction.send_handle(self._line, sock.fileno(), self._server.pid)
        except OSError:
            while self._line is not None and self._line.poll():
                self.hear()  # The messages say which package the server is importing.
            self.discard()
            raise
        self._prepared = preparation

    def hear(self) -> None:
        """Read one message of the server, if there is any."""
        try:
            if self._line is None or not self._line.poll():  # exit_code has read it meanwhile
                return
            what, which, value = self._line.recv()
        except (EOFError, OSError):
            self.discard()
            return
        if what == "exited":
            self._codes[which] = value
        elif what == "importing":
            self._importing = which
        else:
            self._importing = ""
            if which == _MAIN:
                self.refusal = value

    def exit_code(self, pid: int, seconds: float) -> int | None:
        """How a worker has ended; None if the server does not say so in time, or has ended."""
        end = time.monotonic() + seconds
        while pid not in self._codes and self._line is not None:
            if not self._line.poll(max(end - time.monotonic(), 0.0)):
                break
            self.hear()
        return self._codes.pop(pid, None)

    def discard(self) -> None:
        """End a server that has ended or hangs; the next :meth:`fork` starts another one.

        If the server was importing a package for this line, later servers do not import it.
        """
        if self._importing:
            _Server.refused.add(self._importing)
        if self._server is not None:
            self._server.end()
        self.close()

    def close(self) -> None:
        """Close the line; the server ends the workers that it has forked for it."""
        if self._line is not None:
            self._selector.unregister(self._line)
            self._line.close()
        self._line = self._server = None
        self._known.clear()
        self._importing, self._prepared = "", {}


class _Server:
    """The server as this process sees it: all pools share one."""

    current: ClassVar[_Server | None] = None
    #: Packages that ended a server, or started threads there, which forked processes would lack.
    refused: ClassVar[set[str]] = set()
    _lock: ClassVar = threading.Lock()

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._control, theirs = Pipe()
        program = f"import sys; sys.path[:] = {sys.path}; from {__name__} import main; main(3)"
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        with theirs:
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3),
            ]
            command = [sys.executable, *flags, "-c", program]
            # torch.cuda.is_available() then asks NVML. The CUDA runtime must not be initialised
            # here, because it does not work in forked processes.
            environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
            self.pid = os.posix_spawn(
                sys.executable,
                command,
                environment,
                file_actions=actions,
                setsigmask=[signal.SIGINT],  # until it is ignored, see main
            )

    @classmethod
    def connect(cls) -> tuple[_Server, Connection[Any, Any]]:
        """The server, and a new line to it."""
        ours, theirs = Pipe()
        with socket.socket(fileno=os.dup(ours.fileno())) as sock:
            limit = struct.pack("@ll", int(_SEND_SECONDS), 0)  # a struct timeval
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        with cls._lock, theirs:
            server = cls.current
            # A process that was forked from ours has a server of its own.
            if server is None or server._owner != os.getpid():
                server = cls.current = cls()
            with contextlib.suppress(OSError):  # it has ended, as the line says when it is read
                reduction.send_handle(server._control, theirs.fileno(), server.pid)
        return server, ours

    def end(self) -> None:
        """End the process; twice is fine."""
        with self._lock:
            if type(self).current is self:
                type(self).current = None
                try:
                    # A child keeps its id until it is waited for. The host may have done that.
                    with contextlib.suppress(ProcessLookupError, ChildProcessError):
                        os.kill(self.pid, signal.SIGKILL)
                        os.waitpid(self.pid, 0)
                finally:
                    self._control.close()


def _preparation() -> dict[str, Any]:
    """What a process needs to know to import what this one can, as :mod:`multiprocessing` does."""
    data = spawn.get_preparation_data("worker")
    kept = ["sys_path", "sys_argv", "orig_dir", "dir", "init_main_from_name"]
    if os.path.isfile(data.get("init_main_from_path", "")):  # and not "<stdin>"
        kept.append("init_main_from_path")
    return {name: data[name] for name in kept if name in data}


# The other side.


def main(descriptor: int) -> None:
    """Run the server until the process that started it has ended."""
    # The threads of OpenMP do not survive a fork, so imports must not start any. Each worker sets
    # its own number of threads.
    torch.set_num_threads(1)
    forker = _Forker(Connection(descriptor))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    forker.run()


class _Forker:
    """What runs in the server.

    Args:
        control: brings a line for each pool.
    """

    def __init__(self, control: Connection[Any, Any]) -> None:
        self._control = control
        self._imported: dict[str, str] = {}  # the errors, by name; "": none
        self._owners: dict[int, Connection[Any, Any]] = {}  # the line of a worker, by process id
        self._preparations: dict[Connection[Any, Any], dict[str, Any]] = {}  # the last of each line
        self._selector = selectors.DefaultSelector()
        self._ended, self._bell = socket.socketpair()
        for end in (self._ended, self._bell):
            end.setblocking(False)
        self._set_signals()
        for source in (control, self._ended):
            self._selector.register(source, selectors.EVENT_READ)

    def _set_signals(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the caller's process
        signal.signal(signal.SIGCHLD, lambda *_: None)  # else the bell is not rung
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve all lines."""
        while True:
            for key, _ in self._selector.select():
                source: Any = key.fileobj
                if source is self._ended:
                    self._reap()
                    continue
                try:
                    if source is self._control:
                        line = Connection(reduction.recv_handle(self._control))
                        self._selector.register(line, selectors.EVENT_READ)
                    else:
                        self._serve(source)
                except (EOFError, OSError, RuntimeError):  # the last: a descriptor was lost
                    self._leave(source)

    def _serve(self, line: Connection[Any, Any]) -> None:
        what, changed, asked = line.recv()
        if changed is not None:
            self._preparations[line] = changed
        preparation = self._preparations[line]
        if what == "fork":
            descriptor = reduction.recv_handle(line)
            if self._imported.get(_MAIN):  # The worker could only fail as the import has.
                os.close(descriptor)
            else:
                self._fork(line, descriptor, preparation, asked)
            return
        if asked not in self._imported:
            line.send(("importing", asked, ""))
            self._imported[asked] = _import(asked, preparation)
            self._set_signals()  # which the main script may have changed
            if threading.active_count() > 1 or torch.cuda.is_initialized():
                os._exit(0)  # a forked process lacks the threads; the next server does without it
        line.send(("imported", asked, self._imported[asked]))

    def _fork(
        self,
        line: Connection[Any, Any],
        descriptor: int,
        preparation: dict[str, Any],
        arguments: Sequence[Any],
    ) -> None:
        try:
            pid = os.fork()
        except OSError:  # There are too many processes, or there is too little memory.
            os.close(descriptor)  # The pool reads the end of the connection, and tries again.
            return
        if pid:
            os.close(descriptor)
            self._owners[pid] = line
            return
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()
            self._bell.close()
            sock = socket.socket(fileno=descriptor)
            with contextlib.suppress(ConnectionError):  # The pool does not want it any more.
                _introduce(sock)
            _prepare(preparation)
            serve(sock, *arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._ended.recv(4096):
                pass
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                line = self._owners.pop(pid, None)
                if line is None:  # The main script started this process.
                    continue
                with contextlib.suppress(OSError):  # its pool has ended
                    line.send(("exited", pid, os.waitstatus_to_exitcode(status)))

    def _leave(self, line: Connection[Any, Any]) -> None:
        """Forget a line that has ended, and end its workers; with the control ends everything."""
        for pid, owner in self._owners.items():
            if line in (owner, self._control):
                os.kill(pid, signal.SIGKILL)
        if line is self._control:
            os._exit(0)
        self._selector.unregister(line)
        self._preparations.pop(line, None)
        line.close()


def _import(name: str, preparation: dict[str, Any]) -> str:
    """Import a package or the main script, and return why that is impossible; "" if it is not."""
    try:
        if name == _MAIN:
            _prepare(preparation)
        else:
            sys.path[:] = preparation["sys_path"]
            importlib.import_module(name)
    except UnguardedError as error:
        return str(error)
    except BaseException as error:  # a script may end itself, too
        trace = "".join(traceback.format_exception(error))
        return f"ProcessWorkers: workers cannot import {name}, which must work twice:\n{trace}"
    finally:
        _flush()  # or every process that is forked would write it again
    return ""


def _prepare(preparation: dict[str, Any]) -> None:
    """Import the main script, unless that has been done; :func:`check_guard` looks at the mark."""
    process: Any = multiprocessing.current_process()
    process._inheriting = True
    try:
        spawn.prepare(preparation)
    finally:
        del process._inheriting


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _introduce(sock: socket.socket) -> None:
    """Say which process this is; the descriptor goes on to mean this one when its id is reused."""
    try:
        handles = [os.pidfd_open(os.getpid())]
    except (AttributeError, OSError):  # Python, the kernel or a sandbox lacks the call.
        handles = []
    socket.send_fds(sock, [_PID.pack(os.getpid())], handles)
    for handle in handles:
        os.close(handle)


def meet(sock: socket.socket) -> tuple[int, int | None]:
    """The process id at the other end, and a descriptor of the process, if the system has such.

    The id is 0 if there is no process.
    """
    data, handles, _, _ = socket.recv_fds(sock, _PID.size, 1)
    pid = _PID.unpack(data)[0] if len(data) == _PID.size else 0
    return pid, handles[0] if handles else None
