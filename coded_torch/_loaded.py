"""Modules that hold no weights. Each process that calls one loads the weights for itself."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Loaded:
    """What a process has loaded, by device; pickles and copies of it are empty."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = dict[torch.device, Callable[..., Any]]()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loaded, ()


class LoadedModule(nn.Module):
    """A module that calls another one, which each process loads for itself.

    A worker loads it when it gets this module, and other processes at the first call. Its mode and
    its dtype cannot be changed from here.
    """

    _place: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.training = False
        self.name = name
        self._loaded = _Loaded()
        self.register_buffer("_place", torch.empty(0), persistent=False)  # is where it is to run

    @abc.abstractmethod
    def _load(self, device: torch.device) -> Callable[..., Any]:
        """Return what computes the outputs on a device."""

    def load(self) -> Callable[..., Any]:
        """Return what computes the outputs on the device that this module was moved to."""
        device = self._place.device
        call = self._loaded.calls.get(device)
        if call is None:
            with self._loaded.lock:
                call = self._loaded.calls.get(device)
                if call is None:
                    call = self._load(device)
                    self._loaded.calls[device] = call
        return call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the loaded module."""
        return self.load()(*args, **kwargs)

    def train(self, mode: bool = True) -> LoadedModule:
        """Return this module, unchanged."""
        return self

    def _apply(self, function: Any, recurse: bool = True) -> LoadedModule:
        """Move to another device, or raise a ValueError if the dtype is to be changed."""
        if function(torch.empty(0)).dtype != torch.float32:
            kind = type(self).__name__
            raise ValueError(f"{kind}: the dtype of {self.name} cannot be changed, make it anew")
        nn.Module._apply(self, function, recurse)
        return self


def load_all(module: nn.Module) -> None:
    """Load what a module and its parts call."""
    for part in module.modules():
        if isinstance(part, LoadedModule):
            part.load()


def unload_all(module: nn.Module) -> None:
    """Free what a module and its parts have loaded in this process; a call loads it again."""
    for part in module.modules():
        if isinstance(part, LoadedModule):
            part._loaded = _Loaded()
