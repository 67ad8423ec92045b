r"""Workers in the actors of a Ray cluster."""

import atexit
import contextlib
import dataclasses
import importlib.util
import io
import os
import pickle
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._table import Part
from ._supervisor import SupervisedWorkers, Supervisor, WatchedWorker
from ._torchscript import with_scripts


class RayWorkers(SupervisedWorkers):
    r"""An actor per worker, anywhere in a Ray cluster.

    The actors are supervised as the processes of :class:`~coded_torch.workers.ProcessWorkers`.
    Classes of a script or a session need not be importable elsewhere. Ray comes with the
    extra ``ray``. If this pool is the first to import Ray, a cluster of its own listens on the
    loopback interface only. Otherwise, Ray listens on every interface.

    Args:
        num_workers: the number of actors, at least 1.
        address: the address of the cluster, as for :func:`ray.init`. Defaults to None: the cluster
            that this process is in, else a local one, which ends with this process. A process is in
            one cluster at a time.
        threads, hang_timeout, timeout, start_timeout: as for
            :class:`~coded_torch.workers.ProcessWorkers`, but a module has to give signs of life
            while it loads, and processor time is none.
        actor_options: options of each actor for Ray, such as ``num_gpus=1``, for an actor on a GPU.
            By default ``num_cpus=0``, so that any number of actors runs anywhere.

    Raises:
        ImportError: Ray is not installed.

    Starting raises:
        RuntimeError: this process is in another cluster.

    Note:
        A request takes some milliseconds, ten times as long as with local processes. An actor that
        is stopped is ended after ``hang_timeout``, as Ray does not report it.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        address: str | None = None,
        threads: int = 1,
        hang_timeout: float = 30.0,
        timeout: float = 600.0,
        start_timeout: float | None = None,
        **actor_options: Any,
    ) -> None:
        if not importlib.util.find_spec("ray"):
            raise ImportError(
                f"{type(self).__name__}: Ray must be installed: pip install 'coded_torch[ray]'"
            )
        self.address = address
        self.actor_options = {"num_cpus": 0, **actor_options}
        super().__init__(
            num_workers,
            threads=threads,
            hang_timeout=hang_timeout,
            timeout=timeout,
            start_timeout=start_timeout,
        )

    def _make(self) -> Supervisor:
        how = self.address, self.threads, self.actor_options
        return _Actors(*how, *self._limits())


@dataclasses.dataclass(eq=False, kw_only=True)
class _Actor(WatchedWorker):
    handle: Any

    def __str__(self) -> str:
        if self.pid:
            return f"actor {self.index} (process {self.pid})"
        return f"actor {self.index}"


class _Actors(Supervisor):
    """The actors of a pool. News of Ray come through a queue."""

    kind = "actors"

    def __init__(self, address: Any, threads: int, options: Any, *size_and_limits: Any) -> None:
        super().__init__(*size_and_limits)
        self._news: queue.SimpleQueue[tuple[_Actor, Part | None, Any] | None] = queue.SimpleQueue()
        self._address = address
        self._threads = threads
        self._options = options

    def set_up(self) -> None:
        self._session = _connect(self._address)
        fixed = {"concurrency_groups": {"life": 1}, "max_restarts": 0, "max_task_retries": 0}
        self._class = _ray().remote(**fixed, **self._options)(_actor_class())
        # Runs before Ray's own exit handler, which would leave a pool that cannot end its actors.
        atexit.register(self.close)

    def pack(self, module: nn.Module) -> Any:
        file = io.BytesIO()
        with_scripts(self._ray().cloudpickle.CloudPickler)(file).dump(module)
        # Ray would resolve a bare reference in every call.
        return [self._ray().put(file.getvalue())]

    def launch(self, index: int) -> _Actor:
        self._ray()
        handle = self._class.remote(self._threads, self.seed())
        worker = _Actor(index, handle=handle)
        self._listen(worker, None, handle.live.remote(0.0))
        return worker

    def send(self, worker: _Actor, part: Part) -> None:
        self._ray()
        module = part.request.module
        contents = _portable(module.contents(part))
        reply = worker.handle.call.remote(module.number, module.package, contents)
        self._listen(worker, part, reply)

    def end(self, worker: _Actor) -> None:
        # An actor whose cluster has ended, or that Ray does not know any more, has ended.
        with contextlib.suppress(RuntimeError, _ray().exceptions.ActorHandleNotFoundError):
            self._ray().kill(worker.handle, no_restart=True)

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(queue.Empty):
            news = self._news.get(timeout=seconds)
            while news is not None:
                self._hear(*news)
                news = self._news.get_nowait()

    def ring(self) -> None:
        self._news.put(None)

    def let_go(self) -> None:
        atexit.unregister(self.close)

    def _ray(self) -> Any:
        """Return Ray; a RuntimeError if the cluster has ended, as Ray would begin another one."""
        if self._session != _session():
            why = "this process has left the cluster of the pool; start another pool"
            raise RuntimeError(f"RayWorkers: {why}")
        return _ray()

    def _listen(self, worker: _Actor, part: Part | None, reference: Any) -> None:
        future = reference.future()
        future.add_done_callback(lambda future: self._news.put((worker, part, future)))

    def _hear(self, worker: _Actor, part: Part | None, future: Any) -> None:
        """Handle the end of a remote call: a sign of life, or of a part."""
        error = future.exception()
        if isinstance(error, _ray().exceptions.RayActorError):
            lines = str(error).strip().splitlines()
            self.lost(worker, f"has ended: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}")
        elif part is not None:
            self.settle(worker, part, (worker, future.result))
        elif error is not None:
            self.lost(worker, f"did not come up: {error}")
        elif worker in self._workers:
            worker.pid = future.result()
            worker.life = time.monotonic()
            live = worker.handle.live.options(concurrency_group="life")
            self._listen(worker, None, live.remote(self.beat))
            if not worker.ready:
                self.ready(worker)


_lock = threading.Lock()
_joined: dict[tuple[str, str], str | None] = {}  # the address by which a session was joined


def _connect(address: str | None) -> tuple[str, str]:
    """Connect this process to a cluster, unless it is in one, and return its :func:`_session`."""
    # Ray reads the first variable when it is imported: at 0, sockets bind to 127.0.0.1.
    ours = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED")
    unset = set(ours) - os.environ.keys() if address is None else ()
    with _lock, contextlib.ExitStack() as restoring:
        for name in unset:
            os.environ[name] = "0"
            restoring.callback(os.environ.pop, name)
        begins = not _ray().is_initialized()
        if begins:
            own_cluster: dict[str, Any] = {}
            if address is None:
                own_cluster = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            _ray().init(
                address or "local", log_to_driver=False, logging_level="ERROR", **own_cluster
            )
        session = _session()
        joined = _joined.setdefault(session, address if begins else None)
        if address not in (None, "auto", session[0], joined):
            requirement = (
                f"address must be that of the cluster which this process is in, {session[0]}"
            )
            remedy = "call ray.shutdown() to leave that cluster"
            raise RuntimeError(f"RayWorkers: {requirement}, got {address!r}; {remedy}")
        return session


def _session() -> tuple[str, str]:
    """Return the address of the cluster that this process is in, and Ray's id of its stay there."""
    if "ray" not in sys.modules or not _ray().is_initialized():
        return "none", ""
    context = _ray().get_runtime_context()
    return context.gcs_address, context.get_job_id()


