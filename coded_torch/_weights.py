r"""The device of a module's weights, and whether they have changed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["device_of", "fingerprint", "unchanged"]

Fingerprint = tuple[list[Tensor], tuple[Any, ...]]
# In a block of `unchanged`: by the id of a module, itself and its fingerprint.
_KNOWN: ContextVar[dict[int, tuple[nn.Module, Fingerprint]] | None] = ContextVar(
    "_KNOWN", default=None
)


def device_of(module: Any) -> torch.device | None:
    """Return the device of a module's first weight; None if it has none, or is no module."""
    if not isinstance(module, nn.Module):
        return None
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), None)


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Take modules as unchanged in a block, so that :func:`fingerprint` walks each one once."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def fingerprint(module: nn.Module) -> Fingerprint:
    """Return the module's tensors, and a key that differs once the module has changed.

    Keep the tensors beside the key. If they were freed, their memory may come to hold other weights
    with the same key.
    """
    known = _KNOWN.get()
    if known is None:
        return _walk(module)
    if id(module) not in known:
        known[id(module)] = module, _walk(module)
    return known[id(module)][1]


def _walk(module: nn.Module) -> Fingerprint:
    kept: list[Tensor] = []
    looks: list[tuple[Any, ...]] = []
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        version = 0 if tensor.is_inference() else tensor._version
        if tensor.layout is torch.strided:
            tensor = tensor.detach()  # follows no later assignment to data
            looks.append((tensor.data_ptr(), version, tensor.shape, tensor.stride()))
        else:
            looks.append((id(tensor), version))
        kept.append(tensor)
    return kept, (*looks, *(part.training for part in module.modules()))
