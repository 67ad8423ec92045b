r"""Worker processes: how they are forked, their program, and modules on both sides.

They are forks of a server that has imported this package, so that they start in milliseconds. There
is a server for each set of packages to import. The server of :mod:`multiprocessing` would not do:
the whole process shares it and its packages, and its socket has a file, which stays after a kill.

Workers outlive their server. A server and its workers are one process group. As soon as the process
that started them has ended, any of them that is not stopped ends the whole group.
"""

import contextlib
import contextvars
import dataclasses
import functools
import gc
import importlib
import itertools
import math
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
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import spawn, util
from multiprocessing.connection import wait
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from .._changes import fingerprint
from .._extension import lane
from .._loaded import load_all
from .._torch import random_numbers_kept
from . import _shared_memory
from ._base import InjectedCrash, compute, logger
from ._live import Ambient, Work
from ._shared_memory import pack, unpack
from ._untuned import ENDING_SECONDS, FORK_SECONDS, IMPORT_SECONDS, SEND_SECONDS

# Kinds of messages. The server sends the last two: the process id of a worker, and its exit code.
READY, MODULE, LOADED, PART, RESULT, ALIVE, FORKED, ENDED = range(8)
# Ctrl-C, and SIGTERM to a whole group, are meant for the caller's process.
_OF_CALLER = signal.SIGINT, signal.SIGTERM
REFUSED: set[str] = set()  # packages that no server imports, as they broke one

_starting = threading.Lock()  # held while a server starts
os.register_at_fork(after_in_child=_starting._at_fork_reinit)  # type: ignore[attr-defined]


@dataclasses.dataclass(eq=False)
class Server:
    """A server, from the side of the process that started it."""

    pid: int
    requests: socket.socket
    is_up: bool = False  #: true if it is known to have imported its packages
    is_silent: bool = False  #: true if it did not tell in time how a worker has ended
    status: int | None = None  #: the exit code, once it has ended; 0 if the host has waited for it

    def ask(self, program: int, sock: int) -> float:
        """Ask for a worker, and return until when it must be forked; infinite during imports."""
        with contextlib.suppress(OSError):
            self.is_up = self.is_up or bool(self.requests.recv(1, socket.MSG_DONTWAIT))
        with self.requests.dup() as link:
            link.settimeout(FORK_SECONDS if self.is_up else SEND_SECONDS)
            try:
                socket.send_fds(link, [b"!"], [program, sock])
            except TimeoutError:
                self.kill()
                raise
        if self.is_up:
            return time.monotonic() + FORK_SECONDS
        return math.inf

    def has_ended(self) -> bool:
        """Return whether the server has ended, and note its exit code."""
        if self.status is None:
            try:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                if ended:
                    self.status = os.waitstatus_to_exitcode(status)
            except ChildProcessError:
                self.status = 0
        return self.status is not None

    def was_killed(self) -> bool:
        return self.has_ended() and self.status == -signal.SIGKILL

    def kill(self) -> None:
        """End the server, perhaps while it imports, or is stopped. Its workers go on."""
        self.is_silent = True
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)

    def told(self, connection: Any) -> int | None:
        """Wait for the exit code of a worker that has ended; return None if it does not come."""
        while wait([connection], 0.0 if self.is_silent else ENDING_SECONDS):
            said = connection.receive()
            if said is None or said.kind == ENDED:
                return None if said is None else int(said.number)
        self.is_silent = True
        return None


# By the packages that a server has imported.
_servers: dict[frozenset[str], Server] = {}
os.register_at_fork(after_in_child=_servers.clear)  # a forked process starts its own servers


def _server(packages: frozenset[str]) -> Server:
    """Return the server with these packages, which is started if there is none."""
    for key, server in list(_servers.items()):
        if server.has_ended():
            del _servers[key]
            server.requests.close()
    if packages in _servers:
        return _servers[packages]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, open(os.pidfd_open(os.getpid()), "rb") as caller:
        # No working directory, where an uncompiled checkout may lie.
        path = [x or os.getcwd() for x in sys.path if isinstance(x, str)]
        options = theirs.fileno(), caller.fileno(), sorted(packages)
        program = f"import sys; sys.path = {path}; import {__name__} as main; main.serve{options}"
        interpreter: list[Any] = spawn.get_command_line()[:-3]  # with its flags
        command = [*interpreter, "-c", program]
        passed = sorted([theirs.fileno(), caller.fileno()])
        _servers[packages] = Server(util.spawnv_passfds(command[0], command, passed), ours)
    return _servers[packages]