def _actor_class() -> type:
    """Return the class of actors, which is sent whole, and finds this package, not its sources."""
    home = str(Path(__file__).resolve().parents[2])

    class CodedTorchWorker:
        def __init__(self, threads: int, seed: int) -> None:
            sys.path.insert(0, home)  # the folder does not exist elsewhere
            try:
                from coded_torch.workers import _ray as ours
                from coded_torch.workers import _worker_main
            finally:
                sys.path.remove(home)
            _worker_main.set_up(threads, seed)
            device = torch.device("cuda" if ours._ray().get_gpu_ids() else "cpu")
            self.modules = _worker_main.LoadedModules(device, ours._portable)
            self.get = ours._ray().get

        def live(self, seconds: float) -> int:
            """Return the process id, after some seconds. The pool hears of an end meanwhile."""
            time.sleep(seconds)
            return os.getpid()

        def call(self, number: int, package: list[Any], contents: Any) -> Any:
            self.modules.add(number, lambda: pickle.loads(self.get(package[0])))
            return self.modules.call(lambda: contents)

    return CodedTorchWorker


def _portable(tree: Any) -> Any:
    """Return a pytree with tensors on the CPU, without gradients and the storage of views."""

    def move(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        if tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # a view
        return tensor

    return tree_map_only(Tensor, move, tree)


def _ray() -> Any:
    import ray

    return ray
