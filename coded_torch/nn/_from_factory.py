"""A module that each worker makes for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._loaded import LoadedModule
from .._torch import random_numbers_kept

# While a module is made, the random numbers of this process begin at a seed, and then go on.
_making = threading.Lock()


class FromFactory(LoadedModule):
    """A module that is made by a function, in each process that calls it.

    Only the function travels to workers, so the module need not be picklable, and the caller has
    no copy of its weights. A worker makes the module when it starts, in its ``start_timeout``. The
    workers of a machine share weights that the function maps, as by ``torch.load(mmap=True)``.

    Args:
        factory: a function without arguments that returns the module, ready to be called (for
            example, in evaluation mode). It must be picklable: a function or a class of a Python
            file, or a :func:`functools.partial` of one. It must make equal modules each time.
            While it runs, torch's random numbers on the CPU have the same seed in each process.
            Random numbers of NumPy or of a device have not.

    Raises:
        TypeError: the factory cannot be called, or, in calls, it returns no module.

    Example:
        >>> import functools
        >>> import torch
        >>> from coded_torch.nn import FromFactory
        >>> model = FromFactory(functools.partial(torch.nn.Linear, 3, 1))
        >>> len([*model.parameters()]), model(torch.zeros(2, 3)).shape
        (0, torch.Size([2, 1]))
    """

    def __init__(self, factory: Callable[[], nn.Module]) -> None:
        if not callable(factory):
            raise TypeError(f"FromFactory: factory must be callable, got {factory!r}")
        name = getattr(factory, "__qualname__", None)
        super().__init__(name or repr(factory))
        self.factory = factory

    def extra_repr(self) -> str:
        return self.name

    def _load(self, device: torch.device) -> Callable[..., Any]:
        with _making, random_numbers_kept(seed=0):
            module = self.factory()
        if not isinstance(module, nn.Module):
            got = type(module).__name__
            raise TypeError(f"FromFactory: {self.name} must return a module, got a {got}")
        return module.to(device)