def _end_servers() -> None:
    """End the servers with this process, even those that import: they hold its output open."""
    for server in _servers.values():
        server.kill()


weakref.finalize(_end_servers, _end_servers)  # at exit, after the pools, which are made later


def serve(requests: int, caller: int, packages: list[str]) -> None:
    """Run a server: import packages, then fork a worker per request and tell how each ends."""
    os.setpgid(0, 0)
    for number in _OF_CALLER:  # a package may unblock them
        signal.signal(number, signal.SIG_IGN)
    # If a server ends while a worker is stopped, the kernel sends this to their whole group.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(IMPORT_SECONDS)  # ends even a server that hangs in compiled code
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # workers do not read the caller's terminal
    for package in packages:
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    signal.alarm(0)
    _flush()
    if threading.active_count() > 1 or torch.cuda.is_initialized():
        os._exit(0)  # forks would lack them
    asked = socket.socket(fileno=requests)
    asked.send(b"!", socket.MSG_NOSIGNAL)  # it is up
    ring, bell = os.pipe()  # rings when a worker has ended
    os.set_blocking(bell, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(bell)
    heard = [caller, requests, ring]
    workers: dict[int, Any] = {}  # their ends of the connections, by process id
    while requests in heard or workers:
        ready = wait(heard)
        if caller in ready:
            os.killpg(0, signal.SIGKILL)
        if ring in ready:
            os.read(ring, 4096)
        for pid in list(workers):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                link = workers.pop(pid)
                link.tell(ENDED, os.waitstatus_to_exitcode(status))
                link.close()
        if requests in ready:
            try:
                data, given, *_ = socket.recv_fds(asked, 1, 2)
            except ConnectionError:  # the caller has closed it before it read that this is up
                data, given = b"", []
            if not data:
                heard.remove(requests)
            with contextlib.suppress(OSError, ValueError):  # processes or descriptors are short
                program, sock = given
                pid = os.fork()
                if not pid:
                    others = [link.fileno() for link in workers.values()]
                    _work(sock, program, caller, (requests, ring, bell, *others))
                workers[pid] = lane.Connection(given.pop(), lane.Blocks())
                workers[pid].tell(FORKED, pid)
            for descriptor in given:
                os.close(descriptor)
    os._exit(0)


def fork(
    sock: socket.socket, packages: frozenset[str], device: torch.device, *options: Any
) -> tuple[Server, float]:
    """Have a worker forked that serves a socket, by a server that has imported packages.

    Return the server, and the time until which it has to tell the process id of the worker. It
    tells that and, later, the exit code by the same socket, and closes it if there is no fork. The
    options are the fields of a :class:`_Program` after its device.
    """
    data = spawn.get_preparation_data("worker")
    kept = {name: data[name] for name in ("sys_path", "sys_argv", "orig_dir", "dir")}
    names = {"init_main_from_name", "init_main_from_path"} & data.keys()
    main = {}
    if not _shared_memory.is_interactive():
        main = {name: data[name] for name in names}
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_CALLER)  # the server inherits this mask
    with open(os.memfd_create("program"), "w+b") as program:
        pickle.dump((kept, _Program(main, device, *options)), program)
        program.seek(0)
        with _starting:
            server = _server(packages)
        return server, server.ask(program.fileno(), sock.fileno())


