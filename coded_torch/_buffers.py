r"""Memory that is used again when nothing refers to it any more."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Buffers", "host_memory"]


class _Buffer:
    """Memory, and how much refers to its storage while only this does."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._storage = memory.untyped_storage()
        self._uses = _uses(self._storage)

    def is_free(self) -> bool:
        return _uses(self._storage) == self._uses


class Buffers:
    """Host memory for results, without the page faults of new memory.

    What refers to memory is a tensor, or a view of one, anywhere: with the caller, in a task that
    a machine is still at, among what autograd has saved. It is handed out again only when the last
    of them is gone, which the count of its storage says. Threads may share it.

    Args:
        make: given a place, from 0 on, and a number of bytes, new memory for it, uint8, that large
            at least; what was there before is let go of.
        most: how many pieces of memory there may be.
        least: bytes from which on there are any: what is smaller the allocator itself keeps.
    """

    def __init__(self, make: Callable[[int, int], Tensor], most: int, least: int = 0) -> None:
        self._make, self._most, self._least = make, most, least
        self._buffers: list[_Buffer] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # copies have memory of their own
        return Buffers, (self._make, self._most, self._least)

    def take(self, num_bytes: int) -> Tensor | None:
        """Memory that nothing else refers to, as long as the result, or a view of it, is held.

        Returns:
            uint8, ``[num_bytes]``; None: all that there may be is in use, or that is too little.
        """
        if num_bytes < self._least:
            return None
        with self._lock:
            at = self._find(num_bytes)
            # Of a tensor of its own, so that a view's base counts, too.
            return None if at is None else self._buffers[at].memory.detach()[:num_bytes]

    def clear(self) -> None:
        """Let go of all memory; what was handed out lasts as long as it is held."""
        with self._lock:
            self._buffers.clear()

    def _find(self, num_bytes: int) -> int | None:
        """The place of memory that is free and large enough, made where there is none."""
        sizes = {
            i: len(buffer.memory) for i, buffer in enumerate(self._buffers) if buffer.is_free()
        }
        fitting = [i for i, size in sizes.items() if size >= num_bytes]
        if fitting:
            return min(fitting, key=sizes.__getitem__)
        if len(self._buffers) == self._most and not sizes:
            return None
        at = len(self._buffers)
        if at == self._most:
            at = min(sizes, key=sizes.__getitem__)
            del self._buffers[at]  # before there is new memory
        with torch.inference_mode(False):  # else it could not be written outside of it
            self._buffers.insert(at, _Buffer(self._make(at, num_bytes)))
        return at


def host_memory(_: int, num_bytes: int) -> Tensor:
    """New memory of this process."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def _uses(storage: torch.UntypedStorage) -> tuple[int, int]:
    """How many tensors, and how many names in Python, refer to a storage."""
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)
