r"""Workers on the devices of this machine: a replica of the module and a thread for each."""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .._arguments import find_devices, positive
from .._streams import read_here
from ._loading import load_everywhere
from .base import Began, Part, Reply, Request, Task, Workers
from .faults import InjectedCrash
from .live import LiveRequest

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DeviceWorkers"]

_CLOSING_SECONDS = 5.0
_NO_VIEWS: Mapping[int, Tensor] = MappingProxyType({})


class DeviceWorkers(Workers):
    r"""A replica of the module and a thread per device; each takes the next part when it is free.

    So a slow device holds back no more than the part that it is at. Where the module raises, the
    part has failed, with the exception as the cause of its error. Results come back to the device
    of the inputs, and gradients reach the module's own parameters.

    Replicas are shallow copies of the module's tree, made anew for every request, so that they see
    its attributes, hooks and modes as they are. Tensors that already lie on the device are shared;
    copies of the others are kept, and made again when the original has changed (an in-place change
    through ``.data`` goes unnoticed) or when gradients have to flow through the copy. What a
    replica assigns to its attributes is lost, as with :class:`torch.nn.DataParallel`. What
    ``torch.compile(module)`` and ``module.compile()`` make is tied to the original and refused; a
    ``forward`` that is decorated with ``torch.compile`` is compiled once for all replicas.

    Args:
        devices: one entry per replica; a device may occur more than once.
        timeout: seconds after which a part that was asked for and has not replied has failed.

    Raises:
        TypeError: ``devices`` is a single one, or ``timeout`` not a number.
        ValueError: no device, one that is not there, or ``timeout`` not positive and finite.

    Opening raises:
        TypeError: a part of the module is compiled as a whole.
        RuntimeError: the pool is closed, or the module runs on this pool itself.

    Note:
        A thread cannot be ended: one whose module hangs is at its part until this process ends.

        Random numbers come from the generators of this process, one per device. Parts on the CPU
        take different ones, in the order in which they happen to run. Accelerators that were seeded
        alike, as :func:`torch.manual_seed` does, draw the same numbers: seed them apart, with
        ``torch.cuda.manual_seed`` under ``torch.cuda.device``.

    Example:
        >>> import torch
        >>> from coded_torch.codes import ReplicationCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.workers import DeviceWorkers
        >>> with DeviceWorkers(["cpu", "cpu"]) as workers:
        ...     coded = CodedWrapper(torch.nn.ReLU(), ReplicationCode(2, 4), workers=workers)
        ...     coded(torch.tensor([[-1.0], [1.0], [2.0]]))
        tensor([[0.],
                [1.],
                [2.]])
    """

    def __init__(self, devices: Sequence[torch.device | str], *, timeout: float = 600.0) -> None:
        # An empty tensor has the index of "cuda", and fails here where there is no such device.
        self.devices = find_devices(
            self, devices, lambda device: torch.empty(0, device=device).device
        )
        self.timeout = positive(self, "timeout", timeout)
        self._open()

    def _open(self) -> None:
        self.num_machines = len(self.devices)
        # The threads know the jobs, not the pool: a pool that nothing holds is closed.
        self._threads = _Threads(self.devices)
        self._finalizer = weakref.finalize(self, self._threads.close)

    def open(self, module: nn.Module, task: Task) -> Request:
        _refuse_compiled(module)
        self._threads.check()
        return _DeviceRequest(module, task, self.timeout, self._threads)

    def start(
        self, module: nn.Module | None = None, example: Any = None, *, timeout: float = 120.0
    ) -> Self:
        if module is not None and example is not None:
            load_everywhere(self, module, example, timeout)
        return self

    def close(self) -> None:
        """End the threads, waiting a few seconds for what they are at; twice is fine."""
        self._finalizer()

    def __getstate__(self) -> dict[str, Any]:
        return {"devices": self.devices, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"DeviceWorkers({[str(device) for device in self.devices]})"


class _DeviceRequest(LiveRequest):
    """A request with what the devices need.

    Attributes:
        module: what to run.
        views: of its leaves, by their ids, see :func:`_views`.
        ready: events, behind which inputs, weights and views are there.
        replicas: of the module, one for each device.
    """

    def __init__(self, module: nn.Module, task: Task, timeout: float, threads: _Threads) -> None:
        super().__init__(task, timeout)
        self.module = module
        self.views = _views(module)
        self.ready = _events((task.device, *threads.devices))
        self.replicas: dict[_Replica, nn.Module] = {}
        self._threads = threads

    def _submit(self, parts: Sequence[Part]) -> None:
        self._threads.submit((self, part) for part in parts)

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        event = super().wait(until)
        if isinstance(event, Reply):
            for leaf in pytree.tree_leaves(event.value):
                if isinstance(leaf, Tensor):
                    read_here(leaf)  # it was made on the thread's stream
        return event

    @property
    def idle(self) -> int:
        return self._threads.idle()

    def _obstacle(self) -> str:
        return self._threads.obstacle(self)


_Job = tuple[_DeviceRequest, Part]


class _Threads:
    """The threads of a pool, one per device, and the jobs that wait for them."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._replicas: list[_Replica] = []
        self._threads: list[threading.Thread] = []
        self._closed = False

    def check(self) -> None:
        """Raise a RuntimeError if the pool is closed, or this is one of its threads."""
        if self._closed:
            raise RuntimeError("DeviceWorkers: the pool is closed")
        if threading.current_thread() in self._threads:
            raise RuntimeError(
                "DeviceWorkers: requests must not come from a thread of the pool, which would wait "
                "for itself; give a wrapper inside of a wrapper a pool of its own"
            )

    def submit(self, jobs: Iterable[_Job]) -> None:
        """Queue jobs, and start the threads if they have not been."""
        with self._lock:
            if self._closed:
                _fail(jobs)
                return
            for i in range(len(self._threads), len(self.devices)):
                replica = _Replica(self.devices[i], i)
                name = f"coded_torch-{i}-{replica.device}"
                thread = threading.Thread(
                    target=replica.serve, args=(self._jobs,), name=name, daemon=True
                )
                thread.start()
                self._threads.append(thread)
                self._replicas.append(replica)
            for job in jobs:
                self._jobs.put(job)

    def idle(self) -> int:
        """How many threads have nothing to do."""
        busy = sum(replica.request is not None for replica in self._replicas)
        return max(len(self.devices) - busy - self._jobs.qsize(), 0)

    def obstacle(self, request: _DeviceRequest) -> str:
        """How many threads are at other requests than this one."""
        earlier = sum(replica.request not in (None, request) for replica in self._replicas)
        return f"{earlier} of {len(self.devices)} devices are at earlier tasks" if earlier else ""

    def close(self) -> None:
        with self._lock:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while job := self._jobs.get_nowait():
                    _fail([job])
            for _ in self._threads:
                self._jobs.put(None)
        end = time.monotonic() + _CLOSING_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(end - time.monotonic(), 0.0))


class _Replica:
    """What one thread holds: its device, and copies of the tensors that live elsewhere.

    Attributes:
        device: where it computes.
        index: its place in the pool.
        request: whose part it is at; None: it is idle.
    """

    def __init__(self, device: torch.device, index: int = 0) -> None:
        self.device = device
        self.index = index
        self.request: _DeviceRequest | None = None
        self._seen: MutableMapping[nn.Module, bool] = WeakIdKeyDictionary()
        self._streams: dict[torch.device, torch.Stream] = {}
        # tensor -> (its version, its copy's version, the copy)
        self._copies: MutableMapping[Tensor, tuple[Any, int, Tensor]] = WeakIdKeyDictionary()

    def serve(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        """Do jobs until there comes None."""
        while (job := jobs.get()) is not None:
            request, part = job
            self.request = request
            if request.begin(part, self.index, fresh=request.module not in self._seen):
                self._seen[request.module] = True
                self._answer(request, part)
            # An idle thread must keep no batch alive.
            self.request = None
            del job, request

    def _answer(self, request: _DeviceRequest, part: Part) -> None:
        try:
            value = self._call(request, part)
        except BaseException as cause:  # SystemExit too: it would end the thread, unnoticed
            # Not str(cause), which may raise.
            what = "".join(traceback.format_exception_only(cause)).strip()
            kind = "died" if isinstance(cause, InjectedCrash) else "raised"
            request.fail(part, f"failed on {self.device}: {what}", cause, kind)
        else:
            request.settle(part, value)

    def _call(self, request: _DeviceRequest, part: Part) -> Any:
        home = request.task.device
        with contextlib.ExitStack() as stack:
            # Own streams, or the caller's decoding would queue behind a part that is late. The last
            # one entered makes this device the current one.
            streams = [
                self._stream(d) for d in dict.fromkeys((home, self.device)) if d.type != "cpu"
            ]
            for stream in streams:
                stack.enter_context(stream)
                for event in request.ready:
                    stream.wait_event(event)
            stack.enter_context(request.ambient.restored(self.device))
            try:
                args, kwargs = _to(self.device, request.task.payload(part.units))
                # Its backward reads the inputs on this stream, when the caller may have let go.
                pytree.tree_map_only_(Tensor, read_here, (args, kwargs))
                module = self._module(request)
                if part.fault is None:
                    value = module(*args, **kwargs)
                else:
                    value = part.fault.around(lambda: module(*args, **kwargs))
                return _to(home, value)
            finally:
                # A result has arrived when it can be read. Where the module raised, kernels that
                # it has launched still read the inputs.
                for stream in streams:
                    stream.synchronize()

    def _module(self, request: _DeviceRequest) -> nn.Module:
        if self not in request.replicas:
            request.replicas[self] = self._replicate(request.module, request.views)
        return request.replicas[self]

    def _replicate(self, module: nn.Module, views: Mapping[int, Tensor] = _NO_VIEWS) -> nn.Module:
        moved: dict[int, Tensor] = {}  # tied parameters stay tied

        def move(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            if id(tensor) not in moved:
                moved[id(tensor)] = self._copy(views.get(id(tensor), tensor))
            return moved[id(tensor)]

        copies: dict[nn.Module, nn.Module] = {
            part: part._replicate_for_data_parallel() for part in module.modules()
        }
        for part, copy in copies.items():
            copy._parameters = {name: move(p) for name, p in part._parameters.items()}
            copy._buffers = {name: move(b) for name, b in part._buffers.items()}
            copy._modules = {
                name: None if m is None else copies[m] for name, m in part._modules.items()
            }
        return copies[module]

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        if tensor.is_inference() or (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor.to(self.device)
        version = (tensor._version, tensor.data_ptr())
        known = self._copies.get(tensor)
        if known is None or known[0] != version or known[1] != known[2]._version:
            with torch.inference_mode(False), torch.no_grad():
                copy = tensor.to(self.device)
            known = self._copies[tensor] = (version, copy._version, copy)
        return known[2]

    def _stream(self, device: torch.device) -> torch.Stream:
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]


def _refuse_compiled(module: nn.Module) -> None:
    for name, part in module.named_modules():
        # What torch.compile(module) returns hands attributes on to the original: replicating it
        # would take that apart. Its context gives it away: its class would import the compiler.
        if "dynamo_ctx" in vars(part) or part._compiled_call_impl is not None:
            raise TypeError(
                f"DeviceWorkers: {name or 'the module'} must not be compiled as a whole, as its "
                f"replicas would run the original, got {type(part).__name__}; decorate the forward "
                "of its class with torch.compile instead"
            )


def _to(device: torch.device, tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)


def _views(module: nn.Module) -> dict[int, Tensor]:
    """Views of the leaves of a module on accelerators, if gradients are recorded; by their ids.

    Gradients of a leaf are added up on the stream on which it was first used. By a view that is
    made here, on the caller's: replicas would use it on theirs.
    """
    if not torch.is_grad_enabled():
        return {}
    tensors = itertools.chain(module.parameters(), module.buffers())
    return {
        id(tensor): tensor.view_as(tensor)
        for tensor in tensors
        if tensor.requires_grad and tensor.device.type != "cpu" and not tensor.is_inference()
    }


def _events(devices: Sequence[torch.device]) -> list[torch.Event]:
    """Marks in the current streams of the devices, behind all that a replica may read."""
    return [
        torch.accelerator.current_stream(device).record_event()
        for device in set(devices)
        if device.type != "cpu"
    ]


def _fail(jobs: Iterable[_Job]) -> None:
    for request, part in jobs:
        request.fail(part, "was never begun: the pool was closed")
