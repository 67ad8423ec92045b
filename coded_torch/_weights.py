r"""Where the weights of a module are, and whether they have changed."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["device_of", "fingerprint"]


def device_of(module: Any) -> torch.device | None:
    """Return the device of a module's first weight; None if it has none, or is no module."""
    if not isinstance(module, nn.Module):
        return None
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), None)


def fingerprint(module: nn.Module) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The module's tensors, and a key that differs once the module has changed.

    Keep the tensors beside the key: freed, their memory may come to hold other weights, of which
    the key would be the same.
    """
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
