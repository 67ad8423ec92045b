r"""Worker processes: how they are forked, their program, and modules on both sides.

They are forks of a server that has imported this package, so that they start in milliseconds. The
server is a private :class:`multiprocessing.forkserver.ForkServer`, since the packages that the
public one imports are a setting of the whole process. The server ends when the process that
started it has ended, and ends its workers, stopped ones too.
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
import tempfile
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterable
from multiprocessing import forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .._torch import fingerprint
from ..table import Part
from . import shared_memory
from .base import Task
from .faults import compute, kill_own_process
from .live import Ambient
from .shared_memory import Connection, Pickled

READY, MODULE, LOADED, JOB, RESULT, ALIVE = range(6)  # kinds of messages
# Descriptors that must be free: a request takes 5, and one that is cut short ends the server.
_SPARE_DESCRIPTORS = 8
# The exit code of a worker whose server has threads or has initialised CUDA, which forks lack.
UNSAFE = 77
REFUSED: set[str] = set()  # packages that no server imports, as they broke one
# The begin of a server's program. Before Python 3.14, the server gets no sys.path before it imports
# (cpython 117378). Every 2 s, for some microseconds, it looks whether its caller has ended. Then it
# ends its workers, as a stopped one cannot do that itself, and at last itself.
_PROGRAM = """
import sys
sys.path = {path}
import os, signal
def look(*_):
    if os.getppid() != {caller}:
        with open(f"/proc/self/task/{{os.getpid()}}/children") as file:
            pids = file.read().split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        if not pids:
            os._exit(0)
signal.signal(signal.SIGALRM, look)
signal.siginterrupt(signal.SIGALRM, False)  # some libraries cannot be interrupted
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
signal.setitimer(signal.ITIMER_REAL, 0.001, 2.0)
"""

# Written before a fork, and read in it. None if the server did not import this file.
_server_is_unsafe: bool | None = None


def _look_at_server() -> None:
    global _server_is_unsafe
    _server_is_unsafe = threading.active_count() > 1 or torch.cuda.is_initialized()


os.register_at_fork(before=_look_at_server)
_starting = threading.Lock()  # held while a server starts
os.register_at_fork(after_in_child=_starting._at_fork_reinit)  # type: ignore[attr-defined]
# A key is the packages that a server has imported.
_servers: dict[frozenset[str], _Server] = {}
os.register_at_fork(after_in_child=_servers.clear)  # a forked process starts its own servers


class _Server(forkserver.ForkServer):
    """A server whose socket has lost its file: a file would stay after a kill of this process.

    Both sides reach the socket through descriptors, since a path may have 107 bytes at most.
    """

    def __init__(self, packages: Iterable[str]) -> None:
        super().__init__()
        self.set_forkserver_preload([__name__, *sorted(packages)])

    def ensure_running(self: Any) -> None:
        with contextlib.ExitStack() as starting:

            def address(_: str) -> str:
                folder = starting.enter_context(tempfile.TemporaryDirectory(prefix="coded_torch-"))
                starting.callback(os.close, place := os.open(folder, os.O_PATH))
                return f"/proc/self/fd/{place}/socket"

            def spawn_server(executable: Any, arguments: Any, descriptors: Any) -> int:
                # No working directory, where an uncompiled checkout may lie.
                path = [x or os.getcwd() for x in sys.path if isinstance(x, str)]
                arguments[-1] = _PROGRAM.format(path=path, caller=os.getpid()) + arguments[-1]
                return util.spawnv_passfds(executable, arguments, descriptors)

            # The method of the class with other functions, which no other server gets.
            before, method = self._forkserver_pid, forkserver.ForkServer.ensure_running
            utilities = vars(util) | {"spawnv_passfds": spawn_server}
            names = {"util": types.SimpleNamespace(**utilities)}
            names["connection"] = types.SimpleNamespace(arbitrary_address=address)
            types.FunctionType(method.__code__, vars(forkserver) | names)(self)
            if self._forkserver_pid != before:
                file = os.open(self._forkserver_address, os.O_PATH)
                self._forkserver_address = f"/proc/self/fd/{file}"
                weakref.finalize(self, os.close, file)


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


def fork(sock: socket.socket, packages: frozenset[str], device: torch.device, *options: Any) -> int:
    """Have a worker forked that serves a socket, from a server that has imported packages.

    The options are the fields of a :class:`_Program` after its device. Returns a descriptor, from
    which :func:`multiprocessing.forkserver.read_signed` reads the process id, and later the exit
    code. It ends early if the server does.
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
            server = _servers.setdefault(packages, _Server(packages))
            descriptor, writer = server.connect_to_new_process([sock.fileno()])
    except ChildProcessError:  # the host has waited for the server, which has ended
        replace_servers()
        raise
    with open(writer, "wb") as stream:
        program = _Program(main, bool(packages), os.getpid(), device, *options)
        reduction.dump(kept, stream)
        reduction.dump(program, stream)
    return descriptor


class _Program(NamedTuple):
    """The program of a worker. :func:`multiprocessing.spawn._main` calls :meth:`_bootstrap`."""

    main: dict[str, str]
    preloaded: bool  # true if the server had to import packages
    caller: int  # the id of the process that has the pool
    device: torch.device
    threads: int
    seed: int
    beat: float  # seconds between two signs of life

    def _bootstrap(self, _: int) -> int:
        if _server_is_unsafe or (_server_is_unsafe is None and self.preloaded):
            return UNSAFE
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
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
        threading.Thread(target=self.watch, args=(connection,), daemon=True).start()
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

    def watch(self, connection: Connection) -> None:
        """Give signs of life, and end this process with its caller, even during a call."""
        poll = select.poll()
        poll.register(connection.socket, 0)
        with contextlib.suppress(AttributeError, OSError):  # not every system has it
            # A process that the caller forked keeps the connection open.
            poll.register(os.pidfd_open(self.caller), select.POLLIN)
        while not poll.poll(1000 * self.beat):
            connection.beat(ALIVE)
        os._exit(0)


def _end_fork(worker: int, number: int, _: Any) -> None:
    """Let SIGTERM end the processes of a module, but no worker, which ends with its pool."""
    if os.getpid() != worker:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


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
        self._packing = threading.Lock()  # held while one is packed, which may take seconds
        # module -> (its fingerprint, its number, the package, its tensors)
        self._packed: Any = WeakIdKeyDictionary()

    def pack(self, module: nn.Module, ambient: Ambient) -> PackedModule:
        """Return the module in its present state, for a caller with these modes."""
        tensors, how = fingerprint(module)
        if (packed := self._find(module, how)) is None:
            with self._packing:
                if (packed := self._find(module, how)) is None:
                    try:
                        package = self._make(module)
                    except (pickle.PicklingError, AttributeError, TypeError) as error:
                        must = "the module must be picklable to be sent to another process"
                        got = f"{type(module).__name__}: {error}"
                        raise TypeError(f"Workers: {must}, got {got}") from error
                    packed = how, next(self._numbers), package, tensors
                    with self._lock:
                        self._packed[module] = packed
        with self._lock:
            alive = frozenset(number for _, number, *_ in self._packed.values())
        _, number, package, _ = packed
        return PackedModule(number, package, alive, _dumps((number, alive, ambient)))

    def _find(self, module: nn.Module, how: Any) -> Any:
        with self._lock:
            packed = self._packed.get(module)
        return packed if packed is not None and packed[0] == how else None

    def last(self) -> tuple[int, Any] | None:
        """Return the number and the package of the newest module, if there is one."""
        with self._lock:
            entries = [entry[1:3] for entry in self._packed.values()]
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
