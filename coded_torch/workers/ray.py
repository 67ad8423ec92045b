r"""Workers on other machines: the actors of a Ray cluster."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .._logging import sparing_logger
from ._supervised.machine import Job, Machine
from ._supervised.pickles import Pickled, TensorPickler, aligned, cloud_pickler, unpickled
from ._supervised.pool import SupervisedWorkers
from ._supervised.supervisor import Supervisor
from ._supervised.worker_main import LoadedModules, set_up

__all__ = ["RayWorkers"]

logger = sparing_logger("coded_torch.workers")

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # at 0, Ray binds all sockets to 127.0.0.1

# A pickle, and the bytes of its tensors as arrays, each of which Ray writes once to its store.
Packed = tuple[bytes, list[Any]]


class RayWorkers(SupervisedWorkers):
    r"""An actor per worker, on as many machines as a Ray cluster has.

    As :class:`~coded_torch.workers.ProcessWorkers`, but for where the workers are: any of them
    takes any part, one that dies or takes longer than ``grace`` is replaced, the module is sent
    once, and gradients do not pass. Modules that are defined in a script or a session need not be
    importable elsewhere.

    Needs the extra ``ray``: ``pip install 'coded_torch[ray]'``.

    A cluster of its own listens on the loopback interface only, if this pool is what imports Ray:
    it then sets ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`` before, which Ray reads at its import only
    (set it yourself where you import Ray first). Otherwise, and in a cluster that is joined, the
    processes of Ray listen on every interface, for anything that reaches this machine.

    Args:
        num_workers: how many actors.
        address: of the cluster, as :func:`ray.init` takes it. None: the one that this process is
            connected to, else one of its own on this machine, without dashboard and usage report;
            it ends with the last pool that uses it. A process is in one cluster at a time.
        threads: how many threads each actor uses for one operation.
        grace: seconds that a part may take, as for processes, but loading the module included.
        timeout: seconds after which a part that was asked for and has not replied has failed.
        max_requests: how many requests may be served at once; the parts of others wait for room.
        actor_options: what Ray is to know of each actor, such as ``num_gpus=1``, ``resources``,
            ``scheduling_strategy``; by default ``num_cpus=0``, so that any number of them runs
            anywhere. With ``num_gpus``, the actor computes on the first of them.

    Raises:
        ImportError: Ray is not installed.
        TypeError: an argument is of another kind than said.
        ValueError: a number is not positive.

    Starting raises:
        RuntimeError: this process is in another cluster.

    Note:
        Some milliseconds a request, ten times what processes take on one machine. Ray restarts no
        actor: this pool does, as it knows sooner. An actor of which Ray itself hears nothing (one
        that is stopped) is ended after ``grace``.

    Example:
        .. code-block:: python

            import torch
            from coded_torch.codes import KernelCode
            from coded_torch.nn import CodedWrapper
            from coded_torch.workers import RayWorkers

            with RayWorkers(6, address="auto", num_gpus=1).start() as workers, torch.no_grad():
                coded = CodedWrapper(torch.nn.Linear(3, 2), KernelCode(4, 6), workers=workers)
                print(coded(torch.randn(8, 3)).shape)
    """

    def __init__(
        self,
        num_workers: int,
        *,
        address: str | None = None,
        threads: int = 1,
        grace: float = 30.0,
        timeout: float = 600.0,
        max_requests: int = 64,
        **actor_options: Any,
    ) -> None:
        if address is None and "ray" not in sys.modules:
            os.environ.setdefault(_LOOPBACK, "0")
        _ray()
        self.address = address
        self.actor_options = {"num_cpus": 0, **actor_options}
        super().__init__(
            num_workers, threads=threads, grace=grace, timeout=timeout, max_requests=max_requests
        )

    def _make_supervisor(self) -> Supervisor:
        return _Actors(self.num_workers, self.grace, self.address, self.threads, self.actor_options)


class _Actor(Machine):
    """One actor."""

    def __init__(self, index: int, handle: Any) -> None:
        super().__init__(index)
        self.handle = handle

    def __str__(self) -> str:
        return f"actor {self.index} (process {self.pid})" if self.pid else f"actor {self.index}"


class _Actors(Supervisor):
    """The actors of a pool. What Ray reports comes through a queue."""

    noun = "actors"

    def __init__(
        self,
        size: int,
        grace: float,
        address: str | None,
        threads: int,
        options: dict[str, Any],
    ) -> None:
        super().__init__(size, grace)
        self._news: queue.SimpleQueue[tuple[_Actor, int | None, Any] | None] = queue.SimpleQueue()
        self._threads = threads
        self._class = _ray().remote(
            concurrency_groups={"end": 1}, max_restarts=0, max_task_retries=0, **options
        )(_actor_class())
        self._cluster = _Cluster.join(address, self)  # last: it is left when these end

    def pack(self, module: nn.Module) -> Any:
        self._cluster.check()
        return [_ray().put(_pack(module))]  # in a list, or Ray would resolve it in every call

    def launch(self, index: int) -> Machine:
        try:
            self._cluster.check()
        except RuntimeError as error:
            self.refuse(str(error))
            raise
        machine = _Actor(index, self._class.remote(self._threads, self.seed(index)))
        self._listen(machine, None, machine.handle.hello.remote())
        return machine

    def send(self, machine: Machine, job: Job) -> None:
        assert isinstance(machine, _Actor)
        self._cluster.check()
        packed = _pack(job.contents())
        machine.load(job.module)
        reply = machine.handle.call.remote(job.module.number, job.module.package, *packed)
        self._listen(machine, job.number, reply)

    def end(self, machine: Machine) -> None:
        assert isinstance(machine, _Actor)
        # An actor whose cluster has ended, or that Ray does not know any more, has ended.
        with contextlib.suppress(RuntimeError, _ray().exceptions.ActorHandleNotFoundError):
            self._cluster.check()
            _ray().kill(machine.handle, no_restart=True)

    def wait(self, seconds: float) -> None:
        try:
            news = self._news.get(timeout=seconds)
        except queue.Empty:
            return
        while news is not None:
            self._hear(*news)
            try:
                news = self._news.get_nowait()
            except queue.Empty:
                return

    def wake(self) -> None:
        self._news.put(None)

    def let_go(self) -> None:
        self._cluster.leave(self)

    def _listen(self, machine: _Actor, number: int | None, reference: Any) -> None:
        reference.future().add_done_callback(
            lambda future: self._news.put((machine, number, future))
        )

    def _hear(self, machine: _Actor, number: int | None, future: Any) -> None:
        try:
            said = future.result()
        except _ray().exceptions.RayActorError as error:
            lines = str(error).strip().splitlines()
            self.lost(machine, f"has ended: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}")
        except Exception as cause:
            if number is None:
                self.lost(machine, f"did not come up: {cause}")
            else:
                self.fail_to_read(machine, number, cause)
        else:
            if number is not None:
                kind, packed = said
                self.take(machine, number, kind, lambda: _unpack(*packed))
            elif not machine.ready:
                machine.pid = said
                end = machine.handle.end.options(concurrency_group="end").remote()
                self._listen(machine, None, end)
                self.ready(machine)


class _Cluster:
    """The connection of this process to Ray, and the pools that use it.

    Args:
        folder: of the cluster's files, where it is ours; None: we joined it.
        connected: whether this pool connected the process to Ray, and so disconnects it.
    """

    _lock = threading.RLock()
    _current: _Cluster | None = None

    def __init__(self, address: str | None, folder: str | None, connected: bool) -> None:
        self._address, self._folder, self._connected = address, folder, connected
        self._session = _session()
        self._users: list[_Actors] = []
        # Before Ray's own, which is older: it would leave pools that cannot end their actors.
        atexit.register(self._exit)

    @classmethod
    def join(cls, address: str | None, user: _Actors) -> _Cluster:
        """The cluster, for one more pool.

        Raises:
            RuntimeError: this process is connected to another one.
        """
        with cls._lock:
            if cls._current is None or cls._current._session != _session():
                cls._current = cls._connect(address)
            known = cls._current._address, cls._current._session[0], "auto", None
            if address not in known:
                raise RuntimeError(
                    f"RayWorkers: address must be that of the cluster which this process is in, "
                    f"{known[1]}, got {address!r}; a process is in one cluster at a time"
                )
            cls._current._users.append(user)
            return cls._current

    @classmethod
    def _connect(cls, address: str | None) -> _Cluster:
        ray, quiet = _ray(), {"log_to_driver": False, "logging_level": "ERROR"}
        ours = address is None and not ray.is_initialized()
        if not ours or getattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", True):
            logger.warning("the processes of Ray listen on every interface of their machines")
        if ray.is_initialized():
            return cls(None, None, connected=False)
        if address is not None:
            ray.init(address=address, **quiet)
            return cls(address, None, connected=True)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        folder = tempfile.mkdtemp(prefix="ray-")
        ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=folder, **quiet)
        return cls(None, folder, connected=True)

    def check(self) -> None:
        """Raise a RuntimeError where Ray would begin a cluster of its own: this one has ended."""
        if self._session != _session():
            raise RuntimeError(
                "RayWorkers: this process has left the cluster of the pool; start another pool"
            )

    def leave(self, user: _Actors) -> None:
        """A pool has ended; with the last one ends what was begun for the first."""
        with self._lock:
            self._users.remove(user)
            if self._users:
                return
            atexit.unregister(self._exit)
            if self._connected and self._session == _session():  # else a later one is connected
                _ray().shutdown()
            if type(self)._current is self:
                type(self)._current = None
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _exit(self) -> None:
        for user in list(self._users):
            user.close()


def _session() -> tuple[str, str]:
    """The address of the cluster that this process is in, and what Ray calls its stay there."""
    if not _ray().is_initialized():
        return "none", ""
    context = _ray().get_runtime_context()
    return context.gcs_address, context.get_job_id()


class Serving:
    """What runs in an actor."""

    def __init__(self, threads: int, seed: int) -> None:
        set_up(threads, seed)
        device = torch.device("cuda" if _ray().get_gpu_ids() else "cpu")
        self._modules = LoadedModules(device, _cloud_pickler())

    def call(
        self, number: int, package: list[Any], stream: bytes, arrays: list[Any]
    ) -> tuple[int, Packed]:
        """Do a job, as :class:`LoadedModules` does."""
        if number not in self._modules:
            self._modules.add(number, lambda: _unpack(*_ray().get(package[0])))
        kind, contents = self._modules.call(lambda: _unpack(stream, arrays))
        return kind, _packed(contents)


def _actor_class() -> type:
    """The class of the actors, which is sent to them whole, and finds this package by itself.

    Ray puts the folder that the driver is in before all others, where there may be the sources.
    """
    home = str(Path(__file__).resolve().parents[2])

    class CodedTorchWorker:
        def __init__(self, threads: int, seed: int) -> None:
            import sys

            sys.path.insert(0, home)  # on other machines, where there is none, this does nothing
            try:
                from coded_torch.workers.ray import Serving
            finally:
                sys.path.remove(home)
            self.serving = Serving(threads, seed)

        def hello(self) -> int:
            import os

            return os.getpid()

        def call(self, *job: Any) -> Any:
            return self.serving.call(*job)

        def end(self) -> None:
            """Never returns: waiting for it is how the end of the actor is noticed."""
            import time

            while True:
                time.sleep(3600)

    return CodedTorchWorker


def _pack(value: Any) -> Packed:
    return _packed(Pickled(value, _cloud_pickler()))


def _packed(contents: Pickled) -> Packed:
    tensors = (
        tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
        for tensor, _ in contents.tensors
    )
    return bytes(contents.stream), [flat.view(-1).view(torch.uint8).numpy() for flat in tensors]


def _unpack(stream: bytes, arrays: list[Any]) -> Any:
    # Ray's arrays are views of memory that others read: a write would end the process.
    parts = [np.frombuffer(stream, np.uint8), *arrays]
    ends = np.cumsum([aligned(len(part)) for part in parts]).tolist()
    memory = np.empty(ends[-1], np.uint8)
    for start, part in zip([0, *ends], parts, strict=False):
        memory[start : start + len(part)] = part
    return unpickled(memory.data, len(stream))


def _cloud_pickler() -> type[TensorPickler]:
    return cloud_pickler(_ray().cloudpickle.CloudPickler)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "RayWorkers: Ray must be installed, got none; pip install 'coded_torch[ray]'"
        ) from error
    return ray
