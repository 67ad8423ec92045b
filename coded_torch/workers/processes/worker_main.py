r"""The fork server, and the worker processes that are forked from it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import reduction, spawn
from multiprocessing.connection import Connection as Line
from typing import Any

import torch

from .modules import LoadedModules, set_up
from .pickles import Pickled
from .shared_memory import Connection

__all__ = ["FAILURE", "HELLO", "JOB", "LOADED", "MAIN", "MODULE", "READY", "RESULT"]
__all__ += ["check_guard", "main"]

HELLO, READY, MODULE, LOADED, JOB, RESULT, FAILURE = range(7)  # kinds of messages
MAIN = "__main__"


class UnguardedError(RuntimeError):
    """The main script starts workers while it is imported."""


def check_guard() -> None:
    """Raise an :class:`UnguardedError` in a process that is importing the main script."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UnguardedError(
            "ProcessWorkers: workers import the main script, which must not start workers then; "
            'put its main part under: if __name__ == "__main__":'
        )


def _serve(connection: Connection, device: torch.device, threads: int, seed: int) -> None:
    """Do jobs until the other side of the connection has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the caller's process
    set_up(threads, seed)
    gc.freeze()  # the objects that exist now stay: no collection needs to look at them
    modules = LoadedModules(device, Pickled)
    with contextlib.suppress(ConnectionError):
        connection.send(READY, 0)
        while message := connection.receive():
            if message.kind == MODULE:
                modules.add(message.number, message.value)
                connection.send(LOADED, message.number)
                continue
            number, (succeeded, result) = message.number, modules.call(message.value)
            del message  # its memory can be used again, which the answer says
            connection.send(RESULT if succeeded else FAILURE, number, result)


def main(descriptor: int) -> None:
    """Run the server, until the process that started it has ended."""
    # The threads of OpenMP do not survive a fork, so imports must not start any. Each worker sets
    # its own number of threads.
    torch.set_num_threads(1)
    forker = _Forker(Line(descriptor))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    forker.run()


class _Forker:
    """The server.

    Args:
        control: the connection that brings a line for each pool.
    """

    def __init__(self, control: Line[Any, Any]) -> None:
        self._control = control
        self._imported: dict[str, str] = {}  # the errors, by name; "": none
        self._owners: dict[int, Line[Any, Any]] = {}  # the line of a worker, by process id
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
                        line = Line(reduction.recv_handle(self._control))
                        self._selector.register(line, selectors.EVENT_READ)
                    else:
                        self._serve(source)
                except (EOFError, OSError, RuntimeError):  # the last: a descriptor was lost
                    self._leave(source)

    def _serve(self, line: Line[Any, Any]) -> None:
        what, preparation, asked = line.recv()
        if what == "fork":
            descriptor = reduction.recv_handle(line)
            if self._imported.get(MAIN):  # The worker could only fail as the import has.
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
        line: Line[Any, Any],
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
            connection = Connection(socket.socket(fileno=descriptor))
            with contextlib.suppress(ConnectionError):  # The pool does not want it any more.
                connection.send(HELLO, os.getpid())
            _prepare(preparation)
            _serve(connection, *arguments)
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

    def _leave(self, line: Line[Any, Any]) -> None:
        """Forget a line that has ended, and end its workers. With the control, end everything."""
        for pid, owner in self._owners.items():
            if line in (owner, self._control):
                os.kill(pid, signal.SIGKILL)
        if line is self._control:
            os._exit(0)
        self._selector.unregister(line)
        line.close()


def _import(name: str, preparation: dict[str, Any]) -> str:
    """Import a package or the main script, and return why that failed, or ""."""
    try:
        if name == MAIN:
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
    """Import the main script, unless that has been done. :func:`check_guard` reads the mark."""
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