def _work(sock: int, program: int, caller: int, others: Iterable[int]) -> None:
    """Run a worker in this process, which was just forked. Close other descriptors first."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for descriptor in others:
            os.close(descriptor)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, functools.partial(_end_fork, os.getpid()))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        with open(program, "rb") as file:
            preparation, worker = pickle.load(file)
        spawn.prepare(preparation)
        worker.run(sock, caller)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # there is none, or it is closed
            stream.flush()


class _Program(NamedTuple):
    """The program of a worker."""

    main: dict[str, str]
    device: torch.device
    threads: int
    seed: int
    beat: float  # seconds between two signs of life

    def run(self, sock: int, caller: int) -> None:
        """Load modules and compute parts until the connection ends."""
        blocks = lane.Blocks()
        connection = lane.Connection(sock, blocks)
        _shared_memory.is_interactive = lambda: not self.main
        _shared_memory.import_main = functools.cache(lambda: _import_main(self.main))
        threading.Thread(target=self.watch, args=(connection, caller), daemon=True).start()
        set_up(self.threads, self.seed)
        gc.freeze()  # the objects that exist now stay: no collection needs to look at them
        modules = LoadedModules(self.device, lambda value: pack(value, blocks))
        with contextlib.suppress(ConnectionError):
            connection.send(READY, os.getpid())
            while message := connection.receive():
                kind = message.kind
                number = message.number
                if kind == MODULE:
                    modules.add(number, functools.partial(unpack, message))
                    connection.send(LOADED, number)
                    continue
                result = modules.call(functools.partial(unpack, message))
                del message  # the answer says that its memory can be used again
                connection.send(RESULT, number, result)

    def watch(self, connection: Any, caller: int) -> None:
        """Give signs of life, and end this process with its connection, even during a call."""
        poll = select.poll()
        poll.register(connection, 0)
        poll.register(caller, select.POLLIN)
        while not (events := poll.poll(1000 * self.beat)):
            connection.tell(ALIVE)
        if caller in dict(events):
            os.killpg(0, signal.SIGKILL)
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
# The heads of parts are mostly the same. Pickling one takes 10 us, and so does reading it.
_dumps = functools.lru_cache(maxsize=64)(pickle.dumps)
_loads = functools.lru_cache(maxsize=64)(pickle.loads)


class PackedModule(NamedTuple):
    """The module of a request: the data that all its parts share."""

    number: int  # the number of the module in its present state
    package: Any  # the module, as it is sent; of a `ModuleStore`, the Work that packs it
    alive: frozenset[int]  # the numbers of all modules that may still be needed
    head: bytes  # the pickle of number, alive and the caller's modes

    def contents(self, part: Any) -> tuple[Any, ...]:
        """Return the contents of a part, which :meth:`LoadedModules.call` reads."""
        return self.head, part.fault, part.request.task.payload(part.units)


class ModuleStore:
    """The modules that ``pack`` has packed, each until it changes or nothing else holds it."""

    def __init__(self, pack: Callable[[nn.Module], Any]) -> None:
        self._make, self._numbers = pack, itertools.count()
        self._lock = threading.Lock()
        self._packing = threading.Lock()  # held while one is packed, which may take seconds
        # The id of a module -> (its fingerprint, its number, the package, its tensors, itself)
        self._packed: dict[int, tuple[Any, int, Any, Any, weakref.ref[nn.Module]]] = {}

    def pack(self, module: nn.Module, ambient: Ambient) -> PackedModule:
        """Return the module in its present state, for a caller with these modes.

        A thread packs it, as a caller may have a deadline.
        """
        (tensors, how), key = fingerprint(module), id(module)
        packed = self._packed.get(key)
        if packed is None or (packed[0] is not how and packed[0] != how):
            with self._lock:
                packed = self._packed.get(key)  # another thread may have begun
                if packed is None or packed[0] != how:
                    number = next(self._numbers)
                    make = functools.partial(self._pack, module, number, ambient)
                    make = functools.partial(contextvars.copy_context().run, make)
                    package = Work(make, "coded_torch packs")
                    gone = functools.partial(_forget, weakref.ref(self), key)
                    packed = how, number, package, tensors, weakref.ref(module, gone)
                    self._packed[key] = packed
        number, alive = packed[1], frozenset([entry[1] for entry in [*self._packed.values()]])
        return PackedModule(number, packed[2], alive, _dumps((number, alive, ambient)))

    def _pack(self, module: nn.Module, number: int, ambient: Ambient) -> Any:
        """Pack a module, or raise a TypeError with a remedy if it cannot be pickled."""
        try:
            with self._packing, ambient.restored(ambient.default_device):
                return self._make(module)
        except BaseException as error:
            with self._lock:  # the next call tries again
                packed = self._packed.get(id(module))
                if packed is not None and packed[1] == number:
                    del self._packed[id(module)]
            if not isinstance(
                error, (pickle.PicklingError, AttributeError, TypeError, RuntimeError)
            ):
                raise
            requirement = "the module must be picklable to be sent to another process"
            remedy = "or be made there, by coded_torch.nn.FromFactory"
            got = f"{type(module).__name__}: {' '.join(str(error).split())}"
            if any(isinstance(part, torch.fx.GraphModule) for part in module.modules()):
                got += ". Wrap what torch.export returns: coded_torch.nn.Program(exported)."
            elif any(map(parametrize.is_parametrized, module.modules())):
                got += ". Try torch.nn.utils.parametrize.remove_parametrizations."
            raise TypeError(f"Workers: {requirement}, {remedy}, got {got}") from error

    def last(self) -> tuple[int, Any] | None:
        """Return the number and the package of the newest module that is packed, if any."""
        done = [entry for entry in [*self._packed.values()] if entry[2].done()]
        newest = max(done, default=None, key=operator.itemgetter(1))
        return newest and (newest[1], newest[2].result())

    def forget(self, module: nn.Module) -> None:
        self._packed.pop(id(module), None)


def _forget(store: weakref.ref[ModuleStore], key: int, _: Any) -> None:
    kept = store()
    if kept is not None:
        kept._packed.pop(key, None)


def set_up(threads: int, seed: int) -> None:
    """Set the number of threads of this worker, and seed its random numbers."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Go on with the random numbers of this process after a block that may seed them.

    Scripts seed them where workers import them, so that all workers would draw the same numbers.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with random_numbers_kept(devices):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


