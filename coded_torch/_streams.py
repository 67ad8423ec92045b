"""Memory that other streams read than the one on which it was made."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["read_here"]


def read_here(tensor: Tensor) -> Tensor:
    """Keep the memory of a tensor, once it is freed, until the current stream has read it.

    The allocator knows of the stream on which the tensor was made, and of no other.
    """
    if tensor.device.type != "cpu":
        tensor.record_stream(torch.accelerator.current_stream(tensor.device))
    return tensor
