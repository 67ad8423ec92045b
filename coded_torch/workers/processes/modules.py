r"""Modules on both sides: the caller packs them once, the workers load and call them."""

from __future__ import annotations

import itertools
import operator
import pickle
import random
import threading
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ..._torch import fingerprint
from ..base import Part, Task
from ..faults import compute, kill_own_process
from ..live import Ambient

__all__ = ["LoadedModules", "ModuleStore", "PackedModule", "remote_cause", "set_up"]

# An exception in words, its traceback, and itself if it can travel.
_Failure = tuple[str, str, Exception | None]


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
    """The packed modules, each until it changes or nothing else holds it.

    Args:
        pack: makes a package of a module.
    """

    def __init__(self, pack: Callable[[nn.Module], Any]) -> None:
        self._make = pack
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        # module -> (its fingerprint, its number, the package, its tensors)
        self._packed: Any = WeakIdKeyDictionary()

    def pack(self, module: nn.Module, ambient: Ambient) -> PackedModule:
        """Return the module in its present state, for a caller with these modes.

        Raises:
            TypeError: the module cannot be pickled.
        """
        tensors, how = fingerprint(module)
        with self._lock:
            packed = self._packed.get(module)
            if packed is None or packed[0] != how:
                try:
                    package = self._make(module)
                except (pickle.PicklingError, AttributeError, TypeError) as error:
                    raise TypeError(
                        "Workers: the module must be picklable to be sent to another process, "
                        f"got {type(module).__name__}: {error}"
                    ) from error
                packed = self._packed[module] = how, next(self._numbers), package, tensors
            alive = frozenset(number for _, number, *_ in self._packed.values())
        _, number, package, _ = packed
        return PackedModule(number, package, alive, pickle.dumps((number, alive, ambient)))

    def last(self) -> tuple[int, Any] | None:
        """Return the number and the package that were packed last.

        Returns None if there is none, or while one is being packed, which may take long.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            entries = [entry[1:3] for entry in self._packed.values()]
        finally:
            self._lock.release()
        return max(entries, default=None, key=operator.itemgetter(0))

    def forget(self, module: nn.Module) -> None:
        """Pack ``module`` again when it is needed next."""
        with self._lock:
            self._packed.pop(module, None)

    def clear(self) -> None:
        """Release all packages."""
        with self._lock:
            self._packed.clear()


# The workers use the rest.


def set_up(threads: int, seed: int) -> None:
    """Set the number of threads of this worker, and seed its random numbers."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class LoadedModules:
    """The modules that a worker was sent, or the errors of unusable ones.

    Args:
        device: the device that computes.
        pack: makes results ready to be sent.
    """

    def __init__(self, device: torch.device, pack: Callable[[Any], Any]) -> None:
        self.device = device
        self._pack = pack
        self._modules: dict[int, nn.Module | _Failure] = {}
        self._head = b""
        self._open: tuple[int, Ambient]

    def __contains__(self, number: int) -> bool:
        return number in self._modules

    def add(self, number: int, read: Callable[[], nn.Module]) -> None:
        """Load a module."""
        try:
            self._modules[number] = read().to(self.device)
        except Exception as error:
            self._modules[number] = _failure(error)

    def call(self, read: Callable[[], Any]) -> tuple[bool, Any]:
        """Do a :meth:`PackedModule.job`. Return whether it succeeded, and its packed result."""
        try:
            head, fault, arguments = read()
            module, ambient = self._look_up(head)
            if isinstance(module, tuple):
                return False, self._pack(module)
            with ambient.restored(self.device):
                if self.device.type != "cpu":
                    arguments = pytree.tree_map_only(
                        Tensor, lambda tensor: tensor.to(self.device), arguments
                    )
                value = compute(module, arguments, fault, kill_own_process)
                return True, self._pack(value)
        except Exception as cause:
            return False, self._pack(_failure(cause))

    def _look_up(self, head: bytes) -> tuple[nn.Module | _Failure, Ambient]:
        if head != self._head:
            number, alive, ambient = pickle.loads(head)
            for gone in self._modules.keys() - alive - {number}:
                del self._modules[gone]
            self._head, self._open = head, (number, ambient)
        number, ambient = self._open
        return self._modules[number], ambient


def remote_cause(contents: _Failure) -> Exception:
    """Return the exception that a module raised elsewhere, caused by its traceback there."""
    what, trace, raised = contents
    cause = raised or RuntimeError(what)
    cause.__cause__ = _RemoteTraceback(trace)
    return cause


class _RemoteTraceback(Exception):  # noqa: N818 - prints as the traceback that it holds
    def __init__(self, trace: str) -> None:
        self.trace = trace
        super().__init__(trace)

    def __str__(self) -> str:
        return f"\n{self.trace}"


def _failure(cause: Exception) -> _Failure:
    what = "".join(traceback.format_exception_only(cause)).strip()
    trace = "".join(traceback.format_exception(cause))
    try:
        pickle.loads(pickle.dumps(cause))
    except Exception:  # the caller cannot find its class, or make it from its arguments
        return what, trace, None
    return what, trace, cause
