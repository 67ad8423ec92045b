r"""Workers on local devices: a replica of the module and a thread for each."""

import contextlib
import functools
import os
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only, tree_map_only_
from torch.utils.weak import WeakIdKeyDictionary

from .._arguments import find_devices, positive
from .._changes import state_of
from .._table import Failure, Part, Reply
from .._torch import read_here
from ._base import InjectedCrash, Request, Task, compute
from ._dispatch import DispatchedWorkers, Dispatcher, Worker
from ._live import LiveRequest
from ._untuned import CLOSING_SECONDS


class DeviceWorkers(DispatchedWorkers):
    r"""A replica of the module and a thread per device. An idle thread takes the next part.

    So a slow device delays only its own part. Results come back to the device of the inputs, and
    gradients reach the module's own parameters. Transforms of ``torch.func`` are refused.

    Every request makes new replicas: shallow copies of the module's tree, which share the tensors
    that lie on their device. Copies of the other tensors are kept until the original changes or
    gradients flow through them. On devices, a change through ``.data`` goes unnoticed. Attributes
    that a replica assigns are lost, as with :class:`torch.nn.DataParallel`.

    Args:
        devices: one entry per replica. A device may occur more than once.
        timeout: seconds after which a part that was asked for and has not replied has failed.
            Defaults to 600.

    Opening raises:
        TypeError: a part of the module is compiled as a whole; decorate the ``forward`` of its
            class with ``torch.compile`` instead.
        RuntimeError: the pool is closed, or the module runs on this pool itself.

    Note:
        A thread whose module hangs stays until this process ends. Random numbers come from the
        generators of this process, one per device. Accelerators that :func:`torch.manual_seed`
        seeded alike draw the same numbers: seed them apart.
    """

    def __init__(self, devices: Sequence[torch.device | str], *, timeout: float = 600.0) -> None:
        # An empty tensor has the index of "cuda", and fails here if there is no such device.
        self.devices = find_devices(self, devices, lambda d: torch.empty(0, device=d).device)
        self.timeout = positive(self, "timeout", timeout)
        self._size = len(self.devices)
        self.mixed = len({device.type for device in self.devices}) > 1
        self._open()

    def _make(self) -> Dispatcher:
        return _Threads(self.devices, self._size)

    def open(self, module: nn.Module, task: Task) -> Request:
        for name, part in module.named_modules():
            # torch.compile(module) returns a proxy of the original: replicating it would take the
            # original apart. Only its context shows it, as its class would import the compiler.
            if "dynamo_ctx" in vars(part) or part._compiled_call_impl is not None:
                requirement = f"{name or 'the module'} must not be compiled as a whole"
                how = "decorate the forward of its class with torch.compile instead"
                raise TypeError(f"DeviceWorkers: {requirement}, got {type(part).__name__}; {how}")
        threads = self._dispatcher()
        if threading.current_thread() in [each.thread for each in threads._workers]:
            requirement = (
                "requests must not come from a thread of the pool, which would wait for itself"
            )
            raise RuntimeError(f"DeviceWorkers: {requirement}; give the inner wrapper its own pool")
        return _DeviceRequest(module, task, self.timeout, threads)


class _DeviceRequest(LiveRequest):
    def __init__(self, module: nn.Module, task: Task, timeout: float, threads: Any) -> None:
        super().__init__(task, timeout, threads, module)
        # Gradients of a leaf are added up on the stream on which it was first used. Views that are
        # made here make this the caller's stream, as replicas use other streams.
        recorded = (*module.parameters(), *module.buffers()) if torch.is_grad_enabled() else ()
        self.views = {
            id(tensor): tensor.view_as(tensor)
            for tensor in recorded
            if tensor.requires_grad and tensor.device.type != "cpu" and not tensor.is_inference()
        }
        # Inputs, weights and views are there behind these events.
        self.ready = [
            torch.accelerator.current_stream(device).record_event()
            for device in {task.device, *threads.devices}
            if device.type != "cpu"
        ]
        #: The devices of the inputs: a copy to one of them is the caller's tensor.
        self.homes = {x.device for x in task.leaves if isinstance(x, Tensor)}
        self.on_host = all(x.device.type == "cpu" for x in task.leaves if isinstance(x, Tensor))
        self.replicas: dict[_Replica, nn.Module] = {}

    def receive(self, reply: Reply) -> None:
        if self.ready:
            tree_map_only_(Tensor, read_here, reply.value)  # made on the thread's stream