class LoadedModules:
    """The modules that a worker was sent, or errors; ``pack`` makes results ready to be sent."""

    def __init__(self, device: torch.device, pack: Callable[[Any], Any]) -> None:
        self.device, self._pack = device, pack
        self._modules: dict[int, nn.Module | _Failure] = {}
        self._versions = dict[int, dict[str, Any]]()  # of the tensors, until the first call

    def add(self, number: int, read: Callable[[], nn.Module]) -> None:
        """Load a module that was sent, or note why it cannot be loaded."""
        if number not in self._modules:
            try:
                with _random_numbers_kept(self.device):
                    module = read().to(self.device)
                    load_all(module)
                self._modules[number] = module
                self._versions[number] = _versions(module)
            except Exception as error:
                self._modules[number] = _failure(error)

    def call(self, read: Callable[[], Any]) -> Any:
        """Compute a :meth:`PackedModule.part`. Return whether that succeeded, and the result."""
        try:
            head, fault, arguments = read()
            number, alive, ambient = _loads(head)
            for gone in self._modules.keys() - alive - {number}:
                del self._modules[gone]
            module = self._modules[number]
            if isinstance(module, tuple):
                return self._pack((False, module))
            if torch.get_default_dtype() is not ambient.default_dtype:
                # of this process: here are no others
                torch.set_default_dtype(ambient.default_dtype)
            with ambient.restored(self.device):
                if self.device.type != "cpu":
                    arguments = tree_map_only(Tensor, lambda x: x.to(self.device), arguments)
                value = compute(module, arguments, fault)
            if arguments is not None and number in self._versions:
                _warn_of_changes(module, self._versions.pop(number))
            return self._pack((True, value))
        except InjectedCrash:
            os.kill(os.getpid(), signal.SIGKILL)  # as a crash of compiled code would
        except Exception as cause:
            return self._pack((False, _failure(cause)))


def _versions(module: nn.Module) -> dict[str, Any]:
    """Return what differs, by name, once a parameter or a buffer is written or replaced."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: (id(x), x._version) for name, x in tensors if not x.is_inference()}


def _warn_of_changes(module: nn.Module, before: dict[str, Any]) -> None:
    """Warn of tensors that the module wrote in its first call: each worker has its own copy."""
    after = _versions(module)
    changed = [name for name, version in before.items() if after.get(name, version) != version]
    if changed:
        text = (
            "%s changes %s in its calls. Each worker changes a copy of its own, so answers may "
            "depend on which worker computes them"
        )
        logger.warning(text, type(module).__name__, ", ".join(changed[:3]))


def _failure(cause: Exception) -> _Failure:
    """Return an exception in words, and in a form that can be pickled."""
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
        kind = type(self.error)
        return kind.__new__, (kind, *self.error.args), self.state
