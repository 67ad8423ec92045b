r"""Modules on their way to other processes."""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..._weights import fingerprint
from ..live import Ambient

__all__ = ["ModuleStore", "PackedModule"]


class PackedModule(NamedTuple):
    """The module of a request: what is the same for all of its jobs.

    Attributes:
        number: of the module as it is now, so that it is sent once.
        package: the module, as it is sent.
        alive: the numbers of all modules that may still be needed.
        head: number, alive and the caller's modes, pickled.
    """

    number: int
    package: Any
    alive: frozenset[int]
    head: bytes


class ModuleStore:
    """The modules that have been packed, each until it has changed or nothing else holds it.

    Args:
        pack: makes a package of a module.
    """

    def __init__(self, pack: Callable[[nn.Module], Any]) -> None:
        self._make = pack
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        # module -> (what it looked like, its number, the package, its tensors)
        self._packed: Any = WeakIdKeyDictionary()

    def pack(self, module: nn.Module, ambient: Ambient) -> PackedModule:
        """The module as it is now, for a caller with these modes.

        Raises:
            TypeError: the module cannot be pickled.
        """
        tensors, how = fingerprint(module)
        with self._lock:
            packed = self._packed.get(module)
            if packed is None or packed[0] != how:
                packed = how, next(self._numbers), self._package(module), tensors
                self._packed[module] = packed
            alive = frozenset(number for _, number, *_ in self._packed.values())
        _, number, package, _ = packed
        return PackedModule(number, package, alive, pickle.dumps((number, alive, ambient)))

    def last(self) -> tuple[int, Any] | None:
        """The number and the package of the one that was packed last, of those that are there.

        None while one is being packed, which may take long.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            entries = [(number, package) for _, number, package, _ in self._packed.values()]
        finally:
            self._lock.release()
        return max(entries, key=lambda entry: entry[0], default=None)

    def forget(self, module: nn.Module) -> None:
        """Pack ``module`` again when it is needed next."""
        with self._lock:
            self._packed.pop(module, None)

    def clear(self) -> None:
        """Let go of all packages."""
        with self._lock:
            self._packed.clear()

    def _package(self, module: nn.Module) -> Any:
        try:
            return self._make(module)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                "Workers: the module must be picklable to be sent to another process, "
                f"got {type(module).__name__}: {error}"
            ) from error
