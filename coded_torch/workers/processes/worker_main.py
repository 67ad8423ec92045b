r"""Worker processes: how they are forked, and their program.

They are forks of a server that has imported this package, so that they start in milliseconds. The
server is a private :class:`multiprocessing.forkserver.ForkServer`, since the packages that the
public one imports are a setting of the whole process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import select
import signal
import socket
import threading
from multiprocessing import forkserver, reduction, resource_tracker, spawn, util
from typing import Any, NamedTuple

import torch

from . import shared_memory
from .modules import LoadedModules, set_up
from .shared_memory import Connection, Pickled

__all__ = ["FAILURE", "JOB", "LOADED", "MODULE", "READY", "RESULT", "check_guard", "fork", "server"]

READY, MODULE, LOADED, JOB, RESULT, FAILURE = range(6)  # kinds of messages
# Descriptors that must be free: a request takes 5, and one that is cut short ends the server.
_SPARE_DESCRIPTORS = 8
_MAIN = ("init_main_from_name", "init_main_from_path")  # keys of preparation data


def check_guard() -> None:
    """Raise a RuntimeError in a process that is importing the main script."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "ProcessWorkers: workers import the main script, which must not start workers then; "
            'put its main part under: if __name__ == "__main__":'
        )


@functools.cache
def server(owner: int) -> forkserver.ForkServer:
    """Return the server of the process ``owner``. A process that is forked from it has its own."""
    own = forkserver.ForkServer()
    own.set_forkserver_preload([__name__])
    return own


def fork(sock: socket.socket, device: torch.device, threads: int, seed: int) -> int:
    """Have a worker forked that serves a socket.

    Returns:
        A descriptor, from which :func:`multiprocessing.forkserver.read_signed` reads the process
        id, and later the exit code. It ends early if the server does.

    Raises:
        OSError: there is no server, and none can be started.
    """
    data = spawn.get_preparation_data("worker")
    kept = ("sys_path", "sys_argv", "orig_dir", "dir")
    is_script = not shared_memory.is_interactive()
    main = {name: data[name] for name in _MAIN if is_script and name in data}
    with contextlib.ExitStack() as spare:
        for _ in range(_SPARE_DESCRIPTORS):
            spare.callback(os.close, os.dup(sock.fileno()))
    # Ctrl-C is meant for the caller's process: the server and its forks inherit this mask. The
    # tracker would unblock the signal if it were started later.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        descriptor, writer = server(os.getpid()).connect_to_new_process([sock.fileno()])
    except ChildProcessError:  # the host has waited for the server, which has ended
        server.cache_clear()
        raise
    with open(writer, "wb") as stream:
        stream.write(reduction.ForkingPickler.dumps({name: data[name] for name in kept}))
        stream.write(reduction.ForkingPickler.dumps(_Program(main, device, threads, seed)))
    return descriptor


class _Program(NamedTuple):
    """The program of a worker. :func:`multiprocessing.spawn._main` calls :meth:`_bootstrap`."""

    main: dict[str, str]
    device: torch.device
    threads: int
    seed: int

    def _bootstrap(self, _: int) -> int:
        descriptors: Any = forkserver.get_inherited_fds()
        connection = Connection(socket.socket(fileno=descriptors[0]))
        is_script = bool(self.main)
        shared_memory.is_interactive = lambda: not is_script
        shared_memory.import_main = functools.partial(_import_main, self.main)
        try:
            self.run(connection)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            util._flush_std_streams()  # type: ignore[attr-defined]
        return 0

    def run(self, connection: Connection) -> None:
        """Do jobs until the other side of the connection has ended."""
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        set_up(self.threads, self.seed)
        gc.freeze()  # the objects that exist now stay: no collection needs to look at them
        modules = LoadedModules(self.device, Pickled)
        with contextlib.suppress(ConnectionError):
            connection.send(READY, os.getpid())
            while message := connection.receive():
                if message.kind == MODULE:
                    modules.add(message.number, message.value)
                    connection.send(LOADED, message.number)
                    continue
                number, (succeeded, result) = message.number, modules.call(message.value)
                del message  # the answer says that its memory can be used again
                connection.send(RESULT if succeeded else FAILURE, number, result)


def _end_with(connection: Connection) -> None:
    """End this process when the other side of the connection has ended, even during a call."""
    poll = select.poll()
    poll.register(connection, 0)
    poll.poll()
    os._exit(0)


def _import_main(preparation: dict[str, Any]) -> None:
    """Import the main script, unless that has been done. :func:`check_guard` reads the mark."""
    if not preparation:
        return
    process: Any = multiprocessing.current_process()
    process._inheriting = True
    try:
        spawn.prepare(preparation)
    finally:
        del process._inheriting
    preparation.clear()
