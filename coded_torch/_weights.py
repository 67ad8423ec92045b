r"""Whether a module has changed."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["looks"]


def looks(module: nn.Module) -> tuple[list[Tensor], tuple[Any, ...]]:
    """What differs once a module has changed, as long as the tensors beside it are kept.

    They keep their memory from being used for other weights, which would look the same.
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
