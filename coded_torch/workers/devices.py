r"""Workers on the devices of this machine: a replica of the module and a thread for each."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Generator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .._arguments import find_devices, positive
from ._request import Request
from .base import Reply, Task, WorkerError, Workers

__all__ = ["DeviceWorkers"]

_CLOSING_SECONDS = 5.0


class DeviceWorkers(Workers):
    r"""A replica of the module and a thread per device; each takes the next task when it is free.

    So N workers share the devices, and a slow device holds back no more than the task it is at. A
    worker whose module call raises is missing, with the exception as its error. Results come back
    to the device of the inputs, and gradients reach the module's own parameters.

    Replicas are shallow copies of the module's tree, made anew for every request, so that they see
    its attributes, hooks and modes as they are. Tensors that already lie on the device are shared;
    copies of the others are kept, and made again when the original has changed (an in-place change
    through ``.data`` goes unnoticed) or when gradients have to flow through the copy. What a
    replica assigns to its attributes is lost, as with :class:`torch.nn.DataParallel`. What
    ``torch.compile(module)`` and ``module.compile()`` make is tied to the original and refused; a
    ``forward`` that is decorated with ``torch.compile`` is compiled once for all replicas.

    Args:
        devices: one entry per replica; a device may occur more than once.
        timeout: seconds after which, in a request without a deadline, who has not replied failed.

    Raises:
        TypeError: ``devices`` is a single one, or ``timeout`` not a number.
        ValueError: no device, one that is not there, or ``timeout`` not positive and finite.

    Running raises:
        TypeError: a part of the module is compiled as a whole.
        RuntimeError: the pool is closed, or the module runs on this pool itself.

    Note:
        Which workers answer first depends on timing; what their results decode to does not.

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
        # An empty tensor tells the index of "cuda", and fails here where there is no such device.
        self.devices = find_devices(
            self, devices, lambda device: torch.empty(0, device=device).device
        )
        self.timeout = positive(self, "timeout", timeout)
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[_Request, int] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        # The threads know the queue, not the pool: a pool that nobody holds is closed.
        self._finalizer = weakref.finalize(self, _close, self._jobs, self._threads)

    def run(
        self, module: nn.Module, task: Task, *, quorum: int, deadline: float | None = None
    ) -> Generator[Reply, None, None]:
        """Run ``module`` for every worker, on whichever device is free first."""
        _refuse_compiled(module)
        if threading.current_thread() in self._threads:
            raise RuntimeError(
                "DeviceWorkers: run must not be called from a thread of the pool, which would wait "
                "for itself; give a wrapper inside of a wrapper a pool of its own"
            )
        request = _Request(module, task, ready=_events((task.device, *self.devices)))
        try:
            self._submit(request)
            for reply in request.collect(deadline, self.timeout):
                for leaf in pytree.tree_leaves(reply.value):
                    if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
                        # It was allocated on the worker's stream, and is read on ours from now on.
                        leaf.record_stream(torch.accelerator.current_stream(leaf.device))
                yield reply
        finally:
            request.given_up = True

    def close(self) -> None:
        """End the threads, waiting a few seconds for what they are at; twice is fine."""
        with self._lock:
            self._finalizer()

    def _submit(self, request: _Request) -> None:
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("DeviceWorkers: the pool is closed")
            for i in range(len(self._threads), len(self.devices)):
                replica = _Replica(self.devices[i], self._jobs)
                name = f"coded_torch-{i}-{replica.device}"
                thread = threading.Thread(target=replica.serve, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
            for worker in range(request.task.num_workers):
                self._jobs.put((request, worker))

    def __getstate__(self) -> dict[str, Any]:
        return {"devices": self.devices, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"DeviceWorkers({[str(device) for device in self.devices]})"


@dataclasses.dataclass(eq=False)
class _Request(Request):
    """A request with what the devices need: when its inputs are ready, and a replica for each."""

    ready: list[torch.Event] = dataclasses.field(default_factory=list)
    replicas: dict[_Replica, nn.Module] = dataclasses.field(default_factory=dict)


class _Replica:
    """What one thread holds: its device, and copies of the tensors that live elsewhere."""

    def __init__(
        self, device: torch.device, jobs: queue.SimpleQueue[tuple[_Request, int] | None]
    ) -> None:
        self.device = device
        self._jobs = jobs
        self._streams: dict[torch.device, torch.Stream] = {}
        # tensor -> (its version, its copy's version, the copy)
        self._copies: MutableMapping[Tensor, tuple[Any, int, Tensor]] = WeakIdKeyDictionary()

    def serve(self) -> None:
        """Answer jobs until there comes None."""
        while (job := self._jobs.get()) is not None:
            request, worker = job
            if not request.given_up:
                self._answer(request, worker)
            # An idle thread must keep no batch alive.
            del job, request

    def _answer(self, request: _Request, worker: int) -> None:
        try:
            value = self._call(request, worker)
        except BaseException as cause:  # SystemExit too: it would end the thread, unnoticed
            request.answer(worker, error=self._failure(worker, cause))
        else:
            request.answer(worker, value)

    def _failure(self, worker: int, cause: BaseException) -> WorkerError:
        # Not str(cause), which may raise.
        what = "".join(traceback.format_exception_only(cause)).strip()
        error = WorkerError(worker, f"failed on {self.device}: {what}")
        error.__cause__ = cause
        return error

    def _call(self, request: _Request, worker: int) -> Any:
        home = request.task.device
        with contextlib.ExitStack() as stack:
            # Own streams, or the caller's decoding would queue behind a worker that is late. The
            # last one entered makes this device the current one.
            streams = [
                self._stream(d) for d in dict.fromkeys((home, self.device)) if d.type != "cpu"
            ]
            for stream in streams:
                stack.enter_context(stream)
                for event in request.ready:
                    stream.wait_event(event)
            stack.enter_context(request.ambient.restored(self.device))
            args, kwargs = _to(self.device, request.task.payload(worker))
            module, fault = self._module(request), request.task.fault(worker)
            value = _to(home, fault.around(lambda: module(*args, **kwargs)))
            for stream in streams:
                stream.synchronize()  # a result has arrived when it can be read
        return value

    def _module(self, request: _Request) -> nn.Module:
        if self not in request.replicas:
            request.replicas[self] = self._replicate(request.module)
        return request.replicas[self]

    def _replicate(self, module: nn.Module) -> nn.Module:
        moved: dict[int, Tensor] = {}  # tied parameters stay tied

        def move(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            if id(tensor) not in moved:
                moved[id(tensor)] = self._copy(tensor)
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
        # would take that apart. It is told by its context: its class would import the compiler.
        if "dynamo_ctx" in vars(part) or part._compiled_call_impl is not None:
            raise TypeError(
                f"DeviceWorkers: {name or 'the module'} must not be compiled as a whole, as its "
                f"replicas would run the original, got {type(part).__name__}; decorate the forward "
                "of its class with torch.compile instead"
            )


def _to(device: torch.device, tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)


def _events(devices: Sequence[torch.device]) -> list[torch.Event]:
    """Marks in the current streams of the devices, behind everything that a worker may read."""
    return [
        torch.accelerator.current_stream(device).record_event()
        for device in set(devices)
        if device.type != "cpu"
    ]


def _close(
    jobs: queue.SimpleQueue[tuple[_Request, int] | None], threads: Sequence[threading.Thread]
) -> None:
    with contextlib.suppress(queue.Empty):
        while job := jobs.get_nowait():
            request, worker = job
            error = WorkerError(worker, "was never asked: the pool was closed")
            request.answer(worker, error=error)
    for _ in threads:
        jobs.put(None)
    end = time.monotonic() + _CLOSING_SECONDS
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(end - time.monotonic(), 0.0))
