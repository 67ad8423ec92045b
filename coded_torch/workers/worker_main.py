r"""Worker processes: how they are forked, their program, and modules on both sides.

They are forks of a server that has imported this package, so that they start in milliseconds. The
server is a private :class:`multiprocessing.forkserver.ForkServer`, since the packages that the
public one imports are a setting of the whole process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import multiprocessing
import operator
import os
import pickle
import random
import select
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .._torch import fingerprint
from . import shared_memory
from .base import Part, Task
from .faults import compute, kill_own_process
from .live import Ambient
from .shared_memory import Connection, Pickled

__all__ = ["LoadedModules", "ModuleStore", "PackedModule", "environment", "fork", "set_up"]

READY, MODULE, LOADED, JOB, RESULT = range(5)  # kinds of messages
# Descriptors that must be free: a request takes 5, and one that is cut short ends the server.
_SPARE_DESCRIPTORS = 8
# The exit code of a worker whose server has threads or has initialised CUDA, which forks lack.
UNSAFE = 77
REFUSED: set[str] = set()  # packages that no server imports, as they broke one

# Written before a fork, and read in it. None if the server did not import this file.
_server_is_unsafe: bool | None = None


def _look_at_server() -> None:
    global _server_is_unsafe
    _server_is_unsafe = threading.active_count() > 1 or torch.cuda.is_initialized()


os.register_at_fork(before=_look_at_server)
_starting = threading.Lock()  # the environment of this process changes while a server starts
os.register_at_fork(after_in_child=_starting._at_fork_reinit)  # type: ignore[attr-defined]
# A key is the packages that a server has imported.
_servers: dict[frozenset[str], forkserver.ForkServer] = {}
os.register_at_fork(after_in_child=_servers.clear)  # a forked process starts its own servers


def _server(packages: frozenset[str]) -> forkserver.ForkServer:
    """Return the server of this process that has imported some packages, under the lock."""
    if packages not in _servers:
        own = forkserver.ForkServer()
        own.set_forkserver_preload([__name__, *sorted(packages)])
        # Before Python 3.14, the server does not get sys.path before it imports (cpython 117378).
        # No working directory comes before it, where an uncompiled checkout may lie, but in 3.10.
        path = os.pathsep.join(x or os.getcwd() for x in sys.path if isinstance(x, str))
        with environment({"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}):
            own.ensure_running()
        _servers[packages] = own
    return _servers[packages]


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment in a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def replace_servers() -> None:
    """Fork no more workers from the present servers. Each ends with its last worker."""

    def stop(server: Any) -> None:
        with contextlib.suppress(OSError):  # the server has ended, and this host has waited for it
            server._stop()

    with _starting:
        while _servers:
            server = _servers.popitem()[1]
            threading.Thread(target=stop, args=(server,), daemon=True).start()


def packages_of(module: nn.Module) -> set[str]:
    """Return the packages of a module's classes, and the imports of the main script for its own."""
    found = {type(part).__module__ for part in module.modules()}
    if "__main__" in found:
        for value in list(vars(sys.modules["__main__"]).values()):  # other threads may add some
            attribute = "__name__" if isinstance(value, types.ModuleType) else "__module__"
            name = getattr(value, attribute, None)
            found.add(name if isinstance(name, str) else "")
    known = {"", "__main__", "torch", "coded_torch", *sys.stdlib_module_names}
    return {name for name in found if name.partition(".")[0] not in known}


def fork(
    sock: socket.socket, device: torch.device, threads: int, seed: int, packages: frozenset[str]
) -> int:
    """Have a worker forked that serves a socket, from a server that has imported packages.

    Returns a descriptor, from which :func:`multiprocessing.forkserver.read_signed` reads the
    process id, and later the exit code. It ends early if the server does.
    """
    data = spawn.get_preparation_data("worker")
    kept = {name: data[name] for name in ("sys_path", "sys_argv", "orig_dir", "dir")}
    names = {"init_main_from_name", "init_main_from_path"} & data.keys()
    main = {} if shared_memory.is_interactive() else {name: data[name] for name in names}
    with contextlib.ExitStack() as spare:
        for _ in range(_SPARE_DESCRIPTORS):
            spare.callback(os.close, os.dup(sock.fileno()))
    # Ctrl-C, and SIGTERM to a whole group, are meant for the caller's process: the server and its
    # forks inherit this mask. The tracker would unblock the signals if it were started later.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        with _starting:
            descriptor, writer = _server(packages).connect_to_new_process([sock.fileno()])
            variables = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    except ChildProcessError:  # the host has waited for the server, which has ended
        replace_servers()
        raise
    with open(writer, "wb") as stream:
        program = _Program(main, device, threads, seed, variables, bool(packages))
        reduction.dump(kept, stream)
        reduction.dump(program, stream)
    return descriptor


class _Program(NamedTuple):
    """The program of a worker. :func:`multiprocessing.spawn._main` calls :meth:`_bootstrap`."""

    main: dict[str, str]
    device: torch.device
    threads: int
    seed: int
    variables: dict[str, str | None]  # variables of the environment that the server has changed
    preloaded: bool  # true if the server had to import packages

    def _bootstrap(self, _: int) -> int:
        if _server_is_unsafe or (_server_is_unsafe is None and self.preloaded):
            return UNSAFE
        _set(self.variables)
        signal.signal(signal.SIGTERM, functools.partial(_end_fork, os.getpid()))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        descriptors: Any = forkserver.get_inherited_fds()
        connection = Connection(socket.socket(fileno=descriptors[0]))
        shared_memory.is_interactive = lambda: not self.main
        shared_memory.import_main = functools.cache(lambda: _import_main(self.main))
        try:
            self.run(connection)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            util._flush_std_streams()  # type: ignore[attr-defined]
        return 0

    def run(self, connection: Connection) -> None:
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
                number, result = message.number, modules.call(message.value)
                del message  # the answer says that its memory can be used again
                connection.send(RESULT, number, result)