class _Replica(Worker):
    """A device with its thread, and its copies of tensors that lie elsewhere."""

    thread: threading.Thread

    def __init__(self, device: torch.device, index: int = 0) -> None:
        super().__init__(index)
        self.device = device
        self.inbox: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self.seen = weakref.WeakSet[nn.Module]()
        self.copies: Any = WeakIdKeyDictionary()  # version, the copy's version, copy
        self._stream = functools.cache(torch.Stream)

    def is_new_to(self, module: nn.Module) -> bool:
        return module not in self.seen

    def serve(self, threads: Dispatcher) -> None:
        """Compute the parts in the inbox until None comes."""
        while (part := self.inbox.get()) is not None:
            try:
                value = self._call(part.request, part)
            except BaseException as cause:  # SystemExit too: it would end the thread, unnoticed
                # Not str(cause), which may raise.
                text = "".join(traceback.format_exception_only(cause)).strip()
                kind = "died" if isinstance(cause, InjectedCrash) else "raised"
                failure = Failure(f"failed on {self.device}: {text}", kind, cause)
                threads.settle(self, part, failure)
            else:
                threads.settle(self, part, value)
                del value
            del part  # an idle thread must keep no batch alive

    def _call(self, request: Any, part: Part) -> Any:
        """Return the output of a part, on the device of its task, in the modes of the caller."""
        home = request.task.device
        with contextlib.ExitStack() as stack:
            # Own streams, or the caller's decoding would queue behind a late part. The last stream
            # that is entered makes this device the current one.
            devices = [d for d in dict.fromkeys((home, self.device)) if d.type != "cpu"]
            streams = list(map(self._stream, devices))
            for stream in streams:
                stack.enter_context(stream)
                for event in request.ready:
                    stream.wait_event(event)
            stack.enter_context(request.ambient.restored(self.device))
            try:
                arguments = request.task.payload(part.units, self.device in request.homes)
                if streams or not request.on_host:  # walking through them takes 25 us
                    arguments = _to(self.device, arguments)
                    # The backward pass reads the inputs here, when the caller may have freed them.
                    tree_map_only_(Tensor, read_here, arguments)
                if self not in request.replicas:
                    request.replicas[self] = self._replicate(request.module, request.views)
                return _to(home, compute(request.replicas[self], arguments, part.fault))
            finally:
                # A result has arrived when it can be read. If the module raised, the kernels that
                # it launched still read the inputs.
                for stream in streams:
                    stream.synchronize()

    def _replicate(self, module: nn.Module, views: Mapping[int, Tensor]) -> Any:
        """Return a shallow copy of a module, whose tensors are on the device."""
        moved: dict[int, Tensor | None] = {id(None): None}  # tied parameters stay tied

        def move(tensor: Any) -> Any:
            if id(tensor) not in moved:
                moved[id(tensor)] = self._copy(views.get(id(tensor), tensor))
            return moved[id(tensor)]

        copies: dict[Any, Any] = {part: _shallow(part) for part in module.modules()}
        for part, copy in copies.items():
            own = vars(copy)  # a module's __setattr__ takes most of the time
            own["_parameters"] = {name: move(p) for name, p in part._parameters.items()}
            own["_buffers"] = {name: move(b) for name, b in part._buffers.items()}
            own["_modules"] = {name: copies.get(m) for name, m in part._modules.items()}
        return copies[module]

    def _copy(self, tensor: Tensor) -> Tensor:
        """Return a cached copy on the device, which is renewed if either tensor has changed."""
        if tensor.device == self.device:
            return tensor
        if tensor.is_inference() or (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor.to(self.device)
        version = state_of(tensor)
        copy: Tensor
        copied_version, copy_version, copy = self.copies.get(tensor, (None, 0, tensor))
        if copied_version != version or copy_version != copy._version:
            with torch.inference_mode(False), torch.no_grad():
                copy = tensor.to(self.device)
            self.copies[tensor] = version, copy._version, copy
        return copy


class _Threads(Dispatcher):
    kind = "devices"

    def __init__(self, devices: Sequence[torch.device], size: int) -> None:
        super().__init__(size)
        self.devices = devices
        self.process = os.getpid()
        self.wake()

    def wake(self) -> None:
        """Start a thread for each place that has none."""
        with self.lock:
            for index in () if self.closed else self.vacant():
                replica = _Replica(self.devices[index % len(self.devices)], index)
                name = f"coded_torch-{index}-{replica.device}"
                thread = threading.Thread(
                    target=replica.serve, args=(self,), name=name, daemon=True
                )
                replica.thread = thread
                replica.thread.start()
                self.add(replica)

    def retire(self, worker: _Replica) -> None:
        super().retire(worker)
        worker.inbox.put(None)

    def send(self, worker: _Replica, part: Part) -> None:
        worker.seen.add(part.request.module)
        worker.inbox.put(part)

    def restart(self, index: int) -> None:
        for worker in self.at(index):
            worker.copies = WeakIdKeyDictionary()
        super().restart(index)

    def close(self) -> None:
        self.stop()
        replicas = list(self._workers)
        end = time.monotonic() + CLOSING_SECONDS
        for replica in replicas:
            replica.inbox.put(None)
        for replica in replicas:
            if replica.thread is not threading.current_thread():
                replica.thread.join(max(end - time.monotonic(), 0.0))


def _shallow(part: nn.Module) -> Any:
    """Return a shallow copy of a module, as :class:`torch.nn.DataParallel` makes it."""
    kind: Any = type(part)
    if kind._replicate_for_data_parallel is not nn.Module._replicate_for_data_parallel:
        return part._replicate_for_data_parallel()
    copy = kind.__new__(kind)
    vars(copy).update(vars(part), _is_replica=True)
    return copy


def _to(device: torch.device, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)
