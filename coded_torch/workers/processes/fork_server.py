r"""The line of a pool to the fork server: the process that workers are forked from.

The server has imported torch, the main script and the packages of the modules that workers run, so
a new worker has nothing to import. The server runs :mod:`.worker_main`. The fork server of
:mod:`multiprocessing` would do, but its list of packages is a setting of the whole process.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing import Pipe, reduction, spawn
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from . import worker_main
from .worker_main import MAIN

__all__ = ["ForkServer"]

_PROGRAM = worker_main.__name__
# Seconds after which a server that reads nothing counts as lost. Not tuned.
_SEND_SECONDS = 10.0


class ForkServer:
    """The line of a pool to the server of this process. One thread uses it, but for :meth:`want`.

    Args:
        selector: the line is registered there, with this object as its data.
        names: packages that the server imports, beside the main script.

    Attributes:
        refusal: why the main script cannot be imported, or "".
    """

    def __init__(self, selector: selectors.BaseSelector, names: Iterable[str] = ()) -> None:
        self.refusal = ""
        self._selector = selector
        self._names = dict.fromkeys((MAIN, *names))  # in the order of asking
        self._known: set[str] = set()  # asked for, confirmed or not
        self._importing = ""  # the package that the server imports for this line
        self._codes: dict[int, int] = {}  # exit codes by process id
        self._server: _Server | None = None
        self._line: Connection[Any, Any] | None = None

    def want(self, names: Iterable[str]) -> bool:
        """Note packages to import, and return whether any are new. Any thread may call this."""
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
        """Send a message. On failure, end the server."""
        assert self._line is not None
        assert self._server is not None
        try:
            self._line.send((what, _preparation(), asked))
            if sock is not None:
                reduction.send_handle(self._line, sock.fileno(), self._server.pid)
        except OSError:
            while self._line is not None and self._line.poll():
                self.hear()  # The messages say which package the server is importing.
            self.discard()
            raise

    def hear(self) -> None:
        """Read a message of the server, if there is one."""
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
            if which == MAIN:
                self.refusal = value

    def exit_code(self, pid: int, seconds: float) -> int | None:
        """Return the exit code of a worker; None if the server does not tell it in time."""
        end = time.monotonic() + seconds
        while pid not in self._codes and self._line is not None:
            if not self._line.poll(max(end - time.monotonic(), 0.0)):
                break
            self.hear()
        return self._codes.pop(pid, None)

    def discard(self) -> None:
        """End a server that has ended or hangs. The next :meth:`fork` starts another one.

        If the server was importing a package for this line, later servers do not import it.
        """
        if self._importing:
            _Server.refused.add(self._importing)
        if self._server is not None:
            self._server.end()
        self.close()

    def close(self) -> None:
        """Close the line. The server ends the workers that it has forked for it."""
        if self._line is not None:
            self._selector.unregister(self._line)
            self._line.close()
        self._line = self._server = None
        self._known.clear()
        self._importing = ""


class _Server:
    """The server, as this process sees it. All pools share it."""

    current: ClassVar[_Server | None] = None
    #: Packages that ended a server, or started threads there, which forked processes would lack.
    refused: ClassVar[set[str]] = set()
    _lock: ClassVar = threading.Lock()

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._control, theirs = Pipe()
        program = f"import sys; sys.path[:] = {sys.path}; from {_PROGRAM} import main; main(3)"
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
        """Return the server, and a new line to it."""
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
        """End the process. May be called twice."""
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
    """Return the data that another process needs to import the modules of this one."""
    data = spawn.get_preparation_data("worker")
    kept = ["sys_path", "sys_argv", "orig_dir", "dir", "init_main_from_name"]
    if os.path.isfile(data.get("init_main_from_path", "")):  # and not "<stdin>"
        kept.append("init_main_from_path")
    return {name: data[name] for name in kept if name in data}
