r"""Pools whose machines may hang and die, whatever they are."""

from __future__ import annotations

import abc
import dataclasses
import math
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..._arguments import count, instance, positive, warn
from .._loading import load_everywhere
from ..base import Began, Part, Reply, Request, Task, Workers
from ..live import Ambient, LiveRequest
from .supervisor import START_SECONDS, Supervisor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SupervisedWorkers"]


class SupervisedWorkers(Workers):
    """A pool whose machines are started, watched and replaced by a thread of their own.

    Subclasses say what their :class:`Supervisor` is.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        threads: int,
        grace: float,
        timeout: float,
        max_requests: int,
    ) -> None:
        self.num_workers = count(self, "num_workers", num_workers)
        self.num_machines = self.num_workers
        self.threads = count(self, "threads", threads)
        self.grace = positive(self, "grace", grace)
        self.timeout = positive(self, "timeout", timeout)
        self.max_requests = count(self, "max_requests", max_requests)
        self._open()

    @abc.abstractmethod
    def _make_supervisor(self) -> Supervisor:
        """A new one."""

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._supervisor: Supervisor | None = None
        self._room = threading.BoundedSemaphore(self.max_requests)
        self._closed = False
        self._warned = False

    def open(self, module: nn.Module, task: Task) -> Request:
        self._check_gradients(module, task)
        return _SupervisedRequest(self, self._started(module), module, task)

    def memory(self, num_bytes: int) -> Tensor | None:
        return self._started().memory(num_bytes)

    def start(
        self,
        module: nn.Module | None = None,
        example: Any = None,
        *,
        timeout: float = START_SECONDS,
    ) -> Self:
        """Start all workers and wait until they are up; else the first request starts them.

        Args:
            module: all workers load it before this returns.
            example: what the module is called with, an input or a tuple of positional arguments.
                Every worker calls it once, so that no later call has to warm up. None: none does.
            timeout: seconds.

        Raises:
            RuntimeError: not all workers were up, and had loaded the module, in time.
            WorkerError: a worker cannot load or call the module.
        """
        instance(self, "module", module, nn.Module, optional=True)
        end = time.monotonic() + positive(self, "timeout", timeout)
        supervisor = self._started(module)
        if not supervisor.wait_until_ready(timeout):
            raise RuntimeError(
                supervisor.refusal
                or f"{type(self).__name__}: only {self.num_ready} of {self.num_workers} workers "
                f"started within {timeout:g} s; {supervisor.trouble or 'they are still starting'}"
            )
        if module is not None:
            load_everywhere(self, module, example, end - time.monotonic())
        return self

    @property
    def pids(self) -> list[int]:
        """The process ids of the machines that are up, on whatever computer."""
        machines = [] if self._supervisor is None else self._supervisor.machines
        return [machine.pid for machine in machines]

    def forget(self, module: nn.Module) -> None:
        """Send ``module`` to the workers again when it is needed next."""
        if self._supervisor is not None:
            self._supervisor.modules.forget(module)

    def exclude(self, machine: int) -> None:
        """Give a machine no more parts until it is restarted; the others go on.

        Args:
            machine: its place in the pool, as reports have it.

        Raises:
            TypeError, ValueError: there is no such place.
        """
        self._started().exclude(self._place(machine))

    def restart(self, machine: int) -> None:
        """End the process of a machine, excluded or not; a new one takes its place, soon.

        Args:
            machine: as for :meth:`exclude`.

        Raises:
            TypeError, ValueError: there is no such place.
        """
        self._started().restart(self._place(machine))

    def _place(self, machine: int) -> int:
        return count(self, "machine", machine, least=0, most=self.num_workers - 1)

    @property
    def num_ready(self) -> int:
        """How many workers are up now."""
        return 0 if self._supervisor is None else len(self._supervisor.machines)

    @property
    def num_restarts(self) -> int:
        return 0 if self._supervisor is None else self._supervisor.num_lost

    def close(self) -> None:
        """End all workers at once, whatever they are at; twice is fine."""
        with self._lock:
            self._closed = True
        # Not under the lock, as it may take seconds that others would wait for.
        if self._supervisor is not None:
            self._finalizer()

    def _started(self, module: nn.Module | None = None) -> Supervisor:
        """The supervisor; a new one knows what module will be wanted before it starts machines."""
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{type(self).__name__}: the pool is closed")
            if self._supervisor is None:
                supervisor = self._make_supervisor()
                if module is not None:
                    supervisor.modules.pack(module, Ambient.capture())
                self._supervisor, self._pid = supervisor, os.getpid()
                # Its thread knows the supervisor, not the pool: a pool that nothing holds is
                # closed, and so is one that is left at exit.
                self._finalizer = weakref.finalize(self, self._supervisor.close)
                self._supervisor.thread.start()
        if self._pid != os.getpid():
            raise RuntimeError(
                f"{type(self).__name__}: the pool must be used in the process that started it; "
                "give a forked process one of its own"
            )
        if self._supervisor.refusal:
            raise RuntimeError(self._supervisor.refusal)
        return self._supervisor

    def _check_gradients(self, module: nn.Module, task: Task) -> None:
        if not torch.is_grad_enabled():
            return
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in task.leaves):
            raise RuntimeError(
                f"{type(self).__name__}: inputs must not require gradients, which do not pass "
                "through other processes; call under torch.no_grad(), or use DeviceWorkers"
            )
        if not self._warned and any(p.requires_grad for p in module.parameters()):
            self._warned = True
            warn(
                f"{type(self).__name__}: answers have no gradients, which do not pass through "
                "other processes; call under torch.no_grad(), or use DeviceWorkers to train"
            )

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_lock", "_supervisor", "_room", "_finalizer", "_closed", "_pid", "_warned")
        return {name: value for name, value in vars(self).items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_workers})"


class _SupervisedRequest(LiveRequest):
    """A request whose parts are held back until the pool has room for it."""

    def __init__(
        self, pool: SupervisedWorkers, supervisor: Supervisor, module: nn.Module, task: Task
    ) -> None:
        super().__init__(task, pool.timeout)
        self._supervisor = supervisor
        self._module = supervisor.modules.pack(module, self.ambient)
        self._max_requests, self._room = pool.max_requests, pool._room  # not the pool: it may end
        self._has_room = False
        self._held: list[Part] = []

    def _submit(self, parts: Sequence[Part]) -> None:
        self._held += parts
        self._send_held(until=0.0)

    def _send_held(self, until: float) -> None:
        """Wait for room, and have the parts done that were held back."""
        if not self._has_room:
            seconds = min(max(until - self.now(), 0.0), threading.TIMEOUT_MAX)
            self._has_room = self._room.acquire(timeout=seconds)
        if self._has_room:
            held, self._held = self._held, []
            self._supervisor.submit(self, self._module, held)

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        if self._held and (limit := self._limit()) < math.inf:  # else it is not wanted any more
            self._send_held(min(until, limit))
        event = super().wait(until)
        if not isinstance(event, Reply) or self.task.device.type == "cpu":
            return event
        value = pytree.tree_map_only(Tensor, lambda x: x.to(self.task.device), event.value)
        return dataclasses.replace(event, value=value)

    @property
    def idle(self) -> int:
        return self._supervisor.num_idle

    def _obstacle(self) -> str:
        if self._held:
            return f"{self._max_requests} other requests are open, the most that there may be"
        return self._supervisor.obstacle(self)

    def abandon(self) -> None:
        self.abandoned = True
        super().abandon()
        self._supervisor.wake()

    def close(self) -> None:
        super().close()
        if self._has_room:
            self._has_room = False
            self._room.release()