def _end_fork(worker: int, number: int, _: Any) -> None:
    """Let SIGTERM end the processes of a module, but no worker, which ends with its pool."""
    if os.getpid() != worker:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _end_with(connection: Connection) -> None:
    """End this process when the other side of the connection has ended, even during a call."""
    poll = select.poll()
    poll.register(connection.socket, 0)
    poll.poll()
    os._exit(0)


def _import_main(preparation: dict[str, Any]) -> None:
    """Import the main script, if there is one. Pools that it would start read the mark."""
    process: Any = multiprocessing.current_process()
    process._inheriting = True
    try:
        spawn.prepare(preparation)
    finally:
        del process._inheriting


# Modules: the caller packs them once, the workers load and call them. Ray's actors do, too.

# An exception in words, and itself with its traceback; as a RuntimeError if it cannot travel.
_Failure = tuple[str, Exception]
# The heads of jobs are mostly the same. Pickling one takes 10 us, and so does reading it.
_dumps = functools.lru_cache(maxsize=64)(pickle.dumps)
_loads = functools.lru_cache(maxsize=64)(pickle.loads)


class PackedModule(NamedTuple):
    """The module of a request: the data that all its jobs share."""

    number: int  # the number of the module in its present state
    package: Any  # the module, as it is sent
    alive: frozenset[int]  # the numbers of all modules that may still be needed
    head: bytes  # the pickle of number, alive and the caller's modes

    def job(self, task: Task, part: Part) -> tuple[Any, ...]:
        """Return the contents of a job, which :meth:`LoadedModules.call` reads."""
        return self.head, part.fault, task.payload(part.units)


class ModuleStore:
    """The modules that ``pack`` has packed, each until it changes or nothing else holds it."""

    def __init__(self, pack: Callable[[nn.Module], Any]) -> None:
        self._make, self._lock, self._numbers = pack, threading.Lock(), itertools.count()
        # module -> (its fingerprint, its number, the package, its tensors)
        self._packed: Any = WeakIdKeyDictionary()

    def pack(self, module: nn.Module, ambient: Ambient) -> PackedModule:
        """Return the module in its present state, for a caller with these modes."""
        tensors, how = fingerprint(module)
        with self._lock:
            packed = self._packed.get(module)
            if packed is None or packed[0] != how:
                try:
                    package = self._make(module)
                except (pickle.PicklingError, AttributeError, TypeError) as error:
                    must = "the module must be picklable to be sent to another process"
                    got = f"{type(module).__name__}: {error}"
                    raise TypeError(f"Workers: {must}, got {got}") from error
                packed = self._packed[module] = how, next(self._numbers), package, tensors
            alive = frozenset(number for _, number, *_ in self._packed.values())
            _, number, package, _ = packed
            return PackedModule(number, package, alive, _dumps((number, alive, ambient)))

    def last(self) -> tuple[int, Any] | None:
        """Return the number and the package of the newest module; None while one is packed."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            entries = [entry[1:3] for entry in self._packed.values()]
        finally:
            self._lock.release()
        return max(entries, default=None, key=operator.itemgetter(0))

    def forget(self, module: nn.Module) -> None:
        with self._lock:
            self._packed.pop(module, None)


def set_up(threads: int, seed: int) -> None:
    """Set the number of threads of this worker, and seed its random numbers."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class LoadedModules:
    """The modules that a worker was sent, or the errors of unusable ones.

    They compute on ``device``, and ``pack`` makes their results ready to be sent.
    """

    def __init__(self, device: torch.device, pack: Callable[[Any], Any]) -> None:
        self.device, self._pack = device, pack
        self._modules: dict[int, nn.Module | _Failure] = {}

    def add(self, number: int, read: Callable[[], nn.Module]) -> None:
        if number not in self._modules:
            try:
                self._modules[number] = read().to(self.device)
            except Exception as error:
                self._modules[number] = _failure(error)

    def call(self, read: Callable[[], Any]) -> Any:
        """Do a :meth:`PackedModule.job`; return, packed, whether it succeeded, and its result."""
        try:
            head, fault, arguments = read()
            number, alive, ambient = _loads(head)
            for gone in self._modules.keys() - alive - {number}:
                del self._modules[gone]
            module = self._modules[number]
            if isinstance(module, tuple):
                return self._pack((False, module))
            with ambient.restored(self.device):
                if self.device.type != "cpu":
                    arguments = pytree.tree_map_only(Tensor, lambda x: x.to(self.device), arguments)
                return self._pack((True, compute(module, arguments, fault, kill_own_process)))
        except Exception as cause:
            return self._pack((False, _failure(cause)))


def _failure(cause: Exception) -> _Failure:
    what = "".join(traceback.format_exception_only(cause)).strip()
    sent: Any = ExceptionWithTraceback(cause, cause.__traceback__)
    made = _Remade(cause, vars(cause)), _Remade(cause, {})
    for error in (cause, *made, RuntimeError(what)):  # the first that can travel
        sent.exc = error
        with contextlib.suppress(Exception):
            copy = pickle.loads(pickle.dumps(sent))
            if error is cause or str(copy) == str(cause):
                break
    return what, sent


class _Remade(NamedTuple):
    """An exception that is pickled without its constructor, which may take other arguments."""

    error: Exception
    state: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self.error), self.error.args, self.state)


def _remake(kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)  # no setter of the class runs
    return error
